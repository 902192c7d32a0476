"""Collects the MLflow traces of each request, by standing where MLflow's tracer provider stands.

MLflow starts spans on the OpenTelemetry ``TracerProvider`` that ``mlflow.tracing.provider.provider`` holds.
Ours takes its place: its sampler decides which spans are recorded, its processor registers a
:class:`~serving.spans.RecordedSpan` for each, which MLflow then hands to the agent. No function of MLflow or
OpenTelemetry is patched (of Python, two: :mod:`serving.threads`). MLflow's own processors, if they are
wanted, hang behind ours and get every span.

``mlflow.tracing.reset()``, ``enable()``, ``set_destination()`` and ``mlflow.set_experiment()`` put MLflow's
provider back. Before each span MLflow asks a ``Once`` whether its provider is initialised; ours answers by
seeing to it that the provider is our own, unless ``mlflow.tracing.disable()`` has put a
``NoOpTracerProvider`` there.

Private names of MLflow, tested with 3.15.0 and 3.17.2, used in the modules that make up this one:

- here: ``tracing.provider``: ``provider`` with its ``once``, ``_isolated_tracer_provider``,
  ``_isolated_tracer_provider_once`` and ``_global_provider_init_once``, ``_get_span_processors``,
  ``_get_trace_sampler``;
  ``tracing.sampling._MlflowSampler``; ``tracing.utils.once.Once``; ``tracing.utils.warning``;
  ``tracing.processor.base_mlflow``; ``tracking.fluent._active_experiment_id``.
- ``traces``: ``trace_manager``: ``_Trace``, ``InMemoryTraceManager`` with its ``_traces``, ``_lock``,
  ``_otel_id_to_mlflow_trace_id`` and ``_check_timeout_update``; ``tracing.provider.get_current_context``;
  ``utils.workspace_context``.
- ``trace_info``: ``tracing.provider._MLFLOW_TRACE_USER_DESTINATION``; ``tracking.fluent``:
  ``_get_latest_active_run``, ``_get_active_model_id_global``, ``_active_experiment_id``;
  ``tracing.context``; ``tracing.utils.environment``.
- ``nesting``, ``threads``: ``tracing.provider``: ``get_current_context``, ``mlflow_runtime_context``.
- ``spans``: ``entities.span``: the fields of ``LiveSpan``, ``_SpanAttributesRegistry``;
  ``tracing.fluent._set_last_active_trace_id``; ``tracing.utils.processor``,
  ``tracing.utils.default_log_level``.
- ``snapshot``: ``tracing.attachments``; ``tracing.utils.TraceJSONEncoder`` with ``_is_safe_to_encode_str``.
- ``trace_json``: ``tracing.utils.truncation``: ``_try_extract_messages``, ``_get_last_message``,
  ``_get_text_content_from_message``; ``tracing.utils``: ``SpanAggregationNode``,
  ``aggregate_usage_from_span_nodes``, ``aggregate_cost_from_span_nodes``; ``tracing.otel.translation``;
  ``utils.providers.cost_per_token``.

And of OpenTelemetry's SDK, tested with 1.45: ``Span._parent`` and ``_context``, set on a request's root spans
as MLflow does on clones; ``Span._attributes``, ``_events``, ``_new_events`` and ``_limits``, to empty muted
spans; ``Span._span_processor`` and ``TracerProvider._active_span_processor`` with ``_span_processors`` and
``_lock``; ``SpanProcessor._on_ending``.
"""

# mypy: disable-error-code="no-untyped-call"
# MLflow is typed in part only.

import logging
from collections.abc import Callable, Sequence
from threading import RLock
from time import perf_counter_ns
from typing import Any, Final

from mlflow.environment_variables import (
    MLFLOW_EXPERIMENT_ID,
    MLFLOW_TRACE_SAMPLING_RATIO,
    MLFLOW_USE_DEFAULT_TRACER_PROVIDER,
)
from mlflow.tracing import provider as mlflow_provider
from mlflow.tracing.processor.base_mlflow import BaseMlflowSpanProcessor, retire_batch_processor
from mlflow.tracing.sampling import _MlflowSampler
from mlflow.tracing.utils.environment import resolve_env_metadata
from mlflow.tracing.utils.once import Once
from mlflow.tracing.utils.warning import suppress_warning
from mlflow.tracking import fluent
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace import Span as OTelSpan
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, Decision, Sampler, SamplingResult
from opentelemetry.trace import (
    Link,
    NoOpTracerProvider,
    Span,
    SpanKind,
    Tracer,
    TraceState,
    get_tracer_provider,
)

from inference_table import metrics
from serving.nesting import enclosing_span, surrounds_request, was_sampled_out
from serving.spans import attribute_bytes
from serving.threads import carry_into_threads
from serving.trace_json import TraceSnapshot
from serving.traces import (
    CURRENT,
    OUTSIDE,
    SKIPPED,
    Audience,
    RecordedTrace,
    RequestTraces,
    Unrecorded,
    owner_of,
    put_under,
)

__all__ = ["CURRENT", "SKIPPED", "RequestTraces", "TraceSnapshot", "ensure_installed"]

logger = logging.getLogger(__name__)


class RequestSampler(Sampler):
    """Records the spans of requests that are captured, subject to MLflow's sampling ratio for root spans.

    Args:
        exporting: MLflow's own processors want the spans outside of requests too.
    """

    def __init__(self, *, exporting: bool) -> None:
        self._exporting = exporting
        # MLflow's validation of the ratio, without the rules for remote parents that come with it.
        ratio = (
            MLFLOW_TRACE_SAMPLING_RATIO.get() if mlflow_provider._get_trace_sampler() is not None else None
        )
        self._roots: Sampler = ALWAYS_ON if ratio is None else _MlflowSampler(ratio)

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Any = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        parent = enclosing_span(parent_context)
        context = parent.get_span_context()
        if (owner := owner_of(parent)) is not None:
            wanted = self._is_wanted(owner.request)
        elif was_sampled_out(parent) or not self._is_wanted(CURRENT.get()):
            wanted = False
        elif context is not None and context.trace_flags.sampled:
            wanted = True
        else:
            return self._roots.should_sample(
                parent_context, trace_id, name, kind, attributes, links, trace_state
            )
        state = context.trace_state if context is not None else None
        if wanted and not attributes and not state:
            return RECORDED
        return SamplingResult(Decision.RECORD_AND_SAMPLE if wanted else Decision.DROP, attributes, state)

    def _is_wanted(self, request: RequestTraces | None) -> bool:
        if request is None:
            metrics.ORPHAN_TRACES.inc()
        return self._exporting or (request is not None and is_recorded(request))

    def get_description(self) -> str:
        return f"RequestSampler({self._roots.get_description()})"


RECORDED: Final = SamplingResult(Decision.RECORD_AND_SAMPLE)
"""That of almost all spans; made once."""


def is_recorded(request: RequestTraces) -> bool:
    return not isinstance(request, Unrecorded)


def is_outside(trace: RecordedTrace, parent: Span) -> bool:
    """Whether ``parent``, a span of ``trace``, is none of the request that runs now."""
    return isinstance(trace.request, Unrecorded) or surrounds_request(parent.get_span_context())


class RequestSpanProcessor(SpanProcessor):
    """Gives each span of a captured request to its :class:`RequestTraces`.

    Args:
        exporters: MLflow's own processors, to run behind this one.
    """

    def __init__(self, exporters: Sequence[SpanProcessor]) -> None:
        self._exporters = tuple(exporters)
        self._alone = Audience(exporter=bool(exporters))
        self._watched = Audience(exporter=bool(exporters), others=True)
        # MLflow looks for its exporter here to flush it.
        self.span_exporter = next((getattr(exporter, "span_exporter", None) for exporter in exporters), None)

    def on_start(self, span: OTelSpan, parent_context: Context | None = None) -> None:
        started = perf_counter_ns()
        parent = enclosing_span(parent_context)
        trace = owner_of(parent)
        request = CURRENT.get() or OUTSIDE
        if trace is not None and is_recorded(request) and is_outside(trace, parent):
            trace = None  # what surrounds a request does not swallow it
        if trace is not None:
            request = trace.request
        if trace is not None and span.parent != parent.get_span_context():
            put_under(span, parent.get_span_context())
        if is_recorded(request) or self._keeps(span, has_owner=trace is not None):
            request.start(span, trace, self._watched if is_watched(span) else self._alone)
            request.overhead_ns += perf_counter_ns() - started
        if owner_of(span) is None:
            for exporter in self._exporters:
                exporter.on_start(span, parent_context)

    def _keeps(self, span: OTelSpan, *, has_owner: bool) -> bool:
        """Whether an unrecorded span must be in MLflow's manager, for its API to work.

        A sampler that is not ours, that of the application's provider, let it pass.
        """
        return not self._exporters and (has_owner or is_from_mlflow(span))

    def _on_ending(self, span: OTelSpan) -> None:
        trace = owner_of(span)
        if trace is None:
            return
        if trace.request.sealed:
            trace.release()
        elif not is_from_mlflow(span):
            trace.request.nbytes += attribute_bytes(span)  # MLflow's API counts what it records itself

    def on_end(self, span: ReadableSpan) -> None:
        for exporter in self._exporters:
            exporter.on_end(span)

    def shutdown(self) -> None:
        for exporter in self._exporters:
            if isinstance(exporter, BaseMlflowSpanProcessor):
                retire_batch_processor(exporter)  # sends what is queued
            exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return all(exporter.force_flush(timeout_millis) for exporter in self._exporters)


class RequestTracerProvider(TracerProvider):
    """OpenTelemetry's, which finds the tracer that MLflow asks for at each span by its name.

    OpenTelemetry's own look-up describes the tracer twice, adds a filter for warnings and takes a lock. With
    it MLflow's look-up takes 19 us per span, with this one 6; all our hooks take about 60.
    """

    def __init__(self, sampler: Sampler, resource: Resource | None, *, shutdown_on_exit: bool) -> None:
        super().__init__(sampler, resource, shutdown_on_exit)
        self._tracers_by_name: dict[tuple[str, str | None, str | None], Tracer] = {}

    def get_tracer(
        self,
        instrumenting_module_name: str,
        instrumenting_library_version: str | None = None,
        schema_url: str | None = None,
        attributes: Any = None,
    ) -> Tracer:
        name = (instrumenting_module_name, instrumenting_library_version, schema_url)
        if attributes or name not in self._tracers_by_name:
            tracer = super().get_tracer(*name, attributes)
            if attributes:
                return tracer
            self._tracers_by_name[name] = tracer
        return self._tracers_by_name[name]


class Installation(Once):
    """Keeps our provider in MLflow's place. MLflow asks it before every span."""

    def __init__(self, *, done: bool, isolated: bool) -> None:
        super().__init__()
        self._done = done
        self._isolated = isolated
        # The garbage collector may run a generator's clean-up at any point, which may start a span.
        self._installing = RLock()
        self._is_installing = False
        self._exporting = False
        self._provider: TracerProvider | None = None
        self._processor: RequestSpanProcessor | None = None

    def do_once(self, func: Callable[[], None]) -> None:  # noqa: ARG002 - MLflow's initialiser, which ours replaces
        if not self._is_settled():
            with self._installing:
                if not self._is_settled() and not self._is_installing:
                    self._is_installing = True
                    try:
                        self._install()
                        self._done = True
                    finally:
                        self._is_installing = False

    def _is_settled(self) -> bool:
        if not self._done:
            return False
        current = self._current()
        return current is self._provider or isinstance(current, NoOpTracerProvider)

    def _current(self) -> object:
        """The provider in force. MLflow's own ``get()`` looks an environment variable up each time."""
        return mlflow_provider.provider._isolated_tracer_provider if self._isolated else get_tracer_provider()

    def _install(self) -> None:
        resolve_env_metadata()  # it is cached, and looks at files and at git the first time
        for module, message in SUPPRESSED:
            suppress_warning(module, message)
        self._exporting = self._exporting or is_export_wanted()
        current, ours, replaced = self._current(), self._provider, self._processor
        others = [processor for processor in processors_of(current) if not is_mlflow_or_ours(processor)]
        self._processor = RequestSpanProcessor(mlflow_processors(self._exporting))
        if isinstance(current, TracerProvider) and not self._isolated:
            self._provider = current  # the application's own, which MLflow was told to share
        else:
            self._provider = self._new_provider()
            mlflow_provider.provider.set(self._provider)
        # Instrumentors that were given an earlier provider keep it, and their spans shall come to us.
        for provider in (self._provider, current, ours):
            if isinstance(provider, TracerProvider):
                set_processors(provider, self._processor, *others)
        if replaced is not None:
            replaced.shutdown()

    def _new_provider(self) -> TracerProvider:
        # Without a resource it is read from the environment, for those who export.
        resource = None if self._exporting else Resource.get_empty()
        sampler = RequestSampler(exporting=self._exporting)
        return RequestTracerProvider(sampler, resource, shutdown_on_exit=self._exporting)


