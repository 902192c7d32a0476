"""``tracelake serve``: any agent under uvicorn, with capture on and nothing of ours in its code."""

import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from prometheus_client.multiprocess import mark_process_dead
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inference_table.errors import SettingsError
from inference_table.settings import ENV_PREFIX, StorageSettings
from serving.admin import AdminApp
from serving.api_keys import ApiKeyCheck, KeyFile, read_keys
from serving.app import load_app, prepare
from serving.exposition import MULTIPROC_VARIABLE, MetricsApp
from serving.feedback import FeedbackApp, FeedbackRoute
from serving.limits import Limits
from serving.middleware import InferenceTableMiddleware
from serving.server_settings import ADMIN_PORT_VARIABLE, PYTHON_PATH_VARIABLE, ServerSettings
from serving.settings import ENABLE_VARIABLE, settings_from
from serving.tracing import ensure_installed

if TYPE_CHECKING:
    from uvicorn import Config

__all__ = ["ADMIN_HOST", "ServedApp", "create_app", "serve"]

logger: Final = logging.getLogger("tracelake")

TARGET_VARIABLE: Final = "TRACELAKE_APP"
FAILURE_VARIABLE: Final = "TRACELAKE_FAILURE_FILE"
METRICS_PATH: Final = "/metrics"
GRACEFUL_SECONDS: Final = 60
"""How long requests that run at SIGTERM may take; then they are cancelled, and recorded so."""
ADMIN_HOST: Final = "127.0.0.1"
"""The admin port has no keys: whoever reaches it is an operator."""
FOR_KEY_HOLDERS: Final = ("allow_return_trace", "allow_durability_header")
"""Settings that are on by default where only clients with a key can make use of them."""


def serve(
    target: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    workers: int = 1,
    app_dir: str = ".",
    log_level: str = "info",
    admin_host: str = ADMIN_HOST,
    settings: Mapping[str, Any] | None = None,
    server_settings: Mapping[str, Any] | None = None,
) -> None:
    """Serve an agent with capture on, until it is stopped by a signal.

    Every path is the agent's but ``/metrics``, which answers with Prometheus metrics of all workers; with an
    admin port it is there, and with API keys and no admin port it is nowhere.

    Args:
        target: an import string, ``module:attribute``, of what :func:`serving.app.as_app` takes, or the URI
            or the folder of an MLflow model.
        admin_host: address of the admin port, which asks nobody for a key.
        settings: fields of the capture and storage settings, which win over the environment.
        server_settings: fields of :class:`serving.server_settings.ServerSettings`, the same way.

    Raises:
        SettingsError: a setting is not accepted, or there is nothing to serve at the target.
        SpoolError: the spool can't be used.
        TableError: the table can't be reached, created or written to.
    """
    from inference_table.writer import Writer

    given = {name: value for name, value in (settings or {}).items() if value is not None}
    _, storage = settings_from(given)
    server = ServerSettings.from_environ(**(server_settings or {}))
    check_server(server, host, port)
    with python_path([str(Path(app_dir).absolute())]):
        target = prepare(target)
    Writer(storage).check()
    # Workers are new processes: what they are to do reaches them through the environment.
    os.environ.update({f"{ENV_PREFIX}{name.upper()}": str(value) for name, value in given.items()})
    os.environ.update(server.to_environ())
    os.environ.update({ENABLE_VARIABLE: "true", TARGET_VARIABLE: target})
    os.environ[PYTHON_PATH_VARIABLE] = str(Path(app_dir).absolute())
    options = {
        "host": host,
        "port": port,
        "workers": workers,
        "log_level": log_level,
        "timeout_graceful_shutdown": GRACEFUL_SECONDS,
    }
    if workers == 1:
        # Ends by the signal that stopped it: nothing after is sure to run.
        run(options, admin_host, server.admin_port)
        return
    with tempfile.TemporaryDirectory(prefix="tracelake-serve-", ignore_cleanup_errors=True) as folder:
        failure = Path(folder) / "failure"
        os.environ[FAILURE_VARIABLE] = str(failure)
        shared = os.environ.setdefault(MULTIPROC_VARIABLE, folder)
        # This process was none of the workers: what it has set itself is not theirs.
        mark_process_dead(os.getpid(), shared)  # type: ignore[no-untyped-call]
        run(options, admin_host, server.admin_port)
        if failure.exists():
            raise SettingsError(failure.read_text(encoding="utf-8"))


@contextmanager
def python_path(folders: list[str]) -> Iterator[None]:
    """Look for modules in these folders first."""
    before = list(sys.path)
    sys.path[:0] = folders
    try:
        yield
    finally:
        sys.path[:] = before


def check_server(server: ServerSettings, host: str, port: int) -> None:
    """What would stop workers, or surprise, is said before there are any.

    Raises:
        SettingsError: the key file can't be used, or both ports are the same.
    """
    if server.api_key_file is not None:
        read_keys(server.api_key_file)
    elif not is_loopback(host):
        logger.warning(
            "without API keys whoever reaches %s may call the agent%s; see --api-key-file",
            host,
            " and read its metrics" if server.admin_port is None else "",
        )
    if port != 0 and server.admin_port == port:
        raise SettingsError(
            f"the admin port is {port}, the agent's port; give it another, or 0 for any free one, with "
            "--admin-port or TRACELAKE_ADMIN_PORT"
        )


