"""One version of the table as DuckDB and DataFusion see it.

DuckDB reads the data files that the Delta log names with its own Parquet reader: only the columns a query
needs, skipping row groups and, for limits, whole payloads. delta-rs' own engine looks rows up by id: it
prunes files, pages and rows by their statistics, which is several times faster where an id is known.

A file of another age may lack columns or hold a narrower type; the schema of the Delta log decides, and what
a file lacks is null. Partition values are read from folder names, which DuckDB prunes before it opens a file.
"""

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

import duckdb
import pyarrow as pa
from deltalake import DeltaTable, QueryBuilder
from deltalake.exceptions import DeltaError
from deltalake.exceptions import TableNotFoundError as DeltaTableNotFoundError

from inference_table.errors import TableError, TableNotFoundError, TableSchemaError
from inference_table.settings import StorageSettings

__all__ = ["NewestSnapshot", "Snapshot", "literal", "one_line", "open_snapshot", "quoted"]

STORE: Final = "tracelake://"
"""Scheme of the paths that DuckDB hands back to us."""
GLOB: Final = re.compile(r"[*?\[]")
"""What DuckDB takes for a pattern in a path."""
NULL_FOLDER: Final = "__HIVE_DEFAULT_PARTITION__"
MAX_MESSAGE: Final = 400
"""Characters of an engine's message: some quote the payload they failed on."""
LAST_REQUEST: Final = "max.request_time"
"""In the log's statistics of a file."""
SETTLED_NS: Final = 50_000_000
"""Age of a log from which on its files' times tell it from another one written at the same place."""
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def quoted(name: str) -> str:
    """An SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """An SQL string."""
    return "'" + text.replace("'", "''") + "'"


def one_line(error: BaseException) -> str:
    """The message of an engine without its drawing of where in the query it was."""
    message = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split("\n\nLINE ")[0].split("\n\nStack Trace")[0]
    line = " ".join(message.split())
    return line if len(line) <= MAX_MESSAGE else line[:MAX_MESSAGE] + "…"


def open_snapshot(settings: StorageSettings) -> "Snapshot":
    """The newest version of the table.

    Raises:
        TableNotFoundError: there is none.
        TableError: it can't be reached, or has features that we don't read.
    """
    uri = settings.uri
    try:
        table = DeltaTable(uri, storage_options=dict(settings.storage_options))
    except DeltaTableNotFoundError:
        raise TableNotFoundError(
            f"cannot read the table '{uri}': there is no Delta table; give another path or URI, or set "
            "INFERENCE_TABLE_URI (it is created when the first server that writes to it starts)"
        ) from None
    except (DeltaError, OSError, ValueError) as error:
        raise TableError(
            f"cannot open the table '{uri}': {one_line(error)}; check its address, options and credentials"
        ) from error
    check_readable(table, uri)
    return Snapshot(table, settings)


def check_readable(table: DeltaTable, uri: str) -> None:
    """Refuse what would give wrong rows: DuckDB reads the files as they are."""
    if table.metadata().configuration.get("delta.columnMapping.mode", "none") != "none":
        raise TableSchemaError(f"cannot read the table '{uri}': it uses column mapping; rewrite it without")
    if has_deletion_vectors(table):
        raise TableSchemaError(
            f"cannot read the table '{uri}': it has files with deletion vectors; "
            "run REORG TABLE ... APPLY (PURGE) on it, and set delta.enableDeletionVectors=false"
        )


def has_deletion_vectors(table: DeltaTable) -> bool:
    if "deletionVectors" not in (table.protocol().reader_features or []):
        return False
    try:
        return bool(pa.table(table.deletion_vectors()).num_rows)
    except DeltaError:
        # One that delta-rs can't read is one all the same.
        return True


@dataclass(frozen=True)
class Snapshot:
    """One version of the table; never changes."""

    table: DeltaTable
    settings: StorageSettings

    @property
    def version(self) -> int:
        return self.table.version()

    @cached_property
    def schema(self) -> pa.Schema:
        return pa.schema(self.table.schema().to_arrow())

    def committed(self, spool_id: str) -> int:
        """The last segment of a spool that is in this version; 0 if none is."""
        return self.table.transaction_version(spool_id) or 0

    def rows(self, column: str, values: Sequence[str]) -> pa.Table:
        """All columns of the rows that have one of ``values``, in no order."""
        if not values:
            return self.schema.empty_table()
        name = quoted(column)
        sql = (
            f"select * from t where {name} in ({', '.join(map(literal, values))})"
            # A long list prunes nothing by itself. Ids sort by time, so their range does.
            f" and {name} between {literal(min(values))} and {literal(max(values))}"
        )
        try:
            return pa.table(QueryBuilder().register("t", self.table).execute(sql))
        except (DeltaError, OSError, ValueError, pa.ArrowException) as error:
            raise TableError(
                f"cannot read the table '{self.settings.uri}': {one_line(error)}; try again"
            ) from error

    @property
    def in_place(self) -> bool:
        """Whether DuckDB can open the files itself."""
        return self.settings.is_local and not GLOB.search(self.settings.uri)

    @contextmanager
    def source(self, connection: duckdb.DuckDBPyConnection) -> Iterator[str]:
        """A query over all rows of this version, valid on the connection within the context."""
        empty = connection.from_arrow(self.schema.empty_table())
        types = dict(zip(empty.columns, map(str, empty.types), strict=True))
        if self.in_place:
            yield files_sql(self._newest_first(self._local_files()), types, self._partitions)
            return
        files = store_files(self)
        connection.register_filesystem(files)
        try:
            paths = [STORE + path for path in self._newest_first(files.sizes)]
            yield files_sql(paths, types, self._partitions)
        finally:
            # The connection and its file system hold each other: without this they outlive the interpreter.
            connection.unregister_filesystem(STORE.removesuffix("://"))

    def _local_files(self) -> list[str]:
        # delta-rs percent-encodes the table's folder, and leaves what is below it as it is on disk.
        root = self.table.table_uri.removeprefix("file://")
        folder = unquote(root)
        return [
            folder + uri.removeprefix(root) if uri.startswith(root) else uri for uri in self.table.file_uris()
        ]

    def _newest_first(self, paths: Iterable[str]) -> list[str]:
        """Data files by the time of their last request: a limit on the newest leaves the others unread.

        DuckDB compares the statistics of a file with the rows that it has found in those before.
        """
        actions = pa.table(self.table.get_add_actions(flatten=True))
        if LAST_REQUEST not in actions.column_names:
            return list(paths)
        times = actions[LAST_REQUEST]
        if not pa.types.is_timestamp(times.type):
            return list(paths)
        names = (unquote(path).rpartition("/")[2] for path in actions["path"].to_pylist())
        last = dict(zip(names, times.cast(pa.int64()).to_pylist(), strict=True))
        return sorted(paths, key=lambda path: last.get(path.rpartition("/")[2]) or 0, reverse=True)

    @property
    def _partitions(self) -> list[str]:
        return list(self.table.metadata().partition_columns)


class NewestSnapshot:
    """The newest version of a table, opened again only once it has changed. Calls may come from many threads.

    Opening one replays its log, which takes as long as looking up a row. Two files of a local table's log say
    whether the version at hand is the newest still; a store is asked each time.
    """

    def __init__(self, settings: StorageSettings) -> None:
        self._settings = settings
        self._kept: tuple[Snapshot, object] | None = None

    def open(self) -> Snapshot:
        """The newest version; raises as :func:`open_snapshot`."""
        kept = self._kept
        if kept is not None and self._state(kept[0].version) == kept[1]:
            return kept[0]
        started = time.time_ns()
        snapshot = open_snapshot(self._settings)
        state = self._state(snapshot.version)
        # A log that is younger may have been replaced since it was read.
        settled = state is not None and max(mtime for _, mtime in state) < started - SETTLED_NS
        self._kept = (snapshot, state) if settled else None
        return snapshot

    def _state(self, version: int) -> list[tuple[int, int]] | None:
        """What changes with every change of the log; None where it has a later version, or can't be told."""
        if not self._settings.is_local:
            return None
        log = self._settings.local_path / "_delta_log"
        # Before a commit's file is deleted a checkpoint of a later one is written, so one of the two changes.
        commit, later = stamp(log / f"{version:020d}.json"), stamp(log / f"{version + 1:020d}.json")
        checkpoint = stamp(log / "_last_checkpoint")
        return None if commit is None or later is not None else [commit, checkpoint or (0, 0)]


