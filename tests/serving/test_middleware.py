"""From a request over a real socket to its row."""

import asyncio
import base64
import gzip
import json
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import mlflow
import orjson
import pytest
from fastapi import FastAPI
from mlflow.entities import Trace
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from inference_table.errors import SettingsError
from serving import InferenceTableMiddleware
from serving.redaction import Payload
from tests.serving.apps import CHUNKS, bare_app, make_app
from tests.support import ROOT, output_of, rows, running, wait_for


class Endpoint:
    """An app with capture on, and the table that it writes."""

    def __init__(self, folder: Path, app: Any = None, **options: Any) -> None:
        self.table = folder / "payload"
        options = {
            "uri": str(self.table),
            "spool_dir": str(folder / "spool"),
            "flush_seconds": 0.1,
            **options,
        }
        self.app = InferenceTableMiddleware(make_app() if app is None else app, enabled=True, **options)

    def exchange(self, *requests: Any) -> list[dict[str, Any]]:
        """Send what the callables send, stop the server, and return the rows in the order of arrival."""
        with running(self.app) as url, httpx.Client(base_url=url, timeout=30) as client:
            for request in requests:
                request(client)
        return rows(self.table)


@pytest.fixture
def endpoint(tmp_path: Path) -> Endpoint:
    return Endpoint(tmp_path)


def post(path: str, **arguments: Any) -> Any:
    return lambda client: client.post(path, **arguments)


def test_a_request_becomes_a_row_with_its_trace_inside_the_response(endpoint: Endpoint) -> None:
    """Request verbatim, response with the trace spliced in, and the reply carries the row's id."""
    body = b'{"question" :  "why?", "client_request_id": "mine-1"}'
    replies: list[httpx.Response] = []
    [row] = endpoint.exchange(lambda client: replies.append(client.post("/invocations", content=body)))
    [reply] = replies
    assert reply.json() == {"answer": "You asked: why?"}
    assert reply.headers["x-databricks-request-id"] == row["databricks_request_id"]
    assert reply.headers["x-inference-table-durability"] == "queued"
    assert uuid.UUID(row["databricks_request_id"]).version == 7
    assert row["request"] == body.decode()
    assert row["response"].startswith(reply.text[:-1])
    assert row["client_request_id"] == "mine-1"
    assert (row["status_code"], row["sampling_fraction"], row["logging_error_codes"]) == (200, 1.0, [])
    assert str(row["request_date"]) == row["request_time"].strftime("%Y-%m-%d")
    trace = Trace.from_dict(output_of(row)["trace"])
    assert [span.name for span in trace.data.spans] == ["answer", "retrieve"]
    assert trace.data.spans[0].inputs == {"question": "why?"}
    assert trace.info.client_request_id == row["databricks_request_id"]
    assert (row["trace_id"], row["trace_state"], row["span_count"]) == (trace.info.trace_id, "OK", 2)
    assert orjson.loads(row["trace_info"])["trace_id"] == trace.info.trace_id
    assert row["execution_duration_ms"] >= row["time_to_first_byte_ms"] >= 0
    assert row["capture_overhead_us"] > 0


def test_a_body_that_the_app_never_read_is_null(endpoint: Endpoint) -> None:
    """What nobody asked the server for never passed us; the row does not claim that it was empty."""
    [row] = endpoint.exchange(post("/unread", content=b"never looked at"))
    assert row["request"] is None
    assert row["status_code"] == 200


def test_a_sync_endpoint_in_the_thread_pool_is_traced(endpoint: Endpoint) -> None:
    """FastAPI runs ``def`` endpoints in threads; their spans belong to the request all the same."""
    [row] = endpoint.exchange(post("/sync", json={"question": "q"}))
    assert row["span_count"] == 2


def test_a_request_in_many_chunks_is_whole(endpoint: Endpoint) -> None:
    """A chunked upload is stored as one body."""
    parts = [b'{"question": "', *(b"x" * 50_000 for _ in range(20)), b'"}']

    def chunked() -> Iterator[bytes]:
        yield from parts

    [row] = endpoint.exchange(post("/echo", content=chunked()))
    assert row["request"].encode() == b"".join(parts)


