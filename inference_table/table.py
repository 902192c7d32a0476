"""The read side of the inference table."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import duckdb
import pyarrow as pa
from deltalake.exceptions import DeltaError

from inference_table.annotations import AnnotationLog
from inference_table.errors import QueryError, TableError
from inference_table.pending import View, open_view
from inference_table.result import QueryResult
from inference_table.scan import NewestSnapshot, one_line, quoted
from inference_table.settings import StorageSettings
from inference_table.views import FEEDBACK, FEEDBACK_SQL, VIEWS, named_views

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl
    from mlflow.entities import Trace

    from inference_table.golden import GoldenSet

__all__ = ["InferenceRow", "InferenceTable"]

TABLE_NAME: Final = "payload"
"""What queries call the table: the suffix of Databricks' inference tables."""
PENDING: Final = "pending_rows"
ANNOTATIONS: Final = "annotation_rows"
VIEW_SCHEMA: Final = "tracelake"
"""Behind DuckDB's own schemas, so that what a query creates goes before a view of the same name."""
TRACE_PREFIX: Final = "tr-"

DUCKDB_CONFIG: Final[dict[str, str | bool | int | float | list[str]]] = {
    # Nothing is downloaded behind a query's back. JSON, Parquet and time zones are built in.
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    # A name in a query is a table, never a variable of ours.
    "python_enable_replacements": False,
    # Payloads are megabytes: 2 GiB of text in one column is a result that people ask for.
    "arrow_large_buffer_size": True,
}


class InferenceRow(dict[str, Any]):
    """One row by column name, with its traces."""

    def trace(self) -> "Trace | None":
        """The MLflow trace of the request; None where the row has none.

        Raises:
            TableError: it was changed so that MLflow doesn't take it.
        """
        return to_trace(self._output().get("trace"))

    def other_traces(self) -> "list[Trace]":
        """Further root traces of the same request, in the order they started."""
        traces = (to_trace(trace) for trace in self._output().get("other_traces") or [])
        return [trace for trace in traces if trace is not None]

    def _repr_html_(self) -> str:
        """The request and the trees of its traces, for notebooks."""
        from inference_table.notebook import row_html

        return row_html(self)

    def _repr_pretty_(self, printer: Any, _: bool) -> None:
        # IPython's text, of which a notebook would keep the whole dictionary beside the HTML.
        from inference_table.notebook import row_text

        printer.text(row_text(self))

    def _output(self) -> dict[str, Any]:
        try:
            # Not orjson: it refuses lone surrogates, and rounds integers beyond 64 bits.
            output = json.loads(self.get("response") or "null")["databricks_output"]
        except (ValueError, TypeError, KeyError):
            return {}
        return output if isinstance(output, dict) else {}


def to_trace(value: Any) -> "Trace | None":
    from mlflow.entities import Trace
    from mlflow.exceptions import MlflowException

    if not isinstance(value, dict) or "info" not in value:
        return None
    try:
        # A trace beyond the payload limit is recorded without its spans.
        return Trace.from_dict({"data": {"spans": []}, **value})
    except (MlflowException, AttributeError, KeyError, TypeError, ValueError) as error:
        raise TableError(
            f"cannot read a trace: MLflow does not take it ({type(error).__name__}: {one_line(error)}); "
            "look at it with json_extract(response, '$.databricks_output.trace')"
        ) from error


