"""Agents that are plain functions and objects, as users write them."""

from __future__ import annotations

import asyncio
import email.message
import functools
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.error import HTTPError

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_EXHAUSTED
from pydantic import BaseModel, Field
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse

if TYPE_CHECKING:
    from only_for_type_checkers import Reply

Body = dict[str, Any]


@mlflow.trace(span_type="TOOL")
def search(question: str) -> list[str]:
    time.sleep(0.001)
    return [f"about {question}"]


@mlflow.trace(span_type="TOOL")
async def async_search(question: str) -> list[str]:
    await asyncio.sleep(0.001)
    return [f"about {question}"]


# --- functions that answer whole ---


def predict(request: Body) -> Body:
    return {"found": search(request["question"])}


async def async_predict(request: Body) -> Body:
    [found, _] = await asyncio.gather(async_search(request["question"]), asyncio.to_thread(search, "it"))
    return {"found": found}


def with_default(request: Body, top: int = 1, **_: Any) -> Body:
    return {"found": search(request["question"])[:top]}


def with_options(request: Body, *, index: str) -> Body:
    return {"found": search(request["question"]), "index": index}


def passing_on(*args: Any, **kwargs: Any) -> Body:
    """What a decorator without ``functools.wraps`` leaves of a function."""
    return predict(*args, **kwargs)


def returning_a_coroutine(request: Body) -> Any:
    return async_predict(request)


class Settled:
    """An agent that keeps its settings in an object."""

    def __call__(self, request: Body) -> Body:
        return predict(request)

    def answer(self, request: Body) -> Body:
        return predict(request)


class AsyncCallable:
    async def __call__(self, request: Body) -> Body:
        return {"found": await async_search(request["question"])}


@mlflow.trace(span_type="AGENT", name="mine")
def traced(request: Body) -> Body:
    return predict(request)


@mlflow.trace(span_type="AGENT", name="mine")
async def async_traced(request: Body) -> Body:
    return {"found": await async_search(request["question"])}


class TracedCallable:
    @mlflow.trace(name="mine")
    def __call__(self, request: Body) -> Body:
        return predict(request)


WHOLE: Final[dict[str, tuple[Any, str]]] = {
    "sync": (predict, "predict(search)"),
    "async": (async_predict, "async_predict(async_search search)"),
    "a default": (with_default, "with_default(search)"),
    "partial": (functools.partial(with_options, index="a"), "with_options(search)"),
    "lambda": (lambda request: predict(request), "<lambda>(search)"),
    "no signature": (passing_on, "passing_on(search)"),
    "a coroutine": (returning_a_coroutine, "returning_a_coroutine(async_search search)"),
    "callable": (Settled(), "Settled(search)"),
    "async callable": (AsyncCallable(), "AsyncCallable(async_search)"),
    "method": (Settled().answer, "answer(search)"),
    "traced": (traced, "mine(search)"),
    "async traced": (async_traced, "mine(async_search)"),
    "traced callable": (TracedCallable(), "mine(search)"),
    "traced partial": (functools.partial(traced), "mine(search)"),
}
"""Agents, and the trace that a request to each makes."""

# --- functions that stream ---

VARIABLE: ContextVar[str] = ContextVar("VARIABLE", default="unset")


def words(request: Body) -> Iterator[Any]:
    """Keeps a span and a variable from one item to the next."""
    token = VARIABLE.set("set")
    with mlflow.start_span("writing"):
        for word in request["question"].split():
            search(word)
            yield {"word": word, "variable": VARIABLE.get()}
    VARIABLE.reset(token)


async def async_words(request: Body) -> AsyncIterator[Any]:
    token = VARIABLE.set("set")
    with mlflow.start_span("writing"):
        for word in request["question"].split():
            await async_search(word)
            yield {"word": word, "variable": VARIABLE.get()}
    VARIABLE.reset(token)


def preparing_words(request: Body) -> Iterator[Any]:
    search("everything")
    return words(request)


async def async_preparing_words(request: Body) -> AsyncIterator[Any]:
    await async_search("everything")
    return async_words(request)


async def async_preparing_sync_words(request: Body) -> Iterator[Any]:
    await async_search("everything")
    return words(request)


def preparing_async_words(request: Body) -> AsyncIterator[Any]:
    search("everything")
    return async_words(request)


def mapped(request: Body) -> Iterator[Any]:
    def one(word: str) -> Body:
        return {"word": search(word)[0][6:], "variable": "set"}

    return map(one, request["question"].split())


@mlflow.trace(name="mine")
def traced_words(request: Body) -> Iterator[Any]:
    for word in request["question"].split():
        search(word)
        yield {"word": word, "variable": "set"}


@mlflow.trace(name="mine")
async def async_traced_words(request: Body) -> AsyncIterator[Any]:
    for word in request["question"].split():
        await async_search(word)
        yield {"word": word, "variable": "set"}


STREAMS: Final[dict[str, tuple[Any, str]]] = {
    "generator": (words, "words(writing(search search))"),
    "async generator": (async_words, "async_words(writing(async_search async_search))"),
    "sync, sync": (preparing_words, "preparing_words(search writing(search search))"),
    "async, async": (
        async_preparing_words,
        "async_preparing_words(async_search writing(async_search async_search))",
    ),
    "async, sync": (
        async_preparing_sync_words,
        "async_preparing_sync_words(async_search writing(search search))",
    ),
    "sync, async": (
        preparing_async_words,
        "preparing_async_words(search writing(async_search async_search))",
    ),
    "iterator": (mapped, "mapped(search search)"),
    "partial": (functools.partial(words), "words(writing(search search))"),
    "traced": (traced_words, "mine(search search)"),
    "async traced": (async_traced_words, "mine(async_search async_search)"),
}
"""Streaming agents, and the trace that the question "why not" makes."""


