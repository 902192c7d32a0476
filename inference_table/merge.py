"""One merge: small files of an hour become one file, and no row is added or lost.

delta-rs does not notice when two commits remove the same file. So a merge is committed against a version
opened after its file was written, in which all its sources are still there, with no retry by delta-rs: if
anybody commits in between, it fails and is tried again.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from itertools import groupby, islice
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable
from deltalake._internal import RemoveAction
from deltalake.exceptions import CommitFailedError
from deltalake.transaction import AddAction
from pyarrow.fs import FileSystem

from inference_table.delta import (
    NO_HOOKS,
    check_writable,
    checkpoint,
    open_table,
    sync_data_files,
    sync_log,
    table_files,
)
from inference_table.parquet import align, data_columns, file_path, row_groups, write_rows
from inference_table.schema import PARTITION_COLUMN
from inference_table.settings import StorageSettings
from inference_table.steps import Step

__all__ = ["OPEN_HOUR_FILES", "merge_some", "mergeable"]

OPEN_HOUR_FILES: Final = 256
"""Small files of an hour that is not over that are worth merging: each makes all commits and reads slower."""
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
REMOTE_COMMIT_ATTEMPTS: Final = 20
"""The same on an object store, where other machines commit, and nobody waits for the merge."""
CHOICES: Final = 20
"""On an object store a merge is one of the first so many, at random: two machines seldom do the same."""


@dataclass(frozen=True, slots=True)
class SmallFile:
    path: str
    size: int
    day: date | None
    hour: int
    """Hours since 1970 of its last request."""
    first: int
    """Microseconds since 1970 of its first request."""


def merge_some(settings: StorageSettings, now: datetime, on_step: Callable[[Step], None]) -> bool:
    """Do one merge; returns whether there was anything to merge.

    Raises:
        CommitFailedError: others have committed each time, or have removed a source; nothing was merged.
    """
    table = open_table(settings)
    groups = list(islice(mergeable(table, now), 1 if settings.is_local else CHOICES))
    if not groups:
        return False
    group = random.choice(groups)
    check_writable(settings, table)
    merged = write_merged(settings, table, group)
    on_step(Step.COMPACTION_WRITTEN)
    try:
        replace(settings, group, merged, on_step)
    except BaseException:
        discard(settings, merged)
        raise
    return True


def write_merged(settings: StorageSettings, table: DeltaTable, group: Sequence[SmallFile]) -> AddAction:
    files = table_files(settings, table, {file.path: file.size for file in group})
    path = file_path(group[0].day)
    files.create_dir(path.rpartition("/")[0], recursive=True)
    with files.open_output_stream(path, compression=None) as sink:
        merged = write_rows(
            sink,
            path,
            group[0].day,
            sorted_groups(files, group, data_columns(table)),
            compression_level=COMPRESSION_LEVEL,
            data_change=False,
        )
    if settings.is_local:
        sync_data_files(settings.local_path, [merged])
    return merged


def replace(
    settings: StorageSettings,
    group: Sequence[SmallFile],
    merged: AddAction,
    on_step: Callable[[Step], None],
) -> None:
    attempts = COMMIT_ATTEMPTS if settings.is_local else REMOTE_COMMIT_ATTEMPTS
    table = open_table(settings)
    for attempt in range(1, attempts + 1):
        if not {file.path for file in group} <= active_paths(table):
            raise CommitFailedError("files to be merged were removed from the table meanwhile")
        try:
            commit_merge(table, group, merged)
        except CommitFailedError:
            if is_committed(settings, merged):
                break
            if attempt == attempts:
                raise
            # To open it anew takes longer, and others commit meanwhile.
            table.update_incremental()
            continue
        break
    on_step(Step.COMPACTION_COMMITTED)
    after = open_table(settings)
    if settings.is_local:
        sync_log(settings.local_path, table.version() + 1, after.version())
    checkpoint(settings, after, table.version())


def active_paths(table: DeltaTable) -> set[str]:
    return set(table.get_add_actions().column("path").to_pylist())


def is_committed(settings: StorageSettings, merged: AddAction) -> bool:
    return merged.path in active_paths(open_table(settings))


def discard(settings: StorageSettings, merged: AddAction) -> None:
    if settings.is_local and not is_committed(settings, merged):
        settings.local_path.joinpath(merged.path).unlink(missing_ok=True)


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
    """Groups of small files of one hour, each a step's worth, oldest first.

    Of an hour that is over all of them; of others many, which are merged once more when it is over.
    """
    closed = int((now.timestamp() - SETTLE_SECONDS) // 3600)
    for (hour, _), files in groupby(small_files(table), key=lambda file: (file.hour, file.day)):
        same = list(files)
        if hour >= closed and len(same) < OPEN_HOUR_FILES:
            continue
        group: list[SmallFile] = []
        size = 0
        for file in same:
            group.append(file)
            size += file.size
            if size >= STEP_BYTES or len(group) == STEP_FILES:
                if len(group) > 1:
                    yield group
                group, size = [], 0
        if len(group) > 1:
            yield group


def small_files(table: DeltaTable) -> Iterator[SmallFile]:
    """Small files, in order of hour, day and time.

    What is not wanted is left out by Arrow, without the GIL: a table has tens of thousands of files.
    """
    actions = pa.table(table.get_add_actions(flatten=True))
    wanted = ["path", "size_bytes", f"partition.{PARTITION_COLUMN}", "min.request_time", "max.request_time"]
    if not set(wanted) <= set(actions.column_names):
        return  # no file has statistics of the time: none of them is ours
    path, size, day, first, last = (actions.column(name) for name in wanted)
    hour = pc.divide(microseconds(last), 3_600_000_000)
    found = pa.table({"path": path, "size": size, "day": day, "hour": hour, "first": microseconds(first)})
    found = found.filter(pc.and_(pc.less(size, SMALL_BYTES), pc.is_valid(first)))
    order = [(name, "ascending") for name in ("hour", "day", "first")]
    for chunk in found.sort_by(order).to_batches(max_chunksize=STEP_FILES):
        for row in chunk.to_pylist():
            yield SmallFile(**row)


def microseconds(times: pa.ChunkedArray) -> pa.ChunkedArray:
    return times.cast(pa.timestamp("us", tz="UTC")).cast(pa.int64())


def sorted_groups(files: FileSystem, group: Sequence[SmallFile], schema: pa.Schema) -> Iterator[pa.Table]:
    """Row groups of the merged file, each in order of time; the files come in that order already."""
    for rows in row_groups(read_files(files, group)):
        yield align(rows.sort_by("request_time"), schema)


def read_files(files: FileSystem, group: Sequence[SmallFile]) -> Iterator[pa.Table]:
    """The row groups of small files, each of which is read at once: one request to an object store."""
    for file in group:
        with files.open_input_file(file.path) as source:
            content = source.read_buffer(file.size)
        with pq.ParquetFile(pa.BufferReader(content)) as parquet:
            for number in range(parquet.num_row_groups):
                yield parquet.read_row_group(number)
