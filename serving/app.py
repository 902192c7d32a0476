"""``tracelake serve``: any ASGI app under uvicorn, with capture on and nothing of ours in its code."""

import importlib
import importlib.util
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from prometheus_client.multiprocess import mark_process_dead

from inference_table.errors import SettingsError
from inference_table.settings import ENV_PREFIX, StorageSettings
from serving.exposition import MULTIPROC_VARIABLE, MetricsApp
from serving.middleware import InferenceTableMiddleware
from serving.settings import ENABLE_VARIABLE, settings_from
from serving.tracing import ensure_installed

__all__ = ["create_app", "load_app", "serve"]

TARGET_VARIABLE: Final = "TRACELAKE_APP"
FAILURE_VARIABLE: Final = "TRACELAKE_FAILURE_FILE"
METRICS_PATH: Final = "/metrics"


def serve(
    target: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    workers: int = 1,
    app_dir: str = ".",
    log_level: str = "info",
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Serve an ASGI app with capture on, until it is stopped by a signal.

    ``/metrics`` answers with Prometheus metrics of all workers; every other path is the app's.

    Args:
        target: the app as an import string, ``module:attribute``.
        settings: fields of the capture and storage settings, which win over the environment.

    Raises:
        SettingsError: a setting or the import string is not accepted.
        SpoolError: the spool can't be used.
        TableError: the table can't be reached, created or written to.
    """
    import uvicorn

    from inference_table.writer import Writer

    given = {name: value for name, value in (settings or {}).items() if value is not None}
    _, storage = settings_from(given)
    sys.path.insert(0, str(Path(app_dir).absolute()))
    find_app(target)
    Writer(storage).check()
    # Workers are new processes: what they are to do reaches them through the environment.
    os.environ.update({f"{ENV_PREFIX}{name.upper()}": str(value) for name, value in given.items()})
    os.environ.update({ENABLE_VARIABLE: "true", TARGET_VARIABLE: target})
    with tempfile.TemporaryDirectory(prefix="tracelake-serve-", ignore_cleanup_errors=True) as folder:
        failure = Path(folder) / "failure"
        if workers > 1:
            os.environ[FAILURE_VARIABLE] = str(failure)
            shared = os.environ.setdefault(MULTIPROC_VARIABLE, folder)
            # This process was none of the workers: what it has set itself is not theirs.
            mark_process_dead(os.getpid(), shared)  # type: ignore[no-untyped-call]
        uvicorn.run(
            "serving.app:create_app",
            factory=True,
            host=host,
            port=port,
            workers=workers,
            app_dir=app_dir,
            log_level=log_level,
        )
        if failure.exists():
            raise SettingsError(failure.read_text(encoding="utf-8"))


def create_app() -> "ServedApp":
    """The app that a worker of ``serve`` runs; what it is comes from the environment.

    uvicorn starts a worker again whenever it dies, so one that can't load the app stops its parent too.
    """
    target = os.environ[TARGET_VARIABLE]
    # Before the app is imported: instrumentors that it sets up are given the provider of that moment.
    ensure_installed()
    try:
        app = load_app(target)
    except BaseException as error:
        if failure := os.environ.get(FAILURE_VARIABLE):
            why = error if isinstance(error, SettingsError) else f"{type(error).__name__}: {error}"
            Path(failure).write_text(f"the workers cannot load {target!r}: {why}", encoding="utf-8")
            os.kill(os.getppid(), signal.SIGTERM)
        raise
    return ServedApp(app)


class ServedApp:
    """The user's app behind the middleware, with ``/metrics`` beside it."""

    def __init__(self, app: Any) -> None:
        self._app = InferenceTableMiddleware(app)
        self._metrics = MetricsApp(StorageSettings.from_environ())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        is_metrics = (
            scope["type"] == "http" and scope["path"] == METRICS_PATH and scope["method"] in {"GET", "HEAD"}
        )
        await (self._metrics if is_metrics else self._app)(scope, receive, send)


def split_target(target: str) -> tuple[str, str]:
    module, separator, attribute = target.partition(":")
    if not (module and separator and attribute):
        raise SettingsError(f"{target!r} is no import string: give module:attribute, such as my_agent:app")
    return module, attribute


def find_app(target: str) -> None:
    """Check that the module of an import string is there, without running it.

    Raises:
        SettingsError: it is not.
    """
    module, _ = split_target(target)
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise SettingsError(
            f"cannot import {target!r}: there is no module {module!r} in {Path.cwd()} or on the Python path;"
            " start in its folder or give --app-dir"
        )


def load_app(target: str) -> Any:
    """The app behind an import string.

    Raises:
        SettingsError: there is no such module or attribute, or it can't be called.
        Exception: what the module itself raises while it is imported.
    """
    find_app(target)
    module, attribute = split_target(target)
    found: Any = importlib.import_module(module)
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise SettingsError(f"cannot import {target!r}: module {module!r} has no attribute {attribute!r}")
        found = getattr(found, name)
    if not callable(found):
        raise SettingsError(f"{target!r} is a {type(found).__name__}, not an ASGI app")
    return found
