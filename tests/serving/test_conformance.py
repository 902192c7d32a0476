"""What MLflow promises of its tracing in model serving holds here: behaviours of its own tests, seen from
a client and in the table."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from mlflow.entities import Span, Trace
from mlflow.tracing.trace_manager import InMemoryTraceManager

from tests.serving.conformance_agents import make_app
from tests.serving.recorded import Recorded, outline, recorded, span_named, trace_of
from tests.support import ROOT, output_of, running, served

BODY = {"text": "two words"}
FORMS = {
    "/invocations/function": "agent(double estimate)",
    "/invocations/async": "agent(estimate)",
    "/stream/generator": "agent(estimate estimate)",
    "/stream/async-generator": "agent(estimate estimate)",
}
"""The four forms of an agent, and their spans."""
RETURN_TRACE = {"databricks_options": {"return_trace": True}}


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    folder = tmp_path_factory.mktemp("conformance")
    with recorded(make_app(), folder, allow_return_trace=True) as running_app:
        yield running_app


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    """A server that returns no traces, as by default."""
    with recorded(make_app(), tmp_path_factory.mktemp("closed")) as running_app:
        yield running_app


def plain_attributes(span: Span) -> dict[str, Any]:
    return {key: value for key, value in span.attributes.items() if key != "mlflow.spanLogLevel"}


# --- a trace per request id ---


def test_a_request_s_trace(endpoint: Recorded) -> None:
    """Names, types, inputs, outputs, attributes and events of its spans, under the request's id."""
    exchanged = endpoint.post("/invocations/function", json=BODY)
    trace = trace_of(exchanged.row)
    request_id = exchanged.reply.headers["x-databricks-request-id"]
    assert exchanged.reply.json() == {"weight": 18}
    assert trace.info.client_request_id == exchanged.row["databricks_request_id"] == request_id
    assert trace.info.trace_id.startswith("tr-")
    assert trace.info.trace_metadata["mlflow.trace_schema.version"] == "3"
    assert outline(trace) == "agent(double estimate)"
    agent, estimate, double = trace.data.spans
    assert plain_attributes(agent) == {
        "mlflow.traceRequestId": trace.info.trace_id,
        "mlflow.spanType": "UNKNOWN",
        "mlflow.spanFunctionName": "agent",
        "mlflow.spanInputs": {**BODY, "odd": None},
        "mlflow.spanOutputs": {"weight": 18},
    }
    assert plain_attributes(estimate) == {
        "mlflow.traceRequestId": trace.info.trace_id,
        "mlflow.spanType": "LLM",
        "mlflow.spanFunctionName": "weigh",
        "mlflow.spanInputs": BODY,
        "mlflow.spanOutputs": 9,
        "model": "small",
    }
    assert [(event.name, event.attributes) for event in double.events] == [("doubling", {"weight": 9})]
    for span in trace.data.spans:
        assert (span.status.status_code.value, span.status.description) == ("OK", "")
        assert span.start_time_ns <= (span.end_time_ns or 0)
    # As after MLflow's pop_trace: what is in the row is nowhere else.
    held: Any = InMemoryTraceManager.get_instance  # it is not typed
    with held().get_trace(trace.info.trace_id) as left:
        assert left is None


def test_each_request_gets_its_own_trace_back(endpoint: Recorded) -> None:
    """Of thirty requests at once, each reply holds the trace of its own id, and the row the same one."""

    def ask(number: int) -> tuple[int, httpx.Response]:
        body = {"text": "x" * number, **RETURN_TRACE}
        return number, endpoint.send("/invocations/function", json=body)

    with ThreadPoolExecutor(10) as pool:
        replies = list(pool.map(ask, range(30)))
    for number, reply in replies:
        output = reply.json()["databricks_output"]
        trace = Trace.from_dict(output["trace"])
        assert trace.data.spans[0].outputs == {"weight": 2 * number}
        assert (
            output["databricks_request_id"]
            == trace.info.client_request_id
            == reply.headers["x-databricks-request-id"]
        )
    last = replies[-1][1]
    trace = trace_of(endpoint.row(last))
    returned = Trace.from_dict(last.json()["databricks_output"]["trace"])
    assert [span.to_dict() for span in trace.data.spans] == [span.to_dict() for span in returned.data.spans]


def test_what_an_agent_says_of_its_trace(endpoint: Recorded) -> None:
    """``mlflow.update_current_trace``: tags, metadata, previews, and a state that differs from the spans'."""
    row = endpoint.post("/invocations/describing", json=BODY).row
    info = trace_of(row).info
    assert (info.tags["kind"], info.trace_metadata["session"]) == ("test", "two words")
    assert (info.request_preview, info.response_preview) == ("weigh two words", "weighed")
    assert info.state == row["trace_state"] == "ERROR"
    assert trace_of(row).data.spans[0].status.status_code.value == "OK"
    assert row["status_code"] == 200


