"""What stands between an exchange and the server where a reply is held or rewritten.

Both are ``send`` callables for one request: :class:`DurableReply` holds the end of the reply until its record
is durable, :class:`TraceReply` puts the trace into it. Other replies go through neither.
"""

import asyncio
import re
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final

import orjson

from inference_table import metrics
from inference_table.errors import DurabilityError
from inference_table.record import DatabricksOutput, return_trace
from inference_table.settings import Durability
from serving.border import Border, reporter
from serving.exchange import DURABILITY_HEADER, REQUEST_ID_HEADER, Exchange, Message, Send

__all__ = ["DurableReply", "TraceReply"]

RECEIPTS: Final = {Durability.STRICT: b"spooled", Durability.COMMITTED: b"committed"}
END_MARKER: Final = re.compile(rb"(?<![^\r\n])data: ?\[DONE\]")
"""How OpenAI-style streams say that they are complete, at the start of a line: our event goes before it."""
MARKER_HEADS: Final = frozenset(
    marker[:length] for marker in (b"data: [DONE]", b"data:[DONE]") for length in range(1, len(marker))
)
RETURN_TRACE: Final = Border("return_trace")


class DurableReply:
    """Holds the end of a reply until its record is durable.

    The start is held until the first body message. Where that is also the last, the whole reply is held, and
    a failure becomes a 503. A stream whose record fails ends without its last chunk, so that no client takes
    it for complete.

    Args:
        exchange: the request; sealed here, at its last body message.
        send: the server's.
        put: hands the exchange to the writer; the future is done once it is durable.
        timeout_seconds: how long the reply is held at most.
    """

    def __init__(
        self,
        exchange: Exchange,
        send: Send,
        put: Callable[[Exchange, Durability], "Future[None]"],
        timeout_seconds: float,
    ) -> None:
        self._exchange = exchange
        self._send = send
        self._put = put
        self._timeout = timeout_seconds
        self._start: Message | None = None
        self._withheld = False
        self._is_cut = False

    async def __call__(self, message: Message) -> None:
        if self._withheld:
            return
        if message["type"] == "http.response.start":
            self._start = message
        elif message["type"] == "http.response.body":
            await self._body(message)
        else:
            await self._send(message)

    async def _body(self, message: Message) -> None:
        last = not self._exchange.is_cut_off
        start, self._start = self._start, None
        if last and (failure := await self.record()) is not None:
            self._withheld = True
            self._is_cut = start is None
            if start is not None:
                await self.refuse(failure)
            return
        if start is not None:
            receipt = RECEIPTS[self._exchange.durability] if last else self._exchange.durability.encode()
            await self._send(with_header(start, DURABILITY_HEADER, receipt))
        await self._send(message)

    async def ended(self) -> None:
        """The app returned. A stream that was cut is made to look so, whatever is outside of us.

        Raises:
            RuntimeError: the server's, for a second start: the one thing that makes it abort the transfer
                even where an outer middleware (Starlette's ``BaseHTTPMiddleware``) adds the last chunk.
        """
        if self._is_cut:
            await self._send({"type": "http.response.start", "status": 500, "headers": []})

    async def fail(self) -> None:
        """The app raised: what was held never leaves, and an error before the start is recorded as one.

        The caller raises on, so the server answers 500; where even that can't be recorded we answer 503.
        """
        self._start = None
        if (failure := await self.record()) is not None and not self._exchange.start_sent:
            self._withheld = True
            await self.refuse(failure)

    async def record(self) -> str | None:
        """Wait until the record is durable; why it isn't, where it isn't."""
        if not self._exchange.finalize():
            return None
        try:
            future = self._put(self._exchange, self._exchange.durability)
        except Exception as failure:  # the capture border: here a failure of ours is an answer, not silence
            metrics.DURABILITY_FAILURES.labels("error").inc()
            reporter.failure("durability:error", "a reply could not be handed to the writer", failure)
            return f"{type(failure).__name__}: {failure}"
        waiter = asyncio.wrap_future(future)
        # Nobody may be left to look at a failure that comes after the timeout.
        waiter.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.wait({waiter}, timeout=self._timeout)
        if not waiter.done():
            reason, why = "timeout", f"the record was not {self._receipt} within {self._timeout:g} s"
        elif isinstance(error := waiter.exception(), DurabilityError):
            reason, why = "dropped", str(error)
        elif error is not None:
            reason, why = "error", f"{type(error).__name__}: {error}"
        else:
            return None
        metrics.DURABILITY_FAILURES.labels(reason).inc()
        reporter.failure(
            f"durability:{reason}", f"a {self._exchange.durability} reply was not recorded: {why}"
        )
        return why

    @property
    def _receipt(self) -> str:
        return RECEIPTS[self._exchange.durability].decode()

    async def refuse(self, why: str) -> None:
        """Answer 503 in place of a reply that may not leave unrecorded."""
        await refuse(self._send, why, self._exchange.request_id)


