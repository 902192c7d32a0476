"""An agent whose model calls are instrumented by OpenTelemetry instrumentors, behind one FastAPI app.

The model is where ``MODEL_SERVER`` says. What else is in the environment:

- ``INSTRUMENTOR``: ``openinference`` or ``traceloop``.
- ``PROVIDER``: whose tracer provider it gets: ``mlflow``'s, or the app's ``own``, which is OpenTelemetry's
  global one then.
- ``WHEN``: at ``import`` of this module, or at the server's ``startup``, which is after the middleware's.
- ``WATCHED``: ``true`` adds the app's own span processor to the provider. An own provider always has it.
- ``MIDDLEWARE``: ``true`` adds ours, for servers that know nothing of it.
"""

# mypy: disable-error-code="no-untyped-call"
# MLflow is typed in part only.

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import cache
from typing import Any, Final

import httpx
import mlflow
import mlflow.openai
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from mlflow.tracing import get_tracing_context_headers_for_http_request
from mlflow.tracing.provider import get_bridged_tracer_provider
from openai import AsyncOpenAI, OpenAI
from opentelemetry import propagate, trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from serving import InferenceTableMiddleware

Body = dict[str, Any]
EXPORTER: Final = InMemorySpanExporter()
MODEL: Final = "gpt-4o-mini"


def instrument() -> TracerProvider:
    """Set up the instrumentor, as the environment says, and return the provider it uses."""
    if os.environ.get("PROVIDER", "mlflow") == "mlflow":
        provider: TracerProvider = get_bridged_tracer_provider()
        if os.environ.get("WATCHED") == "true":
            provider.add_span_processor(SimpleSpanProcessor(EXPORTER))
    else:
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(EXPORTER))
        trace.set_tracer_provider(provider)
    instrumentor().instrument(tracer_provider=provider)
    return provider


def instrumentor() -> Any:
    if os.environ["INSTRUMENTOR"] == "openinference":
        from openinference.instrumentation.openai import OpenAIInstrumentor

        return OpenAIInstrumentor()
    from opentelemetry.instrumentation.openai import OpenAIInstrumentor as TraceloopInstrumentor

    return TraceloopInstrumentor()


PROVIDERS: Final = [instrument()] if os.environ.get("WHEN", "import") == "import" else []


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    if not PROVIDERS:
        PROVIDERS.append(instrument())
    yield


app = FastAPI(lifespan=lifespan)
if os.environ.get("MIDDLEWARE") == "true":
    app.add_middleware(InferenceTableMiddleware)


def base_url(behaviour: str = "") -> str:
    return "/".join(filter(None, [os.environ["MODEL_SERVER"], behaviour, "v1"]))


@cache
def client(behaviour: str = "") -> OpenAI:
    return OpenAI(api_key="secret-key", base_url=base_url(behaviour), max_retries=0)


@cache
def async_client(behaviour: str = "") -> AsyncOpenAI:
    return AsyncOpenAI(api_key="secret-key", base_url=base_url(behaviour), max_retries=0)


def tracer() -> trace.Tracer:
    return PROVIDERS[0].get_tracer("an.instrumentor")


def messages(body: Body) -> Any:
    earlier = [{"role": "user", "content": f"earlier {number}"} for number in range(body.get("earlier", 0))]
    return [*earlier, {"role": "user", "content": body["question"]}]


# --- nothing but the instrumentor ---


@app.post("/chat")
def chat(body: Body) -> Body:
    reply = client(body.get("behaviour", "")).chat.completions.create(model=MODEL, messages=messages(body))
    return {"answer": reply.choices[0].message.content}


@app.post("/achat")
async def achat(body: Body) -> Body:
    completions = async_client(body.get("behaviour", "")).chat.completions
    reply = await completions.create(model=MODEL, messages=messages(body))
    return {"answer": reply.choices[0].message.content}


@app.post("/stream")
def stream(body: Body) -> StreamingResponse:
    def chunks() -> Iterator[str]:
        parts = client(body.get("behaviour", "")).chat.completions.create(
            model=MODEL, messages=messages(body), stream=True, stream_options={"include_usage": True}
        )
        for part in parts:
            if part.choices and part.choices[0].delta.content:
                yield event(part.choices[0].delta.content)

    return StreamingResponse(chunks(), media_type="text/event-stream")


@app.post("/astream")
async def astream(body: Body) -> StreamingResponse:
    async def chunks() -> AsyncIterator[str]:
        parts = await async_client(body.get("behaviour", "")).chat.completions.create(
            model=MODEL, messages=messages(body), stream=True, stream_options={"include_usage": True}
        )
        async for part in parts:
            if part.choices and part.choices[0].delta.content:
                yield event(part.choices[0].delta.content)

    return StreamingResponse(chunks(), media_type="text/event-stream")


