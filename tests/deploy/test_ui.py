"""``tracelake ui`` where the extra is missing. Where it is there: tests/heavy/test_ui.py."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from click.testing import CliRunner

from deploy.ui import ui
from inference_table.errors import TracelakeError


def has_full_mlflow() -> bool:
    try:
        return bool(version("mlflow"))
    except PackageNotFoundError:
        return False


@pytest.mark.skipif(has_full_mlflow(), reason="the whole of MLflow is installed here")
def test_without_the_extra_it_says_what_to_install(tmp_path: Path) -> None:
    """MLflow's light SDK has no server."""
    result = CliRunner().invoke(ui, ["--table", str(tmp_path)])
    assert isinstance(result.exception, TracelakeError)
    assert "pip install 'tracelake[ui]'" in str(result.exception)
