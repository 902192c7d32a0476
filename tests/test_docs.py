"""The guides say what is true: versions are those of the tests, examples run as they stand."""

import ast
import inspect
import re
import shlex
from pathlib import Path

import httpx

from deploy import Deployment, deploy
from tests.support import ROOT, output_of, rows, served

AGENTS = (ROOT / "docs" / "agents.md").read_text(encoding="utf-8")
DEPLOY = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")


def test_the_versions_of_the_table_are_those_of_the_tests() -> None:
    """Each is pinned in the constraints, or is the lowest version of MLflow that the matrix runs."""
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    versions = re.findall(r"([a-z-]+) (\d+\.\d+\.\d+)(?:, (\d+\.\d+\.\d+))?", AGENTS)
    assert len(versions) >= 14
    for package, version, other in versions:
        if other:  # lowest and newest
            assert f"MLFLOW_VERSIONS := {version} {other}" in makefile
        assert f"{package}=={other or version}" in constraints


def test_the_function_of_the_guide_streams_what_the_guide_shows(tmp_path: Path) -> None:
    """Its agent under ``tracelake serve``, its request, the events of its reply, and their row."""
    [agent] = re.findall(r"```python\n(# my_agent\.py\n.*?)```", AGENTS, re.DOTALL)
    [(serve, curl)] = re.findall(r"```sh\n(tracelake serve my_agent.*?)\n(curl .*?)\n```", AGENTS, re.DOTALL)
    [shown] = re.findall(r"```\n(data: .*?)```", AGENTS, re.DOTALL)
    (tmp_path / "my_agent.py").write_text(agent, encoding="utf-8")
    target = shlex.split(serve)[2]
    env = {"INFERENCE_TABLE_URI": str(tmp_path / "t"), "INFERENCE_TABLE_SPOOL_DIR": str(tmp_path / "s")}
    with served(target, "--app-dir", str(tmp_path), env=env, log=tmp_path / "log") as (url, _):
        reply = httpx.post(f"{url}/invocations", content=shlex.split(curl)[-1], timeout=30)
    assert reply.text == shown
    [row] = rows(tmp_path / "t")
    assert [span["name"] for span in output_of(row)["trace"]["data"]["spans"]] == ["predict"]


def test_the_options_of_the_deployment_guide_are_those_of_deploy() -> None:
    """Each that is named exists, and none of the local engine's is missing."""
    section = DEPLOY.partition("## Options\n")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([a-z_]+)[`=]", section)) - {"deploy"}
    taken = set(inspect.signature(deploy).parameters)
    assert named <= taken
    assert taken - named == {
        *("agent", "version", "ray_address", "route_prefix", "ray_actor_options", "max_ongoing_requests"),
        "spool_dir",
    }
    assert "spool_dir" in (inspect.getdoc(deploy) or "")


def test_the_python_of_the_deployment_guide_compiles() -> None:
    """Each block, as it stands; and it calls nothing that isn't there."""
    blocks = re.findall(r"```python\n(.*?)```", DEPLOY, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        names = {node.id for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Name)}
        assert names <= {"deploy", "delete_deployment", "deployment"}
        called = {node.attr for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Attribute)}
        assert all(hasattr(Deployment, name) for name in called)
