"""One call of an agent function, and the reply that its result makes.

An iterator, sync or async, is sent as server-sent events: ``data: <JSON>`` for each item, ``data: [DONE]`` at
the end. A Starlette response is sent as it is, anything else as JSON. Where the agent raises, the client gets
MLflow's error form ``{"error_code": ..., "message": ...}``; after the first item of a stream it is the last
event, ``data: {"error": ...}``.

Sync code runs in worker threads, all steps of an iterator in one context, so that its spans nest.

A span around it all, from the call to the last item, is the root of the request's trace, unless the function
is traced itself. It has ended before the last bytes of the reply leave: that is when durable replies are
recorded.
"""

# mypy: disable-error-code="no-untyped-call"
# MLflow is typed in part only.

import asyncio
import inspect
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import Context, copy_context
from http import HTTPStatus
from threading import Lock
from typing import Any, Final

import mlflow
from anyio import CancelScope, to_thread
from mlflow.entities import NoOpSpan, SpanType
from mlflow.exceptions import MlflowException
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.function import AgentFunction
from serving.json_value import to_json
from serving.tracing import CURRENT, is_recorded

__all__ = ["Invocation", "error_response"]

logger: Final = logging.getLogger("tracelake")

STREAM_START: Final = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),  # nginx would hold events back
    ],
}
DONE: Final = b"data: [DONE]\n\n"
END: Final = object()


class Invocation:
    """The state of one call.

    Args:
        function: what is called.
        body: the request, as the root span's inputs.
        argument: what the function is called with.
    """

    def __init__(self, function: AgentFunction, body: Any, argument: Any) -> None:
        self._function = function
        self._body = body
        self._argument = argument
        self._context: Context
        self._started = False
        self._streaming = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the function, and reply."""

        async def tracked(message: Message) -> None:
            self._started = True
            try:
                await send(message)
            except OSError as error:  # how servers tell that the client is gone (ASGI 2.4)
                raise ClientDisconnect from error

        try:
            with root_span(self._function, self._body) as span:
                self._context = copy_context()
                rest = await self._answer(span, scope, receive, tracked)
        except ClientDisconnect:
            return
        # An agent may raise anything; its client gets an answer, the log the traceback.
        except Exception as error:  # noqa: BLE001
            rest = self._failure(error)
        await rest(scope, receive, send)

    async def _answer(self, span: Any, scope: Scope, receive: Receive, send: Send) -> ASGIApp:
        """Send the reply but for its end, which is returned."""
        result = await self._result()
        if isinstance(result, Response):
            return await passed_on(result, scope, receive, send)
        if isinstance(result, Iterator):
            result = InThreads(result, self._context)
        if isinstance(result, AsyncIterator):
            return await self._stream(result, span, receive, send)
        value = self._function.convert(result)
        reply = Response(to_json(value), media_type="application/json")
        span.set_outputs(value)
        return reply

    async def _result(self) -> Any:
        call = self._function.call
        if is_coroutine_function(call):
            result = await call(self._argument)
            self._context = copy_context()
            return result
        result = await to_thread.run_sync(self._context.run, call, self._argument)
        return await result if inspect.isawaitable(result) else result

    async def _stream(self, items: AsyncIterator[Any], span: Any, receive: Receive, send: Send) -> ASGIApp:
        self._streaming = True
        keeps = not isinstance(span, NoOpSpan)
        outputs: list[Any] = []
        try:
            async with while_connected(receive), closing(items):
                async for item in items:
                    value = self._function.convert(item)
                    await self._send_event(event(value), send)
                    if keeps:
                        outputs.append(value)
        finally:
            span.set_outputs(outputs)
        await self._send_event(b"", send)
        return ending(DONE)

    async def _send_event(self, data: bytes, send: Send) -> None:
        # With the first one, not before: where that fails the reply can still be an error.
        if not self._started:
            await send(STREAM_START)
        if data:
            await send({"type": "http.response.body", "body": data, "more_body": True})

    def _failure(self, error: Exception) -> ASGIApp:
        """What is left to be said after a failure."""
        status, description = described(error)
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            logger.error("%s failed", self._function.name, exc_info=error)
        if not self._started:
            # Others have headers too: what an agent's HTTP client got is not for the agent's client.
            headers = error.headers if isinstance(error, HTTPException) else None
            return error_response(status, description, headers)
        if not self._streaming:
            raise error  # an app's own response broke off: that is the server's to end
        return ending(event({"error": description}))


@contextmanager
def root_span(function: AgentFunction, body: Any) -> Iterator[Any]:
    """The root of the request's trace, where it is recorded and nobody else makes one."""
    request = CURRENT.get()
    if function.is_traced or request is None or not is_recorded(request):
        yield NoOpSpan()
        return
    with mlflow.start_span(function.name, span_type=SpanType.AGENT) as span:
        span.set_inputs(body)
        yield span


