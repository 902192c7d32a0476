"""An agent for questions of memory: each request has data of its own, as in life; some stream, some fail.

``POST /invocations`` takes ``{"trace_bytes": n, "seed": s, "work_ms": w, "kind": k}``: it waits ``w`` ms once
its spans are made (none unless told); k is ``reply``, ``stream`` (events of a chat completion) or ``fail``
(the agent raises, and the server answers 500).
"""

import asyncio
import pickle
from collections.abc import AsyncIterator
from functools import lru_cache
from typing import Final

import mlflow
import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from benchmarks.agent import traced
from benchmarks.workload import agent_run, text

__all__ = ["app"]

EVENTS: Final = 20
EVENT_PAUSE_SECONDS: Final = 0.01


@lru_cache(maxsize=16)
def pickled_run(trace_bytes: int, seed: int) -> bytes:
    return pickle.dumps(agent_run(trace_bytes, seed))


def run_agent(trace_bytes: int, seed: int) -> None:
    """One run whose texts are new objects, those that steps share included: what holds on to them shows."""
    root, *steps = pickle.loads(pickled_run(trace_bytes, seed))
    traced(root, [traced(step, []) for step in steps])()


@mlflow.trace(name="support_agent", span_type="AGENT")
def fail(trace_bytes: int, seed: int) -> None:
    run_agent(trace_bytes, seed)
    raise RuntimeError("the model did not answer")


async def events(seed: int) -> AsyncIterator[bytes]:
    words = text(2000, seed).split()
    for number in range(EVENTS):
        await asyncio.sleep(EVENT_PAUSE_SECONDS)
        content = " ".join(words[number::EVENTS])
        chunk = {
            "id": f"chatcmpl-{seed}",
            "object": "chat.completion.chunk",
            "choices": [{"index": 0, "delta": {"role": "assistant", "content": content}}],
        }
        yield b"data: " + orjson.dumps(chunk) + b"\n\n"
    yield b"data: [DONE]\n\n"


async def invocations(request: Request) -> Response:
    asked = await request.json()
    trace_bytes, seed, kind = asked["trace_bytes"], asked["seed"], asked.get("kind", "reply")
    if kind == "fail":
        fail(trace_bytes, seed)
    run_agent(trace_bytes, seed)
    await asyncio.sleep(asked.get("work_ms", 0) / 1000)
    if kind == "stream":
        return StreamingResponse(events(seed), media_type="text/event-stream")
    return JSONResponse({"answer": text(500, seed)})


app = Starlette(routes=[Route("/invocations", invocations, methods=["POST"])])
