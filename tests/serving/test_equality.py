"""A trace in the table equals the trace that MLflow itself would have recorded."""

import asyncio
import base64
import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any, Final

import mlflow
import pytest
from mlflow.entities import Trace
from mlflow.tracing.attachments import Attachment
from mlflow.tracing.constant import SpanAttributeKey
from mlflow.tracing.distributed import get_tracing_context_headers_for_http_request
from mlflow.tracing.provider import get_bridged_tracer_provider
from mlflow.tracking import fluent
from opentelemetry import trace as otel

from tests.serving.tracing_agents import (
    AGENTS,
    VALUES,
    chat_agent,
    load,
    mlflow_recording,
    nested,
    record,
    record_with_mlflow,
    request,
    retrieve,
    sealed,
    values_agent,
)

ALLOWED_DIFFERENCES: Final = {
    "client_request_id": "holds the endpoint's request id, which MLflow's own processor does not know",
    "cost": "worked out by MLflow's tracking server as it stores a span; here when it is encoded",
    "otel translation": "done by MLflow's tracking server as it stores a span; here when it is encoded",
    "attachments": "base64 content stays in the payload; MLflow moves it to an artifact store",
    "lone surrogates": "replaced by U+FFFD: readers other than Python refuse all of a text that has one",
    "failing objects": "recorded as a text; MLflow raises what the object's own code raises into the agent",
    "endless nesting": "recorded as a text; MLflow raises RecursionError into the agent",
    "cancellation": "makes its span an error with an exception event; MLflow calls the span OK",
    "closed early": "a generator's span is recorded with its chunks, in progress; MLflow loses the trace",
    "colliding keys": "the last is kept, as readers of JSON do; MLflow's text, and so its preview, has both",
    "direct writes": "of a key set by MLflow's API and on the OpenTelemetry span, the former's value stays",
    "many attributes": "all are kept; OpenTelemetry's limit of 128 per span makes MLflow forget the oldest",
    "two roots": "both traces are kept; MLflow's serving path keeps the last",
    "arguments not given": "are left out; MLflow records the addresses of the clients' stand-ins for them",
    "model streams": "have all that was streamed as outputs; MLflow's autologging has the text, or nothing",
}
"""Each with a test below, or left out of the comparison, or in test_tracing.py or test_model_streams.py."""


@pytest.fixture(autouse=True)
def tracking_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a tracking URI and an active experiment, MLflow's own recording fails in its light SDK."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(fluent, "_active_experiment_id", "0")


def comparable(trace: Trace) -> dict[str, Any]:
    """Everything but ids and times, in a form in which NaN equals NaN."""
    positions = {span.span_id: i for i, span in enumerate(trace.data.spans)}
    info = trace.info
    return {
        "state": info.state.value,
        "location": info.trace_location.to_dict(),
        "request_preview": info.request_preview,
        "response_preview": info.response_preview,
        "tags": info.tags,
        "metadata": info.trace_metadata,
        "assessments": [assessment.to_dictionary() for assessment in info.assessments],
        "finished": info.execution_duration is not None,
        "spans": [
            {
                "name": span.name,
                "type": span.span_type,
                "parent": positions.get(span.parent_id),
                "inputs": span.inputs,
                "outputs": span.outputs,
                "attributes": {k: v for k, v in span.attributes.items() if k != SpanAttributeKey.REQUEST_ID},
                "own id": span.trace_id == info.trace_id,
                "events": [(event.name, dict(event.attributes)) for event in span.events],
                "status": (span.status.status_code.value, span.status.description),
                "links": [link.to_dict() for link in span.links],
                "log level": span.log_level,
                "finished": span.end_time_ns is not None,
            }
            for span in trace.data.spans
        ],
    }


def assert_equal(ours: Trace, theirs: Trace) -> None:
    left, right = comparable(ours), comparable(theirs)
    for field in right:
        assert dump(left[field]) == dump(right[field]), field
    assert left.keys() == right.keys()


