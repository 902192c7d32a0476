"""What a replica of engine ``ray`` runs, in a worker process of its node.

What holds:

- The agent is what ``tracelake serve`` would serve: the same app, settings, limits and lifespan.
- A start-up that fails fails the replica's first health check, with the reason. Later the check asks nothing
  of the writer: the endpoint comes first, and another process on this node would fare no better.
- To settings, rows and ``/metrics`` a path is the one below the route prefix, as with engine ``local``; the
  agent gets the scope as the server made it, so that its redirects lead back to it.
"""

import logging
import os
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, Final

from deploy.registry import home

__all__ = ["Agent", "CodeHolder", "agent_app"]

TARGET_VARIABLE: Final = "TRACELAKE_APP"
PATH_VARIABLE: Final = "TRACELAKE_PYTHON_PATH"
SPOOL_VARIABLE: Final = "INFERENCE_TABLE_SPOOL_DIR"
ENTITY_VARIABLE: Final = "INFERENCE_TABLE_SERVED_ENTITY"
MODEL_FILE: Final = "MLmodel"
MOUNT: Final = "tracelake.mount"
"""Key of a scope: its ``path`` and ``root_path`` as the server made them."""

logger: Final = logging.getLogger("tracelake")

Scope = MutableMapping[str, Any]


class Agent:
    """The class of the deployment; ``serve.ingress(agent_app)`` makes an app of it."""

    app: "ReplicaApp"
    """By ``serve.ingress``."""

    def check_health(self) -> None:
        """Called by Serve, the first time at the end of the start-up."""
        if self.app.failure is not None:
            raise RuntimeError(self.app.failure)


class CodeHolder:
    """A detached actor with the working folder of a version.

    Ray deletes an uploaded folder once no job and no detached actor has it. The deployer's job is over by
    then, and replicas may all die at once: without this actor none could be started again.
    """


def agent_app() -> "ReplicaApp":
    """The app of this process's replica; what it is comes from the environment.

    Raises:
        SettingsError: there is no such agent, or a setting is not accepted.
        Exception: what the agent itself raises while it is imported.
    """
    from serving.app import load_app
    from serving.serve import ServedApp
    from serving.tracing import ensure_installed

    log_to_serve()
    folder = Path.cwd()  # Ray's copy of the version's working folder
    prefer_folder(folder)
    # Each node has a spool of its own, not in Ray's session folder, which goes with the session.
    os.environ.setdefault(SPOOL_VARIABLE, str(home() / "spool"))
    target = os.environ[TARGET_VARIABLE]
    logger.info("a replica of %s starts: %s", os.environ.get(ENTITY_VARIABLE), target)
    if (folder / target / MODEL_FILE).is_file():
        target = str(folder / target)
    # Before the agent is imported: instrumentors that it sets up are given the provider of that moment.
    ensure_installed()
    return ReplicaApp(ServedApp(AsMounted(load_app(target))))


def prefer_folder(folder: Path) -> None:
    """Put the version's folder first on the Python path.

    Otherwise the current folder of whoever started Serve on this cluster comes before it.
    """
    more = [entry for entry in os.environ.get(PATH_VARIABLE, "").split(os.pathsep) if entry]
    paths = [str(folder), *(str(folder / entry) for entry in more)]
    sys.path[:] = [*paths, *(entry for entry in sys.path if entry not in paths)]


def log_to_serve() -> None:
    """Have all that is logged in this process in Serve's log of the replica, where ``logs()`` reads it."""
    root = logging.getLogger()
    for handler in logging.getLogger("ray.serve").handlers:
        if handler not in root.handlers:
            root.addHandler(handler)
    logger.setLevel(logging.INFO)


class ReplicaApp:
    """A served app as Serve is to see it: below a route prefix, and with the reason of a failed start-up."""

    def __init__(self, app: Any) -> None:
        self.failure: str | None = None
        self._app = app

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
            return
        path, root_path = scope["path"], scope.get("root_path", "")
        below = path.removeprefix(root_path) or "/"
        await self._app({**scope, "path": below, "root_path": "", MOUNT: (path, root_path)}, receive, send)

    async def _lifespan(self, scope: Scope, receive: Any, send: Any) -> None:
        async def observed_send(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "lifespan.startup.failed":
                # Serve would only tell that it failed; the health check that follows says why.
                self.failure = message.get("message") or "the agent's start-up failed; its log says why"
                message = {"type": "lifespan.startup.complete"}
            await send(message)

        await self._app(scope, receive, observed_send)
        if self.failure is not None:
            await receive()
            await send({"type": "lifespan.shutdown.complete"})


class AsMounted:
    """The agent, with the path it was asked for."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if mount := scope.get(MOUNT):
            scope["path"], scope["root_path"] = mount
        await self._app(scope, receive, send)
