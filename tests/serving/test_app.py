"""Functions and objects as agents: what reaches the client, and the trace in the row."""

import dataclasses
import json
import logging
import math
import threading
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import mlflow
import numpy as np
import pandas as pd
import pytest
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.routing import Mount

from inference_table.errors import SettingsError
from serving.app import as_app, load_app
from tests.serving import function_agents as agents
from tests.serving.apps import bare_app, make_app
from tests.serving.recorded import Exchanged, Recorded, outline, recorded, span_named, trace_of, traces_of
from tests.support import output_of, rows, running, wait_for

QUESTION = {"question": "why not"}
MODULE = "tests.serving.function_agents"


class Reply(BaseModel):
    text: str
    score: float | None = None


@dataclasses.dataclass
class Finding:
    text: str
    reply: Reply


class Colour(Enum):
    RED = "red"


RESULTS: dict[str, tuple[Any, Any]] = {
    "dict": ({"a": [1, None, True]}, {"a": [1, None, True]}),
    "text": ("héllo", "héllo"),
    "nothing": (None, None),
    "pydantic": (Reply(text="a"), {"text": "a", "score": None}),
    "dataclass": (Finding("a", Reply(text="b")), {"text": "a", "reply": {"text": "b", "score": None}}),
    "mixed": (
        {"r": [Reply(text="a")], "c": Colour.RED, "s": (1, 2)},
        {"r": [{"text": "a", "score": None}], "c": "red", "s": [1, 2]},
    ),
    "numpy": ({"v": np.arange(3), "n": np.float64(0.5)}, {"v": [0, 1, 2], "n": 0.5}),
    "pandas": (pd.DataFrame({"a": [1, 2]}), [{"a": 1}, {"a": 2}]),
    "not a number": ([math.nan, 1.5], [None, 1.5]),
    "large": (2**100, 2**100),
    "half an emoji": ({"text": "\ud83d"}, {"text": "\ud83d"}),
    "keys": ({1: "one"}, {"1": "one"}),
    "bytes": ({"b": b"\xff"}, {"b": "_w=="}),
}
"""What agents return, and what their clients get."""

OTHERS: dict[str, Any] = {
    "typed": agents.typed,
    "dataclass": agents.typed_by_dataclass,
    "traced-and-typed": agents.traced_and_typed,
    "typed-callable": agents.Typed(),
    "for-type-checkers": agents.for_type_checkers,
    "own-response": agents.own_response,
    "own-stream": agents.own_stream,
    "broken-stream": agents.broken_stream,
    "no-json": agents.returning(lambda: {"lock": threading.Lock()}),
    "failing": agents.failing,
    "async-failing": agents.async_failing,
    "refusing": agents.refusing,
    "exhausted": agents.exhausted,
    "failing-upstream": agents.failing_upstream,
    "failing-at-0": agents.failing_at(0),
    "async-failing-at-0": agents.async_failing_at(0),
    "failing-at-2": agents.failing_at(2),
    "async-failing-at-2": agents.async_failing_at(2),
    "no-json-in-stream": agents.returning(lambda: iter([1, threading.Lock(), 3])),
    "unclosable": lambda request: agents.Unclosable(request),
    "empty": agents.returning(lambda: iter([])),
    "agent": agents.Agent(),
    "whole-agent": agents.WholeAgent(),
}


def slug(name: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in name)


AGENTS: dict[str, Any] = {
    **{f"whole-{slug(name)}": agent for name, (agent, _) in agents.WHOLE.items()},
    **{f"stream-{slug(name)}": agent for name, (agent, _) in agents.STREAMS.items()},
    **{f"result-{slug(name)}": agents.returning(value) for name, (value, _) in RESULTS.items()},
    **OTHERS,
}


def everything() -> Starlette:
    """All agents, each an app that is mounted at its name."""
    return Starlette(routes=[Mount(f"/{name}", as_app(agent)) for name, agent in AGENTS.items()])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    with recorded(everything(), tmp_path_factory.mktemp("relaxed"), trace_grace_seconds=30) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    """A server that records a reply before its last bytes leave, and returns traces."""
    folder = tmp_path_factory.mktemp("strict")
    with recorded(everything(), folder, durability="strict", allow_return_trace=True) as endpoint:
        yield endpoint


def ask(server: Recorded, agent: str, body: Any = QUESTION) -> Exchanged:
    return server.post(f"/{slug(agent)}/invocations", json=body)