def test_a_streamed_reply_is_stored_as_the_answer_it_adds_up_to(endpoint: Endpoint) -> None:
    """Chat completion chunks become a chat completion, with what is known of the stream."""
    [row] = endpoint.exchange(post("/stream", json={}))
    response = orjson.loads(row["response"])
    assert response["object"] == "chat.completion"
    assert response["choices"][0]["message"]["content"] == "".join(CHUNKS)
    stream = response["databricks_output"]["stream"]
    assert stream["events"] == len(CHUNKS)
    assert (stream["ended"], stream["cut_off_by_client"]) == (True, False)
    assert response["databricks_output"]["trace"]["info"]["state"] == "OK"


def test_a_client_that_leaves_a_stream_is_recorded_as_499(endpoint: Endpoint) -> None:
    """What had been sent until then is kept, with the trace, and the stream says that it was cut off."""

    def leave(client: httpx.Client) -> None:
        with client.stream("POST", "/endless", json={}) as reply:
            next(reply.iter_lines())

    [row] = endpoint.exchange(leave, lambda _: wait_for(lambda: rows(endpoint.table), "the row"))
    assert row["status_code"] == 499
    assert output_of(row)["stream"]["cut_off_by_client"] is True
    assert output_of(row)["trace"]["info"]["trace_id"] == row["trace_id"]


def test_a_client_that_leaves_before_the_answer_is_recorded_as_499(endpoint: Endpoint) -> None:
    """Also where the app never asks whether its client is still there."""

    def leave(client: httpx.Client) -> None:
        address = urlsplit(str(client.base_url))
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.sendall(b"POST /slow HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}")
            time.sleep(0.3)

    [row] = endpoint.exchange(leave, lambda _: wait_for(lambda: rows(endpoint.table), "the row"))
    assert row["status_code"] == 499
    assert row["trace_state"] == "OK"


def test_an_app_that_raises_before_its_reply_is_recorded_as_500(endpoint: Endpoint) -> None:
    """The row has the request and the trace of the failure."""
    replies: list[httpx.Response] = []
    [row] = endpoint.exchange(lambda client: replies.append(client.post("/raise", json={"q": 1})))
    assert replies[0].status_code == row["status_code"] == 500
    assert row["trace_state"] == "ERROR"
    assert row["request"] == '{"q":1}'
    assert "the agent broke" in row["response"]


def test_an_app_that_raises_midway_keeps_what_was_sent(endpoint: Endpoint) -> None:
    """The client got 200 and a broken stream; the row says both."""

    def read(client: httpx.Client) -> None:
        with pytest.raises(httpx.RemoteProtocolError):
            client.post("/raise-midway")

    [row] = endpoint.exchange(read)
    assert row["status_code"] == 200
    output = output_of(row)
    assert (output["stream"]["ended"], output["stream"]["cut_off_by_client"]) == (False, False)
    assert "the agent broke midway" in output["stream"]["error"]
    assert orjson.loads(row["response"])["events"] == [{"n": 1}]


def test_get_head_and_health_are_left_alone(endpoint: Endpoint) -> None:
    """By default only POST requests make rows, and the others carry no header of ours."""
    replies: list[httpx.Response] = []
    recorded = endpoint.exchange(
        lambda client: replies.append(client.get("/health")),
        lambda client: replies.append(client.head("/health")),
        post("/echo", content=b"{}"),
    )
    assert len(recorded) == 1
    assert all("x-databricks-request-id" not in reply.headers for reply in replies)


def test_path_patterns_choose_what_is_captured(tmp_path: Path) -> None:
    """Patterns include and exclude by method and path."""
    endpoint = Endpoint(tmp_path, paths="POST /*, GET /health, !/echo")
    recorded = endpoint.exchange(
        post("/echo", content=b"{}"),
        post("/sync", json={"question": "q"}),
        lambda client: client.get("/health"),
    )
    assert [row["request_metadata"]["path"] for row in dicts(recorded)] == ["/sync", "/health"]


