"""What the admin port answers: ``/metrics`` and ``/health``."""

from collections.abc import Callable
from http import HTTPStatus

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from inference_table.settings import StorageSettings
from serving.exposition import MetricsApp

__all__ = ["AdminApp"]


class AdminApp:
    """An ASGI app for operators.

    Args:
        is_ready: whether the agent answers: its start-up is complete, and its shutdown has not begun.
        settings: whose spool ``/metrics`` reports.
    """

    def __init__(self, is_ready: Callable[[], bool], settings: StorageSettings) -> None:
        self._is_ready = is_ready
        self._metrics = MetricsApp(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
        elif scope["method"] not in {"GET", "HEAD"}:
            await error(HTTPStatus.METHOD_NOT_ALLOWED, "GET it")(scope, receive, send)
        elif scope["path"] == "/metrics":
            await self._metrics(scope, receive, send)
        elif scope["path"] == "/health":
            await self._health()(scope, receive, send)
        else:
            await error(HTTPStatus.NOT_FOUND, "/metrics and /health are here")(scope, receive, send)

    def _health(self) -> JSONResponse:
        if self._is_ready():
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready"}, HTTPStatus.SERVICE_UNAVAILABLE)


def error(status: HTTPStatus, message: str) -> JSONResponse:
    return JSONResponse({"error_code": status.name, "message": message}, status)
