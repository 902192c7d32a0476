"""The ASGI middleware that records requests, responses and traces."""

import logging
from typing import Any, Final

from inference_table.errors import SettingsError
from serving.mlflow_version import check_mlflow
from serving.settings import is_tracing_enabled, settings_from

__all__ = ["InferenceTableMiddleware"]

logger: Final = logging.getLogger("tracelake")


class InferenceTableMiddleware:
    """Records each request, its response and its MLflow trace as one row of a Delta table.

    Pure ASGI: ``app.add_middleware(InferenceTableMiddleware)``, or ``InferenceTableMiddleware(app)`` for any
    app. It does nothing unless the environment says ``ENABLE_MLFLOW_TRACING=true``; then it reads
    ``INFERENCE_TABLE_*``, the settings of :class:`serving.settings.CaptureSettings` and
    :class:`inference_table.settings.StorageSettings`.

    Never raises for a setting that is wrong: under ``add_middleware`` a server would start all the same and
    answer every request with 500. The mistake fails the server's start-up (lifespan) instead, with a message;
    where there is no lifespan, requests pass, and the log and a counter say that nothing is recorded.

    Args:
        app: the ASGI app.
        redact: called with each payload before anything is written; see :mod:`serving.redaction`.
        enabled: overrides ``ENABLE_MLFLOW_TRACING``.
        options: settings by their field names, which win over the environment.
    """

    def __init__(
        self, app: Any, /, *, redact: Any = None, enabled: bool | None = None, **options: Any
    ) -> None:
        self.app = app
        self._recorder: Any = None
        self._mistake: str | None = None
        self._active = False
        try:
            self._active = is_tracing_enabled() if enabled is None else enabled
            if self._active:
                self._recorder = make_recorder(options, redact)
        except Exception as error:  # the capture border: a package that is missing, say
            self._active = True
            self._mistake = (
                str(error) if isinstance(error, SettingsError) else f"{type(error).__name__}: {error}"
            )
            logger.error("tracelake records nothing: %s", self._mistake)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if not self._active:
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _http(self, scope: Any, receive: Any, send: Any) -> None:
        if self._recorder is not None and self._recorder.captures(scope):
            await self._recorder(self.app, scope, receive, send)
            return
        if self._mistake is not None:
            count_unrecorded(self._mistake)
        await self.app(scope, receive, send)

    async def _lifespan(self, scope: Any, receive: Any, send: Any) -> None:
        if self._mistake is not None:
            await refuse(self._mistake, receive, send)
            return
        from serving.lifespan import Lifespan

        await Lifespan(self._recorder, receive, send).run(self.app, scope)


def make_recorder(options: dict[str, Any], redact: Any) -> Any:
    """The recorder, imported here so that capture switched off imports neither MLflow nor delta-rs."""
    check_mlflow()
    from serving.recorder import Recorder

    capture, storage = settings_from(options)
    return Recorder(capture, storage, redact)


async def refuse(mistake: str, receive: Any, send: Any) -> None:
    """Stop the server's start, with the reason; without a package of others', which may be the one amiss."""
    await receive()
    await send({"type": "lifespan.startup.failed", "message": f"tracelake: {mistake}"})


def count_unrecorded(mistake: str) -> None:
    from inference_table import metrics
    from serving.border import reporter

    metrics.DROPPED.labels("settings").inc()
    reporter.failure("settings", f"requests are not recorded: {mistake}")
