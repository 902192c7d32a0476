"""Agents as users write them: whatever they do between threads, tasks, streams and endpoints, their spans are
in the row of their request."""

import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import mlflow
import pytest
from fastapi import FastAPI
from mlflow.entities import Trace

from inference_table import metrics
from serving import InferenceTableMiddleware
from tests.older_mlflow import RAISES_INTO_GENERATORS
from tests.serving.fluent_agents import ASYNC_HALVES, GATES, HALVES, THREADING, Body, make_app, tool
from tests.serving.recorded import Recorded, outline, recorded, span_named, trace_of, traces_of
from tests.support import output_of, rows, served, wait_for


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    """A server whose rows wait for all their spans."""
    with recorded(make_app(), tmp_path_factory.mktemp("patient"), trace_grace_seconds=30) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    """A server whose rows do not wait long for open spans."""
    folder = tmp_path_factory.mktemp("hasty")
    with recorded(make_app(), folder, trace_grace_seconds=0.3, allow_return_trace=True) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def trusting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    """A server that believes the ``traceparent`` of its clients."""
    with recorded(make_app(), tmp_path_factory.mktemp("trusting"), trust_traceparent=True) as endpoint:
        yield endpoint


def counted(counter: Any) -> float:
    value: float = counter._value.get()
    return value


def states(trace: Trace) -> list[tuple[str, str]]:
    return [(span.name, span.status.status_code.value) for span in trace.data.spans]


def numbers_in(trace: Trace) -> set[Any]:
    return {span.inputs["n"] for span in trace.data.spans}


# --- tasks and threads ---


def test_twenty_requests_that_fan_out(patient: Recorded) -> None:
    """Gathered tasks, worker threads, and client-API spans ended elsewhere: each request has its own tree."""
    orphans = counted(metrics.ORPHAN_TRACES)

    recorded = patient.post_all([("/fan-out", {"n": n}) for n in range(20)])
    for n, trace in enumerate(map(trace_of, recorded)):
        assert outline(trace) == f"fan_out(by client {' '.join(['step(tool)'] * 5)} tool)"
        assert {(span.inputs["n"], span.outputs) for span in trace.data.spans} == {(n, n)}
        assert {code for _, code in states(trace)} == {"OK"}
        assert trace.info.tags["n"] == str(n)
    assert counted(metrics.ORPHAN_TRACES) == orphans


@pytest.mark.parametrize("how", sorted(THREADING))
def test_a_span_on_another_thread_has_the_one_that_was_active_there(patient: Recorded, how: str) -> None:
    """Where a thread is started or a work item submitted, raw or not, is where its spans belong."""
    trace = trace_of(patient.post(f"/threads/{how}", json={"n": 7}).row)
    assert outline(trace) == "threading_agent(after outer(tool))"
    assert numbers_in(trace) == {7}


def test_executors_of_the_event_loop(patient: Recorded) -> None:
    """``run_in_executor``, which unlike ``to_thread`` copies no context, keeps the active span as well."""
    trace = trace_of(patient.post("/executor", json={"n": 7}).row)
    assert outline(trace) == "executor_agent(outer(tool tool tool tool))"


def test_a_shared_pool_serves_each_request_in_its_own_trace(patient: Recorded) -> None:
    """Two workers, and twenty requests at once with four items each: no item goes to another request."""

    paths = ("/threads/in_pool", "/executor")
    recorded = patient.post_all([(paths[n % 2], {"n": n}) for n in range(20)])
    for n, trace in enumerate(map(trace_of, recorded)):
        assert numbers_in(trace) == {n}
        assert outline(trace).count("tool") == (4 if n % 2 else 1)


def test_a_context_that_the_agent_copied_itself_counts(patient: Recorded) -> None:
    """``submit(context.run, ...)``: what was active where the context was copied is the parent."""
    trace = trace_of(patient.post("/context", json={"n": 1}).row)
    assert outline(trace) == "context_agent(first(second tool))"


def test_a_consumer_thread_that_a_request_started(patient: Recorded) -> None:
    """A thread that works for all requests puts nothing into the trace of a request that did not start it."""
    first = patient.post("/queue", json={"n": 1})
    later = [patient.post("/queue", json={"n": n}) for n in (2, 3)]
    assert first.reply.json() == 1
    assert outline(trace_of(first.row)) in ("queue_agent(tool)", "queue_agent")
    assert [outline(trace_of(exchanged.row)) for exchanged in later] == ["queue_agent", "queue_agent"]


