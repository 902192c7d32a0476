"""What callers of :func:`deploy.deploy` give, checked before anything is made of it."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from inference_table.errors import DeploymentError
from inference_table.settings import StorageSettings, parse_bool

__all__ = [
    "COUNT",
    "OURS",
    "PORT",
    "SECONDS",
    "Bounds",
    "check_arguments",
    "check_engine",
    "check_traffic",
    "is_secret",
    "storage_of",
]

VARIABLE: Final = re.compile(r"[A-Z_][A-Z0-9_]*")
SECRET: Final = re.compile(
    r"((^|_)(KEYS?|TOKEN|SECRET|CREDENTIALS?|DSN|CONNECTION_STRING|PASS|PASSPHRASE)"
    # Also PGPASSWORD and OPENAI_APIKEY.
    r"|PASSWORD|PASSWD|APIKEY|_PWD)(_|$)"
)
URL_PASSWORD: Final = re.compile(r"://[^/@\s]*:[^/@\s]+@")
OURS: Final = frozenset(
    {
        "INFERENCE_TABLE_SERVED_ENTITY",
        "PROMETHEUS_MULTIPROC_DIR",
        "TRACELAKE_ADMIN_PORT",
        "TRACELAKE_APP",
        "TRACELAKE_FAILURE_FILE",
        "TRACELAKE_PYTHON_PATH",
    }
)
"""Variables by which a deployment tells its workers what they are."""
ENABLE: Final = "ENABLE_MLFLOW_TRACING"
LOCAL: Final = "local"
RAY: Final = "ray"
VERSIONS_AT_ONCE: Final = 2
"""That take traffic: an endpoint that is told apart by two ``served_entity_id`` can be compared."""


@dataclass(frozen=True)
class Bounds:
    """What a number may be: from ``least`` to ``most``, which None leaves open."""

    least: int
    most: int | None = None
    is_whole: bool = True

    def accept(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.is_whole else int | float):
            return False
        return self.least <= value and (self.most is None or value <= self.most)

    def __str__(self) -> str:
        kind = "whole number" if self.is_whole else "number"
        limits = f"of at least {self.least}" if self.most is None else f"from {self.least} to {self.most:,}"
        return f"a {kind} {limits}"


COUNT: Final = Bounds(1)
PORT: Final = Bounds(0, 65_535)
SECONDS: Final = Bounds(0, 365 * 24 * 3600, is_whole=False)
"""A year: timers of the system take no infinite time."""


def check_arguments(
    environment_vars: Mapping[str, str] | None,
    tags: Mapping[str, str] | None,
    numbers: Mapping[str, tuple[Any, Bounds]],
) -> None:
    """Refuse arguments that can't be carried out, all of them in one message.

    Args:
        numbers: by argument, the value and what is accepted.

    Raises:
        DeploymentError: something is amiss.
    """
    problems = [
        f"{name} is {value!r}: give {bounds}"
        for name, (value, bounds) in numbers.items()
        if value is not None and not bounds.accept(value)
    ]
    problems += variable_problems(environment_vars)
    problems += [
        f"the tag {name!r} is {value!r}: give texts for names and values"
        for name, value in mapping(tags, "tags", problems).items()
        if not (isinstance(name, str) and isinstance(value, str))
    ]
    if problems:
        raise DeploymentError(f"cannot deploy: {'; '.join(problems)}")


def mapping(given: Any, name: str, problems: list[str]) -> Mapping[Any, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        problems.append(f"{name} is a {type(given).__name__}: give a dictionary")
        return {}
    return given


def variable_problems(environment_vars: Any) -> list[str]:
    """What is wrong with environment variables, by Databricks' rules and ours."""
    problems: list[str] = []
    for name, value in mapping(environment_vars, "environment_vars", problems).items():
        if not isinstance(name, str) or VARIABLE.fullmatch(name) is None:
            problems.append(
                f"the environment variable {name!r} is not accepted: give upper-case letters, digits and _, "
                "the first no digit"
            )
        elif not isinstance(value, str):
            problems.append(f"the environment variable {name} is a {type(value).__name__}: give a text")
        elif "\0" in value:
            problems.append(f"the environment variable {name} holds a null character: leave it out")
        elif name in OURS:
            problems.append(f"the environment variable {name} is set by deploy() itself: leave it out")
        elif name == ENABLE and not is_true(value):
            problems.append(
                f"the environment variable {ENABLE} is {value!r}: a deployment is traced; to serve without a "
                "table run uvicorn itself"
            )
    return problems


def is_secret(name: str, value: str) -> bool:
    """Whether a variable's value is nobody's business: by its name, or as a URL with a password."""
    return SECRET.search(name) is not None or URL_PASSWORD.search(value) is not None


def is_true(text: str) -> bool:
    try:
        return parse_bool(text)
    except ValueError:
        return False


def check_engine(engine: str, only_local: Mapping[str, bool], only_ray: Mapping[str, Any]) -> None:
    """Refuse arguments that are another engine's.

    Args:
        only_local: by argument of the engine ``local``, whether it was given.
        only_ray: those of the engine ``ray`` that were given.

    Raises:
        DeploymentError: there is no such engine, or it would not heed an argument.
    """
    if engine not in (LOCAL, RAY):
        raise DeploymentError(f"cannot deploy with engine={engine!r}: give 'local' or 'ray'")
    foreign = (
        list(only_ray) if engine == LOCAL else [name for name, is_given in only_local.items() if is_given]
    )
    if foreign:
        names = {"address": "ray_address"}
        raise DeploymentError(
            f"cannot deploy with engine={engine!r} and {', '.join(names.get(one, one) for one in foreign)}: "
            f"that is for engine={RAY if engine == LOCAL else LOCAL!r} only"
        )


def check_traffic(traffic: Mapping[Any, Any], versions: list[str], number: str) -> dict[str, int]:
    """Percent per version, as given or all to the one that is deployed.

    Args:
        versions: those that are deployed, and the one that is about to be.
        number: that one.

    Raises:
        DeploymentError: they don't add up, or name a version that isn't there.
    """
    shares = {str(version): share for version, share in traffic.items()}
    problems = [
        f"version {version} is not deployed; there {'is' if len(versions) == 1 else 'are'} "
        f"{', '.join(versions)}"
        for version in shares
        if version not in versions
    ]
    problems += [
        f"version {version} gets {share!r}: give a whole percentage"
        for version, share in shares.items()
        if not isinstance(share, int) or isinstance(share, bool) or not 0 <= share <= 100
    ]
    if not problems and sum(shares.values()) != 100:
        problems.append(f"it adds up to {sum(shares.values())}: give 100 percent in all")
    taking = {version: share for version, share in shares.items() if share}
    if not problems and len(taking) > VERSIONS_AT_ONCE:
        problems.append(f"{len(taking)} versions take traffic: give at most {VERSIONS_AT_ONCE}")
    if not problems and number not in shares:
        problems.append(
            f"it leaves out version {number}, which is being deployed; to change the traffic of deployed "
            "versions alone give version= one of them"
        )
    if problems:
        raise DeploymentError(f"cannot split the traffic {dict(traffic)!r}: {'; '.join(problems)}")
    return taking


def storage_of(environment: Mapping[str, str], table: str | None, spool_dir: str | None) -> StorageSettings:
    """The storage settings of a deployment's workers; arguments win over their environment.

    Raises:
        SettingsError: a setting is not accepted.
    """
    return StorageSettings.from_environ({**os.environ, **environment}, uri=table, spool_dir=spool_dir)
