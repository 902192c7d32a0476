"""LangChain chains and LangGraph agents under ``mlflow.langchain.autolog()``, from a socket to their rows."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any, Final

import orjson
import pytest
from mlflow.tracing.constant import SpanAttributeKey, TraceMetadataKey

from tests.agents.endpoint import Agent, Asked, exception_of, serving
from tests.agents.mlflow_alone import Alone, comparable, mlflow_alone
from tests.model_server import ModelServer, model_server
from tests.serving.recorded import outline, span_named, trace_of
from tests.support import rows

pytestmark = [pytest.mark.agents, pytest.mark.heavy]

pytest.importorskip("langchain", reason="needs the extra `agents`")
pytest.importorskip("langgraph", reason="needs the extra `agents`")

APP: Final = "tests.agents.langchain_agent:app"
INLINE: Final = {"AUTOLOG": json.dumps({"run_tracer_inline": True})}
SOURCES: Final = "RunnableParallel<context,question>(RunnablePassthrough RunnableSequence(Shop joined))"
CHAIN: Final = f"RunnableSequence(ChatOpenAI ChatPromptTemplate {SOURCES} StrOutputParser)"
STREAMED_CHAIN: Final = f"RunnableSequence(ChatOpenAI(StrOutputParser) ChatPromptTemplate {SOURCES})"


def agent_with(tool: str) -> str:
    return f"helper(model(ChatOpenAI) model(ChatOpenAI) tools({tool}))"


@pytest.fixture(scope="module")
def model() -> Iterator[ModelServer]:
    with model_server() as server:
        yield server


@pytest.fixture(scope="module")
def agent(model: ModelServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    with serving(APP, tmp_path_factory.mktemp("agent"), {"MODEL_SERVER": model.url}) as running:
        yield running


@pytest.fixture(scope="module")
def inline_agent(model: ModelServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    """With MLflow's callbacks on the event loop, rather than in threads."""
    env = {"MODEL_SERVER": model.url, **INLINE}
    with serving(APP, tmp_path_factory.mktemp("inline"), env) as running:
        yield running


@pytest.fixture(scope="module")
def alone(model: ModelServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alone]:
    env = {"MODEL_SERVER": model.url}
    with mlflow_alone(APP, env, tmp_path_factory.mktemp("alone") / "log") as running:
        yield running


@pytest.fixture(scope="module")
def inline_alone(model: ModelServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alone]:
    env = {"MODEL_SERVER": model.url, **INLINE}
    with mlflow_alone(APP, env, tmp_path_factory.mktemp("inline_alone") / "log") as running:
        yield running


# --- chains ---


@pytest.mark.parametrize(
    ("how", "spans"),
    [("invoke", CHAIN), ("ainvoke", CHAIN), ("stream", STREAMED_CHAIN), ("astream", CHAIN)],
)
def test_a_chain_is_recorded_step_by_step(agent: Agent, how: str, spans: str) -> None:
    """Retrieved documents, the prompt made of them, the model with its tokens, and the answer."""
    asked = agent.ask(f"/chain/{how}", question="shipping takes long")
    assert asked.status == 200
    assert outline(asked.trace) == spans
    assert (asked.row["trace_state"], asked.row["span_count"]) == ("OK", 9)
    [document] = span_named(asked.trace, "Shop").outputs
    assert document["page_content"] == "Shipping takes two days."
    assert document["metadata"] == {"source": "faq/1"}
    llm = span_named(asked.trace, "ChatOpenAI")
    assert [message["content"] for message in llm.inputs["messages"]] == [
        "Answer from: Shipping takes two days.",
        "shipping takes long",
    ]
    [choice] = llm.outputs["choices"]
    assert choice["message"]["content"] == "You asked: shipping takes long"
    assert llm.get_attribute(SpanAttributeKey.MODEL) == "gpt-4o-mini"
    assert llm.get_attribute(SpanAttributeKey.CHAT_USAGE) == {
        "input_tokens": 9,
        "output_tokens": 5,
        "total_tokens": 14,
    }
    assert (asked.row["input_tokens"], asked.row["output_tokens"]) == (9, 5)
    [root] = [span for span in asked.trace.data.spans if span.parent_id is None]
    assert (root.inputs, root.outputs) == ("shipping takes long", "You asked: shipping takes long")
    kinds = {span.name: span.span_type for span in asked.trace.data.spans}
    assert kinds["Shop"] == "RETRIEVER"
    assert kinds["ChatOpenAI"] == "CHAT_MODEL"
    assert kinds["RunnableSequence"] == "CHAIN"


