"""The state of one request: what passed in both directions, when, and the traces made meanwhile.

An exchange keeps references and clock readings only; :mod:`serving.encode` turns it into a row later, in the
writer's thread. ``capture_overhead_us`` is the time spent in this module's hooks and in the span hooks of
:mod:`serving.tracing`; the wait of a durable reply is not in it.
"""

import time
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from time import perf_counter_ns
from typing import Any, Final, Protocol

from inference_table.memory import MemoryBudget
from inference_table.record import Row
from inference_table.settings import Durability
from serving.border import Border
from serving.tracing import RequestTraces

__all__ = ["Body", "Exchange", "Gate", "Message", "Receive", "Send", "header_text"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

REQUEST_ID_HEADER: Final = b"x-databricks-request-id"
DURABILITY_HEADER: Final = b"x-inference-table-durability"
REQUESTER_KEY: Final = "tracelake.requester"
"""Of a scope: who asks, as found out on the way in. No client can set it."""
CLIENT_CLOSED_REQUEST: Final = 499
"""nginx's status for a client that left before its reply was complete."""
INTERNAL_SERVER_ERROR: Final = 500

NO_EVENT: Final = (b":", b"retry:", b"id:")
"""How a chunk of a stream begins that is no event: a comment, which keeps proxies waiting, or a setting."""
HEAD: Final = 16
"""Bytes of a chunk that tell whether it is one: line ends, then the beginning of a line."""
OURS: Final = frozenset({REQUEST_ID_HEADER, DURABILITY_HEADER})
"""An agent may pass on what another endpoint of ours answered; the reply's own headers are for its row."""
FINISH: Final = Border("finish")
OBSERVE_REQUEST: Final = Border("request")
OBSERVE_RESPONSE: Final = Border("response")


class Body:
    """The bytes of one direction, by reference, up to a limit and while there is memory."""

    __slots__ = ("chunks", "encoding", "kept", "limit", "media_type", "out_of_memory", "size")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.chunks: list[bytes] = []
        self.size = 0
        self.kept = 0
        self.out_of_memory = False
        self.media_type = ""
        self.encoding = ""

    def describe(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        for name, value in headers:
            lowered = name.lower()
            if lowered == b"content-type":
                self.media_type = header_text(value)
            elif lowered == b"content-encoding":
                self.encoding = header_text(value)

    def add(self, chunk: bytes, budget: MemoryBudget) -> int:
        """Keep a chunk where it fits; returns the bytes reserved."""
        self.size += len(chunk)
        room = self.limit - self.kept
        if not chunk or room <= 0 or self.out_of_memory:
            return 0
        head = chunk if len(chunk) <= room else chunk[:room]
        if not budget.reserve(len(head)):
            self.out_of_memory = True
            return 0
        self.chunks.append(head if type(head) is bytes else bytes(head))
        self.kept += len(head)
        return len(head)

    @property
    def is_truncated(self) -> bool:
        return self.kept < self.size


class Gate(Protocol):
    """What holds a durable reply (:class:`serving.replies.DurableReply`)."""

    async def ended(self) -> None:
        """The app returned."""

    async def fail(self) -> None:
        """The app raised, or returned without completing its reply."""


class Exchange:
    """One request and its reply: the ``Recordable`` that the writer takes over.

    Times are ``perf_counter_ns`` readings, but ``request_time_ns``, which is Unix time.
    """

    def __init__(
        self,
        scope: Mapping[str, Any],
        receive: Receive,
        send: Send,
        *,
        request_id: str,
        traces: RequestTraces,
        durability: Durability,
        limit: int,
        grace_seconds: float,
        budget: MemoryBudget,
        hand_over: Callable[["Exchange"], object],
        encode: Callable[["Exchange", Callable[[], None]], Row],
    ) -> None:
        self.started_ns = perf_counter_ns()
        self.request_time_ns = time.time_ns()
        self.request_id = request_id
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.request_headers: list[tuple[bytes, bytes]] = scope["headers"]
        self.requester: str | None = scope.get(REQUESTER_KEY)
        self.durability = durability
        self.traces = traces
        self.traces_dropped = False
        self.request = Body(limit)
        self.response = Body(limit)
        self.status_code: int | None = None
        self.disconnected = False
        self.error: str | None = None
        """What the app raised, as text: the exception itself would keep the request alive."""
        self.first_byte_ns: int | None = None
        self.first_event_ns: int | None = None
        self.last_event_ns: int | None = None
        self.largest_gap_ns = 0
        """Longest wait between two chunks that are events, if the reply is a stream."""
        self.sent_bytes = 0
        """Of the reply's body, while the client was there as far as is known."""
        self.finished_ns: int | None = None
        self.reserved_bytes = 0
        self.reply: Send = self.transmit
        self.gate: Gate | None = None
        self._receive = receive
        self._transmit = send
        self.start_sent = False
        self._left = float("inf")
        self.app_returned = False
        self.is_request_read = False
        self.is_request_complete = False
        self._response_complete = False
        self._handed_over = False
        self._budget = budget
        self._hand_over = hand_over
        self._encode = encode
        self._grace_ns = int(grace_seconds * 1e9)
        self.overhead_ns = 0
        self.request.describe(self.request_headers)

    # --- between the server and the app ---

    async def receive(self) -> Message:
        """The app's ``receive``: tees the request body."""
        message = await self._receive()
        started = perf_counter_ns()
        with OBSERVE_REQUEST:
            if message["type"] == "http.request" and not self._handed_over:
                self.reserved_bytes += self.request.add(message.get("body", b""), self._budget)
                self.is_request_read = True
                self.is_request_complete = not message.get("more_body", False)
            elif message["type"] == "http.disconnect" and not self._response_complete:
                self.disconnected = True
        self.overhead_ns += perf_counter_ns() - started
        return message

    async def send(self, message: Message) -> None:
        """The app's ``send``: tees the reply, adds our headers, hands over after the last byte."""
        started = perf_counter_ns()
        with OBSERVE_RESPONSE:
            message = self._observe(message, started)
        self.overhead_ns += perf_counter_ns() - started
        try:
            await self.reply(message)
        except OSError:
            # How servers tell an app that its client is gone (ASGI 2.4).
            self.disconnected = True
            raise
        if not self.disconnected:
            self.sent_bytes += len(message.get("body", b""))
        if self._response_complete:
            with FINISH:
                self.finish()

    async def transmit(self, message: Message) -> None:
        """The server's ``send``, at the end of whatever holds or rewrites the reply."""
        if message["type"] == "http.response.start":
            self.start_sent = True
        await self._transmit(message)

    def _observe(self, message: Message, now: int) -> Message:
        if message["type"] == "http.response.start":
            self.status_code = message["status"]
            headers = [header for header in message.get("headers", ()) if header[0].lower() not in OURS]
            self.response.describe(headers)
            self._left = content_length(headers)
            headers.append((REQUEST_ID_HEADER, self.request_id.encode()))
            if self.durability is Durability.RELAXED:
                headers.append((DURABILITY_HEADER, b"queued"))
            return {**message, "headers": headers}
        if message["type"] == "http.response.body":
            self._observe_body(message, now)
        return message

    def _observe_body(self, message: Message, now: int) -> None:
        body = message.get("body", b"")
        if not self._response_complete:
            self.disconnected = self.disconnected or has_left(self._receive)
        if body and not self._handed_over:
            self.reserved_bytes += self.response.add(body, self._budget)
            self.first_byte_ns = self.first_byte_ns or now
            if self.response.encoding or is_event(body):
                self._observe_event(now)
        # A client takes a reply of known length for complete before the empty message that ends it.
        self._left -= len(body)
        if not message.get("more_body", False) or self._left <= 0:
            self._response_complete = True

    def _observe_event(self, now: int) -> None:
        if self.last_event_ns is None:
            self.first_event_ns = now
        else:
            self.largest_gap_ns = max(self.largest_gap_ns, now - self.last_event_ns)
        self.last_event_ns = now

    # --- the end ---

    def failed(self, error: BaseException) -> None:
        """The app raised. What it had sent stays; without a reply, the server answers 500."""
        if self._response_complete:
            return
        with FINISH:
            self.error = "".join(traceback.format_exception_only(error)).strip()

    def finish(self) -> None:
        """Hand over to the writer, once."""
        started = perf_counter_ns()
        if self.finalize():
            self._hand_over(self)
            self.overhead_ns += perf_counter_ns() - started  # in time: the writer reads it when it encodes

    def finalize(self) -> bool:
        """Close the clocks; False where that was done before."""
        if self._handed_over:
            return False
        self._handed_over = True
        if self.is_cut_off and not self.start_sent:
            self.status_code = None  # the server answers in the app's place
        self.finished_ns = perf_counter_ns()
        return True

    @property
    def recorded_status(self) -> int:
        """What the client got."""
        if self.disconnected:
            return CLIENT_CLOSED_REQUEST
        if self.status_code is None:
            return INTERNAL_SERVER_ERROR
        return self.status_code

    @property
    def is_cut_off(self) -> bool:
        """Whether the reply ended before its last message."""
        return not self._response_complete

    # --- for the writer ---

    @property
    def trace_bytes(self) -> int:
        return self.traces.nbytes

    def is_ready(self) -> bool:
        # An app that has not returned yet runs background tasks, whose spans may not have begun.
        if self.app_returned and self.traces.is_complete():
            return True
        return perf_counter_ns() - (self.finished_ns or 0) >= self._grace_ns

    def drop_traces(self) -> None:
        self.traces_dropped = True
        self.traces.seal()

    def encode(self, give_way: Callable[[], None]) -> Row:
        return self._encode(self, give_way)


def content_length(headers: Iterable[tuple[bytes, bytes]]) -> float:
    for name, value in headers:
        if name.lower() == b"content-length" and value.isdigit():
            return float(value)
    return float("inf")


def is_event(chunk: bytes) -> bool:
    """Whether a chunk of a stream holds an event, or a part of one. Looks at its beginning only."""
    head = bytes(chunk[:HEAD]).lstrip(b"\r\n")
    if not head.startswith(NO_EVENT):
        return bool(head) or len(chunk) > HEAD
    return b"\ndata" in bytes(chunk).replace(b"\r", b"\n")


def has_left(receive: Receive) -> bool:
    """Whether uvicorn knows that the client is gone.

    An app that never asks (``receive``) would not hear of it, and uvicorn drops what it sends without a word;
    its request cycle has the answer in ``disconnected``. Elsewhere we know what the app was told.
    """
    return getattr(getattr(receive, "__self__", None), "disconnected", False) is True


def header_text(value: bytes) -> str:
    return value.decode("latin-1").strip()
