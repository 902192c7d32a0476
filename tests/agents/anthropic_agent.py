"""Agents on Anthropic's client as users write them, behind one FastAPI app.

The model is where ``MODEL_SERVER`` says. ``AUTOLOG`` holds the arguments of ``mlflow.anthropic.autolog``;
where it is ``off``, the client's own OpenTelemetry spans are given to MLflow's provider instead.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterator
from functools import cache
from typing import Any, Final

import mlflow
import mlflow.anthropic
from anthropic import Anthropic, AnthropicError, AsyncAnthropic
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from mlflow.tracing.provider import get_bridged_tracer_provider
from pydantic import BaseModel

AUTOLOG: Final = os.environ.get("AUTOLOG", "{}")
if AUTOLOG != "off":
    mlflow.anthropic.autolog(**json.loads(AUTOLOG))

app = FastAPI()

MODEL: Final = "claude-sonnet-4-5"
CALL: Final[dict[str, Any]] = {"model": MODEL, "max_tokens": 200, "system": "Be brief."}
TOOL: Final[Any] = {
    "name": "lookup",
    "description": "Look a topic up.",
    "input_schema": {"type": "object", "properties": {"topic": {"type": "string"}}, "required": ["topic"]},
}
KEPT: Final[list[Any]] = []
"""Streams that their agents forgot."""


class Ask(BaseModel):
    question: str
    behaviour: str = ""
    retries: int = 0


class Verdict(BaseModel):
    summary: str


@cache
def client(behaviour: str, retries: int) -> Anthropic:
    return Anthropic(**settings(behaviour, retries))


@cache
def async_client(behaviour: str, retries: int) -> AsyncAnthropic:
    return AsyncAnthropic(**settings(behaviour, retries))


def settings(behaviour: str, retries: int) -> dict[str, Any]:
    url = "/".join(filter(None, [os.environ["MODEL_SERVER"], behaviour]))
    given = {"api_key": "secret-key", "base_url": url, "max_retries": retries}
    if AUTOLOG == "off":
        traces = {"content_mode": "content"}
        given["open_telemetry"] = {"tracer_provider": get_bridged_tracer_provider(), "traces": traces}
    return given


def anthropic(ask: Ask) -> Anthropic:
    return client(ask.behaviour, ask.retries)


def async_anthropic(ask: Ask) -> AsyncAnthropic:
    return async_client(ask.behaviour, ask.retries)


def messages(question: str) -> list[Any]:
    return [{"role": "user", "content": question}]


def event(part: BaseModel) -> str:
    kind = getattr(part, "type", "message")
    return f"event: {kind}\ndata: {part.model_dump_json(exclude_none=True)}\n\n"


def streamed(events: Iterator[str] | AsyncIterator[str]) -> StreamingResponse:
    return StreamingResponse(events, media_type="text/event-stream")


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


# --- messages ---


@app.post("/message")
def message(ask: Ask) -> Any:
    """Nothing but the call of the model."""
    return anthropic(ask).messages.create(messages=messages(ask.question), **CALL)


@app.post("/amessage")
async def amessage(ask: Ask) -> Any:
    return await async_anthropic(ask).messages.create(messages=messages(ask.question), **CALL)


@app.post("/parse")
def parse(ask: Ask) -> Any:
    parsed = anthropic(ask).messages.parse(messages=messages(ask.question), output_format=Verdict, **CALL)
    return {"verdict": parsed.parsed_output}


@app.post("/fallback")
@mlflow.trace(span_type="AGENT")
def fallback(ask: Ask) -> str:
    """An agent that answers in its own words where the model fails."""
    try:
        return text_of(message(ask))
    except AnthropicError:
        return "Please try again later."


# --- agents ---


@mlflow.trace(span_type="TOOL")
def lookup(topic: str) -> str:
    if "unknown" in topic:
        raise LookupError(f"nothing about {topic}")
    return f"all about {topic}"


@app.post("/agent")
@mlflow.trace(name="agent", span_type="AGENT")
def agent(ask: Ask) -> str:
    """Calls tools until the model has an answer, in one growing list of messages."""
    conversation = messages(ask.question)
    while True:
        reply = anthropic(ask).messages.create(messages=conversation, tools=[TOOL], **CALL)
        conversation.append({"role": "assistant", "content": reply.content})
        results = [
            {"type": "tool_result", "tool_use_id": block.id, "content": lookup(**block.input)}
            for block in reply.content
            if block.type == "tool_use"
        ]
        if not results:
            return text_of(reply)
        conversation.append({"role": "user", "content": results})


@app.post("/gather")
async def gather(ask: Ask) -> list[str]:
    return await compare(ask)


@mlflow.trace(span_type="AGENT")
async def compare(ask: Ask) -> list[str]:
    """Three questions are asked at once."""

    async def one(number: int) -> str:
        question = messages(f"{ask.question} {number}")
        return text_of(await async_anthropic(ask).messages.create(messages=question, **CALL))

    return list(await asyncio.gather(*map(one, range(3))))


# --- streams ---


@app.post("/stream")
def stream(ask: Ask) -> StreamingResponse:
    def events() -> Iterator[str]:
        with anthropic(ask).messages.create(messages=messages(ask.question), stream=True, **CALL) as parts:
            for part in parts:
                yield event(part)

    return streamed(events())


@app.post("/astream")
async def astream(ask: Ask) -> StreamingResponse:
    """The model is called in the route, and its answer read while it is sent."""
    parts = await async_anthropic(ask).messages.create(messages=messages(ask.question), stream=True, **CALL)

    async def events() -> AsyncIterator[str]:
        async for part in parts:
            yield event(part)

    return streamed(events())


@app.post("/stream-tools")
def stream_tools(ask: Ask) -> StreamingResponse:
    def events() -> Iterator[str]:
        for part in anthropic(ask).messages.create(
            messages=messages(ask.question), tools=[TOOL], stream=True, **CALL
        ):
            yield event(part)

    return streamed(events())


@app.post("/traced-stream")
async def traced_stream(ask: Ask) -> StreamingResponse:
    return streamed(told(ask))


@mlflow.trace(name="told", span_type="AGENT")
async def told(ask: Ask) -> AsyncIterator[str]:
    """A generator of the agent's around the stream of the model."""
    async for part in await async_anthropic(ask).messages.create(
        messages=messages(ask.question), stream=True, **CALL
    ):
        if part.type == "content_block_delta" and part.delta.type == "text_delta":
            yield f"data: {json.dumps(part.delta.text)}\n\n"


@app.post("/first-word")
def first_word(ask: Ask) -> Any:
    """Takes what it wants from a stream, and leaves it."""
    with anthropic(ask).messages.create(messages=messages(ask.question), stream=True, **CALL) as parts:
        for part in parts:
            if part.type == "content_block_delta" and part.delta.type == "text_delta":
                return {"answer": part.delta.text}
    return {}


@app.post("/forgotten")
@mlflow.trace(span_type="AGENT")
def forgotten(ask: Ask) -> str:
    """Asks for a stream and never reads it."""
    KEPT.append(anthropic(ask).messages.create(messages=messages(ask.question), stream=True, **CALL))
    return "never mind"


@app.post("/helper")
@mlflow.trace(name="helper", span_type="AGENT")
def helper(ask: Ask) -> str:
    """The client's own helper adds the stream up."""
    with anthropic(ask).messages.stream(messages=messages(ask.question), **CALL) as parts:
        return "".join(parts.text_stream)


@app.post("/ahelper")
async def ahelper(ask: Ask) -> StreamingResponse:
    async def events() -> AsyncIterator[str]:
        async with async_anthropic(ask).messages.stream(messages=messages(ask.question), **CALL) as parts:
            async for part in parts:
                yield event(part)

    return streamed(events())
