"""``tracelake serve``: any agent under uvicorn, with capture on and nothing of ours in its code."""

import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

from prometheus_client.multiprocess import mark_process_dead

from inference_table.errors import SettingsError
from inference_table.settings import ENV_PREFIX, StorageSettings
from serving.app import load_app, prepare
from serving.exposition import MULTIPROC_VARIABLE, MetricsApp
from serving.middleware import InferenceTableMiddleware
from serving.settings import ENABLE_VARIABLE, settings_from
from serving.tracing import ensure_installed

__all__ = ["create_app", "serve"]

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
    """Serve an agent with capture on, until it is stopped by a signal.

    ``/metrics`` answers with Prometheus metrics of all workers; every other path is the agent's.

    Args:
        target: an import string, ``module:attribute``, of what :func:`serving.app.as_app` takes, or the URI
            or the folder of an MLflow model.
        settings: fields of the capture and storage settings, which win over the environment.

    Raises:
        SettingsError: a setting is not accepted, or there is nothing to serve at the target.
        SpoolError: the spool can't be used.
        TableError: the table can't be reached, created or written to.
    """
    import uvicorn

    from inference_table.writer import Writer

    given = {name: value for name, value in (settings or {}).items() if value is not None}
    _, storage = settings_from(given)
    sys.path.insert(0, str(Path(app_dir).absolute()))
    target = prepare(target)
    Writer(storage).check()
    # Workers are new processes: what they are to do reaches them through the environment.
    os.environ.update({f"{ENV_PREFIX}{name.upper()}": str(value) for name, value in given.items()})
    os.environ.update({ENABLE_VARIABLE: "true", TARGET_VARIABLE: target})
    run = partial(
        uvicorn.run,
        "serving.serve:create_app",
        factory=True,
        host=host,
        port=port,
        workers=workers,
        app_dir=app_dir,
        log_level=log_level,
    )
    if workers == 1:
        run()  # and is ended by the signal that stopped it: nothing after this is sure to run
        return
    with tempfile.TemporaryDirectory(prefix="tracelake-serve-", ignore_cleanup_errors=True) as folder:
        failure = Path(folder) / "failure"
        os.environ[FAILURE_VARIABLE] = str(failure)
        shared = os.environ.setdefault(MULTIPROC_VARIABLE, folder)
        # This process was none of the workers: what it has set itself is not theirs.
        mark_process_dead(os.getpid(), shared)  # type: ignore[no-untyped-call]
        run()
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
