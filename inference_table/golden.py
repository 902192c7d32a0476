"""Golden sets: recorded requests, with what people said the answer should be, as evaluation data.

A record has MLflow's form, which ``mlflow.genai.evaluate`` and MLflow's datasets take as it is:

=========================  ======================================================================
``inputs``                 the request's JSON object, the keyword arguments of ``predict_fn``;
                           a body of another kind is ``{"request": ...}``
``outputs``                the recorded answer, without ``databricks_output``
``expectations``           by name, the value of each annotation of type ``expectation``
``tags``                   the request's tags
``source``                 where it is from: trace, request, table and its version, the query
``databricks_request_id``  the row
``trace_id``               its trace, or None
``feedback``               the annotations of type ``feedback``: name, value, rationale, source_id
=========================  ======================================================================
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from inference_table.errors import QueryError
from inference_table.result import require
from inference_table.schema import ErrorCode
from inference_table.table import InferenceRow, InferenceTable

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.entities import Trace

__all__ = ["GoldenSet", "golden"]

ID: Final = "databricks_request_id"
QUERY: Final = re.compile(r"(\s|--[^\n]*\n|/\*.*?\*/)*(select|with|from)\b", re.IGNORECASE | re.DOTALL)
"""How a whole query begins; a condition doesn't."""
TRANSPORT_KEYS: Final = frozenset({"client_request_id", "databricks_options", "stream"})
"""Members of a request that say how it is answered, not what is asked."""
OTHER_REQUEST: Final = "request"
OTHER_RESPONSE: Final = "body"
"""Under which the ``response`` column has an answer that is no JSON object."""
UNUSABLE: Final = frozenset(
    {
        ErrorCode.MAX_REQUEST_SIZE_EXCEEDED,
        ErrorCode.MEMORY_LIMIT_EXCEEDED,
        ErrorCode.REDACTION_FAILED,
        ErrorCode.REQUEST_DECODING_FAILED,
        ErrorCode.REQUEST_INCOMPLETE,
    }
)
"""Rows whose ``request`` is not what was sent."""
ROWS_AT_ONCE: Final = 100
"""Whole rows in memory: some have ten megabytes."""
MAX_TAG_CHARS: Final = 5000
"""MLflow's limit of a dataset's tag. Each record has the whole query."""

DATASET_FIELDS: Final = ("inputs", "outputs", "expectations", "tags", "source")
RECORD: Final = (*DATASET_FIELDS, ID, "trace_id", "feedback")

Record = dict[str, Any]


@dataclass(frozen=True)
class GoldenSet:
    """Chosen requests as evaluation data, in the order of the query. Independent of the table but for traces.

    Attributes:
        records: see :mod:`inference_table.golden`.
        query: the SQL that chose them.
        version: of the payload table, when they were chosen.
        annotations_version: of the table of annotations; None where there was none.
        skipped: chosen requests that are no records, and why.
    """

    records: list[Record]
    query: str
    version: int | None
    annotations_version: int | None
    skipped: dict[str, str]
    _table: InferenceTable = field(repr=False)
    _pending: bool = field(repr=False)

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def to_pandas(self) -> "pd.DataFrame":
        """One row per record: what ``mlflow.genai.evaluate(data=...)`` takes (extra ``pandas``)."""
        require("pandas")
        import pandas as pd

        return pd.DataFrame(self.records, columns=list(RECORD), dtype=object)

    def to_jsonl(self, path: str | Path) -> Path:
        """Write one JSON object per line; returns the path. The file is replaced."""
        path = Path(path)
        with path.open("w", encoding="utf-8") as file:
            # In ASCII: a payload may hold half a surrogate pair, which UTF-8 can't say.
            file.writelines(json.dumps(record) + "\n" for record in self.records)
        return path

    def to_mlflow(self, name: str, *, experiment: str | None = None) -> Any:
        """The MLflow dataset of that name, made if there is none, with these records (extra ``mlflow``).

        MLflow knows records by their inputs: equal ones become one record, and one that the dataset has is
        updated.

        Args:
            experiment: name of the experiment that a new dataset belongs to, made if there is none. Default:
                the current one.

        Raises:
            ModuleNotFoundError: the whole of MLflow is not installed.
            MlflowException: MLflow's store refused.
        """
        datasets = mlflow_datasets()
        dataset = find_dataset(name, datasets) or datasets.create_dataset(
            name, experiment_id=experiment_id(experiment), tags=self._provenance()
        )
        dataset.merge_records([{name: one[name] for name in DATASET_FIELDS} for one in self.records])
        return dataset

    def traces(self) -> "list[Trace]":
        """The MLflow traces of the records that have one, with feedback and expectations as assessments.

        Raises:
            TableError: the table can't be read, or a trace was changed so that MLflow doesn't take it.
        """
        wanted = [record[ID] for record in self.records if record["trace_id"]]
        _, said = annotations_of(self._table, wanted, self._pending)
        found = []
        for row in rows_of(self._table, wanted, self._pending):
            if (trace := row.trace()) is not None:
                trace.info.assessments = assessments(row, said.get(row[ID], []))
                found.append(trace)
        return found

    def _provenance(self) -> dict[str, str]:
        values = {
            "tracelake.table": self._table.uri,
            "tracelake.table_version": self.version,
            "tracelake.annotations_version": self.annotations_version,
            "tracelake.query": self.query,
        }
        return {name: str(value)[:MAX_TAG_CHARS] for name, value in values.items() if value is not None}