class Gate:
    """Holds agents in the middle of their streams."""

    def __init__(self) -> None:
        self.opened = threading.Event()

    def sync(self, _: Body) -> Iterator[int]:
        yield 1
        assert self.opened.wait(30)
        yield 2


class Endless:
    """Streams until it is closed, and tells so."""

    def __init__(self) -> None:
        self.closed = threading.Event()

    def sync(self, _: Body) -> Iterator[int]:
        try:
            with mlflow.start_span("inside"):
                while True:
                    yield 1
                    time.sleep(0.01)
        finally:
            self.closed.set()

    async def asynchronous(self, _: Body) -> AsyncIterator[int]:
        try:
            with mlflow.start_span("inside"):
                while True:
                    yield 1
                    await asyncio.sleep(0.01)
        finally:
            await asyncio.sleep(0.01)  # as one does who closes a connection
            self.closed.set()

    def vendor(self, _: Body) -> VendorStream:
        return VendorStream(self.closed)


class Unclosable:
    """An iterator without ``close``."""

    def __init__(self, request: Body) -> None:
        self._left = request["n"]

    def __iter__(self) -> Unclosable:
        return self

    def __next__(self) -> int:
        if self._left == 0:
            raise StopIteration
        self._left -= 1
        return int(self._left)


class VendorStream:
    """An async iterator that is closed as OpenAI's are: by a coroutine ``close``."""

    def __init__(self, closed: threading.Event) -> None:
        self._closed = closed

    def __aiter__(self) -> VendorStream:
        return self

    async def __anext__(self) -> int:
        await asyncio.sleep(0.01)
        return 1

    async def close(self) -> None:
        await asyncio.sleep(0.01)
        self._closed.set()


# --- typed requests ---


class Message(BaseModel):
    role: str
    content: str


class ChatRequest(BaseModel):
    messages: list[Message]
    temperature: float = Field(default=1.0, ge=0)


@dataclass
class Question:
    text: str
    top: int = 1


def typed(request: ChatRequest) -> str:
    return f"{type(request).__name__}: {request.messages[-1].content} at {request.temperature}"


def typed_by_dataclass(question: Question) -> str:
    return f"{type(question).__name__}: {question.text}, top {question.top}"


@mlflow.trace
def traced_and_typed(request: ChatRequest) -> str:
    return typed(request)


class Typed:
    def __call__(self, request: ChatRequest) -> str:
        return typed(request)


def for_type_checkers(request: Body) -> Reply:
    return request


# --- what agents return ---


def returning(value: Any) -> Callable[[Body], Any]:
    def agent(request: Body) -> Any:
        search("it")
        return value() if callable(value) else value

    return agent


def own_response(_: Body) -> JSONResponse:
    search("it")
    return JSONResponse({"busy": True}, 202, {"x-mine": "1"})


def own_stream(_: Body) -> StreamingResponse:
    async def lines() -> AsyncIterator[str]:
        with mlflow.start_span("lines"):
            yield "one\n"
            yield "two\n"

    return StreamingResponse(lines(), media_type="text/plain")


def broken_stream(_: Body) -> StreamingResponse:
    async def lines() -> AsyncIterator[str]:
        yield "one\n"
        raise RuntimeError("the line is cut")

    return StreamingResponse(lines(), media_type="text/plain")


class WithBackground:
    def __init__(self) -> None:
        self.ran = threading.Event()

    def __call__(self, _: Body) -> JSONResponse:
        return JSONResponse({}, background=BackgroundTask(self.ran.set))


# --- failures ---


def failing(request: Body) -> Body:
    search("it")
    raise KeyError(request["question"])


async def async_failing(request: Body) -> Body:
    await async_search("it")
    raise KeyError(request["question"])


def refusing(_: Body) -> Body:
    raise HTTPException(404, "no such document", {"x-mine": "1"})


def failing_upstream(_: Body) -> Body:
    headers = email.message.Message()
    headers["set-cookie"] = "a=secret"
    raise HTTPError("http://upstream", 401, "Unauthorized", headers, None)


def exhausted(_: Body) -> Body:
    raise MlflowException("come back later", RESOURCE_EXHAUSTED)


def failing_at(n: int) -> Callable[[Body], Iterator[int]]:
    def agent(_: Body) -> Iterator[int]:
        for number in range(n):
            search("it")
            yield number
        raise ValueError("out of numbers")

    return agent


def async_failing_at(n: int) -> Callable[[Body], AsyncIterator[int]]:
    async def agent(_: Body) -> AsyncIterator[int]:
        for number in range(n):
            yield number
        raise ValueError("out of numbers")

    return agent


# --- objects ---


class Agent:
    """Answers whole, or in parts where the request says so."""

    def predict(self, request: Body) -> Body:
        return predict(request)

    def predict_stream(self, request: Body) -> Iterator[Any]:
        return words(request)


class WholeAgent:
    async def predict(self, request: ChatRequest) -> str:
        return typed(request)


# --- what can't be served ---


def make_app() -> Any:
    raise AssertionError("a factory is not to be called")


def two(first: Body, second: Body) -> None: ...


def by_name(*, request: Body) -> None: ...


def wsgi(environ: Body, start_response: Any) -> list[bytes]:
    return []


async def route(request: Request) -> JSONResponse:
    return JSONResponse(await request.json())


class Chain:
    """Neither callable nor with ``predict``, as LangChain's runnables are."""

    def invoke(self, value: Any) -> Any: ...
