"""Drawing a request and its trace for a terminal, from traces that MLflow's instrumentation made."""

import json
import re
from datetime import UTC, datetime
from typing import Any

import mlflow
import pytest
from mlflow.entities import Trace
from rich.cells import cell_len

from deploy.span_tree import MAX_SPANS, render_request, render_trace
from tests.deploy.agents import QUESTION, failing, record, rude, support


def drawn(trace: Trace, width: int = 100, *, full: bool = False) -> list[str]:
    return [line.plain for line in render_trace(trace, width, full=full)]


def test_a_tree_shows_names_types_durations_tokens_and_when_spans_ran() -> None:
    """Each span is a line below its parent, with its type, its tokens, its duration and a bar."""
    lines = drawn(record(lambda: support(QUESTION))[0])
    assert re.fullmatch(r"trace tr-[0-9a-f]{32}  OK  3 spans", lines[0])
    spans = [line for line in lines if "●" in line]
    starts = ["● support AGENT ", "├─● search RETRIEVER ", "└─● gpt CHAT_MODEL 1,200 in / 34 out "]
    for line, start in zip(spans, starts, strict=True):
        assert line.startswith(start)
        assert re.search(r" [\d.]+ m?s [·━]{20}$", line)
    assert spans[0].endswith("━" * 20)
    assert spans[1].index("━") <= spans[2].index("━")


def test_inputs_and_outputs_are_said_in_one_line() -> None:
    """Of a chat the last message, of a completion its answer, of what is too long how long it is."""
    text = "\n".join(drawn(record(lambda: support(QUESTION))[0], 120))
    assert f"    in    user: {QUESTION}  (+1 earlier)" in text.replace("? (", "?  (")
    assert f"│ in    question: {QUESTION}" in text
    assert re.search(r"    out   30 days\. x+… \(5,009 characters\)", text)


def test_retrieved_documents_are_listed_with_source_and_score() -> None:
    """A retriever shows how many documents it found and the first five, each on one line."""
    text = drawn(record(lambda: support(QUESTION))[0])
    listed = [" ".join(line.replace("│", "").split()) for line in text if "returns-" in line]
    assert listed[0] == "1. returns-0.md (0.900) Returns are accepted within 30 days. Section 30"
    assert len(listed) == 5
    assert any("out   7 documents" in line for line in text)
    assert any("… and 2 more" in line for line in text)
    full = drawn(record(lambda: support(QUESTION))[0], full=True)
    assert sum("returns-" in line for line in full) == 7


def test_a_failure_is_named_once_where_it_began() -> None:
    """The head names the span, the error stands below it with file and line, not again at its parents."""
    lines = drawn(record(lambda: failing(QUESTION))[0])
    assert "  ERROR  3 spans" in lines[0]
    assert lines[1] == "  failed in call_stock_service: BusyError: stock service is busy: shoe-42"
    assert [line for line in lines if line.lstrip("│├└─ ").startswith("✗")][1].startswith(
        "└─✗ call_stock_service TOOL "
    )
    errors = [line for line in lines if "error BusyError" in line]
    assert errors == ["    error BusyError: stock service is busy: shoe-42"]
    assert re.fullmatch(r"\s+at .*agents\.py:\d+ in call_stock_service", lines[-1])


STACK = """Traceback (most recent call last):
  File "/srv/agent.py", line 7, in answer
    return ask(question)
  File "/srv/.venv/lib/python3.11/site-packages/client/base.py", line 99, in request
    raise Gone
  File "/usr/lib/python3.11/contextlib.py", line 158, in __exit__
    self.gen.throw(value)
"""