def test_one_of_many_fails(patient: Recorded) -> None:
    """Siblings that outlive the failure of a gathered task are complete in the trace, which is OK."""
    trace = trace_of(patient.post("/gather-with-failure", json={"n": 1}).row)
    assert outline(trace) == "gather_with_failure(failing surviving)"
    assert states(trace) == [("gather_with_failure", "OK"), ("surviving", "OK"), ("failing", "ERROR")]
    assert span_named(trace, "surviving").outputs == 1


def test_a_task_group_that_cancels(patient: Recorded) -> None:
    """A cancelled task's span is an ERROR that says so; the agent that handles it is OK."""
    trace = trace_of(patient.post("/group-with-failure", json={"n": 1}).row)
    assert dict(states(trace)) == {"group_with_failure": "OK", "failing": "ERROR", "cancelled": "ERROR"}
    [event] = span_named(trace, "cancelled").events
    assert (event.name, event.attributes["exception.type"]) == ("exception", "CancelledError")


# --- after the response ---

BACKGROUND = ("sync", "async", "task", "thread")


@pytest.mark.parametrize("how", BACKGROUND)
def test_work_that_ends_within_the_grace_period_is_in_the_trace(patient: Recorded, how: str) -> None:
    """Background tasks, tasks and threads that go on after the response are waited for."""
    gate = str(uuid.uuid4())
    body = {"gate": gate}
    reply = patient.send(f"/background/{how}", json=body)
    assert reply.json() == {"answer": 0}
    request_id = reply.headers["x-databricks-request-id"]
    assert rows(patient.table, f"databricks_request_id = '{request_id}'") == []
    GATES[gate].set()
    traces = traces_of(patient.row(reply))
    assert [outline(trace) for trace in traces] == ["answer", "job(late tool)"]
    assert [trace.info.state for trace in traces] == ["OK", "OK"]


@pytest.mark.parametrize("how", BACKGROUND)
def test_work_that_outlasts_the_grace_period_is_counted(hasty: Recorded, how: str) -> None:
    """The row has what was there by then, in progress; later spans are counted and harm nothing."""
    gate = str(uuid.uuid4())
    row = hasty.post(f"/background/{how}", json={"gate": gate}).row
    answer, job = traces_of(row)
    assert (outline(answer), answer.info.state) == ("answer", "OK")
    assert (outline(job), job.info.state) == ("job(tool)", "IN_PROGRESS")
    assert span_named(job, "job").end_time_ns is None
    before = counted(metrics.LATE_SPANS)
    GATES[gate].set()
    wait_for(lambda: counted(metrics.LATE_SPANS) >= before + 2, "the late spans")
    assert rows(hasty.table, f"databricks_request_id = '{row['databricks_request_id']}'") == [
        {**row, "request_metadata": list(row["request_metadata"].items())}
    ]


# --- generators ---


@pytest.mark.parametrize("how", ["traced_stream", "async_traced_stream", "async_stepwise"])
def test_streams_that_are_read_to_their_end(patient: Recorded, how: str) -> None:
    """A stream is one trace; what happens in it is under its span, whatever thread pulls the next chunk."""
    exchanged = patient.post(f"/stream/{how}", json={"n": 5})
    trace = trace_of(exchanged.row)
    inner = " ".join(["step(tool)" if how == "async_traced_stream" else "tool"] * 3)
    assert outline(trace) == f"root({inner})"
    assert trace.info.state == "OK"
    assert numbers_in(trace) == {5}
    if how != "async_stepwise":
        assert "".join(trace.data.spans[0].outputs) == exchanged.reply.text


@RAISES_INTO_GENERATORS
def test_a_span_around_the_yields_of_a_synchronous_generator(patient: Recorded) -> None:
    """Each chunk is pulled in a context of its own, so MLflow loses sight of the span; no span is lost."""
    traces = traces_of(patient.post("/stream/stepwise", json={"n": 5}).row)
    assert sum(len(trace.data.spans) for trace in traces) == 4
    assert {span.name: span.end_time_ns is None for trace in traces for span in trace.data.spans} == {
        "root": False,
        "tool": False,
    }


