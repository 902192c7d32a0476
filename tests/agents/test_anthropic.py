"""Agents on Anthropic's client under ``mlflow.anthropic.autolog()``, over a real socket; and its own spans.

Autologging knows ``messages.create`` alone. ``messages.stream`` and ``messages.parse`` are spans where the
client is given MLflow's tracer provider (its argument ``open_telemetry``) instead of autologging.
"""

import json
from collections.abc import Iterator
from typing import Any, Final

import pytest
from mlflow.entities import Span

from tests.agents.endpoint import Agent, Asked, serving
from tests.agents.mlflow_alone import Alone, comparable, mlflow_alone
from tests.model_server import ModelServer, model_server
from tests.serving.recorded import outline, span_named, trace_of
from tests.support import output_of

pytestmark = [pytest.mark.agents, pytest.mark.heavy]

pytest.importorskip("anthropic", reason="needs the extra `agents`")

APP: Final = "tests.agents.anthropic_agent:app"
QUESTION: Final = "why is the sky blue"
ANSWER: Final = f"You asked: {QUESTION}"
MODEL: Final = "claude-sonnet-4-5"


def environment(models: ModelServer, **more: str) -> dict[str, str]:
    return {"MODEL_SERVER": models.url, "MLFLOW_DISABLE_TELEMETRY": "true", **more}


@pytest.fixture(scope="module")
def models() -> Iterator[ModelServer]:
    with model_server() as server:
        yield server


@pytest.fixture(scope="module")
def agent(models: ModelServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    with serving(APP, tmp_path_factory.mktemp("anthropic"), environment(models)) as running:
        yield running


@pytest.fixture(scope="module")
def alone(models: ModelServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alone]:
    with mlflow_alone(APP, environment(models), tmp_path_factory.mktemp("alone") / "log") as running:
        yield running


@pytest.fixture(scope="module")
def own(models: ModelServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    """The same agent with the client's own spans instead of autologging."""
    with serving(APP, tmp_path_factory.mktemp("own"), environment(models, AUTOLOG="off")) as running:
        yield running


def text_of(message: dict[str, Any]) -> str:
    [block] = message["content"]
    return str(block["text"])


def part_of(messages: list[Any]) -> Any:
    """The only part of the last of the messages that the client's own spans hold."""
    [part] = messages[-1]["parts"]
    return part


def response_of(asked: Asked) -> dict[str, Any]:
    """What the row holds of the reply."""
    value: dict[str, Any] = json.loads(asked.row["response"])
    return value


def model_call(asked: Asked) -> Span:
    """The only span of a trace: the call of a model."""
    [span] = asked.trace.data.spans
    assert span.parent_id is None
    assert span.span_type == "CHAT_MODEL"
    return span


def failure_of(span: Span) -> dict[str, Any]:
    """The exception of a span that failed."""
    assert span.status.status_code.value == "ERROR"
    [event] = [event for event in span.events if event.name == "exception"]
    return dict(event.attributes)


# --- messages ---


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/message", {}),
        ("/amessage", {}),
        ("/agent", {}),
        ("/agent", {"question": "the unknown"}),
        ("/gather", {}),
        ("/message", {"behaviour": "rate-limited"}),
        ("/amessage", {"behaviour": "broken"}),
        ("/message", {"behaviour": "flaky", "retries": 2}),
        ("/fallback", {"behaviour": "broken"}),
    ],
)
def test_a_trace_is_as_mlflow_records_it(agent: Agent, alone: Alone, path: str, body: dict[str, Any]) -> None:
    """Names, types, nesting, inputs, outputs, attributes, events, status, tokens and previews are equal."""
    ask = {"question": f"{QUESTION} {path} {len(body)}", **body}
    ours = agent.ask(path, **ask)
    [theirs] = alone.post(path, json=ask)
    assert comparable(ours.trace) == comparable(theirs)


