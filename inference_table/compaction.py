"""Maintenance of the table: few large files instead of many small ones, and an end to what is no longer used.

At one commit a second a table gains 86,400 files a day. Once an hour of requests is over and settled, its
small files are merged, a bounded number of bytes at a time, so that commits are not held up.

What holds:

- A merge adds no row and loses none, whatever else happens to the table. delta-rs does not notice when two
  commits remove the same file (its own ``optimize.compact`` neither: two at once double the rows). So the
  merge is committed against a version opened after the file was written, in which all its sources are still
  there, with no retry: if anybody commits in between, it fails and is tried again.
- Transactions of spool ids are untouched: they are not in the data files.
- A merge that fails removes its file.
- Only local tables are merged here. On an object store each file that delta-rs opens for pyarrow would hold
  the GIL for a round trip, and requests would wait; it is for a job outside the server.
- Files are deleted from disk a week after they were written, and only if no version of the table that can
  still be opened uses them. What crashes have left goes the same way.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from itertools import groupby
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable
from deltalake._internal import RemoveAction
from deltalake.exceptions import CommitFailedError
from deltalake.transaction import AddAction

from inference_table import metrics
from inference_table.delta import (
    NO_HOOKS,
    check_writable,
    checkpoint,
    open_table,
    sync_data_files,
    sync_log,
)
from inference_table.parquet import align, data_columns, file_path, row_groups, write_file
from inference_table.schema import PARTITION_COLUMN
from inference_table.settings import StorageSettings
from inference_table.spool import spool_root
from inference_table.steps import Step, ignore_step

__all__ = ["Maintenance"]

CHECK_SECONDS: Final = 60.0
"""Pause between two looks for work, which open the table (tens of ms) and list its files."""
SETTLE_SECONDS: Final = 300.0
"""Time after an hour's end in which its last rows may still come: long requests, a backlog."""
SMALL_BYTES: Final = 16 * 1024 * 1024
"""A file below this is worth merging."""
STEP_BYTES: Final = 32 * 1024 * 1024
"""Compressed bytes of one merge: a second or so of one core, for which commits wait."""
STEP_FILES: Final = 1000
"""Files of one merge, for the same reason: opening one takes about a millisecond."""
COMPRESSION_LEVEL: Final = 3
"""Written once more and read often: zstd 3 is smaller than 1, and no user waits for it."""
COMMIT_ATTEMPTS: Final = 5
"""How often a merge is tried again because somebody else committed just then."""
CLEAN_SECONDS: Final = 24 * 3600.0
"""Pause between two vacuums, which list all files of the table."""
LOG_SECONDS: Final = 3600.0
"""Pause between two clean-ups of the log."""
RETENTION_HOURS: Final = 168
"""Least age of a file that may be deleted: Delta's own limit, beyond any reader or writer still at work."""


@dataclass(frozen=True, slots=True)
class SmallFile:
    path: str
    size: int
    day: date | None
    hour: int
    """Hours since 1970 of its last request."""
    first: int
    """Microseconds since 1970 of its first request."""


