"""A peer that runs: its endpoint, its server where it has one, and clients."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import httpx

from benchmarks.peers.apps.agent import RECORD_HEADER
from benchmarks.peers.definitions import OFFLINE, Peer, Site
from benchmarks.peers.processes import Process, wait_until_idle
from deploy.bench import free_port

__all__ = ["Running", "running"]

START_SECONDS: Final = 120.0
REPLY_SECONDS: Final = 60.0
CONNECTIONS: Final = 8
"""Clients of a burst."""
RESPONSE_BYTES: Final = 1000


class Running:
    """A peer's processes in a folder of their own.

    Attributes:
        endpoint: serves the agent.
        server: what the endpoint sends records to, or None.
        folder: of the records.
    """

    def __init__(self, peer: Peer, folder: Path) -> None:
        self.peer = peer
        self.folder = folder / "records"
        self.folder.mkdir(parents=True)
        self._logs = folder
        self._site = Site(self.folder, free_port(), free_port())
        self._url = f"http://127.0.0.1:{free_port()}"
        self._client = client(self._url)
        self.server = self._start_server()
        try:
            self.endpoint = self._start_endpoint()
        except BaseException:
            self._end_server()
            raise
        self.store = peer.store(self._site) if peer.store else None

    def _start_server(self) -> Process | None:
        if self.peer.server is None or self.peer.server_environment is None:
            return None
        server = self.peer.server(self._site)
        command, *arguments = server.command
        process = Process(
            [str(self.peer.server_environment.bin / command), *arguments],
            {**OFFLINE, **server.variables},
            self._logs / "server.log",
            cwd=self.folder,
        )
        up(process, f"{self._site.server_url}{server.health}")
        # One of its workers answers; the others may still be at their imports.
        wait_until_idle([process], START_SECONDS)
        return process

    def _start_endpoint(self) -> Process:
        port = self._url.rpartition(":")[2]
        app = f"benchmarks.peers.apps.{self.peer.app}:app"
        # The same loop and parser everywhere, whatever else an environment has.
        options = ["--port", port, "--loop", "asyncio", "--http", "h11", "--log-level", "warning"]
        process = Process(
            [str(self.peer.environment.bin / "python"), "-m", "uvicorn", app, *options],
            {**OFFLINE, **self.peer.variables(self._site)},
            self._logs / "endpoint.log",
        )
        return up(process, f"{self._url}/prepare?trace_bytes=10000&seeds=0")

    def restart(self, killed: Process) -> None:
        """Start the endpoint or the server again, which was killed."""
        if killed is self.endpoint:
            self.endpoint = self._start_endpoint()
        else:
            self.server = self._start_server()

    def _end_server(self) -> None:
        if self.server:
            self.server.stop()

    def stop(self) -> None:
        self._client.close()
        try:
            self.endpoint.stop()
        finally:
            self._end_server()

    def prepare(self, trace_bytes: int, seeds: int) -> None:
        """Let the endpoint make the agent's runs that will be asked for."""
        self._client.get("/prepare", params={"trace_bytes": trace_bytes, "seeds": seeds}).raise_for_status()

    def call(self, trace_bytes: int, seed: int) -> str:
        """One request; returns what its record is known by."""
        return call(self._client, trace_bytes, seed)

    def burst(self, count: int, trace_bytes: int, seeds: int, then: Callable[[], None]) -> list[str]:
        """As many requests as fast as they go, and ``then`` a call as soon as the last is answered."""
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(client(self._url)) for _ in range(CONNECTIONS)]
            pool = stack.enter_context(ThreadPoolExecutor(CONNECTIONS))

            def share(number: int) -> list[str]:
                turns = range(number, count, CONNECTIONS)
                return [call(clients[number], trace_bytes, turn % seeds) for turn in turns]

            shares = list(pool.map(share, range(CONNECTIONS)))
            then()
            return [record for records in shares for record in records]


def client(url: str) -> httpx.Client:
    # Shorter than uvicorn's 5 s, so that no request meets a connection that is about to be closed.
    limits = httpx.Limits(keepalive_expiry=4)
    return httpx.Client(base_url=url, timeout=REPLY_SECONDS, limits=limits, trust_env=False)


def call(of: httpx.Client, trace_bytes: int, seed: int) -> str:
    body = {"trace_bytes": trace_bytes, "response_bytes": RESPONSE_BYTES, "seed": seed}
    return str(of.post("/invocations", json=body).raise_for_status().headers[RECORD_HEADER])


def up(process: Process, url: str) -> Process:
    """The process, once it answers at the URL."""

    with httpx.Client(timeout=2, trust_env=False) as asking:

        def is_up() -> bool:
            try:
                return asking.get(url).is_success
            except httpx.TransportError:
                return False

        try:
            process.wait_until_up(is_up, START_SECONDS)
        except BaseException:
            process.kill()
            raise
    return process


@contextlib.contextmanager
def running(peer: Peer, folder: Path) -> Iterator[Running]:
    """Start a peer, which is installed; stop it when the block ends.

    Raises:
        StartError: it doesn't start.
    """
    found = Running(peer, folder)
    try:
        yield found
    finally:
        found.stop()
