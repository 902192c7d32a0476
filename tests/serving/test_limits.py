"""Limits on the size of requests and on requests at a time: what is refused, and how that looks."""

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from inference_table import metrics
from serving.limits import Limits
from serving.serve import ServedApp
from serving.server_settings import ServerSettings
from tests.serving.recorded import NO_TLS, Recorded
from tests.support import running, wait_for

MAX_BYTES = 1000
MAX_RUNNING = 2


@dataclass
class Agent:
    """Answers with the number of bytes that it got, waits for a sign, or answers before it has read all."""

    messages: list[str] = field(default_factory=list)
    """Types of what it received, in the order in which it did."""
    waiting: int = 0
    go_on: threading.Event = field(default_factory=threading.Event)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            raise RuntimeError("knows none")
        await getattr(self, scope["path"].strip("/"))(receive, send)

    async def count(self, receive: Any, send: Any) -> None:
        size = await self.read(receive)
        if size is None:
            raise ConnectionError("the client left")  # as frameworks do
        await answer(send, str(size).encode())

    async def careless(self, receive: Any, send: Any) -> None:
        """Does not mind whether its client is there."""
        await self.read(receive)
        await answer(send, b"done")

    async def early(self, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        if await self.read(receive) is None:
            raise ConnectionError("the client left")
        await send({"type": "http.response.body", "body": b"ended"})

    async def wait(self, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        self.waiting += 1
        await asyncio.to_thread(self.go_on.wait, 60)
        self.waiting -= 1
        await send({"type": "http.response.body", "body": b"ended"})

    async def read(self, receive: Any) -> int | None:
        """How long the body is; None where the client is gone."""
        size, more = 0, True
        while more:
            message = await receive()
            self.messages.append(message["type"])
            if message["type"] == "http.disconnect":
                assert (await receive())["type"] == "http.disconnect"
                return None
            size += len(message["body"])
            more = message["more_body"]
        return size


async def answer(send: Any, body: bytes) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


@contextmanager
def limited(agent: Any, folder: Path) -> Iterator[Recorded]:
    """An agent with all that ``tracelake serve`` puts around it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENABLE_MLFLOW_TRACING", "true")
        patch.setenv("INFERENCE_TABLE_URI", str(folder / "payload"))
        patch.setenv("INFERENCE_TABLE_SPOOL_DIR", str(folder / "spool"))
        patch.setenv("INFERENCE_TABLE_FLUSH_SECONDS", "0.05")
        patch.setenv("INFERENCE_TABLE_ALLOW_DURABILITY_HEADER", "true")
        app = ServedApp(agent, ServerSettings(max_request_bytes=MAX_BYTES, max_concurrency=MAX_RUNNING))
    with running(app) as url:
        yield Recorded(url, folder / "payload")


@pytest.fixture(scope="module")
def agent() -> Agent:
    return Agent()


@pytest.fixture(scope="module")
def endpoint(agent: Agent, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    with limited(agent, tmp_path_factory.mktemp("limits")) as found:
        yield found


def refused(reason: str) -> float:
    value: float = metrics.REFUSED.labels(reason)._value.get()
    return value


def in_chunks(size: int) -> Iterator[bytes]:
    for start in range(0, size, 100):
        yield b"q" * min(100, size - start)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_at_the_limit_is_taken(endpoint: Recorded, agent: Agent, chunked: bool) -> None:
    """And one byte more is not."""
    for size, status in ((MAX_BYTES, 200), (MAX_BYTES + 1, 413)):
        body = in_chunks(size) if chunked else b"q" * size
        assert endpoint.send("/count", content=body).status_code == status


@pytest.mark.parametrize("durability", ["relaxed", "strict"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_larger_body_is_refused_recorded_and_counted(
    endpoint: Recorded, agent: Agent, chunked: bool, durability: str
) -> None:
    """The agent sees none of one whose length is announced; of another it is told that the client left."""
    before = refused("request_size")
    body = in_chunks(MAX_BYTES * 2) if chunked else b"q" * MAX_BYTES * 2
    exchanged = endpoint.post("/count", content=body, headers={"x-inference-table-durability": durability})
    assert exchanged.reply.status_code == exchanged.row["status_code"] == 413
    assert exchanged.reply.json()["error_code"] == "REQUEST_ENTITY_TOO_LARGE"
    assert "1,000 bytes" in json.loads(exchanged.row["response"])["message"]
    receipt = {"relaxed": "queued", "strict": "spooled"}[durability]
    assert exchanged.reply.headers["x-inference-table-durability"] == receipt
    assert refused("request_size") == before + 1
    assert (exchanged.row["request"] is None) != chunked
    if chunked:
        assert "http.disconnect" in agent.messages


def test_an_agent_that_answers_all_the_same_changes_nothing(endpoint: Recorded, agent: Agent) -> None:
    """The 413 has gone, and is the row's status."""
    exchanged = endpoint.post("/careless", content=in_chunks(MAX_BYTES * 2))
    assert exchanged.reply.status_code == exchanged.row["status_code"] == 413


def test_a_framework_of_agents_leaves_no_traces_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Starlette raises where its client is gone; that is no failure of the agent."""

    async def echo(request: Request) -> JSONResponse:
        return JSONResponse(len(await request.body()))

    app = Starlette(routes=[Route("/", echo, methods=["POST"])])
    with running(Limits(app, max_request_bytes=MAX_BYTES, max_concurrency=MAX_RUNNING)) as url:
        assert httpx.post(url, content=in_chunks(MAX_BYTES * 2), verify=NO_TLS).status_code == 413
        assert httpx.post(url, content=in_chunks(MAX_BYTES), verify=NO_TLS).json() == MAX_BYTES
    assert "ClientDisconnect" not in caplog.text


def test_a_length_beside_a_transfer_encoding_does_not_count(endpoint: Recorded, agent: Agent) -> None:
    """The encoding says where the body ends: a small length must not let a large body in."""
    host, port = endpoint.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as client:
        client.sendall(
            b"POST /count HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        client.sendall(b"%x\r\n" % (MAX_BYTES * 2) + b"q" * MAX_BYTES * 2 + b"\r\n0\r\n\r\n")
        reply = client.makefile("rb").readline()
    assert reply.split()[1] in (b"413", b"400")  # where h11 lets both pass, httptools refuses that


def test_a_reply_that_has_begun_is_broken_off(endpoint: Recorded, agent: Agent) -> None:
    """It is too late for a 413: the agent is told that its client left, and the client sees no clean end."""
    before = refused("request_size")
    agent.messages.clear()
    with pytest.raises(httpx.TransportError):
        endpoint.send("/early", content=in_chunks(MAX_BYTES * 2))
    assert agent.messages[-1] == "http.disconnect"
    assert refused("request_size") == before + 1
    row = endpoint.find("request_metadata['path'] = '/early'")
    assert "RESPONSE_INCOMPLETE" in row["logging_error_codes"]


@pytest.mark.parametrize("chunked", [False, True])
def test_who_is_still_sending_gets_the_413(endpoint: Recorded, agent: Agent, chunked: bool) -> None:
    """A client that sends 10 MB before it reads, on a connection to be closed, gets no reset instead."""
    connection = http.client.HTTPConnection(endpoint.url.removeprefix("http://"), timeout=60)
    body = (b"q" * 100_000 for _ in range(100)) if chunked else b"q" * 10_000_000
    connection.request("POST", "/count", body, {"connection": "close"}, encode_chunked=chunked)
    assert connection.getresponse().status == 413
    connection.close()


def test_more_requests_than_may_run_are_refused_recorded_and_counted(tmp_path: Path) -> None:
    """Streams count as long as they run; when one has ended the next is taken."""
    before = refused("concurrency")
    agent = Agent()
    with limited(agent, tmp_path) as endpoint, ThreadPoolExecutor(MAX_RUNNING) as pool:
        try:
            streams = [pool.submit(endpoint.send, "/wait") for _ in range(MAX_RUNNING)]
            wait_for(lambda: agent.waiting == MAX_RUNNING, "the streams to run")
            exchanged = endpoint.post("/count", content=b"q")
        finally:
            agent.go_on.set()
        assert [stream.result().text for stream in streams] == ["begunended"] * MAX_RUNNING
        wait_for(lambda: endpoint.send("/count", content=b"q").text == "1", "a place to be free")
    assert exchanged.reply.status_code == exchanged.row["status_code"] == 429
    assert exchanged.reply.headers["retry-after"] == "1"
    assert exchanged.reply.json()["error_code"] == "REQUEST_LIMIT_EXCEEDED"
    assert refused("concurrency") > before


def test_requests_that_failed_do_not_count_as_running() -> None:
    """However an agent ends, its place is free."""

    async def fail(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("the agent broke")

    async def ignore(*_: Any) -> Any: ...

    limits = Limits(fail, max_request_bytes=1, max_concurrency=1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the agent broke"):
            asyncio.run(limits({"type": "http", "headers": []}, ignore, ignore))


def test_websockets_count_as_long_as_they_are_open() -> None:
    """One too many is closed before it opens, with the code that says to try again later."""

    async def converse() -> list[Any]:
        opened, closed = asyncio.Event(), asyncio.Event()
        sent: list[Any] = []

        async def agent(scope: Any, receive: Any, send: Any) -> None:
            opened.set()
            await closed.wait()

        async def receive() -> dict[str, Any]:
            return {"type": "websocket.connect"}

        async def send(message: Any) -> None:
            sent.append(message)

        limits = Limits(agent, max_request_bytes=1, max_concurrency=1)
        scope = {"type": "websocket", "path": "/", "headers": []}
        first = asyncio.create_task(limits(scope, receive, send))
        await opened.wait()
        await limits(scope, receive, send)
        closed.set()
        await first
        await limits(scope, receive, send)
        return sent

    [refusal] = asyncio.run(converse())
    assert (refusal["type"], refusal["code"]) == ("websocket.close", 1013)
