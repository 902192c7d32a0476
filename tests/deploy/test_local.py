"""Engine ``local``: endpoints outlive their deployer, replace versions unnoticed and look after workers."""

import asyncio
import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import orjson
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Mount, Route, Router

from deploy import local
from deploy.channel import send_blocking
from deploy.log_file import cut, open_log
from deploy.process import Launcher, WorkerProcess
from deploy.registry import is_locked
from deploy.routes import answers_invocations
from inference_table.errors import DeploymentError
from serving import InferenceTableMiddleware
from tests.deploy.local_deployment import LocalEndpoint, busy, is_ours, local_endpoint
from tests.support import ROOT, rows, wait_for


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[LocalEndpoint]:
    with local_endpoint(tmp_path) as found:
        yield found


def entities(endpoint: LocalEndpoint) -> Counter[str]:
    return Counter(row["served_entity_id"] for row in rows(endpoint.table))


def test_an_endpoint_outlives_its_deployer(endpoint: LocalEndpoint) -> None:
    """It answers after the process that deployed it, and that process's session, have ended."""
    endpoint.add("1", workers=2)
    endpoint.want({"1": 100})
    script = (
        "import sys; from pathlib import Path; "
        "from deploy import local; from deploy.registry import EndpointFolder; "
        "path = Path(sys.argv[1]); folder = EndpointFolder(path.name, path.parent); "
        "pid = local.apply(folder, folder.endpoint()).pid; "
        "parent = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[1]; "
        "print(pid, int(parent) == __import__('os').getpid())"
    )
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(endpoint.files.path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        start_new_session=True,
    )
    state = endpoint.state()
    assert ended.stderr == ""
    assert ended.stdout.split() == [str(state.pid), "False"]
    assert state.pid is not None
    assert os.getsid(state.pid) not in (os.getsid(0), 0)
    assert state.state == "serving"
    assert state.versions["1"].invocations
    assert {endpoint.ask()["pid"] for _ in range(5)} <= set(state.versions["1"].workers)
    endpoint.stop()
    assert endpoint.state().state == "stopped"
    wait_for(lambda: not any(map(is_ours, endpoint.seen)), "the processes to end", 60)
    assert entities(endpoint) == {"bot/1": 5}


def test_a_killed_worker_is_started_again(endpoint: LocalEndpoint) -> None:
    """Until it is, connections wait: none is refused, and the rows of the dead one are committed."""
    endpoint.add("1")
    state = endpoint.apply({"1": 100})
    (before,) = state.versions["1"].workers
    endpoint.ask("first")
    os.kill(before, signal.SIGKILL)
    assert endpoint.ask("second")["pid"] != before
    wait_for(lambda: endpoint.state().versions["1"].restarts == 1, "the start to be told")
    wait_for(lambda: endpoint.state().versions["1"].workers, "the successor to be told")
    version = endpoint.state().versions["1"]
    assert version.restarts == 1
    assert version.state == "serving"
    os.kill(version.workers[0], signal.SIGTERM)  # by hand: uvicorn's own end, and a successor
    dead = (before, version.workers[0])
    wait_for(lambda: endpoint.ask("third")["pid"] not in dead, "an answer of its successor")
    wait_for(lambda: endpoint.state().versions["1"].restarts == 2, "the second start to be told")
    endpoint.stop()
    # What waited in the dead one's memory may be gone; what came after may not.
    questions = {orjson.loads(row["request"])["question"] for row in rows(endpoint.table)}
    assert {"second", "third"} <= questions


def poison(endpoint: LocalEndpoint, until: Callable[[], bool]) -> None:
    """Send what kills a worker of a version that is deployed so, again and again."""

    def is_done() -> bool:
        if until():
            return True
        with contextlib.suppress(httpx.HTTPError):
            httpx.post(f"{endpoint.url}/poison", timeout=30)
        return False

    wait_for(is_done, "the version to be given up", 120)