@pytest.mark.parametrize(
    ("path", "name"), [("/message", "Messages.create"), ("/amessage", "AsyncMessages.create")]
)
def test_a_call_of_the_model_alone_is_a_trace(agent: Agent, path: str, name: str) -> None:
    """In a thread of the pool or on the event loop: the call is the root, and its tokens are the row's."""
    asked = agent.ask(path, question=QUESTION)
    span = model_call(asked)
    assert text_of(asked.body) == ANSWER
    assert (span.name, span.status.status_code.value, span.model_name) == (name, "OK", MODEL)
    assert span.inputs == {
        "model": MODEL,
        "max_tokens": 200,
        "system": "Be brief.",
        "messages": [{"role": "user", "content": QUESTION}],
    }
    assert text_of(span.outputs) == ANSWER
    assert asked.trace.info.token_usage == {"input_tokens": 5, "output_tokens": 7, "total_tokens": 12}
    row = asked.row
    assert (row["trace_state"], row["span_count"], row["status_code"]) == ("OK", 1, 200)
    assert (row["input_tokens"], row["output_tokens"]) == (5, 7)


# --- agents ---


def test_a_tool_loop_is_one_tree(agent: Agent) -> None:
    """Each call of the model with the messages as they were, though the agent goes on with the same list."""
    asked = agent.ask("/agent", question=QUESTION)
    assert asked.body == f"The tool says: all about {QUESTION}"
    assert outline(asked.trace) == "agent(Messages.create Messages.create lookup)"
    root, first, tool, second = asked.trace.data.spans
    assert [span.span_type for span in asked.trace.data.spans] == [
        "AGENT",
        "CHAT_MODEL",
        "TOOL",
        "CHAT_MODEL",
    ]
    assert root.inputs == {"ask": {"question": QUESTION, "behaviour": "", "retries": 0}}
    assert len(first.inputs["messages"]) == 1
    [use] = first.outputs["content"]
    assert (use["type"], use["name"], use["input"]) == ("tool_use", "lookup", {"topic": QUESTION})
    assert (tool.inputs, tool.outputs) == ({"topic": QUESTION}, f"all about {QUESTION}")
    question, answer, result = second.inputs["messages"]
    assert question == {"role": "user", "content": QUESTION}
    assert answer["content"][0]["id"] == use["id"] == result["content"][0]["tool_use_id"]
    assert text_of(second.outputs) == asked.body
    [offered] = first.get_attribute("mlflow.chat.tools") or []
    assert offered["function"]["name"] == "lookup"
    assert (asked.row["input_tokens"], asked.row["output_tokens"]) == (5 + 5, 2 + 10)


def test_a_tool_that_fails_fails_its_agent(agent: Agent) -> None:
    """The model's call stays OK; tool and agent are errors with the exception, and the reply is a 500."""
    asked = agent.ask("/agent", question="the unknown")
    assert asked.status == asked.row["status_code"] == 500
    assert asked.row["trace_state"] == "ERROR"
    for name in ("agent", "lookup"):
        assert failure_of(span_named(asked.trace, name))["exception.type"] == "LookupError"
    assert span_named(asked.trace, "Messages.create").status.status_code.value == "OK"


def test_calls_side_by_side_are_children_of_their_agent(agent: Agent) -> None:
    """``asyncio.gather`` of three."""
    asked = agent.ask("/gather", question=QUESTION)
    assert asked.body == [f"{ANSWER} {number}" for number in range(3)]
    parent, *calls = asked.trace.data.spans
    assert [call.parent_id for call in calls] == [parent.span_id] * 3
    assert sorted(text_of(call.outputs) for call in calls) == asked.body
    assert (asked.row["input_tokens"], asked.row["output_tokens"]) == (18, 24)


# --- failures ---


@pytest.mark.parametrize("path", ["/message", "/amessage"])
@pytest.mark.parametrize(
    ("behaviour", "kind"), [("rate-limited", "RateLimitError"), ("broken", "InternalServerError")]
)
def test_a_model_that_fails_is_an_error(agent: Agent, path: str, behaviour: str, kind: str) -> None:
    """Without retries the exception is the span's, the trace is an error, the reply a 500."""
    asked = agent.ask(path, question=QUESTION, behaviour=behaviour)
    span = model_call(asked)
    assert failure_of(span)["exception.type"] == kind
    assert str(span.status.description).startswith(kind)
    assert asked.status == asked.row["status_code"] == 500
    assert (asked.row["trace_state"], asked.row["input_tokens"]) == ("ERROR", None)


