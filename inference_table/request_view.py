"""The view ``requests``: one typed row for each request, with what was asked and answered as text.

A document is parsed once or twice, whatever the number of columns taken from it: once for all members that
may be of use, once for the part of it that turned out to be. Known are chat completions and their older form,
the Responses API, Anthropic's messages, MLflow's ``ChatAgent`` and ``ResponsesAgent``, the scoring server's
data frames and inputs, plain functions that call things by a usual name, bodies that are text, and aggregated
streams. For all others MLflow's previews in ``trace_info`` stand in.

Texts are found by lists of candidates and one expression over each list, not by an expression for each
candidate: DuckDB takes about half a millisecond to bind one, and does so for those that go unused too.
"""

from collections.abc import Iterable, Sequence
from typing import Final

__all__ = ["REQUESTS", "json_paths"]

ASKED: Final = ("user", "human")
ANSWERED: Final = ("assistant", "ai", "model")
"""Roles of OpenAI's and Anthropic's messages, types of LangChain's."""
QUESTION_KEYS: Final = ("question", "query", "prompt", "message", "text", "content", "request")
ANSWER_KEYS: Final = ("answer", "response", "result", "text", "message", "reply", "generated_text")
"""What plain functions call what is asked and said."""

REQUEST_PATHS: Final = ("messages", "input", *QUESTION_KEYS)
RESPONSE_PATHS: Final = (
    *("output", "messages", "choices[0].message.content", "choices[0].text", "content", "events"),
    *ANSWER_KEYS,
)
INPUT_ROWS: Final = ("dataframe_split", "dataframe_records", "instances", "inputs")
OUTPUT_ROWS: Final = ("predictions", "body", "encoding")
"""Where MLflow's scoring server has what was asked and said, and we a body that is no JSON object."""
INFO_PATHS: Final = (
    *('trace_metadata."mlflow.trace.session"', 'trace_metadata."mlflow.trace.user"'),
    *("request_preview", "response_preview"),
)
EVENT_PATHS: Final = (
    *("choices[0].delta.content", "data.text", "data.content", "data", "text", "content"),
    *("delta.text", "delta", "token", "word"),
)
"""Where an event of a stream of no known kind may have its part of the answer."""


def json_paths(members: Iterable[str]) -> str:
    """A list of JSON paths."""
    return "[" + ", ".join(f"'$.{member}'" for member in members) + "]"


def list_of(value: str) -> str:
    """The elements of a JSON list; null where it is none."""
    return f"""from_json({value}, '["JSON"]')"""


def first(texts: str) -> str:
    """The first of a list that is not null."""
    return f"list_filter({texts}, lambda one: one is not null)[1]"


def texts_of(contents: str) -> str:
    """What contents of messages say, each a text, an object with one, or a list of parts; null for others."""
    part = "case json_type(part) when 'VARCHAR' then part->>'$' else part->>'$.text' end"
    parts = f"list_transform({list_of('said')}, lambda part: {part})"
    return f"""list_transform({contents}, lambda said: case json_type(said)
            when 'VARCHAR' then said->>'$'
            when 'ARRAY' then nullif(array_to_string({parts}, ''), '')
            when 'OBJECT' then coalesce(said->>'$.text', said->>'$.content', said->>'$.message') end)"""


def last_said(chats: str, roles: Sequence[str]) -> str:
    """Of each JSON list of messages the content of the last that one of the roles said; a text stays."""
    spoken = ", ".join(f"'{role}'" for role in roles)
    is_it = f"""message->>'$.content' not in ('', '[]')
                and coalesce(message->>'$.role', message->>'$.type') in ({spoken})"""
    return f"""list_transform({chats}, lambda chat: case json_type(chat)
            when 'VARCHAR' then chat
            when 'ARRAY' then list_filter({list_of("chat")}, lambda message: {is_it})[-1]->'$.content' end)"""


def preview(text: str) -> str:
    """MLflow's preview of a value; of a text the text, which is in quotes."""
    return f"""coalesce(case when {text} like '"%' then try(json_extract_string({text}, '$')) end, {text})"""


def first_row(value: str) -> str:
    """The first element of a JSON list of rows. A list of messages is one value, as is all else."""
    kinds = f"json_type({value}, ['$', '$[0].role', '$[0].type'])"
    return f"case when {kinds} = ['ARRAY', null, null] then {value}->'$[0]' else {value} end"


SPLIT: Final = f"""to_json(map(
                    from_json(input[1]->'$.columns', '["VARCHAR"]'), {list_of("input[1]->'$.data[0]'")}))"""
"""The first row of a split data frame, as an object."""

QUESTION_CHATS: Final = last_said("[asked[1], asked[2], question]", ASKED)
QUESTION: Final = first(texts_of(f"list_concat({QUESTION_CHATS}, asked[3:])"))

