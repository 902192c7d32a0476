"""The traces of an inference table as MLflow's store gives them out.

A list never reads ``response``: it takes the newest files first, as their statistics say, and stops as soon
as no other file can hold a row that comes before those it has.

A trace is said to begin when its request came in, some ms before it says so itself. That column is the one by
which files and parts of files are skipped, and a list shows what it is ordered and filtered by.

Rows appear once they are committed, a second or so after the reply. One that is asked for by its id is also
looked for among those that this machine has yet to commit, so that feedback is never too early.
"""

# mypy: disable-error-code="no-untyped-call"
# MLflow is typed in part only.

import json
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import duckdb
import pyarrow as pa
from deltalake import QueryBuilder
from deltalake.exceptions import DeltaError
from mlflow.entities import Trace, TraceData, TraceInfo
from mlflow.entities.trace_location import TraceLocation
from mlflow.entities.trace_state import TraceState
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST
from mlflow.tracing.constant import SpansLocation, TraceTagKey

from inference_table.annotations import AnnotationLog
from inference_table.errors import TableNotFoundError, TracelakeError
from inference_table.mlflow_files import TraceFile, microseconds, table_files, trace_files, windows
from inference_table.mlflow_notes import Notes, as_assessment, gather, merged, notes_table
from inference_table.mlflow_search import Filter, Order, page_start, page_token
from inference_table.pending import open_view
from inference_table.scan import Snapshot, literal, one_line, open_snapshot
from inference_table.settings import StorageSettings
from inference_table.table import InferenceRow, connect

__all__ = ["TraceRows", "internal_errors"]

MEMORY_LIMIT: Final = "1GiB"
"""Of DuckDB; what is larger goes to the folder for temporary files."""
KNOWN_IDS: Final = 20_000
"""Traces whose request is remembered: a request's id leads to its file, a trace's to all of them."""
SMALL: Final = "databricks_request_id, request_time, trace_id, trace_state, trace_info"
TRACES: Final = """
select rows.*, map_concat(of_trace.tags, of_request.tags) as set_tags,
    list_concat(of_trace.runs, of_request.runs) as run_ids,
    list_concat(
        list_filter(json_extract(trace_info, '$.assessments[*]'), lambda one: not coalesce(list_contains(
            list_concat(of_trace.replaced, of_request.replaced), one->>'/assessment_id'), false)),
        cast(list_concat(of_trace.added, of_request.added) as json[])
    ) as assessments
from rows
left join notes as of_request on of_request.subject = databricks_request_id
left join notes as of_trace on of_trace.subject = trace_id
"""
SET_ASSESSMENTS: Final = "select unnest(cast(added as json[])) as assessment from notes"
ANNOTATED: Final = ("set_tags", "run_ids", "assessments")
"""What only this join knows."""


@contextmanager
def internal_errors() -> Iterator[None]:
    """Errors of ours as MLflow's, which its server hands to its clients."""
    try:
        yield
    except TableNotFoundError as error:
        # Not one that clients take for a passing trouble, and ask again for minutes.
        raise MlflowException(one_line(error), RESOURCE_DOES_NOT_EXIST) from error
    except (TracelakeError, duckdb.Error, DeltaError) as error:
        raise MlflowException(one_line(error)) from error


