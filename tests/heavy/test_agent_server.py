"""MLflow's ``AgentServer``: its own app with our middleware, and ``tracelake serve``."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import mlflow
import pytest
from mlflow.entities import Trace

from serving import InferenceTableMiddleware
from serving.app import as_app
from tests.model_server import model_server
from tests.serving.recorded import Recorded, outline, recorded, trace_of
from tests.support import Process, free_port, output_of, rows, running, served, wait_for

pytestmark = pytest.mark.heavy

pytest.importorskip("mlflow.genai.agent_server", reason="needs the extra `heavy`: make test-all")
pytest.importorskip("openai", reason="needs the extra `heavy`: make test-all")

MODULE = "tests.heavy.server_agent"
USER = {"role": "user", "content": "why not"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    folder = tmp_path_factory.mktemp("mlflow")
    with model_server() as server, pytest.MonkeyPatch.context() as patch:
        variables = {
            "MODEL_SERVER": server.url,
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        for name, value in variables.items():
            patch.setenv(name, value)
        yield variables


@pytest.fixture(scope="module")
def server(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    """The server's app, wrapped by the middleware."""
    from tests.heavy.server_agent import agent_server

    with recorded(as_app(agent_server), tmp_path_factory.mktemp("rows"), trace_grace_seconds=30) as endpoint:
        yield endpoint


def body(*, stream: bool = False, behaviour: str = "") -> dict[str, Any]:
    return {"input": [USER], "stream": stream, "custom_inputs": {"behaviour": behaviour}}


def data_of(text: str) -> list[Any]:
    events = [event.removeprefix("data: ") for event in text.split("\n\n")[:-1]]
    return [event if event == "[DONE]" else json.loads(event) for event in events]


def spans_of(trace: Trace) -> list[tuple[Any, ...]]:
    """What a trace says, without what differs from one run to the next."""
    names = {span.span_id: span.name for span in trace.data.spans}
    return sorted(
        (span.name, names.get(span.parent_id), span.span_type, span.inputs, span.outputs, str(span.status))
        for span in trace.data.spans
    )


@pytest.mark.parametrize("path", ["/invocations", "/responses"])
def test_invoke(server: Recorded, path: str) -> None:
    """The reply is the server's; the row has the tree below the span that it makes."""
    exchanged = server.post(path, json=body())
    assert exchanged.reply.json()["output"][0]["content"][0]["text"] == "You asked: why not"
    trace = trace_of(exchanged.row)
    assert outline(trace) == "answer(AsyncCompletions look_up)"
    assert trace.data.spans[0].outputs == exchanged.reply.json()
    assert exchanged.row["trace_state"] == "OK"


def test_stream(server: Recorded) -> None:
    """Its spans begin when the server's handler has returned already; they are in the row all the same."""
    exchanged = server.post("/invocations", json=body(stream=True))
    *events, done = data_of(exchanged.reply.text)
    assert done == "[DONE]"
    assert events[-1]["type"] == "response.output_item.done"
    response = json.loads(exchanged.row["response"])
    assert response["output"][0]["content"][0]["text"] == "You asked: why not"
    trace = trace_of(exchanged.row)
    assert outline(trace) == "stream_answer(AsyncCompletions look_up)"
    assert trace.data.spans[0].outputs["output"] == response["output"]
    assert exchanged.row["trace_state"] == "OK"


def test_a_failure_in_the_middle_of_a_stream(server: Recorded) -> None:
    """The server sends its own error event; stream and trace in the row say that it failed."""
    exchanged = server.post("/invocations", json=body(stream=True, behaviour="failing"))
    assert data_of(exchanged.reply.text)[-2:] == [{"error": "overloaded"}, "[DONE]"]
    assert output_of(exchanged.row)["stream"]["error"] == "overloaded"
    assert (exchanged.row["status_code"], exchanged.row["trace_state"]) == (200, "ERROR")


