"""The Delta table itself: open, create, check that we may write to it, add columns, and make it durable."""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
from deltalake import DeltaTable, Field, Schema
from deltalake import PostCommitHookProperties as Hooks
from deltalake.exceptions import TableNotFoundError as DeltaNotFoundError
from deltalake.fs import DeltaStorageHandler
from deltalake.transaction import AddAction
from pyarrow.fs import FileSystem, LocalFileSystem, PyFileSystem, SubTreeFileSystem

from inference_table.disk import make_data_dir_of, sync_dir, sync_file
from inference_table.errors import TableError, TableNotFoundError, TableSchemaError, TracelakeError
from inference_table.schema import PARTITION_COLUMN, SCHEMA, SKIPPING_COLUMNS
from inference_table.settings import StorageSettings

__all__ = [
    "NO_HOOKS",
    "check_writable",
    "checkpoint",
    "ensure_columns",
    "log_file",
    "open_or_create_table",
    "open_table",
    "sync_data_files",
    "sync_log",
    "table_files",
    "table_id",
    "transaction_version",
    "union_schema",
]

CONFIGURATION: Final[dict[str, str | None]] = {
    # User text has no place in the log.
    "delta.dataSkippingStatsColumns": ",".join(SKIPPING_COLUMNS),
    # Opening a table replays what came after the last checkpoint.
    "delta.checkpointInterval": "20",
    # One commit a second is 86,400 log files a day, which every open lists, and as many tombstones after
    # compaction, which every checkpoint repeats (1.3 s per 100,000). Data files are kept for longer, see
    # compaction.py.
    "delta.logRetentionDuration": "interval 6 hours",
    "delta.deletedFileRetentionDuration": "interval 6 hours",
}

NO_HOOKS: Final = Hooks(create_checkpoint=False, cleanup_expired_logs=False)
"""Nothing after a commit: a hook that fails makes a good commit look failed, and lists the whole log."""

LOG: Final = "_delta_log"

REQUIRED_COLUMNS: Final = frozenset(
    {"databricks_request_id", PARTITION_COLUMN, "request_time", "status_code"}
)
"""Columns of ours that are never null, so that a table may forbid it."""

WRITER_FEATURES: Final = frozenset(
    {"appendOnly", "changeDataFeed", "checkConstraints", "generatedColumns", "identityColumns", "invariants"}
    | {"columnMapping", "timestampNtz"}
)
"""Writer features that ask nothing of an append unless the schema or configuration uses them."""

FORBIDDEN_METADATA: Final = ("delta.invariants", "delta.generationExpression", "delta.identity.start")
"""Marks of columns whose values the writer must check or compute."""


def open_table(settings: StorageSettings) -> DeltaTable:
    """The newest version of the table.

    Raises:
        TableNotFoundError: there is none.
        TableError: it can't be reached or read.
    """
    try:
        with table_errors(settings, "open"):
            return DeltaTable(settings.uri, storage_options=dict(settings.storage_options))
    except TableError as error:
        if isinstance(error.__cause__, DeltaNotFoundError):
            raise TableNotFoundError(
                f"there is no Delta table at {settings.uri}; check the URI; starting a server creates one"
            ) from error
        raise


def open_or_create_table(settings: StorageSettings) -> DeltaTable:
    """The table, ready to be written to: created if there is none, columns added that it lacks.

    Raises:
        TableSchemaError: a table is there that we may not write to; names the column or feature.
        TableError: it can't be reached or created.
    """
    try:
        table = open_table(settings)
    except TableNotFoundError:
        table = create_table(settings)
    check_writable(settings, table)
    return ensure_columns(settings, table, SCHEMA)


def create_table(settings: StorageSettings) -> DeltaTable:
    if settings.is_local:
        make_data_dir_of(settings.local_path)
    try:
        with table_errors(settings, "create"):
            return DeltaTable.create(
                settings.uri,
                SCHEMA,
                partition_by=[PARTITION_COLUMN],
                configuration=CONFIGURATION,
                storage_options=dict(settings.storage_options),
            )
    except TableError as error:
        # Another process may have been faster, and what it leaves us with has many names.
        try:
            return open_table(settings)
        except TableError:
            raise error from None


def table_files(settings: StorageSettings, table: DeltaTable, sizes: Mapping[str, int]) -> FileSystem:
    """The files of the table by their paths in its log; ``sizes`` in bytes of those to be read.

    Not for a server's process where the table is on an object store: to open a file holds the GIL for a round
    trip.
    """
    if settings.is_local:
        return SubTreeFileSystem(str(settings.local_path), LocalFileSystem())
    handler = DeltaStorageHandler.from_table(table._table, dict(settings.storage_options), dict(sizes))
    return PyFileSystem(handler)


def table_id(table: DeltaTable) -> str:
    """What tells a table from another one at the same place."""
    return str(table.metadata().id)


def transaction_version(table: DeltaTable, spool_id: str) -> int:
    """The last sequence of this spool in the table, 0 if there is none."""
    return table.transaction_version(spool_id) or 0


