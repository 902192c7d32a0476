"""With full MLflow installed instead of the light SDK."""

from pathlib import Path

import httpx
import pytest

from tests.support import output_of, rows, served

pytestmark = pytest.mark.heavy

pytest.importorskip("mlflow.server", reason="needs the extra `heavy`: make test-all")

AGENT = "tests.heavy.mlflow_agent:app"


def environment(folder: Path, **more: str) -> dict[str, str]:
    return {
        "INFERENCE_TABLE_URI": str(folder / "payload"),
        "INFERENCE_TABLE_SPOOL_DIR": str(folder / "spool"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        **more,
    }


def span_names(row: dict[str, object]) -> list[list[str]]:
    output = output_of(row)
    traces = [output["trace"], *output.get("other_traces", [])]
    return [[span["name"] for span in trace["data"]["spans"]] for trace in traces]


def test_the_client_api_across_threads_is_one_trace(tmp_path: Path) -> None:
    """``MlflowClient().start_trace`` in the request, ``start_span`` and ``end_span`` on another thread."""
    with served(AGENT, env=environment(tmp_path), log=tmp_path / "log") as (url, _):
        reply = httpx.post(f"{url}/client", json={"q": 1}, timeout=30)
    [row] = rows(tmp_path / "payload")
    assert row["trace_id"] == reply.json()["trace_id"]
    assert span_names(row) == [["root", "child"]]
    assert row["trace_state"] == "OK"


def test_experiments_and_resets_at_run_time_do_not_switch_capture_off(tmp_path: Path) -> None:
    """What the agent does to MLflow's own tracing, its row has both traces."""
    with served(AGENT, env=environment(tmp_path), log=tmp_path / "log") as (url, _):
        for _ in range(2):
            httpx.post(f"{url}/experiment", json={"name": "mine"}, timeout=60).raise_for_status()
    for row in rows(tmp_path / "payload"):
        assert span_names(row) == [["after set_experiment"], ["after reset"]]


def test_an_explicit_experiment_gets_mlflows_own_export_beside_ours(tmp_path: Path) -> None:
    """The same trace is in our table and in MLflow's store, because the operator named an experiment."""
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    experiment_id = mlflow.create_experiment("wanted")
    more = {"MLFLOW_EXPERIMENT_ID": experiment_id, "MLFLOW_ENABLE_ASYNC_TRACE_LOGGING": "false"}
    with served(AGENT, env=environment(tmp_path, **more), log=tmp_path / "log") as (url, _):
        httpx.post(f"{url}/client", json={"q": 1}, timeout=60).raise_for_status()
    [row] = rows(tmp_path / "payload")
    stored = mlflow.get_trace(row["trace_id"])
    assert stored is not None
    assert [span.name for span in stored.data.spans] == ["root", "child"]
    assert span_names(row) == [["root", "child"]]
