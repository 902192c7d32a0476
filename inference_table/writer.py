"""The background writer: two threads between the request path and the table.

::

    put() ──queue──▶ encode thread ──▶ Spool.append ··· disk ···▶ commit thread (commit_loop.py)

What holds:

- ``put`` costs the request path no more than a queue's append; it never blocks and never raises.
- Memory is bounded by one :class:`MemoryBudget` per process: bodies in flight, queued records and those
  being encoded. What does not fit is dropped and counted.
- A record reaches the spool within 50 ms, unless it waits for open spans, or the threads can't keep up.
- A durable record (strict, committed) is resolved only after ``Spool.append(sync=True)`` returned for it, or
  after its segment left the spool because it was committed. All that wait share one fsync.
- Threads start at the first record or at :meth:`Writer.start`, so after a fork; a forked child starts anew.
- A thread that ends unexpectedly marks the process (``tracelake_writer_up`` 0). Without the encode thread
  records are dropped and counted; without the commit thread they are spooled for another process to commit.
- ``close`` is ordered and bounded: stop accepting, drain the queue, spool, commit, release. What can't be
  committed by then stays in the spool, for the next process on this machine.
"""

import atexit
import logging
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final, Protocol

import pyarrow as pa

from inference_table import metrics
from inference_table.commit import open_or_create_table
from inference_table.commit_loop import CommitLoop
from inference_table.errors import DurabilityError, SegmentError, SpoolError, SpoolFullError
from inference_table.memory import MemoryBudget, give_memory_back
from inference_table.record import Row, no_pause, to_batch
from inference_table.reporting import Reporter
from inference_table.settings import Durability, StorageSettings
from inference_table.spool import Spool

__all__ = ["Recordable", "Writer"]

logger = logging.getLogger("tracelake")

