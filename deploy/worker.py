"""A worker of engine ``local``: one uvicorn, which serves when and as its supervisor says.

``python -P -m deploy.worker ENDPOINT/VERSION --channel FD --listen FD --lock FD``; the environment says what
it serves. It starts without taking a connection and sends ``ready``, or ``failed`` with the reason. Then it
obeys:

- ``accept``: take connections from the listening socket.
- ``release``: take none from there; replies carry ``connection: close``.
- ``adopt``: answer the connection that comes with the message.
- ``drain``: release, answer what there is, flush and end.

Where the channel ends, the supervisor has died: the worker drains. SIGTERM does the same.
"""

import argparse
import asyncio
import faulthandler
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import Any, Final

import uvicorn

from deploy.channel import Channel, Message, send_blocking
from deploy.edge import Edge
from deploy.routes import answers_invocations
from inference_table.errors import TracelakeError

__all__ = ["WorkerServer"]

GRACE_SECONDS: Final = 5
"""After a drain that took too long: how long uvicorn lets replies go on before it cancels them."""
FLUSH_SECONDS: Final = 30.0
"""As in ``deploy.process``, where the reason is."""
FAREWELL_SECONDS: Final = 2.0
"""How long a worker that leaves waits for its supervisor to hand it no more."""
IDLE_SECONDS: Final = 1.0
"""When a worker that ends unasked closes connections that rest."""
QUIET_CHECKS: Final = 3
"""It is quiet when nothing is seen so many times."""
CHECK_SECONDS: Final = 0.05
PAUSE_SECONDS: Final = 1.0
"""After a connection could not be taken."""
MAX_REASON: Final = 2_000
NO_HTTP: Final = object()

logger = logging.getLogger("uvicorn.error")


