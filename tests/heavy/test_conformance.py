"""MLflow's own clients of an endpoint, which only full MLflow has: ``to_predict_fn``, ``evaluate``,
``MlflowClient``."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT, output_of, rows, served

pytestmark = [
    pytest.mark.heavy,
    # MLflow warns of its own types when it imports them, which it does at the first trace.
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning"),
]

pytest.importorskip("mlflow.server", reason="needs the extra `heavy`: make test-all")

import mlflow  # noqa: E402 - not without the package
from mlflow.entities import Trace  # noqa: E402
from mlflow.tracing.provider import provider as tracer_provider  # noqa: E402
from mlflow.tracing.utils.once import Once  # noqa: E402

AGENT = "tests.heavy.endpoint_agent:app"
MESSAGES = [{"role": "user", "content": "What is Delta?"}]
ANSWER = "You asked: What is Delta?"


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tracking store with the default experiment: making one takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    with contextlib.chdir(path.parent):  # where artifacts will go
        mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def experiment(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A tracking store of the client's; its URI."""
    uri = f"sqlite:///{shutil.copy(empty_store, tmp_path / 'client.db')}"
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", "false")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow.set_tracking_uri(uri)
    # This is the client's process, as far as these tests go: others before may have had our provider in it.
    for name in ("_isolated_tracer_provider_once", "_global_provider_init_once"):
        monkeypatch.setattr(tracer_provider, name, Once())
    mlflow.tracing.reset()
    yield uri
    mlflow.set_tracking_uri(None)
    mlflow.tracing.reset()


@contextlib.contextmanager
def endpoint(folder: Path, monkeypatch: pytest.MonkeyPatch, **environment: str) -> Iterator[Path]:
    """The agent where MLflow's client looks for serving endpoints; yields its table."""
    table = folder / "payload"
    environment = {
        "INFERENCE_TABLE_URI": str(table),
        "INFERENCE_TABLE_SPOOL_DIR": str(folder / "spool"),
        "INFERENCE_TABLE_ALLOW_RETURN_TRACE": "true",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/server.db",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        **environment,
    }
    with served(AGENT, env=environment, log=folder / "log") as (url, _):
        monkeypatch.setenv("DATABRICKS_HOST", url)
        monkeypatch.setenv("DATABRICKS_TOKEN", "none")
        yield table


def stored() -> list[Trace]:
    traces: Any = mlflow.search_traces(locations=["0"], return_type="list")
    return list(traces)


def names(trace: Any) -> list[str]:
    return [span.name for span in trace.data.spans]


def test_a_predict_function_gets_the_trace(
    tmp_path: Path, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``to_predict_fn`` copies the endpoint's trace into the client's experiment; the reply is as ever."""
    with endpoint(tmp_path, monkeypatch) as table:
        predict = mlflow.genai.to_predict_fn("endpoints:/chat")
        reply = predict(messages=MESSAGES)
    message = {"role": "assistant", "content": ANSWER}
    assert reply == {"object": "chat.completion", "choices": [{"index": 0, "message": message}]}
    [copied] = stored()
    [row] = rows(table)
    assert names(copied) == names(Trace.from_dict(output_of(row)["trace"])) == ["answer", "retrieve"]
    assert copied.info.trace_id != row["trace_id"]
    assert copied.data.spans[0].inputs == {"messages": MESSAGES}
    assert copied.info.request_preview == "What is Delta?"


def test_a_predict_function_without_a_trace(
    tmp_path: Path, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the endpoint returns no trace, the client makes one of its own."""
    with endpoint(tmp_path, monkeypatch, INFERENCE_TABLE_ALLOW_RETURN_TRACE="false") as table:
        reply = mlflow.genai.to_predict_fn("endpoints:/chat")(messages=MESSAGES)
    assert reply["choices"][0]["message"]["content"] == ANSWER
    assert [names(trace) for trace in stored()] == [["predict"]]
    assert len(rows(table)) == 1


def test_a_predict_function_of_an_endpoint_that_exports(
    tmp_path: Path, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An endpoint that writes into the client's experiment as well: the trace is there once."""
    export = {"MLFLOW_EXPERIMENT_ID": "0", "MLFLOW_TRACKING_URI": experiment}
    with endpoint(tmp_path, monkeypatch, **export) as table:
        reply = mlflow.genai.to_predict_fn("endpoints:/chat")(messages=MESSAGES)
    assert reply["choices"][0]["message"]["content"] == ANSWER
    [row] = rows(table)
    assert [(trace.info.trace_id, names(trace)) for trace in stored()] == [
        (row["trace_id"], ["answer", "retrieve"])
    ]


@pytest.mark.filterwarnings("ignore:Starting with pandas version 4.0")  # MLflow's use of it
def test_an_evaluation_of_an_endpoint(
    tmp_path: Path, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``mlflow.genai.evaluate`` scores the endpoint's own spans; it asks once more to begin with."""

    @mlflow.genai.scorer
    def retrieved(trace: Trace) -> bool:
        return "retrieve" in names(trace)

    questions = ["What is Delta?", "What is Arrow?"]
    data = [{"inputs": {"messages": [{"role": "user", "content": text}]}} for text in questions]
    with endpoint(tmp_path, monkeypatch) as table:
        predict = mlflow.genai.to_predict_fn("endpoints:/chat")
        result = mlflow.genai.evaluate(data=data, predict_fn=predict, scorers=[retrieved])
    assert result.metrics["retrieved/mean"] == 1.0
    assert len(rows(table)) == len(questions) + 1


def test_the_switch(tmp_path: Path) -> None:
    """``ENABLE_MLFLOW_TRACING`` unset, off and on, with the real ``MlflowClient``."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "INFERENCE_TABLE_URI": str(tmp_path / "payload"),
        "INFERENCE_TABLE_SPOOL_DIR": str(tmp_path / "spool"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.serving.switches"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
