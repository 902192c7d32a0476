"""What is to be deployed: an import string, an object that can be imported, or an MLflow model."""

import difflib
import importlib.machinery
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from inference_table.errors import DeploymentError

__all__ = ["Agent", "agent_of"]

IMPORT_STRING: Final = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
REGISTERED: Final = re.compile(r"models:/+(?P<name>[^/@]+)(/(?P<version>\d+)|@(?P<alias>[^/]+))")
UNFIT: Final = re.compile(r"[^A-Za-z0-9_-]+")
FORMS: Final = (
    "give module:attribute, such as my_agent:app, a module's object, models:/name/version, runs:/id/path, "
    "a folder with a model, or a registered model's name and its version"
)


@dataclass(frozen=True, kw_only=True)
class Agent:
    """An agent that can be deployed.

    Attributes:
        given: how the user named it; ``my_agent:app``, ``models:/support-bot/3``.
        is_model: whether it is an MLflow model, to be fetched; else an import string.
        model_name: ``my_agent:app``, or the registered model's name.
        model_version: of a registered model; None where tracelake numbers the versions.
    """

    given: str
    is_model: bool
    model_name: str
    model_version: str | None = None

    @property
    def endpoint_name(self) -> str:
        """What its endpoint is called unless told: the module, or the model."""
        name = self.model_name.partition(":")[0] if not self.is_model else self.model_name
        return UNFIT.sub("-", name).strip("-_")[:63] or "agent"


def agent_of(agent: Any, version: str | None, working_dir: Path) -> Agent:
    """What is meant by ``agent``.

    Args:
        agent: as :func:`deploy.deploy` takes it.
        version: makes the name of a registered model a URI.
        working_dir: where the module of an import string is to be found.

    Raises:
        DeploymentError: it is nothing that can be deployed.
    """
    if isinstance(agent, Path):
        agent = str(agent)
    if not isinstance(agent, str):
        return imported(import_string(agent), working_dir)
    from serving.app import is_model

    if is_model(agent):
        return model(agent, version)
    if IMPORT_STRING.fullmatch(agent):
        return imported(agent, working_dir)
    if version is not None and ":" not in agent and "/" not in agent:
        return model(f"models:/{agent}/{version}", version)
    raise DeploymentError(f"cannot deploy {agent!r}: {FORMS}")


def model(uri: str, version: str | None) -> Agent:
    match = REGISTERED.fullmatch(uri)
    if match is None:
        return Agent(given=uri, is_model=True, model_name=uri.rstrip("/").rpartition("/")[2] or uri)
    number = match["version"]
    if match["alias"]:
        from serving.mlflow_model import version_of_alias

        # An alias moves on; what is deployed stays what it named today.
        number = version_of_alias(match["name"], match["alias"])
    if version is not None and version != number:
        raise DeploymentError(f"cannot deploy version {version} of {uri!r}, which names version {number}")
    return Agent(
        given=f"models:/{match['name']}/{number}",
        is_model=True,
        model_name=match["name"],
        model_version=number,
    )


def imported(target: str, working_dir: Path) -> Agent:
    """An agent by its import string; its module must be there, and isn't run here.

    Raises:
        DeploymentError: there is no such module.
    """
    module = target.partition(":")[0]
    first = module.partition(".")[0]
    if not is_importable(first, working_dir):
        raise DeploymentError(
            f"cannot deploy {target!r}: there is no module {first!r} in {working_dir} or on the Python path"
            f"{did_you_mean(first, modules_in(working_dir))}; deploy from the folder of your agent, or give "
            "working_dir"
        )
    return Agent(given=target, is_model=False, model_name=target)


def is_importable(module: str, working_dir: Path) -> bool:
    finder = importlib.machinery.PathFinder
    return (
        finder.find_spec(module, [str(working_dir)]) is not None
        or module in sys.builtin_module_names
        # Also what an editable installation put there, by a finder of its own.
        or any(
            found is not None for meta in sys.meta_path if (found := meta.find_spec(module, None)) is not None
        )
    )


def modules_in(folder: Path) -> list[str]:
    return [
        path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    ]


def did_you_mean(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def import_string(agent: Any) -> str:
    """How an object can be imported elsewhere.

    Raises:
        DeploymentError: no module has it under a name.
    """
    for module in candidates(agent):
        for name in names_of(agent, module):
            if (importable := importable_name(module)) is not None:
                return f"{importable}:{name}"
    kind = "function" if callable(agent) and hasattr(agent, "__qualname__") else type(agent).__name__
    raise DeploymentError(
        f"cannot deploy the {kind} {getattr(agent, '__name__', '')!r}: another process can't import it from "
        f"where it was made; write it into a module at its top level, and {FORMS}"
    )


def candidates(agent: Any) -> list[ModuleType]:
    """The modules that may have an object: first its own, then all that are loaded."""
    modules = [one for one in list(sys.modules.values()) if isinstance(one, ModuleType)]
    own = getattr(agent, "__module__", None)
    return sorted(modules, key=lambda module: module.__name__ != own)


def names_of(agent: Any, module: ModuleType) -> list[str]:
    if getattr(module, "__file__", None) is None:
        return []
    return [name for name, value in list(vars(module).items()) if value is agent and not name.startswith("_")]


def importable_name(module: ModuleType) -> str | None:
    """What a module is imported as; a script that runs as ``__main__`` is imported by its file's name."""
    if module.__name__ != "__main__":
        return module.__name__
    if (spec := getattr(module, "__spec__", None)) is not None:
        return str(spec.name)
    stem = Path(module.__file__ or "").stem
    return stem if stem.isidentifier() else None