def dump(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


@pytest.mark.parametrize("name", AGENTS)
def test_agents(name: str) -> None:
    """An agent's trace is the same under both."""
    agent = AGENTS[name]
    assert_equal(record(agent), record_with_mlflow(agent))


IN_A_CHILD: Final = {
    "colliding keys": "previews are cut from the text, where MLflow's has both",
    "circular": "MLflow raises RecursionError for circular inputs",
    "nested deeply": "MLflow raises RecursionError for such inputs",
}
"""Values compared as attributes of a child span only, and why."""


LONE_SURROGATES: Final = "lone surrogates"


@pytest.mark.parametrize("name", [n for n in VALUES if n not in IN_A_CHILD and n != LONE_SURROGATES])
def test_values(name: str) -> None:
    """A value comes out the same under both, wherever it is recorded."""
    agent = values_agent(VALUES[name])
    assert_equal(record(agent), record_with_mlflow(agent))


@pytest.mark.parametrize("name", IN_A_CHILD)
def test_values_in_a_child(name: str) -> None:
    """Values that MLflow can record in some places only come out the same there."""

    def agent() -> None:
        with (
            mlflow.start_span("root"),
            mlflow.start_span("child", attributes={"given": VALUES[name]()}) as child,
        ):
            child.set_attribute("value", VALUES[name]())

    assert_equal(record(agent), record_with_mlflow(agent))


@pytest.mark.parametrize("name", [*IN_A_CHILD, LONE_SURROGATES])
def test_values_in_a_root(name: str) -> None:
    """Values that MLflow can't record as a root's inputs are recorded all the same, with previews."""
    trace = record(values_agent(VALUES[name]))
    root, child = trace.data.spans
    assert dump(root.inputs) == dump(child.get_attribute("value")) == dump(root.outputs)
    assert trace.info.request_preview
    trace.info.request_preview.encode()


@pytest.mark.parametrize(
    ("agent", "inputs"),
    [
        (retrieve, {"query": "q"}),
        (chat_agent, {"messages": [{"role": "user", "content": "q"}]}),
    ],
)
def test_inputs_are_those_of_the_call(agent: Callable[..., Any], inputs: dict[str, Any]) -> None:
    """What an agent does to its arguments after the call is not seen in its inputs."""
    before = json.loads(json.dumps(inputs))
    assert record(lambda: agent(**inputs)).data.spans[0].inputs == before


def test_client_request_id() -> None:
    """Allowed difference: the info holds the endpoint's request id, unless the agent sets another."""
    assert record(AGENTS["chat"]).info.client_request_id == "request-1"
    assert record_with_mlflow(AGENTS["chat"]).info.client_request_id is None

    @mlflow.trace
    def naming() -> None:
        mlflow.update_current_trace(client_request_id="mine")

    assert (
        record(naming).info.client_request_id == record_with_mlflow(naming).info.client_request_id == "mine"
    )


def test_cost(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Allowed difference: a span with a model and tokens gets its cost from the price list at hand."""
    prices = {"input_per_million_tokens": 2.0, "output_per_million_tokens": 10.0}
    catalog = {"schema_version": "1", "models": {"a-priced-model": {"mode": "chat", "pricing": prices}}}
    (tmp_path / "acme.json").write_text(json.dumps(catalog))
    monkeypatch.setenv("MLFLOW_MODEL_CATALOG_URI", tmp_path.as_uri())

    def agent() -> None:
        with mlflow.start_span("llm", span_type="LLM") as span:
            span.set_attribute(SpanAttributeKey.MODEL, "a-priced-model")
            span.set_attribute(SpanAttributeKey.MODEL_PROVIDER, "Acme")
            usage = {"input_tokens": 1000, "output_tokens": 100, "total_tokens": 1100}
            span.set_attribute(SpanAttributeKey.CHAT_USAGE, usage)

    with request() as traces:
        agent()
    encoded = traces.seal()[0].encode()
    cost = {"input_cost": 0.002, "output_cost": 0.001, "total_cost": 0.003}
    assert (encoded.input_tokens, encoded.output_tokens) == (1000, 100)
    assert encoded.total_cost_usd == pytest.approx(0.003)
    assert load(encoded).data.spans[0].llm_cost == pytest.approx(cost)
    assert load(encoded).info.cost == pytest.approx(cost)
    assert record_with_mlflow(agent).info.cost is None


def test_cost_that_the_agent_knows() -> None:
    """A cost that an agent records is kept, and summed up for the trace."""

    @mlflow.trace
    def agent() -> None:
        for _ in range(2):
            with mlflow.start_span("llm") as span:
                span.set_attribute(
                    SpanAttributeKey.LLM_COST, {"input_cost": 1.0, "output_cost": 2.0, "total_cost": 3.0}
                )

    assert record(agent).info.cost == {"input_cost": 2.0, "output_cost": 4.0, "total_cost": 6.0}


def test_attachments() -> None:
    """Allowed difference: base64 content and attachments stay in the payload."""
    image = base64.b64encode(b"not really a png").decode()
    content = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": image}}

    def agent() -> None:
        with mlflow.start_span("root") as span:
            span.set_inputs({"uri": f"data:image/png;base64,{image}", "part": content})
            span.set_outputs(Attachment(content_type="image/png", content_bytes=b"not really a png"))

    ours, theirs = record(agent).data.spans[0], record_with_mlflow(agent).data.spans[0]
    assert ours.inputs == {"uri": f"data:image/png;base64,{image}", "part": content}
    assert ours.outputs == f"data:image/png;base64,{image}"
    assert "mlflow-attachment://" in theirs.inputs["uri"]
    assert "mlflow-attachment://" in theirs.outputs


def test_lone_surrogates() -> None:
    """Allowed difference: half a character becomes the replacement character."""

    def agent() -> None:
        with mlflow.start_span("root"), mlflow.start_span("child") as child:
            child.set_inputs(VALUES[LONE_SURROGATES]())

    ours, theirs = record(agent).data.spans[1], record_with_mlflow(agent).data.spans[1]
    assert ours.inputs == {"a\ufffd": ["b\ufffd", "plain"]}
    assert theirs.inputs == VALUES[LONE_SURROGATES]()


def test_direct_writes() -> None:
    """Allowed difference: what MLflow's API set is not overwritten on the OpenTelemetry span."""

    def agent() -> None:
        with mlflow.start_span("root") as span:
            span.set_attribute("key", 1)
            span._span.set_attribute("key", "2")
            span._span.set_attribute("other", "3")

    ours, theirs = record(agent).data.spans[0], record_with_mlflow(agent).data.spans[0]
    assert (ours.attributes["key"], theirs.attributes["key"]) == (1, 2)
    assert ours.attributes["other"] == theirs.attributes["other"] == 3


class Omit:
    """What OpenAI's and Anthropic's clients pass on in the place of an argument that was left out."""

    __module__ = "openai"


class NotGiven:
    __module__ = "anthropic"


def test_arguments_not_given() -> None:
    """Allowed difference: what stands for an argument that was left out is left out of inputs, too."""

    def agent() -> None:
        given = {"model": "m", "seed": Omit(), "metadata": {"a": 1, "b": NotGiven()}}
        with mlflow.start_span("root", attributes=given) as root:
            root.set_inputs(given)
            root.set_outputs([Omit()])

    ours, theirs = record(agent).data.spans[0], record_with_mlflow(agent).data.spans[0]
    assert ours.inputs == {"model": "m", "metadata": {"a": 1}}
    assert theirs.inputs.keys() == {"model", "seed", "metadata"}
    assert "<openai." in theirs.inputs["seed"]
    assert "seed" not in ours.attributes
    assert ours.attributes["metadata"] == {"a": 1}
    assert "Omit object at" in ours.outputs[0]


class Keys:
    class Omit:
        """The agent's own."""


def test_the_agents_own_omissions() -> None:
    """A class of the agent's that has such a name is a value like any other."""
    value = {"key": Keys.Omit()}
    assert "Omit object at" in record(values_agent(lambda: value)).data.spans[0].inputs["key"]


def test_many_attributes() -> None:
    """Allowed difference: a span keeps all of its attributes."""

    def agent() -> None:
        with mlflow.start_span("root") as root, mlflow.start_span("child") as child:
            for number in range(200):
                child.set_attribute(f"key {number}", number)
            root.set_outputs("done")

    attributes = record(agent).data.spans[1].attributes
    assert [attributes[f"key {number}"] for number in range(200)] == list(range(200))


class Exploding:
    def __str__(self) -> str:
        raise RuntimeError("must not be printed")

    __repr__ = __str__


def test_failing_objects() -> None:
    """Allowed difference: an object whose own code fails becomes a text; the agent goes on."""

    @mlflow.trace
    def agent(value: Any) -> str:
        return "went on"

    value = {"good": 1, "bad": Exploding()}
    span = record(lambda: agent(value)).data.spans[0]
    assert span.inputs == {"value": {"good": 1, "bad": "<Exploding could not be recorded: RuntimeError>"}}
    assert span.outputs == "went on"
    keyed = record(lambda: agent({frozenset({1}): Exploding()})).data.spans[0]
    assert keyed.inputs == "<dict could not be recorded: RuntimeError>"
    with pytest.raises(RuntimeError, match="must not be printed"), mlflow_recording():
        agent(value)


@pytest.mark.parametrize("value", [nested(5_000), {"digits": 10**5_000}])
def test_endless_values(value: Any) -> None:
    """Allowed difference: what has no JSON text, for its depth or its digits, becomes a text that says so."""

    @mlflow.trace
    def agent(value: Any) -> str:
        return "went on"

    trace = record(lambda: agent(value))
    assert "could not be recorded" in str(trace.data.spans[0].inputs)
    assert trace.data.spans[0].outputs == "went on"


@mlflow.trace
async def waiting() -> None:
    with mlflow.start_span("inner"):
        await asyncio.sleep(60)


def cancelled() -> None:
    async def main() -> None:
        task = asyncio.create_task(waiting())
        await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(main())


def test_cancellation() -> None:
    """Allowed difference: a cancelled task's spans and trace are errors, with the exception recorded."""
    ours, theirs = record(cancelled), record_with_mlflow(cancelled)
    assert ours.info.state == "ERROR"
    assert theirs.info.state == "OK"
    for span in ours.data.spans:
        assert span.status.status_code == "ERROR"
        assert span.events[0].attributes["exception.type"] == "CancelledError"


def test_spans_after_a_cancellation() -> None:
    """A span that cleans up while a cancellation is handled is no error."""

    async def main() -> None:
        task = asyncio.current_task()
        assert task is not None
        with mlflow.start_span("root"):
            task.cancel()
            try:
                await asyncio.sleep(1)
            except asyncio.CancelledError:
                with mlflow.start_span("clean up"):
                    task.uncancel()

    trace = record(lambda: asyncio.run(main()))
    assert [span.status.status_code for span in trace.data.spans] == ["OK", "OK"]


@mlflow.trace
def endless() -> Iterator[Any]:
    number = 0
    while True:
        yield {"number": number}
        number += 1


@mlflow.trace
async def endless_async() -> Any:
    for chunk in endless():
        yield chunk


def test_closed_early() -> None:
    """Allowed difference: a generator that is closed early is recorded with its chunks, in progress."""

    def agent() -> None:
        stream = endless()
        for _ in range(200):
            next(stream)
        stream.close()

    trace = record(agent)
    assert trace.info.state == "IN_PROGRESS"
    assert trace.info.execution_duration is None
    assert trace.data.spans[0].end_time_ns is None
    assert trace.data.spans[0].outputs == [{"number": i} for i in range(200)]
    with mlflow_recording() as traces:
        agent()
    assert traces == []


def test_closed_early_async() -> None:
    """The same for asynchronous generators, and for what they had open."""

    async def main() -> None:
        stream = endless_async()
        await anext(stream)
        await anext(stream)
        await stream.aclose()

    trace = record(lambda: asyncio.run(main()))
    assert [span.name for span in trace.data.spans] == ["endless_async", "endless"]
    assert [span.outputs for span in trace.data.spans] == [[{"number": 0}, {"number": 1}]] * 2


def test_links_of_instrumentors() -> None:
    """A span that an instrumentor starts with links has the same ones under both."""
    elsewhere = otel.SpanContext(trace_id=0xAB, span_id=0xCD, is_remote=True)

    def agent() -> None:
        links = [otel.Link(elsewhere, {"why": "because"}), otel.Link(elsewhere)]
        tracer = get_bridged_tracer_provider().get_tracer("instrumentor")
        tracer.start_span("consume", links=links).end()

    ours, theirs = record(agent).data.spans[0].links, record_with_mlflow(agent).data.spans[0].links
    assert [link.to_dict() for link in ours] == [link.to_dict() for link in theirs]
    assert [(link.trace_id, link.span_id, link.attributes) for link in ours] == [
        ("tr-" + "0" * 30 + "ab", "0" * 14 + "cd", {"why": "because"}),
        ("tr-" + "0" * 30 + "ab", "0" * 14 + "cd", None),
    ]


def test_two_roots() -> None:
    """Allowed difference: every root span of a request makes a trace, in the order they started."""
    with request() as traces:
        AGENTS["chat"]()
        AGENTS["updating"]()
    assert [trace.data.spans[0].name for trace in sealed(traces)] == ["chat_agent", "updating"]


def test_headers_for_other_services() -> None:
    """An agent that calls another service passes the same trace context on."""

    def agent() -> None:
        with mlflow.start_span("root") as span:
            headers = get_tracing_context_headers_for_http_request()
            version, trace_id, span_id, flags = headers["traceparent"].split("-")
            assert (version, "tr-" + trace_id, span_id) == ("00", span.trace_id, span.span_id)
            assert int(flags, 16) & 1

    record(agent)
    record_with_mlflow(agent)