class InferenceTable:
    """An inference table to read: SQL, rows, MLflow traces, data frames.

    Every call sees the newest committed version. With ``pending=True`` it also sees what this machine has
    spooled and not yet committed. Calls may come from many threads. Each has a DuckDB of its own (40 ms to
    start): what its SQL makes or sets is gone with it. Each may also take what DuckDB takes by default: 80 %
    of the memory, all processors.

    Args:
        uri: the Delta table: a path, or ``s3://``, ``az://``, ``gs://``. Default: ``INFERENCE_TABLE_URI``,
            else ``./tracelake-data/payload``.
        storage_options: options of the object store, as delta-rs takes them.
        spool_dir: where this machine spools, for ``pending=True``. Default: ``INFERENCE_TABLE_SPOOL_DIR``,
            else ``./tracelake-data/spool``.

    Raises:
        SettingsError: a value is not accepted.
    """

    def __init__(
        self,
        uri: str | Path | None = None,
        *,
        storage_options: Mapping[str, str] | None = None,
        spool_dir: str | Path | None = None,
    ) -> None:
        self._settings = StorageSettings.from_environ(
            uri=uri, storage_options=storage_options, spool_dir=spool_dir
        )
        self._newest = NewestSnapshot(self._settings)
        self._annotations = AnnotationLog(self._settings)

    @property
    def uri(self) -> str:
        """The table, absolute."""
        return self._settings.uri

    @property
    def version(self) -> int:
        """The newest committed version.

        Raises:
            TableNotFoundError: there is no table.
        """
        version = self._view().version
        assert version is not None
        return version

    @property
    def schema(self) -> pa.Schema:
        """Columns and types, those of the user included.

        Raises:
            TableNotFoundError: there is no table.
        """
        return self._view().schema

    def query(
        self,
        sql: str,
        *,
        pending: bool = False,
        parameters: Sequence[Any] | Mapping[str, Any] | None = None,
    ) -> QueryResult:
        """Run DuckDB's SQL over the table, which is called ``payload`` (its own folder's name works too).

        Beside it are views: ``requests`` (a typed row per request, with question and answer as text),
        ``spans`` (a row per span), ``model_usage`` (tokens and cost per model, served entity and day) and
        ``feedback`` (what people and judges said); their columns are in ``docs/sql.md``.

        JSON functions work on ``request`` and ``response``:
        ``select response->>'$.choices[0].message.content' from payload``. A condition on ``request_date``
        leaves whole days unread; a query that doesn't name ``response`` reads none of it.

        Args:
            sql: one or more statements; the result is the last one's.
            pending: also see the rows that this machine has spooled and not yet committed.
            parameters: values for ``?`` or ``$1`` (a sequence) or ``$name`` (a mapping) in ``sql``.

        Raises:
            QueryError: the SQL is not valid, or failed while it ran.
            TableNotFoundError: there is no table.
            TableError: the table can't be reached or read.
        """
        view = self._view(pending)
        return QueryResult(self._run(view, sql, parameters), view.version, view.pending.num_rows)

    def get(self, request_id: str, *, pending: bool = False) -> InferenceRow | None:
        """One row by its ``databricks_request_id`` or its MLflow trace id (``tr-...``); None if absent.

        A request id sorts by time, so a lookup reads a single file; a trace id is looked for in every file's
        pages.
        """
        column = "trace_id" if request_id.startswith(TRACE_PREFIX) else "databricks_request_id"
        try:
            request_id.encode()
        except UnicodeEncodeError:
            # No row has it, and no engine takes it.
            return None
        rows = self._view(pending).rows(column, [request_id])
        return InferenceRow(rows[0]) if rows else None

    def newest(
        self, limit: int = 1, *, where: str | None = None, pending: bool = False
    ) -> list[InferenceRow]:
        """Whole rows, newest first.

        Args:
            where: a condition in DuckDB's SQL, such as ``"status_code >= 500"``.

        Raises:
            QueryError: the condition is not valid.
            TableNotFoundError, TableError: as :meth:`query`.
        """
        view = self._view(pending)
        # Two steps, so that a payload is read for the rows that are wanted, and no other.
        sql = (
            f"select databricks_request_id from payload where databricks_request_id is not null"
            f"{where_sql(where, 'and')} order by request_time desc limit ?"
        )
        ids = self._run(view, sql, [limit])["databricks_request_id"].to_pylist()
        rows = {row["databricks_request_id"]: row for row in view.rows("databricks_request_id", ids)}
        return [InferenceRow(rows[id_]) for id_ in ids if id_ in rows]

    def traces(self, limit: int = 100, *, where: str | None = None, pending: bool = False) -> "list[Trace]":
        """MLflow traces, newest first, one per row that has one: what MLflow's own functions take.

        Args:
            where: a condition in DuckDB's SQL, such as ``"trace_state = 'ERROR'"``.

        Raises:
            QueryError: the condition is not valid.
            TableNotFoundError, TableError: as :meth:`query`.
        """
        having = f"trace_id is not null{where_sql(where, 'and')}"
        traces = (row.trace() for row in self.newest(limit, where=having, pending=pending))
        return [trace for trace in traces if trace is not None]

    def golden(
        self,
        where_or_sql: str,
        *,
        limit: int | None = None,
        unique: bool = False,
        pending: bool = False,
        parameters: Sequence[Any] | Mapping[str, Any] | None = None,
    ) -> "GoldenSet":
        """Chosen requests, with what people said of them, as evaluation data: pandas, JSONL, MLflow.

        Arguments and errors are those of :func:`inference_table.golden.golden`.
        """
        from inference_table.golden import golden

        return golden(self, where_or_sql, limit=limit, unique=unique, pending=pending, parameters=parameters)

    def count(self, where: str | None = None, *, pending: bool = False) -> int:
        """Number of rows."""
        counted = self._run(self._view(pending), f"select count(*) as n from payload{where_sql(where)}")
        return int(counted["n"][0].as_py())

    def select(
        self, columns: Sequence[str] | None = None, *, where: str | None = None, pending: bool = False
    ) -> QueryResult:
        """Some columns, or all, of the rows that meet a condition in DuckDB's SQL."""
        names = "*" if columns is None else ", ".join(map(quoted, columns))
        return self.query(f"select {names} from payload{where_sql(where)}", pending=pending)

    def to_arrow(
        self, columns: Sequence[str] | None = None, *, where: str | None = None, pending: bool = False
    ) -> pa.Table:
        """As :meth:`select`, as a pyarrow table."""
        return self.select(columns, where=where, pending=pending).to_arrow()

    def to_pandas(
        self, columns: Sequence[str] | None = None, *, where: str | None = None, pending: bool = False
    ) -> "pd.DataFrame":
        """As :meth:`select`, as a pandas frame (extra ``pandas``)."""
        return self.select(columns, where=where, pending=pending).to_pandas()

    def to_polars(
        self, columns: Sequence[str] | None = None, *, where: str | None = None, pending: bool = False
    ) -> "pl.DataFrame":
        """As :meth:`select`, as a Polars frame (extra ``polars``)."""
        return self.select(columns, where=where, pending=pending).to_polars()

    def __repr__(self) -> str:
        return f"InferenceTable({self.uri!r})"

    def _view(self, pending: bool = False) -> View:
        return open_view(self._settings, pending, self._newest)

    def _run(self, view: View, sql: str, parameters: Any = None) -> pa.Table:
        if not sql.strip():
            raise QueryError("cannot run the query: it is empty")
        with self._attached(view, sql) as connection:
            try:
                relation = connection.sql(sql, params=parameters)
                # Not its truth: that is its length, for which DuckDB runs the query once more.
                return pa.table({}) if relation is None else tidied(relation.to_arrow_table())
            except (duckdb.Error, pa.ArrowException) as error:
                raise QueryError(f"cannot run the query: {one_line(error)}") from error

    @contextmanager
    def _attached(self, view: View, sql: str) -> Iterator[duckdb.DuckDBPyConnection]:
        """A database of its own: ``payload`` is what ``view`` sees, and beside it the views ``sql`` names."""
        with connect() as connection, ExitStack() as stack:
            try:
                snapshot = view.snapshot
                committed = stack.enter_context(snapshot.source(connection)) if snapshot else None
                self._name(connection, view, committed)
                self._add_views(connection, named_views(sql))
            except (duckdb.Error, DeltaError, OSError) as error:
                raise TableError(
                    f"cannot read the table '{self.uri}': {one_line(error)}; try again, and see whether its "
                    "files were vacuumed or damaged"
                ) from error
            yield connection

    def _name(self, connection: duckdb.DuckDBPyConnection, view: View, committed: str | None) -> None:
        connection.register(PENDING, view.pending)
        sources = [committed] if committed else []
        if view.pending.num_rows or not sources:
            sources.append(f"select * from {PENDING}")
        connection.execute(f"create temp view {TABLE_NAME} as {' union all by name '.join(sources)}")
        folder = self.uri.rpartition("/")[2]
        if folder.lower() not in ("", TABLE_NAME, PENDING, ANNOTATIONS, *VIEWS, FEEDBACK):
            connection.execute(f"create temp view {quoted(folder)} as select * from {TABLE_NAME}")

    def _add_views(self, connection: duckdb.DuckDBPyConnection, names: Sequence[str]) -> None:
        if not names:
            return
        statements = [f"create view {VIEW_SCHEMA}.{name} as {VIEWS[name]}" for name in names if name in VIEWS]
        if FEEDBACK in names:
            connection.register(ANNOTATIONS, self._annotations.read(kind="assessment"))
            statements.append(f"create view {VIEW_SCHEMA}.{FEEDBACK} as {FEEDBACK_SQL.format(ANNOTATIONS)}")
        connection.execute(
            f"create schema {VIEW_SCHEMA}; {'; '.join(statements)}; set search_path = 'main,{VIEW_SCHEMA}'"
        )


