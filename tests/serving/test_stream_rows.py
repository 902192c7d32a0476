"""What the row of a streamed reply says, from a real server to a real client."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import orjson
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from tests import model_server
from tests.serving.recorded import Recorded, recorded
from tests.support import output_of

PAUSE: float = 0.2
PAUSED_MS: int = 150
"""What a pause takes at least, clocks and timers being as coarse as they are."""


async def paused() -> AsyncIterator[str]:
    """Two events, with a pause before each."""
    for number in range(2):
        await asyncio.sleep(PAUSE)
        yield f'data: {{"n": {number}}}\n\n'


async def kept_alive() -> AsyncIterator[str]:
    """The same, with what servers send meanwhile so that no proxy hangs up."""
    yield "retry: 3000\n\n"
    for number in range(2):
        for _ in range(4):
            await asyncio.sleep(PAUSE / 4)
            yield ": ping\r\n\r\n"
        yield f'id: {number}\ndata: {{"n": {number}}}\n\n'


async def json_lines() -> AsyncIterator[str]:
    yield "\n"
    await asyncio.sleep(PAUSE)
    yield '{"n": 0}\n'
    yield '{"n": 1}\n'


async def prompt() -> AsyncIterator[str]:
    """All events in one chunk."""
    yield 'data: {"n": 0}\n\ndata: {"n": 1}\n\n'


async def empty() -> AsyncIterator[str]:
    """A stream that ends before it says anything."""
    yield ": nothing to say\n\n"
    yield "data: [DONE]\n\n"


async def silent() -> AsyncIterator[str]:
    """A stream whose first event does not come."""
    yield ": wait\n\n"
    await asyncio.sleep(60)


async def stalled() -> AsyncIterator[str]:
    """A stream that stops in the middle."""
    yield 'data: {"n": 0}\n\n'
    yield 'data: {"n": 1}\n\n'
    await asyncio.sleep(60)


async def failing_at_once() -> AsyncIterator[str]:
    if STREAMS:
        raise RuntimeError("the agent broke at once")
    yield ""


async def failing_midway() -> AsyncIterator[str]:
    yield 'data: {"n": 0}\n\n'
    await asyncio.sleep(PAUSE)
    raise RuntimeError("the agent broke midway")


async def error_event() -> AsyncIterator[str]:
    yield 'data: {"n": 0}\n\n'
    yield 'event: error\ndata: {"message": "the tool is down"}\n\n'


async def lingering() -> AsyncIterator[str]:
    """Goes on working after the end marker: saves its history, say."""
    yield 'data: {"n": 0}\n\n'
    yield "data: [DONE]\n\n"
    await asyncio.sleep(60)


STREAMS = {
    stream.__name__: stream
    for stream in (
        paused,
        kept_alive,
        json_lines,
        prompt,
        empty,
        silent,
        stalled,
        failing_at_once,
        failing_midway,
        error_event,
        lingering,
    )
}


async def heedless(scope: Any, receive: Any, send: Any) -> None:
    """An ASGI app that never asks whether its client is still there."""
    await receive()
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"data: 0\n\n", "more_body": True})
    await asyncio.sleep(PAUSE)
    await send({"type": "http.response.body", "body": b"data: 1\n\ndata: [DONE]\n\n", "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def measured(scope: Any, receive: Any, send: Any) -> None:
    """The same, of a reply that says how long it is."""
    await receive()
    headers = [(b"content-length", b"4")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"done", "more_body": True})
    await asyncio.sleep(PAUSE)
    await send({"type": "http.response.body", "body": b""})


def make_app() -> FastAPI:
    app = FastAPI()

    @app.post("/stream/{name}")
    async def _stream(name: str) -> StreamingResponse:
        kind = "application/x-ndjson" if name == "json_lines" else "text/event-stream"
        return StreamingResponse(STREAMS[name](), media_type=kind)

    @app.post("/echo")
    async def _echo(request: Request) -> StreamingResponse:
        """The body as a stream, byte by byte."""
        body = await request.body()

        async def parts() -> AsyncIterator[bytes]:
            for at in range(len(body)):
                yield body[at : at + 1]

        return StreamingResponse(parts(), media_type="text/event-stream")

    app.mount("/models", model_server.make_app([]))
    app.mount("/heedless", heedless)
    app.mount("/measured", measured)
    return app


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    with recorded(make_app(), tmp_path_factory.mktemp("streams")) as running:
        yield running


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    with recorded(make_app(), tmp_path_factory.mktemp("strict"), durability="strict") as running:
        yield running


def stream_of(row: dict[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = output_of(row)["stream"]
    return facts


def read_to_the_break(endpoint: Recorded, path: str, **options: Any) -> dict[str, Any]:
    """The row of a reply whose connection breaks."""
    with endpoint.stream(path, **options) as reply, pytest.raises(httpx.RemoteProtocolError):
        reply.read()
    return endpoint.row(reply)


def answer_of(row: dict[str, Any]) -> dict[str, Any]:
    """The response without what we added."""
    response: dict[str, Any] = orjson.loads(row["response"])
    del response["databricks_output"]
    return response


# --- the same shape as without streaming ---

WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
MESSAGES = [{"role": "user", "content": "What is the weather in Oslo?"}]
CHAT = {"model": "m", "messages": MESSAGES}
CHAT_TOOL = {"type": "function", "function": {"name": "weather", "parameters": WEATHER}}
RESPONSES = {"model": "m", "input": "What is the weather in Oslo?"}
RESPONSES_TOOL = {"type": "function", "name": "weather", "parameters": WEATHER}
CLAUDE = {"model": "m", "max_tokens": 9, "messages": MESSAGES}
CLAUDE_TOOL = {"name": "weather", "input_schema": WEATHER}


@pytest.mark.parametrize(
    ("path", "body", "streaming"),
    [
        ("/v1/chat/completions", CHAT, {"stream_options": {"include_usage": True}}),
        ("/v1/chat/completions", CHAT | {"tools": [CHAT_TOOL]}, {"stream_options": {"include_usage": True}}),
        ("/v1/responses", RESPONSES, {}),
        ("/v1/responses", RESPONSES | {"tools": [RESPONSES_TOOL]}, {}),
        ("/v1/messages", CLAUDE, {}),
        ("/v1/messages", CLAUDE | {"tools": [CLAUDE_TOOL]}, {}),
    ],
)
def test_a_stream_is_stored_as_the_reply_without_streaming(
    endpoint: Recorded, path: str, body: dict[str, Any], streaming: dict[str, Any]
) -> None:
    """Chat completions, Responses API events and Anthropic's, of texts and tool calls, with their usage."""
    whole = endpoint.post(f"/models{path}", json=body)
    streamed = endpoint.post(f"/models{path}", json=body | streaming | {"stream": True})
    assert answer_of(whole.row) == whole.reply.json()
    expected = whole.reply.json()
    if "choices" in expected:
        del expected["choices"][0]["message"]["refusal"]  # no chunk says that there is none
    assert answer_of(streamed.row) == expected
    facts = stream_of(streamed.row)
    assert facts["ended"] is True
    assert facts["error"] is None
    assert facts["events"] == streamed.reply.text.count("data: {")
    assert "stream" not in output_of(whole.row)