def dicts(recorded: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "request_metadata": dict(row["request_metadata"])} for row in recorded]


def test_compressed_bodies_are_stored_decoded(endpoint: Endpoint) -> None:
    """A gzip request and a gzip reply are readable in the row; the client's bytes are untouched."""
    replies: list[httpx.Response] = []
    sent = gzip.compress(b'{"question": "packed"}')
    headers = {"content-encoding": "gzip", "content-type": "application/json"}
    [row] = endpoint.exchange(
        lambda client: replies.append(client.post("/gzipped", content=sent, headers=headers))
    )
    assert replies[0].json() == {"zipped": True}
    assert row["request"] == '{"question": "packed"}'
    assert orjson.loads(row["response"])["zipped"] is True


def test_a_body_that_is_not_encoded_as_it_says_is_kept(endpoint: Endpoint) -> None:
    """The row says that decoding failed, and has the bytes."""
    [row] = endpoint.exchange(post("/echo", content=b"not gzip", headers={"content-encoding": "gzip"}))
    assert row["logging_error_codes"] == ["REQUEST_DECODING_FAILED"]
    assert "not gzip" in row["request"]


def test_bodies_that_are_not_utf8_are_kept_as_base64(endpoint: Endpoint) -> None:
    """Bytes survive in both columns."""
    raw = b"\xff\xfe\x00binary"
    [row] = endpoint.exchange(
        post("/echo", content=raw, headers={"x-reply-type": "application/octet-stream"})
    )
    assert base64.b64decode(orjson.loads(row["request"])["body"]) == raw
    assert base64.b64decode(orjson.loads(row["response"])["body"]) == raw


def test_bodies_over_the_limit_leave_their_head_and_a_code(tmp_path: Path) -> None:
    """The row is never dropped for its size; the client's reply is whole."""
    endpoint = Endpoint(tmp_path, max_payload_bytes=1000)
    replies: list[httpx.Response] = []
    body = json.dumps({"text": "y" * 5000}).encode()
    [row] = endpoint.exchange(lambda client: replies.append(client.post("/echo", content=body)))
    assert replies[0].content == body
    assert row["logging_error_codes"] == ["MAX_REQUEST_SIZE_EXCEEDED", "MAX_RESPONSE_SIZE_EXCEEDED"]
    assert orjson.loads(row["request"]) == {"truncated_bytes": len(body) - 1000, "head": body[:1000].decode()}
    assert orjson.loads(row["response"])["truncated_bytes"] == len(body) - 1000


def test_a_trace_over_the_limit_leaves_its_info(tmp_path: Path) -> None:
    """The row keeps what lists need, and says that the spans are gone."""
    endpoint = Endpoint(tmp_path, max_payload_bytes=3000)
    [row] = endpoint.exchange(post("/invocations", json={"question": "z" * 2500}))
    assert row["logging_error_codes"] == ["MAX_TRACE_SIZE_EXCEEDED"]
    trace = output_of(row)["trace"]
    assert trace["data"]["spans"] == []
    assert trace["info"]["trace_id"] == row["trace_id"]


def test_memory_that_runs_out_truncates_instead_of_failing(tmp_path: Path) -> None:
    """A body beyond the process's memory limit passes to the app untouched; the row says why it is cut."""
    endpoint = Endpoint(tmp_path, max_memory_bytes=100_000)
    replies: list[httpx.Response] = []
    body = b'"' + b"m" * 3_000_000 + b'"'
    [row] = endpoint.exchange(lambda client: replies.append(client.post("/echo", content=body)))
    assert replies[0].content == body
    assert "MEMORY_LIMIT_EXCEEDED" in row["logging_error_codes"]


