"""The views ``spans``, one row for each span of each trace, and ``model_usage``, sums over them.

MLflow keeps the value of each attribute as JSON text, ids as base64 and times as nanoseconds since 1970; the
views have them as text, hexadecimal as MLflow shows them, and typed. ``trace_id`` is the row's, so that a
condition on it reads one payload; a span of a further trace of the same request has ``other_trace_id`` too.

A response is parsed once, straight into the members below: to take each span's JSON first and its attributes
after that would copy all of it twice.
"""

from typing import Final

__all__ = ["MODEL_USAGE", "SPANS"]

SPAN: Final = """{
    "trace_id": "VARCHAR", "span_id": "VARCHAR", "parent_span_id": "VARCHAR", "name": "VARCHAR",
    "start_time_unix_nano": "BIGINT", "end_time_unix_nano": "BIGINT",
    "status": {"code": "VARCHAR", "message": "VARCHAR"},
    "events": [{"name": "VARCHAR", "attributes":
        {"exception.type": "VARCHAR", "exception.message": "VARCHAR", "exception.stacktrace": "VARCHAR"}}],
    "attributes": {
        "mlflow.traceRequestId": "VARCHAR", "mlflow.spanType": "VARCHAR",
        "mlflow.spanInputs": "VARCHAR", "mlflow.spanOutputs": "VARCHAR",
        "mlflow.chat.tokenUsage": "VARCHAR", "mlflow.llm.cost": "VARCHAR", "mlflow.llm.model": "VARCHAR",
        "gen_ai.response.model": "VARCHAR", "gen_ai.request.model": "VARCHAR"
    }
}"""


def recorded(span: str) -> str:
    """The spans of all traces of a row, of the structure ``span``, as one list."""
    trace = f'{{"data": {{"spans": [{span}]}}}}'
    output = f'{{"databricks_output": {{"trace": {trace}, "other_traces": [{trace}]}}}}'
    return f"try(from_json(response, '{output}')).databricks_output"


def all_spans(output: str) -> str:
    # With a trace more than one is rare, and lists are copied to be put together.
    others = f"list_transform({output}.other_traces, lambda trace: trace.data.spans)"
    return f"""case when {output}.other_traces is null then {output}.trace.data.spans
            else list_concat({output}.trace.data.spans, flatten({others})) end"""


def attribute(name: str) -> str:
    return f'span.attributes."{name}"'


def member(value: str, path: str) -> str:
    """A member of JSON text as text; null where there is none, or the text is no JSON."""
    return f"try(json_extract_string({value}, '{path}'))"


def span_id(value: str) -> str:
    return f"lower(hex(try(from_base64({value}))))"


INPUTS: Final = attribute("mlflow.spanInputs")
OUTPUTS: Final = attribute("mlflow.spanOutputs")
USAGE: Final = attribute("mlflow.chat.tokenUsage")
TYPE: Final = f"""trim({attribute("mlflow.spanType")}, '"')"""
NAMES: Final = ", ".join(
    map(attribute, ("mlflow.llm.model", "gen_ai.response.model", "gen_ai.request.model"))
)
MODEL: Final = f"""coalesce({member(f"coalesce({NAMES})", "$")}, {NAMES},
        case when {TYPE} in ('CHAT_MODEL', 'LLM', 'EMBEDDING')
            then coalesce({member(OUTPUTS, "$.model")}, {member(INPUTS, "$.model")}) end)"""
"""As MLflow and OpenTelemetry name it, else as the call of the model does."""

MEASURES: Final = f"""{MODEL} as model,
    try_cast({member(USAGE, "$.input_tokens")} as bigint) as input_tokens,
    try_cast({member(USAGE, "$.output_tokens")} as bigint) as output_tokens,
    try_cast({member(USAGE, "$.total_tokens")} as bigint) as total_tokens,
    try_cast({member(attribute("mlflow.llm.cost"), "$.total_cost")} as double) as cost_usd"""

COLUMNS: Final = "databricks_request_id, request_date, request_time, served_entity_id, trace_id"
ROWS: Final = f"""
        select {COLUMNS}, {all_spans("typed")} as spans, {all_spans("documents")} as documents
        from (
            select *, {recorded(SPAN)} as typed, {recorded('{"attributes": "JSON"}')} as documents
            from payload where span_count > 0
        )"""

SPANS: Final = f"""
select {COLUMNS},
    nullif(coalesce(trim({attribute("mlflow.traceRequestId")}, '"'), 'tr-' || {span_id("span.trace_id")}),
        trace_id) as other_trace_id,
    {span_id("span.span_id")} as span_id, {span_id("span.parent_span_id")} as parent_span_id,
    span.name as name, {TYPE} as type, replace(span.status.code, 'STATUS_CODE_', '') as status,
    coalesce(nullif(span.status.message, ''), exception."exception.message") as status_message,
    exception."exception.type" as exception_type, exception."exception.stacktrace" as exception_stacktrace,
    try(make_timestamptz(span.start_time_unix_nano // 1000)) as start_time,
    try(span.end_time_unix_nano - span.start_time_unix_nano) / 1e6 as duration_ms,
    {INPUTS} as inputs, {OUTPUTS} as outputs, document.attributes::varchar as attributes, {MEASURES}
from (
    select * exclude (spans, documents), spans[number] as span, documents[number] as document,
        list_filter(spans[number].events, lambda event: event.name = 'exception')[1].attributes as exception
    from (select *, unnest(range(1, len(spans) + 1)) as number from ({ROWS}))
)"""

AROUND: Final = f"""list_reduce(
        list_transform(list_reverse(spans), lambda span:
            [span.span_id, span.parent_span_id, ({USAGE} is not null)::varchar]),
        lambda known, span: case when span[3] = 'true' or list_contains(known, span[1])
            then list_append(known, span[2]) else known end,
        []::varchar[])"""
"""Ids of the spans that have another within them which says how many tokens it took.

An agent's span may hold the sum of its calls', and a client's span the same as that of the library it uses:
the innermost counts, so that no token does twice. Spans are recorded as they started, each after its parent.
"""

MODEL_USAGE: Final = f"""
select request_date, served_entity_id, model,
    count(distinct databricks_request_id) as requests, count(*) as calls,
    sum(input_tokens) as input_tokens, sum(output_tokens) as output_tokens, sum(total_tokens) as total_tokens,
    sum(cost_usd) as cost_usd
from (
    select request_date, served_entity_id, databricks_request_id, {MEASURES}
    from (select *, unnest(spans) as span from (select *, {AROUND} as around from ({ROWS})))
    where {USAGE} is not null and not list_contains(around, span.span_id)
)
group by request_date, served_entity_id, model"""