@pytest.mark.parametrize("how", [name for name in (*HALVES, *ASYNC_HALVES) if "never" not in name])
def test_a_stream_that_the_agent_leaves_early(hasty: Recorded, how: str) -> None:
    """Closed or forgotten: what came is recorded, and what follows is not under it; the trace is OK."""
    row = hasty.post(f"/picky/{how}", json={"n": 3}).row
    trace = trace_of(row)
    stream = "async_numbers" if how.startswith("async") else "numbers"
    assert outline(trace) == f"picky({stream}(tool) tool)"
    assert (trace.info.state, row["status_code"]) == ("OK", 200)
    left = span_named(trace, stream)
    assert (left.inputs, left.outputs) == ({"n": 3}, [0])


@pytest.mark.parametrize("how", [name for name in (*HALVES, *ASYNC_HALVES) if "never" in name])
def test_a_stream_that_is_never_consumed(patient: Recorded, how: str) -> None:
    """A traced generator's span starts with its first chunk: none asked for, none recorded or waited for."""
    trace = trace_of(patient.post(f"/picky/{how}", json={"n": 3}).row)
    assert outline(trace) == "picky(tool)"
    assert trace.info.state == "OK"


def test_a_started_span_whose_stream_is_never_consumed(hasty: Recorded) -> None:
    """The span is there with its inputs and no end; the trace, whose root ended, is OK."""
    trace = trace_of(hasty.post("/instrumented", json={"n": 3}).row)
    assert outline(trace) == "instrumented(llm)"
    assert trace.info.state == "OK"
    llm = span_named(trace, "llm")
    assert (llm.inputs, llm.outputs, llm.end_time_ns) == ({"n": 3}, None, None)


def test_a_client_that_leaves_a_stream(hasty: Recorded) -> None:
    """The row has the chunks up to then as the outputs of both generators, whose spans never end."""
    row = hasty.leave("/stream/endless", after="data: 2", json={"n": 4})
    trace = trace_of(row)
    assert (row["status_code"], trace.info.state) == (499, "IN_PROGRESS")
    assert outline(trace) == "root(counting)"
    root, counting = trace.data.spans
    assert root.outputs[:3] == ["data: 0\n\n", "data: 1\n\n", "data: 2\n\n"]
    assert counting.outputs[:3] == [0, 1, 2]
    assert output_of(row)["stream"]["cut_off_by_client"] is True


# --- retries ---


def test_retries(patient: Recorded) -> None:
    """Two attempts fail and the third works: the trace is OK, the failed spans say why they failed."""
    trace = trace_of(patient.post("/retrying", json={"n": 9}).row)
    assert trace.info.state == "OK"
    assert states(trace) == [("retrying", "OK"), ("flaky", "ERROR"), ("flaky", "ERROR"), ("flaky", "OK")]
    _, *attempts = trace.data.spans
    for attempt, span in enumerate(attempts[:2]):
        [event] = span.events
        assert event.attributes["exception.message"] == f"attempt {attempt} failed"
        assert event.attributes["exception.type"] == "ConnectionError"
        assert "flaky" in str(event.attributes["exception.stacktrace"])
    assert attempts[2].outputs == 9


# --- endpoints that call each other ---


