"""Spans of a request end up in its traces, whatever the agent does to tracing meanwhile."""

import asyncio
import contextvars
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlflow
import pytest
from mlflow.entities import Trace
from mlflow.entities.trace_location import MlflowExperimentLocation
from mlflow.tracing import provider as mlflow_provider
from mlflow.tracing.distributed import set_tracing_context_from_http_request_headers
from mlflow.tracing.trace_manager import InMemoryTraceManager
from opentelemetry import trace as otel

from inference_table import metrics
from serving import tracing
from serving.traces import ManagedTrace
from serving.tracing import SKIPPED, RequestTraces
from tests.serving.tracing_agents import AGENTS, Client, chat, load, record, request, sealed
from tests.support import ROOT

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
    assert trace.data.spans[0].name == "name \ud800"
    assert trace.info.tags["tag"] == "\\udfff"
    assert trace.info.tags["5"] == "number"
    assert trace.info.token_usage == {"input_tokens": 0, "output_tokens": 2, "total_tokens": 0}


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
assert inner.parent_id == root.span_id  # as in MLflow, whose own spans do not look at OpenTelemetry's
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
