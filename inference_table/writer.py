"""The background writer: two threads between the request path and the table.

::

    put() ──queue──▶ encode thread ──▶ Spool.append ··· disk ···▶ commit thread ──▶ Committer.commit_once

What holds:

- ``put`` costs the request path no more than a queue's append; it never blocks and never raises.
- Memory is bounded by one :class:`MemoryBudget` per process: bodies in flight, queued records and those
  being encoded. What does not fit is dropped and counted.
- A record reaches the spool within 50 ms, unless its trace is still open or the threads can't keep up.
- A durable record (strict, committed) is resolved only after ``Spool.append(sync=True)`` returned for it, or
  after its segment left the spool because it was committed. All that wait share one fsync.
- Threads start at the first record or at :meth:`Writer.start`, so after a fork; a forked child starts anew.
- A thread that ends for any reason but ``close`` marks the process as unable to write
  (``tracelake_writer_up`` 0), and its lock is released.
- ``close`` is ordered and bounded: stop accepting, drain the queue, spool, commit, release. What can't be
  committed by then stays in the spool, for the next process on this machine.
"""

import atexit
import logging
import os
import queue
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final, Protocol

import pyarrow as pa

from inference_table import metrics
from inference_table.commit import Committer, open_or_create_table
from inference_table.compaction import Maintenance
from inference_table.errors import DurabilityError, SegmentError, SpoolFullError
from inference_table.record import Row, to_batch
from inference_table.reporting import Reporter
from inference_table.settings import Durability, StorageSettings
from inference_table.spool import Spool

__all__ = ["MemoryBudget", "Recordable", "Writer"]

logger = logging.getLogger("tracelake")

WINDOW_SECONDS: Final = 0.05
"""How long records gather before they share a segment: at most 20 files a second and process."""
SEGMENT_BYTES: Final = 16 * 1024 * 1024
"""Encoded rows that close a segment: bounds the copy that encoding makes beside the memory budget."""
CONFIRM_SECONDS: Final = 0.02
"""How often the encode thread looks whether a committed reply may leave."""
MAX_BACKOFF_SECONDS: Final = 5.0
"""Longest pause after a failed commit: how stale the table may be once it is reachable again."""
CLOSE_SECONDS: Final = 15.0
"""Deadline of a clean stop, below the 30 s that Kubernetes grants between SIGTERM and SIGKILL."""


