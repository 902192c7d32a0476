"""LlamaIndex query engines, agents and workflows under ``mlflow.llama_index.autolog()``."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any, Final

import orjson
import pytest
from mlflow.entities import Span, Trace
from mlflow.tracing.constant import SpanAttributeKey

from tests.agents.endpoint import Agent, Asked, exception_of, serving
from tests.agents.mlflow_alone import Alone, comparable, mlflow_alone
from tests.model_server import ModelServer, model_server
from tests.older_mlflow import SPLITS_LLAMA_INDEX_STREAMS
from tests.serving.recorded import outline, span_named, trace_of
from tests.support import rows

pytestmark = [pytest.mark.agents, pytest.mark.heavy]

pytest.importorskip("llama_index.core", reason="needs the extra `agents`")
pytest.importorskip("llama_index.llms.openai_like", reason="needs the extra `agents`")

APP: Final = "tests.agents.llama_index_agent:app"
STREAM: Final = pytest.param("/stream", marks=SPLITS_LLAMA_INDEX_STREAMS)


@pytest.fixture(scope="module")
def model() -> Iterator[ModelServer]:
    with model_server() as server:
        yield server


@pytest.fixture(scope="module")
def agent(model: ModelServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    with serving(APP, tmp_path_factory.mktemp("agent"), {"MODEL_SERVER": model.url}) as running:
        yield running


@pytest.fixture(scope="module")
def alone(model: ModelServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alone]:
    env = {"MODEL_SERVER": model.url}
    with mlflow_alone(APP, env, tmp_path_factory.mktemp("alone") / "log") as running:
        yield running


def of_type(trace: Trace, kind: str) -> list[Span]:
    return [span for span in trace.data.spans if span.span_type == kind]


def ancestors(trace: Trace, span: Span) -> list[str]:
    """Names of the spans around a span, innermost first."""
    spans = {other.span_id: other for other in trace.data.spans}
    found = []
    while span.parent_id is not None:
        span = spans[span.parent_id]
        found.append(span.name)
    return found


def dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# --- query engines ---


@pytest.mark.parametrize("path", ["/query", "/aquery", STREAM])
def test_a_query_is_recorded_from_retrieval_to_answer(agent: Agent, path: str) -> None:
    """The documents found, the embedding that found them, the model's prompt, answer and tokens."""
    asked = agent.ask(path, question="shipping?")
    [trace] = asked.traces
    root = next(span for span in trace.data.spans if span.parent_id is None)
    assert root.name == f"RetrieverQueryEngine.{'aquery' if path == '/aquery' else 'query'}"
    assert root.inputs == {"str_or_query_bundle": "shipping?"}
    assert asked.row["trace_state"] == "OK"
    for retriever in of_type(trace, "RETRIEVER"):
        assert {document["metadata"]["source"] for document in retriever.outputs} == {
            "faq/shipping",
            "faq/cards",
        }
        assert all(document["metadata"]["score"] > 0 for document in retriever.outputs)
    embedding, *_ = of_type(trace, "EMBEDDING")
    assert embedding.outputs == [9.0, 1.0, 0.5]
    assert embedding.get_attribute(SpanAttributeKey.MODEL) == "text-embedding-test"
    [llm] = of_type(trace, "CHAT_MODEL")
    assert root.name in ancestors(trace, llm)
    assert "Shipping takes two days." in dump(llm.inputs)
    assert "You asked: Context information is below." in dump(llm.outputs)
    assert "You asked: Context information is below." in dump(root.outputs)
    assert llm.get_attribute(SpanAttributeKey.MODEL) == "gpt-4o-mini"
    usage: Any = llm.get_attribute(SpanAttributeKey.CHAT_USAGE)
    assert usage["input_tokens"] > 50
    assert (asked.row["input_tokens"], asked.row["output_tokens"]) == (
        usage["input_tokens"],
        usage["output_tokens"],
    )