def test_a_failure_of_invoke(server: Recorded) -> None:
    exchanged = server.post("/invocations", json=body(behaviour="broken"))
    assert exchanged.reply.status_code == exchanged.row["status_code"] == 500
    assert exchanged.row["trace_state"] == "ERROR"


def test_a_request_that_is_refused(server: Recorded) -> None:
    exchanged = server.post("/invocations", json={"input": "why"})
    assert exchanged.reply.status_code == exchanged.row["status_code"] == 400
    assert "Invalid parameters for ResponsesAgent" in json.loads(exchanged.row["response"])["detail"]


def test_a_client_that_leaves(environment: dict[str, str], tmp_path: Path) -> None:
    """What was streamed until then is recorded, and every span: that of OpenAI's stream never ends."""
    from tests.heavy.server_agent import agent_server

    with recorded(as_app(agent_server), tmp_path, trace_grace_seconds=0.5) as server:
        row = server.leave("/invocations", after="You", json=body(stream=True, behaviour="slow"))
    assert row["status_code"] == 499
    assert outline(trace_of(row)) == "stream_answer(AsyncCompletions look_up)"
    assert output_of(row)["stream"]["cut_off_by_client"] is True


def test_the_middleware_added_to_its_app(environment: dict[str, str], tmp_path: Path) -> None:
    """``agent_server.app.add_middleware(InferenceTableMiddleware)``, as for any FastAPI app."""
    from mlflow.genai.agent_server import AgentServer

    from tests.heavy import server_agent  # noqa: F401 - registers its functions

    agent_server = AgentServer("ResponsesAgent")
    agent_server.app.add_middleware(
        InferenceTableMiddleware, enabled=True, uri=tmp_path / "payload", spool_dir=tmp_path / "spool"
    )
    with running(agent_server.app) as url:
        for stream in (False, True):
            httpx.post(f"{url}/invocations", json=body(stream=stream), timeout=60).raise_for_status()
    outlines = [outline(trace_of(row)) for row in rows(tmp_path / "payload")]
    assert outlines == ["answer(AsyncCompletions look_up)", "stream_answer(AsyncCompletions look_up)"]


# MLflow 3.17's own store warns with SQLAlchemy 2.1.
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")
def test_tracelake_serve_records_what_mlflow_would(environment: dict[str, str], tmp_path: Path) -> None:
    """The same agent, served by us and by itself: span by span the same."""
    variables = {
        **environment,
        "INFERENCE_TABLE_URI": str(tmp_path / "payload"),
        "INFERENCE_TABLE_SPOOL_DIR": str(tmp_path / "spool"),
    }
    with served(f"{MODULE}:agent_server", env=variables, log=tmp_path / "log") as (url, _):
        for stream in (False, True):
            httpx.post(f"{url}/invocations", json=body(stream=stream), timeout=60).raise_for_status()
    ours = [trace_of(row) for row in rows(tmp_path / "payload")]
    theirs = recorded_by_mlflow(tmp_path)
    assert [spans_of(trace) for trace in ours] == [spans_of(trace) for trace in theirs]
    assert [trace.info.trace_metadata["mlflow.traceOutputs"] for trace in ours] == [
        trace.info.trace_metadata["mlflow.traceOutputs"] for trace in theirs
    ]


def recorded_by_mlflow(folder: Path) -> list[Trace]:
    """The traces of both requests to the server under uvicorn, without us, from MLflow's own store."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", f"{MODULE}:app", "--port", str(port)]
    store = f"sqlite:///{folder}/mlflow.db"
    mine = {"MLFLOW_TRACKING_URI": store, "MLFLOW_ENABLE_ASYNC_TRACE_LOGGING": "false"}
    process = Process(command, mine, folder / "uvicorn.log")
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: is_healthy(url), "the server to answer", 60)
        for stream in (False, True):
            httpx.post(f"{url}/invocations", json=body(stream=stream), timeout=60).raise_for_status()
        process.stop()
    finally:
        process.kill_group()
    client = mlflow.MlflowClient(store)
    return list(reversed(client.search_traces(locations=["0"])))


def is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").is_success
    except httpx.TransportError:
        return False
