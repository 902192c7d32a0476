"""``deploy()`` as its users know it: from an agent in a folder to rows in a table, and what comes after."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy import (
    Deployment,
    DeploymentError,
    delete_deployment,
    deploy,
    get_deployments,
    list_deployments,
)
from deploy.registry import EndpointFolder
from tests.support import free_port, rows, wait_for

AGENT = """
import os

import mlflow


@mlflow.trace(span_type="AGENT")
def predict(request: dict) -> dict:
    return {{"answer": "{answer}", "color": os.environ.get("COLOR"), "cwd": os.getcwd()}}
"""


SLOW_AGENT = """
import time
from pathlib import Path


def predict(request: dict) -> dict:
    sign = Path(request["wait_for"])
    Path(f"{sign}.asked").touch()
    while not sign.exists():
        time.sleep(0.02)
    return {"prompt": Path("prompt.txt").read_text()}
"""


@dataclass(frozen=True)
class Place:
    """A folder with an agent, and what is deployed from it."""

    folder: Path
    port: int

    def write(self, answer: str, name: str = "my_agent") -> None:
        (self.folder / f"{name}.py").write_text(AGENT.format(answer=answer))

    def deploy(self, agent: Any = "my_agent:predict", *arguments: Any, **options: Any) -> Deployment:
        return deploy(agent, *arguments, **{"port": self.port, **options})

    @property
    def table(self) -> Path:
        return self.folder / "tracelake-data" / "payload"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Deletes what was deployed, whatever happened."""
    monkeypatch.setenv("TRACELAKE_HOME", str(tmp_path / "home"))
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    place = Place(folder, free_port())
    place.write("one")
    try:
        yield place
    finally:
        for one in {one.endpoint_name for one in list_deployments()}:
            with contextlib.suppress(DeploymentError):
                delete_deployment(one)


def ask(deployment: Deployment, **body: Any) -> dict[str, Any]:
    reply = httpx.post(deployment.query_endpoint, json=body, timeout=30).raise_for_status()
    answer: dict[str, Any] = reply.json()
    return answer


def tracelake(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )


def test_two_lines_and_a_request_make_a_row(place: Place) -> None:
    """The deployer has long gone when its endpoint answers, traced, with nothing else configured."""
    lines = f"from deploy import deploy\nprint(deploy('my_agent:predict', port={place.port}).query_endpoint)"
    done = subprocess.run(
        [sys.executable, "-c", lines],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.stdout.strip() == f"http://127.0.0.1:{place.port}/invocations", done.stderr
    assert httpx.post(done.stdout.strip(), json={"question": "?"}).json()["answer"] == "one"
    (row,) = wait_for(lambda: rows(place.table), "the row")
    assert (row["served_entity_id"], row["trace_state"], row["span_count"]) == ("my_agent/1", "OK", 1)
    (deployment,) = get_deployments("my_agent")
    assert deployment.status().state == "serving"
    assert deployment.status().traffic == 100
    assert list(deployment.query("select count(*) as n from payload")) == [{"n": 1}]
    assert "POST /invocations" in deployment.logs()


def test_a_version_runs_as_it_was_deployed(place: Place) -> None:
    """Neither an edit nor a worker's restart changes what serves; a rollback brings it back."""
    first = place.deploy(environment_vars={"COLOR": "blue"}, durability="strict")
    place.write("two")
    assert (ask(first)["answer"], ask(first)["color"]) == ("one", "blue")
    (worker,) = first.status().workers
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: first.status().workers not in ((), (worker,)), "another worker")
    assert (ask(first)["answer"], ask(first)["color"]) == ("one", "blue")

    second = place.deploy()
    assert (second.version, second.endpoint_url) == ("2", first.endpoint_url)
    assert (ask(second)["answer"], ask(second)["color"]) == ("two", None)
    assert first.status().traffic == 0

    back = place.deploy(version=1)
    assert (back.served_entity_name, ask(back)["answer"]) == ("my_agent/1", "one")
    back.stop()
    entities = [row["served_entity_id"] for row in rows(place.table)]
    assert entities == ["my_agent/1"] * 4 + ["my_agent/2"] * 2 + ["my_agent/1"]


