"""Agents on OpenAI's client under ``mlflow.openai.autolog()``, over a real socket."""

import json
from collections.abc import Iterator
from typing import Any, Final

import mlflow
import pytest
from mlflow.entities import Span

from tests.agents.endpoint import Agent, Asked, serving
from tests.agents.mlflow_alone import Alone, comparable, mlflow_alone
from tests.model_server import ModelServer, model_server
from tests.serving.recorded import outline, span_named, trace_of
from tests.support import output_of

pytestmark = [pytest.mark.agents, pytest.mark.heavy]

pytest.importorskip("openai", reason="needs the extra `agents`")

APP: Final = "tests.agents.openai_agent:app"
QUESTION: Final = "why is the sky blue"
ANSWER: Final = f"You asked: {QUESTION}"
MESSAGES: Final = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
MODEL: Final = "gpt-4o-mini"
ENDS_BROKEN_STREAMS: Final = tuple(map(int, mlflow.__version__.split(".")[:2])) >= (3, 17)
"""Whether MLflow ends the span of a stream that breaks; before, it stays in progress."""


def environment(models: ModelServer, **more: str) -> dict[str, str]:
    return {"MODEL_SERVER": models.url, "MLFLOW_DISABLE_TELEMETRY": "true", **more}


@pytest.fixture(scope="module")
def models() -> Iterator[ModelServer]:
    with model_server() as server:
        yield server


@pytest.fixture(scope="module")
def agent(models: ModelServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    with serving(APP, tmp_path_factory.mktemp("openai"), environment(models)) as running:
        yield running


@pytest.fixture(scope="module")
def alone(models: ModelServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alone]:
    with mlflow_alone(APP, environment(models), tmp_path_factory.mktemp("alone") / "log") as running:
        yield running


def text_of(span: Span) -> Any:
    """What a chat completion says."""
    [choice] = span.outputs["choices"]
    return choice["message"]["content"]


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


# --- chat completions ---


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/chat", {}),
        ("/achat", {}),
        ("/raw", {}),
        ("/parse", {}),
        ("/aparse", {}),
        ("/agent", {}),
        ("/agent", {"question": "the unknown"}),
        ("/gather", {}),
        ("/rag", {}),
        ("/aembed", {}),
        ("/chat", {"behaviour": "rate-limited"}),
        ("/achat", {"behaviour": "broken"}),
        ("/chat", {"behaviour": "flaky", "retries": 2}),
        ("/fallback", {"behaviour": "broken"}),
        ("/stream", {}),
        ("/stream", {"usage": False}),
        ("/astream", {}),
        ("/traced-stream", {}),
        ("/responses", {}),
        ("/aresponses", {}),
        ("/responses-parse", {}),
        ("/responses-stream", {}),
    ],
)
def test_a_trace_is_as_mlflow_records_it(agent: Agent, alone: Alone, path: str, body: dict[str, Any]) -> None:
    """Names, types, nesting, inputs, outputs, attributes, events, status, tokens and previews are equal."""
    ask = {"question": f"{QUESTION} {path} {len(body)}", **body}
    ours = agent.ask(path, **ask)
    [theirs] = alone.post(path, json=ask)
    assert comparable(ours.trace) == comparable(theirs)


@pytest.mark.parametrize(("path", "name"), [("/chat", "Completions"), ("/achat", "AsyncCompletions")])
def test_a_call_of_the_model_alone_is_a_trace(agent: Agent, path: str, name: str) -> None:
    """In a thread of the pool or on the event loop: the call is the root, and its tokens are the row's."""
    asked = agent.ask(path, question=QUESTION)
    span = model_call(asked)
    assert asked.body["choices"][0]["message"]["content"] == ANSWER
    assert (span.name, span.status.status_code.value) == (name, "OK")
    assert (span.inputs["model"], span.inputs["messages"]) == (MODEL, MESSAGES)
    assert text_of(span) == ANSWER
    assert span.model_name == MODEL
    assert asked.trace.info.request_preview == QUESTION
    assert asked.trace.info.response_preview == ANSWER
    assert asked.trace.info.token_usage == {"input_tokens": 7, "output_tokens": 7, "total_tokens": 14}
    row = asked.row
    assert (row["trace_state"], row["span_count"], row["status_code"]) == ("OK", 1, 200)
    assert (row["input_tokens"], row["output_tokens"]) == (7, 7)