@pytest.mark.parametrize(
    ("stack", "shown"),
    [
        (STACK, "at /srv/agent.py:7 in answer"),
        (STACK.replace("/srv/agent.py", "/x/lib/python3.11/site-packages/y.py"), "at /usr/lib/python3.11/"),
        (STACK.rpartition("  File")[0].replace("/srv/a", "/lib/python3/"), "at client/base.py:99 in request"),
        ("no stack", None),
    ],
)
def test_an_error_says_where_in_the_agents_own_code_it_was_raised(stack: str, shown: str | None) -> None:
    """Rather than deep in a client; where only libraries were, their line without the environment's path."""
    value = record(lambda: failing(QUESTION))[0].to_dict()
    for span in value["data"]["spans"]:
        for event in span["events"]:
            event["attributes"]["exception.stacktrace"] = stack
    lines = [line.strip() for line in drawn(Trace.from_dict(value))]
    found = [line for line in lines if line.startswith("at ")]
    assert [line.startswith(shown) for line in found] == [True] if shown else found == []


def test_the_model_is_named_and_an_error_without_exception_is_said() -> None:
    """Instrumentors of OpenTelemetry give a failed span the kind of error only."""
    value = record(lambda: support(QUESTION))[0].to_dict()
    for span in value["data"]["spans"]:
        if span["name"] == "gpt":
            span["attributes"] |= {"mlflow.llm.model": '"gpt-4o"', "error.type": "overloaded_error"}
            span["status"] = {"code": "STATUS_CODE_ERROR", "message": ""}
    lines = drawn(Trace.from_dict(value))
    assert any("✗ gpt CHAT_MODEL 1,200 in / 34 out gpt-4o " in line for line in lines)
    assert lines[1] == "  error in gpt: overloaded_error"  # the agent went on
    assert lines[-1].strip() == "error overloaded_error"


def test_the_model_of_a_call_that_failed_is_named() -> None:
    """MLflow's autologging of OpenAI leaves the argument only."""
    value = rename(record(lambda: failing(QUESTION))[0].to_dict(), model="gpt-4o")
    assert all("gpt-4o " in line for line in drawn(Trace.from_dict(value)) if "●" in line or "✗" in line)


def test_full_shows_everything() -> None:
    """With ``full`` values are whole and indented, and the stack trace is there."""
    lines = drawn(record(lambda: support(QUESTION))[0], full=True)
    assert any("x" * 5000 in line for line in lines)
    assert any('"question": ' in line and QUESTION in line for line in lines)
    failed = "\n".join(drawn(record(lambda: failing(QUESTION))[0], full=True))
    assert "Traceback (most recent call last):" in failed
    assert "BusyError: stock service is busy" in failed


@pytest.mark.parametrize("width", [60, 80, 143])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    """Wide characters are counted as the terminal shows them."""

    def wide() -> str:
        return support("返品期限はいつまでですか" * 30)["choices"][0]["message"]["content"]

    for line in drawn(record(wide)[0], width):
        assert cell_len(line) <= width, line


def test_a_payload_cannot_steer_the_terminal() -> None:
    """Escape sequences, carriage returns and markup in an answer are shown, not obeyed."""
    text = "\n".join(drawn(record(rude)[0]) + drawn(record(rude)[0], full=True))
    assert "\x1b" not in text and "\r" not in text
    assert "�[2Jcleared" in text and "[bold]markup[/bold] :smile:" in text


HOSTILE = "\x1b[31m\x1b]0;owned\x07\r\n\x9b2J\x7f\ud800\u202e"


def rename(value: Any, **texts: Any) -> Any:
    """A trace whose spans are called, typed and failed with other words."""
    changed = json.loads(json.dumps(value))
    for span in changed["data"]["spans"]:
        span["name"] = texts.get("name", span["name"])
        span["attributes"] |= {key: json.dumps(text) for key, text in texts.items() if key != "name"}
    return changed


