"""The agent that benchmarks serve: eight MLflow spans over a realistic run, and an answer.

``POST /invocations`` takes ``{"trace_bytes": n, "response_bytes": m, "seed": s, "work_ms": w}``, all of it
optional. Inputs and outputs of the spans are about ``n`` bytes as JSON, the answer about ``m``, and it
waits ``w`` ms, as if for a model. ``GET /noop`` is a neighbour that waits one millisecond.
"""

import asyncio
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, Final

import mlflow
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from benchmarks.workload import Step, agent_run, response_body
from serving.settings import is_tracing_enabled

__all__ = ["SPANS", "app", "run_agent"]

SPANS: Final = 8
TRACE_BYTES: Final = 10_000
RESPONSE_BYTES: Final = 500


def run_agent(trace_bytes: int, seed: int = 0) -> Any:
    """One run of the agent: a root span and seven steps in it, given inputs, returning outputs."""
    return agent(trace_bytes, seed)()


@lru_cache(maxsize=16)
def agent(trace_bytes: int, seed: int) -> Callable[[], Any]:
    """An agent with what its steps will see, made beforehand: a model's time is not what is measured."""
    root, *steps = agent_run(trace_bytes, seed)
    return traced(root, [traced(step, []) for step in steps])


def traced(step: Step, within: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    @mlflow.trace(name=step.name, span_type=step.span_type)
    def run(inputs: Any) -> Any:  # noqa: ARG001 - the span's inputs
        for call in within:
            call()
        return step.outputs

    return partial(run, step.inputs)


answer = lru_cache(maxsize=16)(response_body)


async def invocations(request: Request) -> Response:
    asked = await request.json()
    seed = asked.get("seed", 0)
    run_agent(asked.get("trace_bytes", TRACE_BYTES), seed)
    if work_ms := asked.get("work_ms", 0):
        await asyncio.sleep(work_ms / 1000)
    body = answer(asked.get("response_bytes", RESPONSE_BYTES), seed)
    return Response(body, media_type="application/json")


async def noop(_: Request) -> Response:
    await asyncio.sleep(0.001)
    return PlainTextResponse("")


app = Starlette(routes=[Route("/invocations", invocations, methods=["POST"]), Route("/noop", noop)])
if not is_tracing_enabled():
    # The floor is an agent whose spans cost nothing, not one whose spans go to MLflow's own exporter.
    mlflow.tracing.disable()
