"""``tracelake serve``: any agent, recorded, with metrics."""

import hashlib
import importlib.util
import json
import re
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from inference_table.errors import SettingsError
from inference_table.settings import StorageSettings
from serving.exposition import MetricsApp
from serving.serve import check_server, serve
from serving.server_settings import ServerSettings
from tests.serving.recorded import NO_TLS, outline, trace_of
from tests.support import ROOT, Process, free_port, rows, running, served, wait_for

AGENT = "tests.deploy.kill_agent:app"
FUNCTIONS = "tests.serving.function_agents"
SECURITY = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
KEY = "alice-0123456789abcdef"


def environment(folder: Path) -> dict[str, str]:
    return {
        "INFERENCE_TABLE_URI": str(folder / "payload"),
        "INFERENCE_TABLE_SPOOL_DIR": str(folder / "spool"),
        "INFERENCE_TABLE_FLUSH_SECONDS": "0.2",
    }


def metric(text: str, name: str) -> float:
    match = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    assert match is not None, f"{name} is not among the metrics"
    return float(match[1])


def is_settled(text: str, rows: int) -> bool:
    """Whether so many rows are committed, and nothing waits."""
    counted = metric(text, "tracelake_committed_total") == metric(text, "tracelake_captured_total") == rows
    return counted and metric(text, "tracelake_spool_segments") == 0