@pytest.mark.parametrize("how", ["stream", "astream"])
def test_a_streamed_chain_reaches_its_client_word_by_word(agent: Agent, how: str) -> None:
    """Each token is an event for the client, an event of the stored response, and one of the model's span."""
    asked = agent.ask(f"/chain/{how}", question="gift ideas")
    assert [word for word in asked.events if word] == ["You", " asked:", " gift", " ideas"]
    events = span_named(asked.trace, "ChatOpenAI").events
    tokens = [event.attributes["token"] for event in events if event.name == "new_token"]
    assert [token for token in tokens if token] == ["You", " asked:", " gift", " ideas"]
    stored = orjson.loads(asked.row["response"])
    assert stored["events"] == asked.events
    assert stored["databricks_output"]["stream"]["ended"] is True


@pytest.mark.parametrize("how", ["batch", "abatch"])
def test_a_batch_is_one_row_with_a_trace_for_each_of_its_questions(agent: Agent, how: str) -> None:
    """What LangChain runs side by side in threads or tasks is kept apart."""
    questions = ["shipping a", "returns b", "gift c"]
    asked = agent.ask(f"/chain/{how}", questions=questions)
    assert asked.body == {"answers": [f"You asked: {question}" for question in questions]}
    assert [outline(trace) for trace in asked.traces] == [CHAIN] * 3
    assert sorted(first_input(trace) for trace in asked.traces) == sorted(questions)
    for trace in asked.traces:
        assert mentioned(trace, questions) == {first_input(trace)}


def first_input(trace: Any) -> Any:
    [root] = [span for span in trace.data.spans if span.parent_id is None]
    return root.inputs


def mentioned(trace: Any, texts: list[str]) -> set[str]:
    """Those of the texts that occur anywhere in the trace."""
    whole = json.dumps(trace.to_dict(), default=str)
    return {text for text in texts if text in whole}


def test_a_decorated_function_is_the_root_of_its_chain(agent: Agent) -> None:
    """``@mlflow.trace`` and autologging make one trace."""
    asked = agent.ask("/chain/traced", question="shipping takes long")
    assert outline(asked.trace) == f"traced({CHAIN})"
    assert span_named(asked.trace, "traced").span_type == "AGENT"


# --- agents ---


@pytest.mark.parametrize(
    ("path", "tool"),
    [
        ("/agent/invoke", "lookup"),
        ("/agent/ainvoke", "lookup"),
        ("/agent/ainvoke", "alookup"),
        ("/agent/astream", "alookup"),
    ],
)
def test_an_agent_is_recorded_with_the_tool_that_it_calls(agent: Agent, path: str, tool: str) -> None:
    """The model's wish, the tool's result, the answer made of it, and the tokens of both calls together."""
    asked = agent.ask(path, question="tea", tool=tool)
    assert outline(asked.trace) == agent_with(tool)
    first, second = models(asked)
    [choice] = first.outputs["choices"]
    [call] = choice["message"]["tool_calls"]
    assert (call["function"]["name"], call["function"]["arguments"]) == (tool, '{"topic": "tea"}')
    [offered] = first.get_attribute(SpanAttributeKey.CHAT_TOOLS)
    assert offered["function"]["name"] == tool
    result = span_named(asked.trace, tool)
    assert (result.span_type, result.inputs) == ("TOOL", {"topic": "tea"})
    assert result.outputs["content"] == "all about tea"
    assert second.inputs["messages"][-1]["content"] == "all about tea"
    [choice] = second.outputs["choices"]
    assert choice["message"]["content"] == "The tool says: all about tea"
    assert (asked.row["input_tokens"], asked.row["output_tokens"]) == (9, 8)
    assert asked.row["trace_state"] == "OK"


def models(asked: Asked) -> list[Any]:
    found = [span for span in asked.trace.data.spans if span.name == "ChatOpenAI"]
    return sorted(found, key=lambda span: span.start_time_ns)


def test_an_agents_stream_is_tokens_and_steps(agent: Agent) -> None:
    """Messages and updates, streamed on as server-sent events, are the stored response."""
    asked = agent.ask("/agent/astream", question="tea", tool="alookup")
    steps = [event["finished"] for event in asked.events if "finished" in event]
    assert steps == [["model"], ["tools"], ["model"]]
    assert "".join(event["token"] for event in asked.events[3:] if "token" in event) == (
        "The tool says: all about tea"
    )
    assert orjson.loads(asked.row["response"])["events"] == asked.events