# --- the switch ---


def test_the_switch(tmp_path: Path) -> None:
    """``ENABLE_MLFLOW_TRACING`` unset, off and on: fluent and client APIs work, and are recorded or not."""
    environment = {
        "INFERENCE_TABLE_URI": str(tmp_path / "payload"),
        "INFERENCE_TABLE_SPOOL_DIR": str(tmp_path / "spool"),
    }
    run_module("tests.serving.switches", environment, tmp_path)


def run_module(name: str, environment: dict[str, str], folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", name],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# --- time-outs ---


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    """A process of its own, whose tracing has a time-out, and can be broken."""
    folder = tmp_path_factory.mktemp("process")
    environment = {
        "INFERENCE_TABLE_URI": str(folder / "payload"),
        "INFERENCE_TABLE_SPOOL_DIR": str(folder / "spool"),
        "INFERENCE_TABLE_FLUSH_SECONDS": "0.05",
        "INFERENCE_TABLE_TRACE_GRACE_SECONDS": "0.1",
        "MLFLOW_TRACE_TIMEOUT_SECONDS": "1",
        "MLFLOW_TRACE_TIMEOUT_CHECK_INTERVAL_SECONDS": "1",
    }
    app = "tests.serving.conformance_agents:app"
    with served(app, env=environment, log=folder / "log") as (url, _):
        yield Recorded(url, folder / "payload")


def test_a_trace_that_takes_too_long_is_halted(process: Recorded) -> None:
    """After ``MLFLOW_TRACE_TIMEOUT_SECONDS`` a trace is an ERROR that says why; faster ones are OK."""
    seconds = [2.5, 2.6, 0.1, 0.2]
    found = process.post_all([("/invocations/slow", {"seconds": one}) for one in seconds])
    for row, one in zip(found, seconds, strict=True):
        trace = trace_of(row)
        agent, *steps = trace.data.spans
        assert json.loads(row["response"])["seconds"] == one
        assert (row["status_code"], row["trace_state"]) == (200, "ERROR" if one > 1 else "OK")
        assert {step.status.status_code.value for step in steps} == {"OK"}
        if one > 1:
            assert agent.status.status_code.value == "ERROR"
            [event] = agent.events
            assert event.name == "exception"
            assert f"Trace {trace.info.trace_id} is timed out" in str(event.attributes["exception.message"])
            assert 1000 <= (trace.info.execution_duration or 0) < one * 1000


# --- exceptions of the agent ---


@pytest.mark.parametrize("form", ["failing", "failing-async"])
def test_an_exception_during_a_prediction(endpoint: Recorded, form: str) -> None:
    """It reaches the server as without us; the trace is an ERROR with the inputs and without outputs."""
    exchanged = endpoint.post(f"/invocations/{form}", json=BODY)
    assert exchanged.reply.status_code == exchanged.row["status_code"] == 500
    trace = trace_of(exchanged.row)
    assert trace.info.state == "ERROR"
    assert outline(trace) == "agent(refuse)"
    assert json.loads(trace.info.trace_metadata["mlflow.traceInputs"]) == BODY
    assert trace.info.trace_metadata["mlflow.traceOutputs"] == ""
    assert (trace.data.spans[0].inputs, trace.data.spans[0].outputs) == (BODY, None)
    for span in trace.data.spans:
        assert span.status.status_code.value == "ERROR"
        [event] = span.events
        assert event.name == "exception"
        assert event.attributes["exception.message"] == "cannot weigh 'two words'"
        assert event.attributes["exception.type"] == "ValueError"


@pytest.mark.parametrize("form", ["failing-generator", "failing-async-generator"])
def test_an_exception_during_a_stream(endpoint: Recorded, form: str) -> None:
    """The client gets what came before; the trace has that chunk, the exception, and each span's state."""
    chunks: list[str] = []
    stream = endpoint.stream(f"/stream/{form}", json=BODY)
    with stream as reply, pytest.raises(httpx.RemoteProtocolError):
        chunks.extend(reply.iter_text())
    assert "".join(chunks) == "data: 9\n\n"
    row = endpoint.row(reply)
    trace = trace_of(row)
    assert trace.info.state == "ERROR"
    assert outline(trace) == "agent(estimate refuse)"
    assert [span.status.status_code.value for span in trace.data.spans] == ["ERROR", "OK", "ERROR"]
    assert json.loads(trace.info.trace_metadata["mlflow.traceInputs"])["text"] == "two words"
    assert [event.name for event in trace.data.spans[0].events] == ["mlflow.chunk.item.0", "exception"]
    assert "cannot weigh" in output_of(row)["stream"]["error"]


# --- failures of tracing ---


@pytest.fixture(scope="module")
def untouched() -> dict[str, tuple[int, str]]:
    """What the agents answer without capture."""
    with running(make_app()) as url:
        replies = {path: httpx.post(f"{url}{path}", json=BODY) for path in FORMS}
    return {path: (reply.status_code, reply.text) for path, reply in replies.items()}


@pytest.mark.parametrize("path", FORMS)
def test_values_that_cannot_be_recorded(
    endpoint: Recorded, untouched: dict[str, tuple[int, str]], path: str
) -> None:
    """Inputs that fail whenever they are looked at change no reply, and cost the trace no span."""
    exchanged = endpoint.post(f"/odd/{path.rsplit('/', 1)[1]}", json=BODY)
    assert (exchanged.reply.status_code, exchanged.reply.text) == untouched[path]
    trace = trace_of(exchanged.row)
    assert (outline(trace), trace.info.state) == (FORMS[path], "OK")
    assert trace.data.spans[0].inputs["text"] == BODY["text"]


@pytest.mark.parametrize("part", ["processor", "start", "end"])
def test_tracing_that_fails_at_every_span(
    process: Recorded, untouched: dict[str, tuple[int, str]], part: str
) -> None:
    """A span processor of MLflow's, or an exporter of the application's, that fails changes no reply."""
    httpx.put(f"{process.url}/break/{part}", timeout=30).raise_for_status()
    for path, answer in untouched.items():
        exchanged = process.post(path, json=BODY)
        assert (exchanged.reply.status_code, exchanged.reply.text) == answer
        assert (exchanged.row["status_code"], exchanged.row["logging_error_codes"]) == (200, [])
        if part != "start":
            trace = trace_of(exchanged.row)
            assert (outline(trace), trace.info.state) == (FORMS[path], "OK")


# --- clients that ask for the trace ---


@pytest.mark.parametrize("path", FORMS)
def test_a_client_that_asks_for_its_trace(
    endpoint: Recorded, untouched: dict[str, tuple[int, str]], path: str
) -> None:
    """As ``mlflow.genai.to_predict_fn`` does: without ``databricks_output`` the reply is as ever."""
    exchanged = endpoint.post(path, json={**BODY, **RETURN_TRACE})
    reply = exchanged.reply
    assert int(reply.headers.get("content-length", len(reply.content))) == len(reply.content)
    if path.startswith("/stream"):
        *events, last = [event for event in reply.text.split("\n\n") if event]
        output = json.loads(last.removeprefix("data: "))["databricks_output"]
        rest = "".join(f"{event}\n\n" for event in events)
    else:
        whole = reply.json()
        output = whole.pop("databricks_output")
        rest = json.dumps(whole, separators=(",", ":"))
    assert (reply.status_code, rest) == untouched[path]
    trace = Trace.from_dict(output["trace"])
    assert trace.info.trace_id == exchanged.row["trace_id"]
    assert outline(trace) == FORMS[path]


def test_a_returned_trace_is_in_no_experiment(endpoint: Recorded) -> None:
    """A client of MLflow's that finds its own experiment in a trace takes it for stored there."""
    body = {**BODY, **RETURN_TRACE}
    exchanged = endpoint.post("/invocations/function", json=body)
    returned = Trace.from_dict(exchanged.reply.json()["databricks_output"]["trace"])
    assert not returned.info.experiment_id
    assert trace_of(exchanged.row).info.experiment_id == "0"


def test_a_client_that_asks_where_it_is_not_allowed(
    closed: Recorded, untouched: dict[str, tuple[int, str]]
) -> None:
    """The reply is as ever, and the row has the trace."""
    exchanged = closed.post("/invocations/function", json={**BODY, **RETURN_TRACE})
    assert (exchanged.reply.status_code, exchanged.reply.text) == untouched["/invocations/function"]
    assert outline(trace_of(exchanged.row)) == FORMS["/invocations/function"]


def test_a_failing_agent_returns_its_trace_to_nobody_but_the_table(endpoint: Recorded) -> None:
    """The server answers an exception in the app's place, so the client gets its usual 500."""
    exchanged = endpoint.post("/invocations/failing", json={**BODY, **RETURN_TRACE})
    assert exchanged.reply.status_code == 500
    assert "databricks_output" not in exchanged.reply.text
    assert span_named(trace_of(exchanged.row), "refuse").status.status_code.value == "ERROR"
