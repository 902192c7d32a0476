"""The outermost app of a worker."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

__all__ = ["Edge"]

Send = Callable[[Any], Awaitable[None]]

MAX_REASON: Final = 2_000


class Edge:
    """The outermost app: adds ``connection: close`` to replies, and reads why a start-up fails.

    Attributes:
        closing: whether replies are the last ones on their connections.
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        self.closing = False
        self._failure = ""

    @property
    def reason(self) -> str:
        """Why the app refused to start, in one line: the last one of a traceback, which Starlette sends."""
        said = self._failure.strip() or "its lifespan failed; the log says why"
        lines = said.splitlines()
        shown = lines[-1] if lines[0].startswith("Traceback ") else said
        return " ".join(shown.split())[:MAX_REASON]

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        if scope["type"] == "http":
            await self.app(scope, receive, self._closing(send))
        elif scope["type"] == "lifespan":
            await self.app(scope, receive, self._noting(send))
        else:
            await self.app(scope, receive, send)

    def _closing(self, send: Send) -> Send:
        async def send_last(message: MutableMapping[str, Any]) -> None:
            if self.closing and message["type"] == "http.response.start":
                headers = [pair for pair in message.get("headers", ()) if pair[0].lower() != b"connection"]
                message = {**message, "headers": [*headers, (b"connection", b"close")]}
            await send(message)

        return send_last

    def _noting(self, send: Send) -> Send:
        async def send_on(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "lifespan.startup.failed":
                self._failure = str(message.get("message", ""))
            await send(message)

        return send_on
