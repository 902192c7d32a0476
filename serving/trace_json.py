"""From the spans of a trace to its JSON, in the writer's thread.

Nothing here runs while the agent does: texts, previews, token usage and cost are worked out when the trace is
encoded, one span at a time, so that no step holds the interpreter for long.
"""

# mypy: disable-error-code="no-untyped-call"
# MLflow is typed in part only.

import json
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import orjson
from mlflow.entities.span import LiveSpan
from mlflow.entities.trace_info import TraceInfo
from mlflow.entities.trace_location import MlflowExperimentLocation, TraceLocation, TraceLocationType
from mlflow.entities.trace_state import TraceState
from mlflow.environment_variables import MLFLOW_MODEL_CATALOG_URI
from mlflow.tracing.constant import (
    MAX_CHARS_IN_TRACE_INFO_METADATA,
    TRACE_REQUEST_RESPONSE_PREVIEW_MAX_LENGTH_OSS,
    TRUNCATION_SUFFIX,
    CostKey,
    SpanAttributeKey,
    TokenUsageKey,
    TraceMetadataKey,
)
from mlflow.tracing.utils import (
    SpanAggregationNode,
    TraceJSONEncoder,
    aggregate_cost_from_span_nodes,
    aggregate_usage_from_span_nodes,
)
from mlflow.tracing.utils.truncation import (
    _get_last_message,
    _get_text_content_from_message,
    _try_extract_messages,
)
from mlflow.utils.providers import cost_per_token
from opentelemetry.trace import SpanContext, Status, StatusCode

from inference_table.record import EncodedTrace, no_pause
from serving.snapshot import Snapshot, compact_string, head_text, readable_json, thaw, well_formed
from serving.spans import RecordedSpan, raw_attributes

__all__ = ["SpanState", "TraceSnapshot", "read_span"]

LARGE: Final = 64 * 1024
"""Bytes of an attribute that is a part of its own."""
ROUTING_PREFIXES: Final = ("gateway:/", "endpoints:/")
"""Model names that MLflow knows to be routes: no price list has them."""
FROM_OTEL: Final = "\0otel"
NO_EXPERIMENT: Final = MlflowExperimentLocation(None)  # type: ignore[arg-type] # as in MLflow's own serving


@dataclass(slots=True)
class SpanState:
    """What one span holds: its fields, the attributes others put on it, and the snapshots."""

    context: SpanContext
    parent: SpanContext | None
    name: str
    start_time: int
    end_time: int | None
    status: Status
    events: list[dict[str, Any]]
    links: list[dict[str, Any]]
    raw: dict[str, Any]
    values: dict[str, Snapshot]

    def value(self, key: str) -> Any:
        """One attribute, as a reader of the trace gets it."""
        if key in self.values:
            return thaw(self.values[key])
        raw = self.raw.get(key)
        if not isinstance(raw, str):
            return raw
        try:
            return json.loads(raw)
        except ValueError:
            return raw

    def head(self, key: str, limit: int) -> str | None:
        """The beginning of one attribute's text, one character longer than ``limit`` if there is more."""
        if key in self.values:
            return head_text(self.values[key], limit)
        raw = self.raw.get(key)
        return raw[: limit + 1] if isinstance(raw, str) else None

    def encode(self, give_way: Callable[[], None]) -> Iterator[bytes]:
        """The span's JSON, in parts: a large attribute is one of its own, so that no step takes long."""
        raw = {
            key: readable_json(value) if isinstance(value, str) else value
            for key, value in self.raw.items()
            if key not in self.values
        }
        fields = {
            "trace_id": base64_id(self.context.trace_id, 16),
            "span_id": base64_id(self.context.span_id, 8),
            "parent_span_id": base64_id(self.parent.span_id, 8) if self.parent else None,
            "name": self.name,
            "start_time_unix_nano": self.start_time,
            "end_time_unix_nano": self.end_time,
            "events": self.events,
            "status": {
                "code": f"STATUS_CODE_{self.status.status_code.name}",
                "message": self.status.description or "",
            },
            "links": self.links,
            "attributes": raw,
        }
        small = [dumps(fields).removesuffix(b"}}")]
        comma = b"," if raw else b""
        for key, value in self.values.items():
            small.append(comma + dumps(key) + b":")
            text = compact_string(value)
            if len(text) < LARGE:
                small.append(text)
            else:
                yield b"".join(small)
                yield text
                small = []
                give_way()
            comma = b","
        small.append(b"}}")
        yield b"".join(small)


def read_span(span: LiveSpan) -> SpanState:
    """A span as it is now. An open one can still change, so it is read when its trace is sealed."""
    otel: Any = span._span
    return SpanState(
        context=otel.context,
        parent=otel.parent,
        name=otel.name,
        start_time=otel.start_time,
        end_time=otel.end_time,
        status=otel.status,
        events=[event_dict(event) for event in otel.events],
        links=[link.to_dict() for link in span.links],
        raw=raw_attributes(otel),
        values=span.values() if isinstance(span, RecordedSpan) else {},
    )