@pytest.fixture(scope="module")
def answered(server: Recorded) -> dict[str, Exchanged]:
    """The same question to many agents; their rows are waited for together."""
    agents_asked = [name for name in AGENTS if name.startswith(("whole-", "stream-", "result-"))]
    replies = [
        httpx.post(f"{server.url}/{name}/invocations", json=QUESTION, timeout=60) for name in agents_asked
    ]
    return dict(zip(agents_asked, with_rows(server, replies), strict=True))


def with_rows(server: Recorded, replies: list[httpx.Response]) -> list[Exchanged]:
    """Replies with their rows, once these are all in the table."""
    ids = [reply.headers["x-databricks-request-id"] for reply in replies]

    def found() -> dict[str, dict[str, Any]]:
        by_id = {row["databricks_request_id"]: row for row in rows(server.table)}
        return by_id if by_id.keys() >= set(ids) else {}

    by_id = wait_for(found, "the rows")
    return [Exchanged(reply, by_id[one]) for reply, one in zip(replies, ids, strict=True)]


def data_of(text: str) -> list[Any]:
    """The values of server-sent events; the end marker as text."""
    assert text.endswith("\n\n")
    events = [event.removeprefix("data: ") for event in text.split("\n\n")[:-1]]
    return [event if event == "[DONE]" else json.loads(event) for event in events]


def state_of(trace: mlflow.entities.Trace) -> dict[str, str]:
    return {span.name: span.status.status_code.value for span in trace.data.spans}


# --- whole answers ---


@pytest.mark.parametrize("name", agents.WHOLE)
def test_a_function_answers_and_has_one_trace(answered: dict[str, Exchanged], name: str) -> None:
    """Whatever kind of callable it is, sync or async: its reply is JSON, its spans nest under one root."""
    expected = agents.WHOLE[name][1]
    exchanged = answered[slug(f"whole-{name}")]
    reply, row = exchanged.reply, exchanged.row
    assert (reply.status_code, reply.headers["content-type"]) == (200, "application/json")
    assert reply.json()["found"] == ["about why not"]
    trace = trace_of(row)
    assert (outline(trace), row["trace_state"]) == (expected, "OK")
    root = trace.data.spans[0]
    assert root.outputs == reply.json()
    if root.name == "mine":  # by @mlflow.trace
        assert root.inputs["request"] == QUESTION
    else:
        assert (root.inputs, root.span_type) == (QUESTION, "AGENT")


@pytest.mark.parametrize("name", RESULTS)
def test_what_is_returned_becomes_json(answered: dict[str, Exchanged], name: str) -> None:
    """Models, dataclasses, arrays and data frames, in whatever they are nested."""
    exchanged = answered[slug(f"result-{name}")]
    assert exchanged.reply.status_code == 200
    assert json.loads(exchanged.reply.content) == RESULTS[name][1]
    assert outline(trace_of(exchanged.row)) == "agent(search)"


def test_many_requests_at_once_keep_their_spans_apart(server: Recorded) -> None:
    """Sync functions run side by side in threads, more of them than there are cores."""

    def ask(number: int) -> httpx.Response:
        question = {"question": str(number)}
        return httpx.post(f"{server.url}/whole-sync/invocations", json=question, timeout=60)

    with ThreadPoolExecutor(20) as pool:
        replies = list(pool.map(ask, range(60)))
    for number, exchanged in enumerate(with_rows(server, replies)):
        assert exchanged.reply.json() == {"found": [f"about {number}"]}
        trace = trace_of(exchanged.row)
        assert outline(trace) == "predict(search)"
        assert span_named(trace, "search").inputs == {"question": str(number)}


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_an_exception_is_an_answer(server: Recorded, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """500 in MLflow's form for the client, the traceback in the log, the failure in the trace."""
    agent = "failing" if kind == "sync" else "async_failing"
    with caplog.at_level(logging.ERROR, "tracelake"):
        exchanged = ask(server, agent)
    assert exchanged.reply.status_code == exchanged.row["status_code"] == 500
    description = {"error_code": "INTERNAL_ERROR", "message": "KeyError: 'why not'"}
    assert exchanged.reply.json() == description
    assert json.loads(exchanged.row["response"]).items() >= description.items()
    trace = trace_of(exchanged.row)
    assert [span.name for span in trace.data.spans] == [agent, agent.replace("failing", "search")]
    assert exchanged.row["trace_state"] == "ERROR"
    [event] = trace.data.spans[0].events
    assert event.attributes["exception.message"] == "'why not'"
    [record] = [record for record in caplog.records if record.name == "tracelake"]
    assert record.message == f"{agent} failed"
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], KeyError)


