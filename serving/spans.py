"""The span object that agents hold while they run, and which keeps what they record as snapshots."""

# mypy: disable-error-code="no-untyped-call"
# MLflow is typed in part only.

import json
import logging
import sys
from time import perf_counter_ns
from typing import Any, Final

from mlflow.entities.link import Link
from mlflow.entities.span import LiveSpan, Span, _SpanAttributesRegistry
from mlflow.entities.span_event import SpanEvent
from mlflow.entities.span_status import SpanStatus
from mlflow.exceptions import MlflowException
from mlflow.tracing.config import get_config
from mlflow.tracing.constant import STREAM_CHUNK_EVENT_VALUE_KEY, SpanAttributeKey
from mlflow.tracing.fluent import _set_last_active_trace_id
from mlflow.tracing.utils.default_log_level import default_log_level_for_span_type
from mlflow.tracing.utils.processor import apply_span_processors
from opentelemetry.attributes import BoundedAttributes
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace import Span as OTelSpan
from opentelemetry.trace import Link as OTelLink
from opentelemetry.trace import Status, StatusCode, format_span_id, format_trace_id

from inference_table import metrics
from serving.model_streams import complete, follow, is_model_stream
from serving.snapshot import (
    NODE_BYTES,
    JsonText,
    Snapshot,
    is_not_given,
    mlflow_text,
    snapshot,
    thaw,
)

__all__ = ["Meter", "RecordedSpan", "attribute_bytes"]

logger = logging.getLogger(__name__)

KEPT: Final = (SpanAttributeKey.REQUEST_ID, SpanAttributeKey.SPAN_TYPE)
"""Attributes of a muted span: MLflow finds it by the first."""
OK: Final = Status(StatusCode.OK)
CHUNK_EVENT_PREFIX: Final = "mlflow.chunk.item."
DEFAULT_ATTRIBUTE_LIMIT: Final = 128
"""OpenTelemetry's, per span."""


