"""The two threads between the request path and the table."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable
from prometheus_client import REGISTRY

from inference_table.commit_loop import CommitLoop
from inference_table.errors import DurabilityError, TableError
from inference_table.ids import uuid7
from inference_table.record import Row
from inference_table.settings import Durability, StorageSettings
from inference_table.writer import Writer
from tests.support import ROOT, rows, wait_for


class Item:
    """A record as the request path hands it over."""

    def __init__(
        self, encode: Callable[[], None] = lambda: None, *, trace_bytes: int = 0, ready: bool = True
    ) -> None:
        self.request_id = uuid7()
        self.reserved_bytes = 0
        self.trace_bytes = trace_bytes
        self.ready = ready
        self.dropped_traces = False
        self._encode = encode

    def is_ready(self) -> bool:
        return self.ready

    def drop_traces(self) -> None:
        self.dropped_traces = True

    def encode(self, give_way: Callable[[], None]) -> Row:
        self._encode()
        give_way()
        return Row(self.request_id, datetime.now(UTC), 200, 1.0, 5, b'{"q": 1}', [b'{"a": ', b'"x"}'])


def settings(folder: Path, **options: Any) -> StorageSettings:
    return StorageSettings.from_environ(
        {}, **{"uri": folder / "payload", "spool_dir": folder / "spool", "flush_seconds": 0.1, **options}
    )


def writer_at(folder: Path, **options: Any) -> Writer:
    writer = Writer(settings(folder, **options))
    writer.check()
    return writer


def dropped(reason: str) -> float:
    return REGISTRY.get_sample_value("tracelake_dropped_total", {"reason": reason}) or 0.0


def ids(table: Path) -> list[str]:
    return [row["databricks_request_id"] for row in rows(table)]


def test_close_commits_what_was_handed_over(tmp_path: Path) -> None:
    """Nothing that was put before a clean stop is missing after it, and no spool is left."""
    writer = writer_at(tmp_path, flush_seconds=60)
    items = [Item() for _ in range(500)]
    for item in items:
        writer.put(item)
    writer.close()
    assert sorted(ids(tmp_path / "payload")) == sorted(item.request_id for item in items)
    assert not list(tmp_path.glob("spool/*/*/*.arrow"))
    assert writer.budget.used == 0


def test_rows_arrive_without_being_asked_for(tmp_path: Path) -> None:
    """The commit thread works while the writer runs."""
    writer = writer_at(tmp_path)
    item = Item()
    writer.put(item)
    wait_for(lambda: ids(tmp_path / "payload") == [item.request_id], "the row")
    writer.close()


def test_steady_traffic_is_committed_once_in_a_pause(tmp_path: Path) -> None:
    """What is spooled while a commit runs waits for the next turn: else tiny commits follow each other."""
    writer = writer_at(tmp_path, flush_seconds=0.5)
    started = time.monotonic()
    for _ in range(120):
        writer.put_durable(Item(), Durability.STRICT)  # at once a segment of its own
        time.sleep(0.02)
    wait_for(lambda: len(ids(tmp_path / "payload")) == 120, "all rows")
    turns = (time.monotonic() - started) / 0.5 + 1
    writer.close()
    assert DeltaTable(tmp_path / "payload").version() <= turns


def test_a_record_waits_for_its_open_spans(tmp_path: Path) -> None:
    """What is not ready stays behind; what came later passes it."""
    writer = writer_at(tmp_path)
    late, prompt = Item(ready=False), Item()
    writer.put(late)
    writer.put(prompt)
    wait_for(lambda: ids(tmp_path / "payload") == [prompt.request_id], "the one that is ready")
    late.ready = True
    wait_for(lambda: len(ids(tmp_path / "payload")) == 2, "the other")
    writer.close()


def test_one_record_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    """It is counted, its memory given back, and a durable one hears of it."""

    def fail() -> None:
        raise ZeroDivisionError("a bug in encoding")

    before = dropped("encoding")
    writer = writer_at(tmp_path)
    good = Item()
    writer.put(Item(fail, trace_bytes=100))
    durable = writer.put_durable(Item(fail), Durability.STRICT)
    writer.put(good)
    with pytest.raises(DurabilityError, match="a bug in encoding"):
        durable.result(30)
    writer.close()
    assert ids(tmp_path / "payload") == [good.request_id]
    assert dropped("encoding") == before + 2
    assert writer.budget.used == 0


def test_memory_is_bounded_and_what_does_not_fit_is_counted(tmp_path: Path) -> None:
    """With the queue stuck, records beyond the limit are dropped at once, and the caller is never blocked."""
    before = dropped("memory")
    gate = threading.Event()
    writer = writer_at(tmp_path, max_memory_bytes=1000)
    writer.put(Item(gate.wait, trace_bytes=400))
    writer.put(Item(trace_bytes=400))
    rejected = Item(trace_bytes=400)
    writer.put(rejected)
    assert rejected.dropped_traces
    assert writer.budget.used == 800
    with pytest.raises(DurabilityError, match="MAX_MEMORY_BYTES"):
        writer.put_durable(Item(trace_bytes=400), Durability.STRICT).result(1)
    gate.set()
    writer.close()
    assert dropped("memory") == before + 2
    assert len(ids(tmp_path / "payload")) == 2
    assert writer.budget.used == 0


def test_a_trace_that_can_never_fit_leaves_its_row(tmp_path: Path) -> None:
    """A trace larger than all of the memory limit is given up, the row is not."""
    writer = writer_at(tmp_path, max_memory_bytes=1000)
    item = Item(trace_bytes=2000)
    writer.put(item)
    writer.close()
    assert item.dropped_traces
    assert ids(tmp_path / "payload") == [item.request_id]


def test_a_full_spool_drops_and_counts(tmp_path: Path) -> None:
    """The limit on the spool holds; a strict record hears that it was not kept."""
    before = dropped("spool_full")
    writer = writer_at(tmp_path, max_spool_bytes=1)
    future = writer.put_durable(Item(), Durability.STRICT)
    with pytest.raises(DurabilityError, match="spool is full"):
        future.result(30)
    writer.close()
    assert dropped("spool_full") == before + 1


def test_strict_is_spooled_and_committed_is_in_the_table(tmp_path: Path) -> None:
    """The future of each resolves when what it promises holds."""
    writer = writer_at(tmp_path, flush_seconds=0.2)
    writer.put_durable(Item(), Durability.STRICT).result(30)
    assert list(tmp_path.glob("spool/*/*/*.arrow")) or ids(tmp_path / "payload")
    committed = Item()
    writer.put_durable(committed, Durability.COMMITTED).result(30)
    assert committed.request_id in ids(tmp_path / "payload")
    writer.close()


def test_two_writers_of_one_table_share_the_work(tmp_path: Path) -> None:
    """Only one of them commits, also for the other; each confirms its own committed records."""
    writers = [writer_at(tmp_path) for _ in range(2)]
    items = [Item() for _ in range(40)]
    with ThreadPoolExecutor(8) as pool:
        futures = list(
            pool.map(
                lambda one: writers[one[0] % 2].put_durable(one[1], Durability.COMMITTED), enumerate(items)
            )
        )
    assert not wait(futures, 60).not_done
    for writer in writers:
        writer.close()
    assert sorted(ids(tmp_path / "payload")) == sorted(item.request_id for item in items)


def test_a_table_that_is_away_gets_its_rows_later(tmp_path: Path) -> None:
    """Rows wait in the spool while the table is unreachable, and arrive once it is back."""
    writer = writer_at(tmp_path)
    (tmp_path / "payload").rename(tmp_path / "elsewhere")
    item = Item()
    writer.put_durable(item, Durability.STRICT).result(30)
    wait_for(lambda: commit_errors() > 0, "a failed commit")
    (tmp_path / "elsewhere").rename(tmp_path / "payload")
    wait_for(lambda: ids(tmp_path / "payload") == [item.request_id], "the row")
    writer.close()


def commit_errors() -> float:
    return sum(
        sample.value
        for metric in REGISTRY.collect()
        if metric.name == "tracelake_commit_errors"
        for sample in metric.samples
        if sample.name.endswith("_total")
    )


def test_close_ends_in_time_with_the_table_away(tmp_path: Path) -> None:
    """What can't be committed stays spooled; the next process commits it."""
    writer = writer_at(tmp_path, flush_seconds=60)
    item = Item()
    writer.put(item)
    (tmp_path / "payload").rename(tmp_path / "elsewhere")
    writer.close(1.0)
    assert len(list(tmp_path.glob("spool/*/*/*.arrow"))) == 1
    (tmp_path / "elsewhere").rename(tmp_path / "payload")
    successor = writer_at(tmp_path)
    successor.start()
    wait_for(lambda: ids(tmp_path / "payload") == [item.request_id], "the row")
    successor.close()


