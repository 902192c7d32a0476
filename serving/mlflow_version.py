"""The versions of MLflow that trace collection works with.

It uses private names (listed in :mod:`serving.tracing`), which any version may change. pip installs one that
was tested, but another may take its place: full MLflow, ``mlflow-skinny`` and ``mlflow-tracing`` share a
folder, and the last to be installed wins.
"""

import runpy
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from inference_table.errors import SettingsError

__all__ = ["LOWEST", "NEWEST", "check_mlflow"]

LOWEST: Final = (3, 15)
NEWEST: Final = (3, 17)
"""Whatever its patch: those bring fixes only."""
SUPPORTED: Final = f"mlflow-tracing>={LOWEST[0]}.{LOWEST[1]},<{NEWEST[0]}.{NEWEST[1] + 1}"


def check_mlflow() -> None:
    """See that the MLflow at hand can be traced; to be called before what needs it is imported.

    Raises:
        SettingsError: there is none, or of a version that was not tested.
    """
    version = installed_version()
    if version is None:
        raise SettingsError(f"MLflow is not installed: pip install '{SUPPORTED}'")
    major, minor = map(int, version.split(".")[:2])
    if not LOWEST <= (major, minor) <= NEWEST:
        raise SettingsError(
            f"MLflow {version} is not supported: pip install '{SUPPORTED}', and the same version of mlflow "
            "or mlflow-skinny where one is installed (they share a folder)"
        )


def installed_version() -> str | None:
    """Of the package that an import would find. Not imported: a mixture of two versions may fail at that."""
    package = find_spec("mlflow")
    if package is None or package.origin is None:
        return None
    return str(runpy.run_path(str(Path(package.origin).with_name("version.py")))["VERSION"])
