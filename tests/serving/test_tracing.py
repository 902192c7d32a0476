"""Spans of a request end up in its traces, whatever the agent does to tracing meanwhile."""

import asyncio
import contextlib
import contextvars
import json
import logging
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import duckdb
import httpx
import mlflow
import orjson
import pytest
from mlflow.entities import LiveSpan, SpanEvent, Trace
from mlflow.entities.trace_location import MlflowExperimentLocation
from mlflow.tracing import provider as mlflow_provider
from mlflow.tracing.distributed import set_tracing_context_from_http_request_headers
from mlflow.tracing.trace_manager import InMemoryTraceManager
from opentelemetry import trace as otel
from opentelemetry.sdk.trace import TracerProvider
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from inference_table import metrics
from serving import InferenceTableMiddleware, tracing
from serving.snapshot import snapshot, uniform_size
from serving.traces import ManagedTrace
from serving.tracing import SKIPPED, RequestTraces
from tests.serving.tracing_agents import AGENTS, Client, chat, load, nested, record, request, sealed
from tests.support import ROOT, rows, running

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"
UNSAMPLED = f"00-{TRACE_ID}-b7ad6b7169203331-00"


def managed() -> tuple[int, int]:
    """How many traces of ours MLflow's manager holds, and how many trace ids it knows."""
    manager = InMemoryTraceManager.get_instance()
    ours = [trace for trace in manager._traces.values() if isinstance(trace, ManagedTrace)]
    return len(ours), len(manager._otel_id_to_mlflow_trace_id)


def counted(counter: Any) -> float:
    value: float = counter._value.get()
    return value


