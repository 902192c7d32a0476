"""The comparison with peers, as far as it needs no environment but that of the tests."""

import json
import subprocess
import sys
from collections.abc import Iterator
from math import isnan
from pathlib import Path

import pytest

from benchmarks.peers.__main__ import Comparison
from benchmarks.peers.definitions import FLOOR, PEERS, Peer, Server
from benchmarks.peers.environments import OWN, Environment, InstallError
from benchmarks.peers.measure import SPANS, Size, after_kill, measured, until_readable
from benchmarks.peers.probes import BentomlLog, SpanLines
from benchmarks.peers.processes import Process, StartError, folder_bytes, wait_for, wait_until_idle
from benchmarks.peers.running import Running, running

SMALL = Size("4 KB", 4_000, pairs=10, seeds=4, pause_seconds=0.0)
BUSY = "import time\nend = time.monotonic() + 1\nwhile time.monotonic() < end: pass\ntime.sleep(60)"
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"


@pytest.fixture(autouse=True)
def tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_QUICK", "1")


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """tracelake in strict mode, as a peer."""
    peer = next(peer for peer in PEERS if peer.name == "tracelake strict")
    with running(peer, tmp_path_factory.mktemp("peers") / "strict") as found:
        yield found


@pytest.fixture(scope="module")
def floor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(FLOOR, tmp_path_factory.mktemp("peers") / "floor") as found:
        yield found


def test_a_peer_is_measured(strict: Running, floor: Running) -> None:
    """Every figure is there, and every record of the run can be read."""
    cost = measured(strict, floor, SMALL)
    assert len(cost.floor_ms) == len(cost.peer_ms) == 1
    assert cost.readable == 1
    assert 0 < cost.disk_ratio < 20
    assert cost.memory_mb > cost.floor_memory_mb > 0
    assert isnan(cost.server_memory_mb), "it has no server"
    assert until_readable(strict, SMALL) > 0


def test_strict_records_are_there_after_the_endpoint_was_killed(strict: Running) -> None:
    """SIGKILL behind the last reply of a burst, a new start, and all that was answered can be read."""
    assert after_kill(strict, strict.endpoint, SMALL) == (20, 20)


def test_a_record_counts_when_all_its_spans_are_there(tmp_path: Path) -> None:
    """A file that grows is read on from where it ended; half a line is not read yet."""
    path = tmp_path / "spans.jsonl"
    store = SpanLines(path)
    assert store.spans(["a1"]) == {}
    line = json.dumps({"context": {"trace_id": "0xa1"}}) + "\n"
    path.write_text(line * 3 + line[:5])
    assert store.spans(["a1", "b2"]) == {"a1": 3}
    with path.open("a") as file:
        file.write(line[5:] + line * (SPANS - 4))
    assert store.spans(["a1"]) == {"a1": SPANS}


def test_a_line_cut_by_a_kill_is_lost_with_the_one_behind_it(tmp_path: Path) -> None:
    """As for any reader of lines; those after them are read."""
    path = tmp_path / "data.0.log"
    rows = [json.dumps({"record": record, "trace": "[{}, {}]"}) for record in "abc"]
    path.write_text(rows[0][:20] + rows[1] + "\n" + rows[2] + "\n")
    assert BentomlLog(path).spans(["a", "b", "c"]) == {"c": 2}


def test_a_kill_ends_the_children_too(tmp_path: Path) -> None:
    process = Process([sys.executable, "-c", PARENT], {}, tmp_path / "log")
    try:
        assert wait_for(lambda: len(process.members()) == 2, 30)
        assert process.pss_bytes() > 1_000_000
    finally:
        process.kill()
    assert wait_for(lambda: process.members() == [], 30)


def test_idle_is_when_work_is_done(tmp_path: Path) -> None:
    process = Process([sys.executable, "-c", BUSY], {}, tmp_path / "log")
    try:
        wait_until_idle([process], 30)
        assert process.cpu_seconds() > 0.2
    finally:
        process.kill()


def test_disk_is_counted_in_blocks(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "file").write_bytes(b"x" * 100_000)
    assert folder_bytes(tmp_path) >= 100_000


def test_a_peer_that_cannot_be_installed_is_skipped_with_a_line(floor: Running, tmp_path: Path) -> None:
    """What pip says is the reason; the others go on."""
    missing = Environment("missing", (str(tmp_path / "no-such-package"),), folder=tmp_path)
    with pytest.raises(InstallError, match="no-such-package"):
        missing.install()
    comparison = Comparison()
    comparison.compare(Peer("missing", missing, "floor", ""), floor, tmp_path / "peer")
    assert comparison.rows == []
    assert [note for note in comparison.notes if note.startswith("missing: skipped, ")]


def test_an_installed_environment_is_reused(tmp_path: Path) -> None:
    """Its stamp holds what was installed; pip is not asked again."""
    there = Environment("there", ("no-such-package",), folder=tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "requirements.txt").write_text("no-such-package")
    there.install()
    assert not (tmp_path / "there" / "bin").exists()


def test_a_server_that_ends_says_why(tmp_path: Path) -> None:
    server = Server(("python", "-c", "raise SystemExit('no disk')"), {}, "/")
    peer = Peer("ends", OWN, "floor", "", server=lambda _: server, server_environment=OWN)
    with pytest.raises(StartError, match="no disk"), running(peer, tmp_path / "peer"):
        pass


def test_apps_of_peers_import_nothing_of_ours_but_the_agent() -> None:
    """Their environments have no tracelake; only its own app does."""
    listed = "import sys; import benchmarks.peers.apps.agent; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", listed],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    ).stdout.split()
    assert not {"mlflow", "serving", "inference_table", "deploy", "httpx", "pyarrow"} & set(modules)
