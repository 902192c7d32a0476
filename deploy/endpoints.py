"""Endpoints that are remembered: found by name, changed under their lock, put back where a change fails."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Final, Protocol

from deploy.registry import Endpoint, EndpointFolder, State, endpoint_names, home, locked
from inference_table.errors import DeploymentError

__all__ = [
    "Engine",
    "endpoint_lock",
    "engine_of",
    "is_up",
    "remembered",
    "remove",
    "reverting",
]

LOCK_SECONDS: Final = 120.0
"""How long a deployer waits for another of the same endpoint: longer than most agents take to start."""
ENGINES: Final = {"local": "deploy.local", "ray": "deploy.ray"}
UP: Final = frozenset({"starting", "serving"})


class Engine(Protocol):
    """What runs an endpoint: the modules ``deploy.local`` and ``deploy.ray``."""

    def apply(self, folder: EndpointFolder, endpoint: Endpoint) -> State:
        """Bring about what ``endpoint.json`` says, and wait.

        Raises:
            DeploymentError: with the reason and the end of the log; what served before serves on.
        """

    def state(self, folder: EndpointFolder, endpoint: Endpoint) -> State:
        """What is, now."""

    def stop(self, folder: EndpointFolder, endpoint: Endpoint) -> None:
        """Stop all of it: drained and flushed. Fine where nothing runs."""

    def logs(self, folder: EndpointFolder, endpoint: Endpoint, number: str | None, lines: int) -> str:
        """The end of a version's log; of the newest where none is named."""


def engine_of(endpoint: Endpoint) -> Engine:
    """The engine of an endpoint, imported when it is used."""
    engine: Engine = importlib.import_module(ENGINES[endpoint.engine])
    return engine


def is_up(folder: EndpointFolder, endpoint: Endpoint) -> bool:
    return engine_of(endpoint).state(folder, endpoint).state in UP


def remembered(name: str) -> tuple[EndpointFolder, Endpoint]:
    """An endpoint and its folder.

    Raises:
        DeploymentError: there is none of that name.
    """
    folder = EndpointFolder(name)
    endpoint = folder.endpoint()
    if endpoint is None:
        known = ", ".join(endpoint_names()) or "none"
        raise DeploymentError(f"there is no endpoint {name!r} in {home()}; there are: {known}")
    return folder, endpoint


@contextmanager
def endpoint_lock(name: str) -> Iterator[None]:
    """Hold an endpoint for a change.

    Raises:
        DeploymentError: another deployer did, for too long.
    """
    path = EndpointFolder(name).deploy_lock
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(path, LOCK_SECONDS, "another deployment of this endpoint"):
        yield


@contextmanager
def reverting(folder: EndpointFolder, before: Endpoint | None) -> Iterator[None]:
    """Put an endpoint back where the change inside fails, or its deployer gives up.

    Args:
        before: what was wanted until now; None where there was no endpoint.
    """
    was_up = before is not None and is_up(folder, before)
    try:
        yield
    except BaseException:  # also of a deployer who presses Ctrl-C; raised again
        if (changed := folder.endpoint()) is not None and changed != before:
            put_back(folder, before, changed, was_up)
        raise


def put_back(folder: EndpointFolder, before: Endpoint | None, changed: Endpoint, was_up: bool) -> None:
    if before is None:
        remove(folder, changed)
        return
    restored = replace(before, generation=changed.generation + 1)
    folder.write_endpoint(restored)
    # What raised first is what the caller should hear of.
    with suppress(DeploymentError):
        if was_up:
            engine_of(restored).apply(folder, restored)
        else:
            engine_of(changed).stop(folder, changed)


def remove(folder: EndpointFolder, endpoint: Endpoint) -> None:
    """Stop an endpoint and forget it."""
    engine_of(endpoint).stop(folder, endpoint)
    folder.remove()
