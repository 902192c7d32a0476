"""``tracelake deploy --render``: the files by which something else runs an agent, written into a folder."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from deploy.agents import agent_of
from deploy.arguments import check_arguments, is_secret
from deploy.freeze import freeze
from deploy.render import RenderPlan, render
from inference_table.errors import DeploymentError

__all__ = ["write_artifacts"]

CODE: Final = "code"
FOREIGN: Final = frozenset(
    {"drain_seconds", "engine", "ray_address", "route_prefix", "spool_dir", "tag", "traffic", "wait_seconds"}
)
"""Options of a deployment that another program decides on by its own means."""
DEFAULTS: Final[Mapping[str, Any]] = {"drain_seconds": 60.0, "engine": "local", "wait_seconds": 60.0}
MARK: Final = "See docs/deploy-elsewhere.md."
"""In the first line of what was rendered: such a file may be replaced, another `Dockerfile` is the user's."""
SETTINGS: Final = {
    "max_request_bytes": "TRACELAKE_MAX_REQUEST_BYTES",
    "max_concurrency": "TRACELAKE_MAX_CONCURRENCY",
}


def write_artifacts(
    kind: str, output: Path, agent: str, environment: Mapping[str, str], options: Mapping[str, Any]
) -> list[Path]:
    """Write the files.

    A variable that is a secret, by its name or as a URL with a password, is named in them, without its value.

    Args:
        kind: ``systemd``, ``kubernetes`` or ``docker``.
        output: folder for them, made where it is missing.
        environment: variables of the agent.
        options: further options of ``tracelake deploy``.

    Returns:
        What was written. A file for secrets that is there already stays as it is.

    Raises:
        DeploymentError: it can't be run there; or files are in the way that are not ours to replace.
    """
    given = {name: value for name, value in options.items() if value and value != DEFAULTS.get(name)}
    if foreign := sorted(given.keys() & FOREIGN):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in foreign)
        raise DeploymentError(f"cannot render for {kind} with {names}: leave it out")
    check_arguments(environment, None, {})
    working_dir = Path(given.get("working_dir", ".")).absolute()
    found = agent_of(agent, given.get("version"), working_dir)
    secrets = tuple(name for name, value in environment.items() if is_secret(name, value))
    plan = RenderPlan(
        endpoint_name=given.get("endpoint_name") or found.endpoint_name,
        agent=found.given,
        working_dir=None if found.is_model else working_dir,
        table=given.get("table") or os.environ.get("INFERENCE_TABLE_URI") or "./tracelake-data/payload",
        replicas=given.get("num_replicas", 1),
        secrets=secrets,
        environment={name: value for name, value in environment.items() if name not in secrets}
        | {name: str(given[option]) for option, name in SETTINGS.items() if option in given},
        **{
            name: given[name]
            for name in ("workers", "host", "port", "admin_port", "durability", "api_key_file", "description")
            if name in given
        },
    )
    texts = render(kind, plan)
    code = output / CODE if kind == "docker" and not plan.is_model else None
    check_free([output / name for name in texts], code)
    output.mkdir(parents=True, exist_ok=True)
    written = [path for name, text in texts.items() if write(path := output / name, text)]
    if code is not None:
        freeze(working_dir, code)
        written.append(code)
    return written


def check_free(files: list[Path], code: Path | None) -> None:
    """Refuse to replace what is not ours, before anything is written."""
    foreign = [f"'{path}'" for path in files if path.suffix != ".env" and path.exists() and not is_ours(path)]
    if foreign:
        raise DeploymentError(
            f"cannot write {', '.join(foreign)}: there is one that tracelake has not made; move it, or give "
            "another --output"
        )
    if code is not None and code.exists():
        raise DeploymentError(
            f"cannot copy the agent's code to '{code}': it is there; remove it, or give another --output"
        )


def is_ours(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return MARK in file.readline()


def write(path: Path, text: str) -> bool:
    """Write a file; one that holds secrets for its owner alone, and only where there is none."""
    if path.suffix != ".env":
        path.write_text(text, encoding="utf-8")
        return True
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    return True
