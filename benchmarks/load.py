"""Clients that cost little processor time: requests made beforehand, over kept-alive connections.

Where the server's processor is what is measured, they run in a process of their own (:func:`elsewhere`): a
client that shares an interpreter with others, or costs as much as the server, measures itself.
"""

import asyncio
import json
import multiprocessing
import socket
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from benchmarks.report import quick
from deploy.bench import Endpoint, endpoint

__all__ = [
    "Client",
    "Load",
    "Reply",
    "closed_loop",
    "elsewhere",
    "get",
    "open_loop",
    "post",
    "served",
    "shortened",
]

ROOT: Final = Path(__file__).parent.parent
OK: Final = 200
BUFFER_BYTES: Final = 1 << 20
TIMEOUT_SECONDS: Final = 60.0
"""A server that takes longer to answer hangs."""
KEEP_ALIVE_SECONDS: Final = 4.0
"""Less than uvicorn's 5: a connection that has rested for longer is made anew."""

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def served(
    folder: Path, *, capture: bool, environment: Mapping[str, str] | None = None
) -> AbstractContextManager[Endpoint]:
    """The benchmarks' agent in a process of its own, with capture or without."""
    return endpoint(
        "benchmarks.agent:app", folder, capture=capture, environment=environment, app_dir=str(ROOT)
    )


@dataclass
class Load:
    """What clients saw: milliseconds of each reply, replies other than 200, and the seconds it all took."""

    milliseconds: list[float] = field(default_factory=list)
    failed: int = 0
    seconds: float = 0.0

    def extend(self, other: "Load") -> None:
        self.milliseconds += other.milliseconds
        self.failed += other.failed
        self.seconds += other.seconds


@dataclass(frozen=True)
class Reply:
    """What a server answered; the body is there until the next reply."""

    status: int
    headers: dict[str, str]
    body: memoryview


class Client:
    """One kept-alive connection, for a request at a time.

    httpx takes half a millisecond for a small reply, and 40 for one of 10 MB: more than what is measured.

    Raises:
        ConnectionError: the server has closed the connection.
    """

    def __init__(self, url: str) -> None:
        self._address = urlsplit(url)
        self._body = bytearray(BUFFER_BYTES)
        self._connect()

    def _connect(self) -> None:
        address = self._address
        self._socket = socket.create_connection((address.hostname, address.port), TIMEOUT_SECONDS)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._incoming = self._socket.makefile("rb")
        self._used = time.monotonic()

    def send(self, request: bytes) -> Reply:
        """Send what :func:`get` or :func:`post` made, and read the whole reply, which must have a length."""
        if time.monotonic() - self._used > KEEP_ALIVE_SECONDS:
            self.close()
            self._connect()
        self._socket.sendall(request)
        _, status, *_ = self._line().split(" ")
        headers = {}
        while line := self._line():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        length = int(headers["content-length"])
        if length > len(self._body):
            self._body = bytearray(length)
        body = memoryview(self._body)[:length]
        if self._incoming.readinto(body) < length:
            raise ConnectionError("the server closed the connection within a reply")
        self._used = time.monotonic()
        return Reply(int(status), headers, body)

    def _line(self) -> str:
        line = self._incoming.readline()
        if not line:
            raise ConnectionError("the server closed the connection")
        return line.decode("latin-1").rstrip("\r\n")

    def close(self) -> None:
        self._incoming.close()
        self._socket.close()


def shortened(seconds: float) -> float:
    """How long a run does what a full one does for so many seconds."""
    return seconds / 5 if quick() else seconds


def get(path: str) -> bytes:
    """A GET request as its bytes."""
    return f"GET {path} HTTP/1.1\r\nhost: benchmark\r\n\r\n".encode()


def post(path: str, body: Mapping[str, object]) -> bytes:
    """A POST request with a JSON body as its bytes."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: benchmark\r\ncontent-type: application/json\r\n"
    return head.encode() + b"content-length: %d\r\n\r\n" % len(content) + content


def closed_loop(url: str, request: bytes, connections: int, seconds: float) -> Load:
    """Clients that each send the next request when they have the reply to the last."""
    return asyncio.run(closed(url, request, connections, seconds))


def open_loop(url: str, request: bytes, per_second: float, seconds: float) -> Load:
    """Clients that send on time, whether earlier replies have come or not; their wait counts."""
    return asyncio.run(opened(url, request, per_second, seconds))


@contextmanager
def elsewhere() -> Iterator[Executor]:
    """Runs :func:`closed_loop` and :func:`open_loop` in another process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        executor.submit(get, "/").result()  # it starts now, not within a measurement
        yield executor


async def closed(url: str, request: bytes, connections: int, seconds: float) -> Load:
    load = Load()
    begun = time.perf_counter()

    async def client() -> None:
        connection = await connect(url)
        while (started := time.perf_counter()) - begun < seconds:
            await send(connection, request, started, load)
        connection[1].close()

    await asyncio.gather(*(client() for _ in range(connections)))
    load.seconds = time.perf_counter() - begun
    return load


async def opened(url: str, request: bytes, per_second: float, seconds: float) -> Load:
    load = Load()
    free: list[Connection] = []
    begun = time.perf_counter()

    async def client(due: float) -> None:
        await asyncio.sleep(due - time.perf_counter())
        connection = free.pop() if free else await connect(url)
        await send(connection, request, due, load)
        free.append(connection)

    await asyncio.gather(
        *(client(begun + number / per_second) for number in range(int(seconds * per_second)))
    )
    for _, writer in free:
        writer.close()
    load.seconds = time.perf_counter() - begun
    return load


async def connect(url: str) -> Connection:
    address = urlsplit(url)
    return await asyncio.open_connection(address.hostname, address.port)


async def send(connection: Connection, request: bytes, since: float, load: Load) -> None:
    """One request and its whole reply, which must have a length."""
    reader, writer = connection
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    await reader.readexactly(int(head.partition(b"content-length:")[2].partition(b"\r\n")[0]))
    load.milliseconds.append((time.perf_counter() - since) * 1000)
    load.failed += int(head.split(b" ", 2)[1]) != OK