class WorkerServer(uvicorn.Server):
    """uvicorn, told by a supervisor when to take connections.

    Args:
        listeners: the public listening socket, and the one for metrics and health, if any.
        drain_seconds: how long to go on with what is being answered when the supervisor has died.
    """

    def __init__(
        self,
        edge: Edge,
        end: socket.socket,
        listeners: tuple[socket.socket, socket.socket | None],
        watch: "Watch",
        drain_seconds: float,
    ) -> None:
        # Of what runs when a signal ends it: replies may take as long as when it is drained.
        grace = max(GRACE_SECONDS, int(drain_seconds))
        super().__init__(uvicorn.Config(edge, interface="asgi3", timeout_graceful_shutdown=grace))
        self.servers: list[Any] = []
        self._edge = edge
        self._end = end
        self._public, self._admin = listeners
        self._watch = watch
        self._drain_seconds = drain_seconds
        self._listening: set[socket.socket] = set()
        self._commands: asyncio.Queue[Message] = asyncio.Queue()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._left = asyncio.Event()
        self._is_drained = False
        self._channel: Channel | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: ARG002 - uvicorn's
        try:
            await super().startup(sockets=[])
        finally:
            if self.lifespan.should_exit:
                send_blocking(self._end, {"failed": self._edge.reason})
        if not self.started:
            return
        self._channel = Channel(self._end, self._on_message, self._on_end)
        self._watch.ready.set()
        self._run(self._obey())
        self._channel.send({"ready": True, "invocations": answers_invocations(self._edge)})

    def _run(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _on_message(self, message: Message, descriptor: int | None) -> None:
        match message["do"]:
            case "adopt" if descriptor is not None:
                self._run(self._adopt(socket.socket(fileno=descriptor)))
            case "left":
                self._left.set()
            case _:
                self._commands.put_nowait(message)

    def _on_end(self) -> None:
        self._left.set()
        self._commands.put_nowait(
            {"do": "drain", "seconds": self._drain_seconds, "idle_seconds": IDLE_SECONDS}
        )

    async def _obey(self) -> None:
        while True:
            message = await self._commands.get()
            match message["do"]:
                case "accept":
                    self._edge.closing = False
                    self._listen(self._public)
                    self._listen(self._admin)
                case "release":
                    self._release()
                    self._listen(self._admin)
                case "drain":
                    await self._drain(message["seconds"], message["idle_seconds"])

    def _listen(self, one: socket.socket | None) -> None:
        if one is None or one in self._listening or self.should_exit:
            return
        one.setblocking(False)
        self._listening.add(one)
        asyncio.get_running_loop().add_reader(one, self._accept, one)

    def _accept(self, listener: socket.socket) -> None:
        """Take what waits. A server of asyncio's, once closed, loses the connections that it just took."""
        for _ in range(self.config.backlog):
            try:
                connection, _ = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # no descriptor is left, say
                logger.error("cannot take connections, and try again in %g s: %s", PAUSE_SECONDS, error)
                loop = asyncio.get_running_loop()
                loop.remove_reader(listener)
                loop.call_later(PAUSE_SECONDS, self._listen_again, listener)
                return
            self._run(self._adopt(connection))

    def _listen_again(self, listener: socket.socket) -> None:
        if listener in self._listening:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _release(self) -> None:
        self._edge.closing = True
        self._unlisten(self._public)

    def _unlisten(self, one: socket.socket | None) -> None:
        if one in self._listening:
            self._listening.remove(one)
            asyncio.get_running_loop().remove_reader(one)

    def _protocol(self) -> asyncio.Protocol:
        make: Any = self.config.http_protocol_class
        protocol: asyncio.Protocol = make(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return protocol

    async def _adopt(self, connection: socket.socket) -> None:
        with suppress(OSError):  # its client has left meanwhile
            await asyncio.get_running_loop().connect_accepted_socket(self._protocol, connection)

    async def _drain(self, seconds: float, idle_seconds: float) -> None:
        self._stop_taking()
        begun, quiet = time.monotonic(), 0
        while quiet < QUIET_CHECKS and (passed := time.monotonic() - begun) < seconds and not self.force_exit:
            if passed >= idle_seconds:
                self._close_idle()
            # The task that runs this is one.
            is_busy = self.server_state.connections or self.server_state.tasks or len(self._tasks) > 1
            quiet = 0 if is_busy else quiet + 1
            await asyncio.sleep(CHECK_SECONDS)
        self.config.timeout_graceful_shutdown = GRACE_SECONDS
        self._is_drained = self.should_exit = True

    def _stop_taking(self) -> None:
        self._release()
        self._unlisten(self._admin)
        # Where all workers let go of a dead supervisor's port, another one can have it.
        self._public.close()
        if self._admin is not None:
            self._admin.close()

    def _close_idle(self) -> None:
        for connection in list(self.server_state.connections):
            # A websocket has no such attribute, and is not idle.
            cycle: Any = getattr(connection, "cycle", NO_HTTP)
            if cycle is None or (cycle is not NO_HTTP and cycle.response_complete):
                connection.shutdown()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._channel is not None and not self._left.is_set():
            self._channel.send({"leaving": True})
            with suppress(TimeoutError):
                await asyncio.wait_for(self._left.wait(), FAREWELL_SECONDS)
        if (
            not self._is_drained
        ):  # it was sent a signal: uvicorn alone would reset connections that it just took
            await self._drain(self._drain_seconds, IDLE_SECONDS)
        await super().shutdown(sockets)


class Watch(threading.Thread):
    """Ends this process where its supervisor has died and it does not get to know, or to an end.

    An agent that blocks the event loop would keep its process, and the port, for ever.
    """

    def __init__(self, end: socket.socket, drain_seconds: float) -> None:
        super().__init__(name="tracelake-watch", daemon=True)
        self.ready = threading.Event()
        self._descriptor = end.fileno()
        self._drain_seconds = drain_seconds

    def run(self) -> None:
        poll = select.poll()
        poll.register(self._descriptor, 0)  # which leaves the hang-up
        poll.poll()
        if self.ready.is_set():
            time.sleep(self._drain_seconds + FLUSH_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)


def reason_of(target: str, error: BaseException) -> str:
    said = " ".join(str(error).split())[:MAX_REASON]
    if isinstance(error, TracelakeError):
        return said if target in said else f"cannot load {target!r}: {said}"
    return f"cannot load {target!r}: {type(error).__name__}: {said}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="of endpoint and version, for lists of processes")
    parser.add_argument("--channel", type=int, required=True)
    parser.add_argument("--listen", type=int, required=True)
    parser.add_argument("--lock", type=int, required=True)
    parser.add_argument("--admin", type=int)
    parser.add_argument("--drain-seconds", type=float, default=60.0)
    given = parser.parse_args()
    end, public = socket.socket(fileno=given.channel), socket.socket(fileno=given.listen)
    admin = None if given.admin is None else socket.socket(fileno=given.admin)
    for one in filter(None, (end, public, admin)):
        one.set_inheritable(False)  # not to what the agent starts
    os.set_inheritable(given.lock, False)
    faulthandler.enable()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr] # what it prints is in the log if it is killed
    watch = Watch(end, given.drain_seconds)
    watch.start()
    target = os.environ.get("TRACELAKE_APP", "")
    try:
        from serving.serve import create_app

        app = create_app()
    except BaseException as error:  # noqa: BLE001 - whatever an agent's module raises, SystemExit too, is the reason
        if isinstance(error, TracelakeError):
            print(f"ERROR: {reason_of(target, error)}", file=sys.stderr)  # noqa: T201 - there is no log yet
        else:
            traceback.print_exc()
        send_blocking(end, {"failed": reason_of(target, error)})
        sys.exit(1)
    WorkerServer(Edge(app), end, (public, admin), watch, given.drain_seconds).run()


if __name__ == "__main__":
    main()