def test_metrics_count_all_workers(tmp_path: Path) -> None:
    """Whichever of two workers answers, /metrics has what both of them did."""
    with served(AGENT, "--workers", "2", env=environment(tmp_path), log=tmp_path / "log") as (url, _):
        for number in range(40):
            # A new connection each time, so that both workers get some.
            httpx.post(f"{url}/invocations", json={"number": number})
        wait_for(lambda: len(rows(tmp_path / "payload")) == 40, "the rows")
        # Readers see a commit before the process that made it takes its segments away and counts it.
        wait_for(lambda: is_settled(httpx.get(f"{url}/metrics").text, 40), "the commits to be counted")
        texts = [httpx.get(f"{url}/metrics").text for _ in range(8)]
    for text in texts:
        assert metric(text, "tracelake_captured_total") == 40
        assert metric(text, "tracelake_spooled_total") == 40
        assert metric(text, "tracelake_capture_overhead_seconds_count") == 40
        assert metric(text, "tracelake_writer_up") == 1
        assert metric(text, "tracelake_spool_segments") == 0
    assert metric(texts[-1], "tracelake_committed_total") == 40


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_server_that_stopped_leaves_no_temporary_files(tmp_path: Path, workers: str) -> None:
    """uvicorn ends a single process by the signal that stopped it, before it could clean up."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    env = {**environment(tmp_path), "TMPDIR": str(temporary)}
    with served(AGENT, "--workers", workers, env=env, log=tmp_path / "log") as (url, _):
        httpx.post(f"{url}/invocations", json={}).raise_for_status()
    assert list(temporary.iterdir()) == []


def test_settings_of_the_command_line_reach_the_workers(tmp_path: Path) -> None:
    """Options win over the environment, in every worker."""
    arguments = ("--workers", "2", "--durability", "strict", "--served-entity", "bot/7")
    with served(AGENT, *arguments, env=environment(tmp_path), log=tmp_path / "log") as (url, _):
        replies = [httpx.post(f"{url}/invocations", json={}) for _ in range(10)]
    assert {reply.headers["x-inference-table-durability"] for reply in replies} == {"spooled"}
    assert [row["served_entity_id"] for row in rows(tmp_path / "payload")] == ["bot/7"] * 10


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("tests.deploy.no_such_agent:app", "there is no module 'tests.deploy.no_such_agent'"),
        ("tests.deploy.kill_agent:ap", "has no attribute 'ap'"),
        ("tests.deploy.kill_agent:Any.x", "has no attribute 'Any.x'"),
        ("tests.deploy.kill_agent", "give module:attribute"),
        ("./no/such/model", "no folder with an MLflow model"),
        (f"{FUNCTIONS}:Agent", "Agent is a class; make an instance of it"),
        (f"{FUNCTIONS}:make_app", "make_app() takes no argument"),
        (f"{FUNCTIONS}:two", "can't be called with the request alone"),
    ],
)
def test_an_app_that_cannot_be_imported_stops_the_start(
    tmp_path: Path, workers: str, target: str, message: str
) -> None:
    """One line says what is wrong, also where workers would be started again for ever."""
    command = [sys.executable, "-m", "deploy.cli", "serve", target, "--workers", workers]
    ended = subprocess.run(
        [
            *command,
            "--port",
            str(free_port()),
            "--table",
            str(tmp_path / "payload"),
            "--spool-dir",
            str(tmp_path),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.returncode == 1
    assert message in ended.stderr.splitlines()[-1]


def test_a_function_is_served_by_workers(tmp_path: Path) -> None:
    """A function in a module, whole and streamed, in several processes; /metrics is beside it."""
    arguments = (f"{FUNCTIONS}:predict", "--workers", "2")
    with served(*arguments, env=environment(tmp_path), log=tmp_path / "log") as (url, _):
        for _ in range(10):
            reply = httpx.post(f"{url}/invocations", json={"question": "why"})
            assert reply.json() == {"found": ["about why"]}
        assert "tracelake_captured_total" in httpx.get(f"{url}/metrics").text
    traces = [trace_of(row) for row in rows(tmp_path / "payload")]
    assert [outline(trace) for trace in traces] == ["predict(search)"] * 10


@pytest.mark.skipif(importlib.util.find_spec("mlflow.pyfunc") is not None, reason="full MLflow is here")
def test_a_model_without_full_mlflow_stops_the_start(tmp_path: Path) -> None:
    """The error names what to install."""
    (tmp_path / "MLmodel").write_text("flavors: {}")
    for target in ("models:/support/1", str(tmp_path)):
        with pytest.raises(SettingsError, match=r"need the whole of MLflow .*tracelake\[mlflow\]"):
            serve(target, settings={"uri": str(tmp_path / "payload"), "spool_dir": tmp_path / "spool"})


def test_metrics_can_be_mounted_anywhere(tmp_path: Path) -> None:
    """An app without capture exposes what the spool of its machine holds."""
    app = FastAPI()
    app.mount("/metrics", MetricsApp(StorageSettings.from_environ({}, spool_dir=tmp_path)))
    with running(app) as url:
        text = httpx.get(f"{url}/metrics/").text
    assert metric(text, "tracelake_spool_bytes") == 0
    assert metric(text, "tracelake_oldest_uncommitted_seconds") == 0


# --- what belongs to operators ---


def admin_url(log: Path) -> str:
    """Where the server says that its admin port is."""
    found = re.search(r"Metrics and health are on (http://127\.0\.0\.1:\d+)", log.read_text())
    assert found is not None
    return found[1]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_metrics_and_health_are_on_the_admin_port_alone(tmp_path: Path, workers: str) -> None:
    """With one worker and with several; on the agent's port the same paths are the agent's."""
    log = tmp_path / "log"
    arguments = (AGENT, "--admin-port", "0", "--workers", workers)
    with (
        served(*arguments, env=environment(tmp_path), log=log) as (url, process),
        httpx.Client(verify=NO_TLS) as client,
    ):
        admin = admin_url(log)
        for _ in range(4):
            client.post(f"{url}/invocations", json={}).raise_for_status()
            health = client.get(f"{admin}/health")
            assert (health.status_code, health.json()) == (200, {"status": "ready"})
        wait_for(
            lambda: metric(client.get(f"{admin}/metrics").text, "tracelake_captured_total") == 4,
            "all requests to be counted",
        )
        assert client.post(f"{admin}/invocations", json={}).status_code == 405
        assert client.get(f"{admin}/invocations").status_code == 404
        # Starlette's answer, where ours would be JSON: the agent knows neither path.
        for path in ("/metrics", "/health"):
            assert (client.get(url + path).status_code, client.get(url + path).text) == (404, "Not Found")
        # Who sends the admin port as the host is still on the agent's.
        assert (
            client.get(f"{url}/metrics", headers={"host": admin.removeprefix("http://")}).status_code == 404
        )
        process.stop()
        with pytest.raises(httpx.ConnectError):
            client.get(f"{admin}/health")
    assert len(rows(tmp_path / "payload")) == 4


def test_limits_of_the_command_line_hold(tmp_path: Path) -> None:
    """Options win over the environment; what they refuse is a row."""
    env = {**environment(tmp_path), "TRACELAKE_MAX_REQUEST_BYTES": "1", "TRACELAKE_MAX_CONCURRENCY": "1"}
    arguments = (AGENT, "--max-request-bytes", "100", "--max-concurrency", "7")
    with served(*arguments, env=env, log=tmp_path / "log") as (url, _), httpx.Client(verify=NO_TLS) as client:
        statuses = [
            client.post(f"{url}/invocations", content=b'"' + b"q" * size + b'"').status_code
            for size in (98, 99, 98, 99)
        ]
        assert statuses == [200, 413, 200, 413]
        assert (
            metric(client.get(f"{url}/metrics").text, r'tracelake_refused_total\{reason="request_size"\}')
            == 2
        )
    assert sorted(row["status_code"] for row in rows(tmp_path / "payload")) == [200, 200, 413, 413]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--port", "8123", "--admin-port", "8123"],
            "the admin port is 8123, the agent's port; give it another",
        ),
        (["--api-key-file", "no/such/file"], "no/such/file': there is none; give the path of one"),
    ],
)
def test_server_settings_that_cannot_work_stop_the_start(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    """One line, before uvicorn starts."""
    command = [sys.executable, "-m", "deploy.cli", "serve", AGENT, *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert message in ended.stderr.splitlines()[-1]
    assert "uvicorn" not in ended.stderr.lower()


def test_an_admin_port_in_use_stops_the_start(tmp_path: Path) -> None:
    """With what to do about it."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            "deploy.cli",
            "serve",
            AGENT,
            "--admin-port",
            str(taken),
            "--port",
            "0",
        ]
        env = {**environment(tmp_path), "PATH": ""}
        ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 1
    assert f"cannot listen on the admin port {taken} of 127.0.0.1: Address already in use" in ended.stderr