def test_a_model_that_a_tool_asks_is_under_the_tool(agent: Agent) -> None:
    """A tool with a model call of its own keeps it, in threads and on the event loop."""
    for path in ("/agent/invoke", "/agent/ainvoke"):
        asked = agent.ask(path, question="tea", tool="asking")
        assert outline(asked.trace) == agent_with("asking(ChatOpenAI)")
        assert asked.row["input_tokens"] == 14


def test_a_decorated_function_is_the_root_of_its_agent(agent: Agent) -> None:
    """``@mlflow.trace`` on a coroutine and autologging make one trace."""
    asked = agent.ask("/agent/traced", question="tea", tool="alookup")
    assert outline(asked.trace) == f"agent_traced({agent_with('alookup')})"


def test_steps_side_by_side_are_siblings(agent: Agent) -> None:
    """A graph that asks the model three things at once has each answer under the step that asked."""
    for path in ("/survey", "/survey/async"):
        asked = agent.ask(path, topics=["a", "b", "c"])
        asks = "ask(ChatOpenAI)"
        assert outline(asked.trace) == f"survey(__start__(each_topic) {asks} {asks} {asks})"
        spans = {span.span_id: span for span in asked.trace.data.spans}
        for llm in models(asked):
            assert llm.inputs["messages"][0]["content"] == spans[llm.parent_id].inputs["topic"]


def test_a_graph_that_waits_for_a_person_is_two_rows_of_one_session(agent: Agent) -> None:
    """The interrupted request and the one that resumes it have their own traces, and the thread's id."""
    begun = agent.ask("/order", item="kettle", thread="thread-7")
    resumed = agent.ask("/order/approve", thread="thread-7")
    assert begun.body == {"asks": [{"approve": "kettle"}]}
    assert resumed.body == {"steps": ["approved", "shipped kettle"]}
    assert (outline(begun.trace), outline(resumed.trace)) == ("order(approve)", "order(approve ship)")
    assert begun.row["trace_id"] != resumed.row["trace_id"]
    for asked in (begun, resumed):
        assert asked.row["trace_state"] == "OK"
        assert asked.trace.info.trace_metadata[TraceMetadataKey.TRACE_SESSION] == "thread-7"
    assert "GraphInterrupt" in failure(begun, "approve")


def failure(asked: Asked, name: str) -> str:
    return exception_of(span_named(asked.trace, name))


# --- spans of one's own, in tools ---


@pytest.mark.parametrize("path", ["/agent/invoke", "/agent/ainvoke"])
def test_a_span_in_a_tool_is_under_the_tool(agent: Agent, path: str) -> None:
    """``mlflow.start_span`` in a tool that is a function, in a graph that runs in threads or on the loop."""
    asked = agent.ask(path, question="tea", tool="nested")
    assert outline(asked.trace) == agent_with("nested(inside)")
    assert span_named(asked.trace, "inside").inputs == {"topic": "tea"}


def test_a_span_in_a_coroutine_tool_is_in_the_row(agent: Agent) -> None:
    """MLflow's callbacks run in threads then, so the span knows of no tool: a trace of its own, same row."""
    asked = agent.ask("/agent/ainvoke", question="tea", tool="anested")
    assert [outline(trace) for trace in asked.traces] == [agent_with("anested"), "inside"]


def test_a_span_in_a_coroutine_tool_is_under_the_tool_with_callbacks_inline(inline_agent: Agent) -> None:
    """``run_tracer_inline=True`` is MLflow's way to nest them."""
    asked = inline_agent.ask("/agent/ainvoke", question="tea", tool="anested")
    [trace] = asked.traces
    spans = {span.span_id: span.name for span in trace.data.spans}
    inside = span_named(trace, "inside")
    assert spans[str(inside.parent_id)] == "anested"
    assert asked.row["span_count"] == 8


# --- failures ---


@pytest.mark.parametrize("path", ["/agent/invoke", "/agent/ainvoke", "/agent/astream"])
def test_a_tool_that_raises_is_found(agent: Agent, path: str) -> None:
    """The request fails, and its trace says in which tool and why; what went before is there."""
    asked = agent.ask(path, question="tea", tool="failing")
    assert asked.row["trace_state"] == "ERROR"
    assert asked.row["status_code"] == (200 if path == "/agent/astream" else 500)
    assert outline(asked.trace) == "helper(model(ChatOpenAI) tools(failing))"
    assert failure(asked, "failing") == "ValueError: nothing about tea"
    assert asked.row["input_tokens"] == 3