ANSWER_CHATS: Final = last_said("[said[1], said[2], answered]", ANSWERED)
ANSWER: Final = first(texts_of(f"list_concat({ANSWER_CHATS}, said[3:5], said[7:])"))

EVENT: Final = f"""case json_type(event) when 'VARCHAR' then event->>'$'
                else {first(f"json_extract_string(event, {json_paths(EVENT_PATHS)})")} end"""
EVENTS: Final = f"list_transform({list_of('said[6]')}, lambda event: {EVENT})"

# The body ends where what we append to it begins, which is most of a response. No text in it can hold these
# quotes. An object of the agent's may: what is left is half a body, no JSON, and then the whole is parsed.
BODY: Final = """response[:nullif(instr(response, ',"databricks_output":{'), 0) - 1] || '}'"""


def replied(members: Iterable[str]) -> str:
    """Members of the reply's body."""
    paths = json_paths(members)
    return f"coalesce(try(json_extract({BODY}, {paths})), try(json_extract(response, {paths})))"


TOOLS: Final = """{"databricks_output": {"trace": {"data": {"spans": [
    {"name": "VARCHAR", "attributes": {"mlflow.spanType": "VARCHAR"}}
]}}}}"""
TOOL_CALLS: Final = """list_transform(
        list_filter(tools.databricks_output.trace.data.spans,
            lambda span: span.attributes."mlflow.spanType" = '"TOOL"'),
        lambda span: span.name)"""

SAYS_FAILED: Final = "status_code >= 400 or trace_state = 'ERROR'"
IS_STREAM: Final = "contains(response, '\"cut_off_by_client\":')"
"""One may fail under status 200, too."""
FAILURE: Final = """{
    "databricks_output": {
        "trace": {"data": {"spans": [
            {"parent_span_id": "VARCHAR", "status": {"code": "VARCHAR", "message": "VARCHAR"}}
        ]}},
        "stream": {"error": "VARCHAR"}
    },
    "error": "JSON", "message": "JSON", "detail": "JSON", "body": "JSON"
}"""
FAILED: Final = f"{SAYS_FAILED} or failure.databricks_output.stream.error is not null"
REPLIED: Final = "[failure.error, failure.message, failure.detail, failure.detail->'$[0].msg', failure.body]"
ERROR: Final = first(f"""list_concat(
            [list_filter(failing, lambda span: span.parent_span_id is null)[1].status.message,
                failing[-1].status.message, failure.databricks_output.stream.error],
            {texts_of(REPLIED)})""")
"""What the trace's root says went wrong, else the span that failed last, else the stream, else the reply."""

REQUESTS: Final = f"""
select databricks_request_id, client_request_id, trace_id, request_date, request_time, served_entity_id,
    requester, info[1] as session_id, info[2] as user_id, status_code, trace_state as state,
    coalesce({QUESTION}, case when input is null then nullif(request, '') end, {preview("info[3]")})
        as last_user_message,
    coalesce({ANSWER}, nullif(array_to_string({EVENTS}, ''), ''), {preview("info[4]")},
        nullif(answered::varchar, 'null')) as answer,
    input_tokens, output_tokens, input_tokens + output_tokens as total_tokens, total_cost_usd as cost_usd,
    duration_ms, time_to_first_byte_ms, span_count, {TOOL_CALLS} as tool_calls,
    case when {FAILED} then {ERROR} end as error,
    logging_error_codes
from (
    select *,
        case when question is not null then json_extract(question, {json_paths(REQUEST_PATHS)}) end as asked,
        case when answered is null then output[4:]
            else json_extract(answered, {json_paths(RESPONSE_PATHS)}) end as said,
        list_filter(failure.databricks_output.trace.data.spans,
            lambda span: span.status.code like '%ERROR' and span.status.message <> '') as failing
    from (
        select *, {first_row("asked_rows")} as question, {first_row("answered_rows")} as answered
        from (
            select *,
                coalesce(try({SPLIT}), input[2], input[3], input[4], input[5]) as asked_rows,
                coalesce(output[1], case when output[3] is null then output[2] end) as answered_rows
            from (
                select * exclude (execution_duration_ms), execution_duration_ms as duration_ms,
                    try(json_extract_string(trace_info, {json_paths(INFO_PATHS)})) as info,
                    try(json_extract(request, {json_paths(INPUT_ROWS)[:-1]}, '$'])) as input,
                    {replied((*OUTPUT_ROWS, *RESPONSE_PATHS))} as output,
                    try(from_json(case when {SAYS_FAILED} or {IS_STREAM} then response end, '{FAILURE}'))
                        as failure,
                    try(from_json(case when span_count > 0 then response end, '{TOOLS}')) as tools
                from payload
            )
        )
    )
)"""
