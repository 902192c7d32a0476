"""What holds across files: imports flow one way, MLflow is touched where it may be, exports exist."""

import ast
import importlib
from pathlib import Path

import pytest

from tests.support import ROOT

BELOW = {
    "inference_table": set[str](),
    "serving": {"inference_table"},
    "deploy": {"serving", "inference_table"},
}
TOUCH_MLFLOW = {
    "inference_table/mlflow_metrics.py": "the store behind MLflow's UI",
    "inference_table/mlflow_notes.py": "the store behind MLflow's UI",
    "inference_table/mlflow_rows.py": "the store behind MLflow's UI",
    "inference_table/mlflow_search.py": "the store behind MLflow's UI",
    "inference_table/mlflow_store.py": "the store behind MLflow's UI",
    "inference_table/golden.py": "makes datasets of MLflow's",
    "serving/opinion.py": "feedback in MLflow's form",
    "inference_table/table.py": "traces are returned as mlflow.entities.Trace",
    "deploy/bench.py": "switches tracing off where nothing is captured",
    "deploy/span_tree.py": "draws mlflow.entities.Trace",
    "deploy/trace_html.py": "shows mlflow.entities.Trace in MLflow's viewer",
    "inference_table/notebook.py": "draws mlflow.entities.Trace",
    "serving/invocation.py": "makes the root span of an agent function",
    "serving/mlflow_model.py": "serves MLflow's models and agents",
    "serving/tracing.py": "trace collection",
    "serving/traces.py": "trace collection",
    "serving/nesting.py": "trace collection",
    "serving/threads.py": "trace collection",
    "serving/spans.py": "trace collection",
    "serving/model_streams.py": "trace collection",
    "serving/snapshot.py": "trace collection",
    "serving/trace_info.py": "trace collection",
    "serving/trace_json.py": "trace collection",
}
MODULES = sorted(path for package in BELOW for path in (ROOT / package).glob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level names of all modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_flow_one_way(path: Path) -> None:
    """deploy → serving → inference_table, never back."""
    package = path.parent.name
    assert imported(path) & BELOW.keys() <= BELOW[package] | {package}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_mlflow_is_touched_where_it_may_be(path: Path) -> None:
    """A new version of MLflow can only break the files that are known to depend on it."""
    assert "mlflow" not in imported(path) or str(path.relative_to(ROOT)) in TOUCH_MLFLOW


NEED_AN_EXTRA = {
    path for path in MODULES if path.stem.startswith("mlflow_") and path.parent.name == "inference_table"
}
"""Modules that can't be imported without the whole of MLflow."""


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_exports_exist_and_are_sorted(path: Path) -> None:
    """``__all__`` names what is there, in order."""
    if path in NEED_AN_EXTRA:
        pytest.importorskip("sqlalchemy", reason="needs the extra `ui`")
    name = f"{path.parent.name}.{path.stem}".removesuffix(".__init__")
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", [])
    assert all(hasattr(module, one) for one in exported)
    assert list(exported) == sorted(exported, key=lambda one: (not one.isupper(), not one[0].isupper(), one))
