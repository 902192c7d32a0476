"""Agents as users write them, with MLflow's fluent and client APIs, behind one FastAPI app.

The request's ``n`` is in the inputs of every span, so that a test sees whose span it is.
"""

import asyncio
import contextvars
import queue
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import httpx
import mlflow
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from mlflow.tracing import (
    get_tracing_context_headers_for_http_request,
    set_tracing_context_from_http_request_headers,
)
from starlette.background import BackgroundTask

from tests.serving.tracing_agents import Client

Body = dict[str, Any]

GATES: Final[defaultdict[str, threading.Event]] = defaultdict(threading.Event)
"""What agents wait for, by name, until a test opens it."""
POOL: Final = ThreadPoolExecutor(2)
"""Made at import, as users do: its threads serve all requests."""
client: Final = Client()


@mlflow.trace(span_type="TOOL")
def tool(n: int) -> int:
    return n


@mlflow.trace
async def step(n: int) -> int:
    await asyncio.sleep(0.001)
    return await asyncio.to_thread(tool, n)


# --- tasks and threads ---


@mlflow.trace(span_type="AGENT")
async def fan_out(n: int) -> int:
    """Five steps at once, a tool on another thread, and a span that a third thread ends."""
    root = mlflow.get_current_active_span()
    assert root is not None
    await asyncio.gather(*(step(n) for _ in range(5)))
    await asyncio.to_thread(tool, n)
    by_client = client.start_span("by client", root.trace_id, root.span_id, inputs={"n": n})

    def end() -> None:
        client.end_span(by_client.trace_id, by_client.span_id, outputs=n)

    ending = threading.Thread(target=end)
    ending.start()
    await asyncio.to_thread(ending.join)
    mlflow.update_current_trace(tags={"n": str(n)})
    return n


@mlflow.trace(span_type="AGENT")
async def gather_with_failure(n: int) -> int:
    """One step fails; its siblings go on, as ``gather`` leaves them."""
    failed = asyncio.Event()

    @mlflow.trace
    async def failing(n: int) -> None:
        failed.set()
        raise ValueError("a step failed")

    @mlflow.trace
    async def surviving(n: int) -> int:
        await failed.wait()
        await asyncio.sleep(0.05)
        return n

    try:
        await asyncio.gather(surviving(n), failing(n))
    except ValueError:
        return n
    raise AssertionError("the failure was lost")


@mlflow.trace(span_type="AGENT")
async def group_with_failure(n: int) -> int:
    """One step fails; its siblings are cancelled, as ``TaskGroup`` does."""
    started = asyncio.Event()

    @mlflow.trace
    async def failing(n: int) -> None:
        await started.wait()
        raise ValueError("a step failed")

    @mlflow.trace
    async def cancelled(n: int) -> None:
        started.set()
        await asyncio.sleep(60)

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(cancelled(n))
            group.create_task(failing(n))
    except ExceptionGroup:
        return n
    raise AssertionError("the failure was lost")


def finished(thread: threading.Thread) -> None:
    thread.start()
    thread.join()


