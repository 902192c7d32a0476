"""``deploy()`` with what users bring: a LangGraph agent, MLflow models; and the same agent on Ray."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy import Deployment, DeploymentError, delete_deployment, deploy, list_deployments
from tests.heavy.graph_agents import write_graph, write_model
from tests.heavy.ui_server import object_store
from tests.support import free_port, output_of, rows, wait_for

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(600)]

pytest.importorskip("mlflow.pyfunc", reason="needs the extra `heavy`: make test-all")
mlflow = pytest.importorskip("mlflow")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TRACELAKE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    for one in {one.endpoint_name for one in list_deployments()}:
        with contextlib.suppress(DeploymentError):
            delete_deployment(one)


def ask(deployment: Deployment, body: dict[str, Any]) -> Any:
    return httpx.post(deployment.query_endpoint, json=body, timeout=60).raise_for_status().json()


def test_a_langgraph_agent_from_nothing_to_a_rollback(project: Path) -> None:
    """Two lines and a request make a row with the graph's spans; then a version, a split, and back."""
    write_graph(project, "one")
    first = deploy("graph_agent:predict", port=free_port(), wait_seconds=180)
    assert ask(first, {"question": "why?"})["answer"] == "one: why?"
    [row] = wait_for(lambda: rows(first.table), "the row")
    names = [span["name"] for span in output_of(row)["trace"]["data"]["spans"]]
    assert {"predict", "LangGraph", "look_up"} <= set(names)
    write_graph(project, "two")
    second = deploy("graph_agent:predict", traffic={"1": 50, "2": 50}, wait_seconds=180)
    answers = [ask(second, {"question": "?"})["answer"] for _ in range(40)]
    assert set(answers) == {"one: ?", "two: ?"}
    back = deploy("graph_agent:predict", version=1)
    assert {ask(back, {"question": "?"})["answer"] for _ in range(5)} == {"one: ?"}
    back.stop()
    entities = [row["served_entity_id"] for row in rows(first.table)]
    assert entities.count("graph_agent/2") == answers.count("two: ?")
    assert len(entities) == 46


# MLflow's registry uses what SQLAlchemy will drop; so do its models of their own types.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_models_are_deployed_by_name_folder_and_alias(project: Path) -> None:
    """As on Databricks by name and version; kept as they were, whatever becomes of the registry."""
    with mlflow.start_run():
        for answer in ("one", "two"):
            mlflow.pyfunc.log_model(
                name="model",
                python_model=write_model(project, answer),
                pip_requirements=[],
                registered_model_name="echo",
            )
    mlflow.MlflowClient().set_registered_model_alias("echo", "champion", "2")
    port = free_port()
    first = deploy("echo", 1, port=port, wait_seconds=180)
    assert (first.model_name, first.model_version, first.served_entity_name) == ("echo", "1", "echo/1")
    assert ask(first, {"inputs": ["a"]}) == {"predictions": ["one a"]}
    second = deploy("models:/echo@champion", wait_seconds=180)
    assert (second.model_version, second.endpoint_url) == ("2", first.endpoint_url)
    assert ask(second, {"inputs": ["a"]}) == {"predictions": ["two a"]}
    mlflow.MlflowClient().delete_registered_model("echo")
    third = deploy("models:/echo/1", wait_seconds=180)
    assert ask(third, {"inputs": ["a"]}) == {"predictions": ["one a"]}
    delete_deployment("echo")
    [entity] = {row["served_entity_id"] for row in rows(first.table, "status_code = 200")} - {"echo/2"}
    assert entity == "echo/1"
    mlflow.pyfunc.save_model(
        project / "saved", python_model=write_model(project, "three"), pip_requirements=[]
    )
    saved = deploy("./saved", port=port, wait_seconds=180)
    assert saved.served_entity_name == "saved/1"
    assert ask(saved, {"inputs": ["a"]}) == {"predictions": ["three a"]}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_a_model_in_an_object_store_leaves_no_download(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is fetched into the version's copy, and nowhere else."""
    with object_store(tmp_path) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", environment["AWS_ENDPOINT_URL"])
        experiment = mlflow.MlflowClient().create_experiment("remote", "s3://bucket/models")
        with mlflow.start_run(experiment_id=experiment):
            mlflow.pyfunc.log_model(
                name="model",
                python_model=write_model(project, "far"),
                pip_requirements=[],
                registered_model_name="far",
            )
        temporary = tmp_path / "tmp"
        temporary.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(temporary))
        deployed = deploy("models:/far/1", port=free_port(), wait_seconds=180)
    assert ask(deployed, {"inputs": ["a"]}) == {"predictions": ["far a"]}
    assert list(temporary.iterdir()) == []


def test_a_model_that_is_not_there_is_named(project: Path) -> None:
    """And nothing is left behind."""
    with pytest.raises(ValueError, match="'models:/nobody/7'"):
        deploy("nobody", 7)
    assert list_deployments() == []