class Meter:
    """What the spans of one request cost: bytes kept alive, and our time on the request path."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.overhead_ns = 0
        self.sealed = False


class SnapshotAttributes(_SpanAttributesRegistry):
    """Attributes kept as snapshots; the OpenTelemetry span holds only those that others put there."""

    _span: OTelSpan

    def __init__(self, otel_span: OTelSpan, meter: Meter) -> None:
        super().__init__(otel_span)
        self.meter = meter
        self.values: dict[str, Snapshot] = {}
        self.muted = False
        self._sizes: dict[str, int] = {}

    def mute(self) -> None:
        """Forget what was recorded, and record no more."""
        self.muted = True
        self.values = {key: self.values.get(key) for key in KEPT}

    def set(self, key: str, value: Any) -> None:
        kind = type(value)
        if self.muted or self._span.end_time is not None:
            return
        values = self.values  # of now: a span that is muted while the snapshot is taken has others
        if type(key) is not str or not key:
            if not isinstance(key, str) or not key:
                super().set(key, value)  # says what is wrong, and stores nothing
                return
            key = str.__str__(key)
        if kind is str:  # not timed, which would take longer than this
            values[key], nbytes = value, len(value) + NODE_BYTES
        elif is_not_given(kind):
            return
        else:
            started = perf_counter_ns()
            values[key], nbytes = snapshot(value)
            self.meter.overhead_ns += perf_counter_ns() - started
        self.meter.nbytes += nbytes - self._sizes.get(key, 0)
        self._sizes[key] = nbytes

    def get(self, key: str) -> Any:
        if key in self.values:
            return thaw(self.values[key])
        # MLflow's decorator looks at each span's outputs, which are mostly not set by then.
        return super().get(key) if key in self._span._attributes else None  # type: ignore[operator]

    def get_all(self) -> dict[str, Any]:
        return {key: self.get(key) for key in {**raw_attributes(self._span), **self.values}}

    def texts(self) -> dict[str, str]:
        """The values as MLflow would have stored them on the OpenTelemetry span."""
        return {key: mlflow_text(value) for key, value in self.values.items()}


class RecordedSpan(LiveSpan):
    """MLflow's live span, recording by snapshot.

    Once its request is sealed it is muted: agents can go on using it, and it keeps nothing.

    Args:
        otel_span: the OpenTelemetry span it stands for.
        trace_id: MLflow's id of its trace.
        meter: counts what recording costs.
        materialised: other span processors see this span too, and read the OpenTelemetry span's attributes.
            It is never muted.
        late: it started after its request was sealed.
    """

    _span: OTelSpan
    _attributes: SnapshotAttributes  # type: ignore[assignment] # as LiveSpan's own differs from its parent's

    def __init__(
        self, otel_span: OTelSpan, trace_id: str, meter: Meter, *, materialised: bool, late: bool
    ) -> None:
        # Like LiveSpan's, this constructor replaces its parent's.
        self._span = otel_span
        self._meter = meter
        self._materialised = materialised
        self._late = late
        self._attributes = SnapshotAttributes(otel_span, meter)
        self._attributes.values = {SpanAttributeKey.REQUEST_ID: trace_id, SpanAttributeKey.SPAN_TYPE: None}
        self._attachments = {}
        self._links = [mlflow_link(link) for link in otel_span.links]
        self._original_name = otel_span.name
        self._chunks: list[Snapshot] = []
        self._handled_at_start = sys.exc_info()[1]
        # MLflow finds a live span by this attribute of the OpenTelemetry span.
        otel_span._attributes[SpanAttributeKey.REQUEST_ID] = f'"{trace_id}"'  # type: ignore[index]
        keep_all_attributes(otel_span)
        if late:
            self.mute()

    def mute(self) -> None:
        """Keep alive nothing of the agent's any more, unless others wait for the span's end."""
        if self._materialised:
            return
        self._attributes.mute()
        self._chunks = []
        self._handled_at_start = None
        otel: Any = self._span
        kept = {key: value for key, value in raw_attributes(otel).items() if key in KEPT}
        otel._events = otel._new_events()
        otel._attributes = BoundedAttributes(otel._limits.max_span_attributes, kept, immutable=False)

    def set_inputs(self, inputs: Any) -> None:
        # Not the parent's: it takes base64 content out of the payload, to store it elsewhere.
        self._attributes.set(SpanAttributeKey.INPUTS, inputs)

    def set_outputs(self, outputs: Any) -> None:
        self._attributes.set(SpanAttributeKey.OUTPUTS, outputs)

    def add_event(self, event: SpanEvent) -> None:
        if self._attributes.muted:
            return
        super().add_event(event)
        attributes = event.attributes or {}
        self._meter.nbytes += NODE_BYTES + sum(len(v) for v in attributes.values() if isinstance(v, str))
        chunk = attributes.get(STREAM_CHUNK_EVENT_VALUE_KEY)
        if event.name.startswith(CHUNK_EVENT_PREFIX) and isinstance(chunk, str):
            self._chunks.append(JsonText(chunk))

    def add_chunk(self, chunk: Any) -> None:
        """Keep a part of a model's streamed answer, without an event."""
        if self._attributes.muted:
            return
        started = perf_counter_ns()
        kept, nbytes = snapshot(chunk)
        self._chunks.append(kept)
        self._meter.nbytes += nbytes
        self._meter.overhead_ns += perf_counter_ns() - started

    def values(self) -> dict[str, Snapshot]:
        """The attributes now, as snapshots.

        A traced generator that was closed early never ends its span; its chunks up to then are its outputs.
        """
        values = dict(self._attributes.values)
        if not self._chunks or (is_model_stream(values) and complete(values, self._chunks)):
            return values
        if values.get(SpanAttributeKey.OUTPUTS) is None:
            values[SpanAttributeKey.OUTPUTS] = [chunk for chunk in self._chunks if is_readable(chunk)]
        return values

    def end(
        self,
        outputs: Any | None = None,
        attributes: dict[str, Any] | None = None,
        status: SpanStatus | str | None = None,
        end_time_ns: int | None = None,
    ) -> None:
        """End the span as ``LiveSpan.end`` does, but for its per-span imports and look-ups.

        Its cost in dollars is worked out when the trace is encoded.
        """
        if self._span.end_time is not None:
            return
        if outputs is not None and is_model_stream(self._attributes.values) and follow(outputs, self):
            return  # it ends with the stream
        if self._meter.sealed and not self._late:
            metrics.LATE_SPANS.inc()
        try:
            try:
                self._complete(outputs, attributes, status)
            finally:
                if not is_model_stream(self._attributes.values):
                    self._chunks = []
                self._handled_at_start = None
                self._span.end(end_time=end_time_ns)
        # What the agent passed may be anything, and so may what the application's own span processors raise;
        # a trace must not fail the agent for it. MLflow's live span does the same.
        except Exception as error:  # noqa: BLE001
            logger.warning("Failed to end span %s properly: %s: %s", self.name, type(error).__name__, error)

    def _complete(
        self, outputs: Any | None, attributes: dict[str, Any] | None, status: SpanStatus | str | None
    ) -> None:
        if attributes:
            self.set_attributes(attributes)
        if outputs is not None:
            self.set_outputs(outputs)
        started = perf_counter_ns()
        self._set_final_status(status)
        values = self._attributes.values
        if values.get(SpanAttributeKey.LOG_LEVEL) is None:
            kind = values.get(SpanAttributeKey.SPAN_TYPE)
            level = default_log_level_for_span_type(kind if isinstance(kind, str) else None)
            values[SpanAttributeKey.LOG_LEVEL] = int(level)
        self._meter.overhead_ns += perf_counter_ns() - started
        if get_config().span_processors and not self._attributes.muted:
            apply_span_processors(self)
        if self._materialised:
            started = perf_counter_ns()
            self._span.set_attributes({key: mlflow_text(value) for key, value in self.values().items()})
            self._meter.overhead_ns += perf_counter_ns() - started
        if self._span.parent is None or self._span.parent.is_remote:
            _set_last_active_trace_id(self.trace_id)

    def _set_final_status(self, status: SpanStatus | str | None) -> None:
        if status is not None:
            try:
                self.set_status(status)  # type: ignore[arg-type] # a SpanStatus is fine, too
            except (MlflowException, AttributeError) as error:
                logger.warning("Span %s ended with a status that does not exist: %s", self.name, error)
        elif (cancelled := self._propagating_cancellation()) is not None:
            # It takes any exception, whatever its annotation says.
            self.add_event(SpanEvent.from_exception(cancelled))  # type: ignore[arg-type]
            self._span.set_status(Status(StatusCode.ERROR, f"{type(cancelled).__name__}: {cancelled}"))
        if self._span.status.status_code is not StatusCode.ERROR:
            self._span.set_status(OK)

    def _propagating_cancellation(self) -> BaseException | None:
        """The CancelledError, KeyboardInterrupt or SystemExit that ends this span.

        MLflow looks for ``Exception`` only. A GeneratorExit is no failure: the consumer has had enough. What
        was being handled already when the span started did not happen in it.
        """
        error = sys.exc_info()[1]
        if error is None or isinstance(error, Exception | GeneratorExit) or error is self._handled_at_start:
            return None
        return error

    def to_dict(self) -> dict[str, Any]:
        as_dict: dict[str, Any] = super().to_dict()
        as_dict["attributes"].update(self._attributes.texts())
        return as_dict

    def to_immutable_span(self) -> Span:
        otel = self._span
        span = Span(
            ReadableSpan(
                name=otel.name,
                context=otel.context,
                parent=otel.parent,
                resource=otel.resource,
                attributes={**raw_attributes(otel), **self._attributes.texts()},
                events=otel.events,
                links=otel.links,
                kind=otel.kind,
                status=otel.status,
                start_time=otel.start_time,
                end_time=otel.end_time,
                instrumentation_scope=otel.instrumentation_scope,
            )
        )
        span._links = self.links
        return span


