"""MLflow models of all kinds, served from where they were saved."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import mlflow
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from inference_table.errors import SettingsError
from serving.app import as_app, load_app
from tests.heavy.saved_models import SAVES, advice_ignored, code, save_all, save_broken
from tests.model_server import model_server
from tests.serving.recorded import (
    Exchanged,
    Recorded,
    outline,
    recorded,
    span_named,
    trace_of,
    traces_of,
)
from tests.support import ROOT, free_port, output_of, rows, served

# LangChain's clients are never closed, and are collected whenever that may be.
pytestmark = [pytest.mark.heavy, pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")]

pytest.importorskip("mlflow.pyfunc", reason="needs the extra `heavy`: make test-all")
pytest.importorskip("langchain_openai", reason="needs the extra `heavy`: make test-all")

FRAMES = {
    "dataframe_split": {"columns": ["question", "top"], "data": [["why", 1], ["not", 1]]},
    "dataframe_records": [{"question": "why", "top": 1}, {"question": "not", "top": 1}],
    "inputs": {"question": ["why", "not"], "top": [1, 1]},
    "instances": [{"question": "why", "top": 1}, {"question": "not", "top": 1}],
}
USER = {"role": "user", "content": "why not"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Where models find the model server, and MLflow its store."""
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
        gc.collect()


