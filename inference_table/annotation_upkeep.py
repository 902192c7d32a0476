"""Upkeep of the table of annotations: checkpoints, few files instead of many, an end to what is not used.

Each commit is a small file. In each :data:`MERGE_VERSIONS` versions one of the processes that write merges
the small files into one, in the way of :mod:`inference_table.merge`: against a version opened after its file
was written, in which all sources are still there, and with no retry by delta-rs. Nobody waits for it.

On an object store the merge is done by a process of its own, ``python -m inference_table.annotation_upkeep``:
each file that pyarrow opens there holds the interpreter's lock for a round trip.
"""

import json
import logging
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable
from deltalake._internal import RemoveAction
from deltalake.exceptions import CommitFailedError
from deltalake.transaction import AddAction

from inference_table.cleaning import clean
from inference_table.delta import (
    NO_HOOKS,
    checkpoint,
    open_table,
    sync_data_files,
    sync_log,
    table_files,
)
from inference_table.errors import TableError
from inference_table.ids import uuid7
from inference_table.maintenance_process import CHILD_NICE, end_with_parent
from inference_table.parquet import write_rows
from inference_table.settings import StorageSettings

__all__ = ["Upkeep", "merge_small_files", "write_data_file"]

logger: Final = logging.getLogger("tracelake")

CHECKPOINT_VERSIONS: Final = 20
MERGE_VERSIONS: Final = 60
"""Each small file adds about 0.1 ms to opening the table, and 1 ms to reading all of it."""
CLEAN_VERSIONS: Final = 600
"""It lists all files."""
MIN_FILES: Final = 16
SMALL_BYTES: Final = 4 * 1024 * 1024
"""A larger file is merged no more: what is written again with each merge stays below this."""
MERGE_ATTEMPTS: Final = 20
"""How often a merge is tried again because somebody else committed just then."""
COMPRESSION_LEVEL: Final = 3
CHILD_SECONDS: Final = 600.0
"""End of a child process that hangs."""


class Upkeep:
    """What follows commits, in a thread of its own. One at a time in a process.

    Args:
        settings: whose ``uri`` is that of the annotations.
    """

    def __init__(self, settings: StorageSettings) -> None:
        self.settings = settings
        self._thread: threading.Thread | None = None

    def start(self, before: int, after: int) -> None:
        """Do what is due between two versions."""
        if before // CHECKPOINT_VERSIONS == after // CHECKPOINT_VERSIONS:
            return
        if self._thread is not None and self._thread.is_alive():
            return
        self._thread = threading.Thread(
            target=self._run,
            args=(before, after),
            name="tracelake-annotations-upkeep",
            # Its child process ends with ours; what we do ourselves is done in a moment.
            daemon=not self.settings.is_local,
        )
        self._thread.start()

    def _run(self, before: int, after: int) -> None:
        try:
            checkpoint(self.settings, open_table(self.settings), before)
            if before // MERGE_VERSIONS != after // MERGE_VERSIONS:
                (merge_small_files if self.settings.is_local else merge_in_child)(self.settings)
            if before // CLEAN_VERSIONS != after // CLEAN_VERSIONS:
                for job in ("log", "vacuum"):
                    clean(self.settings, job)
        except CommitFailedError as error:
            logger.debug("files of %s were left to another merge: %s", self.settings.uri, error)
        except Exception as error:  # noqa: BLE001  # the annotations are committed: nobody else would say it
            logger.warning(
                "upkeep of the table %s failed, and is tried again later: %s", self.settings.uri, error
            )


def write_data_file(settings: StorageSettings, rows: pa.Table, *, data_change: bool) -> AddAction:
    """Write a data file with pyarrow; not in the log yet, and not synced."""
    path = f"part-{uuid7()}.zstd.parquet"
    with pa.OSFile(str(settings.local_path / path), "wb") as sink:
        return written(sink, path, rows, data_change)