@pytest.fixture(autouse=True)
def clean(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Each test starts with an MLflow as after import, leaves nothing in its manager, and logs no warning."""
    mlflow.tracing.reset()
    manager = InMemoryTraceManager.get_instance()
    with manager._lock:  # streams that other tests left open lie there until MLflow's own time-out
        manager._traces.clear()
        manager._otel_id_to_mlflow_trace_id.clear()
    logging.getLogger("mlflow").propagate = True
    before = managed()
    with caplog.at_level(logging.WARNING):
        yield
    logging.getLogger("mlflow").propagate = False
    mlflow.tracing.reset()
    assert managed() == before
    assert [record.getMessage() for record in caplog.records] == []


def names(trace: Trace) -> list[str]:
    return [span.name for span in trace.data.spans]


# --- whose span it is ---


def test_concurrent_requests_are_not_mixed_up() -> None:
    """Of 200 concurrent requests, each gets its own spans, from tasks and from worker threads."""

    @mlflow.trace
    def in_thread(number: int) -> int:
        time.sleep(0.001)
        return number

    @mlflow.trace
    async def step(number: int) -> int:
        await asyncio.sleep(0.001)
        return await asyncio.to_thread(in_thread, number)

    @mlflow.trace
    async def agent(number: int) -> int:
        await asyncio.gather(step(number), step(number), step(number))
        mlflow.update_current_trace(tags={"number": str(number)})
        return number

    async def serve(number: int) -> tuple[int, RequestTraces]:
        with request(f"request-{number}") as traces:
            await agent(number)
        return number, traces

    async def main() -> list[tuple[int, RequestTraces]]:
        return await asyncio.gather(*(serve(number) for number in range(200)))

    for number, traces in asyncio.run(main()):
        assert traces.is_complete()
        (trace,) = sealed(traces)
        assert sorted(names(trace)) == ["agent"] + ["in_thread"] * 3 + ["step"] * 3
        assert {span.outputs for span in trace.data.spans} == {number}
        assert trace.info.tags["number"] == str(number)
        assert trace.info.client_request_id == f"request-{number}"


def test_client_api_on_other_threads() -> None:
    """Spans that threads without any context start and end belong to the request of their parents."""
    client = Client()

    def work(root: Any, number: int) -> None:
        child = client.start_span(f"child {number}", root.trace_id, root.span_id, inputs={"n": number})
        nested = mlflow.start_span_no_context("nested", parent_span=child)
        nested.end()
        client.end_span(child.trace_id, child.span_id, outputs=number)

    with request() as traces:
        root = client.start_trace("root", inputs={"q": 1}, tags={"t": "v"})
        with ThreadPoolExecutor(4) as pool:
            for future in [pool.submit(contextvars.Context().run, work, root, n) for n in range(8)]:
                future.result()
        assert not traces.is_complete()
        thread = threading.Thread(target=lambda: client.end_trace(root.trace_id, outputs="done"))
        thread.start()
        thread.join()
        assert traces.is_complete()
    (trace,) = sealed(traces)
    assert trace.info.state == "OK"
    assert trace.info.tags["t"] == "v"
    assert len(trace.data.spans) == 17
    children = [span for span in trace.data.spans if span.name.startswith("child")]
    assert all(span.parent_id == trace.data.spans[0].span_id for span in children)
    assert sorted(span.outputs for span in children) == list(range(8))


def test_two_requests_of_one_distributed_trace() -> None:
    """Two requests with the same trace id at the same time keep their spans and infos apart."""
    both_started = threading.Barrier(2)

    def serve(number: int) -> RequestTraces:
        with request(f"request-{number}") as traces:
            with set_tracing_context_from_http_request_headers({"traceparent": TRACEPARENT}):
                with mlflow.start_span(f"root {number}") as root:
                    both_started.wait(10)
                    mlflow.update_current_trace(tags={"number": str(number)})
                    with mlflow.start_span(f"child {number}") as child:
                        assert child.trace_id == root.trace_id == f"tr-{TRACE_ID}"
                    both_started.wait(10)
                if number == 1:
                    both_started.wait(10)
            if number == 0:
                # MLflow has removed its placeholder for the remote trace; the other request goes on.
                both_started.wait(10)
        return traces

    with ThreadPoolExecutor(2) as pool:
        requests = list(pool.map(serve, range(2)))
    for number, traces in enumerate(requests):
        (trace,) = sealed(traces)
        assert names(trace) == [f"root {number}", f"child {number}"]
        assert trace.info.trace_id == f"tr-{TRACE_ID}"
        assert trace.info.client_request_id == f"request-{number}"
        assert trace.info.tags["number"] == str(number)
        assert trace.data.spans[0].parent_id == "b7ad6b7169203331"


def test_a_span_after_the_other_request_removed_the_trace() -> None:
    """The end of one request's remote context does not take another's trace out of MLflow's manager."""
    headers = {"traceparent": TRACEPARENT}
    outer = set_tracing_context_from_http_request_headers(headers)
    with request() as traces:
        outer.__enter__()
        span = mlflow.start_span_no_context("root")
        outer.__exit__(None, None, None)
        child = Client().start_span("child", span.trace_id, span.span_id)
        child.end()
        span.end()
    (trace,) = sealed(traces)
    assert names(trace) == ["root", "child"]


@pytest.mark.parametrize("header", [TRACEPARENT, UNSAMPLED])
def test_a_trusted_parent(header: str) -> None:
    """With a parent given, root spans continue the remote trace, sampled there or not."""
    with request(parent=header) as traces:
        with mlflow.start_span("first", attributes={"a": 1}) as span:
            span.set_inputs("question")
            with mlflow.start_span("child"):
                pass
        with mlflow.start_span("second"):
            pass
    (trace,) = sealed(traces)
    first, child, second = trace.data.spans
    assert trace.info.trace_id == first.trace_id == f"tr-{TRACE_ID}"
    assert first.parent_id == second.parent_id == "b7ad6b7169203331"
    assert child.parent_id == first.span_id
    assert trace.info.request_preview == '"question"'
    assert trace.info.state == "OK"


def test_an_unusable_parent() -> None:
    """A header that names no span changes nothing."""
    with request(parent="not a traceparent") as traces:
        chat()
    assert sealed(traces)[0].data.spans[0].parent_id is None


def test_a_span_around_the_server() -> None:
    """A span that is active around the whole server does not swallow the requests."""
    tracing.ensure_installed()
    with mlflow.start_span("around"):
        contexts = [contextvars.copy_context() for _ in range(2)]
    traces = [context.run(record, chat) for context in contexts]
    assert [names(trace)[0] for trace in traces] == ["chat_agent"] * 2
    assert [trace.data.spans[0].parent_id for trace in traces] == [None, None]
    assert traces[0].info.trace_id != traces[1].info.trace_id


def test_no_request() -> None:
    """Traces outside of requests are counted and leave nothing behind."""
    tracing.ensure_installed()
    before, held = counted(metrics.ORPHAN_TRACES), managed()
    for _ in range(50):
        AGENTS["failing"]()
        with mlflow.start_span("orphan") as span:
            span.set_inputs("x")
        mlflow.start_span_no_context("manual").end()
    assert counted(metrics.ORPHAN_TRACES) == before + 150
    assert managed() == held


def test_a_skipped_request() -> None:
    """The spans of a request that is sampled out are dropped, and are no orphans."""
    tracing.ensure_installed()
    before = counted(metrics.ORPHAN_TRACES)
    token = tracing.CURRENT.set(SKIPPED)
    AGENTS["failing"]()
    tracing.CURRENT.reset(token)
    assert counted(metrics.ORPHAN_TRACES) == before
    assert SKIPPED.seal() == []


# --- sealing ---


def test_sealing_open_spans() -> None:
    """An open trace is sealed as it is; what comes later is counted, harmless, and not recorded."""
    before = counted(metrics.LATE_SPANS)
    with request() as traces:
        root = mlflow.start_span_no_context("root", inputs="question")
        done = mlflow.start_span_no_context("done", parent_span=root)
        done.end(outputs="x")
        assert not traces.is_complete()
        snapshots = traces.seal()
        assert traces.seal() == []
        root.set_outputs("too late")
        root.set_attribute("late", True)
        mlflow.start_span_no_context("late child", parent_span=root).end()
        with mlflow.start_span("late root"):
            pass
        root.end()
    trace = load(snapshots[0].encode())
    assert names(trace) == ["root", "done"]
    assert trace.info.state == "IN_PROGRESS"
    assert trace.info.request_preview == '"question"'
    assert trace.data.spans[0].outputs is None
    assert trace.data.spans[0].end_time_ns is None
    assert "late" not in trace.data.spans[0].attributes
    assert counted(metrics.LATE_SPANS) == before + 3


def test_code_that_runs_on_after_sealing() -> None:
    """MLflow's API goes on working in spans that are open when their request is sealed, and keeps nothing."""
    text = "a payload " * 1000
    held, references = managed(), sys.getrefcount(text)
    with request() as traces, mlflow.start_span("job") as job:
        job.set_inputs([text])
        job.add_event(SpanEvent("event", attributes={"text": text}))
        job._span.set_attribute("direct", text)
        with mlflow.start_span("done"):
            pass
        assert names(load(traces.seal()[0].encode())) == ["job", "done"]
        assert sys.getrefcount(text) == references
        assert mlflow.get_current_active_span() is job
        job.set_attribute("progress", text)
        job.set_outputs(text)
        job.add_event(SpanEvent("event", attributes={"text": text}))
        mlflow.update_current_trace(tags={"late": "tag"})
        assert job.inputs is job.outputs is None
        assert sys.getrefcount(text) == references
        with mlflow.start_span("child") as child:
            assert mlflow.get_current_active_span() is child
            child.set_inputs(text)
            assert sys.getrefcount(text) == references
        assert managed()[0] == held[0] + 1
    assert managed() == held
    assert traces.seal() == []


def test_a_job_that_starts_after_sealing() -> None:
    """The same for spans that start after their request was sealed: a strict request's background tasks."""
    with request() as traces:
        with mlflow.start_span("root") as root:
            pass
        traces.seal()
        before, held = counted(metrics.LATE_SPANS), managed()
        with mlflow.start_span("job") as job:
            assert mlflow.get_current_active_span() is job
            with mlflow.start_span("step") as step:
                step.set_inputs("x")
                assert mlflow.get_current_active_span() is step
            assert mlflow.get_current_active_span() is job
        child = mlflow.start_span_no_context("late child", parent_span=root)
        mlflow.start_span_no_context("grandchild", parent_span=child).end()
        child.end()
        assert managed() == held
        assert counted(metrics.LATE_SPANS) == before + 4
    assert traces.seal() == []


def test_two_requests_of_one_trace_and_a_late_span() -> None:
    """A late span of one request leaves another's, of the same distributed trace, in MLflow's manager."""
    with request("first", parent=TRACEPARENT) as first:
        early = mlflow.start_span_no_context("first")
        early.end()
    first.seal()
    with request("second", parent=TRACEPARENT) as second, mlflow.start_span("second") as span:
        late = mlflow.start_span_no_context("late", parent_span=early)
        assert mlflow.get_current_active_span() is span
        late.end()
        assert mlflow.get_current_active_span() is span
    assert [names(trace) for trace in sealed(second)] == [["second"]]


def test_spans_that_never_end() -> None:
    """What is left of spans that stay open after sealing is what MLflow's own time-out takes away."""
    held = managed()
    spans = []
    for number in range(1_200):
        with request(str(number)) as traces:
            spans.append(mlflow.start_span_no_context("open"))
        traces.seal()
    assert managed()[0] <= held[0] + 1_000
    assert managed()[1] == held[1]
    for span in spans:
        span.end()
    assert managed() == held


def test_time_out_of_a_sealed_trace() -> None:
    """MLflow's time-out also removes what stayed open after its root had ended and its request was sealed."""
    code = """
import time, mlflow
from mlflow.tracing.trace_manager import InMemoryTraceManager
from tests.serving.tracing_agents import request
with request() as traces:
    root = mlflow.start_span_no_context("root")
    open_span = mlflow.start_span_no_context("open", parent_span=root)
    root.end()
traces.seal()
held = InMemoryTraceManager.get_instance()._traces
assert len(held) == 1
deadline = time.monotonic() + 20
while len(held) and time.monotonic() < deadline:
    time.sleep(0.05)
assert len(held) == 0
"""
    run(code, MLFLOW_TRACE_TIMEOUT_SECONDS="1", MLFLOW_TRACE_TIMEOUT_CHECK_INTERVAL_SECONDS="1")


def test_sealed_traces_hold_nothing_of_the_agent() -> None:
    """A sealed trace that waits to be encoded keeps none of the agent's objects alive."""

    class Thing:
        pass

    things: list[Any] = []

    def agent() -> None:
        thing = Thing()
        things.append(weakref.ref(thing))
        try:
            raise ValueError(thing)
        except ValueError:  # whose traceback holds this frame
            with mlflow.start_span("root", attributes={"thing": thing}) as span:
                span.set_inputs({"thing": [thing]})
            mlflow.start_span_no_context("open", inputs=thing)

    with request() as traces:
        agent()
    snapshots = traces.seal()
    assert things[0]() is None
    assert [len(names(load(snapshot.encode()))) for snapshot in snapshots] == [1, 1]
    InMemoryTraceManager.reset()  # forgets the open span


def test_sealing_that_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A row whose traces can't be read is written without them, and says so."""

    class Unreadable(LiveSpan):
        @property
        def links(self) -> Any:
            raise RuntimeError("not now")

    async def answer(_: Any) -> JSONResponse:
        with mlflow.start_span("root") as span:
            foreign = Unreadable(TracerProvider().get_tracer("x").start_span("x"), span.trace_id)  # type: ignore[no-untyped-call, arg-type]
            InMemoryTraceManager.get_instance().register_span(foreign)  # type: ignore[no-untyped-call]
        return JSONResponse({"answer": "a"})

    app = Starlette(routes=[Route("/", answer, methods=["POST"])])
    table, spool = tmp_path / "payload", tmp_path / "spool"
    captured = InferenceTableMiddleware(
        app, enabled=True, uri=str(table), spool_dir=str(spool), flush_seconds=0.1
    )
    with running(captured) as url:
        assert httpx.post(url, json={}).json() == {"answer": "a"}
    [row] = rows(table)
    assert row["logging_error_codes"] == ["TRACE_ENCODING_FAILED"]
    assert json.loads(row["response"])["answer"] == "a"
    assert [record.getMessage() for record in caplog.records] == [
        "capturing a request failed (encode_trace): RuntimeError: not now"
    ]
    caplog.clear()


def test_attributes_that_change_while_they_are_read(caplog: pytest.LogCaptureFixture) -> None:
    """A trace can be read while more attributes are written than OpenTelemetry keeps of a span."""
    caplog.set_level(logging.ERROR, "opentelemetry.attributes")  # says so for each attribute

    class Key(str):
        """Does when it is looked up what another thread may do at that time."""

        __slots__ = ()
        __eq__ = str.__eq__

        def __hash__(self) -> int:
            for number in range(200 if reading else 0):
                root._span.set_attribute(f"another {number}", number)
            return str.__hash__(self)

    reading = False
    with request() as traces, mlflow.start_span("root") as root:
        for number in range(10):
            root._span.set_attribute(Key(f"key {number}"), number)
        reading = True
        [snapshot] = traces.peek()
        assert root.get_attribute("none") is None
        reading = False
        assert load(snapshot.encode()).data.spans[0].get_attribute("key 9") == 9
    assert len(sealed(traces)) == 1


def test_a_clean_up_that_starts_spans() -> None:
    """A traced clean-up, which the garbage collector may run at any point, may find our locks held."""
    code = """
import faulthandler
faulthandler.dump_traceback_later(20, exit=True)
from serving import tracing
from tests.serving.tracing_agents import chat, request, sealed
with request() as traces, traces._lock, tracing.ADOPTING, tracing.mlflow_provider.provider.once._installing:
    chat()
assert [len(t.data.spans) for t in sealed(traces)] == [4]
"""
    run(code)


def test_a_worker_that_was_created_in_a_request(caplog: pytest.LogCaptureFixture) -> None:
    """A worker task keeps the context of the request that created it; the log says why its spans are lost."""

    @mlflow.trace
    async def handle(queue: asyncio.Queue[Any]) -> None:
        (await queue.get()).set_result(None)

    async def work(queue: asyncio.Queue[Any]) -> None:
        while True:
            await handle(queue)

    async def main() -> None:
        queue: asyncio.Queue[Any] = asyncio.Queue()
        worker = None
        for number in range(5):
            with request(f"request-{number}") as traces:
                if worker is None:
                    with mlflow.start_span("first"):
                        worker = asyncio.create_task(work(queue))
                done = asyncio.get_running_loop().create_future()
                queue.put_nowait(done)
                await done
            traces.seal()
        assert worker is not None
        worker.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await worker

    asyncio.run(main())
    [message] = [record.getMessage() for record in caplog.records]
    assert "request-0" in message
    assert "contextvars.Context()" in message
    caplog.clear()


def test_peeking() -> None:
    """The traces can be read while the request goes on, and are complete in the end all the same."""
    with request() as traces, mlflow.start_span("root") as root:
        root.set_inputs([1])
        with mlflow.start_span("child"):
            pass
        (peeked,) = [load(snapshot.encode()) for snapshot in traces.peek()]
        root.set_outputs([2])
    assert peeked.info.state == "IN_PROGRESS"
    assert [span.outputs for span in peeked.data.spans] == [None, None]
    (trace,) = sealed(traces)
    assert trace.info.state == "OK"
    assert trace.data.spans[0].outputs == [2]


def test_counters() -> None:
    """A request's bytes follow its payload, without copying it; its overhead is measured."""
    text = "x" * 1_000_000
    with request() as traces, mlflow.start_span("root") as span:
        span.set_inputs({"text": text, "list": [text]})
    assert 2_000_000 < traces.nbytes < 2_100_000
    assert traces.overhead_ns > 0
    (snapshot,) = traces.seal()
    kept = snapshot.spans[0]._attributes.values["mlflow.spanInputs"]  # type: ignore[union-attr]
    assert kept["text"] is text


def test_bytes_of_values_that_are_overwritten() -> None:
    """What a span no longer holds does not count: a stream's outputs may be set anew with every chunk."""
    with request() as traces, mlflow.start_span("root") as span:
        outputs = ""
        for _ in range(1_000):
            outputs += "0123456789"
            span.set_outputs(outputs)
            span.set_attribute("text", outputs)
    assert 20_000 < traces.nbytes < 22_000
    traces.seal()


def test_circular_values_are_copied_once() -> None:
    """A value that contains itself costs what its parts cost, not that for each of many levels."""
    conversions = []

    class Part:
        def __str__(self) -> str:
            conversions.append(self)
            return "part"

        __repr__ = __str__

    value: dict[str, Any] = {"parts": [Part() for _ in range(10)]}
    value["self"] = [value]
    text, _ = snapshot(value)
    assert "part" in text.text
    assert len(conversions) <= 3 * 10


def test_lists_of_mixed_numbers_are_copied_at_once() -> None:
    """Integers among the floats of a long list do not make it be walked element by element."""
    numbers = [0.5, 1, None] * 100_000
    assert uniform_size(numbers) == 0
    assert uniform_size([*numbers, []]) is None
    assert snapshot(numbers)[0] == numbers
    assert snapshot([*numbers, float("nan")])[0][-1].text == "NaN"


def test_more_traces_than_mlflow_holds() -> None:
    """MLflow's manager forgets after 1,000 traces; requests do not."""
    roots = []
    requests = []
    for number in range(1_200):
        with request(str(number)) as traces:
            roots.append(mlflow.start_span_no_context("root"))
        requests.append(traces)
    for root in roots:
        with mlflow_provider.safe_set_span_in_context(root), mlflow.start_span("child"):
            pass
        root.end()
    assert all(traces.is_complete() for traces in requests)
    assert all(names(trace) == ["root", "child"] for traces in requests for trace in sealed(traces))


# --- what MLflow's API promises ---


def test_reading_a_live_span() -> None:
    """An agent that reads a span's values while it runs gets what a reader of the trace gets."""
    given = {"a": (1, 2)}
    with request() as traces, mlflow.start_span("root", span_type="TOOL", attributes=given) as span:
        messages = [{"role": "user", 1: {"x"}}]
        span.set_inputs(messages)
        messages.clear()
        span.set_outputs(float("inf"))
        live = {
            "inputs": span.inputs,
            "outputs": span.outputs,
            "type": span.span_type,
            "attributes": span.attributes,
            "immutable": span.to_immutable_span().attributes,
            "dict": {k: json.loads(v) for k, v in span.to_dict()["attributes"].items()},
        }
        span.inputs.clear()
        assert span.inputs == live["inputs"] == [{"role": "user", "1": "{'x'}"}]
        assert mlflow.get_current_active_span() is span
    recorded = sealed(traces)[0].data.spans[0]
    expected = {k: v for k, v in recorded.attributes.items() if k != "mlflow.spanLogLevel"}
    assert live["outputs"] == recorded.outputs == float("inf")
    assert live["type"] == "TOOL"
    assert live["attributes"] == live["immutable"] == live["dict"] == expected


def test_span_processors() -> None:
    """MLflow's span processors see the values and may replace them."""

    def mask(span: Any) -> None:
        span.set_inputs({**span.inputs, "password": "***"})

    @mlflow.trace
    def login(user: str, password: str) -> None: ...

    with mlflow.tracing.configure(span_processors=[mask]):
        trace = record(lambda: login("me", "secret"))
    mlflow.tracing.configure(span_processors=[])
    assert trace.data.spans[0].inputs == {"user": "me", "password": "***"}
    assert trace.info.request_preview == '{"user": "me", "password": "***"}'


def bad_status(span: Any) -> None:
    span.end(status=123)


def bad_type(span: Any) -> None:
    span.set_span_type(["unhashable"])
    span.end()


def bad_attributes(span: Any) -> None:
    span.end(attributes=[1])


def bad_status_text(span: Any) -> None:
    span.set_attribute("mlflow.spanType", {"a": 1})
    span.end(status="nonsense")


def bad_processor(span: Any) -> None:
    mlflow.tracing.configure(span_processors=[lambda _: 1 / 0])
    span.end()
    mlflow.tracing.configure(span_processors=[])


@pytest.mark.parametrize("end", [bad_status, bad_type, bad_attributes, bad_status_text, bad_processor])
def test_ends_that_fail(end: Callable[[Any], None], caplog: pytest.LogCaptureFixture) -> None:
    """Whatever an agent ends a span with, the span ends, and the agent goes on."""
    with request() as traces:
        span = mlflow.start_span_no_context("root", inputs="question")
        end(span)
        assert traces.is_complete()
    caplog.clear()  # warnings, as MLflow's
    (trace,) = sealed(traces)
    assert trace.info.state == "OK"
    assert trace.data.spans[0].inputs == "question"


def test_an_event_without_attributes() -> None:
    """An event may have None for its attributes, as in MLflow."""

    def agent() -> None:
        with mlflow.start_span("root") as span:
            span.add_event(SpanEvent("bare", attributes=None))  # type: ignore[arg-type]

    assert [event.name for event in record(agent).data.spans[0].events] == ["bare"]


def test_a_processor_that_raises() -> None:
    """A failing span processor of the application does not fail the agent."""
    code = """
import mlflow
from opentelemetry import trace
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
provider = TracerProvider()
trace.set_tracer_provider(provider)
class Failing(SpanProcessor):
    def on_end(self, span):
        raise RuntimeError("exporter bug")
from tests.serving.tracing_agents import request, sealed
with request() as traces:
    provider.add_span_processor(Failing())
    mlflow.start_span_no_context("root", inputs=1).end()
assert [len(t.data.spans) for t in sealed(traces)] == [1]
"""
    assert "exporter bug" in run(code, MLFLOW_USE_DEFAULT_TRACER_PROVIDER="false")


def test_last_active_trace_id() -> None:
    """`mlflow.get_last_active_trace_id` knows the trace that has just ended."""
    assert record(chat).info.trace_id == mlflow.get_last_active_trace_id()


def test_merging_another_trace() -> None:
    """`mlflow.add_trace` puts a trace that another service returned under the active span."""
    remote = record(chat)

    @mlflow.trace
    def caller() -> None:
        mlflow.add_trace(remote)

    trace = record(caller)
    assert names(trace) == ["caller", *names(remote)]
    assert trace.data.spans[1].inputs == remote.data.spans[0].inputs
    assert trace.data.spans[1].parent_id == trace.data.spans[0].span_id
    assert {span.trace_id for span in trace.data.spans} == {trace.info.trace_id}


def test_sampling_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's sampling ratio decides about whole traces, and a function's own ratio wins."""
    monkeypatch.setenv("MLFLOW_TRACE_SAMPLING_RATIO", "0")

    @mlflow.trace(sampling_ratio_override=1.0)
    def always() -> None:
        chat()

    with request() as traces:
        chat()
        always()
    assert [len(names(trace)) for trace in sealed(traces)] == [5]


def test_trace_timeout() -> None:
    """MLflow's time-out ends a trace that takes too long, as an error."""
    code = """
import time, mlflow
from tests.serving.tracing_agents import request, sealed
with request() as traces:
    root = mlflow.start_span_no_context("root")
    while not traces.is_complete():
        time.sleep(0.05)
(trace,) = sealed(traces)
assert trace.info.state == "ERROR", trace.info
assert "timed out" in trace.data.spans[0].events[0].attributes["exception.message"]
"""
    run(code, MLFLOW_TRACE_TIMEOUT_SECONDS="1", MLFLOW_TRACE_TIMEOUT_CHECK_INTERVAL_SECONDS="1")


def test_context_that_switches_tracing_off() -> None:
    """`mlflow.tracing.context(enabled=False)` leaves its scope out."""
    with request() as traces, mlflow.start_span("root"), mlflow.tracing.context(enabled=False):
        chat()
    assert names(sealed(traces)[0]) == ["root"]


# --- what agents do to tracing ---


def test_reset() -> None:
    """`mlflow.tracing.reset()` in the middle of a request loses nothing."""
    with request() as traces:
        mlflow.tracing.reset()
        with mlflow.start_span("first"):
            mlflow.tracing.reset()
            with mlflow.start_span("child"):
                pass
        mlflow.tracing.reset()
        with mlflow.start_span("second"):
            pass
    assert [names(trace) for trace in sealed(traces)] == [["first", "child"], ["second"]]


def test_set_destination(monkeypatch: pytest.MonkeyPatch) -> None:
    """`mlflow.tracing.set_destination()` names the experiment, and does not take the traces away."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with request() as traces:
        with mlflow.start_span("first"):
            mlflow.tracing.set_destination(MlflowExperimentLocation("42"))
            with mlflow.start_span("child"):
                pass
        chat()
    first, second = sealed(traces)
    assert names(first) == ["first", "child"]
    assert len(names(second)) == 4
    assert second.info.experiment_id == "42"


def test_disable() -> None:
    """`mlflow.tracing.disable()` is respected by requests that follow, `enable()` as well."""
    mlflow.tracing.disable()
    with request() as traces:
        chat()
        tracing.ensure_installed()
        chat()
    assert traces.seal() == []


def test_enable(monkeypatch: pytest.MonkeyPatch) -> None:
    """After `mlflow.tracing.enable()` traces are collected again."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with request() as traces:
        chat()
        mlflow.tracing.disable()
        chat()
        mlflow.tracing.enable()
        chat()
    assert [len(names(trace)) for trace in sealed(traces)] == [4, 4]


def test_set_experiment_like_reset() -> None:
    """What `mlflow.set_experiment` does to the provider loses nothing and switches no export on."""
    code = """
import mlflow
from mlflow.tracking import fluent
from mlflow.environment_variables import MLFLOW_EXPERIMENT_ID
from tests.serving.tracing_agents import chat, request, sealed
def set_experiment():  # the tail of mlflow.set_experiment, which needs a tracking server before it
    fluent._active_experiment_id = "7"
    MLFLOW_EXPERIMENT_ID.set("7")
    fluent._sync_trace_destination_and_provider(None)
set_experiment()
with request() as traces:
    chat()
    set_experiment()
    chat()
assert [len(t.data.spans) for t in sealed(traces)] == [4, 4]
with request() as traces:
    chat()
(trace,) = sealed(traces)
assert trace.info.experiment_id == "7"
import threading
assert threading.active_count() == 1, threading.enumerate()
"""
    run(code)


def test_no_tracking_uri() -> None:
    """Without a tracking URI, in an empty folder, nothing is lost, logged, written or started."""
    code = """
import logging, os, sys, tempfile, threading
os.chdir(tempfile.mkdtemp())
import serving.tracing
assert threading.active_count() == 1
from tests.serving.tracing_agents import chat, request, sealed
with request() as traces:
    chat()
(trace,) = sealed(traces)
assert len(trace.data.spans) == 4
assert trace.info.token_usage == {"input_tokens": 14, "output_tokens": 10, "total_tokens": 24}
assert threading.active_count() == 1
assert os.listdir(".") == []
assert "sqlalchemy" not in sys.modules
"""
    assert run(code) == ""


# --- beside others ---


def test_odd_infos() -> None:
    """Tags, names and messages that MLflow can't encode do not cost the trace."""
    parts = [{"type": "text", "text": 5}]

    @mlflow.trace(name="name \ud800")
    def agent(messages: Any) -> None:
        mlflow.update_current_trace(tags={"tag": "\udfff", 5: "number"})  # type: ignore[dict-item]
        with mlflow.start_span("llm") as span:
            span.set_attribute("mlflow.chat.tokenUsage", {"input_tokens": None, "output_tokens": 2})

    trace = record(lambda: agent([{"role": "user", "content": parts}]))
    assert trace.data.spans[0].name == "name \ufffd"
    assert trace.info.tags["tag"] == "\ufffd"
    assert trace.info.tags["5"] == "number"
    assert trace.info.token_usage == {"input_tokens": 0, "output_tokens": 2, "total_tokens": 0}


def test_half_characters() -> None:
    """A lone surrogate anywhere in a trace fails no reader, of which one would fail for the whole table."""
    half = "half \ud83d"

    @mlflow.trace
    def failing() -> None:
        raise ValueError(half)

    def agent() -> None:
        with mlflow.start_span(half, attributes={half: [half]}) as span:
            span.set_inputs({half: half, "deep": [nested(300), half], "whole": "\U0001f600"})
            span.set_outputs(half)
            span._span.set_attribute("text", json.dumps({"half": half}))
            span.add_event(SpanEvent("chunk", attributes={"message": half}))
            with contextlib.suppress(ValueError):
                failing()

    with request() as traces:
        agent()
    [encoded] = [snapshot.encode() for snapshot in traces.seal()]
    root = orjson.loads(encoded.json)["data"]["spans"][0]
    reader = duckdb.connect()
    for text in [encoded.json.decode(), encoded.info.decode(), *root["attributes"].values()]:
        assert reader.execute("SELECT json(?)", [text]).fetchone() is not None
    query = "SELECT json_extract_string(?, '$.data.spans[1].events[0].attributes.\"exception.message\"')"
    assert reader.execute(query, [encoded.json.decode()]).fetchone() == ("half \ufffd",)
    assert root["name"] == "half \ufffd"
    assert json.loads(root["attributes"]["mlflow.spanInputs"])["whole"] == "\U0001f600"
    assert json.loads(root["attributes"]["text"]) == {"half": "half \ufffd"}


def test_inputs_at_the_limit_of_nesting() -> None:
    """Inputs that Python can write as JSON but not read again do not cost the trace."""
    for levels in range(900, 1000):
        with request() as traces, mlflow.start_span("root") as span:
            span.set_inputs(nested(levels))
        [encoded] = [snapshot.encode() for snapshot in traces.seal()]
        assert encoded.state == "OK"
        assert b"request_preview" in encoded.info


def test_chunks_that_are_no_json() -> None:
    """A generator's chunks that are no JSON are left out of its outputs, not the trace."""
    with request() as traces:
        span = mlflow.start_span_no_context("root")
        for chunk in ('{"a": 1}', "not json", "NaN"):
            event = SpanEvent("mlflow.chunk.item.0", attributes={"mlflow.chunk.value": chunk})
            span.add_event(event)
        (trace,) = sealed(traces)
        span.end()
    assert str(trace.data.spans[0].outputs) == "[{'a': 1}, nan]"
    assert len(trace.data.spans[0].events) == 3


def test_otel_spans() -> None:
    """OpenTelemetry-only spans nest with MLflow's, and are translated to MLflow's attributes."""
    code = """
import mlflow
from mlflow.tracing.provider import get_bridged_tracer_provider
from tests.serving.tracing_agents import request, sealed
tracer = get_bridged_tracer_provider().get_tracer("before")  # an instrumentor, before anything of ours
with request() as traces:
    later = get_bridged_tracer_provider().get_tracer("after")
    with mlflow.start_span("root"):
        for tracer in (tracer, later):
            with tracer.start_as_current_span("chat") as span:
                span.set_attribute("gen_ai.operation.name", "chat")
                span.set_attribute("gen_ai.request.model", "m")
                span.set_attribute("gen_ai.usage.input_tokens", 3)
                span.set_attribute("gen_ai.usage.output_tokens", 4)
                span.set_attribute("numbers", [1, 2])
                with mlflow.start_span("inner"):
                    pass
    with later.start_as_current_span("openinference") as span:
        span.set_attribute("openinference.span.kind", "TOOL")
        span.set_attribute("input.value", "question")
        span.set_attribute("output.value", "answer")
first, second = sealed(traces)
assert [s.name for s in first.data.spans] == ["root", "chat", "inner", "chat", "inner"]
root, chat, inner, *_ = first.data.spans
assert chat.parent_id == root.span_id
assert inner.parent_id == chat.span_id  # MLflow's own spans do not look at OpenTelemetry's: root, there
assert chat.attributes["gen_ai.usage.input_tokens"] == 3
assert chat.attributes["mlflow.chat.tokenUsage"]["total_tokens"] == 7
assert first.info.token_usage["total_tokens"] == 14
(span,) = second.data.spans
assert (span.span_type, span.inputs, span.outputs) == ("TOOL", "question", "answer"), span.attributes
assert second.info.state == "OK"
"""
    run(code, MLFLOW_TRACE_PROPAGATE_TO_OTEL_CONTEXT="true", MLFLOW_TRACKING_URI="http://127.0.0.1:9")


def test_sharing_the_application_s_provider() -> None:
    """Where MLflow is told to use the global OpenTelemetry provider, spans come from there."""
    code = """
import mlflow
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
trace.set_tracer_provider(TracerProvider())
from serving import tracing
from tests.serving.tracing_agents import chat, request, sealed
with trace.get_tracer("server").start_as_current_span("POST /"), request() as traces:
    chat()
    with trace.get_tracer("app").start_as_current_span("own"):
        chat()
with request() as again:
    chat()
(trace,) = sealed(traces)
assert len(trace.data.spans) == 9
assert [len(t.data.spans) for t in sealed(again)] == [4]
chat()
assert again.seal() == []
"""
    run(code, MLFLOW_USE_DEFAULT_TRACER_PROVIDER="false")


def test_sharing_the_application_s_provider_outside_of_requests() -> None:
    """On a shared provider, spans of no recorded request end, reach the app's exporter, and leave nothing."""
    code = """
import mlflow
from opentelemetry import trace
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
provider = TracerProvider()
trace.set_tracer_provider(provider)
from inference_table import metrics
from mlflow.tracing.trace_manager import InMemoryTraceManager
from serving import tracing
from tests.serving.tracing_agents import chat, request, sealed
tracing.ensure_installed()
class Watching(SpanProcessor):
    seen = []
    def on_end(self, span):
        self.seen.append((span.name, span.attributes.get("mlflow.spanOutputs")))
provider.add_span_processor(Watching())  # later than ours
def agent():
    with mlflow.start_span("outer") as span:
        assert mlflow.get_current_active_span() is span
        chat()
        span.set_outputs("out")
def orphans():
    return metrics.ORPHAN_TRACES._value.get()
agent()
assert orphans() == 1
assert len(Watching.seen) == 5 and Watching.seen[-1] == ("outer", '"out"'), Watching.seen
token = tracing.CURRENT.set(tracing.SKIPPED)
agent()
tracing.CURRENT.reset(token)
assert orphans() == 1
assert len(Watching.seen) == 10, Watching.seen
with trace.get_tracer("server").start_as_current_span("the app's own"):
    pass
assert orphans() == 1
with mlflow.start_span("around"), request() as traces:
    chat()
assert [len(t.data.spans) for t in sealed(traces)] == [4]
assert Watching.seen[-2] == ("chat_agent", '"done"'), Watching.seen
assert orphans() == 2
assert metrics.LATE_SPANS._value.get() == 0
manager = InMemoryTraceManager.get_instance()
assert len(manager._traces) == len(manager._otel_id_to_mlflow_trace_id) == 0
"""
    assert run(code, MLFLOW_USE_DEFAULT_TRACER_PROVIDER="false") == ""


def test_other_processors() -> None:
    """A processor that the application added to MLflow's provider still runs, and sees the values."""
    code = """
import mlflow
from mlflow.tracing.provider import get_bridged_tracer_provider
from opentelemetry.sdk.trace import SpanProcessor
from tests.serving.tracing_agents import chat, request, sealed
class Watching(SpanProcessor):
    seen = []
    def on_end(self, span):
        self.seen.append((span.name, span.attributes.get("mlflow.spanOutputs")))
get_bridged_tracer_provider().add_span_processor(Watching())
with request() as traces:
    chat()
assert len(sealed(traces)[0].data.spans) == 4
assert len(Watching.seen) == 4 and Watching.seen[-1] == ("chat_agent", '"done"'), Watching.seen
"""
    run(code, MLFLOW_TRACKING_URI="http://127.0.0.1:9")


def test_export_beside_ours() -> None:
    """With MLFLOW_EXPERIMENT_ID set, a tracking server gets the same traces, and those without a request."""
    code = """
import json, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
received = []
class Server(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        received.append((self.path, body))
        info = json.loads(body)["trace"]["trace_info"] if body[:1] == b"{" else {}
        info.setdefault("tags", {})["mlflow.trace.spansLocation"] = "TRACKING_STORE"
        reply = b"3.17.2" if self.path == "/version" else json.dumps({"trace": {"trace_info": info}}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)
    do_GET = do_POST
    def log_message(self, *args): pass
server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
import os
os.environ["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{server.server_port}"
import mlflow
from mlflow.entities.trace_location import MlflowExperimentLocation
from mlflow.tracing.trace_manager import InMemoryTraceManager
from tests.serving.tracing_agents import chat, request, sealed
with request() as traces:
    chat()
(trace,) = sealed(traces)
assert len(trace.data.spans) == 4
assert trace.info.experiment_id == "5"
# The light SDK can't look MLFLOW_EXPERIMENT_ID up for traces of its own: it lacks MlflowClient.
mlflow.tracing.set_destination(MlflowExperimentLocation("5"))
with mlflow.start_span("orphan") as span:
    span.set_inputs("x")
mlflow.flush_trace_async_logging(terminate=True)
infos = [json.loads(b)["trace"]["trace_info"] for p, b in received if p.endswith("/mlflow/traces")]
assert [i["tags"]["mlflow.traceName"] for i in infos] == ["chat_agent", "orphan"], received
exported = infos[0]
assert exported["trace_id"] == trace.info.trace_id
assert exported["request_preview"] == trace.info.request_preview
assert exported["trace_metadata"]["mlflow.traceInputs"] == trace.info.trace_metadata["mlflow.traceInputs"]
assert "mlflow.trace.sizeStats" in exported["trace_metadata"]
assert "mlflow.trace.sizeStats" not in trace.info.trace_metadata
spans = b"".join(b for p, b in received if "otel" in p or "v1/traces" in p)
for span in trace.data.spans:
    assert span.name.encode() in spans
assert b"question" in spans
assert len(InMemoryTraceManager.get_instance()._traces) == 0
"""
    run(code, MLFLOW_EXPERIMENT_ID="5", MLFLOW_ENABLE_ASYNC_TRACE_LOGGING="true")


def test_an_export_that_can_not_work() -> None:
    """MLflow's own export failing costs a warning, not the table's traces."""
    code = """
from tests.serving.tracing_agents import chat, request, sealed
with request() as traces:
    chat()
(trace,) = sealed(traces)
assert len(trace.data.spans) == 4
"""
    run(
        code,
        MLFLOW_EXPERIMENT_ID="5",
        MLFLOW_TRACKING_URI="nonsense://x",
        MLFLOW_HTTP_REQUEST_MAX_RETRIES="0",
    )


def test_the_global_provider_is_left_alone() -> None:
    """The application's own OpenTelemetry provider is not touched."""
    before = otel.get_tracer_provider()
    record(chat)
    assert otel.get_tracer_provider() is before


def run(code: str, **environ: str) -> str:
    """Run Python code in a fresh process; returns what it wrote to stderr."""
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": "/nonexistent", **environ}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr
