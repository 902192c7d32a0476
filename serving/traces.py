"""The traces of one request, and how MLflow's trace manager gets to see them.

MLflow looks up live spans and the trace's info in its ``InMemoryTraceManager``, by MLflow's trace id. A
request's spans lie there, in a :class:`ManagedTrace`, until the request is sealed. One trace id may belong to
several requests at once: a distributed trace that enters this process more than once.

Code may still run inside a span when its request is sealed: a background task, say. What MLflow's API gives
it goes on working: its open spans stay in the manager, muted, until the last of them ends. Spans that start
then are treated alike, and so are those of no request where MLflow shares the application's tracer provider.
"""

# mypy: disable-error-code="no-untyped-call"
# MLflow is typed in part only.

from contextvars import ContextVar
from dataclasses import dataclass, replace
from threading import RLock
from time import perf_counter_ns
from typing import Any, Final

from mlflow.entities.span import LiveSpan
from mlflow.entities.trace import Trace
from mlflow.entities.trace_data import TraceData
from mlflow.entities.trace_info import TraceInfo
from mlflow.tracing.provider import get_current_context
from mlflow.tracing.trace_manager import InMemoryTraceManager, _Trace
from mlflow.utils.workspace_context import get_request_workspace
from opentelemetry.sdk.trace import Span as OTelSpan
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import SpanContext, format_span_id, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from inference_table import metrics
from serving.border import reporter
from serving.spans import Meter, RecordedSpan
from serving.trace_info import new_trace_info
from serving.trace_json import SpanState, TraceSnapshot, read_span

__all__ = [
    "CURRENT",
    "OUTSIDE",
    "SKIPPED",
    "Audience",
    "RecordedTrace",
    "RequestTraces",
    "Unrecorded",
    "owner_of",
    "put_under",
]

OWNER: Final = "_tracelake_trace"
"""Name of the attribute by which an OpenTelemetry span knows the trace it is recorded in."""
IDS: Final = RandomIdGenerator()
REMEMBERED_NS: Final = 10_000_000
"""How long MLflow's manager surely holds a trace: 1,000 others can't begin in 10 ms."""
LATE_BEGINNINGS_OF_A_WORKER: Final = 3
"""A request's background tasks may begin a span or two after it was sealed. A worker task that was created in
a request keeps its context for ever, and begins one for each request that it serves."""


class RequestTraces(Meter):
    """All traces of one request. Safe to use from several threads.

    ``nbytes`` is about how many bytes the snapshots keep alive, ``overhead_ns`` the time spent in span hooks.

    Args:
        request_id: recorded as the traces' ``client_request_id``.
        parent: a ``traceparent`` header, if it is to be believed: the request's own root spans become
            children of the remote span it names.
    """

    def __init__(self, request_id: str, *, parent: str | None = None) -> None:
        super().__init__()
        self.request_id = request_id
        self.parent = remote_span(parent)
        # What is active outside the request is not the request's: a span around a whole server, say, or that
        # of another request: uvicorn starts a pipelined one in its context.
        surrounding = get_current_span(get_current_context())
        self.surrounding = surrounding.get_span_context()
        self._is_surrounding_recorded = owner_of(surrounding) is not None
        self._traces: dict[int, RecordedTrace] = {}
        self._open: list[OTelSpan] = []
        self._late_beginnings = 0
        # The garbage collector may run a generator's clean-up at any point, which may start a span.
        self._lock = RLock()

    def is_complete(self) -> bool:
        """Whether no span is open."""
        with self._lock:
            self._open = [span for span in self._open if span.end_time is None]
            return not self._open

    def peek(self) -> list[TraceSnapshot]:
        """The traces as they are now, in the order their root spans started."""
        with self._lock:
            return self._snapshots()

    def seal(self) -> list[TraceSnapshot]:
        """The traces, for good: what comes later is counted and not recorded. A second call returns none."""
        with self._lock:
            try:
                return self._snapshots()
            finally:
                self.sealed = True
                traces = list(self._traces.values())
                self._traces = {}
                self._open = []
                for trace in traces:
                    trace.release()

    def _snapshots(self) -> list[TraceSnapshot]:
        traces = sorted(self._traces.values(), key=lambda trace: trace.started_ns)
        return [trace.snapshot() for trace in traces]

    def start(self, span: OTelSpan, trace: "RecordedTrace | None", audience: "Audience") -> None:
        """Record a span that has just started.

        Args:
            span: the span.
            trace: the trace of its local parent, None for a root span of this request.
            audience: who sees the span besides us.
        """
        with self._lock:
            late = self.sealed
            begins = late and (trace is None or not trace.entry.holds(span.parent))
            if late and trace is None and audience.exporter:
                self.count_late(begins=begins)
                return  # MLflow's own processors make it a trace of their own
            if trace is None:
                self._settle(span)
                trace = self._traces.get(span.context.trace_id)
            if trace is None:
                trace = self._new_trace(span, audience, late)
            trace.add(span, audience, late=late)
            if not late:
                self._open.append(span)
        if late:
            self.count_late(begins=begins)

    def _new_trace(self, span: OTelSpan, audience: "Audience", late: bool) -> "RecordedTrace":
        created = RecordedTrace(self, span, audience)
        if late:
            return created
        trace = self._traces.setdefault(span.context.trace_id, created)
        if trace is not created:  # a clean-up that ran meanwhile was first
            created.release()
        return trace

    def count_late(self, *, begins: bool) -> None:
        """Count a span that started after the request was sealed.

        Args:
            begins: its parent, if it has one, had ended before.
        """
        metrics.LATE_SPANS.inc()
        self._late_beginnings += begins
        if begins and self._late_beginnings >= LATE_BEGINNINGS_OF_A_WORKER:
            reporter.failure(
                "late spans",
                f"spans are not recorded: they start in the context of request {self.request_id}, whose row "
                "is written already. A worker task or thread that was created while a request ran keeps that "
                "request's context; start workers outside of requests, or run them in contextvars.Context()",
            )

    def _settle(self, span: OTelSpan) -> None:
        """Put a root span of this request under the remote parent, or free it from what surrounds it all."""
        parent = span.parent
        if parent is not None and parent.is_remote:
            return
        if self.parent is not None:
            trace_id = self.parent.trace_id
        elif (
            parent is not None
            and parent.span_id == self.surrounding_id
            and (self._is_surrounding_recorded or not parent.trace_flags.sampled)
        ):
            trace_id = IDS.generate_trace_id()
        else:
            return
        put_under(span, self.parent, trace_id)

    @property
    def surrounding_id(self) -> int | None:
        return self.surrounding.span_id if self.surrounding is not None else None


class Unrecorded(RequestTraces):
    """Stands in where no request records: its spans are kept from their start to their end, no longer."""

    def __init__(self, *, counted: bool) -> None:
        super().__init__("")
        self.sealed = True
        self._counted = counted

    def count_late(self, *, begins: bool) -> None:
        if self._counted and begins:
            metrics.ORPHAN_TRACES.inc()


@dataclass(frozen=True, slots=True)
class Audience:
    """Who sees the spans besides us: MLflow's own exporter, any other span processor."""

    exporter: bool = False
    others: bool = False


class RecordedTrace:
    """One trace of one request."""

    def __init__(self, request: RequestTraces, root: OTelSpan, audience: Audience) -> None:
        self.request = request
        self.audience = audience
        self.otel_id = root.context.trace_id
        self.started_ns = root.start_time or 0
        self.info = new_trace_info(root, request.request_id)
        self.root_id: int = root.context.span_id
        self.entry = ManagedTrace.of(self)

    def add(self, span: OTelSpan, audience: Audience, *, late: bool) -> None:
        materialised = audience.exporter or audience.others
        live = RecordedSpan(span, self.info.trace_id, self.request, materialised=materialised, late=late)
        setattr(span, OWNER, self)
        manager = InMemoryTraceManager.get_instance()
        with manager._lock:
            if self not in self.entry.parts:  # all its spans had ended, after its request was sealed
                self.entry = ManagedTrace.of(self)
            self.entry.register(live, manager)

    def snapshot(self) -> TraceSnapshot:
        spans: list[LiveSpan | SpanState] = []
        root: int | None = None
        for span in self.entry.spans_of(self):
            if span._span.context.span_id == self.root_id:
                root = len(spans)
            spans.append(span if span.end_time_ns is not None else read_span(span))
        return TraceSnapshot(copied(self.info), spans, root)

    def release(self) -> None:
        """Take what has ended out of MLflow's manager, unless MLflow's own exporter will."""
        if not self.audience.exporter:
            self.entry.release(self)