def test_the_model_is_told_which_span_calls_it(agent: Agent, models: ModelServer) -> None:
    """MLflow sends a ``traceparent``, so a gateway that is traced, too, finds the span in our table."""
    span = model_call(agent.ask("/chat", question="who calls"))
    [received] = [one for one in models.received if "who calls" in json.dumps(one.body)]
    _, trace_id, span_id, _ = received.headers["traceparent"].split("-")
    assert (f"tr-{trace_id}", span_id) == (span.trace_id, span.span_id)


def test_a_raw_reply_is_recorded_as_what_it_holds(agent: Agent) -> None:
    """``with_raw_response`` gives the agent the vendor's headers, and the trace the completion."""
    asked = agent.ask("/raw", question=QUESTION)
    assert asked.body["request_id"] == "req_test"
    assert text_of(model_call(asked)) == ANSWER


@pytest.mark.parametrize("path", ["/parse", "/aparse"])
def test_structured_output_is_recorded_parsed(agent: Agent, path: str) -> None:
    """``parse`` with a pydantic class."""
    asked = agent.ask(path, question=QUESTION)
    assert asked.body == {"verdict": {"summary": QUESTION}}
    [choice] = model_call(asked).outputs["choices"]
    assert choice["message"]["parsed"] == {"summary": QUESTION}
    assert asked.row["output_tokens"] == 6


# --- agents ---