@pytest.mark.parametrize("full", [False, True])
def test_no_text_of_a_stranger_steers_the_terminal(full: bool) -> None:
    """Names and types of spans, method, path, requester, ids: all are shown, none is obeyed or too wide."""
    value = rename(
        record(lambda: failing(QUESTION))[0].to_dict(), name=HOSTILE, **{"mlflow.spanType": HOSTILE}
    )
    value["info"]["trace_id"] += HOSTILE
    row = {
        **ROW,
        **dict.fromkeys(
            ("databricks_request_id", "served_entity_id", "requester", "client_request_id"), HOSTILE
        ),
        "request_metadata": {"method": HOSTILE, "path": HOSTILE},
        "request": HOSTILE,
        "response": json.dumps({"messages": [{"role": HOSTILE, "content": HOSTILE}]}),
        "logging_error_codes": [HOSTILE],
    }
    tree = list(render_trace(Trace.from_dict(value), 80, full=full))
    for line in [*tree, *render_request(row, 80, full=full)]:
        assert line.plain.replace("\t", "").isprintable()
        line.plain.encode()
    spans = [line for line in tree if "●" in line.plain or "✗" in line.plain]
    assert len(spans) == 3
    assert all(cell_len(line.plain) <= 80 for line in spans)
    assert spans[1].spans != []


ODD_SPANS: list[dict[str, Any]] = [
    {"mlflow.chat.tokenUsage": {"input_tokens": "many", "output_tokens": "34"}},
    {"mlflow.chat.tokenUsage": {"input_tokens": [1], "output_tokens": None}},
    {"mlflow.chat.tokenUsage": ["odd"]},
    {"mlflow.spanType": ["AGENT"]},
    {"mlflow.spanType": {"a": 1}},
    {"mlflow.spanType": "RETRIEVER", "mlflow.spanOutputs": [{"page_content": None, "metadata": ["a", 1]}]},
    {"mlflow.spanType": "RETRIEVER", "mlflow.spanOutputs": [{"page_content": 3, "metadata": "m", "id": 4}]},
    {"mlflow.spanInputs": {"messages": [{"role": 1, "content": None, "tool_calls": [{"function": "f"}]}]}},
    {"mlflow.spanInputs": {"messages": [{"role": 1, "content": [], "tool_calls": [{"function": ["f"]}]}]}},
    {"mlflow.spanOutputs": {"choices": [{"message": {"tool_calls": [{"function": None}, {}]}}]}},
    {"mlflow.spanOutputs": {"choices": [{"message": "m"}]}},
    {"mlflow.spanInputs": json.loads("[" * 900 + "]" * 900)},
    {"mlflow.spanInputs": {"messages": [{"content": json.loads("[" * 900 + "]" * 900)}]}},
    {"mlflow.llm.model": ["m"]},
]


@pytest.mark.parametrize("attributes", ODD_SPANS)
@pytest.mark.parametrize("full", [False, True])
def test_spans_of_every_shape_are_drawn(attributes: dict[str, Any], full: bool) -> None:
    """Whatever an agent put where MLflow has a convention, the tree is there."""
    value = rename(record(lambda: support(QUESTION))[0].to_dict(), **attributes)
    lines = drawn(Trace.from_dict(value), full=full)
    assert [name for name in ("support", "search", "gpt") if any(name in line for line in lines)] == [
        "support",
        "search",
        "gpt",
    ]


def deep(levels: int) -> None:
    with mlflow.start_span(f"level-{levels}"):
        if levels:
            deep(levels - 1)


def test_deep_and_endless_traces_stay_readable() -> None:
    """A hundred levels keep their names on the screen; ten thousand spans stop at a number that says so."""
    lines = drawn(record(lambda: deep(100))[0], 80)
    assert lines[-1].startswith("⋯") and "level-0" in lines[-1]
    assert all(cell_len(line) <= 80 for line in lines)

    def wide() -> None:
        with mlflow.start_span("root"):
            for number in range(MAX_SPANS + 100):
                with mlflow.start_span(f"step-{number}"):
                    pass

    trace = record(wide)[0]
    lines = drawn(trace)
    assert lines[-1] == "… and 101 more spans; see them with --full"
    assert any("step-599" in line for line in drawn(trace, full=True))