class MemoryBudget:
    """Bytes that a process may hold for capture. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._lock = threading.Lock()

    def reserve(self, nbytes: int) -> bool:
        """Take ``nbytes``, or nothing and return False."""
        with self._lock:
            if self.used + nbytes > self.limit:
                return False
            self.used += nbytes
            return True

    def release(self, nbytes: int) -> None:
        with self._lock:
            self.used -= nbytes


class Recordable(Protocol):
    """What the request path hands over: raw bytes and clock readings, encoded later."""

    reserved_bytes: int
    """Bytes it holds of the memory budget; the writer gives them back."""

    @property
    def trace_bytes(self) -> int:
        """Bytes its traces keep alive, not reserved yet."""

    def is_ready(self) -> bool:
        """Whether all of it is there: no span open, or the grace period over."""

    def drop_traces(self) -> None:
        """Let go of the traces: the record is dropped, or they can never fit into memory and its row says so."""

    def encode(self) -> Row:
        """The row. Called once, in the encode thread."""


@dataclass(slots=True)
class Queued:
    item: Recordable
    durability: Durability = Durability.RELAXED
    future: "Future[None] | None" = None


class Writer:
    """Writes records into the table from the background.

    Args:
        settings: where to, and the limits.
    """

    def __init__(self, settings: StorageSettings) -> None:
        self.settings = settings
        self._reporter = Reporter(logger)
        self._reset()

    def _reset(self) -> None:
        """The state of a process that has written nothing: also of a forked child."""
        self._pid = os.getpid()
        self.budget = MemoryBudget(self.settings.max_memory_bytes)
        self._queue: queue.SimpleQueue[Queued] = queue.SimpleQueue()
        self._urgent = threading.Event()
        self._commit_wanted = threading.Event()
        self._stopping = threading.Event()
        self._drained = threading.Event()
        self._started = False
        self._closed: tuple[str, str] | None = None
        self._start_lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._spool = Spool(self.settings)
        self._unconfirmed: list[tuple[int, Future[None]]] = []
        self._deadline = float("inf")

    # --- for the request path ---

    def put(self, item: Recordable) -> bool:
        """Take a record over. Returns False where it was dropped, which is counted."""
        return self._put(Queued(item))

    def put_durable(self, item: Recordable, durability: Durability) -> "Future[None]":
        """Take a record over; the future is done once it is as durable as asked for.

        The future's exception is a :class:`DurabilityError` where that can't be.
        """
        future: Future[None] = Future()
        if not self._put(Queued(item, durability, future)):
            future.set_exception(
                DurabilityError("the record was dropped: the writer's memory limit is reached")
            )
        self._urgent.set()
        return future

    def _put(self, queued: Queued) -> bool:
        item = queued.item
        if self._pid != os.getpid():
            self._reset()
        if self._closed:
            return self._drop(item, *self._closed)
        if not self._started:
            self.start()
        trace_bytes = item.trace_bytes
        if trace_bytes > self.budget.limit:
            item.drop_traces()
            trace_bytes = 0
        if not self.budget.reserve(trace_bytes):
            return self._drop(item, "memory", "INFERENCE_TABLE_MAX_MEMORY_BYTES is reached")
        item.reserved_bytes += trace_bytes
        self._queue.put(queued)
        return True

    def _drop(self, item: Recordable, reason: str, why: str, error: BaseException | None = None) -> bool:
        self.budget.release(item.reserved_bytes)
        item.reserved_bytes = 0
        item.drop_traces()
        metrics.DROPPED.labels(reason).inc()
        self._reporter.failure(f"drop:{reason}", f"a record was dropped: {why}", error)
        return False

    # --- life ---

    def check(self) -> None:
        """Check spool and table, as at start-up; creates the table where there is none.

        Raises:
            SpoolError: the spool can't be used.
            TableError: the table can't be reached, created or written to.
        """
        self._spool.check()
        open_or_create_table(self.settings)

    def start(self) -> None:
        """Start the threads; without effect where they run."""
        with self._start_lock:
            if self._started or self._closed:
                return
            for name, run in (("encode", self._encode_loop), ("commit", self._commit_loop)):
                thread = threading.Thread(
                    target=self._guard, args=(name, run), name=f"tracelake-{name}", daemon=True
                )
                self._threads.append(thread)
            metrics.CAN_COMMIT.set(1)
            self._started = True
            for thread in self._threads:
                thread.start()
            atexit.register(self.close)

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Write what was handed over and stop; returns after ``seconds`` at the latest.

        What could not be committed by then is reported, and stays in the spool for the next process.
        """
        with self._start_lock:
            already = self._closed
            self._closed = already or ("closed", "the server is stopping")
        if already or not self._started:
            return
        atexit.unregister(self.close)
        self._deadline = time.monotonic() + seconds
        self._stopping.set()
        self._urgent.set()
        self._commit_wanted.set()
        for thread in self._threads:
            thread.join(max(0.0, self._deadline - time.monotonic()))
        metrics.CAN_COMMIT.set(0)
        metrics.QUEUE_BYTES.set(0)
        metrics.QUEUE_RECORDS.set(0)
        if any(thread.is_alive() for thread in self._threads):
            logger.warning("the writer did not stop within %s s; what is in memory may be lost", seconds)
            return
        if pending := self._spool.pending():
            logger.warning(
                "%d segments in %s are not committed; the next process with that folder commits them",
                pending,
                self.settings.spool_dir,
            )
        self._spool.close()

    def _guard(self, name: str, run: Callable[[], None]) -> None:
        try:
            run()
        except BaseException as error:
            # A bug, or delta-rs's PanicException, which is no Exception: the endpoint goes on without us,
            # and says so.
            self._reporter.failure(
                f"thread:{name}", f"the {name} thread ended; nothing more is written", error
            )
        finally:
            if not self._stopping.is_set():
                self._closed = ("writer_down", f"the {name} thread ended unexpectedly")
                metrics.CAN_COMMIT.set(0)

    # --- the encode thread ---

    def _encode_loop(self) -> None:
        waiting: list[Queued] = []
        try:
            while not (self._stopping.is_set() and not waiting and self._queue.empty()):
                waiting += self._gather(block=not waiting and not self._unconfirmed)
                ready, waiting = split_ready(waiting)
                while ready:
                    ready = self._spool_some(ready)
                self._confirm()
                metrics.QUEUE_BYTES.set(self.budget.used)
                metrics.QUEUE_RECORDS.set(len(waiting) + self._queue.qsize())
        finally:
            self._drained.set()
        while self._unconfirmed and time.monotonic() < self._deadline:
            time.sleep(CONFIRM_SECONDS)
            self._confirm()

    def _gather(self, *, block: bool) -> list[Queued]:
        """What is queued, after the window in which records gather."""
        gathered: list[Queued] = []
        if block and not self._stopping.is_set():
            try:
                gathered.append(self._queue.get(timeout=1.0))
            except queue.Empty:
                return gathered
        if self._stopping.is_set():
            time.sleep(CONFIRM_SECONDS)
        else:
            self._urgent.wait(CONFIRM_SECONDS if self._unconfirmed else WINDOW_SECONDS)
            self._urgent.clear()
        while not self._queue.empty():
            gathered.append(self._queue.get())
        metrics.CAPTURED.inc(len(gathered))
        return gathered

    def _spool_some(self, ready: list[Queued]) -> list[Queued]:
        """Encode and spool one segment; returns what is left over."""
        rows: list[Row] = []
        encoded: list[Queued] = []
        nbytes = done = 0
        for queued in ready:
            if nbytes >= SEGMENT_BYTES:
                break
            done += 1
            try:
                row = queued.item.encode()
            except Exception as error:  # the writer's border: a record that fails must not stop the others
                self._fail([queued], "encoding", "it could not be encoded", error)
                continue
            rows.append(row)
            encoded.append(queued)
            nbytes += row.nbytes
        if rows:
            self._spool_rows(rows, encoded)
        return ready[done:]

    def _spool_rows(self, rows: list[Row], queued: list[Queued]) -> None:
        sync = any(one.future is not None for one in queued)
        try:
            batch = to_batch(rows)
            sequence = self._append(batch, sync=sync)
        except SpoolFullError as error:
            self._fail(queued, "spool_full", "the spool is full", error)
        except Exception as error:  # the writer's border: a bug in one batch must not stop the next
            self._fail(queued, "spool", "it could not be spooled", error)
        else:
            metrics.SPOOLED.inc(len(rows))
            metrics.SPOOLED_BYTES.inc(batch.nbytes)
            for one in queued:
                self.budget.release(one.item.reserved_bytes)
                self._resolve(one, sequence)

    def _append(self, batch: pa.RecordBatch, *, sync: bool) -> int:
        """Append to the spool, again and again while the disk fails; memory's limit bounds what waits."""
        pause = WINDOW_SECONDS
        while True:
            try:
                return self._spool.append(batch, sync=sync)
            except OSError as error:
                metrics.CAPTURE_ERRORS.labels("spool").inc()
                self._reporter.failure("spool", f"cannot write to the spool {self.settings.spool_dir}", error)
                if time.monotonic() + pause > self._deadline:
                    raise
            time.sleep(pause)
            pause = min(pause * 2, MAX_BACKOFF_SECONDS)

    def _fail(self, queued: list[Queued], reason: str, why: str, error: BaseException) -> None:
        for one in queued:
            self._drop(one.item, reason, why, error)
            if one.future is not None:
                one.future.set_exception(DurabilityError(f"the record was dropped: {why}: {error}"))

    def _resolve(self, queued: Queued, sequence: int) -> None:
        if queued.future is None:
            return
        if queued.durability is Durability.COMMITTED:
            self._unconfirmed.append((sequence, queued.future))
            self._commit_wanted.set()
        else:
            queued.future.set_result(None)

    def _confirm(self) -> None:
        """Resolve the committed replies whose segments have left the spool."""
        still = []
        for sequence, future in self._unconfirmed:
            try:
                if self._spool.is_pending(sequence):
                    still.append((sequence, future))
                else:
                    future.set_result(None)
            except SegmentError as error:
                future.set_exception(DurabilityError(str(error)))
        self._unconfirmed = still

    # --- the commit thread ---

    def _commit_loop(self) -> None:
        committer = Committer(self.settings)
        maintenance = Maintenance(self.settings)
        failures = 0
        try:
            while not self._stopping.is_set():
                self._commit_wanted.wait(self._pause(failures))
                self._commit_wanted.clear()
                failures = 0 if self._commit_all(committer) else failures + 1
                if not failures and committer.is_acquired:
                    self._maintain(maintenance)
            self._commit_last(committer)
        finally:
            committer.release()

    def _pause(self, failures: int) -> float:
        if not failures:
            return self.settings.flush_seconds
        return min(MAX_BACKOFF_SECONDS, self.settings.flush_seconds + 0.1 * 2.0**failures) * random.uniform(
            0.5, 1
        )

    def _commit_all(self, committer: Committer) -> bool:
        """Commit what is spooled on this machine, where no other process does. False after a failure."""
        try:
            if committer.acquire():
                while committer.commit_once() is not None:
                    pass
        except Exception as error:  # the writer's border: whatever fails is tried again after a pause
            metrics.COMMIT_ERRORS.labels(type(error).__name__).inc()
            self._reporter.failure(
                "commit", f"cannot commit to {self.settings.uri}; rows stay in the spool", error
            )
            return False
        return True

    def _commit_last(self, committer: Committer) -> None:
        """At a clean stop: until all of ours is committed, by us or by another process, or time is up."""
        self._drained.wait(max(0.0, self._deadline - time.monotonic()))
        while time.monotonic() < self._deadline:
            self._commit_all(committer)
            if not self._spool.pending():
                return
            time.sleep(WINDOW_SECONDS)

    def _maintain(self, maintenance: Maintenance) -> None:
        try:
            maintenance.step()
        except Exception as error:  # the writer's border: a table that can't be compacted still takes rows
            metrics.COMMIT_ERRORS.labels("maintenance").inc()
            self._reporter.failure("maintenance", f"cannot compact {self.settings.uri}", error)


def split_ready(waiting: list[Queued]) -> tuple[list[Queued], list[Queued]]:
    """The durable ones and those that are ready, and the rest."""
    ready: list[Queued] = []
    rest: list[Queued] = []
    for queued in waiting:
        (ready if queued.future is not None or queued.item.is_ready() else rest).append(queued)
    return ready, rest