class Maintenance:
    """Keeps the table small. For one thread, that of the committer.

    Args:
        settings: which table.
        on_step: called with each point passed.
    """

    def __init__(self, settings: StorageSettings, on_step: Callable[[Step], None] = ignore_step) -> None:
        self.settings = settings
        self._on_step = on_step
        self._next_look = 0.0

    def step(self, now: datetime | None = None) -> bool:
        """Do one bounded piece of work if any is due; returns whether there was any.

        Cheap to call after each commit: it looks for work once a minute, and goes on at once where it found
        some.

        Raises:
            TableError: the table can't be reached or may not be written to.
            OSError, deltalake.exceptions.DeltaError: something failed; the table is as good as before.
        """
        if time.monotonic() < self._next_look:
            return False
        self._next_look = time.monotonic() + CHECK_SECONDS
        worked = self.compact(now or datetime.now(UTC)) or self._clean()
        if worked:
            self._next_look = 0.0
        return worked

    def compact(self, now: datetime) -> bool:
        """Merge some small files of one hour that is over; returns whether there were any.

        Always False for a table on an object store.
        """
        if not self.settings.is_local:
            return False
        table = open_table(self.settings)
        group = next(mergeable(table, now), None)
        if group is None:
            return False
        check_writable(self.settings, table)
        merged = self._merge(table, group)
        self._on_step(Step.COMPACTION_WRITTEN)
        try:
            self._replace(group, merged)
        except BaseException:
            self._discard(merged)
            raise
        metrics.COMPACTIONS.inc()
        return True

    def _merge(self, table: DeltaTable, group: Sequence[SmallFile]) -> AddAction:
        action = write_file(
            self.settings.local_path,
            file_path(group[0].day),
            group[0].day,
            sorted_groups(self.settings.local_path, group, data_columns(table)),
            compression_level=COMPRESSION_LEVEL,
            data_change=False,
        )
        sync_data_files(self.settings.local_path, [action])
        return action

    def _replace(self, group: Sequence[SmallFile], merged: AddAction) -> None:
        for attempt in range(1, COMMIT_ATTEMPTS + 1):
            table = open_table(self.settings)
            if not {file.path for file in group} <= set(table.get_add_actions().column("path").to_pylist()):
                raise CommitFailedError("files to be merged were removed from the table meanwhile")
            try:
                commit_merge(table, group, merged)
            except CommitFailedError:
                if self._is_committed(merged):
                    break
                if attempt == COMMIT_ATTEMPTS:
                    raise
                continue
            break
        self._on_step(Step.COMPACTION_COMMITTED)
        after = open_table(self.settings)
        sync_log(self.settings.local_path, table.version() + 1, after.version())
        checkpoint(self.settings, after, table.version())

    def _is_committed(self, merged: AddAction) -> bool:
        table = open_table(self.settings)
        return merged.path in set(table.get_add_actions().column("path").to_pylist())

    def _discard(self, merged: AddAction) -> None:
        if not self._is_committed(merged):
            self.settings.local_path.joinpath(merged.path).unlink(missing_ok=True)

    # --- what is no longer used ---

    def _clean(self) -> bool:
        if self._is_due("log.stamp", LOG_SECONDS):
            open_table(self.settings).cleanup_metadata()
            return True
        if self._is_due("vacuum.stamp", CLEAN_SECONDS):
            open_table(self.settings).vacuum(
                retention_hours=RETENTION_HOURS, dry_run=False, full=True, post_commithook_properties=NO_HOOKS
            )
            return True
        return False

    def _is_due(self, name: str, seconds: float) -> bool:
        """Whether it is time again on this machine; the next time is counted from now, even if it fails."""
        stamp = spool_root(self.settings) / name
        if not stamp.parent.is_dir() or (stamp.exists() and time.time() - stamp.stat().st_mtime < seconds):
            return False
        stamp.touch()
        return True


def commit_merge(table: DeltaTable, group: Sequence[SmallFile], merged: AddAction) -> None:
    now = int(time.time() * 1000)
    removed = [
        RemoveAction(
            path=file.path,
            data_change=False,
            deletion_timestamp=now,
            size=file.size,
            partition_values=dict(merged.partition_values),
        )
        for file in group
    ]
    table.create_write_transaction(
        [merged, *removed],
        "append",
        table.schema(),
        partition_by=[PARTITION_COLUMN],
        # No retry: delta-rs would step over a commit that has removed the same files.
        commit_properties=CommitProperties(max_commit_retries=0),
        post_commithook_properties=NO_HOOKS,
    )


def mergeable(table: DeltaTable, now: datetime) -> Iterator[list[SmallFile]]:
    """Groups of small files of one hour that is over, each a step's worth, oldest first."""
    closed = int((now.timestamp() - SETTLE_SECONDS) // 3600)
    small = sorted(
        (file for file in small_files(table) if file.hour < closed), key=lambda file: (file.hour, file.first)
    )
    for _, same in groupby(small, key=lambda file: (file.day or date.min, file.hour)):
        group: list[SmallFile] = []
        size = 0
        for file in same:
            group.append(file)
            size += file.size
            if size >= STEP_BYTES or len(group) == STEP_FILES:
                break
        if len(group) > 1:
            yield group


def small_files(table: DeltaTable) -> Iterator[SmallFile]:
    actions = pa.table(table.get_add_actions(flatten=True))
    wanted = ["path", "size_bytes", f"partition.{PARTITION_COLUMN}", "min.request_time", "max.request_time"]
    if not set(wanted) <= set(actions.column_names):
        return  # no file has statistics of the time: none of them is ours
    for path, size, day, first, last in zip(
        *(actions.column(name).to_pylist() for name in wanted), strict=True
    ):
        if size < SMALL_BYTES and first is not None and last is not None:
            yield SmallFile(path, size, day, int(last.timestamp() // 3600), microseconds(first))


def microseconds(time: datetime) -> int:
    return int(time.timestamp() * 1_000_000)


def sorted_groups(root: Path, group: Sequence[SmallFile], schema: pa.Schema) -> Iterator[pa.Table]:
    """Row groups of the merged file, each in order of time; the files come in that order already."""
    for rows in row_groups(read_files(root, group)):
        yield align(rows.sort_by("request_time"), schema)


def read_files(root: Path, group: Sequence[SmallFile]) -> Iterator[pa.Table]:
    for file in group:
        with pq.ParquetFile(root / file.path) as parquet:
            for number in range(parquet.num_row_groups):
                yield parquet.read_row_group(number)
