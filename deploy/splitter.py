"""A split of traffic: each connection is accepted here and handed, whole, to a worker of the version drawn.

No byte of a request passes through this process. Replies on such a connection carry ``connection: close``, so
that each request is drawn anew.
"""

import asyncio
import random
import socket
from collections import deque
from collections.abc import Mapping
from typing import Final

from deploy.fleet import Fleet
from deploy.process import WorkerProcess, say

__all__ = ["Splitter"]

BATCH: Final = 64
"""Connections accepted at a time, before others have their turn."""
MAX_WAITING: Final = 256
"""Connections that a worker has not taken over yet, above which it gets no more. Where no worker has room,
connections wait in the backlog of the socket, as they would for uvicorn."""
PAUSE_SECONDS: Final = 0.02
"""Before it is tried again to accept, where nobody could take a connection."""


class Splitter:
    """Accepts connections from a listening socket while a split is on."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._fleets: dict[str, Fleet] = {}
        self._percents: dict[str, int] = {}
        self._accepting = False
        self._reading = False
        self._unplaced: deque[socket.socket] = deque()
        self._retry: asyncio.TimerHandle | None = None

    def start(self, fleets: Mapping[str, Fleet], percents: Mapping[str, int]) -> None:
        """Split from now on, or from now on otherwise."""
        self._fleets, self._percents = dict(fleets), dict(percents)
        self._accepting = True
        self._set_reading(True)

    def stop(self, heir: Fleet | None = None) -> None:
        """Accept no more. Connections that no worker could take yet go to ``heir``."""
        self._fleets = {} if heir is None else {heir.version.number: heir}
        self._percents = dict.fromkeys(self._fleets, 100)
        self._accepting = False
        self._set_reading(False)
        self._place()

    def take_back(self, connections: list[socket.socket]) -> None:
        """Draw anew for connections that a worker died before it got."""
        self._unplaced.extend(connections)
        self._place()

    def close(self) -> None:
        self._fleets = {}
        self._accepting = False
        self._set_reading(False)
        if self._retry is not None:
            self._retry.cancel()
        while self._unplaced:
            self._unplaced.popleft().close()

    def _set_reading(self, wanted: bool) -> None:
        if wanted and not self._reading:
            self._loop.add_reader(self._listener.fileno(), self._accept)
        elif self._reading and not wanted:
            self._loop.remove_reader(self._listener.fileno())
        self._reading = wanted

    def _accept(self) -> None:
        for _ in range(BATCH):
            if self._unplaced or self._draw() is None:
                self._try_later()
                return
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # no descriptor is left, say
                say(f"cannot accept a connection: {error}")
                self._try_later()
                return
            connection.setblocking(False)
            self._unplaced.append(connection)
            self._place()

    def _place(self) -> None:
        while self._unplaced and (worker := self._draw()) is not None:
            worker.hand(self._unplaced.popleft())
        if self._unplaced:
            self._try_later()

    def _draw(self) -> WorkerProcess | None:
        """A version by its percent, among those that have a worker with room now, and its worker."""
        workers = {number: fleet.next_worker() for number, fleet in self._fleets.items()}
        able = {
            number: worker
            for number, worker in workers.items()
            if worker is not None and worker.channel.waiting < MAX_WAITING
        }
        if not able:
            return None
        return random.choices(list(able.values()), [self._percents[number] for number in able])[0]

    def _try_later(self) -> None:
        """Rest for a moment: a socket that is readable and is not read would keep this process busy."""
        if self._retry is None:
            self._set_reading(False)
            self._retry = self._loop.call_later(PAUSE_SECONDS, self._again)

    def _again(self) -> None:
        self._retry = None
        self._set_reading(self._accepting)
        self._place()