def test_a_version_that_fails_leaves_the_old_one(place: Place) -> None:
    """With the agent's own error; and the number is free for the next attempt."""
    first = place.deploy()
    (place.folder / "my_agent.py").write_text("raise RuntimeError('no weights')\n")
    with pytest.raises(DeploymentError, match="RuntimeError: no weights"):
        place.deploy()
    assert ask(first)["answer"] == "one"
    assert [one.version for one in list_deployments()] == ["1"]
    place.write("two")
    assert ask(place.deploy())["answer"] == "two"


@pytest.mark.parametrize(
    ("source", "agent", "options", "message"),
    [
        ("x = 1", "my_agent:predikt", {}, "no attribute 'predikt'"),
        ("import no_such_library", "my_agent:predict", {}, "No module named 'no_such_library'"),
        ("raise RuntimeError('no weights')", "my_agent:predict", {}, "RuntimeError: no weights"),
        ("import os; os._exit(3)", "my_agent:predict", {}, "3"),
        ("import time; time.sleep(60)", "my_agent:predict", {"wait_seconds": 3}, "3 s"),
        ("def predict(r): ...", "my_agent:predict", {"table": "/proc/no/table"}, "/proc/no"),
        (
            "def predict(r): ...",
            "my_agent:predict",
            {"environment_vars": {"INFERENCE_TABLE_PATHS": "?"}},
            "PATHS",
        ),
    ],
)
def test_what_does_not_come_up_says_why(
    place: Place, source: str, agent: str, options: dict[str, Any], message: str
) -> None:
    """The worker's own reason reaches the deployer, and nothing is left that runs or is listed."""
    (place.folder / "my_agent.py").write_text(source)
    with pytest.raises(DeploymentError, match=message):
        place.deploy(agent, **options)
    assert list_deployments() == []
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", place.port)) != 0


def test_a_port_in_use_is_named(place: Place) -> None:
    """The second most common mistake."""
    in_use = pytest.raises(DeploymentError, match=f"{place.port}.*in use")
    with socket.create_server(("127.0.0.1", place.port)), in_use:
        place.deploy()


def test_without_a_port_it_is_the_usual_or_a_free_one(place: Place) -> None:
    """And stays the same for the next version."""
    first = place.deploy(port=None)
    other = place.deploy(port=None, endpoint_name="other")
    assert ask(first)["answer"] == ask(other)["answer"] == "one"
    assert first.endpoint_url != other.endpoint_url
    assert place.deploy(port=None, endpoint_name="other").endpoint_url == other.endpoint_url


def test_what_runs_is_not_moved(place: Place) -> None:
    """Another port or table would cut off clients, or split the rows, unasked."""
    first = place.deploy()
    with pytest.raises(DeploymentError, match=r"port is \d+, not \d+; stop or delete it"):
        place.deploy(port=free_port())
    for _ in range(2):
        with pytest.raises(DeploymentError, match=r"table is .* delete it first"):
            place.deploy(table=place.folder / "elsewhere")
        first.stop()  # which is not enough: its version has the table that it was made with
    assert ask(place.deploy(version=1))["answer"] == "one"


def test_a_dead_endpoint_is_listed_as_dead_and_starts_again(place: Place) -> None:
    """Whoever killed its supervisor: it shows, its rows are there, and its version can be deployed again."""
    first = place.deploy()
    ask(first)
    pid = EndpointFolder("my_agent").state().pid  # type: ignore[union-attr]
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: first.status().state == "dead", "it to be dead")
    wait_for(lambda: len(rows(place.table)) == 1, "the row")
    wait_for(lambda: port_is_free(place.port), "the workers to end")
    again = place.deploy(version=1)
    assert ask(again)["answer"] == "one"


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_stopped_endpoint_is_kept(place: Place) -> None:
    """Stopping is not deleting; it may come back elsewhere."""
    first = place.deploy()
    first.stop()
    assert first.status().state == "stopped"
    assert [one.version for one in list_deployments()] == ["1"]
    port = free_port()
    assert ask(place.deploy(version=1, port=port))["answer"] == "one"