@pytest.mark.parametrize(
    ("host", "keys", "warned"),
    [("0.0.0.0", False, True), ("127.0.0.1", False, False), ("localhost", False, False), ("::", True, False)],
)
def test_an_open_address_without_keys_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, host: str, keys: bool, warned: bool
) -> None:
    """Loopback addresses and addresses with keys are none."""
    (tmp_path / "keys").write_text(f"alice {KEY}")
    check_server(ServerSettings(api_key_file=tmp_path / "keys" if keys else None), host, 8000)
    assert (f"without API keys whoever reaches {host} may call the agent" in caplog.text) == warned


def test_keys_and_settings_in_the_guide_work_as_it_says(tmp_path: Path) -> None:
    """Its file, its server, its requests and its digest; the key is in no log and in no file of the table."""
    [(make, serve), (ask, health, query), (digest,)] = [
        re.findall(r"^(.*\S)$", block, re.MULTILINE)[-lines:]
        for block, lines in zip(
            re.findall(r"^```sh\n(.*?)```", SECURITY, re.DOTALL | re.MULTILINE), (2, 3, 1), strict=True
        )
    ]
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    subprocess.run(["sh", "-c", f"umask 077\n{make}"], cwd=tmp_path, env={"PATH": path}, check=True)
    name, key = (tmp_path / "keys").read_text().split()
    environ = {"KEY": key, "PATH": path}
    printed = subprocess.run(["sh", "-c", digest], env=environ, check=True, capture_output=True, text=True)
    assert printed.stdout.split()[0] == hashlib.sha256(key.encode()).hexdigest()
    options = shlex.split(serve)[3:-1]
    assert options == ["--api-key-file", "keys", "--admin-port"]
    options[1] = str(tmp_path / "keys")
    log = tmp_path / "log"
    with (
        served(f"{FUNCTIONS}:predict", *options, "0", env=environment(tmp_path), log=log) as (url, _),
        httpx.Client(verify=NO_TLS) as client,
    ):
        _, _, *arguments = shlex.split(ask.replace("$KEY", key))
        headers = dict(one.split(": ") for one in arguments[1:4:2])
        assert client.post(f"{url}/invocations", headers=headers, content=arguments[-1]).status_code == 200
        refused = client.post(f"{url}/invocations", headers={"x-api-key": KEY}, content=arguments[-1])
        assert refused.status_code == 401
        assert client.get(admin_url(log) + "/" + health.rpartition("/")[2]).status_code == 200
        text = client.get(f"{admin_url(log)}/metrics").text
        assert metric(text, r'tracelake_unauthenticated_total\{reason="wrong"\}') == 1
    assert "requester, status_code" in query
    [row] = rows(tmp_path / "payload")
    assert (row["requester"], row["status_code"]) == (name, 200)
    assert "WARNING" not in log.read_text()
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "keys"]
    assert len(written) > 2
    assert not [path for path in written if key.encode() in path.read_bytes()]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_the_guide_tells_how_to_serve_with_tls(tmp_path: Path) -> None:
    """uvicorn with what ``tracelake serve`` runs, by the environment alone."""
    make = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=localhost"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(["openssl", *make.split(), *names], cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "keys").write_text(f"alice {KEY}\n")
    (tmp_path / "my_agent.py").write_text(f"from {FUNCTIONS} import predict as app\n")
    [(export, command)] = re.findall(r"^ +(export .*)\n +(uvicorn .*)$", SECURITY, re.MULTILINE)
    env = dict(one.split("=") for one in shlex.split(export)[1:])
    port = free_port()
    arguments = [sys.executable, "-m", *shlex.split(command), "--port", str(port)]
    env = {**environment(tmp_path), **env, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    server = Process(arguments, env, tmp_path / "log", cwd=tmp_path)
    context = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))

    def status(**headers: str) -> int:
        try:
            address = f"https://127.0.0.1:{port}/invocations"
            return httpx.post(address, headers=headers, json={"question": "why"}, verify=context).status_code
        except httpx.ConnectError:
            return 0

    try:
        assert wait_for(status, "the server to answer", 60) == 401
        assert status(authorization=f"Bearer {KEY}") == 200
        server.stop()
    finally:
        server.kill_group()
    assert [row["requester"] for row in rows(tmp_path / "payload")] == ["alice"]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_folder_of_the_agent_does_not_take_our_place(tmp_path: Path, workers: str) -> None:
    """Agents have folders called `deploy`; processes that the server starts must not import these."""
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy" / "__init__.py").write_text("raise RuntimeError('not yours')\n")
    (tmp_path / "my_agent.py").write_text("def predict(request: dict) -> dict:\n    return request\n")
    arguments = ("my_agent:predict", "--app-dir", str(tmp_path), "--workers", workers)
    with served(*arguments, env=environment(tmp_path), log=tmp_path / "log") as (url, _):
        assert httpx.post(f"{url}/invocations", json={"a": 1}).json() == {"a": 1}