def test_a_row_that_fits_no_column_does_not_take_others_with_it(tmp_path: Path) -> None:
    """One impossible value costs its own row only."""

    class Impossible(Item):
        def encode(self, give_way: Callable[[], None]) -> Row:
            return replace(super().encode(give_way), span_count=2**40)

    before = dropped("encoding")
    writer = writer_at(tmp_path)
    good = [Item() for _ in range(3)]
    for item in (good[0], Impossible(), *good[1:]):
        writer.put(item)
    writer.close()
    assert ids(tmp_path / "payload") == [item.request_id for item in good]
    assert dropped("encoding") == before + 1


class ThreadDeath(BaseException):
    """As delta-rs' PanicException: no Exception."""


def writer_up() -> float:
    return REGISTRY.get_sample_value("tracelake_writer_up") or 0.0


def test_the_death_of_the_encode_thread_is_accounted_for(tmp_path: Path) -> None:
    """What it leaves behind and what comes later is dropped, counted and given back; nobody waits on."""

    def die() -> None:
        raise ThreadDeath

    before = dropped("writer_down")
    writer = writer_at(tmp_path)
    writer.put(Item(die, trace_bytes=100))
    writer.put(Item(trace_bytes=100, ready=False))
    future = writer.put_durable(Item(), Durability.STRICT)
    with pytest.raises(DurabilityError, match="encode thread"):
        future.result(30)
    wait_for(lambda: dropped("writer_down") == before + 3, "all to be counted")
    with pytest.raises(DurabilityError, match="encode thread"):
        writer.put_durable(Item(), Durability.STRICT).result(30)
    assert writer_up() == 0
    assert writer.budget.used == 0
    writer.close()