@SPLITS_LLAMA_INDEX_STREAMS
def test_a_streamed_query_reaches_its_client_word_by_word(agent: Agent) -> None:
    """Each token is an event for the client and of the stored response; the answer's span has them all."""
    asked = agent.ask("/stream", question="shipping?")
    text = "".join(asked.events)
    assert len([event for event in asked.events if event]) > 10
    assert orjson.loads(asked.row["response"])["events"] == asked.events
    assert span_named(asked.trace, "RetrieverQueryEngine.query").outputs == text


@pytest.mark.parametrize(
    "path", [pytest.param("/astream", marks=SPLITS_LLAMA_INDEX_STREAMS), "/chat/astream"]
)
def test_an_async_stream_is_recorded_though_mlflow_never_ends_it(
    agent: Agent, alone: Alone, path: str
) -> None:
    """MLflow loses these traces, whose spans stay open for ever. They are in our rows, as such."""
    assert alone.post(path, json={"question": "shipping?"}) == []
    asked = agent.ask(path, question="shipping?")
    [trace] = asked.traces
    assert "You asked:" in "".join(asked.events)
    assert (asked.status, asked.row["trace_state"]) == (200, "IN_PROGRESS")
    assert len(of_type(trace, "RETRIEVER")) == 2
    [llm] = of_type(trace, "CHAT_MODEL")
    assert "shipping?" in dump(llm.inputs)
    assert orjson.loads(asked.row["response"])["databricks_output"]["stream"]["ended"] is True


def test_turns_of_a_chat_are_traces_of_one_row(agent: Agent) -> None:
    """Each turn of a chat engine is a trace; the second sees the first."""
    asked = agent.ask("/chat", questions=["shipping?", "and returns?"])
    assert asked.body == {"answers": ["You asked: shipping?", "You asked: and returns?"]}
    first, second = asked.traces
    for trace in (first, second):
        assert outline(trace).startswith("ContextChatEngine.chat(")
    [llm] = of_type(second, "CHAT_MODEL")
    assert "You asked: shipping?" in dump(llm.inputs)
    assert "and returns?" not in dump(first.to_dict())


def test_a_decorated_function_is_the_root_of_its_query(agent: Agent) -> None:
    """``@mlflow.trace`` and autologging make one trace."""
    asked = agent.ask("/traced", question="shipping?")
    [trace] = asked.traces
    assert outline(trace).startswith("traced(RetrieverQueryEngine.aquery(")


# --- agents and workflows ---


@pytest.mark.parametrize("path", ["/agent", "/agent/stream"])
def test_an_agent_is_recorded_with_the_tool_that_it_calls(agent: Agent, path: str) -> None:
    """The model's wish, the tool's result and the answer made of it, step by step."""
    asked = agent.ask(path, question="tea", tool="lookup")
    [trace] = asked.traces
    root = span_named(trace, "FunctionAgent.run")
    assert (root.span_type, asked.row["trace_state"]) == ("AGENT", "OK")
    assert root.inputs["user_msg"] == "tea"
    assert "The tool says: all about tea" in dump(root.outputs)
    tool = span_named(trace, "FunctionTool.acall")
    assert (tool.span_type, tool.inputs) == ("TOOL", {"kwargs": {"topic": "tea"}})
    assert "all about tea" in dump(tool.outputs)
    assert ancestors(trace, tool) == ["BaseWorkflowAgent.call_tool", "FunctionAgent.run"]
    models = of_type(trace, "CHAT_MODEL")
    assert [ancestors(trace, span)[-1] for span in models] == ["FunctionAgent.run"] * 2
    assert "all about tea" in dump(models[1].inputs)


def test_an_agents_tokens_add_up(agent: Agent) -> None:
    """Those of both calls of its model."""
    asked = agent.ask("/agent", question="tea", tool="lookup")
    assert (asked.row["input_tokens"], asked.row["output_tokens"]) == (9, 8)


def test_an_agents_stream_is_what_its_client_got(agent: Agent) -> None:
    """Tokens of the agent's answer, streamed on as server-sent events, are the stored response."""
    asked = agent.ask("/agent/stream", question="tea", tool="lookup")
    assert "".join(asked.events) == "The tool says: all about tea"
    assert orjson.loads(asked.row["response"])["events"] == asked.events


