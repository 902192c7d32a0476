"""Versions of an endpoint: a frozen copy of the agent, and all that it takes to run it again."""

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from deploy.agents import Agent
from deploy.arguments import OURS
from deploy.registry import Endpoint, EndpointFolder, Version, write_json
from inference_table.errors import DeploymentError
from serving.server_settings import PYTHON_PATH_VARIABLE

__all__ = ["VersionPlan", "discard", "version_for"]

CODE: Final = "code"
MODEL: Final = "model"
KEYS_VARIABLE: Final = "TRACELAKE_API_KEY_FILE"


@dataclass(frozen=True, kw_only=True)
class VersionPlan:
    """What was asked of a version."""

    agent: Agent
    version: str | None
    """The one that is asked for by its number; None for a new one."""
    working_dir: Path
    workers: int
    tags: dict[str, str] = field(default_factory=dict)
    description: str | None = None
    environment_vars: dict[str, str] = field(default_factory=dict)
    server: Mapping[str, str] = field(default_factory=dict)
    """Environment variables that arguments of ``deploy`` stand for."""
    options: dict[str, Any] = field(default_factory=dict)


def version_for(folder: EndpointFolder, endpoint: Endpoint, plan: VersionPlan) -> Version:
    """The version that a plan means: one that is there, or a new one, frozen now.

    Raises:
        DeploymentError: there is no such version, or its agent can't be frozen.
    """
    number = plan.agent.model_version or plan.version or str(endpoint.last_number + 1)
    if (known := folder.version(number)) is not None:
        check_unchanged(known, endpoint, plan)
        return known
    if plan.version is not None and plan.agent.model_version is None:
        kept = ", ".join(folder.version_numbers()) or "none"
        raise DeploymentError(
            f"cannot deploy version {number} of {endpoint.name!r}: there is no such version; kept: {kept}; "
            "leave version out to deploy the agent as it is now"
        )
    return freeze_version(folder, endpoint, number, plan)


def check_unchanged(known: Version, endpoint: Endpoint, plan: VersionPlan) -> None:
    """Refuse what would make another version of one that is there."""
    asked = {
        "environment_vars": plan.environment_vars,
        "tags": plan.tags,
        "description": plan.description,
        "settings": plan.server,
        "replicas": plan.options,
        "workers": plan.workers != 1 and plan.workers != known.workers,
    }
    if known.agent != plan.agent.given:
        raise DeploymentError(
            f"cannot deploy {plan.agent.given!r} as version {known.number} of {endpoint.name!r}, which is "
            f"{known.agent!r}; give another endpoint_name"
        )
    if changed := [name for name, value in asked.items() if value]:
        raise DeploymentError(
            f"cannot deploy version {known.number} of {endpoint.name!r} with other {', '.join(changed)}: it "
            "is served again as it was; for a change deploy a new version"
        )


def freeze_version(folder: EndpointFolder, endpoint: Endpoint, number: str, plan: VersionPlan) -> Version:
    """Make a version on disk: all of it under its final name, or nothing."""
    final = folder.version_folder(number)
    new = final.with_name(f".new-{number}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(mode=0o700, parents=True)
    try:
        target, copy = freeze_agent(plan, new)
        working_dir = final / copy
        # Of a model: the folder itself, which on a cluster lies elsewhere on each node.
        target = target or (str(working_dir) if endpoint.engine == "local" else ".")
        version = Version(
            number=number,
            agent=plan.agent.given,
            target=target,
            model_name=plan.agent.model_name,
            model_version=number,
            working_dir=str(working_dir),
            environment=environment(endpoint, number, plan, target, new / copy, working_dir),
            workers=plan.workers,
            python=sys.executable,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            tags=plan.tags,
            description=plan.description,
            options=plan.options,
        )
        write_json(new / "version.json", version.to_json())
        # One that is in the way was left by a deployer who was killed before it was of any use.
        shutil.rmtree(final, ignore_errors=True)
        new.rename(final)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    return version


def freeze_agent(plan: VersionPlan, new: Path) -> tuple[str | None, str]:
    """Copy the agent; its import string (None for a model), and the name of the copy."""
    if not plan.agent.is_model:
        # Here: the supervisor, which imports this package too, never freezes anything.
        from deploy.freeze import freeze

        freeze(plan.working_dir, new / CODE)
        return plan.agent.given, CODE
    from serving.mlflow_model import fetch_model

    # MLflow copies it to a folder that we name, or downloads it into one of its own that nobody removes.
    with tempfile.TemporaryDirectory(dir=new, ignore_cleanup_errors=True) as folder:
        Path(fetch_model(plan.agent.given, folder)).rename(new / MODEL)
    return None, MODEL


def environment(
    endpoint: Endpoint, number: str, plan: VersionPlan, target: str, copy: Path, working_dir: Path
) -> dict[str, str]:
    """The environment of a version's workers: on a cluster, what is added to that of its nodes."""
    inherited = dict(os.environ) if endpoint.engine == "local" else {}
    ours = {
        "ENABLE_MLFLOW_TRACING": "true",
        "INFERENCE_TABLE_URI": endpoint.table,
        "INFERENCE_TABLE_SERVED_ENTITY": f"{endpoint.name}/{number}",
        "TRACELAKE_APP": target,
    }
    if endpoint.spool_dir:
        ours["INFERENCE_TABLE_SPOOL_DIR"] = endpoint.spool_dir
    folders = [Path(), *frozen_paths(plan.working_dir, copy)]
    if endpoint.engine == "local":
        folders = [working_dir / folder for folder in folders]
    # Of a replica, they are relative to where its node has put the copy.
    ours[PYTHON_PATH_VARIABLE] = os.pathsep.join(map(str, folders))
    given = {**inherited, **plan.environment_vars}
    if keys := given.get(KEYS_VARIABLE):
        # Relative to where it was given, which isn't where the workers are.
        ours[KEYS_VARIABLE] = str(Path(keys).expanduser().absolute())
    merged = {**given, **ours, **plan.server}
    return {name: value for name, value in merged.items() if name in ours or name not in OURS}


def frozen_paths(working_dir: Path, copy: Path) -> list[Path]:
    """What of this process's Python path lies in the working folder, and so in the copy: ``src``, say."""
    root = working_dir.resolve()
    inside = [Path(entry).resolve() for entry in sys.path if entry]
    relative = [path.relative_to(root) for path in inside if path.is_relative_to(root) and path != root]
    return [path for path in dict.fromkeys(relative) if (copy / path).is_dir()]


def discard(folder: EndpointFolder, number: str) -> None:
    """Delete a version with its log."""
    shutil.rmtree(folder.version_folder(number), ignore_errors=True)
    for log in folder.logs.glob(f"{number}.log*"):
        log.unlink(missing_ok=True)