@pytest.fixture(scope="module")
def saved(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all models."""
    folder = tmp_path_factory.mktemp("models")
    save_all(folder)
    return folder


@pytest.fixture(scope="module")
def server(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    """All models, each mounted at its name."""
    app = Starlette(routes=[Mount(f"/{name}", load_app(str(saved / name))) for name in SAVES])
    with recorded(app, tmp_path_factory.mktemp("rows"), trace_grace_seconds=30) as endpoint:
        yield endpoint


def ask(server: Recorded, model: str, body: Any) -> Exchanged:
    return server.post(f"/{model}/invocations", json=body)


def data_of(text: str) -> list[Any]:
    events = [event.removeprefix("data: ") for event in text.split("\n\n")[:-1]]
    return [event if event == "[DONE]" else json.loads(event) for event in events]


def error_of(exchanged: Exchanged, status: int) -> dict[str, Any]:
    """The body of a refusal, which is in the row as the client got it."""
    assert exchanged.reply.status_code == exchanged.row["status_code"] == status
    error: dict[str, Any] = exchanged.reply.json()
    recorded = json.loads(exchanged.row["response"])
    assert {key: value for key, value in recorded.items() if key != "databricks_output"} == error
    return error


# --- data frames ---


@pytest.mark.parametrize("form", FRAMES)
def test_a_python_model_takes_mlflows_request_forms(server: Recorded, form: str) -> None:
    """Rows in, rows out; what it traced is one tree."""
    exchanged = ask(server, "frames", {form: FRAMES[form]})
    expected = [{"answer": "about why"}, {"answer": "about not"}]
    assert exchanged.reply.json() == {"predictions": expected}
    trace = trace_of(exchanged.row)
    assert outline(trace) == "predict(search search)"
    root = trace.data.spans[0]
    rows_in = [{"question": "why", "top": 1}, {"question": "not", "top": 1}]
    columns_in = {"question": ["why", "not"], "top": [1, 1]}
    assert root.inputs == (columns_in if form in ("inputs", "instances") else rows_in)
    assert root.outputs == expected
    assert json.loads(exchanged.row["request"]) == {form: FRAMES[form]}


def test_a_python_model_takes_csv_and_parameters(server: Recorded) -> None:
    csv = server.post(
        "/frames/invocations", content="question,top\nwhy,1\n", headers={"content-type": "text/csv"}
    )
    assert csv.reply.json() == {"predictions": [{"answer": "about why"}]}
    assert outline(trace_of(csv.row)) == "predict(search)"
    loud = {"dataframe_records": [{"question": "why", "top": 1}], "params": {"loud": True}}
    assert ask(server, "frames", loud).reply.json() == {"predictions": [{"answer": "ABOUT WHY"}]}


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        (b"{", "BAD_REQUEST", "Ensure that input is a valid JSON formatted string"),
        (b'{"x": 1}', "BAD_REQUEST", "exactly one of the input fields"),
        (b"[]", "BAD_REQUEST", "Received a list"),
        (b'{"inputs": {"question": ["a"]}}', "INVALID_PARAMETER_VALUE", "Model is missing inputs ['top']"),
    ],
    ids=["no JSON", "no form", "a list", "another schema"],
)
def test_what_a_model_does_not_take_is_refused_by_mlflow(
    server: Recorded, body: bytes, code: str, message: str
) -> None:
    """MLflow's own bodies and status, in the row too."""
    headers = {"content-type": "application/json"}
    error = error_of(server.post("/frames/invocations", content=body, headers=headers), 400)
    assert error["error_code"] == code
    assert message in error["message"]


def test_a_model_that_raises(server: Recorded) -> None:
    """MLflow answers 400 with the traceback; the trace has the failure."""
    body = {"dataframe_records": [{"question": "why", "top": 1}, {"question": "fail", "top": 1}]}
    exchanged = ask(server, "frames", body)
    error = error_of(exchanged, 400)
    assert "RuntimeError: the model broke" in error["stack_trace"]
    trace = trace_of(exchanged.row)
    assert outline(trace) == "predict(search)"
    assert exchanged.row["trace_state"] == "ERROR"
    assert trace.data.spans[0].events[0].attributes["exception.message"] == "the model broke"


@pytest.mark.parametrize("content_type", ["text/plain", "application/json; charset=latin-1"])
def test_a_content_type_that_mlflow_does_not_take(server: Recorded, content_type: str) -> None:
    body = b'{"inputs": {}, "stream": true}'
    reply = server.post("/frames/invocations", content=body, headers={"content-type": content_type}).reply
    assert reply.status_code == 415


def test_the_scoring_servers_other_paths(server: Recorded) -> None:
    for path in ("ping", "health"):
        assert httpx.get(f"{server.url}/frames/{path}").status_code == 200
    assert httpx.get(f"{server.url}/frames/version").text == mlflow.__version__
    assert httpx.get(f"{server.url}/frames/invocations").status_code == 405
    assert httpx.post(f"{server.url}/frames/nowhere").status_code == 404


def test_a_model_that_traces_itself_has_no_second_root(server: Recorded) -> None:
    """``@mlflow.trace`` on ``predict``, and a type hint that MLflow validates."""
    exchanged = ask(server, "typed", {"inputs": [{"text": "why"}]})
    assert exchanged.reply.json() == {"predictions": ["about why"]}
    assert outline(trace_of(exchanged.row)) == "mine(search)"
    error = error_of(ask(server, "typed", {"inputs": [{"words": "why"}]}), 400)
    assert "Field required" in error["message"]


def test_a_function_that_was_saved_as_a_model(server: Recorded) -> None:
    """Its root span has the function's name."""
    exchanged = ask(server, "function", {"inputs": [{"text": "why"}]})
    assert exchanged.reply.json() == {"predictions": ["about why"]}
    assert outline(trace_of(exchanged.row)) == "answer(search)"


# --- agents ---


def test_a_responses_agent(server: Recorded) -> None:
    """MLflow traces it, and OpenAI's client in it, by itself."""
    exchanged = ask(server, "responses", {"input": [USER], "custom_inputs": {"a": 1}})
    reply = exchanged.reply.json()
    assert reply["output"][0]["content"][0]["text"] == "You asked: why not"
    assert reply["custom_outputs"] == {"a": 1}
    trace = trace_of(exchanged.row)
    assert outline(trace) == "predict(predict_stream(Completions))"
    assert span_named(trace, "Completions").span_type == "CHAT_MODEL"
    assert trace.data.spans[0].inputs["request"]["input"][0]["content"] == "why not"


def test_a_responses_agent_streams(server: Recorded) -> None:
    """Events as MLflow's AgentServer sends them; the row has the response they add up to."""
    exchanged = ask(server, "responses", {"input": [USER], "stream": True})
    *events, done = data_of(exchanged.reply.text)
    assert done == "[DONE]"
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert "".join(deltas) == "You asked: why not"
    assert events[-1]["type"] == "response.output_item.done"
    response = json.loads(exchanged.row["response"])
    assert response["output"][0]["content"][0]["text"] == "You asked: why not"
    assert response["databricks_output"]["stream"]["ended"] is True
    trace = trace_of(exchanged.row)
    assert outline(trace) == "predict_stream(Completions)"
    assert trace.data.spans[0].outputs["output"] == response["output"]


def test_a_responses_agent_that_fails(server: Recorded) -> None:
    """Whole, before the stream and in the middle of it."""
    for behaviour, stream, status in (("broken", False, 400), ("broken", True, 500), ("failing", True, 200)):
        body = {"input": [USER], "custom_inputs": {"behaviour": behaviour}, "stream": stream}
        exchanged = ask(server, "responses", body)
        assert exchanged.reply.status_code == status
        assert exchanged.row["trace_state"] == "ERROR"
    *events, error = data_of(exchanged.reply.text)
    assert events[0]["delta"] == "You"
    assert error == {"error": {"error_code": "INTERNAL_ERROR", "message": "APIError: overloaded"}}
    assert output_of(exchanged.row)["stream"]["error"] == "APIError: overloaded"


def test_requests_that_a_responses_agent_does_not_take(server: Recorded) -> None:
    """The same body from MLflow, whether a stream was asked for or not, but for what it says before it."""
    whole = error_of(ask(server, "responses", {"input": "why"}), 400)
    streamed = error_of(ask(server, "responses", {"input": "why", "stream": True}), 400)
    assert whole["error_code"] == streamed["error_code"] == "INVALID_PARAMETER_VALUE"
    assert "Failed to enforce schema" in whole["message"]
    assert "Failed to enforce schema" in streamed["message"]


def test_a_chat_agent(server: Recorded) -> None:
    """MLflow does not trace it by itself: a root of ours holds its spans together."""
    exchanged = ask(server, "chat", {"messages": [USER], "context": {"user_id": "me"}})
    assert exchanged.reply.json()["messages"][0]["content"] == "about why not"
    assert exchanged.reply.json()["custom_outputs"] == {"for": "me"}
    assert outline(trace_of(exchanged.row)) == "predict(look_up)"


def test_a_chat_agent_streams(server: Recorded) -> None:
    exchanged = ask(server, "chat", {"messages": [USER], "stream": True})
    *chunks, done = data_of(exchanged.reply.text)
    assert [chunk["delta"]["content"] for chunk in chunks] == ["about ", "why ", "not "]
    assert done == "[DONE]"
    [message] = json.loads(exchanged.row["response"])["messages"]
    assert message["content"] == "about why not "
    trace = trace_of(exchanged.row)
    assert outline(trace) == "predict_stream(look_up)"
    assert trace.data.spans[0].outputs == chunks


def test_a_python_model_streams(server: Recorded) -> None:
    """In any of MLflow's request forms; one that can't be streamed is answered whole."""
    body = {"dataframe_records": [{"question": "why not", "top": 1}], "stream": True}
    exchanged = ask(server, "frames", body)
    assert data_of(exchanged.reply.text) == [{"delta": "WHY"}, {"delta": "NOT"}, "[DONE]"]
    assert outline(trace_of(exchanged.row)) == "predict_stream(shout shout)"
    broken = ask(server, "frames", {"inputs": [{"question": "why fail", "top": 1}], "stream": True})
    assert data_of(broken.reply.text)[0] == {"delta": "WHY"}
    assert "the model broke" in data_of(broken.reply.text)[1]["error"]["message"]
    unstreamable = ask(server, "function", {"inputs": [{"text": "why"}], "stream": True})
    assert unstreamable.reply.json() == {"predictions": ["about why"]}


# --- chains ---


def test_a_chain_is_traced_without_a_word_in_its_code(server: Recorded) -> None:
    """MLflow runs chains in threads of its own; their spans are in the row all the same."""
    exchanged = ask(server, "chain", {"inputs": {"question": "why"}})
    assert exchanged.reply.json() == {"predictions": "You asked: why"}
    trace = trace_of(exchanged.row)
    assert outline(trace).startswith("RunnableSequence(ChatOpenAI")
    assert exchanged.row["input_tokens"] == 4
    assert exchanged.row["output_tokens"] == 3


def test_a_chain_is_asked_many_questions_at_once(server: Recorded) -> None:
    """One trace for each, in the order in which they began."""
    body = {"dataframe_records": [{"question": str(number)} for number in range(5)]}
    exchanged = ask(server, "chain", body)
    assert exchanged.reply.json() == {"predictions": [f"You asked: {number}" for number in range(5)]}
    questions = {trace.data.spans[0].inputs["question"] for trace in traces_of(exchanged.row)}
    assert questions == {"0", "1", "2", "3", "4"}


def test_a_chain_streams(server: Recorded) -> None:
    exchanged = ask(server, "chain", {"inputs": {"question": "why not"}, "stream": True})
    *parts, done = data_of(exchanged.reply.text)
    assert "".join(parts) == "You asked: why not"
    assert done == "[DONE]"
    trace = trace_of(exchanged.row)
    assert outline(trace).startswith("RunnableSequence(ChatOpenAI")
    assert exchanged.row["trace_state"] == "OK"


def test_a_graph_with_a_tool(server: Recorded) -> None:
    """LangGraph's agents are LangChain models too; ``messages`` are theirs."""
    exchanged = ask(server, "graph", {"messages": [USER]})
    assert "The tool says: about why not" in exchanged.reply.text
    trace = trace_of(exchanged.row)
    assert [span.name for span in trace.data.spans if span.span_type == "TOOL"] == ["look_up"]
    assert len([span for span in trace.data.spans if span.span_type == "CHAT_MODEL"]) >= 2
    streamed = ask(server, "graph", {"messages": [USER], "stream": True})
    assert "The tool says: about why not" in streamed.reply.text
    assert [span.name for span in trace_of(streamed.row).data.spans if span.span_type == "TOOL"] == [
        "look_up"
    ]


# --- where models come from ---


def test_a_loaded_model_and_agents_by_import_string(saved: Path, tmp_path: Path) -> None:
    """Objects of MLflow's classes are agents; they are validated as when they are served as models."""
    from tests.heavy.models import chat_agent, responses_agent

    app = Starlette(
        routes=[
            Mount("/loaded", as_app(mlflow.pyfunc.load_model(str(saved / "chat")))),
            Mount("/chat", as_app(chat_agent.Agent())),
            Mount("/responses", as_app(responses_agent.Agent())),
        ]
    )
    with recorded(app, tmp_path, trace_grace_seconds=30) as server:
        messages = {"messages": [USER]}
        for path, root in (("loaded", "predict"), ("chat", "predict")):
            whole = ask(server, path, messages)
            assert whole.reply.json()["messages"] == [
                {"role": "assistant", "content": "about why not", "id": "1"}
            ]
            assert outline(trace_of(whole.row)) == f"{root}(look_up)"
            streamed = ask(server, path, {**messages, "stream": True})
            assert len(data_of(streamed.reply.text)) == 4
            assert outline(trace_of(streamed.row)) == "predict_stream(look_up)"
        whole = ask(server, "responses", {"input": [USER]})
        assert outline(trace_of(whole.row)) == "predict(predict_stream(Completions))"
        streamed = ask(server, "responses", {"input": [USER], "stream": True})
        assert data_of(streamed.reply.text)[-1] == "[DONE]"
        assert outline(trace_of(streamed.row)) == "predict_stream(Completions)"
        refused = ask(server, "responses", {"input": [{"role": "user"}]})
        assert error_of(refused, 400)["message"].startswith(
            "the request is no ResponsesAgentRequest: input.0"
        )
        refused = ask(server, "chat", {"messages": [{"role": "user"}]})
        assert "Either 'content' or 'tool_calls' must be provided" in error_of(refused, 400)["message"]


def test_openais_client_talks_to_a_responses_agent(saved: Path, tmp_path: Path) -> None:
    """At ``/responses``, whole and streamed, as to MLflow's AgentServer."""
    from openai import OpenAI

    from tests.heavy.models import responses_agent

    with recorded(as_app(responses_agent.Agent()), tmp_path, trace_grace_seconds=30) as server:
        client = OpenAI(base_url=server.url, api_key="none")
        whole = client.responses.create(model="agent", input=[USER])
        assert whole.output_text == "You asked: why not"
        with client.responses.create(model="agent", input=[USER], stream=True) as stream:
            text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert text == "You asked: why not"
        server.find("status_code = 200 and request like '%\"stream\":%true%'")


def test_a_python_model_is_to_be_saved_first() -> None:
    """What it needs to be served comes with saving: the error says how."""
    from tests.heavy.models.python_model import Model

    with pytest.raises(SettingsError, match=r"Model is a PythonModel.*mlflow\.pyfunc\.save_model"):
        as_app(Model())


def test_a_model_from_the_registry_is_served_by_two_workers(
    environment: dict[str, str], saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``models:/name/version``; the trace refers to the logged model that it is."""
    monkeypatch.chdir(tmp_path)  # where MLflow puts its artifacts
    with advice_ignored():
        info = mlflow.pyfunc.log_model(
            name="agent",
            python_model=code("chat_agent"),
            registered_model_name="support",
            pip_requirements=[],
        )
    variables = {
        **environment,
        "INFERENCE_TABLE_URI": str(tmp_path / "payload"),
        "INFERENCE_TABLE_SPOOL_DIR": str(tmp_path / "spool"),
        "PYTHONPATH": str(ROOT),
    }
    with served("models:/support/1", "--workers", "2", env=variables, log=tmp_path / "log") as (url, _):
        for stream in (False, True) * 4:
            reply = httpx.post(
                f"{url}/invocations", json={"messages": [USER], "stream": stream}, timeout=60
            ).raise_for_status()
            assert "about" in reply.text
    found = rows(tmp_path / "payload")
    assert len(found) == 8
    for row in found:
        trace = trace_of(row)
        assert outline(trace) in ("predict(look_up)", "predict_stream(look_up)")
        assert trace.info.trace_metadata["mlflow.modelId"] == info.model_id


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("models:/nobody/1", "Registered Model with name=nobody not found"),
        ("runs:/0123/model", "Run with id=0123 not found"),
        ("broken", "cannot load the model"),
        ("{folder}", "no folder with an MLflow model"),
    ],
)
def test_a_model_that_cannot_be_had_stops_the_start(
    environment: dict[str, str], tmp_path: Path, workers: str, target: str, message: str
) -> None:
    """One line says what is wrong."""
    if target == "broken":
        save_broken(tmp_path / "broken")
        target = str(tmp_path / "broken")
    ended = serve(target.format(folder=tmp_path), tmp_path, workers, environment)
    assert ended.returncode == 1
    assert message in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr or workers == "2"


def test_a_tracking_server_that_does_not_answer_stops_the_start(tmp_path: Path) -> None:
    """Soon, and with its address; MLflow would try for minutes."""
    nobody = f"http://127.0.0.1:{free_port()}"
    ended = serve("models:/support/1", tmp_path, "2", {"MLFLOW_TRACKING_URI": nobody})
    assert ended.returncode == 1
    [line] = [line for line in ended.stderr.splitlines() if line.startswith("Error")]
    assert f"cannot get the model 'models:/support/1' from {nobody}" in line


def serve(target: str, folder: Path, workers: str, env: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """``tracelake serve`` where it is expected to end by itself."""
    command = [sys.executable, "-m", "deploy.cli", "serve", target, "--workers", workers]
    places = ["--table", str(folder / "payload"), "--spool-dir", str(folder / "spool")]
    return subprocess.run(
        [*command, "--port", str(free_port()), *places],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=200,
    )
