"""The versions of MLflow: what is claimed is what `make test-mlflow-matrix` runs; others are refused."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import serving.tracing
from serving.mlflow_version import LOWEST, NEWEST, SUPPORTED
from tests.support import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

AGENT = """
from fastapi import FastAPI
from serving import InferenceTableMiddleware

app = FastAPI()
app.add_middleware(InferenceTableMiddleware)
"""
COMMANDS = {
    "uvicorn": ["-m", "uvicorn", "my_agent:app", "--port", "0"],
    "tracelake serve": ["-m", "deploy.cli", "serve", "my_agent:app", "--port", "0"],
}


def matrix() -> list[Version]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    [versions] = re.findall(r"^MLFLOW_VERSIONS := (.+)$", makefile, re.MULTILINE)
    return sorted(map(Version, versions.split()))


def bounds(requirements: list[str], name: str) -> dict[str, Version]:
    """By operator, what a requirement asks for."""
    [requirement] = [found for found in map(Requirement, requirements) if found.name == name]
    return {specifier.operator: Version(specifier.version) for specifier in requirement.specifier}


def test_the_range_that_pip_takes_is_the_range_that_is_tested() -> None:
    """From the lowest version of the matrix to the last of its newest version's line."""
    lowest, *_, newest = matrix()
    above = Version(f"{newest.major}.{newest.minor + 1}")
    assert bounds(PROJECT["dependencies"], "mlflow-tracing") == {">=": lowest, "<": above}
    assert bounds(PROJECT["optional-dependencies"]["mlflow"], "mlflow")["<"] == above
    assert (lowest.release[:2], newest.release[:2]) == (LOWEST, NEWEST)
    assert SUPPORTED in PROJECT["dependencies"]


def test_the_newest_version_is_that_of_all_other_tests() -> None:
    """The constraints pin it."""
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    for name in ("mlflow", "mlflow-skinny", "mlflow-tracing"):
        assert f"{name}=={matrix()[-1]}" in constraints


def test_the_private_names_are_listed_with_the_versions_that_have_them() -> None:
    """The docstring that a maintainer reads names the versions of the matrix."""
    lowest, *_, newest = matrix()
    assert f"tested with {lowest} and {newest}" in (serving.tracing.__doc__ or "")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("version", ["3.14.0", "3.18.0.dev0", "4.0.0"])
def test_another_version_stops_the_start(tmp_path: Path, version: str, command: str) -> None:
    """A clear message and no server, even where other files took the place of some, so that none imports."""
    (tmp_path / "my_agent.py").write_text(AGENT, encoding="utf-8")
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "__init__.py").write_text("import of_a_package_it_needs", encoding="utf-8")
    (tmp_path / "mlflow" / "version.py").write_text(f'VERSION = "{version}"\n', encoding="utf-8")
    stopped = subprocess.run(
        [sys.executable, *COMMANDS[command]],
        cwd=tmp_path,
        env={"ENABLE_MLFLOW_TRACING": "true", "PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert stopped.returncode != 0
    assert f"MLflow {version} is not supported" in stopped.stderr
    assert f"pip install '{SUPPORTED}'" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert "startup complete" not in stopped.stderr


def test_no_version_at_all() -> None:
    """Said as clearly. ``-S`` leaves out what is installed."""
    code = "from serving.mlflow_version import check_mlflow; check_mlflow()"
    stopped = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert f"MLflow is not installed: pip install '{SUPPORTED}'" in stopped.stderr
