"""``tracelake serve``: any agent, recorded, with metrics."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from inference_table.errors import SettingsError
from inference_table.settings import StorageSettings
from serving.exposition import MetricsApp
from serving.serve import serve
from tests.serving.recorded import outline, trace_of
from tests.support import ROOT, free_port, rows, running, served, wait_for

AGENT = "tests.deploy.kill_agent:app"
FUNCTIONS = "tests.serving.function_agents"


def environment(folder: Path) -> dict[str, str]:
    return {
        "INFERENCE_TABLE_URI": str(folder / "payload"),
        "INFERENCE_TABLE_SPOOL_DIR": str(folder / "spool"),
        "INFERENCE_TABLE_FLUSH_SECONDS": "0.2",
    }


def metric(text: str, name: str) -> float:
    match = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    assert match is not None, f"{name} is not among the metrics"
    return float(match[1])


def test_metrics_count_all_workers(tmp_path: Path) -> None:
    """Whichever of two workers answers, /metrics has what both of them did."""
    with served(AGENT, "--workers", "2", env=environment(tmp_path), log=tmp_path / "log") as (url, _):
        for number in range(40):
            # A new connection each time, so that both workers get some.
            httpx.post(f"{url}/invocations", json={"number": number})
        committed = wait_for(lambda: len(rows(tmp_path / "payload")) == 40, "the rows")
        assert committed
        texts = [httpx.get(f"{url}/metrics").text for _ in range(8)]
    for text in texts:
        assert metric(text, "tracelake_captured_total") == 40
        assert metric(text, "tracelake_spooled_total") == 40
        assert metric(text, "tracelake_capture_overhead_seconds_count") == 40
        assert metric(text, "tracelake_writer_up") == 1
        assert metric(text, "tracelake_spool_segments") == 0
    assert metric(texts[-1], "tracelake_committed_total") == 40


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_server_that_stopped_leaves_no_temporary_files(tmp_path: Path, workers: str) -> None:
    """uvicorn ends a single process by the signal that stopped it, before it could clean up."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    env = {**environment(tmp_path), "TMPDIR": str(temporary)}
    with served(AGENT, "--workers", workers, env=env, log=tmp_path / "log") as (url, _):
        httpx.post(f"{url}/invocations", json={}).raise_for_status()
    assert list(temporary.iterdir()) == []


def test_settings_of_the_command_line_reach_the_workers(tmp_path: Path) -> None:
    """Options win over the environment, in every worker."""
    arguments = ("--workers", "2", "--durability", "strict", "--served-entity", "bot/7")
    with served(AGENT, *arguments, env=environment(tmp_path), log=tmp_path / "log") as (url, _):
        replies = [httpx.post(f"{url}/invocations", json={}) for _ in range(10)]
    assert {reply.headers["x-inference-table-durability"] for reply in replies} == {"spooled"}
    assert [row["served_entity_id"] for row in rows(tmp_path / "payload")] == ["bot/7"] * 10


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("tests.deploy.no_such_agent:app", "there is no module 'tests.deploy.no_such_agent'"),
        ("tests.deploy.kill_agent:ap", "has no attribute 'ap'"),
        ("tests.deploy.kill_agent:Any.x", "has no attribute 'Any.x'"),
        ("tests.deploy.kill_agent", "give module:attribute"),
        ("./no/such/model", "no folder with an MLflow model"),
        (f"{FUNCTIONS}:Agent", "Agent is a class; make an instance of it"),
        (f"{FUNCTIONS}:make_app", "make_app() takes no argument"),
        (f"{FUNCTIONS}:two", "can't be called with the request alone"),
    ],
)
def test_an_app_that_cannot_be_imported_stops_the_start(
    tmp_path: Path, workers: str, target: str, message: str
) -> None:
    """One line says what is wrong, also where workers would be started again for ever."""
    command = [sys.executable, "-m", "deploy.cli", "serve", target, "--workers", workers]
    ended = subprocess.run(
        [
            *command,
            "--port",
            str(free_port()),
            "--table",
            str(tmp_path / "payload"),
            "--spool-dir",
            str(tmp_path),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.returncode == 1
    assert message in ended.stderr.splitlines()[-1]


def test_a_function_is_served_by_workers(tmp_path: Path) -> None:
    """A function in a module, whole and streamed, in several processes; /metrics is beside it."""
    arguments = (f"{FUNCTIONS}:predict", "--workers", "2")
    with served(*arguments, env=environment(tmp_path), log=tmp_path / "log") as (url, _):
        for _ in range(10):
            reply = httpx.post(f"{url}/invocations", json={"question": "why"})
            assert reply.json() == {"found": ["about why"]}
        assert "tracelake_captured_total" in httpx.get(f"{url}/metrics").text
    traces = [trace_of(row) for row in rows(tmp_path / "payload")]
    assert [outline(trace) for trace in traces] == ["predict(search)"] * 10


@pytest.mark.skipif(importlib.util.find_spec("mlflow.pyfunc") is not None, reason="full MLflow is here")
def test_a_model_without_full_mlflow_stops_the_start(tmp_path: Path) -> None:
    """The error names what to install."""
    (tmp_path / "MLmodel").write_text("flavors: {}")
    for target in ("models:/support/1", str(tmp_path)):
        with pytest.raises(SettingsError, match=r"need the whole of MLflow .*tracelake\[mlflow\]"):
            serve(target, settings={"uri": str(tmp_path / "payload"), "spool_dir": tmp_path / "spool"})


def test_metrics_can_be_mounted_anywhere(tmp_path: Path) -> None:
    """An app without capture exposes what the spool of its machine holds."""
    app = FastAPI()
    app.mount("/metrics", MetricsApp(StorageSettings.from_environ({}, spool_dir=tmp_path)))
    with running(app) as url:
        text = httpx.get(f"{url}/metrics/").text
    assert metric(text, "tracelake_spool_bytes") == 0
    assert metric(text, "tracelake_oldest_uncommitted_seconds") == 0