def is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def run(options: dict[str, Any], admin_host: str, admin_port: int | None) -> None:
    """Run uvicorn until a signal stops it."""
    import uvicorn

    app = "serving.serve:create_app"
    if admin_port is None:
        uvicorn.run(app, factory=True, **options)
        return
    config = uvicorn.Config(app, factory=True, **options)
    admin = bind_admin(admin_host, admin_port)
    run_on(config, [config.bind_socket(), admin])


def bind_admin(host: str, port: int) -> socket.socket:
    """The admin socket, and its port in the environment of the workers.

    Raises:
        SettingsError: the port can't be had.
    """
    admin = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    admin.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        admin.bind((host, port))
    except OSError as error:
        admin.close()
        raise SettingsError(
            f"cannot listen on the admin port {port} of {host}: {error.strerror}; give another, or 0 "
            "for any free one, with --admin-port or TRACELAKE_ADMIN_PORT"
        ) from error
    admin.set_inheritable(True)
    bound = admin.getsockname()[1]
    os.environ[ADMIN_PORT_VARIABLE] = str(bound)
    logging.getLogger("uvicorn.error").info("Metrics and health are on http://%s:%d", host, bound)
    return admin


def run_on(config: "Config", sockets: list[socket.socket]) -> None:
    """What ``uvicorn.run`` does, on sockets that are bound."""
    from uvicorn import Server
    from uvicorn.config import STARTUP_FAILURE
    from uvicorn.supervisors import Multiprocess

    if config.workers > 1:
        Multiprocess(config, sockets=sockets).run()
        return
    server = Server(config)
    with suppress(KeyboardInterrupt):  # the signal that stopped it, raised again
        server.run(sockets=sockets)
    if not server.started:
        sys.exit(STARTUP_FAILURE)


def create_app() -> "ServedApp":
    """The app that a worker of ``serve`` runs; what it is comes from the environment.

    uvicorn starts a worker again whenever it dies, so one that can't load the app stops its parent too.
    """
    target = os.environ[TARGET_VARIABLE]
    # Ours are imported by now: none of the agent's modules takes their place.
    sys.path[:0] = filter(None, os.environ.get(PYTHON_PATH_VARIABLE, "").split(os.pathsep))
    # Before the app is imported: instrumentors that it sets up are given the provider of that moment.
    ensure_installed()
    try:
        return ServedApp(load_app(target))
    except BaseException as error:
        if failure := os.environ.get(FAILURE_VARIABLE):
            why = error if isinstance(error, SettingsError) else f"{type(error).__name__}: {error}"
            Path(failure).write_text(f"the workers cannot load {target!r}: {why}", encoding="utf-8")
            os.kill(os.getppid(), signal.SIGTERM)
        raise


class ServedApp:
    """A user's app with all that belongs around it, by the environment and ``settings``.

    From the outside: admin routes, API keys, capture, limits. A request without a key is no row, one beyond a
    limit is.

    Args:
        app: the ASGI app.
        settings: of the server; from the environment by default.

    Raises:
        SettingsError: a setting is not accepted, or the key file can't be used.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings | None = None) -> None:
        settings = settings or ServerSettings.from_environ()
        limited = Limits(
            app, max_request_bytes=settings.max_request_bytes, max_concurrency=settings.max_concurrency
        )
        has_keys = settings.api_key_file is not None
        self._app: ASGIApp = InferenceTableMiddleware(
            limited, **defaults_for_key_holders() if has_keys else {}
        )
        storage = StorageSettings.from_environ()
        takes_feedback = has_keys if settings.feedback is None else settings.feedback
        if takes_feedback:
            self._app = FeedbackRoute(self._app, FeedbackApp(storage))
        if settings.api_key_file is not None:
            self._app = ApiKeyCheck(self._app, KeyFile(settings.api_key_file))
        self._admin_port = settings.admin_port
        self._admin = AdminApp(lambda: self._ready, storage)
        self._metrics = None if has_keys or settings.admin_port is not None else MetricsApp(storage)
        self._ready = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
        elif self._admin_port is not None and local_port(scope) == self._admin_port:
            await self._admin(scope, receive, send)
        elif self._metrics is not None and is_metrics(scope):
            await self._metrics(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def observed_receive() -> Message:
            message = await receive()
            self._ready = self._ready and message["type"] != "lifespan.shutdown"
            return message

        async def observed_send(message: Message) -> None:
            self._ready = message["type"] == "lifespan.startup.complete"
            await send(message)

        await self._app(scope, observed_receive, observed_send)


def defaults_for_key_holders() -> dict[str, bool]:
    return {name: True for name in FOR_KEY_HOLDERS if f"{ENV_PREFIX}{name.upper()}" not in os.environ}


def local_port(scope: Scope) -> int | None:
    """The port on which a request came in; what the client says about it doesn't count."""
    server = scope.get("server")
    return server[1] if server else None


def is_metrics(scope: Scope) -> bool:
    return scope["type"] == "http" and scope["path"] == METRICS_PATH and scope["method"] in {"GET", "HEAD"}
