"""Agents for tests of the middleware, as users write them."""

import asyncio
import gzip
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import mlflow
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.background import BackgroundTask

CHUNKS = ("The", " answer", " is", " 42")


@mlflow.trace(span_type="AGENT")
def answer(question: str) -> dict[str, Any]:
    with mlflow.start_span("retrieve", span_type="RETRIEVER") as span:
        span.set_inputs({"question": question})
        span.set_outputs([{"page_content": f"about {question}", "metadata": {"doc_uri": "a.md"}}])
    return {"answer": f"You asked: {question}"}


def sse_chunks() -> Iterator[str]:
    for text in CHUNKS:
        choice = {"index": 0, "delta": {"role": "assistant", "content": text}}
        yield f"data: {mlflow_json({'id': 'c1', 'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"
    yield "data: [DONE]\n\n"


def mlflow_json(value: Any) -> str:
    import json

    return json.dumps(value)


def make_app() -> FastAPI:
    app = FastAPI()

    @app.post("/invocations")
    async def invocations(request: Request) -> dict[str, Any]:
        return answer((await request.json()).get("question", ""))

    @app.post("/sync")
    def sync(body: dict[str, Any]) -> dict[str, Any]:
        return answer(body["question"])

    @app.post("/stream")
    async def stream(body: dict[str, Any]) -> StreamingResponse:
        @mlflow.trace(name="stream_agent")
        async def generate() -> AsyncIterator[str]:
            for event in sse_chunks():
                await asyncio.sleep(0)
                yield event

        return StreamingResponse(generate(), media_type="text/event-stream")

    @app.post("/endless")
    async def endless() -> StreamingResponse:
        @mlflow.trace(name="endless_agent")
        async def generate() -> AsyncIterator[str]:
            for number in range(1000):
                yield f'data: {{"n": {number}}}\n\n'
                await asyncio.sleep(0.02)

        return StreamingResponse(generate(), media_type="text/event-stream")

    @app.post("/slow")
    async def slow() -> dict[str, Any]:
        with mlflow.start_span("slow"):
            await asyncio.sleep(1.0)
        return {"slow": True}

    @app.post("/raise")
    async def raise_before(body: dict[str, Any]) -> None:
        with mlflow.start_span("failing"):
            raise RuntimeError("the agent broke")

    @app.post("/raise-midway")
    async def raise_midway() -> StreamingResponse:
        async def generate() -> AsyncIterator[str]:
            yield 'data: {"n": 1}\n\n'
            raise RuntimeError("the agent broke midway")

        return StreamingResponse(generate(), media_type="text/event-stream")

    @app.post("/echo")
    async def echo(request: Request) -> Response:
        return Response(
            await request.body(), media_type=request.headers.get("x-reply-type", "application/json")
        )

    @app.post("/gzipped")
    async def gzipped(request: Request) -> Response:
        await request.body()
        body = gzip.compress(b'{"zipped": true}')
        return Response(body, headers={"content-encoding": "gzip"}, media_type="application/json")

    @app.post("/unread")
    async def unread() -> dict[str, Any]:
        return {}

    @app.post("/two-roots")
    async def two_roots() -> dict[str, Any]:
        answer("first")
        answer("second")
        return {"roots": 2}

    @app.post("/background")
    async def background() -> JSONResponse:
        def after() -> None:
            time.sleep(0.2)  # longer than the writer gathers records for a segment
            answer("in the background")

        return JSONResponse({"ok": True}, background=BackgroundTask(after))

    @app.post("/own-output")
    async def own_output() -> dict[str, Any]:
        return {"a": 1, "databricks_output": {"trace": {"mine": True}, "note": "kept"}}

    @app.get("/health")
    async def health() -> PlainTextResponse:
        return PlainTextResponse("ok")

    return app


async def bare_app(scope: Any, receive: Any, send: Any) -> None:
    """An ASGI function that knows no lifespan and answers in three messages."""
    assert scope["type"] == "http"
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body", False):
            break
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}
    )
    await send({"type": "http.response.body", "body": b'{"got":', "more_body": True})
    await send({"type": "http.response.body", "body": str(len(body)).encode(), "more_body": True})
    await send({"type": "http.response.body", "body": b"}"})
