"""What OpenTelemetry-only instrumentors write on their spans is recorded whole."""

# mypy: disable-error-code="no-untyped-call"
# MLflow is typed in part only.

from collections.abc import Iterator

import mlflow
import pytest
from mlflow.tracing.provider import get_bridged_tracer_provider
from opentelemetry import trace as otel

from serving import tracing
from serving.snapshot import NODE_BYTES
from tests.serving.tracing_agents import request, sealed


@pytest.fixture
def tracer() -> Iterator[otel.Tracer]:
    """A tracer as instrumentors get it."""
    mlflow.tracing.reset()
    tracing.ensure_installed()
    yield get_bridged_tracer_provider().get_tracer("instrumentor")
    mlflow.tracing.reset()


def chat(tracer: otel.Tracer, messages: int) -> None:
    """A model call as OpenInference records it: each message has attributes of its own, after the inputs."""
    with tracer.start_as_current_span("chat", attributes={"openinference.span.kind": "LLM"}) as span:
        span.set_attribute("input.value", "question")
        for number in range(messages):
            span.set_attribute(f"llm.input_messages.{number}.message.role", "user")
            span.set_attribute(f"llm.input_messages.{number}.message.content", f"message {number}")


def test_a_long_chat_keeps_its_inputs(tracer: otel.Tracer) -> None:
    """OpenTelemetry's default limit of 128 attributes, which forgets the oldest, does not hold for us."""
    with request() as traces:
        chat(tracer, messages=300)
    [span] = sealed(traces)[0].data.spans
    assert (span.span_type, span.inputs) == ("LLM", "question")
    written = [key for key in span.attributes if key.startswith("llm.input_messages.")]
    assert len(written) == 600


def test_a_limit_that_someone_chose_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who sets OpenTelemetry's limit gets it."""
    monkeypatch.setenv("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "20")
    mlflow.tracing.reset()
    tracing.ensure_installed()
    with request() as traces:
        chat(get_bridged_tracer_provider().get_tracer("instrumentor"), messages=300)
    [span] = sealed(traces)[0].data.spans
    assert len([key for key in span.attributes if key.startswith("llm.input_messages.")]) <= 20
    mlflow.tracing.reset()


def test_what_instrumentors_write_counts_as_memory(tracer: otel.Tracer) -> None:
    """So that traces of theirs, too, are bounded in bytes; what MLflow's API records is not counted twice."""
    text = "x" * 100_000
    with request() as traces:
        with tracer.start_as_current_span("chat") as span:
            span.set_attribute("input.value", text)
            span.set_attribute("embedding.vector", [0.5] * 1000)
        assert 100_000 + 1000 * NODE_BYTES < traces.nbytes < 200_000
        before = traces.nbytes
        with mlflow.start_span("step") as step:
            step.set_inputs(text)
        assert 100_000 < traces.nbytes - before < 110_000
