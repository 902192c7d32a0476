"""One worker as its supervisor sees it: started, told what to do, and seen to end."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from deploy.channel import Channel, Message
from deploy.log_file import open_log
from deploy.registry import Version

__all__ = ["ADMIN_VARIABLE", "Launcher", "WorkerProcess", "say"]

FLUSH_SECONDS: Final = 30.0
"""What a worker may take from its last reply to its end: uvicorn cancels what still runs after 5 s, and the
writer gives up after 15 s."""
ADMIN_VARIABLE: Final = "TRACELAKE_ADMIN_PORT"
TERMINATE_SECONDS: Final = 5.0
"""What a worker that has answered nothing yet may take to end."""


@dataclass
class Launcher:
    """What all workers of an endpoint have in common."""

    endpoint: str
    logs: Path
    listener: socket.socket
    admin_listener: socket.socket | None
    lock: int
    """Descriptor of a file that is locked until all workers have ended, whoever of them is last."""
    environment: dict[str, str]
    """On top of the version's."""
    drain_seconds: float
    take_back: Callable[[list[socket.socket]], None]
    """Is given connections that a worker died before it got."""
    on_end: Callable[[], None] = lambda: None
    """Called when a worker has ended."""
    alive: set["WorkerProcess"] = field(default_factory=set)
    """All that have not ended, whatever they do."""

    def start(self, version: Version) -> "WorkerProcess":
        """Start a worker.

        Raises:
            OSError: the system doesn't let it; or the version's files are gone.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = self._run(version, theirs)
            except BaseException:
                ours.close()
                raise
        worker = WorkerProcess(process, ours, self)
        self.alive.add(worker)
        return worker

    def _run(self, version: Version, channel: socket.socket) -> "subprocess.Popen[bytes]":
        shared = {"--channel": channel.fileno(), "--listen": self.listener.fileno(), "--lock": self.lock}
        if self.admin_listener is not None:
            shared["--admin"] = self.admin_listener.fileno()
        # Safe path: the agent's folder may have modules with names of ours; it comes in once these are there.
        environment = {**version.environment, **self.environment}
        if self.admin_listener is None:
            environment.pop(ADMIN_VARIABLE, None)  # the deployer's
        command = [version.python, "-P", "-m", "deploy.worker", f"{self.endpoint}/{version.number}"]
        command += [text for name, one in shared.items() for text in (name, str(one))]
        log = open_log(self.logs / f"{version.number}.log")
        try:
            return subprocess.Popen(
                [*command, "--drain-seconds", str(self.drain_seconds)],
                cwd=version.working_dir,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=list(shared.values()),
            )
        finally:
            os.close(log)

    def reap(self) -> None:
        """Take note of the workers that have ended. To be called at each SIGCHLD."""
        for worker in list(self.alive):
            worker.poll()


class WorkerProcess:
    """A worker that was started. Its futures are waited for with ``asyncio.wait``, which never cancels them.

    Attributes:
        ready: done once it could take requests; its result is whether it answers ``POST /invocations``.
        leaving: done once it takes no more requests, on its own account or because it has ended.
        ended: done once the process has ended.
        failure: why it could not start, in its own words.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", end: socket.socket, launcher: Launcher) -> None:
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[bool] = loop.create_future()
        self.leaving: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()
        self.failure: str | None = None
        self._process = process
        self._launcher = launcher
        self._ready_at: float | None = None
        self._ending: asyncio.Task[None] | None = None
        self.channel = Channel(end, self._on_message, lambda: None)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_live(self) -> bool:
        """Whether it takes requests, or could. The channel of one that dies ends before it has ended."""
        return self.ready.done() and not self.leaving.done() and not self.channel.is_closed

    @property
    def served_seconds(self) -> float:
        """How long it has been ready until now."""
        return 0.0 if self._ready_at is None else time.monotonic() - self._ready_at

    @property
    def end_text(self) -> str:
        """How it ended."""
        status = self._process.returncode
        if status is None:
            return "is about to end"
        if status >= 0:
            return f"ended with status {status}"
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        return f"was killed by {name}" + (" (for lack of memory?)" if -status == signal.SIGKILL else "")

    def _on_message(self, message: Message, _: int | None) -> None:
        if "ready" in message and not self.ready.done():
            self._ready_at = time.monotonic()
            self.ready.set_result(bool(message.get("invocations")))
        elif "failed" in message:
            self.failure = str(message["failed"])
        elif "leaving" in message:
            if not self.leaving.done():
                self.leaving.set_result(None)
            # Behind all connections that were handed to it before.
            self.channel.send({"do": "left"})

    def poll(self) -> None:
        if self.ended.done() or self._process.poll() is None:
            return
        self.channel.read()  # its last words
        self.channel.close()
        if lost := self.channel.undelivered():
            self._launcher.take_back(lost)
        self._launcher.alive.discard(self)
        self.ended.set_result(None)
        if not self.leaving.done():
            self.leaving.set_result(None)
        self._launcher.on_end()

    async def up(self, seconds: float) -> str | None:
        """Wait until it is ready; the reason, where it will not be.

        One that takes longer than ``seconds`` goes on; the caller decides about it.
        """
        waited: set[asyncio.Future[Any]] = {self.ready, self.ended}
        await asyncio.wait(waited, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if self.ended.done():
            return self.failure or f"it {self.end_text} before it was ready"
        return None if self.ready.done() else f"it was not ready within {seconds:g} s (wait_seconds)"

    def command(self, what: str) -> None:
        """``accept`` or ``release``: see :mod:`deploy.worker`."""
        self.channel.send({"do": what})

    def hand(self, connection: socket.socket) -> None:
        """Give it an accepted connection to answer."""
        self.channel.send({"do": "adopt", "connection": True}, connection)

    def drain(self, seconds: float, idle_seconds: float) -> None:
        """Let it finish what it answers, flush and end; make it end where it takes longer.

        Args:
            idle_seconds: when to close connections that rest.
        """
        if self.ended.done() or self._ending is not None:
            return
        if not self.ready.done():
            self.terminate()
            return
        self.channel.send({"do": "drain", "seconds": seconds, "idle_seconds": idle_seconds})
        if not self.leaving.done():
            self.leaving.set_result(None)
        self._ending = asyncio.create_task(self._end_within(seconds + FLUSH_SECONDS))

    def terminate(self) -> None:
        """Make it end: it has answered nothing yet, or is to be answered for no longer."""
        if self.ended.done():
            return
        if self._ending is not None:
            self._ending.cancel()
        with suppress(ProcessLookupError):
            self._process.terminate()
        self._ending = asyncio.create_task(self._end_within(TERMINATE_SECONDS))

    def expect_end(self, seconds: float) -> None:
        """It leaves on its own account: make it end where it takes longer."""
        if self._ending is None and not self.ended.done():
            self._ending = asyncio.create_task(self._end_within(seconds + FLUSH_SECONDS))

    async def _end_within(self, seconds: float) -> None:
        await asyncio.wait({self.ended}, timeout=seconds)
        if not self.ended.done():
            say(f"worker {self.pid} did not end within {seconds:g} s, and is killed")
            self._process.kill()


def say(text: str) -> None:
    """Write a line to the supervisor's log."""
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    sys.stderr.write(f"{moment}Z {text}\n")
    sys.stderr.flush()
