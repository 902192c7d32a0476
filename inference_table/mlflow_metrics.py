"""Sums over the traces of an inference table, as the charts of MLflow's UI ask for them.

Of traces and assessments they are SQL over small columns. Those of spans need what every ``response`` holds:
each file's spans are read once and kept, some 100 bytes each, up to a limit. Spans count by the time of their
trace; MLflow's SQL store takes their own for costs, which is seconds apart.

Private names of MLflow: ``sql_trace_metrics_utils.validate_query_trace_metrics_params``,
``SearchTraceMetricsUtils.parse_search_filter``, ``trace_correlation.calculate_npmi_from_counts`` and
``online.entities.CompletedSession``. Tested with 3.17.2.
"""

# mypy: disable-error-code="no-untyped-call"
# MLflow is typed in part only.

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import pyarrow as pa
from mlflow.entities.trace_metrics import AggregationType, MetricAggregation, MetricDataPoint, MetricViewType
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.utils.sql_trace_metrics_utils import validate_query_trace_metrics_params
from mlflow.tracing.constant import TraceTagKey
from mlflow.utils.search_utils import SearchTraceMetricsUtils

from inference_table.mlflow_files import TraceFile, trace_files
from inference_table.mlflow_rows import TraceRows, internal_errors
from inference_table.mlflow_search import (
    AT,
    DURATION,
    SESSION,
    Filter,
    add_time,
    compared,
    metadata,
    metadata_sql,
    tag,
    trace_filter,
)
from inference_table.scan import Snapshot, literal, open_snapshot

__all__ = ["MetricQuery", "TraceMetrics"]

SPAN_CACHE_BYTES: Final = 128 * 1024 * 1024
"""Of spans' small columns: some million spans."""
USAGE: Final = metadata("mlflow.trace.tokenUsage")
SPAN: Final = """{"name": "VARCHAR", "start_time_unix_nano": "BIGINT", "end_time_unix_nano": "BIGINT",
    "status": {"code": "VARCHAR"}, "attributes": {"mlflow.spanType": "VARCHAR", "mlflow.llm.model": "VARCHAR",
    "mlflow.llm.provider": "VARCHAR", "mlflow.llm.cost": "VARCHAR"}}"""
DOCUMENT: Final = f'{{"databricks_output": {{"trace": {{"data": {{"spans": [{SPAN}]}}}}}}}}'
SPANS_SQL: Final = f"""
select request_id, start_ms, name as span_name, latency,
    coalesce(trim(kind, '"'), 'UNKNOWN') as span_type,
    replace(coalesce(code, 'UNSET'), 'STATUS_CODE_', '') as span_status,
    trim(model, '"') as span_model_name, trim(provider, '"') as span_model_provider,
    try_cast(try(cost->>'/input_cost') as double) as input_cost,
    try_cast(try(cost->>'/output_cost') as double) as output_cost,
    try_cast(try(cost->>'/total_cost') as double) as total_cost
from (
    select databricks_request_id as request_id, span.name as name,
        span.start_time_unix_nano // 1000000 as start_ms,
        (span.end_time_unix_nano - span.start_time_unix_nano) // 1000000 as latency,
        span.status.code as code, span.attributes."mlflow.spanType" as kind,
        span.attributes."mlflow.llm.model" as model, span.attributes."mlflow.llm.provider" as provider,
        span.attributes."mlflow.llm.cost" as cost
    from (
        select databricks_request_id,
            unnest(try(from_json(response, '{DOCUMENT}')).databricks_output.trace.data.spans) as span
        from traces
    )
)"""
VALUE: Final = (
    "coalesce(assessment->'/feedback/value', assessment->'/expectation/value', "
    "try(json(assessment->>'/expectation/serialized_value/value')))"
)
NUMBER: Final = f"""case lower(json_extract_string({VALUE}, '$'))
    when 'true' then 1.0 when 'yes' then 1.0 when 'false' then 0.0 when 'no' then 0.0
    else case when json_type({VALUE}) in ('DOUBLE', 'BIGINT', 'UBIGINT', 'HUGEINT')
        then try_cast(json_extract_string({VALUE}, '$') as double) end end"""

TRACE_VALUES: Final = {"trace_count": "1", "session_count": SESSION, "latency": DURATION}
"""What a metric counts or sums up; the others are token counts."""
DIMENSIONS: Final = {
    "trace_name": tag(TraceTagKey.TRACE_NAME),
    "trace_status": "trace_state",
    "assessment_name": "assessment->>'/assessment_name'",
    "assessment_value": f"{VALUE}::varchar",
}
ASSESSMENT_FIELDS: Final = {
    "name": "assessment->>'/assessment_name'",
    "type": "case when json_exists(assessment, '/feedback') then 'feedback' else 'expectation' end",
}