def test_other_events_are_kept_in_their_order(endpoint: Recorded) -> None:
    """Free-form events are a list of what each said, with the names they have."""
    body = b'event: step\ndata: {"n": 0}\n\ndata: {"n": 1}\n\nevent: step\ndata: done\n\n'
    row = endpoint.post("/echo", content=body).row
    assert answer_of(row)["events"] == [
        {"event": "step", "data": {"n": 0}},
        {"n": 1},
        {"event": "step", "data": "done"},
    ]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_an_error_event_under_status_200(endpoint: Recorded, path: str) -> None:
    """The row says what failed, and keeps what was said before in the shape of an answer."""
    body = {**CHAT, **RESPONSES, "stream": True}
    exchanged = endpoint.post(f"/models/failing{path}", json=body)
    assert exchanged.reply.status_code == exchanged.row["status_code"] == 200
    assert stream_of(exchanged.row)["error"] == "overloaded"
    answer = answer_of(exchanged.row)
    assert answer["error"]["message"] == "overloaded"
    assert answer["object"] in ("chat.completion", "response")
    assert "You" in json.dumps(answer)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_a_stream_that_breaks_off(endpoint: Recorded, path: str) -> None:
    """The app raised: neither ended nor cut off by the client, and the exception is the error."""
    body = {**CHAT, **RESPONSES, "stream": True}
    row = read_to_the_break(endpoint, f"/models/cut{path}", json=body)
    facts = stream_of(row)
    assert (row["status_code"], facts["ended"], facts["cut_off_by_client"]) == (200, False, False)
    assert facts["error"] == "ConnectionError: this stream is to be cut off"
    assert answer_of(row)["object"] in ("chat.completion", "response")


