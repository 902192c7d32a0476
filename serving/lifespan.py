"""The lifespan of a server with capture on: check at start-up, flush at the end.

An operator's mistake stops the start; at shutdown what was handed over is in the table before the server says
that it is done. Apps that know no lifespan get ours all the same.
"""

import asyncio
import logging
from typing import Final

from inference_table.errors import TracelakeError
from serving.exchange import Message, Receive, Send
from serving.recorder import App, Recorder, Scope

__all__ = ["Lifespan"]

logger: Final = logging.getLogger("tracelake")


class Lifespan:
    """One lifespan conversation between a server and an app, with ours inside.

    Args:
        recorder: checked and started at start-up, closed at shutdown.
    """

    def __init__(self, recorder: Recorder, receive: Receive, send: Send) -> None:
        self._recorder = recorder
        self._server_receive = receive
        self._server_send = send
        self._first: Message | None = None
        self._answered = False
        self._closed = False

    async def run(self, app: App, scope: Scope) -> None:
        if (message := await self._server_receive())["type"] != "lifespan.startup":
            return
        if (failure := await start(self._recorder)) is not None:
            await self._server_send({"type": "lifespan.startup.failed", "message": failure})
            return
        self._first = message
        try:
            await app(scope, self._receive, self._send)
        except Exception:
            # Raising before it answers is how an app says that it knows no lifespan (ASGI specification).
            if self._answered:
                await self._close()
                raise
            logger.debug("the app knows no lifespan; tracelake's own goes on", exc_info=True)
        if not self._answered:
            await self._server_send({"type": "lifespan.startup.complete"})
            await self._server_receive()
            await self._close()
            await self._server_send({"type": "lifespan.shutdown.complete"})
        await self._close()

    async def _receive(self) -> Message:
        if (first := self._first) is not None:
            self._first = None
            return first
        return await self._server_receive()

    async def _send(self, message: Message) -> None:
        if not message["type"].startswith("lifespan."):
            raise RuntimeError(f"expected a lifespan message, got {message['type']!r}")
        self._answered = True
        if message["type"].startswith(("lifespan.shutdown", "lifespan.startup.failed")):
            await self._close()
        await self._server_send(message)

    async def _close(self) -> None:
        if not self._closed:
            self._closed = True
            await asyncio.to_thread(self._recorder.writer.close)


async def start(recorder: Recorder) -> str | None:
    """Check spool and table and start the writer; what is wrong, where something is."""
    try:
        await asyncio.to_thread(recorder.start)
    except TracelakeError as error:
        logger.error("tracelake cannot start: %s", error)
        return f"tracelake: {error}"
    return None


async def refuse(failure: str, receive: Receive, send: Send) -> None:
    """Stop the server's start, with the reason."""
    await receive()
    await send({"type": "lifespan.startup.failed", "message": f"tracelake: {failure}"})