def golden(
    table: InferenceTable,
    where_or_sql: str,
    *,
    limit: int | None = None,
    unique: bool = False,
    pending: bool = False,
    parameters: Sequence[Any] | Mapping[str, Any] | None = None,
) -> GoldenSet:
    """Chosen rows of a table as evaluation data.

    Args:
        where_or_sql: a condition in DuckDB's SQL, such as ``"status_code = 200"``, for its rows in order of
            time; or a whole query whose result has a column ``databricks_request_id``, such as
            ``"select databricks_request_id from feedback where value = 'true'"``.
        limit: at most so many records.
        unique: of records with equal inputs, keep one: with expectations rather than without, then the
            newest.
        pending: also see the rows that this machine has spooled and not yet committed.
        parameters: values for ``?`` or ``$name`` in the SQL.

    Raises:
        QueryError: the SQL is not valid, or its result has no column ``databricks_request_id``.
        TableNotFoundError: there is no table.
        TableError: a table can't be reached or read.
    """
    sql = where_or_sql
    if QUERY.match(sql) is None:
        sql = f"select {ID} from payload where ({where_or_sql}\n) order by request_time, {ID}"
    chosen = table.query(sql, pending=pending, parameters=parameters)
    if ID not in chosen.columns:
        raise QueryError(
            f"cannot make a golden set: the query's result has the columns {', '.join(chosen.columns)}; "
            f"select {ID}"
        )
    ids = [one for one in dict.fromkeys(chosen.to_arrow()[ID].to_pylist()) if one is not None]
    annotations_version, said = annotations_of(table, ids, pending)
    source = {"table": table.uri, "table_version": chosen.version, "query": sql}
    records, skipped = [], dict.fromkeys(ids, "there is no such row")
    for row in rows_of(table, ids, pending):
        if why := unusable(row):
            skipped[row[ID]] = why
        else:
            del skipped[row[ID]]
            records.append(record_of(row, said.get(row[ID], []), source))
    records = distinct(records) if unique else records
    return GoldenSet(records[:limit], sql, chosen.version, annotations_version, skipped, table, pending)


def rows_of(table: InferenceTable, ids: Sequence[str], pending: bool) -> Iterator[InferenceRow]:
    """Whole rows, in the order of their ids."""
    view = table._view(pending)
    for start in range(0, len(ids), ROWS_AT_ONCE):
        some = list(ids[start : start + ROWS_AT_ONCE])
        rows = {row[ID]: row for row in view.rows(ID, some)}
        yield from (InferenceRow(rows[one]) for one in some if one in rows)


def annotations_of(
    table: InferenceTable, ids: Sequence[str], pending: bool
) -> tuple[int | None, dict[str, list[Record]]]:
    """Version of the table of annotations, and what it says of each request, in order of time."""
    sql = f"select {ID}, trace_id from payload where {ID} in (select unnest($ids)) and trace_id is not null"
    traces = table.query(sql, pending=pending, parameters={"ids": list(ids)}).to_arrow()
    by_trace = dict(zip(traces["trace_id"].to_pylist(), traces[ID].to_pylist(), strict=True))
    version = table._annotations.version
    rows = table._annotations.read(request_ids=ids, trace_ids=by_trace)
    found: dict[str, list[Record]] = {}
    for row in rows.to_pylist():
        found.setdefault(row[ID] or by_trace[row["trace_id"]], []).append(row)
    return version, found