def test_an_agent_that_helps_itself_is_no_error(agent: Agent) -> None:
    """The failed call is in the trace of a reply that went well."""
    asked = agent.ask("/fallback", question=QUESTION, behaviour="broken")
    assert asked.body == "Please try again later."
    assert (asked.row["status_code"], asked.row["trace_state"]) == (200, "OK")
    assert failure_of(span_named(asked.trace, "Messages.create"))["exception.type"] == "InternalServerError"


@pytest.mark.parametrize("path", ["/message", "/amessage", "/stream"])
def test_a_retry_of_the_client_is_no_span(agent: Agent, models: ModelServer, path: str) -> None:
    """The client asked twice; the agent called once, and got its answer."""
    question = f"try {path} again"
    asked = agent.ask(path, question=question, behaviour="flaky", retries=2)
    assert len([one for one in models.received if question in json.dumps(one.body)]) == 2
    assert model_call(asked).status.status_code.value == "OK"
    assert asked.row["trace_state"] == "OK"


# --- streams ---


@pytest.mark.parametrize("path", ["/stream", "/astream"])
def test_a_stream_is_recorded_as_its_message(agent: Agent, alone: Alone, path: str) -> None:
    """In the row as the client got it, in the trace as the model gave it; MLflow takes the stream itself."""
    asked = agent.ask(path, question=QUESTION)
    assert [event["type"] for event in asked.events][-1] == "message_stop"
    response = response_of(asked)
    assert (response["type"], text_of(response), response["stop_reason"]) == ("message", ANSWER, "end_turn")
    stream = output_of(asked.row)["stream"]
    assert (stream["events"], stream["ended"], stream["error"]) == (len(asked.events), True, None)
    span = model_call(asked)
    assert (span.status.status_code.value, text_of(span.outputs), span.model_name) == ("OK", ANSWER, MODEL)
    assert span.outputs["stop_reason"] == "end_turn"
    assert (asked.row["input_tokens"], asked.row["output_tokens"]) == (5, 7)
    [theirs] = alone.post(path, json={"question": QUESTION})
    assert "Stream object at 0x" in theirs.data.spans[0].outputs


def test_a_streamed_tool_call_is_recorded(agent: Agent) -> None:
    """With its input, in the row and in the trace."""
    asked = agent.ask("/stream-tools", question=QUESTION)
    for message in (response_of(asked), model_call(asked).outputs):
        [use] = message["content"]
        assert (use["type"], use["name"], use["input"]) == ("tool_use", "lookup", {"topic": QUESTION})
        assert message["stop_reason"] == "tool_use"
    assert asked.row["output_tokens"] == 2


def test_a_generator_around_a_stream_is_its_parent(agent: Agent) -> None:
    """The agent's own generator, traced, with the call of the model below it."""
    asked = agent.ask("/traced-stream", question=QUESTION)
    assert "".join(asked.events) == ANSWER
    assert outline(asked.trace) == "told(AsyncMessages.create)"
    root, call = asked.trace.data.spans
    assert len(root.outputs) == len(asked.events)
    assert text_of(call.outputs) == ANSWER


@pytest.mark.parametrize(("path", "state"), [("/stream", "IN_PROGRESS"), ("/astream", "ERROR")])
def test_a_client_that_leaves_a_stream(agent: Agent, path: str, state: str) -> None:
    """What was read until then is kept; Starlette cancels async generators, which makes the call an error."""
    row = agent.leave(path, after="asked", json={"question": QUESTION, "behaviour": "slow"})
    assert (row["status_code"], row["trace_state"]) == (499, state)
    assert output_of(row)["stream"]["cut_off_by_client"] is True
    [span] = trace_of(row).data.spans
    assert text_of(span.outputs).startswith("You asked:")
    assert text_of(span.outputs) != ANSWER
    assert span.outputs["stop_reason"] is None


