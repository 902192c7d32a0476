"""Carries a request into the threads that its agent starts.

Context variables, and so MLflow's active span, do not reach a raw ``threading.Thread`` or the work items of a
``ThreadPoolExecutor`` (Python 3.14 lets new threads inherit them, behind a flag): spans there would belong to
no request. ``Thread.start`` and ``ThreadPoolExecutor.submit`` are the only places where both sides are known,
so both are wrapped, as OpenTelemetry's own instrumentation of threads does. What is carried is the request
and the active spans, nothing of the agent's; outside of recorded requests both are as before.

A pool's worker serves many requests: it carries with each item what was active at its ``submit``, and nothing
of the request that happened to start the worker.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import thread as pool
from contextvars import Token
from functools import update_wrapper
from typing import Any, Final

from mlflow.tracing.provider import get_current_context, mlflow_runtime_context
from opentelemetry import context as otel_context

from serving.traces import CURRENT, Unrecorded

__all__ = ["carry_into_threads"]

INSTALLING: Final = threading.Lock()
IS_OURS: Final = "_tracelake_carries"


class Carried:
    """A call that takes place where it was handed over, as far as spans are concerned."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call
        self._request = CURRENT.get()
        self._mlflow = get_current_context()
        self._otel = otel_context.get_current()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        request = CURRENT.set(self._request)
        otel = otel_context.attach(self._otel)
        mlflow: Token[Any] | None = None
        if self._mlflow is not None:
            mlflow = mlflow_runtime_context.attach(self._mlflow)
        try:
            return self._call(*args, **kwargs)
        finally:
            if mlflow is not None:
                mlflow_runtime_context.detach(mlflow)
            otel_context.detach(otel)
            CURRENT.reset(request)


def is_recording() -> bool:
    request = CURRENT.get()
    return request is not None and not isinstance(request, Unrecorded) and not request.sealed


def is_pool_worker(thread: threading.Thread) -> bool:
    target: object = getattr(thread, "_target", None)
    return target is pool._worker


def carry_into_threads() -> None:
    """Wrap ``Thread.start`` and ``ThreadPoolExecutor.submit``; once per process."""
    with INSTALLING:
        if not hasattr(threading.Thread.start, IS_OURS):
            threading.Thread.start = carrying_start(threading.Thread.start)  # type: ignore[method-assign]
        if not hasattr(ThreadPoolExecutor.submit, IS_OURS):
            ThreadPoolExecutor.submit = carrying_submit(  # type: ignore[method-assign]
                ThreadPoolExecutor.submit
            )


def carrying_start(start: Callable[[threading.Thread], None]) -> Any:
    def carry(self: threading.Thread) -> None:
        if is_recording() and not is_pool_worker(self):
            carried = Carried(self.run)

            def run() -> None:
                vars(self).pop("run", None)  # or thread and method keep each other alive
                carried()

            self.run = run  # type: ignore[method-assign]
        start(self)

    return marked(carry, start)


def carrying_submit(submit: Callable[..., Future[Any]]) -> Any:
    def carry(self: ThreadPoolExecutor, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return submit(self, Carried(fn) if is_recording() else fn, *args, **kwargs)

    return marked(carry, submit)


def marked(wrapper: Any, wrapped: Callable[..., Any]) -> Any:
    setattr(wrapper, IS_OURS, True)
    return update_wrapper(wrapper, wrapped)