# --- one record ---


def unusable(row: InferenceRow) -> str | None:
    """Why a row can't be asked again."""
    codes = UNUSABLE.intersection(row["logging_error_codes"] or ())
    if row["request"] is None:
        return "it has no request"
    return f"its request is not what was sent: {', '.join(sorted(codes))}" if codes else None


def record_of(row: InferenceRow, said: Iterable[Record], source: Mapping[str, Any]) -> Record:
    said = holding(list(said))
    origin = {"trace_id": row["trace_id"], ID: row[ID], **source}
    return {
        "inputs": inputs_of(row["request"]),
        "outputs": outputs_of(row["response"]),
        "expectations": {one["name"]: parsed(one["value"]) for one in said if one["type"] == "expectation"},
        "tags": {one["key"]: str(parsed(one["value"])) for one in said if one["kind"] == "tag"},
        "source": {"source_type": "TRACE" if row["trace_id"] else "CODE", "source_data": origin},
        ID: row[ID],
        "trace_id": row["trace_id"],
        "feedback": [
            {
                "name": one["name"],
                "value": parsed(one["value"]),
                "rationale": one["rationale"],
                "source_id": one["source_id"],
            }
            for one in said
            if one["type"] == "feedback"
        ],
    }


def holding(said: list[Record]) -> list[Record]:
    """Annotations without the assessments that others override."""
    documents = [parsed(one["document"]) for one in said]
    overridden = {document.get("overrides") for document in documents if isinstance(document, dict)}
    return [one for one in said if one["key"] not in overridden]


def inputs_of(request: str) -> dict[str, Any]:
    value = parsed(request)
    if not isinstance(value, dict):
        return {OTHER_REQUEST: value}
    return {name: member for name, member in value.items() if name not in TRANSPORT_KEYS}


def outputs_of(response: str | None) -> Any:
    value = parsed(response)
    if not isinstance(value, dict):
        return value
    value.pop("databricks_output", None)
    return value[OTHER_RESPONSE] if value.keys() == {OTHER_RESPONSE} else value


def parsed(text: str | None) -> Any:
    """The JSON value of a text; the text itself, where it is none."""
    if text is None:
        return None
    try:
        # Not orjson: it refuses lone surrogates, and rounds integers beyond 64 bits.
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def distinct(records: Iterable[Record]) -> list[Record]:
    """One record for each inputs, in the order of the first."""
    best: dict[str, Record] = {}
    for record in records:
        key = json.dumps(record["inputs"], sort_keys=True)
        if key not in best or worth(record) >= worth(best[key]):
            best[key] = record
    return list(best.values())


def worth(record: Record) -> tuple[bool, str]:
    return bool(record["expectations"]), record[ID]


# --- MLflow ---


def assessments(row: InferenceRow, said: Iterable[Record]) -> list[Any]:
    """MLflow's form of what was recorded with a trace, as far as it still holds, and of annotations."""
    from inference_table.mlflow_notes import Notes, as_assessment, document_of, merged

    notes = Notes(assessments={one["key"]: document_of(one) for one in said if one["kind"] == "assessment"})
    info = parsed(row["trace_info"])
    recorded = info.get("assessments") if isinstance(info, dict) else None
    return [as_assessment(one) for one in merged(recorded or [], notes, row["trace_id"])]


def mlflow_datasets() -> ModuleType:
    try:
        return import_module("mlflow.genai.datasets")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "to_mlflow() needs the whole of MLflow, which is not installed: pip install 'tracelake[mlflow]'",
            name=error.name,
        ) from error


def find_dataset(name: str, datasets: ModuleType) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return datasets.get_dataset(name=name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    return None


def experiment_id(name: str | None) -> str | None:
    if name is None:
        return None
    mlflow = import_module("mlflow")
    found = mlflow.get_experiment_by_name(name)
    return str(found.experiment_id if found else mlflow.create_experiment(name))