def event_dict(event: Any) -> dict[str, Any]:
    attributes = dict(event.attributes or {})
    return {"name": event.name, "time_unix_nano": event.timestamp, "attributes": attributes}


@dataclass(slots=True)
class TraceSnapshot:
    """One trace of a request, to be encoded once.

    ``info`` is a copy. ``spans`` are those that had ended, which can't change any more, and states of the
    others. ``root`` is the position of the root span.
    """

    info: TraceInfo
    spans: Sequence[LiveSpan | SpanState]
    root: int | None

    def encode(self, give_way: Callable[[], None] = no_pause) -> EncodedTrace:
        """The trace as ``mlflow.entities.Trace.from_dict`` takes it.

        Values that agents record always have a JSON form, see :mod:`serving.snapshot`; what instrumentors put
        on OpenTelemetry spans themselves may not.

        Raises:
            TypeError, ValueError: some part of the trace has no JSON form.
        """
        states = [span if isinstance(span, SpanState) else read_span(span) for span in self.spans]
        for state in states:
            translate(state)
            price(state)
        usage = aggregate_usage_from_span_nodes(list(nodes(states, SpanAttributeKey.CHAT_USAGE)))
        cost = aggregate_cost_from_span_nodes(list(nodes(states, SpanAttributeKey.LLM_COST)))
        self._complete_info(states, usage, cost)
        info = encode_info(self.info)
        parts = [b'{"info":%b,"data":{"spans":[' % info]
        for number, state in enumerate(states):
            if number:
                parts.append(b",")
            parts += state.encode(give_way)
            give_way()
        parts.append(b"]}}")
        return EncodedTrace(
            parts=parts,
            info=info,
            trace_id=self.info.trace_id,
            state=self.info.state.value,
            span_count=len(states),
            input_tokens=usage[TokenUsageKey.INPUT_TOKENS] if usage else None,
            output_tokens=usage[TokenUsageKey.OUTPUT_TOKENS] if usage else None,
            total_cost_usd=cost[CostKey.TOTAL_COST] if cost else None,
        )

    def leave_experiment(self) -> None:
        """Say that the trace is in no experiment, for a client that gets it.

        ``mlflow.genai.to_predict_fn`` copies it into the client's experiment, but not a trace that names that
        one already, and as often as not both are the default's.
        """
        self.info.trace_location = TraceLocation(TraceLocationType.MLFLOW_EXPERIMENT, NO_EXPERIMENT)

    def _complete_info(
        self, states: list[SpanState], usage: dict[str, int] | None, cost: dict[str, float] | None
    ) -> None:
        """Fill in what MLflow's span processor and exporter fill in when the root span ends."""
        info, metadata = self.info, self.info.trace_metadata
        if usage:
            metadata[TraceMetadataKey.TOKEN_USAGE] = json.dumps(usage)
        if cost:
            metadata[TraceMetadataKey.COST] = json.dumps(cost)
        if self.root is None:
            return
        root = states[self.root]
        metadata[TraceMetadataKey.INPUTS] = metadata_text(root, SpanAttributeKey.INPUTS)
        metadata[TraceMetadataKey.OUTPUTS] = metadata_text(root, SpanAttributeKey.OUTPUTS)
        if info.request_preview is None:
            info.request_preview = preview(root, SpanAttributeKey.INPUTS, "user")
        if info.response_preview is None:
            info.response_preview = preview(root, SpanAttributeKey.OUTPUTS, "assistant")
        info.request_time = root.start_time // 1_000_000
        if root.end_time is not None:
            info.execution_duration = (root.end_time - root.start_time) // 1_000_000
            if info.state is TraceState.IN_PROGRESS:
                failed = root.status.status_code is StatusCode.ERROR
                info.state = TraceState.ERROR if failed else TraceState.OK


def nodes(states: list[SpanState], key: str) -> Iterator[SpanAggregationNode]:
    for state in states:
        parent = str(state.parent.span_id) if state.parent else None
        yield SpanAggregationNode(str(state.context.span_id), parent, numbers(state.value(key)))


def numbers(value: Any) -> dict[str, Any] | None:
    """Usage or cost as recorded, without what can't be added up."""
    if not isinstance(value, dict):
        return None
    return {key: number for key, number in value.items() if isinstance(number, int | float)}