def test_sampling_records_a_share_and_says_which(tmp_path: Path) -> None:
    """A fraction of one half records some and not all of 60 requests, each row with the fraction."""
    endpoint = Endpoint(tmp_path, sampling_fraction=0.5)
    recorded = endpoint.exchange(*[post("/echo", content=b"{}") for _ in range(60)])
    assert 5 < len(recorded) < 55
    assert {row["sampling_fraction"] for row in recorded} == {0.5}


def test_two_root_traces_are_both_kept(endpoint: Endpoint) -> None:
    """The first to start is ``trace``, the other is in ``other_traces``."""
    [row] = endpoint.exchange(post("/two-roots", json={}))
    output = output_of(row)
    traces = [Trace.from_dict(trace) for trace in (output["trace"], *output["other_traces"])]
    assert [trace.data.spans[0].inputs for trace in traces] == [{"question": "first"}, {"question": "second"}]


def test_spans_of_background_tasks_belong_to_the_row(endpoint: Endpoint) -> None:
    """A task that runs after the reply, within the grace period, is in the row's trace."""
    [row] = endpoint.exchange(post("/background", json={}))
    assert row["span_count"] == 2


def test_an_agents_own_databricks_output_stays_beside_ours(endpoint: Endpoint) -> None:
    """Our id wins, its other keys stay."""
    [row] = endpoint.exchange(post("/own-output", json={}))
    output = output_of(row)
    assert output["note"] == "kept"
    assert output["databricks_request_id"] == row["databricks_request_id"]


@pytest.mark.parametrize("allowed", [True, False])
def test_return_trace_puts_the_trace_into_the_reply_where_allowed(tmp_path: Path, allowed: bool) -> None:
    """The client gets its trace only if the operator allows it; the row stays the same."""
    endpoint = Endpoint(tmp_path, allow_return_trace=allowed)
    replies: list[httpx.Response] = []
    body = {"question": "q", "databricks_options": {"return_trace": True}}
    [row] = endpoint.exchange(lambda client: replies.append(client.post("/invocations", json=body)))
    reply = replies[0].json()
    assert reply.pop("answer") == "You asked: q"
    assert ("databricks_output" in reply) is allowed
    if allowed:
        assert Trace.from_dict(reply["databricks_output"]["trace"]).info.trace_id == row["trace_id"]
        assert reply["databricks_output"]["databricks_request_id"] == row["databricks_request_id"]
    assert "other_traces" not in output_of(row)


def test_return_trace_adds_one_event_to_a_stream_before_its_end(tmp_path: Path) -> None:
    """The event comes before ``[DONE]``, where clients still read."""
    endpoint = Endpoint(tmp_path, allow_return_trace=True)
    replies: list[httpx.Response] = []
    body = {"databricks_options": {"return_trace": True}}
    endpoint.exchange(lambda client: replies.append(client.post("/stream", json=body)))
    events = [line.removeprefix("data: ") for line in replies[0].text.splitlines() if line]
    assert events[-1] == "[DONE]"
    assert "databricks_request_id" in json.loads(events[-2])["databricks_output"]
    assert len(events) == len(CHUNKS) + 2


def test_requests_that_ask_for_no_trace_keep_their_reply(tmp_path: Path) -> None:
    """Allowing it changes nothing for those who don't ask."""
    endpoint = Endpoint(tmp_path, allow_return_trace=True)
    replies: list[httpx.Response] = []
    endpoint.exchange(lambda client: replies.append(client.post("/invocations", json={"question": "q"})))
    assert replies[0].json() == {"answer": "You asked: q"}


def test_redact_sees_everything_before_it_is_written(tmp_path: Path) -> None:
    """What the callable takes out is in no column."""

    def redact(payload: Payload) -> Payload:
        text = orjson.dumps([payload.request, payload.response, payload.traces]).decode()
        payload.request, payload.response, payload.traces = orjson.loads(text.replace("secret", "[gone]"))
        return payload

    endpoint = Endpoint(tmp_path, redact=redact)
    replies: list[httpx.Response] = []
    [row] = endpoint.exchange(
        lambda client: replies.append(client.post("/invocations", json={"question": "secret"}))
    )
    assert "secret" in replies[0].text
    assert "secret" not in str(row)
    assert "[gone]" in row["request"]
    assert row["span_count"] == 2


