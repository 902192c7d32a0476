"""The committer: moves segments from the spool into the Delta table, each exactly once.

What holds:

- One process per table and machine holds the committer's lock and commits for all folders, those of dead
  owners included. The lock saves work. Correctness rests on Delta: a commit carries a transaction
  ``(spool id, last sequence)`` for each folder, and fails if another commit with that spool id came after the
  version that was read (``last_updated`` is unset: one that expired would read as none).
- A batch is, per folder, a consecutive run of whole segments after the last committed one. A missing number
  ends it, since a listing is no snapshot. It is passed only in a folder whose owner is dead, by a listing
  taken after that was known, and counted as lost.
- A table is opened anew for each commit: the version is read from, and the commit done with, one object that
  nobody else has. So is looked again after any exception, since one doesn't mean "not committed".
- Data files are on disk before the commit that names them, and the commit is on disk (local tables: delta-rs
  syncs nothing) before a segment is deleted; and a freshly opened table has shown the same table id and a
  transaction of at least its sequence. What an earlier holder of the lock, or a failed attempt, has committed
  is synced by ``os.sync()``.
- The id of the table is recorded before the first commit. Another id means that the table was replaced: this
  is reported, nothing is deleted, and what is still spooled goes to the new table from there on.
- A segment that can't be read for good is set aside and the run goes on after it. One that can't be read now
  ends the run of its folder, not that of others.
- The names of a local table's data files are noted before they are written, so that those of a failed attempt
  can be removed once a freshly opened table shows that it did fail.
"""

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
from deltalake.transaction import AddAction

from inference_table import metrics
from inference_table.attempt import Attempt
from inference_table.delta import (
    NO_HOOKS,
    check_writable,
    checkpoint,
    ensure_columns,
    log_file,
    open_or_create_table,
    open_table,
    sync_data_files,
    sync_log,
    table_id,
    transaction_version,
    union_schema,
)
from inference_table.disk import FileLock, write_durably
from inference_table.errors import SegmentError, SpoolError, TableError, TableReplacedError
from inference_table.folder import Folder, adopt_abandoned, folders
from inference_table.parquet import (
    DataFile,
    align,
    data_columns,
    plan_files,
    row_groups,
    write_file,
    writer_properties,
)
from inference_table.quarantine import finish_set_aside, set_aside
from inference_table.schema import PARTITION_COLUMN
from inference_table.segment import Segment
from inference_table.settings import StorageSettings
from inference_table.spool import spool_root
from inference_table.steps import Step, ignore_step

__all__ = ["CommitResult", "Committer", "open_or_create_table"]

BATCH_BYTES: Final = 256 * 1024 * 1024
"""Spooled bytes of one commit: what is lost in work, not in rows, when it fails."""
REMOTE_BATCH_BYTES: Final = 64 * 1024 * 1024
"""The same where delta-rs writes, which takes two to three times as much memory."""
BATCH_SEGMENTS: Final = 4096
"""Segments of one commit: each is a memory mapping, and a process may have 65,530."""
COMPRESSION_LEVEL: Final = 1
"""zstd 1 keeps up with any endpoint; compaction compresses again."""
MAX_RETRIES: Final = 100
"""Commits of others that ours may have to step over; delta-rs does so without a pause."""

TABLE_ID: Final = "TABLE_ID"
LOCK: Final = "committer.lock"


@dataclass(frozen=True, slots=True)
class CommitResult:
    """One commit: the table's ``version`` and how much it has added. ``bytes`` are uncompressed."""

    version: int
    rows: int
    bytes: int
    segments: int
    is_full: bool
    """Whether the batch had no room for all that was spooled when it was read."""


@dataclass(slots=True)
class Run:
    """What one folder gives to a commit."""

    folder: Folder
    last: int
    lost: int = 0
    rows: int = 0
    segments: list[Segment] = field(default_factory=list)
    tables: list[pa.Table] = field(default_factory=list)
    """The rows, until they are written."""

    @property
    def bytes(self) -> int:
        """Size of the segments: an Arrow file is as large as what it holds in memory."""
        return sum(segment.size for segment in self.segments)


