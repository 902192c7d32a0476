"""The lifespan of a server with capture on: check at start-up, flush at the end.

An operator's mistake stops the start; at shutdown what was handed over is in the table before the server says
that it is done. Apps that know no lifespan, or leave theirs early, get ours all the same.
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
        self._startup: Message | None = None
        self._started = False
        self._stopping = False
        self._ended = False

    async def run(self, app: App, scope: Scope) -> None:
        self._startup = await self._server_receive()
        if (failure := await start(self._recorder)) is not None:
            await self._server_send({"type": "lifespan.startup.failed", "message": failure})
            return
        try:
            await app(scope, self._receive, self._send)
        except Exception:
            if self._ended:
                raise
            # Raising before it answers is how an app says that it knows no lifespan (ASGI specification).
            level = logging.ERROR if self._started else logging.INFO
            logger.log(level, "the app's own lifespan ended; tracelake's goes on", exc_info=True)
        if not self._ended:
            await self._go_on()

    async def _go_on(self) -> None:
        """The rest of the conversation, which the app has left."""
        if not self._started:
            await self._server_send({"type": "lifespan.startup.complete"})
        while not self._stopping:
            await self._receive()
        await self._close()
        await self._server_send({"type": "lifespan.shutdown.complete"})

    async def _receive(self) -> Message:
        message, self._startup = self._startup or await self._server_receive(), None
        self._stopping = message["type"] == "lifespan.shutdown"
        return message

    async def _send(self, message: Message) -> None:
        kind = message["type"]
        if not kind.startswith("lifespan."):
            raise RuntimeError(f"expected a lifespan message, got {kind!r}")
        self._started = True
        if kind != "lifespan.startup.complete":
            self._ended = True
            await self._close()
        await self._server_send(message)

    async def _close(self) -> None:
        await self._recorder.close()


async def start(recorder: Recorder) -> str | None:
    """Check spool and table and start the writer; what is wrong, where something is."""
    try:
        await asyncio.to_thread(recorder.start)
    except TracelakeError as error:
        failure = f"tracelake: {error}"
    except Exception as error:  # the capture border: raising here would read as "knows no lifespan"
        failure = f"tracelake: {type(error).__name__}: {error}"
    else:
        return None
    logger.error("the server cannot start: %s", failure)
    return failure