def test_a_crash_loop_is_reported_and_stopped(endpoint: LocalEndpoint) -> None:
    """An endpoint whose only version dies again and again is failed, and leaves no process."""
    endpoint.add("1", environment={"AGENT_FAILS": "poison"})
    endpoint.apply({"1": 100})
    poison(endpoint, lambda: endpoint.state().state == "failed")
    state = endpoint.state()
    assert state.versions["1"].state == "failed"
    assert state.versions["1"].restarts == 4
    assert "crash loop" in (state.error or "")
    assert "SIGKILL" in (state.error or "")
    assert "Started server process" in (state.error or "")
    wait_for(lambda: not any(map(is_ours, endpoint.seen)), "the processes to end", 60)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.heavy)])
def test_a_new_version_takes_over_unnoticed(endpoint: LocalEndpoint, workers: int) -> None:
    """Under load no request fails, a stream ends whole, and each row names the version that answered."""
    endpoint.add("1", workers=workers)
    endpoint.apply({"1": 100})
    url, events = endpoint.url, 120
    streamed: list[str] = []

    def read_stream() -> None:
        with httpx.stream("POST", f"{url}/stream", json={"events": events}, timeout=60) as reply:
            streamed.extend(line for line in reply.iter_lines() if line)

    reader = threading.Thread(target=read_stream)
    with busy(url) as clients:
        reader.start()
        endpoint.add("2", workers=workers)
        state = endpoint.apply({"2": 100})
        seen = len(clients.versions)
        wait_for(lambda: len(clients.versions) > seen + 40, "replies of the new version", 60)
    reader.join()
    assert clients.failures == []
    assert state.traffic == {"2": 100}
    assert {orjson.loads(line[6:])["version"] for line in streamed[:-1]} == {"1"}
    assert len(streamed) == events + 1
    assert set(clients.versions[-20:]) == {"2"}
    wait_for(lambda: "1" not in endpoint.state().versions, "the old version to end", 60)
    endpoint.stop()
    counts = Counter(f"bot/{version}" for version in clients.versions)
    counts["bot/1"] += 1  # the stream
    assert entities(endpoint) == counts


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalEndpoint]:
    """An endpoint whose version 1 serves, for changes that fail."""
    with local_endpoint(tmp_path_factory.mktemp("serving")) as found:
        found.add("1")
        found.apply({"1": 100})
        yield found


@pytest.mark.parametrize(
    ("number", "fails", "seconds", "message"),
    [
        (
            "2",
            "import",
            40,
            "cannot load 'local_agents:app': RuntimeError: the agent's model is missing and nobody",
        ),
        ("3", "exit", 120, "cannot load 'local_agents:app': SystemExit: 7"),
        ("4", "lifespan", 120, "RuntimeError: the agent's database does not answer"),
        ("5", "hang", 3, "it was not ready within 3 s"),
        ("6", "table", 120, "tracelake: cannot "),
        (
            "7",
            "attribute",
            40,
            "cannot serve 'local_agents:nothing': module 'local_agents' has no attribute 'nothing'",
        ),
    ],
)
def test_a_failing_version_leaves_the_old_one_serving(
    serving: LocalEndpoint, tmp_path: Path, number: str, fails: str, seconds: float, message: str
) -> None:
    """The deployer is told the agent's own error and the end of its log; the old workers are untouched."""
    before = serving.workers("1")
    environment = {"AGENT_FAILS": fails}
    if fails == "table":
        (tmp_path / "file").touch()
        environment = {"INFERENCE_TABLE_URI": str(tmp_path / "file" / "payload")}
    serving.add(
        number, target=f"local_agents:{'nothing' if fails == 'attribute' else 'app'}", environment=environment
    )
    with pytest.raises(DeploymentError) as raised:
        serving.apply({number: 100}, wait_seconds=seconds)
    first_line = str(raised.value).splitlines()[0]
    assert first_line.startswith(f"cannot deploy endpoint 'bot': version {number} did not start: ")
    assert message in first_line
    assert "version 1 goes on serving" in first_line
    if fails in {"import", "lifespan"}:
        assert 'raise RuntimeError("the agent' in str(raised.value)
    state = serving.state()
    assert state.versions[number].state == "failed"
    assert message in (state.versions[number].error or "")
    assert state.traffic == {"1": 100}
    assert state.versions["1"].workers == before
    assert serving.ask()["pid"] == before[0]


