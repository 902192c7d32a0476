"""How annotations are committed to their table: once, and durably. See :mod:`inference_table.annotations`."""

import contextlib
import os
import random
import time
from collections.abc import Callable
from typing import Final

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Transaction, WriterProperties, write_deltalake
from deltalake.transaction import AddAction

from inference_table.annotation_upkeep import Upkeep, write_data_file
from inference_table.delta import (
    NO_HOOKS,
    delta_types,
    log_file,
    open_table,
    plain_type,
    sync_data_files,
    table_errors,
    table_id,
    transaction_version,
)
from inference_table.disk import make_data_dir_of, sync_dir, sync_file
from inference_table.errors import TableError, TableNotFoundError, TableReplacedError, TableSchemaError
from inference_table.ids import uuid7
from inference_table.settings import StorageSettings
from inference_table.steps import Step, ignore_step

__all__ = ["ANNOTATION_SCHEMA", "AnnotationCommitter", "check_annotations"]

ANNOTATION_SCHEMA: Final = pa.schema(
    [
        pa.field("annotation_id", pa.string()),
        pa.field("annotation_time", pa.timestamp("us", tz="UTC")),
        pa.field("kind", pa.string()),
        pa.field("key", pa.string()),
        pa.field("databricks_request_id", pa.string()),
        pa.field("trace_id", pa.string()),
        pa.field("name", pa.string()),
        pa.field("value", pa.string()),
        pa.field("type", pa.string()),
        pa.field("source_type", pa.string()),
        pa.field("source_id", pa.string()),
        pa.field("rationale", pa.string()),
        pa.field("document", pa.string()),
        pa.field("is_deleted", pa.bool_()),
    ]
)

CONFIGURATION: Final[dict[str, str | None]] = {
    # What people write has no place in the log.
    "delta.dataSkippingStatsColumns": "annotation_time,databricks_request_id,trace_id",
    "delta.checkpointInterval": "20",
    # Each commit lists the log: with 8,000 versions in it, it takes five times as long as with a hundred.
    # Nobody asks for an old version of this table, since its rows tell what was true when.
    "delta.logRetentionDuration": "interval 15 minutes",
    # What a merge has replaced is in every checkpoint for that long.
    "delta.deletedFileRetentionDuration": "interval 1 hours",
}

ATTEMPTS: Final = 12
"""How often a commit is tried; with the pauses, for 10 s or more."""
MAX_RETRIES: Final = 100
"""Commits of others that one attempt steps over. delta-rs does so without a pause; its default of 15 is too
few for ten threads that write at once."""
USES: Final = 20
"""Commits of one table object: it gets slower with each."""
FIRST_PAUSE_SECONDS: Final = 0.02
MAX_PAUSE_SECONDS: Final = 2.0


