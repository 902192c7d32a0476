"""From an exchange to its row: everything that costs per byte, done in the writer's thread.

A part that can fail for a reason of the payload's fails alone: the row is written without it and says so in
``logging_error_codes``.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final

from inference_table import metrics
from inference_table.content_encoding import decode_body
from inference_table.record import (
    DatabricksOutput,
    EncodedTrace,
    Row,
    client_request_id,
    request_column,
    response_column,
)
from inference_table.schema import ErrorCode
from inference_table.settings import Durability
from serving.border import Border, reporter
from serving.exchange import Body, Exchange, header_text
from serving.redaction import Redact, redacted
from serving.settings import CaptureSettings
from serving.streams import aggregate, is_stream, stream_facts
from serving.tracing import TraceSnapshot, is_export_wanted

__all__ = ["RowEncoder"]

METADATA_HEADERS: Final = {
    b"x-request-id": "x-request-id",
    b"traceparent": "traceparent",
    b"user-agent": "user-agent",
    b"x-tracelake-replay-of": "replay_of",
    b"x-tracelake-replay-run": "replay_run",
}
"""Request headers kept in ``request_metadata``. Never Authorization or Cookie."""
ENCODE_TRACE: Final = Border("encode_trace")


class RowEncoder:
    """Turns exchanges into rows.

    Args:
        settings: names for ``served_entity_id`` and ``requester``, and the sampling fraction.
        limit: bytes kept of the request, the response and the trace, each.
        redact: sees each payload before it is written.
    """

    def __init__(self, settings: CaptureSettings, limit: int, redact: Redact | None) -> None:
        self._settings = settings
        self._limit = limit
        self._redact = redact

    def output(self, exchange: Exchange) -> DatabricksOutput:
        """What a client that may ask for its trace gets: the traces as they are now."""
        snapshots = exchange.traces.peek()
        if not is_export_wanted():
            for snapshot in snapshots:
                snapshot.leave_experiment()
        return DatabricksOutput(exchange.request_id, [snapshot.encode() for snapshot in snapshots])

    def encode(self, exchange: Exchange, give_way: Callable[[], None]) -> Row:
        """The row of a finished exchange. Seals its traces.

        ``give_way`` is called between steps, so that none keeps the threads waiting that answer requests.
        """
        codes: list[str] = []
        traces = self._traces(exchange, codes, give_way)
        give_way()
        request = Part("request", exchange.request, self._limit, codes)
        response = Part("response", exchange.response, self._limit, codes)
        if exchange.is_request_read and not exchange.is_request_complete:
            request.cut_short(ErrorCode.REQUEST_INCOMPLETE, codes)
        if exchange.is_cut_off and exchange.start_sent and not is_stream(response.media_type):
            response.cut_short(ErrorCode.RESPONSE_INCOMPLETE, codes)
        give_way()
        stream = aggregate_stream(exchange, response)
        withheld = False
        if self._redact is not None:
            try:
                request.body, response.body, traces, error = redacted(
                    self._redact, request.body, response.body, traces, stream["error"] if stream else None
                )
                if stream is not None:
                    stream["error"] = error
            except Exception as failure:  # the capture border: the user's callable may raise anything
                codes.append(ErrorCode.REDACTION_FAILED)
                metrics.CAPTURE_ERRORS.labels("redact").inc()
                reporter.failure("redact", "redact failed; a row's payload is withheld", failure)
                withheld, traces, stream = True, [], None
        output = DatabricksOutput(exchange.request_id, traces, stream)
        row = self._row(exchange, codes)
        give_way()
        if not withheld:
            if exchange.is_request_read:
                row.client_request_id = client_request_id(request.body)
                row.request = request_column(request.body, missing=request.missing)
                give_way()
            row.response = response_column(
                response.body, output, content_type=response.media_type, missing=response.missing
            )
        if traces:
            describe_trace(row, traces[0])
        return row

    def _traces(
        self, exchange: Exchange, codes: list[str], give_way: Callable[[], None]
    ) -> list[EncodedTrace]:
        snapshots: Sequence[TraceSnapshot] | None = None
        with ENCODE_TRACE:
            snapshots = exchange.traces.seal()
        if snapshots is None:
            codes.append(ErrorCode.TRACE_ENCODING_FAILED)
            return []
        if exchange.traces_dropped:
            self._too_large(codes)
            return []
        encoded: list[EncodedTrace] = []
        for snapshot in snapshots:
            done = len(encoded)
            with ENCODE_TRACE:
                encoded.append(snapshot.encode(give_way))
            if len(encoded) == done:
                codes.append(ErrorCode.TRACE_ENCODING_FAILED)
        return [self._within_limit(trace, codes) for trace in encoded]

    def _within_limit(self, trace: EncodedTrace, codes: list[str]) -> EncodedTrace:
        if trace.nbytes <= self._limit:
            return trace
        self._too_large(codes)
        cut = b'{"info":%b,"data":{"spans":[]},"truncated_bytes":%d}' % (trace.info, trace.nbytes)
        return replace(trace, parts=[cut])

    def _too_large(self, codes: list[str]) -> None:
        codes.append(ErrorCode.MAX_TRACE_SIZE_EXCEEDED)
        metrics.TRUNCATED.labels("trace", "size").inc()

    def _row(self, exchange: Exchange, codes: list[str]) -> Row:
        finished = exchange.finished_ns or exchange.started_ns
        overhead_ns = exchange.overhead_ns + exchange.traces.overhead_ns
        metrics.CAPTURE_OVERHEAD.observe(overhead_ns / 1e9)
        return Row(
            databricks_request_id=exchange.request_id,
            request_time=datetime.fromtimestamp(exchange.request_time_ns / 1e9, UTC),
            status_code=exchange.recorded_status,
            sampling_fraction=self._sampling_fraction(exchange),
            execution_duration_ms=(finished - exchange.started_ns) // 1_000_000,
            request=None,
            response=None,
            logging_error_codes=codes,
            served_entity_id=self._settings.served_entity,
            requester=self._requester(exchange),
            request_metadata=self._metadata(exchange),
            time_to_first_byte_ms=milliseconds(exchange.started_ns, exchange.first_byte_ns),
            capture_overhead_us=overhead_ns // 1000,
        )

    def _sampling_fraction(self, exchange: Exchange) -> float:
        # Durable requests are never sampled out, so each stands for itself alone.
        return self._settings.sampling_fraction if exchange.durability is Durability.RELAXED else 1.0

    def _requester(self, exchange: Exchange) -> str | None:
        if exchange.requester is not None or self._settings.requester_header is None:
            return exchange.requester
        wanted = self._settings.requester_header.lower().encode("latin-1", "replace")
        return next((header_text(value) for name, value in exchange.request_headers if name == wanted), None)

    def _metadata(self, exchange: Exchange) -> dict[str, str]:
        metadata = {"method": exchange.method, "path": exchange.path}
        if exchange.request.media_type:
            metadata["request_content_type"] = exchange.request.media_type
        if exchange.response.media_type:
            metadata["response_content_type"] = exchange.response.media_type
        for name, value in exchange.request_headers:
            if name in METADATA_HEADERS:
                metadata[METADATA_HEADERS[name]] = header_text(value)
        if self._settings.served_entity:
            endpoint, _, version = self._settings.served_entity.rpartition("/")
            metadata["endpoint_name"] = metadata["model_name"] = endpoint or version
            if endpoint:
                metadata["model_version"] = version
        return metadata


class Part:
    """One body, decoded: what of it is kept, and how much is missing."""

    def __init__(self, name: str, body: Body, limit: int, codes: list[str]) -> None:
        self.body = b"".join(body.chunks)
        self.media_type = body.media_type
        self.missing: int | None = body.size - body.kept
        if self.missing:
            codes.append(exceeded(name, body))
            metrics.TRUNCATED.labels(name, "memory" if body.out_of_memory else "size").inc()
        if not body.encoding or not self.body:
            return
        try:
            decoded = decode_body(self.body, body.encoding, limit)
        except ValueError as error:
            codes.append(f"{name.upper()}_DECODING_FAILED")
            reporter.failure(f"decode:{name}", f"a {name} is stored as it came", error)
            self.media_type = "application/octet-stream"
            return
        self.body = decoded.body
        # A body that ends early because the client left is all there is; one at the limit is a head.
        if len(decoded.body) >= limit and not decoded.complete:
            self.missing = None
            if not body.is_truncated:
                codes.append(f"MAX_{name.upper()}_SIZE_EXCEEDED")
                metrics.TRUNCATED.labels(name, "size").inc()

    def cut_short(self, code: ErrorCode, codes: list[str]) -> None:
        """What is kept is the head of a body that ended early; nobody knows how long it would have been."""
        if self.missing == 0:
            self.missing = None
            codes.append(code)


def aggregate_stream(exchange: Exchange, response: Part) -> dict[str, Any] | None:
    """Replace a streamed body by what it adds up to; what is known of the stream, None for other bodies."""
    if not is_stream(response.media_type):
        return None
    body, media_type = response.body, response.media_type
    stream = aggregate(body, media_type)
    if exchange.disconnected and stream.ended and aggregate(body[: exchange.sent_bytes], media_type).ended:
        exchange.disconnected = False  # it left at the end marker, as OpenAI's clients do, with all there was
    if response.missing == 0:
        response.body, response.media_type = stream.body, "application/json"
    return stream_facts(
        stream,
        time_to_first_event_ms=milliseconds(exchange.started_ns, exchange.first_event_ns),
        largest_gap_ms=largest_gap_ms(exchange),
        clean_end=not (exchange.is_cut_off or exchange.disconnected),
        cut_off_by_client=exchange.disconnected,
        error=exchange.error,
    )


def largest_gap_ms(exchange: Exchange) -> int:
    """The longest wait for an event, in vain too: the client left, or the agent failed."""
    gap_ns = exchange.largest_gap_ns
    if (exchange.is_cut_off or exchange.disconnected) and exchange.last_event_ns is not None:
        gap_ns = max(gap_ns, (exchange.finished_ns or 0) - exchange.last_event_ns)
    return gap_ns // 1_000_000


def exceeded(name: str, body: Body) -> str:
    return ErrorCode.MEMORY_LIMIT_EXCEEDED if body.out_of_memory else f"MAX_{name.upper()}_SIZE_EXCEEDED"


def describe_trace(row: Row, trace: EncodedTrace) -> None:
    row.trace_id = trace.trace_id
    row.trace_state = trace.state
    row.trace_info = trace.info
    row.span_count = trace.span_count
    row.input_tokens = countable(trace.input_tokens)
    row.output_tokens = countable(trace.output_tokens)
    row.total_cost_usd = trace.total_cost_usd


def countable(tokens: int | None) -> int | None:
    """Agents report token counts themselves; one that no column can hold must not fail the whole segment."""
    return tokens if tokens is not None and 0 <= tokens < 2**63 else None


def milliseconds(start_ns: int, end_ns: int | None) -> int | None:
    return None if end_ns is None else (end_ns - start_ns) // 1_000_000