@pytest.mark.parametrize("path", ["/chain/invoke", "/chain/ainvoke", "/agent/invoke", "/agent/astream"])
@pytest.mark.parametrize(("behaviour", "code"), [("rate-limited", "429"), ("broken", "500")])
def test_a_model_that_refuses_is_found(agent: Agent, path: str, behaviour: str, code: str) -> None:
    """The model's span holds the vendor's error."""
    asked = agent.ask(path, question="tea", tool="lookup", behaviour=behaviour)
    assert asked.row["trace_state"] == "ERROR"
    assert f"Error code: {code}" in failure(asked, "ChatOpenAI")


@pytest.mark.parametrize("path", ["/chain/stream", "/chain/astream", "/agent/astream"])
@pytest.mark.parametrize(
    ("behaviour", "error"), [("failing", "APIError: overloaded"), ("cut", "peer closed connection")]
)
def test_a_model_that_breaks_off_its_stream_is_found(
    agent: Agent, path: str, behaviour: str, error: str
) -> None:
    """Under HTTP 200: the row says that the stream failed midway, the trace in which span."""
    asked = agent.ask(path, question="tea", tool="lookup", behaviour=behaviour)
    assert (asked.status, asked.row["status_code"], asked.row["trace_state"]) == (200, 200, "ERROR")
    assert error in failure(asked, "ChatOpenAI")
    assert orjson.loads(asked.row["response"])["databricks_output"]["stream"]["ended"] is False


def test_a_retriever_that_fails_is_found(agent: Agent) -> None:
    """The branch beside it, which went well, is there."""
    asked = agent.ask("/chain/invoke", question="unsearchable")
    assert (asked.row["status_code"], asked.row["trace_state"]) == (500, "ERROR")
    assert failure(asked, "Shop") == "ConnectionError: the index is away"
    assert span_named(asked.trace, "RunnablePassthrough").outputs == "unsearchable"


def test_a_model_that_another_stands_in_for_is_no_failure_of_the_request(agent: Agent) -> None:
    """The failed call and the one that answered are both there; the trace is fine."""
    asked = agent.ask("/chain/fallback", question="tea")
    assert asked.body == {"answer": "You asked: tea"}
    assert (outline(asked.trace), asked.row["trace_state"]) == (
        "RunnableWithFallbacks(ChatOpenAI ChatOpenAI)",
        "OK",
    )
    assert [span.status.status_code.value for span in models(asked)] == ["ERROR", "OK"]


@pytest.mark.parametrize(
    ("path", "failed", "spans"),
    [
        ("/chain/stream", False, STREAMED_CHAIN),
        ("/chain/astream", True, CHAIN),
        ("/agent/astream", True, agent_with("alookup")),
    ],
)
def test_a_client_that_leaves_midway_is_recorded(agent: Agent, path: str, failed: bool, spans: str) -> None:
    """499, with the spans until then: cancelled on the event loop; a generator in a thread is dropped."""
    body = {"question": "tea time", "tool": "alookup", "behaviour": "slow"}
    row = agent.leave(path, json=body, after="asked" if "chain" in path else "tool")
    trace = trace_of(row)
    assert (row["status_code"], outline(trace)) == (499, spans)
    assert orjson.loads(row["response"])["databricks_output"]["stream"]["cut_off_by_client"] is True
    assert (row["trace_state"] == "ERROR") is failed
    events = [event for span in trace.data.spans for event in span.events if event.name == "exception"]
    assert {event.attributes["exception.type"] for event in events} == (
        {"CancelledError"} if failed else set()
    )


# --- many at once, and what is switched off ---