def test_a_change_of_address_is_refused_while_it_runs(serving: LocalEndpoint) -> None:
    """Rather than left undone."""
    before = serving.wanted
    with pytest.raises(DeploymentError, match=r"cannot move endpoint 'bot' from 127\.0\.0\.1 port"):
        serving.apply({"1": 100}, port=1)
    serving.apply({"1": 100}, port=before.port)
    assert serving.ask()["version"] == "1"


def test_the_newest_of_two_changes_wins(serving: LocalEndpoint) -> None:
    """One that is in progress is given up, and its workers end."""
    serving.add("20", environment={"AGENT_FAILS": "hang"})
    serving.want({"20": 100}, wait_seconds=40.0)
    supervisor = serving.state().pid
    assert supervisor is not None
    os.kill(supervisor, signal.SIGHUP)
    wait_for(lambda: "20" in serving.state().versions, "the change to begin")
    serving.add("21")
    state = serving.apply({"21": 100})
    assert state.traffic == {"21": 100}
    assert state.error is None
    wait_for(lambda: serving.state().versions.keys() == {"21"}, "the others to end", 60)
    assert serving.ask()["version"] == "21"


def test_traffic_is_split_and_brought_together_again(endpoint: LocalEndpoint) -> None:
    """Each request is drawn anew, on kept-alive connections too; no request fails, no worker ends."""
    endpoint.add("1")
    endpoint.apply({"1": 100})
    endpoint.add("2", workers=2)
    with busy(endpoint.url) as clients:
        workers = endpoint.apply({"1": 50, "2": 50}).versions
        begin = len(clients.versions)
        wait_for(lambda: len(clients.versions) > begin + 240, "replies while traffic is split", 60)
        split = clients.versions[begin + 40 : begin + 240]
        state = endpoint.apply({"2": 100})
        seen = len(clients.versions)
        wait_for(lambda: len(clients.versions) > seen + 40, "replies of one version", 60)
    assert clients.failures == []
    # Of 200 fair draws outside of this once in a million times.
    assert 65 <= split.count("1") <= 135
    assert set(clients.versions[-20:]) == {"2"}
    assert state.versions["2"] == workers["2"]
    with httpx.Client() as session:
        replies = [session.post(f"{endpoint.url}/invocations", json={}) for _ in range(2)]
    assert all("connection" not in reply.headers for reply in replies)
    wait_for(lambda: "1" not in endpoint.state().versions, "the other version to end", 60)
    endpoint.stop()
    assert entities(endpoint) == Counter(f"bot/{version}" for version in [*clients.versions, "2", "2"])


@pytest.mark.heavy
def test_a_crash_loop_in_a_split_leaves_all_to_the_other(endpoint: LocalEndpoint) -> None:
    """A version that dies again and again is taken out; meanwhile and after that the other one answers."""
    endpoint.add("1")
    endpoint.add("2", environment={"AGENT_FAILS": "poison"})
    (survivor,) = endpoint.apply({"1": 50, "2": 50}).versions["1"].workers
    poison(endpoint, lambda: "crash loop" in (endpoint.state().error or ""))
    state = endpoint.state()
    assert state.state == "serving"
    assert state.traffic == {"1": 100}
    assert state.versions["2"].state == "failed"
    assert {endpoint.ask()["pid"] for _ in range(8)} == {survivor}


def test_a_worker_loses_no_connection_when_it_stops_to_take_them(
    endpoint: LocalEndpoint, tmp_path: Path
) -> None:
    """One that it took in that very moment is answered too."""
    endpoint.add("1")
    version = endpoint.files.version("1")
    assert version is not None
    ours, theirs = socket.socketpair()
    listener = socket.create_server(("127.0.0.1", 0))
    with ours, theirs, listener, (tmp_path / "lock").open("ab") as lock:
        fds = {"--channel": theirs.fileno(), "--listen": listener.fileno(), "--lock": lock.fileno()}
        command = [sys.executable, "-P", "-m", "deploy.worker", "bot/1"]
        command += [text for name, one in fds.items() for text in (name, str(one))]
        worker = subprocess.Popen(command, env=version.environment, pass_fds=list(fds.values()))
        endpoint.seen.add(worker.pid)
        assert b"ready" in ours.recv(1000)
        send_blocking(ours, {"do": "accept"})
        with busy(f"http://127.0.0.1:{listener.getsockname()[1]}", fresh=6) as clients:
            for _ in range(300):
                send_blocking(ours, {"do": "release"})
                send_blocking(ours, {"do": "accept"})
                time.sleep(0.01)
        send_blocking(ours, {"do": "drain", "seconds": 20, "idle_seconds": 0})
        assert worker.wait(60) == 0
    assert clients.failures == []
    assert len(rows(endpoint.table)) == len(clients.versions)