def connect() -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect(config=DUCKDB_CONFIG)
    connection.execute("set global TimeZone = 'UTC'")
    # A footer is read when a view is made, when it is bound, and when it runs. Data files never change.
    connection.execute("set global parquet_metadata_cache = true")
    return connection


def where_sql(condition: str | None, word: str = "where") -> str:
    # The line break ends a comment in the condition before it swallows the bracket.
    return "" if condition is None else f" {word} ({condition}\n)"


def tidied(table: pa.Table) -> pa.Table:
    """A result of DuckDB as people compute with it."""
    return with_integers(table.rename_columns(distinct(table.column_names)))


def distinct(names: Sequence[str]) -> list[str]:
    """Names of columns with a number after each that was there before: ``a``, ``a_1``."""
    given, found = set(names), dict[str, None]()
    repeats: dict[str, Iterator[int]] = {}
    for name in names:
        unique = name
        while unique in found or (unique != name and unique in given):
            unique = f"{name}_{next(repeats.setdefault(name, count(1)))}"
        found[unique] = None
    return list(found)


def with_integers(table: pa.Table) -> pa.Table:
    """DuckDB's 128-bit sums of integers as 64-bit ones where they fit, which is what people compute with."""
    for index, field in enumerate(table.schema):
        if pa.types.is_decimal128(field.type) and field.type.precision == 38 and field.type.scale == 0:
            try:
                column = table.column(index).cast(pa.int64())
            except pa.ArrowInvalid:
                continue
            table = table.set_column(index, field.with_type(pa.int64()), column)
    return table
