"""The same small agent in the four forms that MLflow traces, and what may go wrong while it is traced."""

import functools
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Final

import mlflow
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from mlflow.entities import SpanEvent
from mlflow.tracing.provider import get_bridged_tracer_provider
from opentelemetry.sdk.trace import SpanProcessor

from tests.serving.tracing_agents import Client

Body = dict[str, Any]


@functools.cache
def client() -> Any:
    """MLflow's, which the light SDK does not have. Making one makes a tracking store."""
    return mlflow.MlflowClient() if hasattr(mlflow, "MlflowClient") else Client()


class Unprintable:
    """A value that nothing can be made of."""

    def __repr__(self) -> str:
        raise RuntimeError("no text form")

    __str__ = __repr__

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("no attributes")


class Slippery(dict[str, Any]):
    """A dictionary that fails when it is walked through."""

    def items(self) -> Any:
        raise RuntimeError("not now")

    __iter__ = keys = values = items


@mlflow.trace(span_type="LLM", name="estimate", attributes={"model": "small"})
def weigh(text: str) -> int:
    return len(text)


@mlflow.trace
def agent(text: str, odd: Any = None) -> dict[str, int]:
    weight = weigh(text)
    with mlflow.start_span("double") as span:
        span.add_event(SpanEvent("doubling", attributes={"weight": weight}))  # type: ignore[abstract]
        weight = 2 * weight
    return {"weight": weight}


@mlflow.trace(name="agent")
async def async_agent(text: str, odd: Any = None) -> dict[str, int]:
    return {"weight": 2 * weigh(text)}


@mlflow.trace(name="agent")
def stream_agent(text: str, odd: Any = None) -> Iterator[str]:
    for word in text.split():
        yield f"data: {weigh(word)}\n\n"


@mlflow.trace(name="agent")
async def async_stream_agent(text: str, odd: Any = None) -> AsyncIterator[str]:
    for word in text.split():
        yield f"data: {weigh(word)}\n\n"


def client_agent(text: str) -> dict[str, int]:
    """The same by the client API, which knows no active span."""
    root = client().start_trace("agent", inputs={"text": text})
    child = client().start_span("estimate", root.trace_id, root.span_id, inputs={"text": text})
    client().end_span(root.trace_id, child.span_id, outputs=len(text))
    client().end_trace(root.trace_id, outputs={"weight": 2 * len(text)})
    return {"weight": 2 * len(text)}


@mlflow.trace
def refuse(text: str) -> None:
    raise ValueError(f"cannot weigh {text!r}")


@mlflow.trace(name="agent")
def failing_agent(text: str) -> None:
    refuse(text)


@mlflow.trace(name="agent")
async def async_failing_agent(text: str) -> None:
    refuse(text)


@mlflow.trace(name="agent")
def failing_stream(text: str) -> Iterator[str]:
    yield f"data: {weigh(text)}\n\n"
    refuse(text)


@mlflow.trace(name="agent")
async def async_failing_stream(text: str) -> AsyncIterator[str]:
    yield f"data: {weigh(text)}\n\n"
    refuse(text)


@mlflow.trace(name="agent")
def slow_agent(seconds: float) -> dict[str, float]:
    """Works in steps, until its time is up."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with mlflow.start_span("step"):
            time.sleep(0.05)
    return {"seconds": seconds}


@mlflow.trace(name="agent")
def describing_agent(text: str) -> dict[str, int]:
    """Says of its trace what MLflow lets it say."""
    mlflow.update_current_trace(
        tags={"kind": "test"},
        metadata={"session": text},
        request_preview=f"weigh {text}",
        response_preview="weighed",
        state="ERROR",
    )
    return {"weight": len(text)}


AGENTS: Final[dict[str, Callable[[str], dict[str, int]]]] = {
    "function": agent,
    "client": client_agent,
    "describing": describing_agent,
}
STREAMS: Final[dict[str, Callable[..., Any]]] = {
    "generator": stream_agent,
    "async-generator": async_stream_agent,
    "failing-generator": failing_stream,
    "failing-async-generator": async_failing_stream,
}


def make_app() -> FastAPI:
    app = FastAPI()

    @app.post("/invocations/async")
    async def _async(body: Body) -> dict[str, int]:
        return await async_agent(body["text"])

    @app.post("/invocations/failing")
    def _failing(body: Body) -> None:
        failing_agent(body["text"])

    @app.post("/invocations/failing-async")
    async def _failing_async(body: Body) -> None:
        await async_failing_agent(body["text"])

    @app.post("/invocations/slow")
    def _slow(body: Body) -> dict[str, float]:
        return slow_agent(body["seconds"])

    @app.post("/invocations/{form}")
    def _invoke(body: Body, form: str) -> dict[str, int]:
        return AGENTS[form](body["text"])

    @app.post("/stream/{form}")
    def _stream(body: Body, form: str) -> StreamingResponse:
        return StreamingResponse(STREAMS[form](body["text"]), media_type="text/event-stream")

    @app.post("/odd/{form}")
    async def _odd(body: Body, form: str) -> Any:
        odd = [Unprintable(), Slippery(a=1), {1: {2: Unprintable()}}]
        if form == "function":
            return agent(body["text"], odd)
        if form == "async":
            return await async_agent(body["text"], odd)
        return StreamingResponse(STREAMS[form](body["text"], odd), media_type="text/event-stream")

    return app


class Failing(SpanProcessor):
    """An exporter of the application's that fails in one of its methods, or in none."""

    at: str = ""

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        if self.at == "start":
            raise RuntimeError("this exporter fails at a span's start")

    def on_end(self, span: Any) -> None:
        if self.at == "end":
            raise RuntimeError("this exporter fails at a span's end")


def fail(span: Any) -> None:
    raise RuntimeError("this span processor fails")


def make_breakable_app() -> FastAPI:
    """The same with ``/break/{part}``, which makes a part of tracing fail at every span from then on.

    For a process of its own: what it does to MLflow and OpenTelemetry stays.
    """
    app = make_app()
    failing = Failing()

    @app.put("/break/{part}")
    def _break(part: str) -> None:
        if not failing.at:
            get_bridged_tracer_provider().add_span_processor(failing)
        failing.at = part
        mlflow.tracing.configure(span_processors=[fail] if part == "processor" else [])

    return app


app: Final = make_breakable_app()