class Worker(threading.Thread):
    """A thread that overrides ``run``."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def run(self) -> None:
        tool(self.n)


def in_thread(n: int) -> None:
    finished(threading.Thread(target=tool, args=(n,)))


def in_subclass(n: int) -> None:
    finished(Worker(n))


def in_timer(n: int) -> None:
    finished(threading.Timer(0.001, tool, args=[n]))


def in_thread_of_thread(n: int) -> None:
    finished(threading.Thread(target=in_thread, args=(n,)))


def in_pool(n: int) -> None:
    POOL.submit(tool, n).result()


def in_pool_of_its_own(n: int) -> None:
    with ThreadPoolExecutor(2) as pool:
        pool.submit(tool, n).result()


def by_map(n: int) -> None:
    assert list(POOL.map(tool, [n])) == [n]


def in_pool_of_thread(n: int) -> None:
    finished(threading.Thread(target=in_pool, args=(n,)))


def in_copied_context(n: int) -> None:
    """As the documentation of MLflow advises."""
    POOL.submit(contextvars.copy_context().run, tool, n).result()


THREADING: Final[dict[str, Callable[[int], None]]] = {
    name.__name__: name
    for name in (
        in_thread,
        in_subclass,
        in_timer,
        in_thread_of_thread,
        in_pool,
        in_pool_of_its_own,
        by_map,
        in_pool_of_thread,
        in_copied_context,
    )
}


@mlflow.trace(span_type="AGENT")
def threading_agent(n: int, how: str) -> int:
    with mlflow.start_span("outer") as outer:
        outer.set_inputs({"n": n})
        THREADING[how](n)
    with mlflow.start_span("after") as after:
        after.set_inputs({"n": n})
    return n


@mlflow.trace(span_type="AGENT")
async def executor_agent(n: int) -> int:
    loop = asyncio.get_running_loop()
    with mlflow.start_span("outer") as outer:
        outer.set_inputs({"n": n})
        await asyncio.gather(
            loop.run_in_executor(None, tool, n), *(loop.run_in_executor(POOL, tool, n) for _ in range(3))
        )
    return n


@mlflow.trace(span_type="AGENT")
def context_agent(n: int) -> int:
    """Copies its context inside one span, and uses the copy inside another."""
    with mlflow.start_span("first") as first:
        first.set_inputs({"n": n})
        context = contextvars.copy_context()
        with mlflow.start_span("second") as second:
            second.set_inputs({"n": n})
            POOL.submit(context.run, tool, n).result()
    return n


JOBS: Final[queue.SimpleQueue[tuple[int, threading.Event]]] = queue.SimpleQueue()
CONSUMER: Final[list[threading.Thread]] = []


def consume() -> None:
    while True:
        n, done = JOBS.get()
        tool(n)
        done.set()


@mlflow.trace(span_type="AGENT")
def queue_agent(n: int) -> int:
    """The first request starts the thread that works for all."""
    if not CONSUMER:
        CONSUMER.append(threading.Thread(target=consume, daemon=True))
        CONSUMER[0].start()
    done = threading.Event()
    JOBS.put((n, done))
    assert done.wait(30)
    return n


# --- after the response ---


def job(gate: str) -> None:
    """Begins a span at once, and another one when a test says so."""
    with mlflow.start_span("job"):
        tool(1)
        GATES[f"{gate} began"].set()
        GATES[gate].wait(30)
        with mlflow.start_span("late"):
            pass


async def opened(gate: str) -> None:
    while not GATES[gate].is_set():
        await asyncio.sleep(0.005)


async def async_job(gate: str) -> None:
    with mlflow.start_span("job"):
        await asyncio.to_thread(tool, 1)
        GATES[f"{gate} began"].set()
        await opened(gate)
        with mlflow.start_span("late"):
            pass


TASKS: Final[set["asyncio.Task[None]"]] = set()


def forget(task: "asyncio.Task[None]") -> None:
    """Fire and forget, with the reference that asyncio's documentation asks for."""
    TASKS.add(task)
    task.add_done_callback(TASKS.discard)


@mlflow.trace(span_type="AGENT")
def answer(n: int = 0) -> dict[str, int]:
    return {"answer": n}


async def with_background(how: str, gate: str) -> JSONResponse:
    reply = answer(0)
    if how == "sync":
        return JSONResponse(reply, background=BackgroundTask(job, gate))
    if how == "async":
        return JSONResponse(reply, background=BackgroundTask(async_job, gate))
    if how == "thread":
        threading.Thread(target=job, args=(gate,)).start()
    else:
        forget(asyncio.create_task(async_job(gate)))
    await opened(f"{gate} began")  # a row waits for open spans, not for those that may come
    return JSONResponse(reply)


# --- generators ---


@mlflow.trace
def numbers(n: int) -> Iterator[int]:
    for number in range(3):
        tool(n)
        yield number


@mlflow.trace
async def async_numbers(n: int) -> AsyncIterator[int]:
    for number in range(3):
        await asyncio.sleep(0)
        tool(n)
        yield number


def half_closed(n: int) -> None:
    stream = numbers(n)
    next(stream)
    stream.close()  # type: ignore[attr-defined]


def half_forgotten(n: int) -> None:
    for _ in numbers(n):
        break


def never_consumed(n: int) -> None:
    numbers(n)


async def async_half_closed(n: int) -> None:
    stream = async_numbers(n)
    await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined]


async def async_half_forgotten(n: int) -> None:
    async for _ in async_numbers(n):
        break


async def async_never_consumed(n: int) -> None:
    async_numbers(n)


HALVES: Final[dict[str, Callable[[int], None]]] = {
    name.__name__: name for name in (half_closed, half_forgotten, never_consumed)
}
ASYNC_HALVES: Final[dict[str, Callable[[int], Awaitable[None]]]] = {
    name.__name__: name for name in (async_half_closed, async_half_forgotten, async_never_consumed)
}


@mlflow.trace(span_type="AGENT")
async def picky(n: int, how: str) -> int:
    """Takes what it needs of a stream, and goes on."""
    if how in HALVES:
        HALVES[how](n)
    else:
        await ASYNC_HALVES[how](n)
    tool(n)
    return n


@mlflow.trace(span_type="AGENT")
def instrumented(n: int) -> int:
    """An instrumentor's stream: its span begins with the call and ends with the stream, which never comes."""
    span = mlflow.start_span_no_context("llm", parent_span=mlflow.get_current_active_span(), inputs={"n": n})

    def chunks() -> Iterator[str]:
        yield "a"
        span.end(outputs="a")

    chunks()
    return n


def stepwise(n: int) -> Iterator[str]:
    """A stream whose spans are context managers around its ``yield``."""
    with mlflow.start_span("root") as root:
        root.set_inputs({"n": n})
        for number in range(3):
            tool(n)
            yield f"data: {number}\n\n"