def test_a_failing_redact_withholds_the_payload(tmp_path: Path) -> None:
    """A failure never leaks: the row is there, its content is not."""

    def redact(payload: Payload) -> Payload:
        raise KeyError("a bug of the user's")

    [row] = Endpoint(tmp_path, redact=redact).exchange(post("/invocations", json={"question": "secret"}))
    assert row["logging_error_codes"] == ["REDACTION_FAILED"]
    assert row["request"] is row["response"] is row["trace_info"] is None
    assert "secret" not in str(row)


def test_metadata_names_the_request_and_leaves_credentials_out(tmp_path: Path) -> None:
    """Method, path, types and ids are there; Authorization and Cookie are nowhere in the row."""
    endpoint = Endpoint(tmp_path, served_entity="support-bot/3", requester_header="x-user")
    headers = {
        "authorization": "Bearer hidden",
        "cookie": "session=hidden",
        "x-request-id": "r-1",
        "x-user": "ann",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    }
    [row] = dicts(endpoint.exchange(post("/echo", content=b"{}", headers=headers)))
    metadata = row["request_metadata"]
    assert (metadata["method"], metadata["path"], metadata["x-request-id"]) == ("POST", "/echo", "r-1")
    assert (metadata["endpoint_name"], metadata["model_version"]) == ("support-bot", "3")
    assert metadata["traceparent"] == headers["traceparent"]
    assert (row["served_entity_id"], row["requester"]) == ("support-bot/3", "ann")
    assert "hidden" not in str(row)


def test_concurrent_requests_keep_their_own_spans(endpoint: Endpoint) -> None:
    """200 requests at once, sync and async: each row has its own two spans and question."""
    questions = [f"question {number}" for number in range(200)]

    def ask(client: httpx.Client) -> None:
        with ThreadPoolExecutor(32) as pool:
            paths = ("/invocations", "/sync")
            list(
                pool.map(
                    lambda one: client.post(paths[one[0] % 2], json={"question": one[1]}).raise_for_status(),
                    enumerate(questions),
                )
            )

    recorded = endpoint.exchange(ask)
    assert len(recorded) == len(questions)
    for row in recorded:
        trace = Trace.from_dict(output_of(row)["trace"])
        assert [span.name for span in trace.data.spans] == ["answer", "retrieve"]
        assert trace.data.spans[1].inputs == trace.data.spans[0].inputs == json.loads(row["request"])


def test_a_bare_asgi_function_is_recorded_and_flushed(tmp_path: Path) -> None:
    """It knows no lifespan; check, start and flush happen all the same."""
    [row] = Endpoint(tmp_path, bare_app).exchange(post("/", content=b"12345"))
    assert orjson.loads(row["response"])["got"] == 5


def test_starlette_takes_it_as_middleware_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``add_middleware``, twice by mistake, makes one row per request; settings come from the environment."""
    monkeypatch.setenv("ENABLE_MLFLOW_TRACING", "true")
    monkeypatch.setenv("INFERENCE_TABLE_URI", str(tmp_path / "payload"))
    monkeypatch.setenv("INFERENCE_TABLE_SPOOL_DIR", str(tmp_path / "spool"))
    app = Starlette(routes=[Route("/", lambda _: JSONResponse({"ok": True}), methods=["POST"])])
    app.add_middleware(InferenceTableMiddleware)
    app.add_middleware(InferenceTableMiddleware)
    with running(app) as url:
        httpx.post(url, json={})
    assert len(rows(tmp_path / "payload")) == 1


def test_websockets_pass_through(endpoint: Endpoint) -> None:
    """Other scopes reach the app as they are."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope, receive, send))

    import asyncio

    middleware = InferenceTableMiddleware(app, enabled=True)
    scope = {"type": "websocket", "path": "/"}
    asyncio.run(middleware(scope, "receive", "send"))
    assert seen == [(scope, "receive", "send")]


