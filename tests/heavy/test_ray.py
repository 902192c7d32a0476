"""Engine ``ray`` on a real cluster of several node processes: updates under load, and whole nodes killed."""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

import deploy.ray as engine
from deploy import Deployment, delete_deployment, deploy
from deploy.registry import Endpoint, EndpointFolder, State, Version, write_json
from inference_table.drain import drain
from inference_table.errors import DeploymentError
from inference_table.settings import StorageSettings
from tests.heavy.graph_agents import write_graph
from tests.support import ROOT, free_port, output_of, rows, wait_for

pytestmark = [
    pytest.mark.heavy,
    # A second process with tests of this file waits until the first has stopped its cluster.
    pytest.mark.timeout(1800),
]

pytest.importorskip("ray.serve", reason="needs the extra `heavy`: make test-all")

AGENTS = Path(__file__).parent / "ray_agents"
GOOD = "plain_agent:predict"
CLIENTS = 16


class Cluster:
    """A cluster in a child process; nodes are killed by the ids of their processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.raylets: dict[str, int] = {}
        module = ["-W", "ignore", "-m", "tests.heavy.ray_cluster"]
        command = [sys.executable, *module, str(folder), str(self.port)]
        with (folder / "cluster.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.address = self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("> "):
                return line[2:].strip()
        raise RuntimeError((self.folder / "cluster.log").read_text(encoding="utf-8"))

    def add(self, name: str, cpus: int) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"add {name} {cpus}\n")
        self._process.stdin.flush()
        self.raylets[name] = int(self._answer())

    def kill(self, name: str) -> None:
        """SIGKILL a node: its raylet and all processes that it started."""
        raylet = self.raylets.pop(name)
        for pid in (raylet, *children_of(raylet)):
            kill(pid)

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


def children_of(parent: int) -> list[int]:
    found = Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="utf-8")
    return [int(pid) for pid in found.split()]


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    with (folder.parent.parent / "ray.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = Cluster(folder)
        try:
            made.add("a", 2)
            made.add("b", 2)
            yield made
        finally:
            made.stop()


@dataclass
class Deployed:
    """An endpoint as ``deploy()`` writes it, with engine ``ray``."""

    tmp_path: Path
    port: int
    address: str
    settings: dict[str, str] = field(default_factory=dict)
    """Environment of its versions."""
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder = EndpointFolder("bot", self.tmp_path / "endpoints")
        self.folder.create()
        self.table = str(self.tmp_path / "payload")
        self.url = f"http://127.0.0.1:{self.port}/bot"

    def version(self, number: str, target: str = GOOD, **options: Any) -> Version:
        """A version of its own folder, whose agent says its number."""
        folder = self.folder.version_folder(number)
        shutil.copytree(AGENTS, folder / "code")
        agent = folder / "code" / "plain_agent.py"
        agent.write_text(agent.read_text(encoding="utf-8").replace('"first"', repr(number)), encoding="utf-8")
        made = Version(
            number=number,
            agent=target,
            target=target,
            model_name="plain_agent",
            model_version=number,
            working_dir=str(folder / "code"),
            environment={"INFERENCE_TABLE_FLUSH_SECONDS": "0.2", **self.settings},
            python=sys.executable,
            created_at=datetime.now(UTC).isoformat(),
            options={"ray_actor_options": {"num_cpus": 1}, **options},
        )
        write_json(folder / "version.json", made.to_json())
        return made

    def endpoint(self, **traffic: int) -> Endpoint:
        return Endpoint(
            name="bot",
            engine="ray",
            host="127.0.0.1",
            port=self.port,
            table=self.table,
            spool_dir="",
            traffic={number.removeprefix("v"): share for number, share in traffic.items()},
            generation=1,
            wait_seconds=300.0,  # the machine has other tests to run
            options={"address": self.address, **self.options},
        )

    def apply(self, number: str) -> None:
        endpoint = self.endpoint(**{f"v{number}": 100})
        self.folder.write_endpoint(endpoint)
        assert engine.apply(self.folder, endpoint).state == "serving"

    def stop(self) -> None:
        engine.stop(self.folder, self.endpoint())

    def ask(self, question: str = "why") -> dict[str, Any]:
        reply = httpx.post(f"{self.url}/invocations", json={"question": question}, timeout=60)
        reply.raise_for_status()
        answer: dict[str, Any] = reply.json()
        return answer


@pytest.fixture
def deployed(cluster: Cluster, tmp_path: Path) -> Iterator[Deployed]:
    made = Deployed(tmp_path, cluster.port, cluster.address)
    yield made
    made.stop()


class Load:
    """Clients that ask on and on, also after errors; counts what was acknowledged and what was not."""

    def __init__(self, deployed: Deployed, clients: int, pause_seconds: float = 0.0) -> None:
        self.acknowledged: list[str] = []
        self.receipts: Counter[str] = Counter()
        self.versions: list[str] = []
        self.where: dict[int, int] = {}
        """Raylet by replica, both as process ids."""
        self.failures: list[str] = []
        self._url = f"{deployed.url}/invocations"
        self._pause_seconds = pause_seconds
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        with httpx.Client(timeout=60) as client:
            while not self._stop.wait(self._pause_seconds):
                try:
                    reply = client.post(self._url, json={"question": "why " * 20})
                except httpx.TransportError as error:
                    self.failures.append(repr(error))
                    continue
                if reply.status_code != 200:
                    self.failures.append(f"{reply.status_code} {reply.text}")
                    continue
                answer = reply.json()
                self.where[answer["pid"]] = answer["raylet"]
                self.versions.append(answer["version"])
                self.receipts[reply.headers["x-inference-table-durability"]] += 1
                self.acknowledged.append(reply.headers["x-databricks-request-id"])

    def until(self, count: int) -> None:
        wait_for(lambda: len(self.acknowledged) >= count, f"{count} acknowledged requests", 600)

    def stop(self) -> list[str]:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        return self.acknowledged


def assert_recorded(deployed: Deployed, acknowledged: list[str]) -> None:
    recorded = Counter(row["databricks_request_id"] for row in rows(deployed.table))
    assert [one for one in acknowledged if one not in recorded] == []
    assert [one for one, count in recorded.items() if count > 1] == []


def replicas_of(load: Load, raylet: int) -> list[int]:
    return [pid for pid, parent in list(load.where.items()) if parent == raylet]


def test_what_cannot_be_deployed(tmp_path: Path) -> None:
    """A cluster that is not there, a split and options that Serve has not are named, with what to do."""
    nowhere = Deployed(tmp_path, free_port(), f"127.0.0.1:{free_port()}")
    nowhere.version("1")
    nowhere.version("2", num_replicas=0, autoscaling={}, replicas=2)
    with pytest.raises(DeploymentError, match=r"is it running.*`ray start --head`"):
        nowhere.apply("1")
    with pytest.raises(DeploymentError, match=r"replicas is none of .*num_replicas is 0: .*give one of them"):
        nowhere.apply("2")
    with pytest.raises(DeploymentError, match="cannot split the traffic"):
        engine.apply(nowhere.folder, nowhere.endpoint(v1=90, v2=10))
    engine.stop(nowhere.folder, nowhere.endpoint())
    assert engine.state(nowhere.folder, nowhere.endpoint()).state == "stopped"


def test_an_endpoint_whose_cluster_is_gone(tmp_path: Path) -> None:
    """It is dead, not an error."""
    gone = Deployed(tmp_path, free_port(), f"127.0.0.1:{free_port()}")
    gone.folder.write_state(State(state="serving", traffic={"1": 100}))
    dead = engine.state(gone.folder, gone.endpoint())
    assert (dead.state, dead.traffic) == ("dead", {})


def test_updates_under_load(cluster: Cluster, deployed: Deployed) -> None:
    """A version replaces another without a failed request, one that fails to start replaces nothing, and a
    clean stop records all."""
    for number, target in (("1", GOOD), ("2", GOOD), ("3", "broken_agent:predict")):
        deployed.version(number, target, num_replicas=2)
    deployed.apply("1")
    load = Load(deployed, 4, pause_seconds=0.05)
    load.until(50)
    deployed.apply("2")
    count = len(load.acknowledged)
    load.until(count + 100)
    assert set(load.versions[count + 4 :]) == {"2"}
    second = {deployed.ask()["pid"] for _ in range(20)}
    with pytest.raises(DeploymentError, match="LookupError: the vector index is not there") as raised:
        deployed.apply("3")
    assert "Version 2 serves on" in str(raised.value)
    assert "a replica of bot/3 starts: broken_agent:predict" in str(raised.value)
    load.until(len(load.acknowledged) + 100)
    assert {deployed.ask()["pid"] for _ in range(20)} == second
    assert load.failures == []
    acknowledged = load.stop()
    endpoint = deployed.endpoint(v2=100)
    assert engine.state(deployed.folder, endpoint).traffic == {"2": 100}
    log = engine.logs(deployed.folder, endpoint, "1", 10_000)
    assert "a replica of bot/1 starts" in log
    assert "a replica of bot/2 starts" not in log
    deployed.stop()
    assert engine.state(deployed.folder, endpoint).state == "stopped"
    assert_recorded(deployed, acknowledged)
    found = rows(deployed.table)
    assert {row["served_entity_id"] for row in found} == {"bot/1", "bot/2"}
    assert {dict(row["request_metadata"])["path"] for row in found} == {"/invocations"}
    assert output_of(found[0])["trace"]["data"]["spans"][0]["name"] == "predict"
    for node in cluster.raylets:
        assert list(cluster.folder.glob(f"{node}/spool/*"))
    assert not list(cluster.folder.glob("*/spool/*/*/*.arrow"))


def test_a_version_that_cannot_start(deployed: Deployed) -> None:
    """The replica's own reason is in the error, whether the agent or our start-up failed; nothing is left."""
    deployed.version("1", "plain_agent:nothing")
    with pytest.raises(DeploymentError, match="module 'plain_agent' has no attribute 'nothing'"):
        deployed.apply("1")
    deployed.settings["INFERENCE_TABLE_DURABILITY"] = "often"
    deployed.version("2")
    with pytest.raises(DeploymentError, match="INFERENCE_TABLE_DURABILITY is 'often'"):
        deployed.apply("2")
    assert httpx.get(deployed.url).status_code in (404, 503)


