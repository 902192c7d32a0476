"""Replies that may not leave unrecorded."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from serving import InferenceTableMiddleware
from tests.support import output_of, rows, running, wait_for


def make_agent() -> Starlette:
    async def stream(_: Any) -> StreamingResponse:
        async def generate() -> AsyncIterator[str]:
            for number in range(3):
                yield f'data: {{"n": {number}}}\n\n'

        return StreamingResponse(generate(), media_type="text/event-stream")

    async def fixed(_: Any) -> Response:
        async def generate() -> AsyncIterator[bytes]:
            yield b"12345"
            yield b"67890"

        return StreamingResponse(generate(), headers={"content-length": "10"}, media_type="text/plain")

    async def broken(_: Any) -> None:
        raise RuntimeError("the agent broke")

    routes = {
        "/": lambda _: JSONResponse({"ok": True}),
        "/stream": stream,
        "/fixed": fixed,
        "/broken": broken,
    }
    return Starlette(routes=[Route(path, route, methods=["POST"]) for path, route in routes.items()])


class Endpoint:
    def __init__(self, folder: Path, app: Any = None, **options: Any) -> None:
        self.folder = folder
        self.table = folder / "payload"
        options = {
            "uri": str(self.table),
            "spool_dir": str(folder / "spool"),
            "flush_seconds": 0.1,
            **options,
        }
        self.app = InferenceTableMiddleware(make_agent() if app is None else app, enabled=True, **options)

    @contextlib.contextmanager
    def broken_spool(self) -> Iterator[None]:
        """With a file where the spool's folder was, no segment can be written."""
        # At once: a committer that lists its folders meanwhile would put something into a tree being removed.
        (self.folder / "spool").rename(self.folder / "spool that was")
        (self.folder / "spool").write_text("")
        yield
        (self.folder / "spool").unlink()


@pytest.mark.parametrize(("durability", "receipt"), [("strict", "spooled"), ("committed", "committed")])
def test_a_durable_reply_says_what_holds(tmp_path: Path, durability: str, receipt: str) -> None:
    """The reply's header is the receipt, and a stream's header its mode."""
    endpoint = Endpoint(tmp_path, durability=durability)
    with running(endpoint.app) as url:
        reply = httpx.post(url)
        assert reply.headers["x-inference-table-durability"] == receipt
        if durability == "committed":
            assert [row["databricks_request_id"] for row in rows(endpoint.table)] == [
                reply.headers["x-databricks-request-id"]
            ]
        else:
            spooled = [*tmp_path.glob("spool/*/*/*.arrow")]
            assert spooled or rows(endpoint.table)
        stream = httpx.post(f"{url}/stream")
        assert stream.headers["x-inference-table-durability"] == durability
        assert stream.text.count("data:") == 3
        assert httpx.post(f"{url}/fixed").text == "1234567890"
        assert httpx.post(f"{url}/broken").status_code == 500
    assert [row["status_code"] for row in rows(endpoint.table)] == [200, 200, 200, 500]
    assert output_of(rows(endpoint.table)[1])["stream"]["ended"] is True


def test_concurrent_strict_replies_share_a_segment(tmp_path: Path) -> None:
    """A hundred requests at once take far fewer fsyncs than a hundred."""

    async def ask(url: str) -> list[httpx.Response]:
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=100), timeout=30) as client:
            return await asyncio.gather(*[client.post(url) for _ in range(100)])

    endpoint = Endpoint(tmp_path, durability="strict", flush_seconds=60)
    with running(endpoint.app) as url:
        replies = asyncio.run(ask(url))
        segments = len([*tmp_path.glob("spool/*/*/*.arrow")])
    assert {reply.headers["x-inference-table-durability"] for reply in replies} == {"spooled"}
    assert 0 < segments < 60
    assert len(rows(endpoint.table)) == 100