async def async_stepwise(n: int) -> AsyncIterator[str]:
    with mlflow.start_span("root") as root:
        root.set_inputs({"n": n})
        for number in range(3):
            tool(n)
            yield f"data: {number}\n\n"


@mlflow.trace(name="root")
def traced_stream(n: int) -> Iterator[str]:
    for number in range(3):
        tool(n)
        yield f"data: {number}\n\n"


@mlflow.trace(name="root")
async def async_traced_stream(n: int) -> AsyncIterator[str]:
    for number in range(3):
        await step(n)
        yield f"data: {number}\n\n"


@mlflow.trace(name="root")
async def endless(n: int) -> AsyncIterator[str]:
    async for number in counting(n):
        yield f"data: {number}\n\n"


@mlflow.trace
async def counting(n: int) -> AsyncIterator[int]:
    for number in range(10_000):
        yield number
        await asyncio.sleep(0.01)


STREAMS: Final[dict[str, Callable[[int], Any]]] = {
    name.__name__: name for name in (stepwise, async_stepwise, traced_stream, async_traced_stream, endless)
}


# --- retries ---


@mlflow.trace(span_type="AGENT")
def retrying(n: int) -> int:
    for attempt in range(2):
        try:
            return flaky(n, attempt)
        except ConnectionError:
            continue
    return flaky(n, 2)


@mlflow.trace(span_type="LLM")
def flaky(n: int, attempt: int) -> int:
    if attempt < 2:
        raise ConnectionError(f"attempt {attempt} failed")
    return n


# --- endpoints that call each other ---


@mlflow.trace(span_type="AGENT")
async def caller(n: int, url: str, how: str) -> dict[str, Any]:
    """Asks another endpoint, and passes the context of its trace on."""
    headers = get_tracing_context_headers_for_http_request() if how != "nothing" else {}
    async with httpx.AsyncClient(verify=False) as http:
        reply = await http.post(f"{url}/{how}", json={"n": n}, headers=headers, timeout=60)
        reply.raise_for_status()
    tool(n)
    return {"inner": reply.headers["x-databricks-request-id"], "traceparent": headers.get("traceparent")}


@mlflow.trace(span_type="AGENT")
def callee(n: int) -> int:
    mlflow.update_current_trace(tags={"callee": str(n)})
    return tool(n)


@mlflow.trace(span_type="AGENT")
def merging(n: int, url: str) -> int:
    """Takes the trace that another endpoint returns into its own."""
    body = {"n": n, "databricks_options": {"return_trace": True}}
    output = httpx.post(f"{url}/plain", json=body, timeout=60, verify=False).json()["databricks_output"]
    mlflow.add_trace(output["trace"])
    return n


def make_app() -> FastAPI:
    app = FastAPI()

    @app.post("/fan-out")
    async def _fan_out(body: Body) -> int:
        return await fan_out(body["n"])

    @app.post("/gather-with-failure")
    async def _gather(body: Body) -> int:
        return await gather_with_failure(body["n"])

    @app.post("/group-with-failure")
    async def _group(body: Body) -> int:
        return await group_with_failure(body["n"])

    @app.post("/threads/{how}")
    def _threads(body: Body, how: str) -> int:
        return threading_agent(body["n"], how)

    @app.post("/executor")
    async def _executor(body: Body) -> int:
        return await executor_agent(body["n"])

    @app.post("/context")
    def _context(body: Body) -> int:
        return context_agent(body["n"])

    @app.post("/queue")
    def _queue(body: Body) -> int:
        return queue_agent(body["n"])

    @app.post("/background/{how}")
    async def _background(body: Body, how: str) -> JSONResponse:
        return await with_background(how, body["gate"])

    @app.post("/picky/{how}")
    async def _picky(body: Body, how: str) -> int:
        return await picky(body["n"], how)

    @app.post("/instrumented")
    def _instrumented(body: Body) -> int:
        return instrumented(body["n"])

    @app.post("/stream/{how}")
    def _stream(body: Body, how: str) -> StreamingResponse:
        return StreamingResponse(STREAMS[how](body["n"]), media_type="text/event-stream")

    @app.post("/retrying")
    def _retrying(body: Body) -> int:
        return retrying(body["n"])

    @app.post("/caller")
    async def _caller(body: Body) -> dict[str, Any]:
        return await caller(body["n"], body["url"], body["how"])

    @app.post("/merging")
    def _merging(body: Body) -> int:
        return merging(body["n"], body["url"])

    @app.post("/plain")
    def _plain(body: Body) -> dict[str, int]:
        return {"answer": callee(body["n"])}

    app.post("/nothing")(_plain)

    @app.post("/by-api")
    def _by_api(body: Body, request: Request) -> dict[str, int]:
        with set_tracing_context_from_http_request_headers(dict(request.headers)):
            return {"answer": callee(body["n"])}

    return app


app: Final = make_app()
