"""Spans of MLflow and of OpenTelemetry instrumentors nest in each other, though their contexts are apart."""

from collections.abc import Iterator
from typing import Any

import mlflow
import pytest
from mlflow.tracing.provider import get_bridged_tracer_provider
from opentelemetry import context as otel_context
from opentelemetry import trace as otel
from opentelemetry.sdk.trace import TracerProvider

from serving import tracing
from tests.serving.tracing_agents import request, sealed


@pytest.fixture
def tracer() -> Iterator[otel.Tracer]:
    """A tracer as instrumentors get it."""
    mlflow.tracing.reset()
    tracing.ensure_installed()
    yield get_bridged_tracer_provider().get_tracer("instrumentor")
    mlflow.tracing.reset()


def parents(traces: Any) -> list[dict[str, str | None]]:
    """Per trace, of each span the name of its parent."""
    found = []
    for trace in sealed(traces):
        names = {span.span_id: span.name for span in trace.data.spans}
        found.append({span.name: names.get(span.parent_id, span.parent_id) for span in trace.data.spans})
    return found


def test_all_ways_around(tracer: otel.Tracer) -> None:
    """MLflow in OpenTelemetry in MLflow: one trace, each under the innermost span around it."""
    with request() as traces, mlflow.start_span("a"):
        with tracer.start_as_current_span("b"), mlflow.start_span("c"):
            with tracer.start_as_current_span("d"):
                pass
            with mlflow.start_span("e"):
                pass
        with mlflow.start_span("f"):
            pass
    assert parents(traces) == [{"a": None, "b": "a", "c": "b", "d": "c", "e": "c", "f": "a"}]


def test_an_opentelemetry_span_around_everything(tracer: otel.Tracer) -> None:
    """An instrumentor's span (a workflow, say) is the root of MLflow's spans inside."""
    with request() as traces, tracer.start_as_current_span("workflow"), mlflow.start_span("task"):
        pass
    assert parents(traces) == [{"workflow": None, "task": "workflow"}]


def test_a_chosen_parent_stays(tracer: otel.Tracer) -> None:
    """Who names a parent gets it, whatever is active."""
    with request() as traces, mlflow.start_span("root"):
        first = tracer.start_span("first")
        with mlflow.start_span("active"):
            context = otel.set_span_in_context(first, otel_context.Context())
            tracer.start_span("child", context=context).end()
            parent = mlflow.start_span_no_context("detached")
            mlflow.start_span_no_context("detached child", parent_span=parent).end()
            parent.end()
        first.end()
    assert parents(traces) == [
        {
            "root": None,
            "first": "root",
            "active": "root",
            "child": "first",
            "detached": "active",
            "detached child": "detached",
        }
    ]


def test_an_ended_span_takes_no_children(tracer: otel.Tracer) -> None:
    """A span that has ended but is active still, as instrumentors of streams leave it, is not gone under."""
    with request() as traces, mlflow.start_span("root"):
        span = tracer.start_span("streamed")
        with otel.use_span(span):
            span.end()
            with mlflow.start_span("after"):
                pass
    assert parents(traces) == [{"root": None, "streamed": "root", "after": "root"}]


def test_spans_of_the_applications_own_provider_are_no_parents(tracer: otel.Tracer) -> None:
    """The application's own instrumentation goes elsewhere: its spans break none of our traces apart."""
    own = TracerProvider().get_tracer("own")
    with own.start_as_current_span("server"), request() as traces, mlflow.start_span("root"):
        with own.start_as_current_span("client"), tracer.start_as_current_span("model"):
            pass
        with mlflow.start_span("other"):
            pass
    assert parents(traces) == [{"root": None, "model": "root", "other": "root"}]


def test_two_requests_are_kept_apart(tracer: otel.Tracer) -> None:
    """A span that is active in another request is not gone under."""
    with request() as outer, tracer.start_as_current_span("outer"):
        inner = answer_another_request()
    assert parents(outer) == [{"outer": None}]
    assert parents(inner) == [{"inner": None}]


def answer_another_request() -> Any:
    with request() as traces, mlflow.start_span("inner"):
        return traces


@pytest.fixture
def half_sampled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as environment:
        environment.setenv("MLFLOW_TRACE_SAMPLING_RATIO", "0.5")
        mlflow.tracing.reset()
        tracing.ensure_installed()
        yield
    mlflow.tracing.reset()


@pytest.mark.usefixtures("tracer")  # which takes the sampler away again
def test_sampled_as_a_whole(half_sampled: None) -> None:
    """With a sampling ratio, a trace of both kinds of spans is recorded whole or not at all."""
    tracer = get_bridged_tracer_provider().get_tracer("instrumentor")
    found = [sizes(answer_with_both(tracer)) for _ in range(40)]
    assert {tuple(size) for size in found} == {(), (3,)}


def answer_with_both(tracer: otel.Tracer) -> Any:
    with request() as traces, mlflow.start_span("root"), tracer.start_as_current_span("model"):
        mlflow.start_span_no_context("inner").end()
    return traces


def sizes(traces: Any) -> list[int]:
    return [len(trace.data.spans) for trace in sealed(traces)]