def test_a_span_in_a_coroutine_tool_is_under_the_tool(agent: Agent) -> None:
    """``mlflow.start_span`` in a tool of an agent that runs as a workflow's step."""
    [trace] = agent.ask("/agent", question="tea", tool="alookup").traces
    assert ancestors(trace, span_named(trace, "inside"))[0] == "FunctionTool.acall"


def test_a_workflow_is_recorded_step_by_step(agent: Agent) -> None:
    """Each step with the model call that it makes, and the workflow's result."""
    asked = agent.ask("/workflow", topic="tea")
    [trace] = asked.traces
    completion = "OpenAILike.acomplete(OpenAILike.acomplete)"
    assert outline(trace) == f"Writing.run(Writing.draft({completion}) Writing.polish({completion}))"
    assert span_named(trace, "Writing.run").outputs == {"result": "You asked: You asked: tea"}
    assert (asked.row["input_tokens"], asked.row["output_tokens"]) == (4, 8)


# --- failures ---


@pytest.mark.parametrize(("behaviour", "code"), [("rate-limited", "429"), ("broken", "500")])
@pytest.mark.parametrize("path", ["/query", "/aquery", STREAM, "/agent"])
def test_a_model_that_refuses_is_found(agent: Agent, path: str, behaviour: str, code: str) -> None:
    """The innermost span of the model holds the vendor's error, and what was found before is there."""
    asked = agent.ask(path, question="shipping?", tool="lookup", behaviour=behaviour)
    [trace] = asked.traces
    assert asked.row["trace_state"] == "ERROR"
    assert asked.row["status_code"] == (200 if path == "/stream" else 500)
    [llm] = of_type(trace, "CHAT_MODEL")
    assert f"Error code: {code}" in exception_of(llm)
    assert bool(of_type(trace, "RETRIEVER")) is (path != "/agent")


@SPLITS_LLAMA_INDEX_STREAMS
@pytest.mark.parametrize("behaviour", ["failing", "cut"])
def test_a_model_that_breaks_off_its_stream_is_found(agent: Agent, behaviour: str) -> None:
    """Under HTTP 200: the row says that the stream failed midway, and the trace is an error."""
    asked = agent.ask("/stream", question="shipping?", behaviour=behaviour)
    assert (asked.status, asked.row["status_code"], asked.row["trace_state"]) == (200, 200, "ERROR")
    assert orjson.loads(asked.row["response"])["databricks_output"]["stream"]["ended"] is False
    [llm] = of_type(asked.trace, "CHAT_MODEL")
    assert ("overloaded" if behaviour == "failing" else "peer closed connection") in exception_of(llm)


def test_a_workflow_whose_step_fails_is_found(agent: Agent) -> None:
    """The step that failed, and none after it."""
    asked = agent.ask("/workflow", topic="tea", behaviour="broken")
    assert (asked.row["status_code"], asked.row["trace_state"]) == (500, "ERROR")
    assert "Error code: 500" in exception_of(span_named(asked.trace, "Writing.draft"))
    assert "Writing.polish" not in {span.name for span in asked.trace.data.spans}


def test_a_tool_that_raises_is_no_failure_of_the_request(agent: Agent) -> None:
    """The agent tells its model, which answers; the tool's span says what happened."""
    asked = agent.ask("/agent", question="tea", tool="failing")
    assert asked.body == {"answer": "The tool says: nothing about tea"}
    assert asked.row["trace_state"] == "OK"
    assert exception_of(span_named(asked.trace, "FunctionTool.acall")) == "ValueError: nothing about tea"


@SPLITS_LLAMA_INDEX_STREAMS
def test_a_client_that_leaves_a_stream_is_recorded(agent: Agent) -> None:
    """499, with the retrieval and the model's inputs; what was open then is recorded as open."""
    row = agent.leave("/stream", json={"question": "shipping?", "behaviour": "slow"}, after="asked")
    trace = trace_of(row)
    assert row["status_code"] == 499
    assert len(of_type(trace, "RETRIEVER")) == 2
    [llm] = of_type(trace, "CHAT_MODEL")
    assert "shipping?" in dump(llm.inputs)