def call(outer: Recorded, inner: Recorded, how: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rows of a request and of the one that it made."""
    exchanged = outer.post("/caller", json={"n": 2, "url": inner.url, "how": how})
    reply = exchanged.reply.json()
    return exchanged.row, inner.find(f"databricks_request_id = '{reply['inner']}'")


def check_call(outer: dict[str, Any], inner: dict[str, Any], *, joined: bool) -> None:
    """Two rows, each with its own spans; one trace id where the inner endpoint goes on with the trace."""
    asking, asked = trace_of(outer), trace_of(inner)
    assert outline(asking) == "caller(tool)"
    assert outline(asked) == "callee(tool)"
    assert (outer["trace_state"], inner["trace_state"]) == ("OK", "OK")
    assert (outer["trace_id"] == inner["trace_id"]) is joined
    assert asked.data.spans[0].parent_id == (asking.data.spans[0].span_id if joined else None)
    assert asking.info.client_request_id == outer["databricks_request_id"]
    assert asked.info.client_request_id == inner["databricks_request_id"]
    assert asked.info.tags["callee"] == "2"
    assert "callee" not in asking.info.tags


@pytest.mark.parametrize(
    ("how", "trusted", "joined"),
    [
        ("plain", True, True),
        ("plain", False, False),
        ("by-api", True, True),
        ("by-api", False, True),
        ("nothing", True, False),
    ],
)
@pytest.mark.parametrize("same_server", [True, False])
def test_endpoints_of_one_process(
    trusting: Recorded, patient: Recorded, how: str, trusted: bool, joined: bool, same_server: bool
) -> None:
    """A ``traceparent`` joins the rows' traces where it is trusted, or where the agent itself takes it up."""
    inner = trusting if trusted else patient
    outer = inner if same_server else patient
    rows_of_call = call(outer, inner, how)
    check_call(*rows_of_call, joined=joined)
    assert ("traceparent" in rows_of_call[1]["request_metadata"]) is (how != "nothing")


def test_endpoints_of_two_processes(tmp_path: Path, patient: Recorded) -> None:
    """The same between processes, each of which writes a table of its own."""
    environment = {
        "INFERENCE_TABLE_URI": str(tmp_path / "payload"),
        "INFERENCE_TABLE_SPOOL_DIR": str(tmp_path / "spool"),
        "INFERENCE_TABLE_FLUSH_SECONDS": "0.05",
        "INFERENCE_TABLE_TRUST_TRACEPARENT": "true",
    }
    with served("tests.serving.fluent_agents:app", env=environment, log=tmp_path / "log") as (url, _):
        inner = Recorded(url, tmp_path / "payload")
        for how in ("plain", "by-api", "nothing"):
            check_call(*call(patient, inner, how), joined=how != "nothing")


def test_an_endpoint_that_is_called_in_process(tmp_path: Path) -> None:
    """An agent that calls another captured app without a server gets two rows, each with its own spans."""
    folder = tmp_path / "inner"
    inner = InferenceTableMiddleware(
        make_app(), enabled=True, uri=str(folder / "payload"), spool_dir=str(folder / "spool")
    )
    transport = httpx.ASGITransport(inner)

    @mlflow.trace
    async def outer_agent(n: int) -> Any:
        async with httpx.AsyncClient(transport=transport, base_url="http://inner") as http:
            reply = await http.post("/plain", json={"n": n})
        return tool(reply.json()["answer"])

    outer = FastAPI()

    @outer.post("/")
    async def _outer(body: Body) -> Any:
        return await outer_agent(body["n"])

    with recorded(outer, tmp_path / "outer") as endpoint:
        exchanged = endpoint.post("/", json={"n": 3})
        assert exchanged.reply.json() == 3
        asked = Recorded("", folder / "payload").find("true")
    assert outline(trace_of(exchanged.row)) == "outer_agent(tool)"
    assert outline(trace_of(asked)) == "callee(tool)"
    assert trace_of(asked).data.spans[0].parent_id is None
    assert asked["trace_id"] != exchanged.row["trace_id"]


def test_pipelined_requests(tmp_path: Path) -> None:
    """Requests that come before the reply to the last: uvicorn starts them within that one's context."""
    app = make_app()

    async def with_span(scope: Any, receive: Any, send: Any) -> None:
        """A span around each request, as tracing middlewares of users make it."""
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        with mlflow.start_span("middleware"):
            await app(scope, receive, send)

    def request(n: int) -> bytes:
        body = b'{"n": %d}' % n
        head = (
            b"POST /plain HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        )
        return head % len(body) + body

    with recorded(with_span, tmp_path) as endpoint:
        address = urlsplit(endpoint.url)
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.sendall(request(1) + request(2) + request(3))
            found = endpoint.find_all("true", 3)
    for n, row in enumerate(found, 1):
        trace = trace_of(row)
        assert outline(trace) == "middleware(callee(tool))"
        assert span_named(trace, "callee").inputs == {"n": n}
        assert trace.data.spans[0].parent_id is None
    assert len({row["trace_id"] for row in found}) == 3


def test_a_trace_that_another_endpoint_returned(patient: Recorded, hasty: Recorded) -> None:
    """``mlflow.add_trace`` puts the other's spans under the caller's; the other has its own row as well."""
    n = 4711
    trace = trace_of(patient.post("/merging", json={"n": n, "url": hasty.url}).row)
    assert outline(trace) == "merging(callee(tool))"
    inner = hasty.find(f"request like '%{n}%'")
    assert outline(trace_of(inner)) == "callee(tool)"
    assert inner["trace_id"] != trace.info.trace_id