def test_exceptions_that_know_their_status_keep_it(
    server: Recorded, caplog: pytest.LogCaptureFixture
) -> None:
    """Starlette's and FastAPI's HTTPException, and MLflow's, whose own body it is; no failure to log."""
    with caplog.at_level(logging.ERROR, "tracelake"):
        refused, exhausted = ask(server, "refusing"), ask(server, "exhausted")
    assert (refused.reply.status_code, refused.reply.headers["x-mine"]) == (404, "1")
    assert refused.reply.json() == {"error_code": "NOT_FOUND", "message": "no such document"}
    assert exhausted.reply.status_code == exhausted.row["status_code"] == 429
    assert exhausted.reply.json()["error_code"] == "RESOURCE_EXHAUSTED"
    assert exhausted.reply.json()["message"] == "come back later"
    assert exhausted.row["trace_state"] == "ERROR"
    assert [record for record in caplog.records if record.name == "tracelake"] == []


def test_what_another_endpoint_answered_is_not_passed_on(server: Recorded) -> None:
    """Exceptions of HTTP clients have headers too: those were for the agent."""
    reply = ask(server, "failing-upstream").reply
    assert reply.status_code == 500
    assert "set-cookie" not in reply.headers


def test_what_is_no_json_is_an_error_that_says_so(server: Recorded) -> None:
    """The agent's mistake, so 500, and a failed trace."""
    exchanged = ask(server, "no-json")
    assert exchanged.reply.status_code == 500
    assert "a lock is no JSON" in exchanged.reply.json()["message"]
    assert exchanged.row["trace_state"] == "ERROR"


# --- requests ---


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "is no JSON: Expecting value"),
        (b"{", "is no JSON"),
        (b'{"a": "\xff"}', "is no JSON: 'utf-8' codec can't decode"),
        (b"[" * 100_000, "is no JSON: maximum recursion depth"),
        (b"[1]", "is a JSON array; send an object"),
        (b'"text"', "is a JSON string; send an object"),
        (b"1", "is a JSON number"),
        (b"true", "is a JSON boolean"),
        (b"null", "is a JSON null"),
    ],
    ids=["empty", "cut off", "not UTF-8", "deep", "array", "string", "number", "boolean", "null"],
)
def test_a_body_that_is_no_object_is_refused(server: Recorded, body: bytes, message: str) -> None:
    """400 in MLflow's form, which says why; the agent isn't called."""
    exchanged = server.post("/whole-sync/invocations", content=body)
    assert exchanged.reply.status_code == exchanged.row["status_code"] == 400
    assert exchanged.reply.json()["error_code"] == "BAD_REQUEST"
    assert message in exchanged.reply.json()["message"]
    assert traces_of(exchanged.row) == []


@pytest.mark.parametrize("agent", ["typed", "traced-and-typed", "typed-callable", "whole-agent"])
def test_a_request_is_made_into_the_model_that_the_function_takes(server: Recorded, agent: str) -> None:
    """Annotations that are text are understood, too, under ``@mlflow.trace`` and on methods."""
    body = {"messages": [{"role": "user", "content": "hi"}]}
    exchanged = ask(server, agent, body)
    assert exchanged.reply.json() == "ChatRequest: hi at 1.0"
    assert len(trace_of(exchanged.row).data.spans) == 1


def test_a_request_is_made_into_a_dataclass(server: Recorded) -> None:
    assert ask(server, "dataclass", {"text": "hi"}).reply.json() == "Question: hi, top 1"
    refused = ask(server, "dataclass", {"top": 1}).reply
    assert (refused.status_code, refused.json()["message"]) == (
        400,
        "the request is no Question: text: Field required",
    )


def test_a_request_that_is_not_of_the_type_is_refused(server: Recorded) -> None:
    """400 names each field that is wrong, and what is wrong with it."""
    exchanged = ask(server, "typed", {"messages": [{"role": "user"}], "temperature": -1})
    assert exchanged.reply.status_code == 400
    assert exchanged.reply.json() == {
        "error_code": "BAD_REQUEST",
        "message": "the request is no ChatRequest: messages.0.content: Field required; "
        "temperature: Input should be greater than or equal to 0",
    }
    assert traces_of(exchanged.row) == []


