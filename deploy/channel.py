"""The channel between a supervisor and a worker: lines of JSON over a Unix socket pair, and open connections.

A connection goes with the first byte of its line, so both arrive in the order they were sent. Sending never
blocks: what the other side does not read waits here. Standard library only, for the supervisor is made of it.
"""

import asyncio
import json
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import Any, Final

__all__ = ["Channel", "send_blocking"]

Message = dict[str, Any]

READ_BYTES: Final = 1 << 16
MAX_FDS: Final = 64
"""Descriptors taken by one read. Linux gives those of one message at a time."""
MAX_LINE_BYTES: Final = 1 << 20
"""Messages are a few hundred bytes: one that grows beyond this is not ours."""


class Channel:
    """One end of the channel, within an event loop.

    Args:
        on_message: is given each message, and the descriptor of the connection that came with it.
        on_end: called once, when the other side has closed its end.
    """

    def __init__(
        self,
        end: socket.socket,
        on_message: Callable[[Message, int | None], None],
        on_end: Callable[[], None],
    ) -> None:
        self._end = end
        self._on_message = on_message
        self._on_end = on_end
        self._received = b""
        self._descriptors: deque[int] = deque()
        self._outbox: deque[tuple[bytes, socket.socket | None]] = deque()
        self._writing = False
        self._closed = False
        self._loop = asyncio.get_running_loop()
        end.setblocking(False)
        self._loop.add_reader(end.fileno(), self.read)

    @property
    def is_closed(self) -> bool:
        return self._closed

    @property
    def waiting(self) -> int:
        """Messages that the other side has had no room for."""
        return len(self._outbox)

    def send(self, message: Message, connection: socket.socket | None = None) -> None:
        """Send a message, and with it a connection, which is closed here once it is on its way."""
        if self._closed:
            if connection is not None:
                connection.close()
            return
        self._outbox.append((json.dumps(message).encode() + b"\n", connection))
        if not self._writing:
            self._write()

    def _write(self) -> None:
        while self._outbox:
            data, connection = self._outbox[0]
            try:
                if connection is None:
                    sent = self._end.send(data)
                else:
                    sent = socket.send_fds(self._end, [data], [connection.fileno()])
            except OSError:
                # No room now; or the other side is gone, which reading will find.
                self._set_writing(True)
                return
            if connection is not None:
                connection.close()
            self._outbox.popleft()
            if sent < len(data):
                self._outbox.appendleft((data[sent:], None))
        self._set_writing(False)

    def _set_writing(self, wanted: bool) -> None:
        if wanted and not self._writing:
            self._loop.add_writer(self._end.fileno(), self._write)
        elif self._writing and not wanted:
            self._loop.remove_writer(self._end.fileno())
        self._writing = wanted

    def read(self) -> None:
        """Take all that has arrived."""
        while not self._closed:
            try:
                data, descriptors, _, _ = socket.recv_fds(self._end, READ_BYTES, MAX_FDS)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                data, descriptors = b"", []
            for descriptor in descriptors:
                os.set_inheritable(descriptor, False)
                self._descriptors.append(descriptor)
            self._received += data
            if not data or len(self._received) > MAX_LINE_BYTES:
                self.close()
                self._on_end()
                return
            *lines, self._received = self._received.split(b"\n")
            for line in lines:
                message: Message = json.loads(line)
                # One that this process had no descriptor left for was closed by the system.
                has_connection = message.get("connection", False) and self._descriptors
                self._on_message(message, self._descriptors.popleft() if has_connection else None)

    def undelivered(self) -> list[socket.socket]:
        """Take back the connections that have not been sent."""
        connections = [connection for _, connection in self._outbox if connection is not None]
        self._outbox.clear()
        return connections

    def close(self) -> None:
        """Close this end. What was not sent stays in :meth:`undelivered`."""
        if self._closed:
            return
        self._closed = True
        self._set_writing(False)
        self._loop.remove_reader(self._end.fileno())
        self._end.close()
        while self._descriptors:
            os.close(self._descriptors.popleft())


def send_blocking(end: socket.socket, message: Message) -> None:
    """Send a message where there is no event loop yet."""
    end.setblocking(True)
    end.sendall(json.dumps(message).encode() + b"\n")
