"""The clients of the benchmarks and the agent that they call, over real sockets."""

from contextlib import closing
from pathlib import Path

import orjson
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from benchmarks.load import Client, closed_loop, elsewhere, get, open_loop, post, served
from inference_table.table import InferenceTable
from tests.support import running


async def hello(request: object) -> PlainTextResponse:
    return PlainTextResponse("hello", 201)


APP = Starlette(routes=[Route("/", hello)])


def test_a_client_sends_again_and_again_over_one_connection() -> None:
    with running(APP) as url, closing(Client(url)) as client:
        for _ in range(3):
            reply = client.send(get("/"))
            assert (reply.status, bytes(reply.body)) == (201, b"hello")
            assert reply.headers["content-type"].startswith("text/plain")


def test_a_client_says_that_the_server_has_gone() -> None:
    with running(APP) as url:
        client = Client(url)
        client.send(get("/"))
    with closing(client), pytest.raises(ConnectionError):
        client.send(get("/"))


def test_an_open_loop_sends_what_is_due_and_counts_what_failed() -> None:
    with running(APP) as url:
        load = open_loop(url, get("/"), per_second=50, seconds=0.2)
    assert len(load.milliseconds) == 10
    assert load.failed == 10  # 201 is not 200


def test_every_request_to_the_benchmarks_agent_is_a_row_with_eight_spans(tmp_path: Path) -> None:
    request = post("/invocations", {"trace_bytes": 10_000, "response_bytes": 2_000, "work_ms": 1})
    with elsewhere() as another:
        with served(tmp_path, capture=True) as endpoint, closing(Client(endpoint.url)) as client:
            answer = orjson.loads(client.send(request).body)
            assert client.send(get("/noop")).status == 200
            load = another.submit(closed_loop, endpoint.url, request, 4, 0.2).result(30)
        rows = InferenceTable(endpoint.table).select(["span_count", "response"]).to_arrow().to_pylist()
    assert load.failed == 0
    assert len(rows) == 1 + len(load.milliseconds)
    assert {row["span_count"] for row in rows} == {8}
    stored = orjson.loads(rows[0]["response"])
    trace = stored.pop("databricks_output")["trace"]
    assert stored == answer
    assert 9_000 < len(orjson.dumps(trace["data"])) < 30_000