@dataclass(frozen=True, kw_only=True)
class MetricQuery:
    """The arguments of ``query_trace_metrics``. Times are ms since 1970."""

    view_type: MetricViewType
    metric_name: str
    aggregations: list[MetricAggregation]
    dimensions: list[str] | None = None
    filters: list[str] | None = None
    time_interval_seconds: int | None = None
    start_time_ms: int | None = None
    end_time_ms: int | None = None
    max_results: int = 1000

    def __post_init__(self) -> None:
        validate_query_trace_metrics_params(
            self.view_type, self.metric_name, self.aggregations, self.dimensions
        )
        if self.time_interval_seconds and (self.start_time_ms is None or self.end_time_ms is None):
            raise MlflowException.invalid_parameter_value(
                "start_time_ms and end_time_ms are required if time_interval_seconds is set"
            )

    def times(self) -> Filter:
        found = Filter()
        if self.start_time_ms is not None:
            add_time(found, ">=", self.start_time_ms)
        if self.end_time_ms is not None:
            add_time(found, "<=", self.end_time_ms)
        return found


class TraceMetrics:
    """Sums over the traces of one table. Calls may come from many threads."""

    def __init__(self, rows: TraceRows) -> None:
        self._rows = rows
        self._spans: OrderedDict[str, pa.Table] = OrderedDict()
        self._lock = threading.Lock()

    def query(self, asked: MetricQuery) -> list[MetricDataPoint]:
        """The points of a chart.

        Raises:
            MlflowException: a filter is not valid, or the table can't be read.
        """
        wanted = asked.times()
        own = split_filters(asked, wanted)
        with internal_errors():
            snapshot = open_snapshot(self._rows.settings)
            files = files_between(snapshot, wanted)
            sql = points_sql(asked, items_sql(asked, wanted.sql, own))
            with self._rows.relation(snapshot, files, sql) as connection:
                if asked.view_type == MetricViewType.SPANS:
                    connection.register("spans", self._all_spans(snapshot, files))
                found = connection.sql(sql).to_arrow_table().to_pylist()
        return [point for row in found if (point := to_point(asked, row))]

    def completed_sessions(
        self, first_ms: int, last_ms: int, max_results: int | None, filter_string: str | None
    ) -> list[Any]:
        """Sessions whose last trace came between these times, the longest quiet first.

        Args:
            filter_string: what the first trace of a session must meet.
        """
        # The light SDK has no such module.
        from mlflow.genai.scorers.online.entities import (  # type: ignore[import-not-found,unused-ignore]
            CompletedSession,
        )

        wanted = trace_filter(filter_string)
        sql = f"""
            with steps as (
                select {SESSION} as session_id, {AT} as ms, coalesce({wanted.sql}, false) as is_met
                from traces
            )
            select session_id, min(ms) as first_ms, max(ms) as last_ms from steps
            where session_id is not null group by 1
            having max(ms) between {first_ms} and {last_ms} and arg_min(is_met, ms)
            order by 3, 1 {"" if max_results is None else f"limit {max_results}"}"""
        return [
            CompletedSession(row["session_id"], row["first_ms"], row["last_ms"])
            for row in self._all_rows(Filter(), sql)
        ]

    def counts(self, filters: tuple[str, str], base: str | None) -> dict[str, int]:
        """Traces that meet one filter, the other, both, and ``base``, which all must meet."""
        first, second = (trace_filter(one).sql for one in filters)
        wanted = trace_filter(base)
        sql = f"""
            select count(*) as total, count(*) filter (a) as first, count(*) filter (b) as second,
                count(*) filter (a and b) as both
            from (
                select coalesce({first}, false) as a, coalesce({second}, false) as b
                from traces where {wanted.sql}
            )"""
        [found] = self._all_rows(wanted, sql)
        return {name: int(value) for name, value in found.items()}

    def _all_rows(self, wanted: Filter, sql: str) -> list[dict[str, Any]]:
        with internal_errors():
            snapshot = open_snapshot(self._rows.settings)
            files = files_between(snapshot, wanted)
            with self._rows.relation(snapshot, files, sql) as connection:
                rows: list[dict[str, Any]] = connection.sql(sql).to_arrow_table().to_pylist()
                return rows

    def _all_spans(self, snapshot: Snapshot, files: Iterable[TraceFile]) -> pa.Table:
        # One at a time: the charts of a page ask for the same files at once.
        with self._lock:
            return pa.concat_tables(
                [SPAN_COLUMNS.empty_table(), *(self._spans_of(snapshot, file) for file in files)]
            )

    def _spans_of(self, snapshot: Snapshot, file: TraceFile) -> pa.Table:
        found = self._spans.pop(file.path, None)
        if found is None:
            with self._rows.relation(snapshot, [file], SPANS_SQL) as connection:
                found = connection.sql(SPANS_SQL).to_arrow_table().cast(SPAN_COLUMNS)
        self._spans[file.path] = found
        while len(self._spans) > 1 and sum(one.nbytes for one in self._spans.values()) > SPAN_CACHE_BYTES:
            self._spans.popitem(last=False)
        return found


