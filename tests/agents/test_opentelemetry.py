"""Model calls under OpenTelemetry instrumentors, beside MLflow's spans and across services."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Final

import httpx
import orjson
import pytest
from mlflow.entities import Span, Trace
from mlflow.tracing.constant import SpanAttributeKey

from tests.agents.endpoint import Agent, Asked, exception_of, serving, uvicorn_serving
from tests.model_server import ModelServer, model_server
from tests.serving.recorded import outline, span_named, trace_of

pytestmark = [pytest.mark.agents, pytest.mark.heavy]

pytest.importorskip("openinference.instrumentation.openai", reason="needs the extra `agents`")
pytest.importorskip("opentelemetry.instrumentation.openai", reason="needs the extra `agents`")

APP: Final = "tests.agents.opentelemetry_agent:app"
TRACE_ID: Final = "0af7651916cd43dd8448eb211c80319c"
SPAN_ID: Final = "b7ad6b7169203331"


@dataclass(frozen=True)
class Instrumentor:
    """How an instrumentor calls its spans, and what MLflow makes of them."""

    name: str
    chat: str
    chat_type: str
    responses: str
    embeddings: str


OPENINFERENCE: Final = Instrumentor("openinference", "ChatCompletion", "LLM", "Response", "CreateEmbeddings")
TRACELOOP: Final = Instrumentor(
    "traceloop", "openai.chat", "CHAT_MODEL", "openai.response", "openai.embeddings"
)


@pytest.fixture(scope="module")
def model() -> Iterator[ModelServer]:
    with model_server() as server:
        yield server


@pytest.fixture(scope="module", params=[OPENINFERENCE, TRACELOOP], ids=lambda param: param.name)
def instrumentor(request: pytest.FixtureRequest) -> Instrumentor:
    chosen: Instrumentor = request.param
    return chosen


@pytest.fixture(scope="module")
def agent(
    instrumentor: Instrumentor, model: ModelServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Agent]:
    """Instrumented as MLflow's documentation says."""
    env = {"MODEL_SERVER": model.url, "INSTRUMENTOR": instrumentor.name}
    with serving(APP, tmp_path_factory.mktemp(instrumentor.name), env) as running:
        yield running


class Servers:
    """Agents with other environments, each started when a test first asks for it."""

    def __init__(self, model: ModelServer, folders: pytest.TempPathFactory, stack: ExitStack) -> None:
        self._base = {"MODEL_SERVER": model.url}
        self._folders = folders
        self._stack = stack
        self._running: dict[str, Agent] = {}

    def get(self, instrumentor: Instrumentor, *, uvicorn: bool = False, **env: str) -> Agent:
        key = str((instrumentor.name, uvicorn, sorted(env.items())))
        if key not in self._running:
            start = uvicorn_serving if uvicorn else serving
            folder = self._folders.mktemp("server")
            environment = {**self._base, "INSTRUMENTOR": instrumentor.name, **env}
            self._running[key] = self._stack.enter_context(start(APP, folder, environment))
        return self._running[key]