def test_chunks_of_a_byte_each(endpoint: Recorded) -> None:
    """What a chunk holds is not what an event is."""
    row = endpoint.post("/echo", content=b'data: {"n": 0}\n\ndata: {"n": 1}\n\n').row
    assert answer_of(row) == {"events": [{"n": 0}, {"n": 1}]}
    assert stream_of(row)["events"] == 2


# --- when the events came ---


@pytest.mark.parametrize("name", ["paused", "kept_alive"])
def test_the_pauses_between_events(endpoint: Recorded, name: str) -> None:
    """Comments and the like, which servers send so that proxies do not hang up, are no events."""
    row = endpoint.post(f"/stream/{name}").row
    facts = stream_of(row)
    assert answer_of(row) == {"events": [{"n": 0}, {"n": 1}]}
    assert facts["time_to_first_event_ms"] >= PAUSED_MS
    assert facts["largest_gap_ms"] >= PAUSED_MS
    assert facts["time_to_first_event_ms"] + facts["largest_gap_ms"] <= row["execution_duration_ms"]
    assert row["time_to_first_byte_ms"] <= facts["time_to_first_event_ms"]
    if name == "kept_alive":
        assert row["time_to_first_byte_ms"] < facts["time_to_first_event_ms"] - PAUSE * 500
    assert (facts["ended"], facts["cut_off_by_client"], facts["error"]) == (True, False, None)


def test_the_pauses_of_a_strict_stream(strict: Recorded) -> None:
    """A stream whose end is held until its record is on disk says the same of its events."""
    exchanged = strict.post("/stream/paused")
    assert exchanged.reply.headers["x-inference-table-durability"] == "strict"
    facts = stream_of(exchanged.row)
    assert facts["time_to_first_event_ms"] >= PAUSED_MS
    assert facts["largest_gap_ms"] >= PAUSED_MS
    assert (facts["ended"], facts["cut_off_by_client"], facts["error"]) == (True, False, None)


def test_the_pauses_of_json_lines(endpoint: Recorded) -> None:
    """Newline-delimited JSON is a stream as well; its empty lines are no events."""
    facts = stream_of(endpoint.post("/stream/json_lines").row)
    assert facts["events"] == 2
    assert facts["time_to_first_event_ms"] >= PAUSED_MS
    assert facts["largest_gap_ms"] < facts["time_to_first_event_ms"]


def test_events_that_come_at_once(endpoint: Recorded) -> None:
    """There is no gap between events of one chunk."""
    facts = stream_of(endpoint.post("/stream/prompt").row)
    assert (facts["events"], facts["largest_gap_ms"]) == (2, 0)
    assert facts["time_to_first_event_ms"] >= 0


def test_a_stream_without_events(endpoint: Recorded) -> None:
    """No event came, so there is no time of the first, and no gap."""
    facts = stream_of(endpoint.post("/stream/empty").row)
    assert facts == {
        "events": 0,
        "time_to_first_event_ms": None,
        "largest_gap_ms": None,
        "ended": True,
        "cut_off_by_client": False,
        "error": None,
    }