def children(pid: int | None) -> set[int]:
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def test_workers_end_with_their_supervisor(endpoint: LocalEndpoint) -> None:
    """Killed, it shows as dead; its workers commit what they have and end, and it can be deployed again."""
    endpoint.add("1", workers=2)
    state = endpoint.apply({"1": 100})
    for _ in range(3):
        endpoint.ask()
    assert state.pid is not None
    endpoint.add("2", environment={"AGENT_FAILS": "hang"})
    endpoint.want({"2": 100})
    os.kill(state.pid, signal.SIGHUP)
    wait_for(lambda: len(children(state.pid)) == 3, "a worker that hangs as it starts")
    endpoint.seen |= children(state.pid)
    os.kill(state.pid, signal.SIGKILL)
    wait_for(lambda: endpoint.state().state == "dead", "it to show as dead")
    wait_for(lambda: not any(map(is_ours, endpoint.seen)), "the workers to end", 60)
    assert endpoint.state().traffic == {"1": 100}
    assert entities(endpoint) == {"bot/1": 3}
    again = endpoint.apply({"1": 100}, port=state.port)
    assert again.port == state.port
    assert endpoint.ask()["version"] == "1"
    again_pid = again.pid
    assert again_pid is not None
    os.kill(again_pid, signal.SIGKILL)
    wait_for(lambda: endpoint.state().state == "dead", "it to show as dead")
    endpoint.stop()
    assert endpoint.state().state == "stopped"