def test_what_cannot_be_recorded_is_answered_503(tmp_path: Path) -> None:
    """With the spool gone a strict reply becomes a 503 that says why; the agent's answer stays in."""
    endpoint = Endpoint(tmp_path, durability="strict", strict_timeout_seconds=0.5)
    with running(endpoint.app) as url, endpoint.broken_spool():
        reply = httpx.post(url, timeout=30)
        assert reply.status_code == 503
        assert reply.headers["x-inference-table-durability"] == "unknown"
        assert reply.headers["x-databricks-request-id"] in reply.text
        assert "0.5 s" in reply.json()["message"]
        broken = httpx.post(f"{url}/broken", timeout=30)
        assert broken.status_code == 503


def test_a_stream_that_cannot_be_recorded_has_no_end(tmp_path: Path) -> None:
    """The client sees a broken transfer, never a complete one."""
    endpoint = Endpoint(tmp_path, durability="strict", strict_timeout_seconds=0.5)
    with running(endpoint.app) as url, endpoint.broken_spool():
        for path in ("/stream", "/fixed"):
            with pytest.raises(httpx.RemoteProtocolError):
                httpx.post(f"{url}{path}", timeout=30)


def test_relaxed_replies_do_not_notice_a_broken_spool(tmp_path: Path) -> None:
    """The endpoint comes first: every answer is unchanged."""
    endpoint = Endpoint(tmp_path)
    with running(endpoint.app) as url, endpoint.broken_spool():
        assert [httpx.post(url).json() for _ in range(20)] == [{"ok": True}] * 20


def test_clients_choose_the_durability_where_allowed(tmp_path: Path) -> None:
    """The header works only with the switch on."""
    header = {"x-inference-table-durability": "strict"}
    for allowed, receipt in ((True, "spooled"), (False, "queued")):
        endpoint = Endpoint(tmp_path / str(allowed), allow_durability_header=allowed)
        (tmp_path / str(allowed)).mkdir()
        with running(endpoint.app) as url:
            assert httpx.post(url, headers=header).headers["x-inference-table-durability"] == receipt


def test_durable_requests_are_never_sampled_out(tmp_path: Path) -> None:
    """A fraction of zero leaves strict requests recorded, each standing for itself."""
    endpoint = Endpoint(tmp_path, durability="strict", sampling_fraction=0)
    with running(endpoint.app) as url:
        for _ in range(5):
            httpx.post(url)
    assert [row["sampling_fraction"] for row in rows(endpoint.table)] == [1.0] * 5


class Outer(BaseHTTPMiddleware):
    """A middleware outside of ours that completes what was left incomplete."""

    async def dispatch(self, request: Request, call_next: Any) -> Response:
        reply: Response = await call_next(request)
        return reply


def test_a_cut_stream_looks_cut_through_other_middlewares(tmp_path: Path) -> None:
    """Starlette's BaseHTTPMiddleware adds a last chunk by itself; the client still sees a broken transfer."""
    endpoint = Endpoint(tmp_path, durability="strict", strict_timeout_seconds=0.5)
    with running(Outer(endpoint.app)) as url:
        assert httpx.post(f"{url}/stream", timeout=30).text.count("data:") == 3
        with endpoint.broken_spool(), pytest.raises(httpx.RemoteProtocolError):
            httpx.post(f"{url}/stream", timeout=30)


@pytest.mark.parametrize("sends_start", [True, False])
def test_a_reply_that_is_never_completed_is_recorded_first(tmp_path: Path, sends_start: bool) -> None:
    """The server's own 500 may not leave unrecorded either; the row has the status that the client got."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        if sends_start:
            await send({"type": "http.response.start", "status": 200, "headers": []})

    endpoint = Endpoint(tmp_path, app, durability="strict", strict_timeout_seconds=0.5)
    with running(endpoint.app) as url:
        assert httpx.post(url, timeout=30).status_code == 500
        wait_for(lambda: rows(endpoint.table), "the row")
        with endpoint.broken_spool():
            assert httpx.post(url, timeout=30).status_code == 503
    # The second was held back as unknown, and got through once the disk was mended.
    assert [row["status_code"] for row in rows(endpoint.table)] == [500, 500]