# --- how it ended ---


@pytest.mark.parametrize("name", ["failing_at_once", "failing_midway"])
def test_an_agent_that_fails_in_its_stream(endpoint: Recorded, name: str) -> None:
    """The client saw 200 and a broken connection; the wait for the failure is a gap like any other."""
    row = read_to_the_break(endpoint, f"/stream/{name}")
    facts = stream_of(row)
    assert (row["status_code"], facts["ended"], facts["cut_off_by_client"]) == (200, False, False)
    if name == "failing_at_once":
        assert facts["error"] == "RuntimeError: the agent broke at once"
        assert (facts["events"], facts["time_to_first_event_ms"], facts["largest_gap_ms"]) == (0, None, None)
    else:
        assert facts["error"] == "RuntimeError: the agent broke midway"
        assert facts["largest_gap_ms"] >= PAUSED_MS


def test_an_error_event_of_a_free_form_stream(endpoint: Recorded) -> None:
    """It is an event like the others, and what it says is the stream's error."""
    row = endpoint.post("/stream/error_event").row
    facts = stream_of(row)
    assert (facts["events"], facts["ended"], facts["error"]) == (2, True, "the tool is down")
    assert answer_of(row)["events"][1] == {"event": "error", "data": {"message": "the tool is down"}}


def leave_after(endpoint: Recorded, name: str, line: str, seconds: float) -> dict[str, Any]:
    """The row of a stream that the client leaves so long after a line has come."""
    with endpoint.stream(f"/stream/{name}") as reply:
        lines = reply.iter_lines()  # httpx hangs up once nobody holds them
        while not next(lines).startswith(line):
            pass
        time.sleep(seconds)
    return endpoint.row(reply)


def test_a_client_that_leaves_before_the_first_event(endpoint: Recorded) -> None:
    """It got bytes, but no event."""
    row = leave_after(endpoint, "silent", ": wait", 0)
    facts = stream_of(row)
    assert (row["status_code"], facts["cut_off_by_client"], facts["ended"]) == (499, True, False)
    assert (facts["events"], facts["time_to_first_event_ms"], facts["largest_gap_ms"]) == (0, None, None)
    assert row["time_to_first_byte_ms"] is not None


def test_a_client_that_leaves_a_stream_that_stalls(endpoint: Recorded) -> None:
    """What it waited in vain before it left is the largest gap."""
    row = leave_after(endpoint, "stalled", 'data: {"n": 1}', PAUSE)
    facts = stream_of(row)
    assert (row["status_code"], facts["cut_off_by_client"], facts["ended"]) == (499, True, False)
    assert facts["events"] == 2
    assert facts["largest_gap_ms"] >= PAUSED_MS


def test_a_client_that_leaves_a_complete_reply(endpoint: Recorded) -> None:
    """A reply of known length is complete with its last byte, whatever the agent still does."""
    reply = endpoint.send("/measured/")
    assert reply.text == "done"
    assert endpoint.row(reply)["status_code"] == 200


def test_a_client_that_leaves_after_the_end_marker(endpoint: Recorded) -> None:
    """OpenAI's clients hang up at ``[DONE]``: they got all there was, whatever the agent still does."""
    row = leave_after(endpoint, "lingering", "data: [DONE]", 0)
    facts = stream_of(row)
    assert (row["status_code"], facts["cut_off_by_client"], facts["ended"]) == (200, False, True)


def test_an_end_marker_that_the_client_did_not_wait_for(endpoint: Recorded) -> None:
    """An app that goes on to its end without asking has ended its stream, but not for its client."""
    row = endpoint.leave("/heedless/", after="data: 0")
    facts = stream_of(row)
    assert (row["status_code"], facts["cut_off_by_client"], facts["ended"]) == (499, True, True)
    assert answer_of(row) == {"events": [0, 1]}
