"""Limits on what an agent is asked for: the size of a request's body, and requests at a time.

What is refused here has been captured already: it is a row, with status 413 or 429, and a counter.
"""

import logging
from typing import Final

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inference_table import metrics
from serving.invocation import error_response
from serving.refusals import refuse

__all__ = ["Limits"]

logger: Final = logging.getLogger("tracelake")

RETRY_AFTER_SECONDS: Final = 1
"""Most requests take seconds, so a place is free by then."""
TRY_AGAIN_LATER: Final = 1013
"""A websocket's close code; before it is accepted, servers answer 403 in its place."""
DISCONNECT: Final = {"type": "http.disconnect"}


class Limits:
    """An ASGI app around another, which is asked no more than that.

    A request counts until the app has returned: a stream as long as it runs, a websocket while it is open.

    Args:
        app: the ASGI app.
        max_request_bytes: of a request's body. Messages of a websocket are limited by the server.
        max_concurrency: requests at a time, in this process.
    """

    def __init__(self, app: ASGIApp, *, max_request_bytes: int, max_concurrency: int) -> None:
        self._app = app
        self._max_bytes = max_request_bytes
        self._max_running = max_concurrency
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "lifespan":
            await self._app(scope, receive, send)
            return
        size = body_size(scope) if kind == "http" else 0
        if size is not None and size > self._max_bytes:
            metrics.REFUSED.labels("request_size").inc()
            await refuse(scope, receive, send, too_large(self._max_bytes))
            return
        if self._running >= self._max_running:
            metrics.REFUSED.labels("concurrency").inc()
            await self._refuse_busy(scope, receive, send)
            return
        self._running += 1
        try:
            if size is None:
                await BoundedRequest(self._max_bytes, scope, receive, send).run(self._app)
            else:
                await self._app(scope, receive, send)
        finally:
            self._running -= 1

    async def _refuse_busy(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await refuse(scope, receive, send, too_many(self._max_running))
        else:
            await send({"type": "websocket.close", "code": TRY_AGAIN_LATER, "reason": "too many requests"})


class BoundedRequest:
    """One request whose body ends somewhere, with a limit on it.

    Beyond the limit the app is told that its client is gone. Unless it had begun to answer, the client gets
    the 413 at that moment, and what the app says from then on goes nowhere.
    """

    def __init__(self, limit: int, scope: Scope, receive: Receive, send: Send) -> None:
        self._limit = limit
        self._scope = scope
        self._receive = receive
        self._send = send
        self._size = 0
        self._answering = False
        self._refused = False

    async def run(self, app: ASGIApp) -> None:
        try:
            await app(self._scope, self.receive, self.send)
        except Exception:
            if not self._refused:
                raise
            # How apps leave a client that is gone is theirs, and this one has its answer.
            logger.debug("the app raised after its request was refused", exc_info=True)

    async def receive(self) -> Message:
        if self._size > self._limit:
            return DISCONNECT
        message = await self._receive()
        self._size += len(message.get("body", b""))
        if self._size <= self._limit:
            return message
        metrics.REFUSED.labels("request_size").inc()
        if not self._answering:
            self._refused = True
            await refuse(self._scope, self._receive, self._send, too_large(self._limit))
        return DISCONNECT

    async def send(self, message: Message) -> None:
        if self._refused:
            return
        self._answering = True
        await self._send(message)


def body_size(scope: Scope) -> float | None:
    """Bytes that a request's body has, None where only its end will tell.

    A transfer encoding wins over a length (RFC 9112, section 6.3): h11 lets requests with both pass.
    """
    size: float | None = None
    for name, value in scope["headers"]:
        if name == b"transfer-encoding":
            return None
        if name == b"content-length" and value.isdigit():
            size = float(value)  # of any number of digits, where int() raises
    return size


def too_large(limit: int) -> Response:
    message = f"the request's body is larger than {limit:,} bytes, the most that is taken here"
    return error_response(413, {"error_code": "REQUEST_ENTITY_TOO_LARGE", "message": message})


def too_many(limit: int) -> Response:
    message = f"{limit:,} requests are running here already, the most at a time; try again later"
    description = {"error_code": "REQUEST_LIMIT_EXCEEDED", "message": message}
    return error_response(429, description, {"retry-after": str(RETRY_AFTER_SECONDS)})