SWITCHED_OFF = """
import asyncio, sys, threading
from pathlib import Path
from serving import InferenceTableMiddleware

async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})

sent = []
async def send(message):
    sent.append(message)

scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
asyncio.run(InferenceTableMiddleware(app)(scope, None, send))
assert sent[0]["headers"] == [], sent
assert threading.active_count() == 1, threading.enumerate()
assert not {"mlflow", "deltalake", "pyarrow", "duckdb"} & set(sys.modules), sorted(sys.modules)
assert not list(Path().iterdir()), list(Path().iterdir())
"""


@pytest.mark.parametrize("value", [None, "false", "False", "0"])
def test_switched_off_it_does_nothing(tmp_path: Path, value: str | None) -> None:
    """No thread, no file, no header, no import of mlflow or deltalake."""
    environment = {"PYTHONPATH": str(ROOT), **({} if value is None else {"ENABLE_MLFLOW_TRACING": value})}
    subprocess.run(
        [sys.executable, "-c", SWITCHED_OFF], cwd=tmp_path, env=environment, check=True, timeout=60
    )


@pytest.mark.parametrize(
    ("variable", "value", "accepted"),
    [
        ("ENABLE_MLFLOW_TRACING", "yes please", "true or false"),
        ("INFERENCE_TABLE_DURABILITY", "stirct", "relaxed, strict or committed"),
        ("INFERENCE_TABLE_FLUSH_SECONDS", "-1", "at least 0"),
        ("INFERENCE_TABLE_SAMPLING_FRACTION", "2", "from 0 to 1"),
        ("INFERENCE_TABLE_MAX_PAYLOAD_BYTES", "64MB", "whole number of bytes"),
        ("INFERENCE_TABLE_PATHS", "invocations", "patterns such as"),
        ("INFERENCE_TABLE_ALLOW_RETURN_TRACE", "maybe", "true or false"),
    ],
)
def test_a_mistake_in_a_setting_stops_the_start(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    variable: str,
    value: str,
    accepted: str,
) -> None:
    """The message names the variable, its value and what is accepted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENABLE_MLFLOW_TRACING", "true")
    monkeypatch.setenv(variable, value)
    app = FastAPI()
    app.add_middleware(InferenceTableMiddleware)
    with pytest.raises(RuntimeError, match="refused to start"), running(app):
        pass
    assert all(part in caplog.text for part in (variable, value, accepted))


def test_a_table_that_cannot_be_made_stops_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The message names the table."""
    (tmp_path / "payload").write_text("a file where the table should be")
    with pytest.raises(RuntimeError, match="refused to start"), running(Endpoint(tmp_path).app):
        pass
    assert str(tmp_path / "payload") in caplog.text


def test_requests_that_a_stopping_server_cancels_are_recorded(tmp_path: Path) -> None:
    """A server that has no more patience cancels what still runs; each such request has its row."""
    app, running_now = FastAPI(), []

    @app.post("/stuck")
    async def stuck() -> None:
        with mlflow.start_span("stuck"):
            running_now.append(True)
            try:
                await asyncio.sleep(60)
            finally:
                await asyncio.sleep(0.3)  # an agent that cleans up

    endpoint = Endpoint(tmp_path, app)
    server = running(
        endpoint.app, timeout_graceful_shutdown=1, log_level="critical"
    )  # it logs each at length
    with ThreadPoolExecutor(3) as clients, server as url:
        for _ in range(3):
            clients.submit(httpx.post, f"{url}/stuck", timeout=30)
        wait_for(lambda: len(running_now) == 3, "the requests to run")
    found = rows(endpoint.table)
    assert [row["status_code"] for row in found] == [500] * 3
    for row in found:
        [span] = output_of(row)["trace"]["data"]["spans"]
        assert (span["name"], span["status"]["code"]) == ("stuck", "STATUS_CODE_ERROR")