def test_annotations_that_nobody_can_resolve_are_no_obstacle(server: Recorded) -> None:
    """Names that are imported for type checkers only."""
    assert ask(server, "for-type-checkers").reply.json() == QUESTION


def test_the_other_paths_of_mlflows_scoring_server(server: Recorded) -> None:
    """/ping and /health for probes, /version; /invocations takes POST only."""
    with httpx.Client(base_url=f"{server.url}/whole-sync") as client:
        assert (client.get("/ping").status_code, client.head("/health").status_code) == (200, 200)
        assert client.get("/version").text == mlflow.__version__
        assert client.get("/invocations").status_code == 405
        assert client.post("/nowhere").status_code == 404


# --- streams ---


@pytest.mark.parametrize("name", agents.STREAMS)
def test_what_yields_is_streamed(answered: dict[str, Exchanged], name: str) -> None:
    """Each item is an event, spans and variables live on from item to item, in one trace."""
    expected = agents.STREAMS[name][1]
    exchanged = answered[slug(f"stream-{name}")]
    reply, row = exchanged.reply, exchanged.row
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    items = [{"word": "why", "variable": "set"}, {"word": "not", "variable": "set"}]
    assert data_of(reply.text) == [*items, "[DONE]"]
    assert json.loads(row["response"])["events"] == items
    assert output_of(row)["stream"]["ended"] is True
    trace = trace_of(row)
    assert (outline(trace), row["trace_state"]) == (expected, "OK")
    assert trace.data.spans[0].outputs == items


def test_an_iterator_without_close_and_one_without_items(server: Recorded) -> None:
    """Both end as any stream does."""
    assert data_of(ask(server, "unclosable", {"n": 2}).reply.text) == [1, 0, "[DONE]"]
    empty = ask(server, "empty")
    assert data_of(empty.reply.text) == ["[DONE]"]
    assert trace_of(empty.row).data.spans[0].outputs == []


@pytest.mark.parametrize("kind", ["", "async-"])
def test_a_failure_before_the_first_item_is_an_error(server: Recorded, kind: str) -> None:
    """The status can still say so: no 200 for a stream that never began."""
    exchanged = ask(server, f"{kind}failing-at-0")
    assert exchanged.reply.status_code == exchanged.row["status_code"] == 500
    assert exchanged.reply.json() == {"error_code": "INTERNAL_ERROR", "message": "ValueError: out of numbers"}
    assert exchanged.row["trace_state"] == "ERROR"


