"""The agent that every peer serves: eight calls over a realistic run, and an answer.

``POST /invocations`` takes ``{"trace_bytes": n, "response_bytes": m, "seed": s}``. The reply's header
``x-record`` is what the peer's store knows the request by. ``GET /prepare?trace_bytes=n&seeds=k`` makes the
runs beforehand: a model's time is not what is measured.

Imports what all environments have: Starlette, and orjson for the workload.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Final

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from benchmarks.workload import Step, agent_run, response_body

__all__ = ["RECORD_HEADER", "Asked", "Recorded", "agent_app"]

RECORD_HEADER: Final = "x-record"

steps_of = cache(agent_run)
answer_of = cache(response_body)


@dataclass(frozen=True)
class Asked:
    """One request: its body, the calls that the agent makes, and the body of the answer."""

    body: bytes
    steps: list[Step]
    answer: bytes


Recorded = Callable[[Asked], str]
"""Runs the agent and records it as the peer does; returns what the record is known by, if anything."""


def agent_app(run: Recorded) -> Starlette:
    """The agent behind HTTP."""

    async def invocations(request: Request) -> Response:
        body = await request.body()
        options = json.loads(body)
        seed = options["seed"]
        steps = steps_of(options["trace_bytes"], seed)
        asked = Asked(body, steps, answer_of(options["response_bytes"], seed))
        record = run(asked)
        return Response(asked.answer, media_type="application/json", headers={RECORD_HEADER: record})

    async def prepare(request: Request) -> Response:
        for seed in range(int(request.query_params["seeds"])):
            steps_of(int(request.query_params["trace_bytes"]), seed)
        return PlainTextResponse("")

    return Starlette(
        routes=[Route("/invocations", invocations, methods=["POST"]), Route("/prepare", prepare)]
    )