def check_writable(settings: StorageSettings, table: DeltaTable) -> None:
    """Check that rows of ours can be appended without doing more than that.

    Raises:
        TableSchemaError: they can't.
    """
    for problem in problems(table):
        raise TableSchemaError(
            f"cannot write to the table {settings.uri}: {problem}; change the table, or set "
            "INFERENCE_TABLE_URI to another one"
        )


def problems(table: DeltaTable) -> Iterator[str]:
    metadata, protocol = table.metadata(), table.protocol()
    if metadata.partition_columns != [PARTITION_COLUMN]:
        yield f"it is partitioned by {metadata.partition_columns}, not by {PARTITION_COLUMN}"
    if unknown := sorted(set(protocol.writer_features or []) - WRITER_FEATURES):
        yield f"it needs writer features that we don't know: {', '.join(unknown)}"
    for key, value in metadata.configuration.items():
        if key.startswith("delta.constraints."):
            yield f"it has the constraint {value!r}"
        if key == "delta.columnMapping.mode" and value != "none":
            yield f"its columns are mapped by {value}"
    yield from column_problems(table.schema())


def column_problems(schema: Schema) -> Iterator[str]:
    ours = delta_types(SCHEMA)
    for field in schema.fields:
        have, want = plain_type(field), ours.get(field.name)
        if want is not None and have != want:
            yield f"the column {field.name} is {have}, not {want}"
        if not field.nullable and field.name not in REQUIRED_COLUMNS:
            yield f"the column {field.name} must not be null, and we don't always know it"
        if marks := [mark for mark in FORBIDDEN_METADATA if mark in field.metadata]:
            yield f"the column {field.name} has {marks[0]}"


def delta_types(schema: pa.Schema) -> dict[str, str]:
    return {field.name: plain_type(field) for field in Schema.from_arrow(schema).fields}


def plain_type(field: Field) -> str:
    """The type of a column as text, whether or not its elements may be null."""

    def plain(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        return {key: plain(value) for key, value in node.items() if not key.endswith("ontainsNull")}

    kind = plain(json.loads(field.to_json())["type"])
    return kind if isinstance(kind, str) else json.dumps(kind)


def ensure_columns(settings: StorageSettings, table: DeltaTable, schema: pa.Schema) -> DeltaTable:
    """Add the columns of ``schema`` that the table lacks; returns the table as it is then.

    Raises:
        TableError: they can't be added.
    """
    missing = missing_fields(table, schema)
    if not missing:
        return table
    try:
        with table_errors(settings, "add columns to"):
            table.alter.add_columns(missing, post_commithook_properties=NO_HOOKS)
    except TableError:
        # Another process may have added them: the same look again decides.
        if missing_fields(open_table(settings), schema):
            raise
    return open_table(settings)


def missing_fields(table: DeltaTable, schema: pa.Schema) -> list[Field]:
    names = {field.name for field in table.schema().fields}
    return [field for field in Schema.from_arrow(schema).fields if field.name not in names]


@contextlib.contextmanager
def table_errors(settings: StorageSettings, operation: str) -> Iterator[None]:
    """Say of a failure of delta-rs what was tried, and what to look at."""
    try:
        yield
    except TracelakeError:
        raise
    except Exception as error:  # delta-rs raises bare Exception for what comes out of DataFusion
        remedy = "its folder" if settings.is_local else "its address, credentials and the network"
        raise TableError(f"cannot {operation} the table {settings.uri}: {error}; check {remedy}") from error


def union_schema(tables: Iterable[pa.Table]) -> pa.Schema:
    """All columns of these rows, and ours."""
    return pa.unify_schemas([SCHEMA, *(table.schema for table in tables)])


def sync_data_files(root: Path, actions: Iterable[AddAction]) -> None:
    """Put data files, their folders, and the names of these on disk."""
    paths = [root / action.path for action in actions]
    for path in paths:
        sync_file(path)
    for folder in {path.parent for path in paths}:
        sync_dir(folder)
    sync_dir(root)


def sync_log(root: Path, first: int, last: int) -> None:
    """Put the commits from version ``first`` to ``last`` on disk."""
    for version in range(first, last + 1):
        sync_file(log_file(root, version))
    sync_dir(root / LOG)


def log_file(root: Path, version: int) -> Path:
    """The commit of a version of the local table at ``root``."""
    return root / LOG / f"{version:020d}.json"


def checkpoint(settings: StorageSettings, table: DeltaTable, before: int) -> None:
    """Write a checkpoint if one is due between the version ``before`` a commit and the table's."""
    interval = int(table.metadata().configuration.get("delta.checkpointInterval") or 20)
    if table.version() // interval == before // interval:
        return
    table.create_checkpoint()
    if settings.is_local:
        log = settings.local_path / LOG
        sync_file(log / f"{table.version():020d}.checkpoint.parquet")
        with contextlib.suppress(FileNotFoundError):
            sync_file(log / "_last_checkpoint")
        sync_dir(log)