def test_a_tool_loop_is_one_tree(agent: Agent) -> None:
    """Each call of the model with the messages as they were, though the agent goes on with the same list."""
    asked = agent.ask("/agent", question=QUESTION)
    trace = asked.trace
    assert asked.body == f"The tool says: all about {QUESTION}"
    assert outline(trace) == "agent(Completions Completions lookup)"
    root, first, tool, second = trace.data.spans
    assert [span.span_type for span in trace.data.spans] == ["AGENT", "CHAT_MODEL", "TOOL", "CHAT_MODEL"]
    assert root.inputs == {"ask": {"question": QUESTION, "behaviour": "", "retries": 0, "usage": True}}
    assert root.outputs == asked.body
    assert first.inputs["messages"] == MESSAGES
    [call] = first.outputs["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "lookup", "arguments": json.dumps({"topic": QUESTION})}
    assert (tool.inputs, tool.outputs) == ({"topic": QUESTION}, f"all about {QUESTION}")
    assert [message["role"] for message in second.inputs["messages"]] == [
        "system",
        "user",
        "assistant",
        "tool",
    ]
    assert second.inputs["messages"][2]["tool_calls"] == [call]
    assert text_of(second) == asked.body
    [offered] = first.get_attribute("mlflow.chat.tools") or []
    assert offered["function"]["name"] == "lookup"
    assert (asked.row["input_tokens"], asked.row["output_tokens"]) == (7 + 14, 2 + 10)


def test_a_tool_that_fails_fails_its_agent(agent: Agent) -> None:
    """The model's call stays OK; tool and agent are errors with the exception, and the reply is a 500."""
    asked = agent.ask("/agent", question="the unknown")
    assert asked.status == asked.row["status_code"] == 500
    assert asked.row["trace_state"] == "ERROR"
    assert outline(asked.trace) == "agent(Completions lookup)"
    for name in ("agent", "lookup"):
        failure = failure_of(span_named(asked.trace, name))
        assert failure["exception.type"] == "LookupError"
        assert failure["exception.message"] == "nothing about the unknown"
    assert span_named(asked.trace, "Completions").status.status_code.value == "OK"
    assert asked.row["output_tokens"] == 2


@pytest.mark.parametrize(("path", "root"), [("/gather", "compare"), ("/pool", "pool")])
def test_calls_side_by_side_are_children_of_their_agent(agent: Agent, path: str, root: str) -> None:
    """``asyncio.gather``, and a thread pool of the agent's own."""
    asked = agent.ask(path, question=QUESTION)
    assert asked.body == [f"{ANSWER} {number}" for number in range(3)]
    assert len(asked.traces) == 1
    parent, *calls = asked.trace.data.spans
    assert (parent.name, parent.outputs) == (root, asked.body)
    assert [call.parent_id for call in calls] == [parent.span_id] * 3
    assert sorted(text_of(call) for call in calls) == asked.body
    assert (asked.row["input_tokens"], asked.row["output_tokens"]) == (24, 24)


def test_embeddings_are_spans_beside_the_answer(agent: Agent) -> None:
    """MLflow counts no tokens for them."""
    asked = agent.ask("/rag", question=QUESTION)
    assert outline(asked.trace) == "rag(Completions Embeddings)"
    span = span_named(asked.trace, "Embeddings")
    assert (span.span_type, span.model_name) == ("EMBEDDING", "text-embedding-3-small")
    assert span.inputs["input"] == [QUESTION, "another text"]
    assert [len(entry["embedding"]) for entry in span.outputs["data"]] == [3, 3]
    assert asked.row["input_tokens"] == 7


def test_async_embeddings_are_a_trace(agent: Agent) -> None:
    """Alone, without an agent around."""
    [span] = agent.ask("/aembed", question=QUESTION).trace.data.spans
    assert (span.name, span.span_type) == ("AsyncEmbeddings", "EMBEDDING")


# --- failures ---


@pytest.mark.parametrize("path", ["/chat", "/achat", "/responses"])
@pytest.mark.parametrize(
    ("behaviour", "kind", "message"),
    [
        ("rate-limited", "RateLimitError", "Rate limit reached"),
        ("broken", "InternalServerError", "The server had an error"),
    ],
)
def test_a_model_that_fails_is_an_error(
    agent: Agent, path: str, behaviour: str, kind: str, message: str
) -> None:
    """Without retries the exception is the span's, the trace is an error, the reply a 500."""
    asked = agent.ask(path, question=QUESTION, behaviour=behaviour)
    failure = failure_of(model_call(asked))
    assert failure["exception.type"] == kind
    assert message in failure["exception.message"]
    assert asked.status == asked.row["status_code"] == 500
    assert (asked.row["trace_state"], asked.row["input_tokens"]) == ("ERROR", None)


def test_an_agent_that_helps_itself_is_no_error(agent: Agent) -> None:
    """The failed call is in the trace of a reply that went well."""
    asked = agent.ask("/fallback", question=QUESTION, behaviour="broken")
    assert asked.body == "Please try again later."
    assert (asked.row["status_code"], asked.row["trace_state"]) == (200, "OK")
    assert failure_of(span_named(asked.trace, "Completions"))["exception.type"] == "InternalServerError"


@pytest.mark.parametrize("path", ["/chat", "/achat", "/stream"])
def test_a_retry_of_the_client_is_no_span(agent: Agent, models: ModelServer, path: str) -> None:
    """The client asked twice; the agent called once, and got its answer."""
    question = f"try {path} again"
    asked = agent.ask(path, question=question, behaviour="flaky", retries=2)
    assert len([one for one in models.received if question in json.dumps(one.body)]) == 2
    assert model_call(asked).status.status_code.value == "OK"
    assert asked.row["trace_state"] == "OK"


# --- streams ---


@pytest.mark.parametrize("path", ["/stream", "/astream"])
def test_a_stream_is_recorded_as_its_answer(agent: Agent, path: str) -> None:
    """In the row as the client got it, in the trace as the model gave it, both in one piece."""
    asked = agent.ask(path, question=QUESTION)
    words = [chunk["choices"][0]["delta"].get("content", "") for chunk in asked.events[:-1]]
    assert "".join(words) == ANSWER
    response = response_of(asked)
    assert (response["object"], response["choices"][0]["message"]["content"]) == ("chat.completion", ANSWER)
    stream = output_of(asked.row)["stream"]
    assert (stream["events"], stream["ended"], stream["error"]) == (len(asked.events), True, None)
    span = model_call(asked)
    assert (span.status.status_code.value, text_of(span), span.model_name) == ("OK", ANSWER, MODEL)
    assert span.outputs["object"] == "chat.completion"
    assert span.end_time_ns is not None
    assert (asked.row["input_tokens"], asked.row["output_tokens"]) == (7, 7)


def test_a_stream_without_usage_has_no_tokens(agent: Agent) -> None:
    """OpenAI tells them only to those who ask (``stream_options``)."""
    asked = agent.ask("/stream", question=QUESTION, usage=False)
    assert text_of(model_call(asked)) == ANSWER
    assert (asked.row["input_tokens"], asked.row["output_tokens"]) == (None, None)


def test_a_streamed_tool_call_is_recorded(agent: Agent) -> None:
    """In the row and in the trace, which MLflow would leave empty."""
    asked = agent.ask("/stream-tools", question=QUESTION)
    called = {"name": "lookup", "arguments": json.dumps({"topic": QUESTION})}
    for completion in (response_of(asked), model_call(asked).outputs):
        [choice] = completion["choices"]
        assert [call["function"] for call in choice["message"]["tool_calls"]] == [called]
        assert choice["finish_reason"] == "tool_calls"
    assert asked.row["output_tokens"] == 2


def test_a_generator_around_a_stream_is_its_parent(agent: Agent) -> None:
    """The agent's own generator, traced, with the call of the model below it."""
    asked = agent.ask("/traced-stream", question=QUESTION)
    assert "".join(asked.events) == ANSWER
    assert outline(asked.trace) == "told(AsyncCompletions)"
    root, call = asked.trace.data.spans
    assert [line.removeprefix("data: ").strip() for line in root.outputs] == [
        json.dumps(word) for word in asked.events
    ]
    assert text_of(call) == ANSWER


def test_the_stream_helper_is_one_call(agent: Agent) -> None:
    """``chat.completions.stream``; its two score of arguments that nobody gave are not recorded."""
    asked = agent.ask("/helper", question=QUESTION)
    assert asked.body["verdict"] == {"summary": QUESTION}
    span = model_call(asked)
    assert json.loads(text_of(span)) == {"summary": QUESTION}
    assert "Omit" not in json.dumps(span.to_dict())
    assert span.inputs.keys() == {
        *("model", "messages", "stream", "stream_options", "response_format"),
        *("extra_headers", "extra_query", "extra_body"),
    }
    assert (asked.row["input_tokens"], asked.row["output_tokens"]) == (7, 6)


def test_the_async_stream_helper_is_one_call(agent: Agent) -> None:
    """Its events go to the client as they come."""
    asked = agent.ask("/ahelper", question=QUESTION)
    assert "".join(asked.events) == ANSWER
    span = model_call(asked)
    assert (span.name, text_of(span), span.status.status_code.value) == ("AsyncCompletions", ANSWER, "OK")


@pytest.mark.parametrize("path", ["/stream", "/astream", "/ahelper"])
def test_a_client_that_leaves_a_stream(agent: Agent, path: str) -> None:
    """The call stays in progress, with what was read of the model's answer until then."""
    row = agent.leave(path, after="asked", json={"question": QUESTION, "behaviour": "slow"})
    assert row["status_code"] == 499
    assert output_of(row)["stream"]["cut_off_by_client"] is True
    [span] = trace_of(row).data.spans
    assert (row["trace_state"], span.end_time_ns) == ("IN_PROGRESS", None)
    assert text_of(span).startswith("You asked:")
    assert text_of(span) != ANSWER
    assert (span.inputs["messages"], span.model_name) == (MESSAGES, MODEL)


def test_an_agent_that_leaves_a_stream(agent: Agent) -> None:
    """The reply is fine; the call of the model never ended, and says what was read."""
    asked = agent.ask("/first-word", question=QUESTION)
    assert asked.body == {"answer": "You"}
    assert (asked.row["status_code"], asked.row["trace_state"]) == (200, "IN_PROGRESS")
    assert text_of(model_call(asked)) == "You"


def test_a_stream_that_nobody_reads(agent: Agent) -> None:
    """The agent's span has ended, that of its forgotten call has not."""
    asked = agent.ask("/forgotten", question=QUESTION)
    assert outline(asked.trace) == "forgotten(Completions)"
    call = span_named(asked.trace, "Completions")
    assert (asked.row["trace_state"], call.end_time_ns, call.outputs) == ("OK", None, None)
    assert call.inputs["messages"] == MESSAGES


def assert_broken(asked: Asked, kind: str) -> None:
    """The reply broke off under HTTP 200; the call of the model is an error, for what the client raised."""
    stream = output_of(asked.row)["stream"]
    assert (asked.status, asked.row["status_code"]) == (200, 200)
    assert (stream["ended"], stream["cut_off_by_client"]) == (False, False)
    assert kind in stream["error"]
    if ENDS_BROKEN_STREAMS:
        assert asked.row["trace_state"] == "ERROR"
        assert failure_of(model_call(asked))["exception.type"] == kind
    else:
        assert asked.row["trace_state"] == "IN_PROGRESS"


@pytest.mark.parametrize("path", ["/stream", "/astream"])
@pytest.mark.parametrize(("behaviour", "kind"), [("cut", "RemoteProtocolError"), ("failing", "APIError")])
def test_a_stream_of_the_model_that_breaks(agent: Agent, path: str, behaviour: str, kind: str) -> None:
    """Cut off, or with an error event in its middle: what was said before is kept."""
    asked = agent.ask(path, question=QUESTION, behaviour=behaviour)
    assert_broken(asked, kind)
    span = model_call(asked)
    assert ANSWER.startswith(text_of(span))
    assert text_of(span) == response_of(asked)["choices"][0]["message"]["content"] != ""


# --- responses ---


def said(outputs: dict[str, Any]) -> str:
    [item] = outputs["output"]
    [part] = item["content"]
    return str(part["text"])


def test_a_response_is_a_trace(agent: Agent) -> None:
    """The Responses API, not streamed."""
    asked = agent.ask("/responses", question=QUESTION)
    span = model_call(asked)
    assert (span.name, span.model_name) == ("Responses", MODEL)
    assert (span.inputs["input"], span.inputs["instructions"]) == (QUESTION, "Be brief.")
    assert said(span.outputs) == said(asked.body) == ANSWER
    assert (asked.row["input_tokens"], asked.row["output_tokens"]) == (5, 7)


def test_a_conversation_that_the_vendor_keeps(agent: Agent, models: ModelServer) -> None:
    """Tools, and ``previous_response_id`` in the place of earlier messages."""
    asked = agent.ask("/aresponses", question=QUESTION)
    assert asked.body == f"The tool says: all about {QUESTION}"
    assert outline(asked.trace) == "aresponses(AsyncResponses AsyncResponses lookup)"
    _, first, tool, second = asked.trace.data.spans
    [call] = first.outputs["output"]
    assert (call["type"], json.loads(call["arguments"])) == ("function_call", {"topic": QUESTION})
    assert tool.outputs == f"all about {QUESTION}"
    assert second.inputs["previous_response_id"] == first.outputs["id"]
    [result] = second.inputs["input"]
    assert result == {"type": "function_call_output", "call_id": call["call_id"], "output": tool.outputs}
    assert said(second.outputs) == asked.body


def test_a_structured_response_is_recorded_parsed(agent: Agent) -> None:
    """``responses.parse`` with a pydantic class."""
    asked = agent.ask("/responses-parse", question=QUESTION)
    assert asked.body == {"summary": QUESTION}
    [item] = model_call(asked).outputs["output"]
    assert item["content"][0]["parsed"] == {"summary": QUESTION}


@pytest.mark.parametrize("path", ["/responses-stream", "/responses-helper"])
def test_a_streamed_response_is_recorded_whole(agent: Agent, path: str) -> None:
    """By ``create(stream=True)`` and by the client's helper."""
    asked = agent.ask(path, question=QUESTION)
    span = model_call(asked)
    assert said(response_of(asked)) == said(span.outputs) == ANSWER
    assert (span.outputs["status"], span.status.status_code.value) == ("completed", "OK")
    assert "Omit" not in json.dumps(span.to_dict())
    assert (asked.row["input_tokens"], asked.row["output_tokens"]) == (5, 7)


@pytest.mark.parametrize(("behaviour", "kind"), [("cut", "RemoteProtocolError"), ("failing", "APIError")])
def test_a_streamed_response_that_breaks(agent: Agent, behaviour: str, kind: str) -> None:
    """The same of the Responses API."""
    asked = agent.ask("/responses-stream", question=QUESTION, behaviour=behaviour)
    assert_broken(asked, kind)
    span = model_call(asked)
    assert said(span.outputs) == said(response_of(asked)) != ""
    assert ANSWER.startswith(said(span.outputs))


def test_a_client_that_leaves_a_streamed_response(agent: Agent) -> None:
    """In progress, with the text until then."""
    body = {"question": QUESTION, "behaviour": "slow"}
    row = agent.leave("/responses-helper", after="asked", json=body)
    [span] = trace_of(row).data.spans
    assert (row["status_code"], row["trace_state"]) == (499, "IN_PROGRESS")
    assert said(span.outputs).startswith("You asked:")


# --- all at once, and not at all ---


def test_requests_side_by_side_keep_their_spans(agent: Agent) -> None:
    """Sixty requests at once: no span is lost, doubled, or another's."""
    shapes = {
        "/chat": "Completions",
        "/achat": "AsyncCompletions",
        "/agent": "agent(Completions Completions lookup)",
        "/gather": "compare(AsyncCompletions AsyncCompletions AsyncCompletions)",
        "/pool": "pool(Completions Completions Completions)",
        "/stream": "Completions",
        "/astream": "AsyncCompletions",
        "/traced-stream": "told(AsyncCompletions)",
        "/aresponses": "aresponses(AsyncResponses AsyncResponses lookup)",
        "/responses-stream": "Responses",
    }
    requests = [
        (path, {"question": f"number {number}{path} please"}) for number in range(6) for path in shapes
    ]
    rows = agent.post_all(requests)
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
        for path in ("/chat", "/achat", "/stream", "/responses"):
            asked = silent.ask(path, question=QUESTION)
            assert (asked.status, asked.traces, asked.row["trace_id"]) == (200, [], None)
        assert outline(silent.ask("/agent", question=QUESTION).trace) == "agent(lookup)"
