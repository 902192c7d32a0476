"""Evaluation end to end, as the guide shows it: feedback, a golden set, MLflow's scores, no hosted model."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from inference_table.annotations import AnnotationLog
from inference_table.settings import StorageSettings
from inference_table.table import InferenceTable
from tests.support import ROOT, Process, answers, free_port, rows, served, wait_for

pytest.importorskip("mlflow.genai")
pytestmark = pytest.mark.heavy

EVALUATION = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
FEEDBACK = (ROOT / "docs" / "feedback.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Guide:
    """A folder in which the guide's files lie, and its agent was asked."""

    folder: Path
    env: Mapping[str, str]

    def run(self, name: str) -> str:
        """What one of the guide's files prints."""
        done = subprocess.run(
            [sys.executable, name], cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guide]:
    folder = tmp_path_factory.mktemp("evaluation")
    settings = {
        "INFERENCE_TABLE_URI": str(folder / "payload"),
        "INFERENCE_TABLE_SPOOL_DIR": str(folder / "spool"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    [serve] = re.findall(r"```sh\nTRACELAKE_FEEDBACK=true tracelake serve (.*)\n```", EVALUATION)
    with served(
        serve,
        "--app-dir",
        str(folder),
        env={**settings, "TRACELAKE_FEEDBACK": "true"},
        log=written(folder) / "log",
    ) as (url, _):
        ask = folder / "ask.py"
        text = ask.read_text(encoding="utf-8")
        ask.write_text(text.replace("http://localhost:8000", url), encoding="utf-8")
        guide = Guide(folder, {**os.environ, **settings, "PYTHONPATH": str(ROOT)})
        guide.run("ask.py")
        wait_for(lambda: len(rows(folder / "payload")) == 3, "the rows")
    guide.run("choose.py")
    yield guide


def written(folder: Path) -> Path:
    """The folder, with each file of the guide in it."""
    for name, text in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", EVALUATION, re.DOTALL):
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_the_golden_set(guide: Guide) -> None:
    """It has what was asked, answered, and expected, and says where it is from."""
    lines = (guide.folder / "golden.jsonl").read_text(encoding="utf-8").splitlines()
    records = {record["inputs"]["question"]: record for record in map(json.loads, lines)}
    assert records["Can I return it?"]["outputs"] == "Within 14 days."
    assert records["Can I return it?"]["expectations"] == {"answer": "Within 30 days."}
    assert [one["value"] for one in records["Can I return it?"]["feedback"]] == [False]
    assert {record["source"]["source_data"]["table"] for record in records.values()} == {
        str(guide.folder / "payload")
    }
    assert len(records) == 3


def test_the_next_version_is_better(guide: Guide) -> None:
    """MLflow's scores of the recorded answers and of the next version's are what the guide shows."""
    [shown] = re.findall(r"```\n(correct: .*)\n```", EVALUATION)
    assert shown in guide.run("judge.py").splitlines()


def test_as_a_dataset_of_mlflow(guide: Guide) -> None:
    """It is made once; the second time its records are updated."""
    assert "shop-golden 3" in guide.run("dataset.py")
    assert "shop-golden 3" in guide.run("dataset.py")
    check = """
import mlflow, shop_agent_2
from mlflow.genai.scorers import scorer
mlflow.set_tracking_uri("sqlite:///mlflow.db")
mlflow.set_experiment("shop")
dataset = mlflow.genai.datasets.get_dataset(name="shop-golden")
assert "feedback where" in dataset.tags["tracelake.query"], dataset.tags
@scorer
def correct(outputs, expectations):
    return outputs == expectations["answer"]
result = mlflow.genai.evaluate(
    data=dataset, scorers=[correct], predict_fn=lambda **inputs: shop_agent_2.predict(inputs)
)
print("mean", result.metrics["correct/mean"])
"""
    (guide.folder / "check.py").write_text(check, encoding="utf-8")
    assert "mean 1.0" in guide.run("check.py")


def test_on_the_traces(guide: Guide) -> None:
    """Scorers see the recorded traces, with people's expectations as their assessments."""
    assert "correct: 0.33, quick: 1.00" in guide.run("traces.py")


def test_the_guide_to_feedback(tmp_path: Path) -> None:
    """Its agent is the README's; its requests, its query and its Python do what it says."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [agent] = re.findall(r"```python\n# my_agent\.py\n(.*?)```", readme, re.DOTALL)
    (tmp_path / "my_agent.py").write_text(agent, encoding="utf-8")
    env = {
        "INFERENCE_TABLE_URI": str(tmp_path / "payload"),
        "INFERENCE_TABLE_SPOOL_DIR": str(tmp_path / "spool"),
        "TRACELAKE_FEEDBACK": "true",
    }
    [shell] = re.findall(
        r"```sh\nTRACELAKE_FEEDBACK=true tracelake serve my_agent:app &\n(.*?)```", FEEDBACK, re.DOTALL
    )
    with served("my_agent:app", "--app-dir", str(tmp_path), env=env, log=tmp_path / "log") as (url, _):
        script = shell.replace("localhost:8000", url.removeprefix("http://"))
        script = script.replace("tracelake query", f"{sys.executable} -m deploy.cli query")
        done = subprocess.run(
            ["bash", "-ec", script],
            cwd=tmp_path,
            env={**os.environ, **env, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    assert "short and right" in done.stdout
    [row] = rows(tmp_path / "payload")
    log = AnnotationLog(StorageSettings(uri=env["INFERENCE_TABLE_URI"]))
    assert log.read(request_ids=[row["databricks_request_id"]]).num_rows == 1
    [python] = re.findall(r"```python\n(from inference_table.annotations.*?)```", FEEDBACK, re.DOTALL)
    program = f"request_id = {row['databricks_request_id']!r}\n{python}"
    subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, **env}, check=True, timeout=120
    )
    assert log.read(request_ids=[row["databricks_request_id"]], kind="tag").num_rows == 1
    [sql] = re.findall(r"```sql\n(.*?)```", FEEDBACK, re.DOTALL)
    [voted] = InferenceTable(env["INFERENCE_TABLE_URI"]).query(sql).to_dicts()
    assert (voted["liked"], voted["votes"]) == (1.0, 1)


def test_the_route_of_the_guide(tmp_path: Path) -> None:
    """In an app of one's own: feedback is taken, and is no row; what is asked is."""
    [app] = re.findall(r"```python\n(from fastapi.*?)```", FEEDBACK, re.DOTALL)
    (tmp_path / "own_app.py").write_text(app, encoding="utf-8")
    env = {
        "ENABLE_MLFLOW_TRACING": "true",
        "INFERENCE_TABLE_URI": str(tmp_path / "payload"),
        "INFERENCE_TABLE_SPOOL_DIR": str(tmp_path / "spool"),
    }
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "uvicorn",
        "own_app:app",
        "--app-dir",
        str(tmp_path),
        "--port",
        str(port),
    ]
    server, url = Process(command, env, tmp_path / "log"), f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: answers(url), "the server", 60)
        said = {"trace_id": "tr-1", "value": 1}
        assert httpx.post(f"{url}/feedback", json=said, timeout=60).status_code == 200
        asked = httpx.post(f"{url}/invocations", json={}, timeout=60).headers["x-databricks-request-id"]
        server.stop()
    finally:
        server.kill_group()
    assert [row["databricks_request_id"] for row in rows(tmp_path / "payload")] == [asked]