def mlflow_link(link: OTelLink) -> Link:
    return Link.from_dict(
        {
            "trace_id": f"tr-{format_trace_id(link.context.trace_id)}",
            "span_id": format_span_id(link.context.span_id),
            "attributes": dict(link.attributes or {}) or None,
        }
    )


def keep_all_attributes(otel: Any) -> None:
    """Lift OpenTelemetry's default limit; one that someone chose stays.

    Instrumentors write a few attributes per message of a chat, and beyond the limit the oldest go first: the
    model's inputs.
    """
    if otel._attributes.maxlen == DEFAULT_ATTRIBUTE_LIMIT:
        otel._attributes.maxlen = None


def raw_attributes(otel: Any) -> dict[str, Any]:
    """What the OpenTelemetry span itself holds.

    Not by ``dict()``: beyond OpenTelemetry's limit, another thread's write removes keys while it reads.
    """
    attributes: dict[str, Any] = otel.attributes.copy()
    return attributes


def attribute_bytes(otel: OTelSpan) -> int:
    """About how many bytes the attributes keep alive that were written on the OpenTelemetry span itself."""
    nbytes = 0
    for value in raw_attributes(otel).values():
        parts = value if isinstance(value, tuple) else (value,)
        nbytes += sum(NODE_BYTES + (len(part) if isinstance(part, str) else 0) for part in parts)
    return nbytes


def is_readable(chunk: Snapshot) -> bool:
    if not isinstance(chunk, JsonText):
        return True
    try:
        json.loads(chunk.text)
    except (ValueError, RecursionError):
        return False
    return True