WINDOW_SECONDS: Final = 0.05
"""How long records gather before they share a segment: at most 20 files a second and process."""
SEGMENT_BYTES: Final = 16 * 1024 * 1024
"""Encoded rows that close a segment: bounds the copy that encoding makes beside the memory budget."""
WORK_SECONDS: Final = 0.0005
"""How long the encode thread works, about, before it gives way."""
GIVE_WAY_SECONDS: Final = 0.00005
"""Long enough for a thread to wake up that waits for the interpreter; about 0.1 ms with Linux's slack."""
FREED_BYTES: Final = 64 * 1024 * 1024
"""Spooled bytes after which freed memory is given back to the system."""
CONFIRM_SECONDS: Final = 0.02
"""How often the encode thread looks whether a committed reply may leave."""
MAX_BACKOFF_SECONDS: Final = 5.0
"""Longest pause between two attempts at a failing disk."""
CLOSE_SECONDS: Final = 15.0
"""Deadline of a clean stop, below the 30 s that Kubernetes grants between SIGTERM and SIGKILL."""
CLOSED: Final = ("closed", "the server is stopping")


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
        """Let go of the traces: the record is dropped, or they never fit into memory, as its row will say."""

    def encode(self, give_way: Callable[[], None]) -> Row:
        """The row. Called once, in the encode thread; calls ``give_way`` between steps of a millisecond."""


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
        WRITERS.add(self)

    def _reset(self) -> None:
        """The state of a process that has written nothing: also of a forked child."""
        self.budget = MemoryBudget(self.settings.max_memory_bytes)
        self._queue: queue.SimpleQueue[Queued] = queue.SimpleQueue()
        self._waiting: list[Queued] = []
        self._unconfirmed: list[tuple[int, Future[None]]] = []
        self._urgent = threading.Event()
        self._stopping = threading.Event()
        self._drained = threading.Event()
        self._commit_wanted = threading.Event()
        self._start_lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._refusing: tuple[str, str] | None = None
        self._gave_way_at = 0.0
        self._freed = 0
        self._tidy_at = 0.0
        self._deadline = float("inf")
        self._spool = Spool(self.settings)
        self._commits = CommitLoop(
            self.settings,
            self._spool,
            self._reporter,
            wanted=self._commit_wanted,
            stopping=self._stopping,
            drained=self._drained,
        )

    # --- for the request path ---

    def put(self, item: Recordable) -> None:
        """Take a record over. One that does not fit is dropped and counted."""
        self._put(Queued(item))

    def put_durable(self, item: Recordable, durability: Durability) -> "Future[None]":
        """Take a record over; the future is done once it is as durable as asked for.

        The future's exception is a :class:`DurabilityError` where that can't be.
        """
        future: Future[None] = Future()
        self._put(Queued(item, durability, future))
        self._urgent.set()
        return future

    def _put(self, queued: Queued) -> None:
        if not self._threads and self._refusing is None:
            self.start()
        if self._refusing is not None:
            self._drop(queued, *self._refusing)
            return
        item = queued.item
        trace_bytes = item.trace_bytes
        if trace_bytes > self.budget.limit:
            item.drop_traces()
            trace_bytes = 0
        if not self.budget.reserve(trace_bytes):
            self._drop(queued, "memory", "INFERENCE_TABLE_MAX_MEMORY_BYTES is reached")
            return
        item.reserved_bytes += trace_bytes
        self._queue.put(queued)

    def _drop(self, queued: Queued, reason: str, why: str, error: BaseException | None = None) -> None:
        item = queued.item
        self.budget.release(item.reserved_bytes)
        item.reserved_bytes = 0
        item.drop_traces()
        metrics.DROPPED.labels(reason).inc()
        self._reporter.failure(f"drop:{reason}", f"a record was dropped: {why}", error)
        if queued.future is not None:
            cause = "" if error is None else f": {error}"
            queued.future.set_exception(DurabilityError(f"the record was dropped: {why}{cause}"))

    # --- life ---

    def check(self) -> None:
        """Check spool and table, as at start-up; creates the table where there is none.

        Raises:
            SpoolError: the spool can't be used.
            TableError: the table can't be reached, created or written to.
        """
        self._spool.check()
        open_or_create_table(self.settings)
        # Arrow imports pandas, if it is there, at its first array: half a second that no request shall feel.
        pa.array([None])
        self._commits.table_checked = True

    def start(self) -> None:
        """Start the threads; without effect where they run. A writer that was closed can start again."""
        with self._start_lock:
            if self._refusing == CLOSED:
                self._reset()
            if self._threads or self._refusing:
                return
            runs = {"encode": self._encode_loop, "commit": self._commits.run}
            threads = [
                threading.Thread(target=self._guard, args=item, name=f"tracelake-{item[0]}", daemon=True)
                for item in runs.items()
            ]
            metrics.CAN_COMMIT.set(1)
            try:
                for thread in threads:
                    thread.start()
            except RuntimeError as error:  # the system gives us no thread
                self._refusing = ("writer_down", f"the writer cannot start: {error}")
                self._stopping.set()
                metrics.CAN_COMMIT.set(0)
                return
            self._threads = threads
            atexit.register(self.close)

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Write what was handed over and stop; returns after ``seconds`` at the latest.

        What could not be committed by then is reported, and stays in the spool for the next process.
        """
        with self._start_lock:
            if self._refusing == CLOSED:
                return
            self._refusing = CLOSED
        if not self._threads:
            return
        atexit.unregister(self.close)
        self._deadline = self._commits.deadline = time.monotonic() + seconds
        self._stopping.set()
        self._urgent.set()
        self._commit_wanted.set()
        for thread in self._threads:
            thread.join(max(0.0, self._deadline - time.monotonic()))
        metrics.CAN_COMMIT.set(0)
        if any(thread.is_alive() for thread in self._threads):
            logger.warning("the writer did not stop within %s s; what is in memory may be lost", seconds)
            return
        try:
            pending = self._spool.pending()
            self._spool.close()
        except OSError as error:
            logger.error("cannot close the spool %s: %s", self.settings.spool_dir, error)
            return
        if pending:
            message = "%d segments in %s are not committed; the next process with that folder commits them"
            logger.warning(message, pending, self.settings.spool_dir)

    def _guard(self, name: str, run: Callable[[], None]) -> None:
        """Run a thread; whatever ends it, the endpoint goes on and the process is marked."""
        try:
            run()
        except BaseException as error:
            # A bug, or delta-rs's PanicException, which is no Exception.
            metrics.CAN_COMMIT.set(0)
            if name == "commit":
                # Spooling goes on: another process commits, or the next one.
                self._reporter.failure("commit_thread", "nothing more is committed by this process", error)
                return
            self._refusing = self._refusing or ("writer_down", "the encode thread ended unexpectedly")
            self._reporter.failure("encode_thread", "nothing more is recorded by this process", error)
            self._abandon(error)

    def _abandon(self, error: BaseException) -> None:
        """Account for what the encode thread leaves behind."""
        self._drained.set()
        while not self._queue.empty():
            self._waiting.append(self._queue.get())
        for queued in self._waiting:
            if queued.future is None or not queued.future.done():
                self._drop(queued, "writer_down", "the encode thread ended unexpectedly", error)
        for _, future in self._unconfirmed:
            if not future.done():
                future.set_exception(DurabilityError(f"the encode thread ended unexpectedly: {error}"))

    # --- the encode thread ---

    def _encode_loop(self) -> None:
        while not (self._stopping.is_set() and not self._waiting and self._queue.empty()):
            self._gather()
            while ready := self._take_ready():
                self._spool_some(ready)
            self._confirm()
            self._measure()
            self._tidy()
        self._drained.set()
        while self._unconfirmed and time.monotonic() < self._deadline:
            time.sleep(CONFIRM_SECONDS)
            self._confirm()
        self._measure()

    def _tidy(self) -> None:
        """Give the memory of large records back, once a second at most."""
        if self._freed > FREED_BYTES and time.monotonic() > self._tidy_at:
            self._freed, self._tidy_at = 0, time.monotonic() + 1
            give_memory_back()

    def _measure(self) -> None:
        metrics.QUEUE_BYTES.set(self.budget.used)
        metrics.QUEUE_RECORDS.set(len(self._waiting) + self._queue.qsize())

    def _gather(self) -> None:
        """Wait for records, and on for the window in which others join them."""
        idle = not (self._waiting or self._unconfirmed or self._stopping.is_set())
        if idle:
            try:
                self._waiting.append(self._queue.get(timeout=1.0))
            except queue.Empty:
                return
        if self._stopping.is_set():
            time.sleep(CONFIRM_SECONDS)
        else:
            self._urgent.wait(CONFIRM_SECONDS if self._unconfirmed else WINDOW_SECONDS)
            self._urgent.clear()
        before = len(self._waiting) - idle
        while not self._queue.empty():
            self._waiting.append(self._queue.get())
        metrics.CAPTURED.inc(len(self._waiting) - before)

    def _take_ready(self) -> list[Queued]:
        """Of what waits, the durable records and those that are complete: enough for one segment."""
        ready = [queued for queued in self._waiting if queued.future is not None or queued.item.is_ready()]
        taken, nbytes = 0, 0
        for queued in ready:
            if nbytes >= SEGMENT_BYTES:
                break
            nbytes += queued.item.reserved_bytes
            taken += 1
        return ready[:taken]

    def _give_way(self) -> None:
        """Let the threads that answer requests have the interpreter, unless that would cost records.

        Python takes it from a thread after 5 ms only, and hands it to another only if this one sleeps.
        """
        if time.monotonic() - self._gave_way_at < WORK_SECONDS or self._stopping.is_set():
            return
        if self.budget.used < self.budget.limit // 2:
            time.sleep(GIVE_WAY_SECONDS)
            self._gave_way_at = time.monotonic()

    def _spool_some(self, ready: list[Queued]) -> None:
        """Encode and spool records; they leave ``_waiting`` when each has its outcome."""
        rows: list[tuple[Queued, Row]] = []
        # A durable reply waits for this itself.
        give_way = no_pause if any(queued.future is not None for queued in ready) else self._give_way
        for queued in ready:
            try:
                with metrics.ENCODE_SECONDS.time():
                    rows.append((queued, queued.item.encode(give_way)))
            except Exception as error:  # the writer's border: a record that fails must not stop the others
                self._drop(queued, "encoding", "it could not be encoded", error)
        if rows:
            self._spool_rows(rows, give_way)
        done = set(map(id, ready))
        self._waiting = [queued for queued in self._waiting if id(queued) not in done]

    def _spool_rows(self, rows: list[tuple[Queued, Row]], give_way: Callable[[], None]) -> None:
        try:
            batch = to_batch([row for _, row in rows], give_way)
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
            # One row that no column can hold must not take the others with it.
            if len(rows) == 1:
                self._drop(rows[0][0], "encoding", "it does not fit the table's columns", error)
            else:
                for one in rows:
                    self._spool_rows([one], give_way)
            return
        try:
            sequence = self._append(batch, sync=any(queued.future is not None for queued, _ in rows))
        except SpoolFullError as error:
            self._drop_all(rows, "spool_full", "the spool is full", error)
        except (SpoolError, OSError, pa.ArrowException) as error:
            self._drop_all(rows, "spool", "it could not be spooled", error)
        else:
            metrics.SPOOLED.inc(len(rows))
            metrics.SPOOLED_BYTES.inc(batch.nbytes)
            self._freed += batch.nbytes
            for queued, _ in rows:
                self._resolve(queued, sequence)

    def _drop_all(self, rows: list[tuple[Queued, Row]], reason: str, why: str, error: Exception) -> None:
        for queued, _ in rows:
            self._drop(queued, reason, why, error)

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

    def _resolve(self, queued: Queued, sequence: int) -> None:
        """A record is spooled: its memory goes back, and a strict reply may leave."""
        self.budget.release(queued.item.reserved_bytes)
        queued.item.reserved_bytes = 0
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
            except OSError:
                still.append((sequence, future))  # the disk can't say now; the reply has its own deadline
        self._unconfirmed = still


WRITERS: "Final[weakref.WeakSet[Writer]]" = weakref.WeakSet()


def reset_in_child() -> None:
    """A fork has the parent's queue and locks, but none of its threads."""
    for writer in list(WRITERS):
        writer._reset()


os.register_at_fork(after_in_child=reset_in_child)