def test_a_port_in_use_is_named(endpoint: LocalEndpoint) -> None:
    """With the host and what to do; and nothing is left running."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        endpoint.add("1")
        with pytest.raises(
            DeploymentError, match=f"cannot listen on 127.0.0.1 port {port}: the address is in use"
        ):
            endpoint.apply({"1": 100}, port=port)
    assert endpoint.state().state == "failed"
    assert not is_locked(endpoint.files.supervisor_lock)


def test_a_host_of_another_machine_is_named(endpoint: LocalEndpoint) -> None:
    """An address that isn't ours, and a name that is nobody's."""
    endpoint.add("1")
    for host in ("203.0.113.7", "no-such-host.invalid", "no..host"):
        with pytest.raises(DeploymentError, match=f"'{host}' is no address of this machine"):
            endpoint.apply({"1": 100}, host=host)


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_an_endpoint_has_an_admin_port_and_ipv6(tmp_path: Path) -> None:
    """Both sockets are listened on, and the admin one stays with its workers while traffic is split."""
    with local_endpoint(tmp_path, host="::1", admin_port=0) as endpoint:
        endpoint.add("1")
        endpoint.add("2")
        state = endpoint.apply({"1": 50, "2": 50})
        versions: Counter[Any] = Counter()
        with httpx.Client() as session:
            for _ in range(20):
                reply = session.post(f"http://[::1]:{state.port}/invocations", json={}).raise_for_status()
                assert reply.headers["connection"] == "close"
                versions[reply.json()["version"]] += 1
        assert versions.keys() == {"1", "2"}  # one in half a million times it is not
        assert httpx.get(f"http://127.0.0.1:{state.admin_port}/metrics").status_code == 200
        endpoint.stop()
        assert entities(endpoint) == {f"bot/{version}": count for version, count in versions.items()}


def test_a_worker_whose_channel_has_ended_is_handed_nothing(tmp_path: Path) -> None:
    """A process that is killed closes what it has open, then ends: who connects meanwhile gets another."""

    async def run(listener: socket.socket) -> bool:
        launcher = Launcher(
            endpoint="bot",
            logs=tmp_path,
            listener=listener,
            admin_listener=None,
            lock=listener.fileno(),
            environment={},
            drain_seconds=1,
            take_back=lambda connections: None,
        )
        ours, theirs = socket.socketpair()
        process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        try:
            worker = WorkerProcess(process, ours, launcher)
            send_blocking(theirs, {"ready": True})
            await worker.ready
            assert worker.is_live
            theirs.close()
            async with asyncio.timeout(30):
                while not worker.channel.is_closed:
                    await asyncio.sleep(0.01)
            return worker.is_live
        finally:
            process.communicate(b"\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert not asyncio.run(run(listener))


def test_a_process_without_descriptors_hears_on(tmp_path: Path) -> None:
    """The connection that it has no descriptor for is lost; commands that follow are not."""
    script = (
        "import asyncio, os, resource, socket, sys\n"
        "from deploy.channel import Channel\n"
        "async def main():\n"
        "    ours, theirs = socket.socketpair()\n"
        "    connection, other = socket.socketpair()\n"
        "    heard = []\n"
        "    Channel(ours, lambda message, one: heard.append((message['do'], one)), lambda: None)\n"
        "    sender = Channel(theirs, lambda message, one: None, lambda: None)\n"
        "    sender.send({'do': 'adopt', 'connection': True}, connection)\n"
        "    sender.send({'do': 'drain'})\n"
        "    taken = [os.dup(0)]\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (taken[0] + 1, 1024))\n"
        "    while len(heard) < 2:\n"
        "        await asyncio.sleep(0.01)\n"
        "    print(heard)\n"
        "asyncio.run(main())\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (ended.stdout.strip(), ended.stderr) == ("[('adopt', None), ('drain', None)]", "")


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    """On a full disk the supervisor tries again at each change: what it has begun must not stay there."""
    script = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from deploy.registry import write_json\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "try:\n"
        "    write_json(Path(sys.argv[1]), {'error': 'e' * 1000})\n"
        "except OSError:\n"
        "    sys.exit(3)\n"
    )
    (tmp_path / "state.json").write_text("{}")
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path / "state.json")], cwd=ROOT, timeout=60)
    assert ended.returncode == 3
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]
    assert (tmp_path / "state.json").read_text() == "{}"


def test_a_log_cannot_steer_a_terminal(tmp_path: Path) -> None:
    """Its last lines are shown, of the newest version where none is named, without control characters."""
    endpoint = LocalEndpoint(tmp_path)
    for number in ("9", "10"):
        endpoint.add(number)
    endpoint.want({"10": 100})
    endpoint.files.log("10").write_bytes(b"one\n\x1b[2Jtwo \xff\nthree\n\n")
    assert local.logs(endpoint.files, endpoint.wanted, None, 2) == "\ufffd[2Jtwo \ufffd\nthree"
    assert local.logs(endpoint.files, endpoint.wanted, "9", 2) == ""


def test_a_log_that_has_grown_is_cut(tmp_path: Path) -> None:
    """What was in it is beside it; a writer that has it open goes on at its beginning."""
    log = tmp_path / "1.log"
    writer = open_log(log)
    os.write(writer, b"first\n")
    cut(log)
    assert log.read_bytes() == b"first\n"
    os.truncate(log, 51 << 20)
    cut(log)
    os.write(writer, b"later\n")
    os.close(writer)
    assert log.read_bytes() == b"later\n"
    before = (tmp_path / "1.log.1").stat()
    assert (before.st_size, stat.S_IMODE(before.st_mode)) == (51 << 20, 0o600)


async def nothing(request: Request) -> None: ...


POST: Final = Route("/invocations", nothing, methods=["POST"])


@pytest.mark.parametrize(
    ("app", "expected"),
    [
        (Starlette(routes=[POST]), True),
        (Starlette(routes=[Route("/invocations", nothing)]), False),
        (Starlette(routes=[Mount("/", Router([Route("/chat", nothing, methods=["POST"])]))]), False),
        (Starlette(routes=[Mount("/", Router([Route("/{name}", nothing, methods=["POST"])]))]), True),
        (InferenceTableMiddleware(Starlette(routes=[POST])), True),
        (nothing, False),
    ],
)
def test_an_agent_is_asked_for_its_routes(app: Any, expected: bool) -> None:
    """Whether it answers POST /invocations, behind middlewares and mounts too."""
    assert answers_invocations(app) is expected
