"""The agent that the kill tests serve: one span per request, and the question back."""

from typing import Any

import mlflow
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route


@mlflow.trace
def answer(question: dict[str, Any]) -> dict[str, Any]:
    return {"answer": question}


async def invocations(request: Request) -> JSONResponse:
    return JSONResponse(answer(await request.json()))


app = Starlette(routes=[Route("/invocations", invocations, methods=["POST"])])
