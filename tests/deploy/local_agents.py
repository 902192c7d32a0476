"""The agent that tests of engine ``local`` deploy; ``AGENT_FAILS`` makes a version fail as it says."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import mlflow
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

FAILS = os.environ.get("AGENT_FAILS")
VERSION = os.environ.get("INFERENCE_TABLE_SERVED_ENTITY", "").rpartition("/")[2]

if FAILS == "import":
    raise RuntimeError("the agent's model is missing\nand nobody knows where it is")
if FAILS == "exit":
    raise SystemExit(7)
if FAILS == "hang":
    time.sleep(600)


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[None]:
    if FAILS == "lifespan":
        raise RuntimeError("the agent's database does not answer")
    yield


@mlflow.trace
def answer(question: Any) -> dict[str, Any]:
    return {"question": question, "version": VERSION, "pid": os.getpid()}


async def invocations(request: Request) -> JSONResponse:
    return JSONResponse(answer((await request.json()).get("question")))


async def stream(request: Request) -> StreamingResponse:
    """As many events as are asked for, 20 a second."""
    count = (await request.json())["events"]

    async def events() -> AsyncIterator[str]:
        for number in range(count):
            yield f'data: {{"number": {number}, "version": "{VERSION}"}}\n\n'
            await asyncio.sleep(0.05)
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


async def poison(_: Request) -> JSONResponse:
    if FAILS == "poison":
        os.kill(os.getpid(), signal.SIGKILL)
    return JSONResponse({})


app = Starlette(
    lifespan=lifespan,
    routes=[
        Route("/invocations", invocations, methods=["POST"]),
        Route("/stream", stream, methods=["POST"]),
        Route("/poison", poison, methods=["POST"]),
    ],
)