def test_an_agent_may_leave_and_delete_the_current_folder(tmp_path: Path) -> None:
    """Relative places are those of the start, for whatever is opened later."""
    code, here, elsewhere = tmp_path / "code", tmp_path / "here", tmp_path / "elsewhere"
    for folder in (code, here, elsewhere):
        folder.mkdir()
    (code / "wanderer.py").write_text(
        "import os, shutil\n\n\n"
        "def predict(request: dict) -> dict:\n"
        "    os.chdir(request['to'])\n"
        "    shutil.rmtree(request.get('remove', 'nothing'), ignore_errors=True)\n"
        "    return request\n"
    )
    env = {"ENABLE_MLFLOW_TRACING": "true", "PYTHONPATH": str(ROOT)}
    arguments = ("wanderer:predict", "--app-dir", str(code), "--table", "payload", "--spool-dir", "spool")
    asked = [{"to": str(elsewhere)}, {"to": str(elsewhere), "remove": str(elsewhere)}, {"to": "/"}]
    with served(*arguments, env=env, log=tmp_path / "log", cwd=here) as (url, _):
        for number, body in enumerate(asked):
            httpx.post(f"{url}/invocations", json=body).raise_for_status()
            wait_for(lambda number=number: len(rows(here / "payload")) == number + 1, "the row")  # type: ignore[misc]
    assert [json.loads(row["request"]) for row in rows(here / "payload")] == asked
    assert not elsewhere.exists()
    assert "cannot" not in (tmp_path / "log").read_text()