@pytest.fixture(scope="module")
def servers(model: ModelServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with ExitStack() as stack:
        yield Servers(model, tmp_path_factory, stack)


# --- model calls ---


@pytest.mark.parametrize("path", ["/chat", "/achat", "/stream", "/astream"])
def test_a_model_call_is_a_trace(agent: Agent, instrumentor: Instrumentor, path: str) -> None:
    """With inputs, outputs, model and tokens where MLflow has them, streamed or not."""
    asked = agent.ask(path, question="what of tea")
    [span] = asked.trace.data.spans
    assert (span.name, span.span_type) == (instrumentor.chat, instrumentor.chat_type)
    assert "what of tea" in dump(span.inputs)
    assert "You asked: what of tea" in dump(span.outputs)
    assert span.get_attribute(SpanAttributeKey.MODEL) == "gpt-4o-mini"
    assert span.get_attribute(SpanAttributeKey.CHAT_USAGE) == {
        "input_tokens": 3,
        "output_tokens": 5,
        "total_tokens": 8,
    }
    row = asked.row
    assert (row["input_tokens"], row["output_tokens"], row["trace_state"]) == (3, 5, "OK")


def dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def test_other_calls_are_traces_too(agent: Agent, instrumentor: Instrumentor) -> None:
    """The Responses API and embeddings."""
    responses = agent.ask("/responses", question="what of tea")
    [span] = responses.trace.data.spans
    assert span.name == instrumentor.responses
    assert "what of tea" in dump(span.inputs)
    assert "You asked: what of tea" in dump(span.outputs)
    assert responses.row["input_tokens"] == 3
    embeddings = agent.ask("/embeddings", question="what of tea")
    [span] = embeddings.trace.data.spans
    assert (span.name, span.span_type) == (instrumentor.embeddings, "EMBEDDING")
    assert "what of tea" in dump(span.inputs)
    assert embeddings.row["input_tokens"] == 3


def test_a_long_chat_keeps_its_inputs_and_outputs(agent: Agent) -> None:
    """Instrumentors write some attributes per message, more than OpenTelemetry keeps by itself."""
    asked = agent.ask("/chat", question="what of tea", earlier=200)
    [span] = asked.trace.data.spans
    inputs = dump(span.inputs)
    assert all(f"earlier {number}" in inputs for number in range(200))
    assert "You asked: what of tea" in dump(span.outputs)
    assert asked.row["input_tokens"] == 403


# --- among MLflow's spans ---


def test_an_agent_of_both_kinds_of_spans_is_one_trace(agent: Agent, instrumentor: Instrumentor) -> None:
    """Model calls lie beside MLflow's tool, under MLflow's agent, and their tokens add up."""
    asked = agent.ask("/agent", question="tea")
    [trace] = asked.traces
    assert outline(trace) == f"agent({both(instrumentor, 'lookup')})"
    first, second = calls(trace, instrumentor)
    assert '"lookup"' in dump(first.outputs)
    assert "all about tea" in dump(second.inputs)
    assert "The tool says: all about tea" in dump(second.outputs)
    assert (asked.row["input_tokens"], asked.row["output_tokens"]) == (5, 8)


def both(instrumentor: Instrumentor, tool: str) -> str:
    return " ".join(sorted([instrumentor.chat, instrumentor.chat, tool]))


def calls(trace: Trace, instrumentor: Instrumentor) -> list[Span]:
    found = [span for span in trace.data.spans if span.name == instrumentor.chat]
    return sorted(found, key=lambda span: span.start_time_ns)


def test_an_opentelemetry_span_around_mlflows_is_their_root(agent: Agent, instrumentor: Instrumentor) -> None:
    """A framework's workflow, MLflow's agent in it, instrumented calls in that: one trace."""
    [trace] = agent.ask("/agent/workflow", question="tea").traces
    assert outline(trace) == f"workflow(agent({both(instrumentor, 'lookup')}))"


def test_calls_at_once_are_siblings(agent: Agent, instrumentor: Instrumentor) -> None:
    """Two calls in two tasks of one agent are both its children, none the other's."""
    [trace] = agent.ask("/agent/async", question="tea").traces
    assert outline(trace) == f"async_agent({instrumentor.chat} {instrumentor.chat})"
    texts = [dump(span.inputs) + dump(span.outputs) for span in calls(trace, instrumentor)]
    assert sorted(["tea one" in text, "tea two" in text] for text in texts) == [[False, True], [True, False]]


def test_a_streamed_call_is_under_the_generator_that_passes_it_on(
    agent: Agent, instrumentor: Instrumentor
) -> None:
    """MLflow's span of a generator, whose parts the client gets, around an instrumented stream."""
    asked = agent.ask("/agent/stream", question="tea")
    [trace] = asked.traces
    assert asked.events == ["You", " asked:", " tea"]
    assert outline(trace) == f"words({instrumentor.chat})"
    assert span_named(trace, "words").outputs == asked.events
    assert "You asked: tea" in dump(span_named(trace, instrumentor.chat).outputs)
    assert asked.row["output_tokens"] == 3


# --- failures ---


@pytest.mark.parametrize(("behaviour", "error"), [("rate-limited", "429"), ("broken", "500")])
@pytest.mark.parametrize("path", ["/chat", "/achat", "/astream"])
def test_a_model_that_refuses_is_found(agent: Agent, path: str, behaviour: str, error: str) -> None:
    """The call's span holds the vendor's error."""
    asked = agent.ask(path, question="tea", behaviour=behaviour)
    [span] = asked.trace.data.spans
    assert asked.row["trace_state"] == "ERROR"
    assert f"Error code: {error}" in exception_of(span)
    assert "tea" in dump(span.inputs)


@pytest.mark.parametrize("path", ["/stream", "/astream"])
@pytest.mark.parametrize(
    ("behaviour", "error"), [("failing", "overloaded"), ("cut", "peer closed connection")]
)
def test_a_stream_that_breaks_off_is_recorded_until_then(
    agent: Agent, instrumentor: Instrumentor, path: str, behaviour: str, error: str
) -> None:
    """The row says that it did not end. Traceloop's span does not; OpenInference's holds the error."""
    asked = agent.ask(path, question="tea", behaviour=behaviour)
    [span] = asked.trace.data.spans
    assert "You asked:" in dump(span.outputs)
    assert orjson.loads(asked.row["response"])["databricks_output"]["stream"]["ended"] is False
    if instrumentor is OPENINFERENCE:
        assert error in exception_of(span)
    else:
        assert asked.row["trace_state"] == "OK"


@pytest.mark.parametrize("path", ["/stream", "/astream"])
def test_a_client_that_leaves_a_stream_is_recorded(
    agent: Agent, instrumentor: Instrumentor, path: str
) -> None:
    """499, with the call's inputs."""
    row = agent.leave(path, json={"question": "what of tea", "behaviour": "slow"}, after="asked")
    [span] = trace_of(row).data.spans
    assert (row["status_code"], span.name) == (499, instrumentor.chat)
    assert "what of tea" in dump(span.inputs)


def test_requests_side_by_side_keep_to_themselves(agent: Agent, instrumentor: Instrumentor) -> None:
    """Sixty requests of five kinds, twelve at a time: no span lost, none doubled, none of another request."""
    kinds = {
        "/chat": instrumentor.chat,
        "/astream": instrumentor.chat,
        "/agent": f"agent({both(instrumentor, 'lookup')})",
        "/agent/async": f"async_agent({instrumentor.chat} {instrumentor.chat})",
        "/agent/workflow": f"workflow(agent({both(instrumentor, 'lookup')}))",
    }
    questions = [f"question-{number:03}" for number in range(60)]

    def ask(question: str, path: str) -> Asked:
        return agent.ask(path, question=question)

    with ThreadPoolExecutor(12) as pool:
        answered = list(pool.map(ask, questions, cycle(kinds)))
    for question, path, asked in zip(questions, cycle(kinds), answered, strict=False):
        [trace] = asked.traces
        assert outline(trace) == kinds[path]
        whole = json.dumps(trace.to_dict(), default=str)
        assert [other for other in questions if other in whole] == [question]
    assert len({asked.row["trace_id"] for asked in answered}) == 60


# --- whose provider, and when ---


def test_an_instrumentor_that_comes_after_the_middleware(servers: Servers) -> None:
    """Set up while the server starts, when ours is in place already."""
    agent = servers.get(TRACELOOP, WHEN="startup")
    assert outline(agent.ask("/agent", question="tea").trace) == f"agent({both(TRACELOOP, 'lookup')})"


def test_an_instrumentor_that_comes_before_the_middleware(servers: Servers) -> None:
    """Set up at import, on a provider that MLflow made itself, before ours is in place."""
    agent = servers.get(
        OPENINFERENCE,
        uvicorn=True,
        MIDDLEWARE="true",
        ENABLE_MLFLOW_TRACING="true",
        # Without a tracking server's address, MLflow's light SDK can't make one.
        MLFLOW_TRACKING_URI="http://127.0.0.1:9",
    )
    [trace] = agent.ask("/agent/workflow", question="tea").traces
    assert outline(trace) == f"workflow(agent({both(OPENINFERENCE, 'lookup')}))"
    [trace] = agent.ask("/chat", question="what of tea", earlier=200).traces
    assert outline(trace) == "ChatCompletion"
    assert "what of tea" in dump(trace.data.spans[0].inputs)


def test_the_applications_own_provider_is_left_alone(servers: Servers) -> None:
    """Its spans are not in our traces, and its exporter gets them as it does without us."""
    agent = servers.get(OPENINFERENCE, PROVIDER="own")
    without = servers.get(OPENINFERENCE, uvicorn=True, PROVIDER="own")
    asked = agent.ask("/agent", question="tea")
    assert outline(asked.trace) == "agent(lookup)"
    assert agent.ask("/chat", question="tea").traces == []
    for path in ("/agent", "/chat"):
        httpx.post(without.url + path, json={"question": "tea"}, timeout=60).raise_for_status()
    found = plain(exported(agent))
    assert found == plain(exported(without))
    assert [span["name"] for span in found].count("ChatCompletion") == 3
    assert asked.trace.info.trace_id[3:] not in dump(exported(agent))


def exported(agent: Agent) -> list[dict[str, Any]]:
    """What the application's own exporter got of its requests."""
    found: list[dict[str, Any]] = httpx.get(f"{agent.url}/exported", timeout=60).json()
    roots = [span for span in found if span["name"].startswith("POST /")]  # FastAPI's own, which has its ids
    traces = {span["context"]["trace_id"] for span in roots} or {
        span["context"]["trace_id"] for span in found
    }
    return [span for span in found if span["context"]["trace_id"] in traces]


def plain(spans: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without ids and times, addresses and ports."""
    names = {span["context"]["span_id"]: span["name"] for span in spans}
    kept = ("name", "kind", "status", "events", "links")
    return [
        {key: span[key] for key in kept}
        | {"parent": names.get(span["parent_id"])}
        | {"attributes": {k: v for k, v in span["attributes"].items() if ".port" not in k and "url" not in k}}
        for span in spans
    ]


def test_processors_of_the_application_on_mlflows_provider_see_the_traces_of_the_rows(
    servers: Servers,
) -> None:
    """The same spans under the same ids, with their attributes."""
    agent = servers.get(OPENINFERENCE, WATCHED="true", WHEN="startup")
    asked = agent.ask("/agent/workflow", question="tea")
    ours = {span.span_id: (span.name, span.parent_id) for span in asked.trace.data.spans}
    theirs = {span["context"]["span_id"]: span for span in exported(agent)}
    assert {
        span_id[2:]: (span["name"], (span["parent_id"] or "")[2:] or None) for span_id, span in theirs.items()
    } == ours
    assert {span["context"]["trace_id"] for span in theirs.values()} == {"0x" + asked.row["trace_id"][3:]}
    seen = {span["name"]: span["attributes"] for span in theirs.values()}
    assert json.loads(seen["agent"]["mlflow.spanInputs"]) == {"question": "tea"}
    assert "tea" in seen["ChatCompletion"]["input.value"]


def test_a_provider_that_mlflow_shares_brings_its_spans_into_the_traces(servers: Servers) -> None:
    """``MLFLOW_USE_DEFAULT_TRACER_PROVIDER=false``: the application's provider is MLflow's too, and ours."""
    agent = servers.get(OPENINFERENCE, PROVIDER="own", MLFLOW_USE_DEFAULT_TRACER_PROVIDER="false")
    asked = agent.ask("/agent/workflow", question="tea")
    spans = f"workflow(agent({both(OPENINFERENCE, 'lookup')}))"
    assert spans in outline(asked.trace)  # within FastAPI's own spans, where it makes some
    assert asked.row["output_tokens"] == 8
    assert sorted(span["name"] for span in exported(agent)) == sorted(
        span.name for span in asked.trace.data.spans
    )


# --- traces across services ---


@pytest.mark.parametrize("by", ["mlflow", "opentelemetry"])
def test_other_services_get_the_trace_and_the_calling_span(agent: Agent, model: ModelServer, by: str) -> None:
    """``traceparent`` as MLflow writes it names MLflow's span, as OpenTelemetry does, the span of its own."""
    asked = agent.ask("/call", question="tea", by=by)
    assert outline(asked.trace) == "root(step(calling(request)))"
    assert sent(model, after=-1) == {(asked.row["trace_id"], asked.body[by])}
    spans = {span.span_id: span.name for span in asked.trace.data.spans}
    assert spans[asked.body[by]] == {"mlflow": "calling", "opentelemetry": "request"}[by]


def sent(model: ModelServer, after: int) -> set[tuple[str, str]]:
    """Trace and span that requests to the model's server named as their parent, all of them sampled."""
    parents = [received.headers["traceparent"].split("-") for received in model.received[after:]]
    assert all(int(flags, 16) & 1 for *_, flags in parents)
    return {(f"tr-{trace_id}", span_id) for _, trace_id, span_id, _ in parents}


@pytest.mark.parametrize("path", ["/chat", "/agent/async"])
def test_an_instrumentor_that_propagates_names_its_spans(
    servers: Servers, model: ModelServer, path: str
) -> None:
    """Traceloop's sends the span of each call to the model's server."""
    agent = servers.get(TRACELOOP, WHEN="startup")
    before = len(model.received)
    asked = agent.ask(path, question="tea")
    called = {(asked.row["trace_id"], span.span_id) for span in calls(asked.trace, TRACELOOP)}
    assert sent(model, after=before) == called


@pytest.mark.parametrize("flags", ["01", "00"])
@pytest.mark.parametrize(("path", "root"), [("/agent", "agent"), ("/chat", "ChatCompletion")])
def test_a_trusted_traceparent_is_the_parent(servers: Servers, path: str, root: str, flags: str) -> None:
    """Of MLflow's spans and of instrumentors', sampled or not where it comes from."""
    agent = servers.get(OPENINFERENCE, INFERENCE_TABLE_TRUST_TRACEPARENT="true")
    exchanged = agent.post(path, json={"question": "tea"}, headers=remote(flags))
    trace = trace_of(exchanged.row)
    assert exchanged.row["trace_id"] == f"tr-{TRACE_ID}"
    assert span_named(trace, root).parent_id == SPAN_ID
    assert exchanged.row["request_metadata"]["traceparent"] == remote(flags)["traceparent"]
    assert exchanged.row["trace_state"] == "OK"
    assert exchanged.row["span_count"] == len(trace.data.spans) == (4 if path == "/agent" else 1)


def remote(flags: str = "01") -> dict[str, str]:
    return {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-{flags}"}


@pytest.mark.parametrize("path", ["/agent", "/chat"])
def test_any_other_traceparent_is_only_kept(agent: Agent, path: str) -> None:
    """Where clients are not trusted, their trace is no business of ours, and in the row's metadata."""
    exchanged = agent.post(path, json={"question": "tea"}, headers=remote())
    trace = trace_of(exchanged.row)
    assert exchanged.row["trace_id"] != f"tr-{TRACE_ID}"
    assert [span.parent_id for span in trace.data.spans].count(None) == 1
    assert SPAN_ID not in {span.parent_id for span in trace.data.spans}
    assert exchanged.row["request_metadata"]["traceparent"] == remote()["traceparent"]


def test_requests_of_one_trace_in_one_process_are_rows_of_their_own(servers: Servers) -> None:
    """An agent that asks its own server twice at once: three rows of one trace, each with its own spans."""
    agent = servers.get(OPENINFERENCE, INFERENCE_TABLE_TRUST_TRACEPARENT="true")
    asked = agent.ask("/distributed", questions=["tea", "coffee"])
    inner = [agent.find(f"databricks_request_id = '{found}'") for found in asked.body["ids"]]
    assert {row["trace_id"] for row in inner} == {asked.row["trace_id"]}
    [root] = asked.trace.data.spans
    assert root.name == "distributed"
    for row, question in zip(inner, ("tea", "coffee"), strict=True):
        trace = trace_of(row)
        assert outline(trace) == f"agent({both(OPENINFERENCE, 'lookup')})"
        first = span_named(trace, "agent")
        assert (first.parent_id, first.inputs) == (root.span_id, {"question": question})
        assert (row["input_tokens"], row["output_tokens"], row["trace_state"]) == (5, 8, "OK")