def written(sink: pa.NativeFile, path: str, rows: pa.Table, data_change: bool) -> AddAction:
    action = write_rows(
        sink, path, None, [rows], compression_level=COMPRESSION_LEVEL, data_change=data_change
    )
    return replace(action, partition_values={})


def merge_small_files(settings: StorageSettings) -> bool:
    """Make one file of the small ones; returns whether there were enough.

    Raises:
        CommitFailedError: others have committed each time, or have removed a source; nothing was merged.
    """
    table = open_table(settings)
    sizes = small_files(table)
    if len(sizes) < MIN_FILES:
        return False
    files = table_files(settings, table, sizes)
    rows = pa.concat_tables([read_file(files, path, size) for path, size in sizes.items()])
    path = f"part-{uuid7()}.zstd.parquet"
    with files.open_output_stream(path, compression=None) as sink:
        merged = written(sink, path, rows, False)
    if settings.is_local:
        sync_data_files(settings.local_path, [merged])
    replace_files(settings, list(sizes.items()), merged)
    return True


def active_files(table: DeltaTable) -> dict[str, int]:
    """Size of each data file, by its path."""
    actions = pa.table(table.get_add_actions())
    return dict(zip(actions["path"].to_pylist(), actions["size_bytes"].to_pylist(), strict=True))


def small_files(table: DeltaTable) -> dict[str, int]:
    return {path: size for path, size in active_files(table).items() if size < SMALL_BYTES}


def read_file(files: object, path: str, size: int) -> pa.Table:
    with files.open_input_file(path) as source:  # type: ignore[attr-defined]  # pyarrow has no types
        content = source.read_buffer(size)
    return pq.read_table(pa.BufferReader(content))


def replace_files(settings: StorageSettings, sources: Sequence[tuple[str, int]], merged: AddAction) -> None:
    """Commit a merge. The file of one that fails is left to the vacuum: somebody may have seen it."""
    for left in range(MERGE_ATTEMPTS - 1, -1, -1):
        table = open_table(settings)
        if merged.path in active_files(table):
            return
        if not {path for path, _ in sources} <= active_files(table).keys():
            raise CommitFailedError("files to be merged were removed from the table meanwhile")
        try:
            commit_merge(table, sources, merged)
        except CommitFailedError:
            if not left:
                raise
            time.sleep(random.uniform(0.0, 0.05))
            continue
        if settings.is_local:
            sync_log(settings.local_path, table.version(), table.version())
        return


def commit_merge(table: DeltaTable, sources: Sequence[tuple[str, int]], merged: AddAction) -> None:
    now = int(time.time() * 1000)
    removed = [
        RemoveAction(path=path, data_change=False, deletion_timestamp=now, size=size, partition_values={})
        for path, size in sources
    ]
    table.create_write_transaction(
        [merged, *removed],
        "append",
        table.schema(),
        # No retry: delta-rs would step over a commit that has removed the same files.
        commit_properties=CommitProperties(max_commit_retries=0),
        post_commithook_properties=NO_HOOKS,
    )


def merge_in_child(settings: StorageSettings) -> None:
    """The same in a process of its own.

    Raises:
        TableError: it ended otherwise than it should; it has said why on standard error.
    """
    work = {"uri": settings.uri, "storage_options": dict(settings.storage_options)}
    command = [sys.executable, "-m", "inference_table.annotation_upkeep"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as child:
        assert child.stdin is not None
        child.stdin.write(json.dumps(work).encode() + b"\n")
        child.stdin.flush()
        if code := child.wait(CHILD_SECONDS):
            raise TableError(f"the process that merges files of {settings.uri} ended with {code}")


def run_child() -> None:
    """Merge the small files of the table that standard input names; ends with its parent."""
    work = json.loads(sys.stdin.readline())
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.nice(CHILD_NICE)
    merge_small_files(StorageSettings(uri=work["uri"], storage_options=work["storage_options"]))
    # At once: pyarrow's threads may still hold files of delta-rs, which abort an interpreter that ends.
    os._exit(0)


if __name__ == "__main__":
    run_child()