def test_a_span_whose_parent_is_elsewhere_and_one_that_runs_are_drawn() -> None:
    """A remote parent makes no orphan, and a span without an end says so."""
    value = record(lambda: support(QUESTION))[0].to_dict()
    for span in value["data"]["spans"]:
        if span["name"] == "search":
            span["parent_span_id"] = "AAAAAAAAAAA="
        if span["name"] == "gpt":
            span["end_time_unix_nano"] = None
    lines = drawn(Trace.from_dict(value))
    assert any(line.startswith("● search") for line in lines)
    assert any("gpt" in line and "running" in line for line in lines)


def test_a_trace_without_spans_says_so() -> None:
    """A trace that was cut to its info is drawn as what it is."""
    value = record(rude)[0].to_dict()
    assert drawn(Trace.from_dict({**value, "data": {"spans": []}}))[1] == "  no spans were recorded"


CALLS = '[{"function": {"name": "f", "arguments": "{}"}}]'
ROW: dict[str, Any] = {
    "databricks_request_id": "0195-id",
    "request_time": datetime(2025, 3, 1, 12, 30, 5, 123456, tzinfo=UTC),
    "status_code": 503,
    "execution_duration_ms": 1234,
    "time_to_first_byte_ms": 8,
    "request": '{"messages": [{"role": "user", "content": "hi"}]}',
    "response": '{"choices": [{"message": {"content": "hello"}}], "databricks_output": {"trace": {}}}',
    "request_metadata": {"method": "POST", "path": "/ask"},
    "served_entity_id": "support/3",
    "requester": None,
    "client_request_id": "c-1",
    "input_tokens": 1200,
    "output_tokens": None,
    "total_cost_usd": 0.00125,
    "logging_error_codes": ["MAX_TRACE_SIZE_EXCEEDED"],
}


def test_the_header_says_what_the_row_knows() -> None:
    """Id, route, status, durations, time, endpoint, tokens, cost, error codes, request and answer."""
    assert [line.plain for line in render_request(ROW, 100)] == [
        "request 0195-id",
        "  POST /ask → 503 in 1.23 s, first byte after 8.0 ms",
        "  2025-03-01 12:30:05.123 UTC",
        "  endpoint support/3   client id c-1   tokens 1,200 in / 0 out   cost $0.001250",
        "  recorded with MAX_TRACE_SIZE_EXCEEDED",
        "  in    user: hi",
        "  out   hello",
    ]


@pytest.mark.parametrize(
    ("response", "shown"),
    [
        ('{"body": "plain text", "databricks_output": {}}', "plain text"),
        ('{"body": [1, 2], "databricks_output": {}}', "[1, 2]"),
        ("not json", "not json"),
        ("[1]", "[1]"),
        (f'{{"choices": [{{"message": {{"content": null, "tool_calls": {CALLS}}}}}]}}', "calls f({})"),
        ('{"choices": []}', '{"choices": []}'),
        ('{"choices": [{"message": {"tool_calls": [{"function": "f"}, {"id": 1}]}}]}', "calls f, a function"),
        ('{"choices": [{"message": {"content": "", "tool_calls": [3]}}]}', '""'),
        ('{"messages": ["odd"]}', '{"messages": ["odd"]}'),
        ('{"role": "assistant", "content": "alone"}', '{"role": "assistant", "content": "alone"}'),
    ],
)
def test_bodies_of_every_shape_are_shown(response: str, shown: str) -> None:
    """Text, arrays, tool calls and what is no JSON at all are one line each."""
    lines = [line.plain for line in render_request({**ROW, "response": response}, 100)]
    assert lines[-1] == f"  out   {shown}"


