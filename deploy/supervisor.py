"""The supervisor of one endpoint of engine ``local``, a process: ``python -m deploy.supervisor FOLDER``.

It holds the listening sockets and starts workers, which take connections from them; what is wanted is in
``endpoint.json``, what is in ``state.json``. SIGHUP: read again what is wanted. SIGTERM: drain and end.

It is made of the standard library, so that it is small, starts at once and can't be broken by an agent.
"""

import argparse
import asyncio
import fcntl
import os
import shutil
import signal
import socket
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Final

from deploy.leftovers import commit_leftovers
from deploy.listening import listen, listen_anywhere, port_of
from deploy.log_file import cut
from deploy.process import ADMIN_VARIABLE, Launcher, say
from deploy.registry import Endpoint, EndpointFolder, State, locked
from deploy.rollout import Rollout
from deploy.splitter import Splitter
from inference_table.errors import DeploymentError

__all__ = ["Supervisor"]

LOCK_SECONDS: Final = 5.0
"""Whoever asks whether the lock is held takes it for a moment."""
LOG_PAUSE_SECONDS: Final = 10.0
"""Between looks at the size of the logs."""
METRICS: Final = "metrics-"


class Supervisor:
    """Runs one endpoint until it is stopped, or nothing of it can run.

    Args:
        endpoint: what is wanted at first.
        listener: takes the clients' connections.
        admin_listener: for metrics and health, where they have a port of their own.
    """

    def __init__(
        self,
        folder: EndpointFolder,
        endpoint: Endpoint,
        listener: socket.socket,
        admin_listener: socket.socket | None,
    ) -> None:
        self._folder = folder
        self._endpoint = endpoint
        self._wake = asyncio.Event()
        self._stopping = False
        self._logs: asyncio.Task[None] | None = None
        port, admin_port = port_of(listener), None if admin_listener is None else port_of(admin_listener)
        self._state = State(
            state="starting", pid=os.getpid(), host=endpoint.host, port=port, admin_port=admin_port
        )
        metrics = tempfile.mkdtemp(prefix=METRICS, dir=folder.path)
        environment = {"PROMETHEUS_MULTIPROC_DIR": metrics}
        if admin_port is not None:
            environment[ADMIN_VARIABLE] = str(admin_port)
        splitter = Splitter(listener)
        self._workers_lock = folder.workers_lock.open("ab")
        fcntl.flock(self._workers_lock, fcntl.LOCK_SH)
        self._launcher = Launcher(
            endpoint=folder.name,
            logs=folder.logs,
            listener=listener,
            admin_listener=admin_listener,
            lock=self._workers_lock.fileno(),
            environment=environment,
            drain_seconds=endpoint.drain_seconds,
            take_back=splitter.take_back,
        )
        bound = (endpoint.host, port, admin_port)
        self._rollout = Rollout(folder, self._launcher, splitter, bound, self._changed)
        self._sockets = [listener] if admin_listener is None else [listener, admin_listener]

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGCHLD, self._launcher.reap)
        loop.add_signal_handler(signal.SIGHUP, self._wake.set)
        loop.add_signal_handler(signal.SIGTERM, self._stop)
        self._logs = asyncio.create_task(keep_logs_small(self._folder.logs))
        # From here on it can be signalled, and says so.
        self._publish()
        self._rollout.begin(self._endpoint)
        while not (self._stopping or self._rollout.is_over):
            await self._wake.wait()
            self._wake.clear()
            if not self._stopping:
                self._look()
        await self._end()

    def _look(self) -> None:
        """See whether something else is wanted."""
        try:
            wanted = self._folder.endpoint()
        except (DeploymentError, OSError) as error:
            say(f"cannot read what is wanted: {error}")
            return
        if wanted is None or wanted.generation <= self._endpoint.generation:
            return
        self._endpoint = wanted
        if any(wanted.traffic.values()):
            self._rollout.begin(wanted)
        else:
            self._stopping = True

    def _stop(self) -> None:
        self._stopping = True
        self._wake.set()

    def _changed(self) -> None:
        if self._state.state in {"starting", "serving"}:
            self._state = replace(self._state, state="serving" if self._rollout.is_serving else "starting")
        self._publish()
        if self._rollout.is_over:
            self._wake.set()

    def _publish(self) -> None:
        try:
            self._folder.write_state(self._rollout.report(self._state))
        except OSError as error:  # a full disk must not end what serves
            say(f"cannot write state.json: {error}")

    async def _end(self) -> None:
        gave_up = self._rollout.is_over
        self._state = replace(self._state, state="stopping")
        self._rollout.drain(self._endpoint)
        for one in self._sockets:
            one.close()  # who connects from now on is refused, and does not wait in vain
        self._publish()
        await self._rollout.ended()
        await asyncio.to_thread(commit_leftovers, self._folder, self._endpoint)
        for metrics in self._folder.path.glob(f"{METRICS}*"):
            shutil.rmtree(metrics, ignore_errors=True)
        if self._logs is not None:
            self._logs.cancel()
        self._state = replace(self._state, state="failed" if gave_up else "stopped", pid=None)
        self._publish()
        say(self._state.state)


async def keep_logs_small(logs: Path) -> None:
    while True:
        for log in logs.glob("*.log"):
            try:
                await asyncio.to_thread(cut, log)
            except OSError as error:
                say(f"cannot cut '{log}': {error}")
        await asyncio.sleep(LOG_PAUSE_SECONDS)


def sockets_of(endpoint: Endpoint) -> tuple[socket.socket, socket.socket | None]:
    """Listen where an endpoint is to be reached.

    Raises:
        DeploymentError: its addresses can't be had.
    """
    if endpoint.port is None:
        listener = listen_anywhere(endpoint.host)
    else:
        listener = listen(endpoint.host, endpoint.port)
    if endpoint.admin_port is None:
        return listener, None
    try:
        return listener, listen("127.0.0.1", endpoint.admin_port, "admin_port")
    except DeploymentError:
        listener.close()
        raise


def supervise(folder: EndpointFolder) -> None:
    """Run an endpoint in this process, whose lock the caller holds."""
    endpoint = folder.endpoint()
    if endpoint is None:
        raise DeploymentError(f"there is no endpoint in '{folder.path}'")
    try:
        listener, admin_listener = sockets_of(endpoint)
    except DeploymentError as error:
        folder.write_state(
            State(
                state="failed",
                generation=endpoint.generation,
                host=endpoint.host,
                port=endpoint.port,
                traffic=endpoint.traffic,
                error=str(error),
            )
        )
        return

    asyncio.run(run(folder, endpoint, listener, admin_listener))


async def run(
    folder: EndpointFolder, endpoint: Endpoint, listener: socket.socket, admin_listener: socket.socket | None
) -> None:
    await Supervisor(folder, endpoint, listener, admin_listener).run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the endpoint")
    path: Path = parser.parse_args().folder
    folder = EndpointFolder(path.name, path.parent)
    with locked(folder.supervisor_lock, LOCK_SECONDS, "another supervisor of this endpoint"):
        # The lock goes on to the child, which has no parent then: nobody has to wait for its end.
        if os.fork() != 0:
            os._exit(0)
        say(f"supervisor {os.getpid()} of endpoint {folder.name!r}")
        supervise(folder)


if __name__ == "__main__":
    main()