WORD: Final = pa.dictionary(pa.int32(), pa.string())
SPAN_COLUMNS: Final = pa.schema(
    [
        ("request_id", pa.string()),
        ("start_ms", pa.int64()),
        ("span_name", WORD),
        ("latency", pa.int64()),
        ("span_type", WORD),
        ("span_status", WORD),
        ("span_model_name", WORD),
        ("span_model_provider", WORD),
        ("input_cost", pa.float64()),
        ("output_cost", pa.float64()),
        ("total_cost", pa.float64()),
    ]
)


def files_between(snapshot: Snapshot, wanted: Filter) -> list[TraceFile]:
    return [one for one in trace_files(snapshot) if one.high >= wanted.low and one.low < wanted.high]


def split_filters(asked: MetricQuery, wanted: Filter) -> list[str]:
    """Conditions on the spans or assessments themselves; those on traces are added to ``wanted``."""
    own = []
    for text in asked.filters or ():
        one = SearchTraceMetricsUtils.parse_search_filter(text)
        if one.view_type == "trace":
            wanted.conditions.append(trace_condition(one.entity, one.key, one.value))
        elif one.view_type == "span" and asked.view_type == MetricViewType.SPANS:
            own.append(compared(f"span_{one.entity}", "=", one.value))
        elif one.view_type == "assessment" and asked.view_type == MetricViewType.ASSESSMENTS:
            own.append(compared(ASSESSMENT_FIELDS[one.entity], "=", one.value))
        else:
            raise MlflowException.invalid_parameter_value(
                f"Filtering by {one.view_type} is not supported for the view type {asked.view_type}"
            )
    return own


def trace_condition(entity: str, key: str | None, value: str) -> str:
    if key is None:
        return compared("trace_state", "=", value)
    return compared(tag(key), "=", value) if entity == "tag" else metadata_sql(key, "=", value)


def items_sql(asked: MetricQuery, condition: str, own: Sequence[str]) -> str:
    """One row for each value: ``v``, its time ``ms``, and its dimensions."""
    dimensions = asked.dimensions or []
    mine = " and ".join(own) or "true"
    if asked.view_type == MetricViewType.SPANS:
        value = "1" if asked.metric_name == "span_count" else asked.metric_name
        columns = ", ".join([f"{value} as v", "start_ms as ms", *dimensions])
        of_traces = f"request_id in (select databricks_request_id from traces where {condition})"
        return f"select {columns} from spans where {of_traces} and {mine}"
    named = [f"{DIMENSIONS[name]} as {name}" for name in dimensions]
    if asked.view_type == MetricViewType.TRACES:
        value = TRACE_VALUES.get(asked.metric_name) or (
            f"try_cast({USAGE}->>{literal('/' + asked.metric_name)} as bigint)"
        )
        return f"select {', '.join([f'{value} as v', f'{AT} as ms', *named])} from traces where {condition}"
    value = "1" if asked.metric_name == "assessment_count" else NUMBER
    valid = "coalesce(assessment->>'/valid', 'true') = 'true' and not json_exists(assessment, '/issue')"
    columns = ", ".join([f"{value} as v", "ms", *named])
    assessments = f"select {AT} as ms, unnest(assessments) as assessment from traces where {condition}"
    return f"select {columns} from ({assessments}) where {valid} and {mine}"


def points_sql(asked: MetricQuery, items: str) -> str:
    groups = list(asked.dimensions or [])
    columns = [f"{aggregate_sql(asked, one)} as v{place}" for place, one in enumerate(asked.aggregations)]
    present = " and ".join(f"{name} is not null" for name in ["v", *groups])
    buckets = []
    if asked.time_interval_seconds:
        step = asked.time_interval_seconds * 1000
        buckets = [f"cast(floor(ms / {step}) * {step} as bigint) as time_bucket"]
        groups = ["time_bucket", *groups]
    names = [*buckets, *(asked.dimensions or [])]
    tail = f"group by {', '.join(groups)} order by {', '.join(groups)}" if groups else ""
    selected = ", ".join([*names, *columns])
    return f"select {selected} from ({items}) where {present} {tail} limit {asked.max_results}"


def aggregate_sql(asked: MetricQuery, one: MetricAggregation) -> str:
    kind = one.aggregation_type
    if kind == AggregationType.COUNT:
        return "count(distinct v)" if asked.metric_name == "session_count" else "count(*)"
    if kind == AggregationType.PERCENTILE:
        return f"quantile_cont(cast(v as double), {float(one.percentile_value or 0) / 100!r})"
    return f"{kind.value.lower()}(v)"


def to_point(asked: MetricQuery, row: dict[str, Any]) -> MetricDataPoint | None:
    dimensions = {name: str(row[name]) for name in asked.dimensions or ()}
    if asked.time_interval_seconds:
        at = datetime.fromtimestamp(row["time_bucket"] / 1000, tz=UTC)
        dimensions = {"time_bucket": at.isoformat(), **dimensions}
    values = {
        str(one): float(value)
        for place, one in enumerate(asked.aggregations)
        if (value := row[f"v{place}"]) is not None
    }
    if not values:
        return None
    return MetricDataPoint(metric_name=asked.metric_name, dimensions=dimensions, values=values)