async def refuse(send: Send, why: str, request_id: str | None = None) -> None:
    """Answer 503: what may not leave unrecorded does not."""
    content = {
        "error_code": "TEMPORARILY_UNAVAILABLE",
        "message": f"The reply is withheld because it could not be recorded: {why}",
        "databricks_request_id": request_id,
    }
    body = orjson.dumps(content)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (DURABILITY_HEADER, b"unknown"),
    ]
    if request_id is not None:
        headers.append((REQUEST_ID_HEADER, request_id.encode()))
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class TraceReply:
    """Puts ``databricks_output`` into the client's own reply (``databricks_options.return_trace``).

    A JSON reply is buffered and its length corrected; a stream gets one event more, before its end marker; a
    compressed reply or another type is left alone, and so is a reply over the payload limit.

    Args:
        exchange: the request; its traces are read as they are at the end of the reply.
        send: the next stage.
        wanted: whether the request asks for its trace.
        output: the ``databricks_output`` of the reply.
    """

    def __init__(
        self,
        exchange: Exchange,
        send: Send,
        *,
        wanted: Callable[[], bool],
        output: Callable[[], DatabricksOutput],
    ) -> None:
        self._exchange = exchange
        self._send = send
        self._wanted = wanted
        self._output = output
        self._forward = send
        self._start: Message | None = None
        self._chunks: list[bytes] = []
        self._size = 0
        self._marked = False
        self._held = b""
        self._line_start = True

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._forward = self._choose()
        await self._forward(message)

    def _choose(self) -> Send:
        response = self._exchange.response
        with RETURN_TRACE:
            if not response.encoding and self._wanted():
                media_type = response.media_type.partition(";")[0].strip().lower()
                if media_type == "application/json":
                    return self._json
                if media_type == "text/event-stream":
                    return self._stream
        return self._send

    async def _json(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        if message["type"] != "http.response.body" or self._start is None:
            await self._send(message)
            return
        body = message.get("body", b"")
        self._chunks.append(body)
        self._size += len(body)
        more = message.get("more_body", False)
        response = self._exchange.response
        if more and self._size <= response.limit and not response.out_of_memory:
            return
        start, self._start = self._start, None
        body = b"".join(self._chunks)
        self._chunks.clear()
        if not more:
            with RETURN_TRACE:
                if (spliced := return_trace(body, self._output())) is not None:
                    start, body = with_length(start, len(spliced)), spliced
        await self._send(start)
        await self._send({**message, "body": body})

    async def _stream(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            message = without_length(message)
        elif message["type"] == "http.response.body" and not self._marked:
            message = self._with_event(message)
        await self._send(message)

    def _with_event(self, message: Message) -> Message:
        """The message with our event before the end marker, or at the end; a marker may come in parts."""
        body, self._held = self._held + bytes(message.get("body", b"")), b""
        found = next((one for one in END_MARKER.finditer(body) if one.start() or self._line_start), None)
        if found is not None or not message.get("more_body", False):
            self._marked = True
            at = len(body) if found is None else found.start()
            return {**message, "body": body[:at] + self._event(last=found is None) + body[at:]}
        line = max(body.rfind(b"\n"), body.rfind(b"\r")) + 1
        if (line or self._line_start) and body[line:] in MARKER_HEADS:
            body, self._held = body[:line], body[line:]
        if body:
            self._line_start = body.endswith((b"\n", b"\r"))
        return {**message, "body": body}

    def _event(self, *, last: bool) -> bytes:
        with RETURN_TRACE:
            # The event before may have left out its blank line.
            gap = b"\n\n" if last else b""
            output = b"".join(self._output().to_json())
            return gap + b'data: {"databricks_output":' + output + b"}\n\n"
        return b""


def with_header(message: Message, name: bytes, value: bytes) -> Message:
    return {**message, "headers": [*message.get("headers", ()), (name, value)]}


def without_length(message: Message) -> Message:
    headers = [
        (name, value) for name, value in message.get("headers", ()) if name.lower() != b"content-length"
    ]
    return {**message, "headers": headers}


def with_length(message: Message, length: int) -> Message:
    return with_header(without_length(message), b"content-length", str(length).encode())