def test_deleting_the_newest_sends_traffic_back(place: Place) -> None:
    """To the version before; and deleting the last one deletes the endpoint, not the table."""
    first = place.deploy()
    place.write("two")
    second = place.deploy(traffic={"1": 50, "2": 50})
    assert {ask(second)["answer"] for _ in range(40)} == {"one", "two"}
    assert (first.status().traffic, second.status().traffic) == (50, 50)
    delete_deployment("my_agent", 2)
    assert {ask(first)["answer"] for _ in range(10)} == {"one"}
    assert first.status().traffic == 100
    delete_deployment("my_agent", 1)
    assert list_deployments() == []
    assert port_is_free(place.port)
    assert len(rows(place.table)) == 50
    with pytest.raises(DeploymentError, match="not deployed"):
        delete_deployment("my_agent")


def test_a_version_is_deleted_when_it_has_answered(place: Place) -> None:
    """Until then it may read what is in its copy: a request that was taken before is answered as ever."""
    place.deploy()
    (place.folder / "prompt.txt").write_text("be kind")
    (place.folder / "my_agent.py").write_text(SLOW_AGENT)
    second = place.deploy(drain_seconds=60)
    replies: list[dict[str, Any]] = []
    asking = threading.Thread(target=lambda: replies.append(ask(second, wait_for=str(place.folder / "go"))))
    asking.start()
    wait_for((place.folder / "go.asked").exists, "the request to arrive")
    deleting = threading.Thread(target=delete_deployment, args=("my_agent", 2))
    deleting.start()
    wait_for(lambda: second.status().state == "draining", "the other version to take over")
    (place.folder / "go").touch()
    for thread in (asking, deleting):
        thread.join(60)
    assert replies == [{"prompt": "be kind"}]
    assert [one.version for one in list_deployments()] == ["1"]
    assert not EndpointFolder("my_agent").version_folder("2").exists()


def test_a_dead_endpoint_is_deleted_when_it_has_answered(place: Place) -> None:
    """Its workers outlive a killed supervisor until then; the reply is whole, and a row."""
    (place.folder / "prompt.txt").write_text("be kind")
    (place.folder / "my_agent.py").write_text(SLOW_AGENT)
    deployment = place.deploy()
    replies: list[dict[str, Any]] = []
    asking = threading.Thread(
        target=lambda: replies.append(ask(deployment, wait_for=str(place.folder / "go")))
    )
    asking.start()
    wait_for((place.folder / "go.asked").exists, "the request to arrive")
    pid = EndpointFolder("my_agent").state().pid  # type: ignore[union-attr]
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: deployment.status().state == "dead", "it to be dead")
    deleting = threading.Thread(target=delete_deployment, args=("my_agent",))
    deleting.start()
    deleting.join(1)  # where it doesn't wait, it has deleted the copy by then
    (place.folder / "go").touch()
    for thread in (asking, deleting):
        thread.join(60)
    assert replies == [{"prompt": "be kind"}]
    assert list_deployments() == []
    assert len(rows(place.table)) == 1


def test_a_number_is_never_given_again(place: Place) -> None:
    """Rows carry it: they must not seem to be another version's."""
    place.deploy()
    place.deploy()
    delete_deployment("my_agent", 2)
    assert place.deploy().version == "3"


def test_two_deployers_at_once_make_two_versions(place: Place) -> None:
    """One waits for the other."""
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(place.deploy().version)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(found) == ["1", "2"]
    assert sum(one.status().traffic for one in list_deployments()) == 100


def test_another_agent_of_the_same_module_does_not_take_over(place: Place) -> None:
    """Unless it is said: two functions of one file would replace each other by accident."""
    place.deploy()
    with pytest.raises(DeploymentError, match="endpoint_name='my_agent'"):
        place.deploy("my_agent:predict_more")