def test_requests_side_by_side_keep_to_themselves(agent: Agent) -> None:
    """Sixty requests of six kinds, twelve at a time: no span lost, none doubled, none of another request."""
    kinds: list[tuple[str, dict[str, Any], str]] = [
        ("/chain/invoke", {}, CHAIN),
        ("/chain/astream", {}, CHAIN),
        ("/chain/stream", {}, STREAMED_CHAIN),
        ("/agent/invoke", {"tool": "nested"}, agent_with("nested(inside)")),
        ("/agent/astream", {"tool": "alookup"}, agent_with("alookup")),
        ("/agent/ainvoke", {"tool": "asking"}, agent_with("asking(ChatOpenAI)")),
    ]
    questions = [f"question-{number:03}" for number in range(60)]

    def ask(question: str, kind: tuple[str, dict[str, Any], str]) -> Asked:
        path, body, _ = kind
        return agent.ask(path, question=question, **body)

    with ThreadPoolExecutor(12) as pool:
        answered = list(pool.map(ask, questions, cycle(kinds)))
    for question, (_, _, spans), asked in zip(questions, cycle(kinds), answered, strict=False):
        [trace] = asked.traces
        assert outline(trace) == spans
        assert mentioned(trace, questions) == {question}
        assert asked.row["trace_state"] == "OK"
    assert len({asked.row["trace_id"] for asked in answered}) == 60


def test_keys_of_vendors_stay_out_of_the_table(agent: Agent) -> None:
    """LangChain describes its models to MLflow; the key is not part of it."""
    agent.ask("/chain/invoke", question="tea")
    assert "secret-key" not in str(rows(agent.table))


def test_autologging_that_is_off_leaves_rows_and_spans_of_ones_own(
    model: ModelServer, tmp_path: Path
) -> None:
    """``log_traces=False`` is respected: no span of LangChain's, all of the agent's."""
    env = {"MODEL_SERVER": model.url, "AUTOLOG": json.dumps({"log_traces": False})}
    with serving(APP, tmp_path, env) as agent:
        chain = agent.ask("/chain/invoke", question="tea")
        helper = agent.ask("/agent/ainvoke", question="tea", tool="anested")
    assert chain.body == {"answer": "You asked: tea"}
    assert (chain.row["trace_id"], chain.row["span_count"], chain.traces) == (None, None, [])
    assert [outline(trace) for trace in helper.traces] == ["inside"]


# --- as MLflow records it ---

AGENTS: Final = ("lookup", "alookup", "failing", "nested", "anested", "asking")
CALLS: Final[list[tuple[str, dict[str, Any]]]] = [
    *(
        (f"/chain/{how}", {"question": "shipping takes"})
        for how in ("invoke", "ainvoke", "stream", "astream")
    ),
    *((f"/chain/{how}", {"questions": ["shipping a", "returns b"]}) for how in ("batch", "abatch")),
    *((f"/chain/{how}", {"question": "tea"}) for how in ("fallback", "traced")),
    *((f"/agent/{how}", {"question": "tea", "tool": "lookup"}) for how in ("invoke", "astream", "traced")),
    *(("/agent/ainvoke", {"question": "tea", "tool": tool}) for tool in AGENTS),
    ("/chain/invoke", {"question": "unsearchable"}),
    ("/chain/ainvoke", {"question": "tea", "behaviour": "rate-limited"}),
    ("/chain/stream", {"question": "tea", "behaviour": "failing"}),
    ("/chain/astream", {"question": "tea", "behaviour": "cut"}),
    ("/agent/astream", {"question": "tea", "tool": "lookup", "behaviour": "broken"}),
    ("/order", {"item": "kettle", "thread": "thread-1"}),
    ("/order/approve", {"thread": "thread-1"}),
    ("/survey", {"topics": ["a", "b", "c"]}),
    ("/survey/async", {"topics": ["a", "b", "c"]}),
]


@pytest.mark.parametrize(("path", "body"), CALLS, ids=str)
def test_traces_are_those_that_mlflow_records(
    agent: Agent, alone: Alone, path: str, body: dict[str, Any]
) -> None:
    """Names, nesting, types, inputs, outputs, attributes, events, status, tokens, session and previews."""
    assert_as_mlflow(agent, alone, path, body)


@pytest.mark.parametrize(
    ("path", "body"), [call for call in CALLS if call[0].startswith(("/agent/a", "/chain/a"))], ids=str
)
def test_traces_with_callbacks_inline_are_those_that_mlflow_records(
    inline_agent: Agent, inline_alone: Alone, path: str, body: dict[str, Any]
) -> None:
    """As MLflow nests them then: a step that follows another on the event loop is recorded inside it."""
    assert_as_mlflow(inline_agent, inline_alone, path, body)


def assert_as_mlflow(agent: Agent, alone: Alone, path: str, body: dict[str, Any]) -> None:
    ours = sorted(map(comparable, agent.ask(path, **body).traces))
    theirs = sorted(map(comparable, alone.post(path, json=body)))
    assert theirs
    assert ours == theirs