def test_an_agent_that_leaves_a_stream(agent: Agent) -> None:
    """The reply is fine; the call of the model never ended, and says what was read."""
    asked = agent.ask("/first-word", question=QUESTION)
    assert asked.body == {"answer": "You"}
    assert (asked.row["status_code"], asked.row["trace_state"]) == (200, "IN_PROGRESS")
    assert text_of(model_call(asked).outputs) == "You"


def test_a_stream_that_nobody_reads(agent: Agent) -> None:
    """The agent's span has ended, that of its forgotten call has not."""
    asked = agent.ask("/forgotten", question=QUESTION)
    assert outline(asked.trace) == "forgotten(Messages.create)"
    call = span_named(asked.trace, "Messages.create")
    assert (asked.row["trace_state"], call.end_time_ns, call.outputs) == ("OK", None, None)


@pytest.mark.parametrize("path", ["/stream", "/astream"])
@pytest.mark.parametrize(
    ("behaviour", "kind"), [("cut", "RemoteProtocolError"), ("failing", "APIStatusError")]
)
def test_a_stream_of_the_model_that_breaks(agent: Agent, path: str, behaviour: str, kind: str) -> None:
    """Cut off, or with an error event in its middle: an error, with what was said before."""
    asked = agent.ask(path, question=QUESTION, behaviour=behaviour)
    assert (asked.status, asked.row["status_code"], asked.row["trace_state"]) == (200, 200, "ERROR")
    stream = output_of(asked.row)["stream"]
    assert (stream["ended"], stream["cut_off_by_client"]) == (False, False)
    assert kind in stream["error"]
    span = model_call(asked)
    assert failure_of(span)["exception.type"] == kind
    assert text_of(span.outputs) == text_of(response_of(asked)) != ""
    assert ANSWER.startswith(text_of(span.outputs))
    assert asked.row["input_tokens"] == 5


@pytest.mark.parametrize("path", ["/helper", "/ahelper", "/parse"])
def test_what_autologging_does_not_know_leaves_no_span(agent: Agent, path: str) -> None:
    """``messages.stream`` and ``messages.parse`` go round ``messages.create``; the row has the reply."""
    asked = agent.ask(path, question=QUESTION)
    assert QUESTION in asked.text
    spans = asked.trace.data.spans if asked.traces else []
    assert [span.name for span in spans] == (["helper"] if path == "/helper" else [])


# --- the client's own spans ---


@pytest.mark.parametrize("path", ["/message", "/amessage", "/parse"])
def test_an_own_span_of_a_message(own: Agent, path: str) -> None:
    """A call is a chat model's span with its messages, model and tokens."""
    asked = own.ask(path, question=QUESTION)
    span = model_call(asked)
    assert (span.name, span.status.status_code.value) == ("anthropic.messages.create", "OK")
    assert part_of(span.inputs) == {"type": "text", "content": QUESTION}
    assert QUESTION in part_of(span.outputs)["content"]
    assert span.model_name == MODEL
    assert (asked.row["input_tokens"], asked.row["output_tokens"]) == (5, 6 if path == "/parse" else 7)
    assert asked.row["trace_state"] == "OK"


def test_the_stream_helper_is_a_span_of_its_agent(own: Agent) -> None:
    """``messages.stream`` below ``@mlflow.trace``, with the answer in one piece."""
    asked = own.ask("/helper", question=QUESTION)
    assert asked.body == ANSWER
    assert outline(asked.trace) == "helper(anthropic.messages.create)"
    span = span_named(asked.trace, "anthropic.messages.create")
    assert part_of(span.outputs) == {"type": "text", "content": ANSWER}
    assert (asked.row["input_tokens"], asked.row["output_tokens"]) == (5, 7)


def test_the_async_stream_helper_is_a_span(own: Agent) -> None:
    """Its events go to the client as they come; the row holds the message they add up to."""
    asked = own.ask("/ahelper", question=QUESTION)
    assert text_of(response_of(asked)) == ANSWER
    assert "events" not in response_of(asked)
    assert part_of(model_call(asked).outputs) == {"type": "text", "content": ANSWER}