@pytest.mark.parametrize("kind", ["", "async-"])
def test_a_failure_in_the_middle_is_the_last_event(
    server: Recorded, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The client is told, and gets no end marker; the trace has what was sent, and the failure."""
    with caplog.at_level(logging.ERROR, "tracelake"):
        exchanged = ask(server, f"{kind}failing-at-2")
    error = {"error_code": "INTERNAL_ERROR", "message": "ValueError: out of numbers"}
    assert data_of(exchanged.reply.text) == [0, 1, {"error": error}]
    assert output_of(exchanged.row)["stream"]["error"] == "ValueError: out of numbers"
    root = trace_of(exchanged.row).data.spans[0]
    assert (root.status.status_code.value, root.outputs) == ("ERROR", [0, 1])
    assert [record.message for record in caplog.records if record.name == "tracelake"] == ["agent failed"]


def test_an_item_that_is_no_json_ends_the_stream_with_an_error(server: Recorded) -> None:
    """As any other failure of the agent's."""
    exchanged = ask(server, "no-json-in-stream")
    one, error = data_of(exchanged.reply.text)
    assert one == 1
    assert "a lock is no JSON" in error["error"]["message"]
    assert exchanged.row["trace_state"] == "ERROR"


@pytest.mark.parametrize("kind", ["sync", "asynchronous"])
def test_a_client_that_leaves_ends_the_agent(tmp_path: Path, kind: str) -> None:
    """The generator is closed where it stands, its spans end, and the row says who broke off."""
    endless = agents.Endless()
    with recorded(as_app(getattr(endless, kind)), tmp_path, trace_grace_seconds=30) as server:
        row = server.leave("/invocations", after="1", json={})
    assert endless.closed.is_set()
    assert row["status_code"] == 499
    trace = trace_of(row)
    assert outline(trace) == f"{kind}(inside)"
    root, inside = trace.data.spans
    assert (root.status.status_code.value, root.outputs[0]) == ("ERROR", 1)
    assert "client left" in root.status.description
    assert inside.end_time_ns is not None
    assert output_of(row)["stream"]["cut_off_by_client"] is True


def test_streams_of_vendors_clients_are_closed(tmp_path: Path) -> None:
    """OpenAI's have a coroutine ``close`` and no ``aclose``."""
    endless = agents.Endless()
    with recorded(as_app(endless.vendor), tmp_path) as server:
        row = server.leave("/invocations", after="1", json={})
    assert endless.closed.is_set()
    assert row["status_code"] == 499


def test_a_busy_generator_stops_nobody_else(tmp_path: Path) -> None:
    """A sync generator that waits holds a thread, not the event loop."""
    gate = agents.Gate()
    with recorded(as_app(gate.sync), tmp_path) as server, ThreadPoolExecutor() as pool:
        busy = [pool.submit(server.post, "/invocations", json={}) for _ in range(3)]
        assert httpx.get(f"{server.url}/ping").status_code == 200
        assert not any(one.done() for one in busy)
        gate.opened.set()
        assert [data_of(one.result().reply.text) for one in busy] == [[1, 2, "[DONE]"]] * 3


# --- an app's own responses ---


def test_a_response_of_the_agents_own_is_sent_as_it_is(server: Recorded) -> None:
    """Status, headers and body; the trace has the spans of the call, and of what streams after it."""
    exchanged = ask(server, "own-response")
    reply = exchanged.reply
    assert (reply.status_code, reply.headers["x-mine"], reply.json()) == (202, "1", {"busy": True})
    assert outline(trace_of(exchanged.row)) == "own_response(search)"
    streamed = ask(server, "own-stream")
    assert (streamed.reply.text, streamed.reply.headers["content-type"]) == (
        "one\ntwo\n",
        "text/plain; charset=utf-8",
    )
    assert outline(trace_of(streamed.row)) == "own_stream(lines)"


def test_a_response_of_the_agents_own_may_break_off(server: Recorded) -> None:
    """Its body is not ours to complete: the client sees that it is cut, the trace why."""
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.post(f"{server.url}/broken-stream/invocations", json=QUESTION, timeout=30)
    row = server.find("request_metadata['path'] = '/broken-stream/invocations'")
    assert state_of(trace_of(row)) == {"broken_stream": "ERROR"}
    assert "the line is cut" in str(trace_of(row).data.spans[0].events[0].attributes)


def test_background_tasks_run_after_the_reply(tmp_path: Path) -> None:
    agent = agents.WithBackground()
    with recorded(as_app(agent), tmp_path) as server:
        assert server.post("/invocations", json={}).reply.json() == {}
        assert agent.ran.wait(30)


# --- with the middleware's options ---


@pytest.mark.parametrize(
    ("agent", "expected"),
    [
        ("whole-sync", "predict(search)"),
        ("stream-generator", "words(writing(search search))"),
        ("stream-async-generator", "async_words(writing(async_search async_search))"),
        ("own-response", "own_response(search)"),
        ("own-stream", "own_stream(lines)"),
    ],
)
def test_a_durable_reply_has_its_whole_trace(strict: Recorded, agent: str, expected: str) -> None:
    """It is recorded before its last bytes leave: by then the root has ended."""
    row = ask(strict, agent).row
    trace = trace_of(row)
    assert (outline(trace), row["trace_state"]) == (expected, "OK")
    assert all(span.end_time_ns is not None for span in trace.data.spans)


@pytest.mark.parametrize("agent", ["failing", "failing-at-2", "failing-at-0"])
def test_a_durable_failure_has_its_whole_trace(strict: Recorded, agent: str) -> None:
    assert ask(strict, agent).row["trace_state"] == "ERROR"


@pytest.mark.parametrize("agent", ["whole-sync", "stream-generator"])
def test_a_returned_trace_is_whole(strict: Recorded, agent: str) -> None:
    """A stream's is in an event of its own, before the end marker."""
    body = {**QUESTION, "databricks_options": {"return_trace": True}}
    reply = ask(strict, agent, body).reply
    is_stream = "event-stream" in reply.headers["content-type"]
    output = (data_of(reply.text)[-2] if is_stream else reply.json())["databricks_output"]
    trace = mlflow.entities.Trace.from_dict(output["trace"])
    assert trace.info.state == "OK"
    assert outline(trace).startswith(("predict(search", "words(writing"))


def test_without_capture_no_span_is_made(tmp_path: Path) -> None:
    """An agent that nobody records answers as ever, whether its requests are sampled out or not captured."""
    with running(as_app(agents.predict)) as url:
        assert httpx.post(f"{url}/invocations", json=QUESTION).json() == {"found": ["about why not"]}
    with recorded(as_app(agents.words), tmp_path, sampling_fraction=0.0) as server:
        reply = httpx.post(f"{server.url}/invocations", json=QUESTION)
        assert len(data_of(reply.text)) == 3
        assert "x-databricks-request-id" not in reply.headers


# --- objects ---


def test_an_object_streams_where_the_request_says_so(server: Recorded) -> None:
    """``predict`` for most requests, ``predict_stream`` for those with ``"stream": true``."""
    whole, streamed = ask(server, "agent"), ask(server, "agent", {**QUESTION, "stream": True})
    assert whole.reply.json() == {"found": ["about why not"]}
    assert outline(trace_of(whole.row)) == "predict(search)"
    assert [item["word"] for item in data_of(streamed.reply.text)[:-1]] == ["why", "not"]
    assert outline(trace_of(streamed.row)) == "predict_stream(writing(search search))"
    assert ask(server, "agent", {**QUESTION, "stream": "yes"}).reply.json() == whole.reply.json()


def test_an_object_without_streams_answers_whole(server: Recorded) -> None:
    """As MLflow's scoring server does, whatever the request asks for."""
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
    assert ask(server, "whole-agent", body).reply.json() == "ChatRequest: hi at 1.0"


# --- what is no agent ---


@pytest.mark.parametrize(
    ("agent", "message"),
    [
        (agents.Agent, "Agent is a class; make an instance of it"),
        (Starlette, "Starlette is a class"),
        (agents.make_app, r"make_app\(\) takes no argument.*call it in its module \(app = make_app\(\)\)"),
        (lambda: None, r"<lambda>\(\) takes no argument"),
        (agents.two, r"two\(first: .*\) can't be called with the request alone; give second a default"),
        (agents.with_options, r"give index a default, or a value with functools.partial"),
        (agents.by_name, r"by_name\(\*, request: .*\) has no positional parameter"),
        (agents.wsgi, "is a WSGI app"),
        (agents.route, r"takes a Starlette Request.*make it a route: .*Route\('/invocations', route"),
        (agents.Chain(), "a Chain is neither an ASGI app nor a function.*a function that calls its invoke"),
        ([], "a list is neither an ASGI app nor a function, and has no predict$"),
        (types, "a module is neither"),
        (None, "a NoneType is neither"),
    ],
)
def test_what_is_no_agent_is_refused_with_what_to_do(agent: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        as_app(agent)


@pytest.mark.parametrize(
    "app",
    [bare_app, make_app(), Starlette(), partial(bare_app)],
    ids=["function", "FastAPI", "Starlette", "partial"],
)
def test_an_asgi_app_stays_as_it_is(app: Any) -> None:
    assert as_app(app) is app


class Wrapper:
    """What wraps an app often says nothing about its arguments."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, *args: Any) -> None:
        await self.app(*args)


def test_an_app_in_a_wrapper_stays_as_it_is() -> None:
    wrapper = Wrapper(bare_app)
    assert as_app(wrapper) is wrapper


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (f"{MODULE}:Agent", "cannot serve 'tests.serving.function_agents:Agent': Agent is a class"),
        (f"{MODULE}:nothing", "has no attribute 'nothing'"),
        (f"{MODULE}:Body.nothing", "has no attribute 'Body.nothing'"),
        ("tests.serving.nowhere:agent", "there is no module 'tests.serving.nowhere'"),
        ("nowhere.at.all:agent", "there is no module 'nowhere.at.all'"),
        (MODULE, "no import string and no folder with an MLflow model"),
        ("./no/such/model", "no import string and no folder with an MLflow model"),
        ("", "no import string"),
        (":agent", "no import string"),
    ],
)
def test_a_target_that_is_not_there_is_refused(target: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_app(target)


def test_a_target_may_be_an_attribute_of_an_attribute() -> None:
    """``module:object.method``."""
    assert isinstance(load_app(f"{MODULE}:Agent.predict.__call__"), Starlette)