class ManagedTrace(_Trace):
    """What MLflow's manager holds for one trace id: the traces of one or more requests."""

    def __init__(self, first: RecordedTrace) -> None:
        self.first = first
        self.parts: list[RecordedTrace] = []
        self.span_dict: dict[str, LiveSpan] = {}
        self.prompts = []
        self.is_remote_trace = False
        self.workspace = get_request_workspace()
        self._look_at = 0
        self._looked_into: object = None

    @classmethod
    def of(cls, trace: RecordedTrace) -> "ManagedTrace":
        """The entry that a new trace belongs to, with the trace in it."""
        manager = InMemoryTraceManager.get_instance()
        manager._check_timeout_update()
        with manager._lock:
            entry = manager._traces.get(trace.info.trace_id)
            if isinstance(entry, cls):
                entry.parts.append(trace)
                return entry
            entry = cls(trace)  # in the place of MLflow's placeholder, perhaps, for a remote trace
            entry.parts.append(trace)
            entry.put(manager)
            return entry

    def put(self, manager: Any) -> None:
        manager._traces[self.first.info.trace_id] = self
        # MLflow's exporters look there, and remove it; nothing else does, not even its time-out.
        if not self._is_sealed():
            manager._otel_id_to_mlflow_trace_id[self.first.otel_id] = self.first.info.trace_id

    def _is_sealed(self) -> bool:
        return all(part.request.sealed and not part.audience.exporter for part in self.parts)

    def register(self, span: RecordedSpan, manager: Any) -> None:
        """Add a span; the caller holds the manager's lock."""
        # MLflow's manager forgets: it holds 1,000 traces, for an hour. To look costs more than all else here.
        now = perf_counter_ns()
        if now > self._look_at or manager._traces is not self._looked_into:
            if manager._traces.get(self.first.info.trace_id) is not self:
                self.put(manager)
            self._look_at, self._looked_into = now + REMEMBERED_NS, manager._traces
        self.span_dict[span.span_id] = span

    def holds(self, context: SpanContext | None) -> bool:
        return context is not None and format_span_id(context.span_id) in self.span_dict

    def release(self, trace: RecordedTrace) -> None:
        manager = InMemoryTraceManager.get_instance()
        with manager._lock:
            is_open = False
            for span in self.spans_of(trace):
                if isinstance(span, RecordedSpan) and span.end_time_ns is None:
                    span.mute()
                    is_open = True
                else:
                    self.span_dict.pop(span.span_id, None)
            if not is_open and trace in self.parts:
                self.parts.remove(trace)
            trace_id = self.first.info.trace_id
            if not self.parts and manager._traces.get(trace_id) is self:
                del manager._traces[trace_id]
            if self._is_sealed() and manager._traces.get(trace_id) in (self, None):
                manager._otel_id_to_mlflow_trace_id.pop(self.first.otel_id, None)

    def spans_of(self, trace: RecordedTrace) -> list[LiveSpan]:
        """The spans of one request, with those that others registered here: MLflow's integrations do."""
        spans = list(self.span_dict.values())
        if len(self.parts) == 1:
            return spans
        return [span for span in spans if (owner_of(span._span) or self.first) is trace]

    @property
    def info(self) -> TraceInfo:  # type: ignore[override]
        """The info of the request at hand, which ``mlflow.update_current_trace`` updates."""
        request = CURRENT.get()
        part = next((part for part in self.parts if part.request is request), None)
        return (part or self.first).info

    def get_root_span(self) -> LiveSpan | None:
        """The first request's root, a child of a remote span perhaps. MLflow's time-out ends it.

        Once that has ended, any open span: the time-out would keep an entry without a root for ever.
        """
        spans = list(self.span_dict.values())
        roots = (span for span in spans if span._span.context.span_id == self.first.root_id)
        return next(roots, next((span for span in spans if span.end_time_ns is None), None))

    def to_mlflow_trace(self) -> Trace:
        """The trace for those who pop it from MLflow's manager."""
        if self.first.audience.exporter:
            trace: Trace = super().to_mlflow_trace()
            # The exporter adds to the info, in its own thread; ours stays as it is.
            return Trace(copied(trace.info), trace.data)
        # Only the end of `set_tracing_context_from_http_request_headers` pops without MLflow's exporters, to
        # remove its placeholder. It gets ours, which others still need and nobody reads here.
        if self.parts:
            self.put(InMemoryTraceManager.get_instance())
        return Trace(self.info, TraceData())


def copied(info: TraceInfo) -> TraceInfo:
    return replace(
        info,
        tags=dict(info.tags),
        trace_metadata=dict(info.trace_metadata),
        assessments=list(info.assessments),
    )


def owner_of(span: Any) -> RecordedTrace | None:
    """The trace in which an OpenTelemetry span is recorded."""
    owner: RecordedTrace | None = getattr(span, OWNER, None)
    return owner


def put_under(span: OTelSpan, parent: SpanContext | None, trace_id: int | None = None) -> None:
    """Give a span that has just started another parent, and the trace of that, or ``trace_id``."""
    context = span.context
    if trace_id is None:
        trace_id = context.trace_id if parent is None else parent.trace_id
    span._parent = parent
    span._context = SpanContext(
        trace_id, context.span_id, context.is_remote, context.trace_flags, context.trace_state
    )


def remote_span(traceparent: str | None) -> SpanContext | None:
    if traceparent is None:
        return None
    context = TraceContextTextMapPropagator().extract({"traceparent": traceparent})
    remote = get_current_span(context).get_span_context()
    return remote if remote.is_valid else None


CURRENT: Final[ContextVar[RequestTraces | None]] = ContextVar("tracelake_request_traces", default=None)
"""The request that runs now, or :data:`SKIPPED`."""
SKIPPED: Final = Unrecorded(counted=False)
"""Stands for a request that is not recorded: its spans are no orphans."""
OUTSIDE: Final = Unrecorded(counted=True)
"""Stands for code that runs outside of any request."""