def test_a_client_that_leaves_the_stream_helper(own: Agent) -> None:
    """The span has ended with what was read."""
    row = own.leave("/ahelper", after="asked", json={"question": QUESTION, "behaviour": "slow"})
    [span] = trace_of(row).data.spans
    assert row["status_code"] == 499
    assert part_of(span.outputs)["content"].startswith("You asked:")
    assert span.end_time_ns is not None


def test_a_tool_loop_of_own_spans_is_one_tree(own: Agent) -> None:
    """The calls of the model and MLflow's span of the tool, below the agent's."""
    asked = own.ask("/agent", question=QUESTION)
    name = "anthropic.messages.create"
    assert outline(asked.trace) == f"agent({name} {name} lookup)"
    _, first, _, second = asked.trace.data.spans
    call = part_of(first.outputs)
    assert (call["type"], call["name"], call["arguments"]) == ("tool_call", "lookup", {"topic": QUESTION})
    assert part_of(second.outputs)["content"] == asked.body
    assert (asked.row["input_tokens"], asked.row["output_tokens"]) == (10, 12)


@pytest.mark.parametrize(
    ("path", "body", "status", "kind"),
    [
        ("/message", {"behaviour": "broken"}, 500, "api_error"),
        ("/amessage", {"behaviour": "rate-limited"}, 500, "rate_limit_error"),
        ("/ahelper", {"behaviour": "cut"}, 200, "connection_error"),
        ("/astream", {"behaviour": "failing"}, 200, "server_error"),
    ],
)
def test_an_own_span_that_fails(own: Agent, path: str, body: dict[str, Any], status: int, kind: str) -> None:
    """The client says of what kind the error was."""
    asked = own.ask(path, question=QUESTION, **body)
    span = model_call(asked)
    assert (asked.status, asked.row["trace_state"]) == (status, "ERROR")
    assert span.get_attribute("error.type") == kind
    assert span.status.status_code.value == "ERROR"


# --- all at once, and not at all ---


@pytest.mark.parametrize("spans", ["agent", "own"])
def test_requests_side_by_side_keep_their_spans(spans: str, request: pytest.FixtureRequest) -> None:
    """Fifty requests at once: no span is lost, doubled, or another's."""
    running: Agent = request.getfixturevalue(spans)
    call, acall = ("Messages.create", "AsyncMessages.create")
    if spans == "own":
        call = acall = "anthropic.messages.create"
    shapes = {
        "/message": call,
        "/amessage": acall,
        "/agent": f"agent({call} {call} lookup)",
        "/gather": f"compare({acall} {acall} {acall})",
        "/astream": acall,
        "/traced-stream": f"told({acall})",
    }
    requests = [
        (path, {"question": f"number {number}{path} please"}) for number in range(8) for path in shapes
    ]
    rows = running.post_all(requests)
    for (path, body), row in zip(requests, rows, strict=True):
        trace = trace_of(row)
        assert outline(trace) == shapes[path]
        for span in trace.data.spans:
            values = json.dumps([span.inputs, span.outputs])
            assert values.count("number ") == values.count(body["question"]) > 0
            assert span.end_time_ns is not None


@pytest.mark.parametrize("options", [{"log_traces": False}, {"disable": True}])
def test_autologging_that_is_switched_off(
    models: ModelServer, tmp_path_factory: pytest.TempPathFactory, options: dict[str, bool]
) -> None:
    """``log_traces=False`` leaves the agent's own spans, and of the model's calls none."""
    env = environment(models, AUTOLOG=json.dumps(options))
    with serving(APP, tmp_path_factory.mktemp("off"), env) as silent:
        for path in ("/message", "/amessage", "/stream"):
            asked = silent.ask(path, question=QUESTION)
            assert (asked.status, asked.traces, asked.row["trace_id"]) == (200, [], None)
        assert outline(silent.ask("/agent", question=QUESTION).trace) == "agent(lookup)"