class Committer:
    """Commits for all processes that spool on this machine for one table. For one thread.

    Args:
        settings: which table and spool.
        on_step: called with each point passed.
    """

    def __init__(self, settings: StorageSettings, on_step: Callable[[Step], None] = ignore_step) -> None:
        self.settings = settings
        self.root = spool_root(settings)
        self._on_step = on_step
        self._lock = FileLock(self.root / LOCK)
        self._attempt = Attempt(settings, self.root)
        self._must_sync = True
        self._opened: tuple[DeltaTable, object] | None = None
        """What the last commit was verified with, and what its log looked like. Nobody else uses it."""

    @property
    def is_acquired(self) -> bool:
        """Whether this process is the one that commits."""
        return self._lock.is_held

    def acquire(self) -> bool:
        """Become the one that commits, unless another process is, or nothing was ever spooled."""
        if self._lock.is_held:
            return True
        if not self.root.is_dir():
            return False
        self._must_sync = True
        return self._lock.acquire()

    def release(self) -> None:
        """Let another process commit."""
        self._lock.release()

    def commit_once(self) -> CommitResult | None:
        """Commit what is spooled, up to a bounded number of bytes; None if there is nothing to commit.

        Raises:
            TableError: the table can't be reached or written to, or was replaced; the rows are kept.
            SpoolError: a segment is missing in a folder whose owner is alive; the rows after it are kept.
            OSError, MemoryError, deltalake.exceptions.DeltaError: something failed; whether it is committed
                or not, the next call finds out.
        """
        if not self._lock.is_held:
            raise SpoolError(
                f"cannot commit from {self.root}: the committer's lock is not held; acquire it first"
            )
        started = time.perf_counter()
        try:
            result = self._commit()
        except BaseException:
            self._must_sync = True
            raise
        if result is not None:
            metrics.COMMIT_SECONDS.observe(time.perf_counter() - started)
        return result

    def _commit(self) -> CommitResult | None:
        adopt_abandoned(self.root)
        found = folders(self.root)
        for folder in found:
            finish_set_aside(folder)
        if not any(folder.segments() for folder in found):
            remove_dead(found, self._on_step)
            return None
        table = self._newest()
        self._follow(table, found)
        self._attempt.clear(table)
        room = Room(BATCH_BYTES if self.settings.is_local else REMOTE_BATCH_BYTES, BATCH_SEGMENTS)
        runs = self._read_runs(table, found, room)
        if not runs:
            remove_dead(found, self._on_step)
            return None
        self._on_step(Step.BATCH_READ)
        check_writable(self.settings, table)
        schema = union_schema(rows for run in runs for rows in run.tables)
        table = ensure_columns(self.settings, table, schema)
        before = table.version()  # write_deltalake moves the table that it is given
        self._append(table, runs)
        version = self._settle(table, before, runs)
        remove_dead(found, self._on_step)
        return CommitResult(
            version=version,
            rows=sum(run.rows for run in runs),
            bytes=sum(run.bytes for run in runs),
            segments=sum(len(run.segments) for run in runs),
            is_full=room.is_full,
        )

    def _newest(self) -> DeltaTable:
        """The table as it is now.

        Opening it takes longer the more files it has (28 ms at 1,000). So the one that the last commit was
        verified with is brought up to date, where the log at that place is still the same one: another
        table's would be continued at a version that it does not have.
        """
        opened, self._opened = self._opened, None  # a commit that fails leaves none behind
        if opened is not None:
            table, log = opened
            if self._log_mark(table) == log:
                table.update_incremental()
                return table
        return open_table(self.settings)

    def _log_mark(self, table: DeltaTable) -> object:
        """What tells the log of this table at this version from one in its place; None where nothing does."""
        if not self.settings.is_local:
            return None
        try:
            found = log_file(self.settings.local_path, table.version()).stat()
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino, found.st_mtime_ns

    def _follow(self, table: DeltaTable, found: Iterable[Folder]) -> None:
        """Notice that the table at the URI is another one than before."""
        path, now = self.root / TABLE_ID, table_id(table)
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        if before == now:
            return
        if before:
            for folder in found:
                folder.set_start(None)
        write_durably(path, now)
        if before:
            raise TableReplacedError(
                f"the table {self.settings.uri} was replaced: its id was {before} and is {now}; rows "
                "committed to the old one are not repeated, those still in the spool go to the new one"
            )

    # --- what to commit ---

    def _read_runs(self, table: DeltaTable, found: Iterable[Folder], room: "Room") -> list[Run]:
        """The next rows of each folder, the longest waiting first, until the batch is full."""
        waiting = []
        for folder in found:
            committed = transaction_version(table, folder.spool_id)
            alive = folder.owner_alive()
            segments = folder.segments()
            self._delete_committed(segments, committed)
            segments = [segment for segment in segments if segment.sequence > committed]
            if segments:
                waiting.append((segments[0].mtime, folder, committed, alive, segments))
        runs, troubles = [], list[Exception]()
        for _, folder, committed, alive, segments in sorted(waiting, key=lambda entry: entry[0]):
            run = self._read_run(folder, committed, alive, segments, room, troubles)
            if run.segments:
                runs.append(run)
        if troubles and not runs:
            raise troubles[0]
        return runs

    def _read_run(
        self,
        folder: Folder,
        committed: int,
        alive: bool,
        segments: list[Segment],
        room: "Room",
        troubles: list[Exception],
    ) -> Run:
        run = Run(folder, max(committed, first_sequence(folder) - 1))
        gone = folder.tombstones()
        for segment in segments:
            missing = [number for number in range(run.last + 1, segment.sequence) if number not in gone]
            if missing and alive:
                if not {one.sequence for one in folder.segments()} & set(missing):
                    troubles.append(missing_segment(folder, missing[0]))
                break
            if not room.has(segment):
                break
            try:
                rows = segment.read()
            except SegmentError:
                set_aside(segment, self._on_step)
                gone |= {segment.sequence}
                continue
            except (OSError, MemoryError) as error:
                troubles.append(error)
                break
            room.take(segment)
            run.lost += len(missing)
            run.last = segment.sequence
            run.segments.append(segment)
            run.tables.append(rows)
            run.rows += rows.num_rows
        return run

    def _delete_committed(self, segments: Iterable[Segment], committed: int) -> None:
        """Delete what the table has: left by a crash, or by an attempt that only seemed to fail."""
        for segment in segments:
            if segment.sequence <= committed:
                if self._must_sync and self.settings.is_local:
                    os.sync()
                self._must_sync = False
                self._delete(segment)

    def _delete(self, segment: Segment) -> None:
        segment.path.unlink(missing_ok=True)
        self._on_step(Step.SEGMENT_DELETED)

    # --- the commit ---

    def _append(self, table: DeltaTable, runs: list[Run]) -> None:
        tables = [rows for run in runs for rows in run.tables]
        transactions = {run.folder.spool_id: run.last for run in runs}
        properties = CommitProperties(
            app_transactions=[Transaction(*one) for one in transactions.items()],
            max_commit_retries=MAX_RETRIES,
        )
        if not self.settings.is_local:
            self._append_remote(table, tables, sum(run.bytes for run in runs), properties)
            self._on_step(Step.COMMITTED)
            return
        planned = plan_files(tables)
        for let_go in (tables, *(run.tables for run in runs)):
            let_go.clear()
        self._attempt.note(table, transactions, [one.path for one in planned])
        self._on_step(Step.ATTEMPT_NOTED)
        actions = [self._write(one, data_columns(table)) for one in planned]
        self._on_step(Step.DATA_WRITTEN)
        sync_data_files(self.settings.local_path, actions)
        self._on_step(Step.DATA_SYNCED)
        table.create_write_transaction(
            list(actions),
            "append",
            table.schema(),
            partition_by=[PARTITION_COLUMN],
            commit_properties=properties,
            post_commithook_properties=NO_HOOKS,
        )
        self._on_step(Step.COMMITTED)

    def _write(self, planned: DataFile, schema: pa.Schema) -> AddAction:
        groups = (align(rows, schema) for rows in row_groups(planned.consume()))
        return write_file(
            self.settings.local_path, planned.path, planned.day, groups, compression_level=COMPRESSION_LEVEL
        )

    def _append_remote(
        self, table: DeltaTable, tables: list[pa.Table], nbytes: int, properties: CommitProperties
    ) -> None:
        schema = pa.schema(table.schema().to_arrow())
        batches = (batch for rows in tables for batch in align(rows, schema).to_batches())
        write_deltalake(
            table,
            pa.RecordBatchReader.from_batches(schema, batches),
            mode="append",
            writer_properties=writer_properties(
                nbytes, sum(rows.num_rows for rows in tables), COMPRESSION_LEVEL
            ),
            commit_properties=properties,
            post_commithook_properties=NO_HOOKS,
        )

    def _settle(self, before: DeltaTable, version: int, runs: list[Run]) -> int:
        """Make the commit durable, look at it, and delete what it holds; returns the table's version."""
        table = open_table(self.settings)
        if self.settings.is_local:
            sync_log(self.settings.local_path, version + 1, table.version())
            self._on_step(Step.COMMIT_SYNCED)
        if table_id(table) != table_id(before):
            raise TableReplacedError(
                f"the table {self.settings.uri} was replaced during a commit; its rows are kept in the spool"
            )
        for run in runs:
            if transaction_version(table, run.folder.spool_id) < run.last:
                raise TableError(
                    f"the table {self.settings.uri} doesn't show the commit of {run.folder.path}; "
                    "its rows are kept in the spool, and committed again"
                )
        self._on_step(Step.COMMIT_VERIFIED)
        for run in runs:
            for segment in run.segments:
                self._delete(segment)
            metrics.SPOOL_GAPS.inc(run.lost)
            metrics.COMMITTED.inc(run.rows)
            metrics.COMMITTED_BYTES.inc(run.bytes)
        self._attempt.forget()
        checkpoint(self.settings, table, version)
        if (log := self._log_mark(table)) is not None:
            self._opened = table, log
        return table.version()


@dataclass(slots=True)
class Room:
    """What still fits into a batch; one segment always does."""

    bytes: int
    segments: int
    is_empty: bool = True
    is_full: bool = False
    """Whether there was none for some segment."""

    def has(self, segment: Segment) -> bool:
        has = self.is_empty or (self.segments > 0 and self.bytes >= segment.size)
        self.is_full = self.is_full or not has
        return has

    def take(self, segment: Segment) -> None:
        self.is_empty = False
        self.segments -= 1
        self.bytes -= segment.size


def first_sequence(folder: Folder) -> int:
    """The first sequence that concerns the present table."""
    start = folder.start
    if start is None:
        # Its table was replaced: what is missing went to the old one. A second listing has all that was
        # there before anything the first one showed.
        start = folder.segments()[0].sequence
        folder.set_start(start)
    return start


def missing_segment(folder: Folder, sequence: int) -> SpoolError:
    return SpoolError(
        f"segment {sequence} is missing in {folder.path}, whose owner is alive: those after it wait until it "
        "shows up, or the owner ends"
    )


def remove_dead(found: Iterable[Folder], on_step: Callable[[Step], None]) -> None:
    for folder in found:
        if folder.remove():
            on_step(Step.FOLDER_REMOVED)