def is_coroutine_function(call: Any) -> bool:
    return inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(type(call).__call__)


# --- streams ---


class InThreads(AsyncIterator[Any]):
    """A sync iterator as an async one: each step in a worker thread, all of them in one context."""

    def __init__(self, items: Iterator[Any], context: Context) -> None:
        self._items = items
        self._context = context
        self._running = Lock()

    async def __anext__(self) -> Any:
        item = await to_thread.run_sync(self._step, next, self._items, END)
        if item is END:
            raise StopAsyncIteration
        return item

    async def aclose(self) -> None:
        if hasattr(self._items, "close"):
            await to_thread.run_sync(self._step, self._items.close)

    def _step(self, function: Callable[..., Any], *arguments: Any) -> Any:
        with self._running:  # a task that is cancelled leaves its thread in the middle of a step
            return self._context.run(function, *arguments)


@asynccontextmanager
async def closing(items: AsyncIterator[Any]) -> AsyncIterator[None]:
    """Close an iterator in the end, in the task that iterates it, also when that is cancelled."""
    try:
        yield
    finally:
        # Generators have the one, streams of model vendors' clients the other.
        close = getattr(items, "aclose", None) or getattr(items, "close", None)
        with CancelScope(shield=True):
            if close is not None and inspect.isawaitable(closed := close()):
                await closed


@asynccontextmanager
async def while_connected(receive: Receive) -> AsyncIterator[None]:
    """Cancel what is inside when the client leaves.

    Raises:
        ClientDisconnect: it left.
    """
    # A deadline that is now. It cancels once, so that what is cancelled can wait for its own clean-up.
    deadline = asyncio.timeout(None)
    try:
        async with deadline:
            watcher = asyncio.create_task(end_on_disconnect(receive, deadline))
            try:
                yield
            finally:
                watcher.cancel()
    except TimeoutError as error:
        if deadline.expired():
            raise ClientDisconnect("the client left before the end of the stream") from error
        raise


async def end_on_disconnect(receive: Receive, deadline: asyncio.Timeout) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    deadline.reschedule(asyncio.get_running_loop().time())


def event(value: Any) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"


def ending(data: bytes) -> ASGIApp:
    """An app that ends a reply that has started."""

    async def end(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.body", "body": data})

    return end


async def passed_on(response: Response, scope: Scope, receive: Receive, send: Send) -> ASGIApp:
    """Send an app's own response, but for its last message and what it does in the background."""
    background, response.background = response.background, None
    last: list[Message] = []

    async def hold_last(message: Message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            last.append(message)
        else:
            await send(message)

    async def end(_scope: Scope, _receive: Receive, send: Send) -> None:
        for message in last:
            await send(message)
        if background is not None:
            await background()

    await response(scope, receive, hold_last)
    return end


# --- failures ---


def described(error: Exception) -> tuple[int, dict[str, Any]]:
    """The HTTP status of a failure, and MLflow's form for what a client is told."""
    if isinstance(error, MlflowException):
        return error.get_http_status_code(), json.loads(error.serialize_as_json())
    if isinstance(error, HTTPException):
        return error.status_code, {"error_code": code_of(error.status_code), "message": error.detail}
    message = f"{type(error).__name__}: {error}"
    return HTTPStatus.INTERNAL_SERVER_ERROR, {"error_code": "INTERNAL_ERROR", "message": message}


def code_of(status: int) -> str:
    try:
        return HTTPStatus(status).name
    except ValueError:
        return f"HTTP_{status}"


def error_response(status: int, description: Any, headers: Any = None) -> Response:
    return Response(to_json(description), status, headers, media_type="application/json")