def test_without_a_lifespan_a_mistake_lets_requests_pass(tmp_path: Path) -> None:
    """No request breaks for an operator's mistake."""
    app = InferenceTableMiddleware(make_app(), enabled=True, durability="stirct")
    with running(app, lifespan="off") as url:
        assert httpx.post(f"{url}/invocations", json={"question": "q"}).json() == {"answer": "You asked: q"}


def test_an_unknown_option_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A misspelt keyword argument does not pass silently."""
    with pytest.raises(RuntimeError, match="refused to start"), running(Endpoint(tmp_path, flush_secs=1).app):
        pass
    assert "flush_secs" in caplog.text and "flush_seconds" in caplog.text


def test_settings_errors_are_value_errors() -> None:
    """Callers who parse settings themselves can catch what they expect."""
    from serving.settings import settings_from

    with pytest.raises(ValueError, match="nope") as caught:
        settings_from({"nope": 1}, {})
    assert isinstance(caught.value, SettingsError)


def test_an_app_mounted_without_a_lifespan_is_recorded(tmp_path: Path) -> None:
    """Sub-apps get no lifespan; the table is made and filled all the same."""
    endpoint = Endpoint(tmp_path)
    outer = FastAPI()
    outer.mount("/agent", endpoint.app)
    with running(outer) as url:
        httpx.post(f"{url}/agent/invocations", json={"question": "q"})
        wait_for(lambda: rows(endpoint.table), "the row")


@pytest.mark.parametrize("ending", ["return", "raise"])
def test_an_app_that_leaves_its_lifespan_early_is_still_recorded(tmp_path: Path, ending: str) -> None:
    """The server goes on serving, and so do we, to the flush at the end."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await bare_app(scope, receive, send)
            return
        await receive()
        await send({"type": "lifespan.startup.complete"})
        if ending == "raise":
            raise RuntimeError("the app's lifespan broke")

    assert len(Endpoint(tmp_path, app).exchange(post("/", content=b"1"), post("/", content=b"2"))) == 2


def test_any_failure_at_start_up_stops_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also one that nobody foresaw: raising would read as 'knows no lifespan', and serve unrecorded."""
    monkeypatch.setenv("MLFLOW_TRACE_SAMPLING_RATIO", "abc")
    import mlflow

    mlflow.tracing.reset()
    with pytest.raises(RuntimeError, match="refused to start"), running(Endpoint(tmp_path).app):
        pass
    assert "abc" in caplog.text


def test_outer_middlewares_see_what_routing_finds(tmp_path: Path) -> None:
    """Route labels of metrics depend on it."""
    seen: list[Any] = []

    async def outer(scope: Any, receive: Any, send: Any) -> None:
        await endpoint.app(scope, receive, send)
        if scope["type"] == "http":
            seen.append(scope["route"].path)

    endpoint = Endpoint(tmp_path)
    with running(outer) as url:
        httpx.post(f"{url}/echo", content=b"{}")
    assert seen == ["/echo"]


def test_a_request_that_is_not_read_to_its_end_says_so(tmp_path: Path) -> None:
    """The row does not take the part that passed for the whole."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    [row] = Endpoint(tmp_path, app).exchange(post("/", content=b"x" * 5_000_000))
    assert row["logging_error_codes"] == ["REQUEST_INCOMPLETE"]
    assert orjson.loads(row["request"])["truncated_bytes"] is None


def test_a_reply_that_breaks_midway_says_so(tmp_path: Path) -> None:
    """Half a JSON body under status 200 is marked as half."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await receive()
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"a":', "more_body": True})
        raise RuntimeError("the agent broke")

    def read(client: httpx.Client) -> None:
        with pytest.raises(httpx.RemoteProtocolError):
            client.post("/")

    [row] = Endpoint(tmp_path, app).exchange(read)
    assert row["logging_error_codes"] == ["RESPONSE_INCOMPLETE"]
    assert orjson.loads(row["response"])["head"] == '{"a":'


def test_exceptions_that_cannot_be_printed_lose_no_row(tmp_path: Path) -> None:
    """The agent's own exception may raise when it is asked for its text."""

    class UnprintableError(Exception):
        def __str__(self) -> str:
            raise ValueError("no text")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        raise UnprintableError

    [row] = Endpoint(tmp_path, app).exchange(post("/"))
    assert row["status_code"] == 500