class AnnotationCommitter:
    """Commits rows of annotations. For one thread at a time.

    Args:
        settings: whose ``uri`` is that of the annotations.
        on_step: called with each point passed.
    """

    def __init__(self, settings: StorageSettings, on_step: Callable[[Step], None] = ignore_step) -> None:
        self.settings = settings
        self._on_step = on_step
        self._upkeep = Upkeep(settings)
        self._pid: int | None = None

    def _begin(self) -> None:
        """The state of a new process; a forked child must not go on with its parent's transactions."""
        self._pid = os.getpid()
        self._writer_id = f"annotations-{uuid7()}"
        self._number = 0
        self._opened: Opened | None = None
        self._synced = -1
        """The last version known to be on disk, with all before it."""

    def commit(self, batches: list[pa.RecordBatch]) -> None:
        """Return once rows with the columns of :data:`ANNOTATION_SCHEMA` are committed and on disk.

        Raises:
            TableSchemaError: the table is none of ours.
            TableError: it can't be written to. Whether the rows are in it is unknown if the connection to an
                object store broke in the middle; else they are not.
        """
        if self._pid != os.getpid():
            self._begin()
        self._number += 1
        pause = FIRST_PAUSE_SECONDS
        attempt = Attempt(pa.Table.from_batches(batches))
        for left in range(ATTEMPTS - 1, -1, -1):
            try:
                self._try(attempt)
                return
            except TableSchemaError:
                raise
            except TableError:
                if not left:
                    raise
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, MAX_PAUSE_SECONDS)

    def _try(self, attempt: "Attempt") -> None:
        with table_errors(self.settings, "append annotations to"):
            opened = self._newest()
            table, before = opened.table, opened.table.version()
            if transaction_version(table, self._writer_id) < self._number:
                self._append(table, attempt)
                self._on_step(Step.COMMITTED)
                opened = self._looked_again(opened)
            if self.settings.is_local:
                self._sync_log(opened.table.version())
                self._on_step(Step.COMMIT_SYNCED)
            self._upkeep.start(before, opened.table.version())
        self._opened = opened

    def _newest(self) -> "Opened":
        """The table as it is now, by an object that nobody else has; opened anew after an exception.

        To open it takes longer the longer its log is. So that of the last commit is brought up to date, where
        the log at that place is still the same one; not for ever, as it gets slower with each commit.
        """
        opened, self._opened = self._opened, None
        if opened is not None and opened.uses < USES and opened.is_same_log(self.settings):
            opened.table.update_incremental()
        else:
            opened = Opened(self._open_or_create())
        opened.uses += 1
        opened.mark(self.settings)
        return opened

    def _looked_again(self, opened: "Opened") -> "Opened":
        """The table with our commit in it."""
        same_id = table_id(opened.table)
        if opened.is_same_log(self.settings):
            opened.table.update_incremental()
        else:
            opened = Opened(open_table(self.settings))
        if table_id(opened.table) != same_id:
            raise TableReplacedError(f"the table {self.settings.uri} was replaced during a commit; try again")
        if transaction_version(opened.table, self._writer_id) < self._number:
            raise TableError(f"the table {self.settings.uri} doesn't show a commit; try again")
        opened.mark(self.settings)
        return opened

    def _open_or_create(self) -> DeltaTable:
        try:
            table = open_table(self.settings)
        except TableNotFoundError:
            table = self._create()
        check_annotations(self.settings, table)
        return table

    def _create(self) -> DeltaTable:
        path = self.settings.local_path if self.settings.is_local else None
        if path is not None:
            make_data_dir_of(path)
        try:
            with table_errors(self.settings, "create"):
                table = DeltaTable.create(
                    self.settings.uri,
                    ANNOTATION_SCHEMA,
                    configuration=CONFIGURATION,
                    storage_options=dict(self.settings.storage_options),
                )
        except TableError as error:
            # Another process may have been faster, and what it leaves us with has many names.
            try:
                return open_table(self.settings)
            except TableError:
                raise error from None
        if path is not None:
            sync_dir(path.parent)
        return table

    def _append(self, table: DeltaTable, attempt: "Attempt") -> None:
        properties = CommitProperties(
            app_transactions=[Transaction(self._writer_id, self._number)], max_commit_retries=MAX_RETRIES
        )
        if not self.settings.is_local:
            # With its own writer: see parquet.py on what pyarrow's would cost the process there.
            write_deltalake(
                table,
                attempt.rows,
                mode="append",
                writer_properties=WriterProperties(compression="ZSTD", compression_level=1),
                commit_properties=properties,
                post_commithook_properties=NO_HOOKS,
            )
            return
        table.create_write_transaction(
            [self._written(attempt)],
            "append",
            table.schema(),
            commit_properties=properties,
            post_commithook_properties=NO_HOOKS,
        )

    def _written(self, attempt: "Attempt") -> AddAction:
        """The data file of an attempt, which is on disk before any commit names it."""
        if attempt.action is None:
            action = write_data_file(self.settings, attempt.rows, data_change=True)
            self._on_step(Step.DATA_WRITTEN)
            sync_data_files(self.settings.local_path, [action])
            self._on_step(Step.DATA_SYNCED)
            attempt.action = action
        return attempt.action

    def _sync_log(self, version: int) -> None:
        root = self.settings.local_path
        for one in range(self._synced + 1, version + 1):
            with contextlib.suppress(FileNotFoundError):  # cleaned up, and in a checkpoint
                sync_file(log_file(root, one))
        sync_dir(log_file(root, version).parent)
        self._synced = version


class Opened:
    """A table object of ours alone, and what its log looked like."""

    def __init__(self, table: DeltaTable) -> None:
        self.table = table
        self.uses = 0
        self._log: object = None

    def mark(self, settings: StorageSettings) -> None:
        self._log = log_mark(settings, self.table.version())

    def is_same_log(self, settings: StorageSettings) -> bool:
        """Whether the table at that place is still this one; on an object store nothing tells."""
        return self._log is not None and self._log == log_mark(settings, self.table.version())


def log_mark(settings: StorageSettings, version: int) -> object:
    if not settings.is_local:
        return None
    try:
        found = log_file(settings.local_path, version).stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


class Attempt:
    """Rows to be committed, and on a local disk their data file once it is written."""

    def __init__(self, rows: pa.Table) -> None:
        self.rows = rows
        self.action: AddAction | None = None


def check_annotations(settings: StorageSettings, table: DeltaTable) -> None:
    """Check that a table is one of annotations.

    Raises:
        TableSchemaError: it isn't.
    """
    wanted = delta_types(ANNOTATION_SCHEMA)
    have = {field.name: plain_type(field) for field in table.schema().fields}
    wrong = [name for name, kind in wanted.items() if have.get(name) != kind]
    if wrong or table.metadata().partition_columns:
        raise TableSchemaError(
            f"cannot use the table {settings.uri} for annotations: its columns are not those of annotations "
            f"({', '.join(wrong) or 'it is partitioned'}); move it, or give the payload table another place"
        )