# --- many at once, and what is switched off ---


@SPLITS_LLAMA_INDEX_STREAMS
def test_requests_side_by_side_keep_to_themselves(agent: Agent) -> None:
    """Forty requests of four kinds, eight at a time: each with its own spans, as many as when it is alone."""
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("/query", {}),
        ("/aquery", {}),
        ("/stream", {}),
        ("/agent", {"tool": "alookup"}),
    ]
    questions = [f"question-{number:03}" for number in range(40)]
    expected = [outline(agent.ask(path, question="alone", **body).trace) for path, body in kinds]

    def ask(question: str, kind: tuple[str, dict[str, Any]]) -> Asked:
        path, body = kind
        return agent.ask(path, question=question, **body)

    with ThreadPoolExecutor(8) as pool:
        answered = list(pool.map(ask, questions, cycle(kinds)))
    for question, spans, asked in zip(questions, cycle(expected), answered, strict=False):
        [trace] = asked.traces
        assert outline(trace) == spans
        whole = json.dumps(trace.to_dict(), default=str)
        assert [other for other in questions if other in whole] == [question]
        assert asked.row["trace_state"] == "OK"
    assert len({asked.row["trace_id"] for asked in answered}) == 40


def test_keys_of_vendors_stay_out_of_the_table(agent: Agent) -> None:
    """LlamaIndex describes its models to MLflow; the key is not part of it."""
    agent.ask("/query", question="shipping?")
    assert "secret-key" not in str(rows(agent.table))


def test_autologging_that_is_off_leaves_rows_and_spans_of_ones_own(
    model: ModelServer, tmp_path: Path
) -> None:
    """``log_traces=False`` is respected: no span of LlamaIndex's, all of the agent's."""
    env = {"MODEL_SERVER": model.url, "AUTOLOG": json.dumps({"log_traces": False})}
    with serving(APP, tmp_path, env) as agent:
        query = agent.ask("/query", question="shipping?")
        helper = agent.ask("/agent", question="tea", tool="alookup")
    assert (query.status, query.row["trace_id"], query.traces) == (200, None, [])
    assert [outline(trace) for trace in helper.traces] == ["inside"]


# --- as MLflow records it ---

CALLS: Final[list[tuple[str, dict[str, Any]]]] = [
    *((path, {"question": "shipping?"}) for path in ("/query", "/aquery", "/traced")),
    ("/chat", {"questions": ["shipping?", "and returns?"]}),
    *(("/agent", {"question": "tea", "tool": tool}) for tool in ("lookup", "alookup", "failing")),
    ("/agent/stream", {"question": "tea", "tool": "lookup"}),
    ("/workflow", {"topic": "tea"}),
    ("/query", {"question": "shipping?", "behaviour": "rate-limited"}),
    ("/aquery", {"question": "shipping?", "behaviour": "broken"}),
    ("/agent", {"question": "tea", "tool": "lookup", "behaviour": "broken"}),
    ("/agent/stream", {"question": "tea", "tool": "lookup", "behaviour": "cut"}),
    ("/workflow", {"topic": "tea", "behaviour": "broken"}),
]
STREAMED: Final = [
    pytest.param("/stream", {"question": "shipping?", **how}, marks=SPLITS_LLAMA_INDEX_STREAMS)
    for how in ({}, {"behaviour": "failing"})
]


@pytest.mark.parametrize(("path", "body"), [*CALLS, *STREAMED], ids=str)
def test_traces_are_those_that_mlflow_records(
    agent: Agent, alone: Alone, path: str, body: dict[str, Any]
) -> None:
    """Names, nesting, types, inputs, outputs, attributes, events, status, tokens and previews."""
    theirs = sorted(map(comparable, alone.post(path, json=body)))
    assert theirs
    assert sorted(map(comparable, agent.ask(path, **body).traces)) == theirs