def test_strict_survives_a_killed_replica_and_a_killed_node(
    cluster: Cluster, deployed: Deployed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every acknowledged row is there once, after the dead node's spool was drained; and when all replicas
    are dead, and what Ray keeps for a while by itself is gone, a new node still gets the version's code."""
    monkeypatch.setenv("RAY_RUNTIME_ENV_TEMPORARY_REFERENCE_EXPIRATION_S", "1")
    deployed.settings |= {"INFERENCE_TABLE_DURABILITY": "strict", "INFERENCE_TABLE_FLUSH_SECONDS": "2"}
    deployed.version("1", num_replicas=2, ray_actor_options={"num_cpus": 2})
    deployed.apply("1")
    load = Load(deployed, CLIENTS)
    load.until(600)
    assert set(load.where.values()) == set(cluster.raylets.values())
    for pid in replicas_of(load, cluster.raylets["a"]):
        kill(pid)
    load.until(1300)
    cluster.kill("b")
    load.until(2000)
    acknowledged = load.stop()
    assert load.receipts.keys() == {"spooled"}
    for pid in replicas_of(load, cluster.raylets["a"]):
        kill(pid)
    cluster.add("c", 2)
    wait_for(lambda: answers_from(deployed, cluster.raylets["c"]), "an answer from the new node", 240)
    deployed.stop()
    left = StorageSettings(uri=deployed.table, spool_dir=cluster.folder / "b" / "spool")
    assert drain(left).rows > 0
    assert_recorded(deployed, acknowledged)


def answers_from(deployed: Deployed, raylet: int) -> bool:
    try:
        return deployed.ask()["raylet"] == raylet
    except httpx.HTTPError:
        return False


def test_committed_survives_a_node_that_is_gone_with_its_spool(cluster: Cluster, deployed: Deployed) -> None:
    """Every acknowledged row is there once, with nothing left of the dead node."""
    if "c" not in cluster.raylets:  # the test above was not run
        cluster.add("c", 2)
        cluster.kill("b")
    deployed.settings |= {"INFERENCE_TABLE_DURABILITY": "committed", "INFERENCE_TABLE_FLUSH_SECONDS": "0.1"}
    deployed.version("1", num_replicas=2, ray_actor_options={"num_cpus": 2})
    deployed.apply("1")
    load = Load(deployed, 2 * CLIENTS)
    load.until(600)
    assert set(load.where.values()) == set(cluster.raylets.values())
    for pid in replicas_of(load, cluster.raylets["a"]):
        kill(pid)
    load.until(1300)
    cluster.kill("c")
    shutil.rmtree(cluster.folder / "c")
    load.until(2000)
    acknowledged = load.stop()
    assert load.receipts.keys() == {"committed"}
    deployed.stop()
    assert_recorded(deployed, acknowledged)


def test_deploy_does_on_ray_what_it_does_here(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A LangGraph agent, a second version, a rollback, its rows, and the end; by the same functions."""
    monkeypatch.setenv("TRACELAKE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    table = tmp_path / "payload"
    options: dict[str, Any] = {"engine": "ray", "ray_address": cluster.address, "port": cluster.port}
    options |= {"ray_actor_options": {"num_cpus": 0.5}, "wait_seconds": 180, "table": table}
    write_graph(tmp_path, "one")
    first = deploy("graph_agent:predict", num_replicas=2, **options)
    assert first.query_endpoint == f"http://127.0.0.1:{cluster.port}/graph_agent/invocations"
    assert answer_of(first) == "one: why?"
    assert first.status().state == "serving"
    write_graph(tmp_path, "two")
    second = deploy("graph_agent:predict", **options)
    assert answer_of(second) == "two: why?"
    del options["ray_actor_options"]
    back = deploy("graph_agent:predict", version=1, **options)
    assert answer_of(back) == "one: why?"
    delete_deployment("graph_agent")
    assert httpx.get(first.endpoint_url, timeout=30).status_code == 404
    recorded = rows(table)
    assert [row["served_entity_id"][-2:] for row in recorded] == ["/1", "/2", "/1"]
    names = {span["name"] for span in output_of(recorded[0])["trace"]["data"]["spans"]}
    assert {"LangGraph", "look_up"} <= names


def answer_of(deployment: Deployment) -> str:
    reply = httpx.post(deployment.query_endpoint, json={"question": "why?"}, timeout=60).raise_for_status()
    answer: str = reply.json()["answer"]
    return answer