def translate(state: SpanState) -> None:
    """Give a span of an OpenTelemetry-only instrumentor MLflow's attributes, as MLflow's server does."""
    if state.values.get(SpanAttributeKey.SPAN_TYPE, "") is not None:
        return  # made by MLflow's own API, which sets a type
    # Imported late: it costs a few milliseconds, and most agents have no such spans.
    from mlflow.tracing.otel.translation import translate_span_when_storing

    raw = dict(state.raw)
    # A cost, even none, keeps the translation from looking up prices on the network.
    priced = raw.setdefault(SpanAttributeKey.LLM_COST, FROM_OTEL)
    span = cast(Any, Translatable({"attributes": raw, "events": state.events}))
    try:
        translated = translate_span_when_storing(span)
    except Exception:  # noqa: BLE001 - what instrumentors write may trip a translator; it stays as they wrote it
        return
    state.raw = translated["attributes"]
    if priced == FROM_OTEL:
        del state.raw[SpanAttributeKey.LLM_COST]
    if SpanAttributeKey.SPAN_TYPE in state.raw:
        del state.values[SpanAttributeKey.SPAN_TYPE]


class Translatable:
    """The part of a span that MLflow's translation reads."""

    def __init__(self, as_dict: dict[str, Any]) -> None:
        self._as_dict = as_dict

    def to_dict(self) -> dict[str, Any]:
        return self._as_dict


def price(state: SpanState) -> None:
    """Set a span's cost in dollars from its model and tokens, as MLflow's server does, unless it has one.

    The price lists that come with MLflow are used. A list from the network, MLflow's default for a known
    provider, only where ``MLFLOW_MODEL_CATALOG_URI`` is set: a failed download takes seconds.
    """
    if SpanAttributeKey.LLM_COST in state.values or SpanAttributeKey.LLM_COST in state.raw:
        return
    model, usage = state.value(SpanAttributeKey.MODEL), numbers(state.value(SpanAttributeKey.CHAT_USAGE))
    if not isinstance(model, str) or not usage or model.startswith(ROUTING_PREFIXES):
        return
    provider = state.value(SpanAttributeKey.MODEL_PROVIDER) if MLFLOW_MODEL_CATALOG_URI.is_set() else None
    prices = cost_per_token(
        model,
        prompt_tokens=usage.get(TokenUsageKey.INPUT_TOKENS, 0),
        completion_tokens=usage.get(TokenUsageKey.OUTPUT_TOKENS, 0),
        custom_llm_provider=provider.lower() if isinstance(provider, str) else None,
        cache_read_input_tokens=usage.get(TokenUsageKey.CACHE_READ_INPUT_TOKENS),
        cache_creation_input_tokens=usage.get(TokenUsageKey.CACHE_CREATION_INPUT_TOKENS),
    )
    if prices is not None:
        total = {
            CostKey.INPUT_COST: prices[0],
            CostKey.OUTPUT_COST: prices[1],
            CostKey.TOTAL_COST: sum(prices),
        }
        state.values[SpanAttributeKey.LLM_COST] = total


def metadata_text(root: SpanState, key: str) -> str:
    text = root.head(key, MAX_CHARS_IN_TRACE_INFO_METADATA) or ""
    if len(text) <= MAX_CHARS_IN_TRACE_INFO_METADATA:
        return text
    return text[: MAX_CHARS_IN_TRACE_INFO_METADATA - len(TRUNCATION_SUFFIX)] + TRUNCATION_SUFFIX


def preview(root: SpanState, key: str, role: str) -> str | None:
    """The last message of a chat, else the beginning of the text."""
    limit = TRACE_REQUEST_RESPONSE_PREVIEW_MAX_LENGTH_OSS
    text = root.head(key, limit)
    if text is None:
        return None
    value = root.value(key)
    if isinstance(value, dict) and (messages := _try_extract_messages(value)):
        content = _get_text_content_from_message(_get_last_message(messages, role=role))
        text = content if content and isinstance(content, str) else text
    return text if len(text) <= limit else text[: limit - 3] + "..."


def encode_info(info: TraceInfo) -> bytes:
    try:
        return dumps(info.to_dict())
    except (TypeError, UnicodeEncodeError):
        # Protocol buffers, by which MLflow turns this into a dictionary, take no lone surrogates, and its
        # truncation no keys that are not text.
        info.request_preview = info.request_preview and well_formed(info.request_preview)
        info.response_preview = info.response_preview and well_formed(info.response_preview)
        for texts in (info.tags, info.trace_metadata):
            cleaned = {well_formed(str(key)): well_formed(str(value)) for key, value in texts.items()}
            texts.clear()
            texts.update(cleaned)
        return dumps(info.to_dict())


def dumps(value: dict[str, Any] | str) -> bytes:
    """JSON that every reader takes: no NaN, no half characters, which would fail a whole query."""
    try:
        return orjson.dumps(value)
    except TypeError:
        # Names and attributes set on the OpenTelemetry span itself may hold what only MLflow's encoder takes.
        plain = json.loads(json.dumps(value, cls=TraceJSONEncoder), parse_constant=lambda _: None)
        return well_formed(json.dumps(plain, ensure_ascii=False)).encode()


def base64_id(number: int, length: int) -> str:
    return b64encode(number.to_bytes(length, "big")).decode()