def test_code_in_a_folder_of_the_python_path_is_frozen_too(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A `src` layout works, and runs from the copy; a folder called `deploy` is not ours."""
    (place.folder / "src" / "deploy").mkdir(parents=True)
    (place.folder / "src" / "deploy" / "__init__.py").touch()
    (place.folder / "deploy").mkdir()
    (place.folder / "deploy" / "__init__.py").touch()
    (place.folder / "my_agent.py").rename(place.folder / "src" / "other_agent.py")
    monkeypatch.syspath_prepend(str(place.folder / "src"))
    deployment = place.deploy("other_agent:predict")
    place.write("two", "src/other_agent")
    assert ask(deployment)["answer"] == "one"
    assert Path(ask(deployment)["cwd"]).is_relative_to(EndpointFolder("other_agent").path)


def test_keys_protect_an_endpoint(place: Place, tmp_path: Path) -> None:
    """Requests need one, and its name is in the row; metrics have a port of their own."""
    key = "k" * 32
    (tmp_path / "keys").write_text(f"alice {key}\n")
    (tmp_path / "keys").chmod(0o600)
    deployment = place.deploy(api_key_file=tmp_path / "keys")
    assert httpx.post(deployment.query_endpoint, json={}).status_code == 401
    headers = {"authorization": f"Bearer {key}"}
    assert httpx.post(deployment.query_endpoint, json={}, headers=headers).status_code == 200
    assert httpx.get(f"{deployment.endpoint_url}/metrics", headers=headers).status_code == 404
    assert deployment.admin_url is not None
    assert httpx.get(f"{deployment.admin_url}/health").status_code == 200
    metrics = f"{deployment.admin_url}/metrics"
    wait_for(lambda: "tracelake_captured_total 1.0" in httpx.get(metrics).text, "the request to be counted")
    deployment.stop()
    (row,) = rows(place.table)
    assert row["requester"] == "alice"
    assert key not in str(row) + deployment.logs(1000)


def test_keys_of_the_environment_are_found_from_the_copy(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path in the deployer's environment means a file where that was, not in the frozen copy."""
    (place.folder / ".gitignore").write_text("keys\n")
    (place.folder / "keys").write_text(f"alice {'k' * 32}\n")
    (place.folder / "keys").chmod(0o600)
    monkeypatch.setenv("TRACELAKE_API_KEY_FILE", "keys")
    deployment = place.deploy()
    assert httpx.post(deployment.query_endpoint, json={}).status_code == 401
    headers = {"x-api-key": "k" * 32}
    assert httpx.post(deployment.query_endpoint, json={}, headers=headers).status_code == 200


def test_the_command_line_does_the_same(place: Place) -> None:
    """Deploy, list, read the log, go back, and end it."""
    done = tracelake("deploy", "my_agent:predict", "--port", str(place.port), "--env", "COLOR=red")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"http://127.0.0.1:{place.port}"
    assert httpx.post(f"{done.stdout.strip()}/invocations", json={}).json()["color"] == "red"
    place.write("two")
    assert tracelake("deploy", "my_agent:predict", "--traffic", "1=50", "--traffic", "2=50").returncode == 0
    listed = tracelake("deployments", "--format", "table").stdout
    assert "my_agent/1" in listed
    assert "my_agent/2" in listed
    assert listed.count("50 %") == 2
    assert '"state": "serving"' in tracelake("deployments", "my_agent").stdout
    assert tracelake("undeploy", "my_agent", "--version", "2").returncode == 0
    assert "POST /invocations" in tracelake("logs", "my_agent").stdout
    wrong = tracelake("deploy", "my_agnet:predict")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (1, 1)
    assert "did you mean 'my_agent'" in wrong.stderr
    assert tracelake("undeploy", "my_agent").returncode == 0
    assert list_deployments() == []
    assert "not deployed" in tracelake("undeploy", "my_agent").stderr