def processors_of(provider: object) -> tuple[SpanProcessor, ...]:
    if not isinstance(provider, TracerProvider):
        return ()
    active: Any = provider._active_span_processor
    return tuple(active._span_processors)


def set_processors(provider: TracerProvider, *processors: SpanProcessor) -> None:
    active: Any = provider._active_span_processor
    with active._lock:
        active._span_processors = processors


def is_watched(span: OTelSpan) -> bool:
    """Whether processors that are neither MLflow's nor ours see a span; they may be added at any time."""
    active: Any = span._span_processor
    processors = getattr(active, "_span_processors", ())
    return len(processors) > 1 and not all(map(is_mlflow_or_ours, processors))


def is_from_mlflow(span: OTelSpan) -> bool:
    """Whether MLflow's API started a span, and will look for it in MLflow's manager."""
    scope = span.instrumentation_scope
    return scope is not None and scope.name.startswith("mlflow.")


def is_mlflow_or_ours(processor: SpanProcessor) -> bool:
    return type(processor).__module__.startswith(("mlflow.", __name__))


SUPPRESSED: Final = (
    ("opentelemetry.context", "Failed to detach context"),
    ("opentelemetry.sdk.trace", "Setting attribute on ended span"),
    ("opentelemetry.sdk.trace", "Calling end() on an ended span"),
)
"""Warnings that MLflow suppresses for its own provider, because traces come out right in spite of them."""


def is_export_wanted() -> bool:
    """Whether the operator set ``MLFLOW_EXPERIMENT_ID``; ``mlflow.set_experiment`` sets it too."""
    return bool(MLFLOW_EXPERIMENT_ID.is_set()) and MLFLOW_EXPERIMENT_ID.get() != fluent._active_experiment_id


def mlflow_processors(exporting: bool) -> list[SpanProcessor]:
    if not exporting:
        return []
    try:
        processors: list[SpanProcessor] = mlflow_provider._get_span_processors()
    # Whatever keeps MLflow from exporting (no server, a missing package), the table gets its traces.
    except Exception as error:  # noqa: BLE001
        logger.warning("MLflow's own export does not run beside the inference table: %s", error)
        return []
    return processors


ADOPTING: Final = RLock()


def ensure_installed() -> None:
    """See to it that spans come to us. Cheap where that is so; call it per request.

    Installs or re-installs our provider, but leaves ``mlflow.tracing.disable()`` in force.
    """
    once = mlflow_provider.provider.once
    if not isinstance(once, Installation):
        with ADOPTING:
            once = mlflow_provider.provider.once
            if not isinstance(once, Installation):
                once = adopt(once)
    once.do_once(ensure_installed)


def adopt(once: Once) -> Installation:
    carry_into_threads()
    isolated = MLFLOW_USE_DEFAULT_TRACER_PROVIDER.get()
    installation = Installation(done=once._done, isolated=isolated)
    if isolated:
        mlflow_provider.provider._isolated_tracer_provider_once = installation
    else:
        mlflow_provider.provider._global_provider_init_once = installation
    return installation