TEXT_PART = {"type": "text", "text": "30 days."}
CALLED = 'calls lookup({"topic": "returns"})'
SAID: list[tuple[Any, str]] = [
    # OpenAI's chat completions
    (
        {"messages": [{"role": "user", "content": [TEXT_PART, {"type": "image_url"}]}]},
        "user: 30 days. (image_url)",
    ),
    (
        {"choices": [{"message": {"content": "One moment.", "tool_calls": json.loads(CALLS)}}]},
        "One moment. calls f({})",
    ),
    ({"choices": [{"message": {"content": None, "refusal": "I can't."}}]}, "I can't."),
    # its responses
    ({"model": "m", "input": "how long?", "tools": []}, "how long?"),
    (
        {"model": "m", "input": [{"type": "function_call_output", "call_id": "c", "output": "30"}]},
        "function_call_output: 30",
    ),
    (
        {
            "object": "response",
            "output": [{"type": "message", "content": [{"type": "output_text", "text": "30 days."}]}],
        },
        "30 days.",
    ),
    (
        {
            "object": "response",
            "output": [
                {"type": "reasoning", "summary": []},
                {"type": "function_call", "name": "lookup", "arguments": '{"topic": "returns"}'},
            ],
        },
        f"(reasoning) {CALLED}",
    ),
    # Anthropic's messages
    ({"type": "message", "role": "assistant", "content": [TEXT_PART]}, "30 days."),
    (
        {
            "type": "message",
            "content": [{"type": "tool_use", "name": "lookup", "input": {"topic": "returns"}}],
        },
        CALLED,
    ),
    (
        {
            "messages": [
                {"role": "user", "content": "how long?"},
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "t", "content": [TEXT_PART]}],
                },
            ]
        },
        "user: 30 days. (+1 earlier)",
    ),
    # OpenTelemetry's conventions
    ([{"role": "user", "parts": [{"type": "text", "content": "how long?"}]}], "user: how long?"),
    ([{"role": "assistant", "parts": [{"type": "text", "content": "30 days."}]}], "30 days."),
    (
        [
            {"role": "user", "parts": [{"type": "text", "content": "how long?"}]},
            {
                "role": "assistant",
                "parts": [{"type": "tool_call", "name": "lookup", "arguments": {"topic": "returns"}}],
            },
        ],
        f"assistant: {CALLED} (+1 earlier)",
    ),
    (
        [{"role": "tool", "parts": [{"type": "tool_call_response", "response": [TEXT_PART]}]}],
        "tool: 30 days.",
    ),
    # embeddings
    ({"object": "list", "data": [{"embedding": [0.5] * 1536}] * 2}, "2 embeddings of 1,536 numbers"),
    (
        {"object": "list", "data": [{"embedding": "base64"}]},
        '{"object": "list", "data": [{"embedding": "base64"}]}',
    ),
    # and what only looks like them
    ({"object": "response", "output": [3]}, '{"object": "response", "output": [3]}'),
    ({"type": "message", "content": "text"}, '{"type": "message", "content": "text"}'),
    ([{"role": "user"}], '[{"role": "user"}]'),
    ({"messages": [{"role": 1, "type": [2]}]}, "1: null"),
    ({"messages": [{"content": [[], 3, None]}]}, "?: 3 null"),
    ({"messages": [{"type": "tool_use", "name": 4}]}, "tool_use: calls 4()"),
]


@pytest.mark.parametrize(("value", "said"), SAID)
def test_what_is_said_in_the_words_of_each_vendor(value: Any, said: str) -> None:
    """The last message of a conversation; of an answer its text, or the tools it calls."""
    lines = [line.plain for line in render_request({**ROW, "request": json.dumps(value)}, 160)]
    assert lines[-2] == f"  in    {said}"


def test_an_almost_empty_row_has_a_header() -> None:
    """A row of another writer, with nothing but an id, is drawn without a failure."""
    lines = [line.plain for line in render_request({"databricks_request_id": "x"}, 80)]
    assert lines == ["request x", "  request → None in running"]