class TraceRows:
    """The traces of one table. Calls may come from many threads.

    Args:
        settings: of the table.
        experiment_id: the MLflow experiment that its traces are in.
    """

    def __init__(self, settings: StorageSettings, experiment_id: str) -> None:
        self.settings = settings
        self.experiment_id = experiment_id
        self.annotations = AnnotationLog(settings)
        self._database: duckdb.DuckDBPyConnection | None = None
        self._lock = threading.Lock()
        self._request_ids: OrderedDict[str, str] = OrderedDict()
        self._notes: tuple[pa.Table, pa.Table] | None = None

    def search(
        self, wanted: Filter, order: Order, limit: int, token: str | None
    ) -> tuple[list[TraceInfo], str | None]:
        """A page of traces, and the token of the next one if there is one."""
        start = page_start(token, order)
        with internal_errors():
            snapshot = open_snapshot(self.settings)
            found = self._first(snapshot, wanted, order, limit + 1, start)
            page = found[:limit]
            keys = [[row[f"k{number}"] for number in range(len(order.keys))] for row in page]
            more = page_token(keys[-1]) if len(found) > limit else None
            return self._infos([row["databricks_request_id"] for row in page], snapshot), more

    def info(self, trace_id: str) -> TraceInfo | None:
        return next(iter(self.infos([trace_id])), None)

    def infos(self, trace_ids: Sequence[str]) -> list[TraceInfo]:
        """The traces of these that are in the table, in the order asked for."""
        with internal_errors():
            rows = self._rows(list(trace_ids), SMALL)
            return self._annotated(list(rows.values()))

    def traces(self, trace_ids: Sequence[str]) -> list[Trace]:
        """The same with their spans. A trace of which there are no spans is without them."""
        with internal_errors():
            rows = self._rows(list(trace_ids), f"{SMALL}, response")
            infos = self._annotated(list(rows.values()))
            return [Trace(info, spans_of(row)) for info, row in zip(infos, rows.values(), strict=True)]

    def request_id(self, trace_id: str) -> str | None:
        """The request whose trace this is; None where the table has no such trace."""
        with internal_errors():
            found = self._rows([trace_id], SMALL).get(trace_id)
            return found["databricks_request_id"] if found else None

    def recorded(self, trace_id: str) -> dict[str, Any]:
        """The info of a trace as it was recorded, before anything was said of it."""
        with internal_errors():
            found = self._rows([trace_id], SMALL).get(trace_id)
            return recorded_info(found) if found else {}

    @contextmanager
    def relation(
        self, snapshot: Snapshot, files: Sequence[TraceFile], sql: str
    ) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection on which ``traces`` is the traces in these files, as far as ``sql`` needs them."""
        with self._cursor() as cursor, table_files(snapshot, cursor, files) as source:
            cursor.execute(f"create temp view rows as {source}")
            body = "select * from rows"
            if any(name in sql for name in ANNOTATED):
                cursor.register("notes", self._all_notes())
                cursor.execute(f"create temp view set_assessments as {SET_ASSESSMENTS}")
                body = TRACES
            cursor.execute(f"create temp view traces as select * from ({body}) where trace_id is not null")
            yield cursor

    def _all_notes(self) -> pa.Table:
        rows = self.annotations.read()
        held = self._notes
        if held is None or held[0] is not rows:
            held = self._notes = rows, notes_table(gather(rows))
        return held[1]

    @contextmanager
    def _cursor(self) -> Iterator[duckdb.DuckDBPyConnection]:
        if self.settings.is_local:
            with self._lock:
                if self._database is None:
                    self._database = bounded(connect())
                cursor = self._database.cursor()
            with cursor:
                yield cursor
        else:
            # A file system belongs to a database, and ours to a version of the table.
            with bounded(connect()) as connection:
                yield connection

    def _first(
        self, snapshot: Snapshot, wanted: Filter, order: Order, limit: int, start: list[Any] | None
    ) -> list[dict[str, Any]]:
        """The order keys and ids of the first rows."""
        files = [one for one in trace_files(snapshot) if one.high >= wanted.low and one.low < wanted.high]
        conditions = f"({wanted.sql})" + ("" if start is None else f" and ({order.after(start)})")
        sql = (
            f"select {order.columns}, databricks_request_id, trace_id from traces where {conditions} "
            f"order by {order.sql} limit {limit}"
        )
        found: list[dict[str, Any]] = []
        for window, rest in windows(files, order.by_time, start, limit):
            with self.relation(snapshot, window, sql) as connection:
                found = first_of(found + connection.sql(sql).to_arrow_table().to_pylist(), order, limit)
            if len(found) == limit and not any(may_precede(one, found[-1]["k0"], order) for one in rest):
                break
        for row in found:
            self._remember(row["trace_id"], row["databricks_request_id"])
        return found

    def _infos(self, request_ids: list[str], snapshot: Snapshot) -> list[TraceInfo]:
        rows = select(snapshot, SMALL, "databricks_request_id", request_ids)
        by_id = {row["databricks_request_id"]: row for row in rows}
        return self._annotated([by_id[one] for one in request_ids])

    def _rows(self, trace_ids: list[str], columns: str) -> dict[str, dict[str, Any]]:
        """Rows by trace id, in the order asked for; also those that this machine has yet to commit."""
        snapshot = open_snapshot(self.settings)
        known = [self._request_ids[one] for one in trace_ids if one in self._request_ids]
        others = [one for one in trace_ids if one not in self._request_ids]
        rows = select(snapshot, columns, "databricks_request_id", known)
        rows += select(snapshot, columns, "trace_id", others)
        found = {row["trace_id"]: row for row in rows}
        if missing := [one for one in trace_ids if one not in found]:
            pending = open_view(self.settings, pending=True)
            found |= {row["trace_id"]: row for row in pending.rows("trace_id", missing)}
        for row in found.values():
            self._remember(row["trace_id"], row["databricks_request_id"])
        return {one: found[one] for one in dict.fromkeys(trace_ids) if one in found}

    def _remember(self, trace_id: str, request_id: str) -> None:
        with self._lock:
            self._request_ids[trace_id] = request_id
            while len(self._request_ids) > KNOWN_IDS:
                self._request_ids.popitem(last=False)

    def _annotated(self, rows: list[dict[str, Any]]) -> list[TraceInfo]:
        if not rows:
            return []
        found = gather(
            self.annotations.read(
                trace_ids=[row["trace_id"] for row in rows],
                request_ids=[row["databricks_request_id"] for row in rows],
            )
        )
        return [self._to_info(row, found) for row in rows]

    def _to_info(self, row: Mapping[str, Any], found: Mapping[str, Notes]) -> TraceInfo:
        document = recorded_info(row)
        notes = Notes()
        for subject in (row["trace_id"], row["databricks_request_id"]):
            if subject in found:
                notes.update(found[subject])
        tags = {**(document.get("tags") or {}), **notes.tags}
        tags[TraceTagKey.SPANS_LOCATION] = SpansLocation.TRACKING_STORE.value
        assessments = merged(document.get("assessments") or [], notes, row["trace_id"])
        return TraceInfo(
            trace_id=row["trace_id"],
            trace_location=TraceLocation.from_experiment_id(self.experiment_id),
            request_time=microseconds(row["request_time"]) // 1000,
            state=TraceState(row["trace_state"] or TraceState.STATE_UNSPECIFIED),
            request_preview=document.get("request_preview"),
            response_preview=document.get("response_preview"),
            client_request_id=row["databricks_request_id"],
            execution_duration=document.get("execution_duration_ms"),
            trace_metadata=document.get("trace_metadata") or {},
            tags={key: value for key, value in tags.items() if value is not None},
            assessments=[as_assessment(one) for one in assessments],
        )


def recorded_info(row: Mapping[str, Any]) -> dict[str, Any]:
    """The info of a trace as it was recorded; empty where someone has made no JSON of it."""
    try:
        found = json.loads(row["trace_info"] or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def bounded(connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyConnection:
    connection.execute(f"set global memory_limit = '{MEMORY_LIMIT}'")
    connection.execute(f"set global temp_directory = {literal(tempfile.gettempdir() + '/tracelake-duckdb')}")
    return connection


def spans_of(row: Mapping[str, Any]) -> TraceData:
    trace = InferenceRow(row).trace()
    return TraceData([]) if trace is None else trace.data


def select(snapshot: Snapshot, columns: str, key: str, values: Sequence[str]) -> list[dict[str, Any]]:
    """Some columns of the rows with one of these ids, by the engine that finds ids fastest."""
    values = [value for value in values if value.isascii()]
    if not values:
        return []
    sql = (
        f"select {columns} from t where {key} in ({', '.join(map(literal, values))}) "
        f"and {key} between {literal(min(values))} and {literal(max(values))}"
    )
    rows: list[dict[str, Any]] = pa.table(
        QueryBuilder().register("t", snapshot.table).execute(sql)
    ).to_pylist()
    return rows


def may_precede(file: TraceFile, last: int, order: Order) -> bool:
    return microseconds(file.low) <= last if order.by_time else microseconds(file.high) >= last


def first_of(rows: list[dict[str, Any]], order: Order, limit: int) -> list[dict[str, Any]]:
    """The first so many rows; nulls last."""
    for number, (_, ascending) in reversed(list(enumerate(order.keys))):
        key = f"k{number}"
        if ascending:
            rows.sort(key=lambda row, key=key: (row[key] is None, row[key]))  # type: ignore[misc]
        else:
            rows.sort(key=lambda row, key=key: (row[key] is not None, row[key]), reverse=True)  # type: ignore[misc]
    return rows[:limit]