def stamp(path: Path) -> tuple[int, int] | None:
    """What tells a file from another of the same name: its number and time; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def files_sql(paths: Iterable[str], types: Mapping[str, str], partitions: Sequence[str]) -> str:
    """A query over Parquet files that has all columns of ``types``, in that order."""
    paths = list(paths)
    if not paths:
        nulls = ", ".join(f"cast(null as {kind}) as {quoted(name)}" for name, kind in types.items())
        return f"select {nulls} where false"
    for name in partitions:
        if strange := next((path for path in paths if f"{name}=" not in path), None):
            raise TableSchemaError(f"cannot read the file '{strange}': it is in no folder named {name}=...")
    columns = [
        f"{partition_sql(name, kind) if name in partitions else column_sql(name, kind)} as {quoted(name)}"
        for name, kind in types.items()
    ]
    fields = [
        f'{literal(name)}: {{name: {literal(name)}, "type": {literal(kind)}, default_value: NULL}}'
        for name, kind in types.items()
        if name not in partitions
    ]
    return (
        f"select {', '.join(columns)} from read_parquet([{', '.join(map(literal, paths))}], "
        f"schema = MAP {{{', '.join(fields)}}}, filename = true)"
    )


def column_sql(name: str, kind: str) -> str:
    column = quoted(name)
    # DuckDB 2.0 reads a field of a struct straight from the file, and fails where a file lacks the struct.
    # Behind an expression it reads the struct.
    return f"coalesce({column}, {column})" if kind.startswith("STRUCT") else column


def partition_sql(name: str, kind: str) -> str:
    """A partition value from a path. DuckDB computes it once per file, before it opens any."""
    folder = f"regexp_extract(filename, {literal('.*' + re.escape(name) + '=([^/]*)/')}, 1)"
    return f"cast(nullif(url_decode({folder}), {literal(NULL_FOLDER)}) as {kind})"


def store_files(snapshot: Snapshot) -> Any:
    """The table's files through delta-rs' object store, as a file system that DuckDB takes.

    So every store, option and credential that reaches the table reaches its files. DuckDB over a pyarrow
    file system in Python is no alternative: the two deadlock over the interpreter's lock.
    """
    from deltalake.fs import DeltaStorageHandler

    actions = pa.table(snapshot.table.get_add_actions())
    # The log has them percent-encoded.
    paths = map(unquote, actions["path"].to_pylist())
    sizes = dict(zip(paths, actions["size_bytes"].to_pylist(), strict=True))
    options = dict(snapshot.settings.storage_options)
    handler = DeltaStorageHandler(snapshot.settings.uri, options, sizes)
    return store_class()(handler, sizes)


def store_class() -> type[Any]:
    # Here, because a table on a local disk does without fsspec.
    from fsspec import AbstractFileSystem  # type: ignore[import-untyped]  # it has no stubs

    class StoreFiles(AbstractFileSystem):  # type: ignore[misc]  # for the same reason
        """Just what DuckDB calls."""

        protocol = STORE.removesuffix("://")
        cachable = False

        def __init__(self, handler: Any, sizes: Mapping[str, int]) -> None:
            super().__init__()
            self.handler = handler
            self.sizes = sizes

        def open(self, path: str, *_: Any, **__: Any) -> Any:
            return self.handler.open_input_file(path.removeprefix(STORE))

        def glob(self, path: str, **_: Any) -> list[str]:
            return [path]

        def info(self, path: str, **_: Any) -> dict[str, Any]:
            return {"name": path, "size": self.sizes[path.removeprefix(STORE)], "type": "file"}

        def modified(self, _path: str) -> datetime:
            return EPOCH

    return StoreFiles
