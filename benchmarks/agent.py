"""The agent that benchmarks serve: 8 MLflow spans around a text of the size asked for, and a short answer."""

import random
from functools import lru_cache
from typing import Any

import mlflow
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from serving import InferenceTableMiddleware
from serving.settings import is_tracing_enabled

SPANS = 8
TEXT = (
    "the agent retrieves documents about refunds and answers politely with a summary of what policy says "
    "when customers ask whether an order that was delayed can still be returned without a receipt naïve café "
)
WORDS = TEXT.split()


@lru_cache(maxsize=8)
def text_of(size: int) -> str:
    """Words that compress like text, the same for each run."""
    draw = random.Random(size)
    words = [
        draw.choice(WORDS) + (str(draw.randrange(1000)) if draw.random() < 0.1 else "")
        for _ in range(size // 7)
    ]
    return " ".join(words)[:size]


@mlflow.trace(span_type="TOOL")
def step(messages: list[dict[str, str]]) -> dict[str, Any]:
    return {"messages": messages, "done": True}


@mlflow.trace(span_type="AGENT")
def agent(size: int) -> str:
    """A root span and seven steps; inputs and outputs together are about ``size`` bytes."""
    part = text_of(max(1, size // (2 * (SPANS - 1))))
    messages = [{"role": "user", "content": part}]
    for _ in range(SPANS - 1):
        step(messages)
    return "done"


async def invocations(request: Request) -> JSONResponse:
    return JSONResponse({"answer": agent((await request.json())["size"])})


app = Starlette(routes=[Route("/invocations", invocations, methods=["POST"])])
app.add_middleware(InferenceTableMiddleware)
if not is_tracing_enabled():
    # The floor is an agent whose spans cost nothing, not one whose spans go to MLflow's own exporter.
    mlflow.tracing.disable()