def test_without_its_commit_thread_a_process_still_spools(tmp_path: Path) -> None:
    """Strict replies still leave; another process commits the rows."""

    class Dying(CommitLoop):
        def run(self) -> None:
            raise ThreadDeath

    writer = writer_at(tmp_path)
    writer._commits.__class__ = Dying
    item = Item()
    writer.put_durable(item, Durability.STRICT).result(30)
    wait_for(lambda: writer_up() == 0, "the process to be marked")
    other = writer_at(tmp_path)
    other.start()
    wait_for(lambda: ids(tmp_path / "payload") == [item.request_id], "the row")
    other.close()
    writer.close()


def test_without_a_check_the_table_is_made_all_the_same(tmp_path: Path) -> None:
    """A server without a lifespan checks nothing at start-up; its rows arrive."""
    writer = Writer(settings(tmp_path))
    item = Item()
    writer.put(item)
    wait_for(lambda: ids(tmp_path / "payload") == [item.request_id], "the row")
    writer.close()


def test_a_writer_that_was_closed_can_start_again(tmp_path: Path) -> None:
    """Two lifespans of one app object, as test clients make them."""
    writer = writer_at(tmp_path)
    items = [Item(), Item()]
    for item in items:
        writer.start()
        writer.put(item)
        writer.close()
    assert ids(tmp_path / "payload") == [item.request_id for item in items]


def test_after_close_nothing_is_taken(tmp_path: Path) -> None:
    """A late record is dropped and counted, not lost in a queue that nobody reads."""
    before = dropped("closed")
    writer = writer_at(tmp_path)
    writer.put(Item())
    writer.close()
    writer.put(Item())
    assert dropped("closed") == before + 1


def test_a_table_that_is_no_inference_table_is_refused(tmp_path: Path) -> None:
    """Start-up names the table and its trouble."""
    import pyarrow as pa
    from deltalake import write_deltalake

    write_deltalake(str(tmp_path / "payload"), pa.table({"request": [1, 2]}))
    with pytest.raises(TableError, match="payload"):
        Writer(settings(tmp_path)).check()


FORKING = """
import os, sys
from pathlib import Path
from tests.inference_table.test_writer import Item, settings
from inference_table.writer import Writer

folder = Path(sys.argv[1])
writer = Writer(settings(folder))
writer.start()  # threads and locks of the parent, which the children must not inherit
children = []
for _ in range(3):
    if (pid := os.fork()) == 0:
        for _ in range(10):
            writer.put(Item())
        writer.close()
        os._exit(0)
    children.append(pid)
codes = [os.waitpid(pid, 0)[1] for pid in children]
writer.put(Item())
writer.close()
sys.exit(sum(codes))
"""


def test_forked_workers_write_on_their_own(tmp_path: Path) -> None:
    """A writer made before a fork (a preloading server) works in each child and in the parent."""
    Writer(settings(tmp_path)).check()
    subprocess.run([sys.executable, "-c", FORKING, str(tmp_path)], cwd=ROOT, check=True, timeout=120)
    found = ids(tmp_path / "payload")
    assert len(found) == len(set(found)) == 31


EXITING = """
import sys
from pathlib import Path
from tests.inference_table.test_writer import Item, settings
from inference_table.writer import Writer

writer = Writer(settings(Path(sys.argv[1]), flush_seconds=60))
writer.check()
writer.put(Item())
"""


def test_a_process_that_just_ends_still_writes(tmp_path: Path) -> None:
    """Without a lifespan, the end of the interpreter closes the writer."""
    subprocess.run([sys.executable, "-c", EXITING, str(tmp_path)], cwd=ROOT, check=True, timeout=120)
    assert len(ids(tmp_path / "payload")) == 1


STOPPED = """
import sys, time
from pathlib import Path
from tests.inference_table.test_writer import Item, settings
from inference_table.writer import Writer
from inference_table.settings import Durability

writer = Writer(settings(Path(sys.argv[1])))
writer.check()
writer.put_durable(Item(), Durability.COMMITTED).result(30)
print("ready", flush=True)
time.sleep(60)
"""


def test_a_stopped_committer_is_not_taken_over(tmp_path: Path) -> None:
    """Rows of others wait while the holder of the lock is stopped, and arrive when it goes on or dies."""
    holder = subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        os.kill(holder.pid, signal.SIGSTOP)
        writer = writer_at(tmp_path)
        future = writer.put_durable(Item(), Durability.COMMITTED)
        assert wait([future], 1.5).not_done
        os.kill(holder.pid, signal.SIGKILL)
        future.result(30)
        writer.close()
        assert len(ids(tmp_path / "payload")) == 2
    finally:
        holder.kill()
        holder.wait()
        if holder.stdout is not None:
            holder.stdout.close()
