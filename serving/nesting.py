"""Which span a new one is a child of.

MLflow keeps its active span in a context of its own, apart from OpenTelemetry's. So spans of OpenTelemetry
instrumentors (OpenInference, Traceloop) do not see MLflow's spans around them, nor MLflow's theirs: they
would become traces of their own, or siblings of what they are part of. Both kinds end up with us, so a span
goes under the innermost of the two.
"""

from mlflow.tracing.provider import mlflow_runtime_context
from opentelemetry.context import Context
from opentelemetry.sdk.trace import Span as OTelSpan
from opentelemetry.trace import INVALID_SPAN, Span, SpanContext, get_current_span

from serving.traces import CURRENT, owner_of

__all__ = ["enclosing_span", "surrounds_request", "was_sampled_out"]


def enclosing_span(parent_context: Context | None) -> Span:
    """The parent of a span that is started in ``parent_context``; an invalid span where it is a root.

    A parent that the caller chose, rather than the active span of either context, stays.
    """
    given = get_current_span(parent_context)
    # Not by MLflow's get_current_context(), which looks an environment variable up each time. Where MLflow
    # shares the application's provider and context, nothing is active in this one.
    active, otel_active = get_current_span(mlflow_runtime_context.get_current()), get_current_span()
    if given is active:
        if otel_active is INVALID_SPAN:
            return given
        other = otel_active
    elif given is otel_active:
        other = active
    else:
        return given
    if is_within(other, given) or (other is active and owner_of(given) is None and was_sampled_out(other)):
        return other
    return given


def is_within(other: Span, given: Span) -> bool:
    """Whether ``other``, an active span of this request, is further inside than ``given``."""
    owner = owner_of(other)
    if owner is None or not isinstance(other, OTelSpan) or other.end_time is not None:
        return False
    if owner.request is not CURRENT.get():
        return False
    context = given.get_span_context()
    if owner_of(given) is None or not isinstance(given, OTelSpan):
        return not context.is_remote  # none, or one of the application's own provider
    return (other.start_time or 0) > (given.start_time or 0)


def was_sampled_out(span: Span) -> bool:
    """Whether ``span`` stands for a trace of this request that is not to be recorded."""
    context = span.get_span_context()
    return is_local(context) and not context.trace_flags.sampled and not surrounds_request(context)


def is_local(context: SpanContext) -> bool:
    return context.is_valid and not context.is_remote


def surrounds_request(context: SpanContext) -> bool:
    request = CURRENT.get()
    return request is not None and context.span_id == request.surrounding_id
