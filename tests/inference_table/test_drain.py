"""Spools of processes that were killed, drained into their tables."""

import os
import signal
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from inference_table.commit import open_or_create_table
from inference_table.drain import Drained, drain, spooled_tables
from inference_table.errors import SpoolError, TableError, TableNotFoundError
from inference_table.spool import folders, spool_root, spool_stats
from tests.inference_table.rows import ids_in_table, storage
from tests.support import ROOT, rows, served, wait_for

SPOOLER = """
import sys
from pathlib import Path
from inference_table.commit import Committer
from inference_table.spool import Spool
from tests.inference_table.rows import batch, storage

folder, prefix, count, *lock = sys.argv[1:]
settings = storage(Path(folder))
spool = Spool(settings)
for number in range(int(count)):
    spool.append(batch([f"{prefix}-{number}-a", f"{prefix}-{number}-b"]), sync=False)
committer = Committer(settings)
assert not lock or committer.acquire()
print("spooled", flush=True)
sys.stdin.read()
"""
COMMAND = (
    "from deploy.cli import main; from deploy.spool_commands import spool; main.add_command(spool); main()"
)

Spooler = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def spooler(tmp_path: Path) -> Iterator[Spooler]:
    """Starts a process that has spooled some segments of two rows each, and lives on."""
    started = []

    def start(prefix: str, count: int, *lock: str, folder: Path = tmp_path) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(
            [sys.executable, "-c", SPOOLER, str(folder), prefix, str(count), *lock],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"spooled\n"
        return process

    yield start
    for process in started:
        kill(process)


def kill(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.communicate()


def killed(spooler: Spooler, prefix: str, count: int, folder: Path | None = None) -> set[str]:
    """Spool and be killed; returns the ids of the rows."""
    process = spooler(prefix, count, **({} if folder is None else {"folder": folder}))
    kill(process)
    assert process.returncode == -signal.SIGKILL
    return {f"{prefix}-{number}-{part}" for number in range(count) for part in "ab"}


def command(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, "spool", "drain", str(folder), *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ran(folder: Path, *arguments: str) -> tuple[int, str, str]:
    process = command(folder, *arguments)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_rows_of_a_killed_process_are_committed_once(tmp_path: Path, spooler: Spooler) -> None:
    """All of them, and a second drain finds nothing to do."""
    settings = storage(tmp_path)
    open_or_create_table(settings)
    ids = killed(spooler, "x", 3)
    first = drain(settings)
    assert (first.rows, first.segments, first.left, first.quarantined) == (6, 3, 0, 0)
    assert drain(settings) == Drained(uri=settings.uri)
    assert ids_in_table(settings) == Counter(ids)
    assert folders(spool_root(settings)) == []


def test_beside_a_server_that_runs_nothing_comes_twice(tmp_path: Path, spooler: Spooler) -> None:
    """A server of the same spool goes on answering and recording; the dead process's rows are there once."""
    settings = storage(tmp_path)
    env = {
        "INFERENCE_TABLE_URI": settings.uri,
        "INFERENCE_TABLE_SPOOL_DIR": str(settings.spool_dir),
        "INFERENCE_TABLE_FLUSH_SECONDS": "0.2",
    }
    answered = []
    with served("tests.deploy.kill_agent:app", env=env, log=tmp_path / "log") as (url, _):
        for _ in range(3):
            reply = httpx.post(f"{url}/invocations", json={"q": 1}, timeout=30)
            answered.append(reply.headers["x-databricks-request-id"])
        dead = killed(spooler, "dead", 3)
        drained = drain(settings)
        assert drained.left == 0
        answered.append(httpx.post(f"{url}/invocations", json={"q": 1}).headers["x-databricks-request-id"])
    found = Counter(row["databricks_request_id"] for row in rows(settings.uri))
    assert found == Counter([*answered, *dead])


def test_a_process_that_lives_keeps_its_spool(tmp_path: Path, spooler: Spooler) -> None:
    """What a living process has spooled may be committed for it; what it spools later comes once as well."""
    settings = storage(tmp_path)
    open_or_create_table(settings)
    living = spooler("living", 2)
    dead = killed(spooler, "dead", 1)
    assert drain(settings).left == 0
    assert set(ids_in_table(settings)) >= dead
    kill(living)
    drain(settings)
    assert ids_in_table(settings) == Counter(
        [*dead, *(f"living-{n}-{part}" for n in (0, 1) for part in "ab")]
    )


def test_two_drains_at_once(tmp_path: Path, spooler: Spooler) -> None:
    """One commits while the other waits; together they commit each row once."""
    settings = storage(tmp_path)
    open_or_create_table(settings)
    ids = set[str]().union(*(killed(spooler, prefix, 4) for prefix in ("x", "y")))
    both = [command(settings.spool_dir) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sum(int(out.split(": ")[1].split(" rows")[0]) for out, _ in outputs) == len(ids)
    assert ids_in_table(settings) == Counter(ids)


def test_without_a_table_the_rows_stay(tmp_path: Path, spooler: Spooler) -> None:
    """A table that is missing is an error, not a new table; the rows are committed once it is there."""
    settings = storage(tmp_path)
    ids = killed(spooler, "x", 2)
    with pytest.raises(TableNotFoundError):
        drain(settings)
    assert spool_stats(spool_root(settings)).segments == 2
    assert not Path(settings.uri).exists()
    open_or_create_table(settings)
    assert drain(settings).rows == 4
    assert ids_in_table(settings) == Counter(ids)


def test_a_table_that_cannot_be_read_keeps_the_rows(tmp_path: Path, spooler: Spooler) -> None:
    """As long as the table's log is broken nothing is lost; once it is whole again, all is committed once."""
    settings = storage(tmp_path)
    open_or_create_table(settings)
    ids = killed(spooler, "x", 2)
    [log] = Path(settings.uri, "_delta_log").glob("*.json")
    whole = log.read_bytes()
    log.write_bytes(b"{broken")
    with pytest.raises(TableError):
        drain(settings)
    log.write_bytes(whole)
    drain(settings)
    assert ids_in_table(settings) == Counter(ids)


def test_a_process_that_commits_nothing_is_reported(tmp_path: Path, spooler: Spooler) -> None:
    """Held by another process's lock, the rows are left, counted, and the exit code and the error say so."""
    settings = storage(tmp_path)
    open_or_create_table(settings)
    ids = killed(spooler, "dead", 2)
    holder = spooler("holder", 1, "lock")
    left = drain(settings, wait_seconds=0)
    assert (left.rows, left.left, left.alive, left.locked) == (0, 2, 1, True)
    code, out, err = ran(settings.spool_dir, "--wait-seconds", "0.1")
    assert (code, "2 segments of" in out, "committer's lock" in err) == (1, True, True)
    kill(holder)
    assert ran(settings.spool_dir)[0] == 0
    assert ids_in_table(settings) == Counter([*ids, "holder-0-a", "holder-0-b"])


def test_waiting_ends_with_the_process_that_commits(tmp_path: Path, spooler: Spooler) -> None:
    """A drain that waits goes on by itself when the other process is gone."""
    settings = storage(tmp_path)
    open_or_create_table(settings)
    ids = killed(spooler, "dead", 1)
    holder = spooler("holder", 0, "lock")
    with ThreadPoolExecutor(1) as pool:
        draining = pool.submit(drain, settings, 100)
        wait_for(lambda: "acquired" in running_functions() or draining.done(), "it to wait for the lock")
        assert not draining.done()
        kill(holder)
        assert draining.result().rows == 2
    assert ids_in_table(settings) == Counter(ids)


def running_functions() -> set[str]:
    """Names of the functions that the threads of this process are in."""
    return {
        frame.f_code.co_name
        for top in sys._current_frames().values()
        for frame, _ in traceback.walk_stack(top)
    }


def test_damaged_segments_are_set_aside_and_drained_once_repaired(tmp_path: Path, spooler: Spooler) -> None:
    """One that can't be read holds up no other and is counted; readable again, it is committed."""
    settings = storage(tmp_path)
    open_or_create_table(settings)
    ids = killed(spooler, "x", 3)
    damaged = folders(spool_root(settings))[0].segments()[1].path
    whole = damaged.read_bytes()
    os.truncate(damaged, 100)
    first = drain(settings)
    assert (first.rows, first.left, first.quarantined) == (4, 0, 1)
    [aside] = spool_root(settings).glob("quarantine/*")
    aside.write_bytes(whole)
    second = drain(settings)
    assert (second.rows, second.quarantined) == (2, 0)
    assert ids_in_table(settings) == Counter(ids)


def test_the_command_drains_every_table_of_a_spool(tmp_path: Path, spooler: Spooler) -> None:
    """Which tables these are the spool itself knows; one line for each says what was done."""
    tables = [
        storage(
            tmp_path / name,
        )
        for name in ("one", "two")
    ]
    shared = tmp_path / "spool"
    ids = []
    for name in ("one", "two"):
        settings = storage(tmp_path / name)
        open_or_create_table(settings)
        ids.append(killed(spooler, name, 2, tmp_path / name))
        shared.mkdir(exist_ok=True)
        spool_root(settings).rename(shared / spool_root(settings).name)
    assert {one.uri for one in spooled_tables(shared)} == {one.uri for one in tables}
    code, out, err = ran(shared)
    assert (code, err) == (0, "")
    assert sorted(line.split(",")[0] for line in out.splitlines()) == sorted(
        f"{one.uri}: 4 rows committed" for one in tables
    )
    assert [ids_in_table(one) for one in tables] == [Counter(one) for one in ids]


def test_the_command_reports_what_it_is_not_told_the_table_of(tmp_path: Path, spooler: Spooler) -> None:
    """Without a note of its URI a table must be named; then others are left alone, and counted."""
    settings = storage(tmp_path)
    open_or_create_table(settings)
    ids = killed(spooler, "x", 2)
    root = spool_root(settings)
    (root / "URI").unlink()
    code, out, err = ran(settings.spool_dir)
    assert (code, out) == (1, "")
    assert "holds 2 segments of another table, whose URI is not noted; give its --table" in err
    code, out, err = ran(settings.spool_dir, "--table", str(tmp_path / "elsewhere"))
    assert (code, "0 rows committed" in out, "holds 2 segments" in err) == (0, True, True)
    assert ran(settings.spool_dir, "--table", settings.uri)[0] == 0
    assert ids_in_table(settings) == Counter(ids)


def test_the_command_goes_on_after_a_table_that_is_away(tmp_path: Path, spooler: Spooler) -> None:
    """A table that is missing fails alone: the error names it, the other one's rows are committed."""
    here, away = storage(tmp_path / "here"), storage(tmp_path / "away")
    open_or_create_table(here)
    killed(spooler, "here", 1, tmp_path / "here")
    killed(spooler, "away", 1, tmp_path / "away")
    spool_root(away).rename(here.spool_dir / spool_root(away).name)
    code, out, err = ran(here.spool_dir)
    assert code == 1
    assert out.startswith(f"{here.uri}: 2 rows committed")
    assert err.startswith(f"Error: there is no Delta table at {away.uri}")


def test_a_folder_that_is_no_spool_is_refused(tmp_path: Path) -> None:
    """A typo is an error; an empty spool is not."""
    with pytest.raises(SpoolError, match="INFERENCE_TABLE_SPOOL_DIR"):
        spooled_tables(tmp_path / "typo")
    assert ran(tmp_path)[:2] == (0, f"{tmp_path}: nothing was ever spooled here\n")


def test_a_note_of_another_table_is_not_believed(tmp_path: Path, spooler: Spooler) -> None:
    """A URI that isn't the one that the folder is keyed by would put rows into the wrong table."""
    settings = storage(tmp_path)
    killed(spooler, "x", 1)
    (spool_root(settings) / "URI").write_text("/another/table\n")
    assert [one.uri for one in spooled_tables(settings.spool_dir)] == [None]


def test_the_note_is_for_the_owner_alone(tmp_path: Path, spooler: Spooler) -> None:
    """The URI of the table is nobody else's business."""
    settings = storage(tmp_path)
    killed(spooler, "x", 1)
    assert (spool_root(settings) / "URI").stat().st_mode & 0o077 == 0