def test_redact_sees_the_error_of_a_stream(tmp_path: Path) -> None:
    """An exception's text is payload too."""

    def redact(payload: Payload) -> Payload:
        payload.error = payload.error and "[gone]"
        return payload

    def read(client: httpx.Client) -> None:
        with pytest.raises(httpx.RemoteProtocolError):
            client.post("/raise-midway")

    [row] = Endpoint(tmp_path, redact=redact).exchange(read)
    assert output_of(row)["stream"]["error"] == "[gone]"
    assert "broke midway" not in str(row)


def test_an_agents_own_headers_of_ours_are_replaced(tmp_path: Path) -> None:
    """An agent that passes on another endpoint's headers does not confuse its client."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        headers = [(b"X-Databricks-Request-Id", b"upstream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"ok"})

    replies: list[httpx.Response] = []
    [row] = Endpoint(tmp_path, app).exchange(lambda client: replies.append(client.post("/")))
    assert replies[0].headers["x-databricks-request-id"] == row["databricks_request_id"]


def test_memory_is_given_back_when_clients_go_on_uploading(tmp_path: Path) -> None:
    """A reply that is complete before its request is; nothing is reserved for what comes after."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})
        while (await receive()).get("more_body"):
            pass

    endpoint = Endpoint(tmp_path, app)
    endpoint.exchange(*[post("/", content=b"x" * 1_000_000) for _ in range(10)])
    assert endpoint.app._recorder.writer.budget.used == 0


@pytest.mark.parametrize(
    "parts",
    [
        [b'data: {"n": 1}\n\ndata: [DONE]\n\n'],
        [b'data: {"n": 1}\n\nda', b"ta: [DO", b"NE]\n\n"],
        [b'data: {"text": "they say data: [DONE] here"}\n\n', b"data: [DONE]\n\n"],
        [b'data: {"n": 1}\n', b"\ndata:[DONE]\n\n"],
        [b'data: {"n": 1}'],
    ],
)
def test_the_event_with_the_trace_breaks_no_other(tmp_path: Path, parts: list[bytes]) -> None:
    """End markers in parts, in texts, or missing: every event stays whole, ours comes last."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await receive()
        headers = [(b"content-type", b"Text/Event-Stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    replies: list[httpx.Response] = []
    body = {"databricks_options": {"return_trace": True}}
    endpoint = Endpoint(tmp_path, app, allow_return_trace=True)
    endpoint.exchange(lambda client: replies.append(client.post("/", json=body)))
    sent = b"".join(parts)
    events = [line for line in replies[0].text.splitlines() if line]
    ended = events[-1].replace(" ", "") == "data:[DONE]"
    assert ended is (b"\ndata: [DONE]" in sent or b"\ndata:[DONE]" in sent)
    ours = json.loads(events[-1 - ended].removeprefix("data: "))
    assert "databricks_request_id" in ours["databricks_output"]
    others = [event for event in events if "databricks_output" not in event]
    assert others == [line for line in sent.decode().splitlines() if line]


def test_json_lines_are_not_buffered_for_a_trace(tmp_path: Path) -> None:
    """``application/jsonl`` is a stream, whatever its name begins with."""
    endpoint = Endpoint(tmp_path, allow_return_trace=True)
    replies: list[httpx.Response] = []
    body = json.dumps({"databricks_options": {"return_trace": True}}).encode() + b"\n"
    headers = {"x-reply-type": "application/jsonl"}
    endpoint.exchange(lambda client: replies.append(client.post("/echo", content=body, headers=headers)))
    assert replies[0].content == body