def event(value: Any) -> str:
    return f"data: {json.dumps(value)}\n\n"


@app.post("/responses")
def responses(body: Body) -> Body:
    reply = client().responses.create(model=MODEL, input=body["question"])
    return {"answer": reply.output_text}


@app.post("/embeddings")
def embeddings(body: Body) -> Body:
    reply = client().embeddings.create(model="text-embedding-3-small", input=body["question"])
    return {"answer": reply.data[0].embedding}


# --- with MLflow's spans around and inside ---


@mlflow.trace(span_type="TOOL")
def lookup(topic: str) -> str:
    return f"all about {topic}"


TOOL: Final[Any] = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Look a topic up.",
        "parameters": {"type": "object", "properties": {"topic": {"type": "string"}}, "required": ["topic"]},
    },
}


@mlflow.trace(span_type="AGENT")
def agent(question: str) -> str | None:
    """Asks the model, calls the tool that it wants, and asks again."""
    conversation: list[Any] = [{"role": "user", "content": question}]
    wish = (
        client().chat.completions.create(model=MODEL, messages=conversation, tools=[TOOL]).choices[0].message
    )
    assert wish.tool_calls is not None
    [call] = wish.tool_calls
    assert call.type == "function"
    result = lookup(**json.loads(call.function.arguments))
    conversation += [wish.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": result}]
    return client().chat.completions.create(model=MODEL, messages=conversation).choices[0].message.content


@mlflow.trace(span_type="AGENT")
async def async_agent(question: str) -> list[str | None]:
    """Asks the model two things at once."""
    asked = [
        async_client().chat.completions.create(model=MODEL, messages=[{"role": "user", "content": text}])
        for text in (f"{question} one", f"{question} two")
    ]
    return [reply.choices[0].message.content for reply in await asyncio.gather(*asked)]


@app.post("/agent")
def run_agent(body: Body) -> Body:
    return {"answer": agent(body["question"])}


@app.post("/agent/async")
async def run_async_agent(body: Body) -> Body:
    return {"answers": await async_agent(body["question"])}


@app.post("/agent/workflow")
def run_workflow(body: Body) -> Body:
    """A span of OpenTelemetry's around MLflow's, as frameworks with their own instrumentation have it."""
    with tracer().start_as_current_span("workflow"):
        return {"answer": agent(body["question"])}


@app.post("/agent/stream")
def stream_agent(body: Body) -> StreamingResponse:
    """MLflow's span of a generator, around the model's stream."""

    @mlflow.trace(span_type="AGENT")
    def words(question: str) -> Iterator[str]:
        asked: Any = [{"role": "user", "content": question}]
        parts = client(body.get("behaviour", "")).chat.completions.create(
            model=MODEL, messages=asked, stream=True, stream_options={"include_usage": True}
        )
        for part in parts:
            if part.choices and part.choices[0].delta.content:
                yield part.choices[0].delta.content

    return StreamingResponse(map(event, words(body["question"])), media_type="text/event-stream")


# --- other services ---


@app.post("/call")
async def call(body: Body) -> Body:
    """Calls another service, which gets the trace context as MLflow or OpenTelemetry write it."""
    with (
        mlflow.start_span("root"),
        tracer().start_as_current_span("step"),
        mlflow.start_span("calling") as span,
        tracer().start_as_current_span("request") as request,
    ):
        headers: dict[str, str] = {}
        if body["by"] == "mlflow":
            headers |= get_tracing_context_headers_for_http_request()
        else:
            propagate.inject(headers)
        await post(f"{base_url()}/chat/completions", {"model": MODEL, "messages": messages(body)}, headers)
    return {"mlflow": span.span_id, "opentelemetry": f"{request.get_span_context().span_id:016x}"}


@app.post("/distributed")
async def distributed(body: Body, request: Request) -> Body:
    """Asks this server twice at once, as parts of one trace."""
    with mlflow.start_span("distributed"):
        headers = get_tracing_context_headers_for_http_request()
        url = f"{str(request.base_url).rstrip('/')}/agent"
        asked = [post(url, {"question": text}, headers) for text in body["questions"]]
        replies = await asyncio.gather(*asked)
    return {"ids": [reply.headers["x-databricks-request-id"] for reply in replies]}


async def post(url: str, body: Body, headers: dict[str, str]) -> httpx.Response:
    async with httpx.AsyncClient(timeout=30) as client:
        return await client.post(url, json=body, headers=headers)


@app.get("/exported")
def exported() -> list[Body]:
    """What the app's own exporter has seen, oldest first."""
    return [json.loads(span.to_json()) for span in EXPORTER.get_finished_spans()]
