"""An agent that has the feedback route among its own, for ``tracelake serve``."""

import mlflow
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from serving.feedback import FeedbackApp


@mlflow.trace(span_type="AGENT")
def answer(question: str) -> str:
    return f"You asked: {question}"


async def invocations(request: Request) -> JSONResponse:
    return JSONResponse({"answer": answer((await request.json())["question"])})


app = Starlette(
    routes=[
        Route("/invocations", invocations, methods=["POST"]),
        Route("/feedback", FeedbackApp()),
    ]
)
