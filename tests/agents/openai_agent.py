"""Agents on OpenAI's client as users write them, behind one FastAPI app.

The model is where ``MODEL_SERVER`` says. ``AUTOLOG`` holds the arguments of ``mlflow.openai.autolog``.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, Final

import mlflow
import mlflow.openai
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from openai import AsyncOpenAI, OpenAI, OpenAIError
from pydantic import BaseModel

mlflow.openai.autolog(**json.loads(os.environ.get("AUTOLOG", "{}")))

app = FastAPI()

MODEL: Final = "gpt-4o-mini"
LOOKUP: Final[dict[str, Any]] = {
    "name": "lookup",
    "description": "Look a topic up.",
    "parameters": {"type": "object", "properties": {"topic": {"type": "string"}}, "required": ["topic"]},
}
CHAT_TOOL: Final[Any] = {"type": "function", "function": LOOKUP}
RESPONSES_TOOL: Final[Any] = {"type": "function", "strict": False, **LOOKUP}
KEPT: Final[list[Any]] = []
"""Streams that their agents forgot."""


class Ask(BaseModel):
    question: str
    behaviour: str = ""
    retries: int = 0
    usage: bool = True
    """Whether a stream is asked to say how many tokens it took."""


class Verdict(BaseModel):
    summary: str


@cache
def client(behaviour: str, retries: int) -> OpenAI:
    return OpenAI(api_key="secret-key", base_url=base_url(behaviour), max_retries=retries)


@cache
def async_client(behaviour: str, retries: int) -> AsyncOpenAI:
    return AsyncOpenAI(api_key="secret-key", base_url=base_url(behaviour), max_retries=retries)


def base_url(behaviour: str) -> str:
    return "/".join(filter(None, [os.environ["MODEL_SERVER"], behaviour, "v1"]))


def openai(ask: Ask) -> OpenAI:
    return client(ask.behaviour, ask.retries)


def async_openai(ask: Ask) -> AsyncOpenAI:
    return async_client(ask.behaviour, ask.retries)


def messages(question: str) -> list[Any]:
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]


def options(ask: Ask) -> Any:
    return {"stream_options": {"include_usage": True}} if ask.usage else {}


def event(chunk: BaseModel) -> str:
    return f"data: {chunk.model_dump_json(exclude_none=True)}\n\n"


def streamed(events: Iterator[str] | AsyncIterator[str]) -> StreamingResponse:
    return StreamingResponse(events, media_type="text/event-stream")


# --- chat completions ---


@app.post("/chat")
def chat(ask: Ask) -> Any:
    """Nothing but the call of the model."""
    return openai(ask).chat.completions.create(model=MODEL, messages=messages(ask.question), temperature=0)


@app.post("/achat")
async def achat(ask: Ask) -> Any:
    return await async_openai(ask).chat.completions.create(model=MODEL, messages=messages(ask.question))


@app.post("/raw")
def raw(ask: Ask) -> Any:
    """For those who want the vendor's headers."""
    reply = openai(ask).chat.completions.with_raw_response.create(
        model=MODEL, messages=messages(ask.question)
    )
    return {"request_id": reply.headers["x-request-id"], "completion": reply.parse()}


@app.post("/parse")
def parse(ask: Ask) -> Any:
    completion = openai(ask).chat.completions.parse(
        model=MODEL, messages=messages(ask.question), response_format=Verdict
    )
    return {"verdict": completion.choices[0].message.parsed}


@app.post("/aparse")
async def aparse(ask: Ask) -> Any:
    completion = await async_openai(ask).chat.completions.parse(
        model=MODEL, messages=messages(ask.question), response_format=Verdict
    )
    return {"verdict": completion.choices[0].message.parsed}


@app.post("/fallback")
@mlflow.trace(span_type="AGENT")
def fallback(ask: Ask) -> str:
    """An agent that answers in its own words where the model fails."""
    try:
        return answer(openai(ask), messages(ask.question))
    except OpenAIError:
        return "Please try again later."


def answer(model: OpenAI, conversation: list[Any]) -> str:
    completion = model.chat.completions.create(model=MODEL, messages=conversation)
    return completion.choices[0].message.content or ""


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
        completion = openai(ask).chat.completions.create(
            model=MODEL, messages=conversation, tools=[CHAT_TOOL], tool_choice="auto"
        )
        message = completion.choices[0].message
        if not message.tool_calls:
            return message.content or ""
        conversation.append(message)
        for call in message.tool_calls:
            assert call.type == "function"
            result = lookup(**json.loads(call.function.arguments))
            conversation.append({"role": "tool", "tool_call_id": call.id, "content": result})


@app.post("/gather")
async def gather(ask: Ask) -> list[str]:
    return await compare(ask)


@mlflow.trace(span_type="AGENT")
async def compare(ask: Ask) -> list[str]:
    """Three models are asked at once."""

    async def one(number: int) -> str:
        completion = await async_openai(ask).chat.completions.create(
            model=f"{MODEL}-{number}", messages=messages(f"{ask.question} {number}")
        )
        return completion.choices[0].message.content or ""

    return list(await asyncio.gather(*map(one, range(3))))


@app.post("/pool")
@mlflow.trace(span_type="AGENT")
def pool(ask: Ask) -> list[str]:
    """The same in threads."""
    with ThreadPoolExecutor(3) as threads:
        questions = [messages(f"{ask.question} {number}") for number in range(3)]
        return list(threads.map(lambda question: answer(openai(ask), question), questions))


@app.post("/rag")
@mlflow.trace(span_type="CHAIN")
def rag(ask: Ask) -> Any:
    """Embeds the question, then answers it."""
    found = openai(ask).embeddings.create(
        model="text-embedding-3-small", input=[ask.question, "another text"]
    )
    return {"dimensions": len(found.data[0].embedding), "answer": answer(openai(ask), messages(ask.question))}


@app.post("/aembed")
async def aembed(ask: Ask) -> Any:
    found = await async_openai(ask).embeddings.create(model="text-embedding-3-small", input=ask.question)
    return {"dimensions": len(found.data[0].embedding)}


# --- streams ---


@app.post("/stream")
def stream(ask: Ask) -> StreamingResponse:
    def events() -> Iterator[str]:
        with openai(ask).chat.completions.create(
            model=MODEL, messages=messages(ask.question), stream=True, **options(ask)
        ) as chunks:
            for chunk in chunks:
                yield event(chunk)
        yield "data: [DONE]\n\n"

    return streamed(events())


@app.post("/astream")
async def astream(ask: Ask) -> StreamingResponse:
    """The model is called in the route, and its answer read while it is sent."""
    chunks = await async_openai(ask).chat.completions.create(
        model=MODEL, messages=messages(ask.question), stream=True, **options(ask)
    )

    async def events() -> AsyncIterator[str]:
        async for chunk in chunks:
            yield event(chunk)
        yield "data: [DONE]\n\n"

    return streamed(events())


@app.post("/traced-stream")
async def traced_stream(ask: Ask) -> StreamingResponse:
    return streamed(told(ask))


@mlflow.trace(name="told", span_type="AGENT")
async def told(ask: Ask) -> AsyncIterator[str]:
    """A generator of the agent's around the stream of the model."""
    chunks = await async_openai(ask).chat.completions.create(
        model=MODEL, messages=messages(ask.question), stream=True, **options(ask)
    )
    async for chunk in chunks:
        if chunk.choices and (text := chunk.choices[0].delta.content):
            yield f"data: {json.dumps(text)}\n\n"


@app.post("/stream-tools")
def stream_tools(ask: Ask) -> StreamingResponse:
    def events() -> Iterator[str]:
        for chunk in openai(ask).chat.completions.create(
            model=MODEL, messages=messages(ask.question), tools=[CHAT_TOOL], stream=True, **options(ask)
        ):
            yield event(chunk)

    return streamed(events())


@app.post("/helper")
def helper(ask: Ask) -> Any:
    """The client's own helper adds the stream up."""
    with openai(ask).chat.completions.stream(
        model=MODEL, messages=messages(ask.question), response_format=Verdict, **options(ask)
    ) as events:
        kinds = [event.type for event in events]
        return {"events": len(kinds), "verdict": events.get_final_completion().choices[0].message.parsed}


@app.post("/ahelper")
async def ahelper(ask: Ask) -> StreamingResponse:
    async def texts() -> AsyncIterator[str]:
        async with async_openai(ask).chat.completions.stream(
            model=MODEL, messages=messages(ask.question), **options(ask)
        ) as events:
            async for part in events:
                if part.type == "content.delta":
                    yield f"data: {json.dumps(part.delta)}\n\n"

    return streamed(texts())


@app.post("/first-word")
def first_word(ask: Ask) -> Any:
    """Takes what it wants from a stream, and leaves it."""
    with openai(ask).chat.completions.create(
        model=MODEL, messages=messages(ask.question), stream=True
    ) as chunks:
        for chunk in chunks:
            if text := chunk.choices[0].delta.content:
                return {"answer": text}
    return {}


@app.post("/forgotten")
@mlflow.trace(span_type="AGENT")
def forgotten(ask: Ask) -> str:
    """Asks for a stream and never reads it."""
    KEPT.append(
        openai(ask).chat.completions.create(model=MODEL, messages=messages(ask.question), stream=True)
    )
    return "never mind"


# --- responses ---


@app.post("/responses")
def responses(ask: Ask) -> Any:
    return openai(ask).responses.create(model=MODEL, input=ask.question, instructions="Be brief.")


@app.post("/aresponses")
@mlflow.trace(name="aresponses", span_type="AGENT")
async def aresponses(ask: Ask) -> str:
    """A tool loop in which the vendor keeps the conversation."""
    model = async_openai(ask).responses
    response = await model.create(model=MODEL, input=ask.question, tools=[RESPONSES_TOOL])
    while calls := [item for item in response.output if item.type == "function_call"]:
        results: Any = [
            {
                "type": "function_call_output",
                "call_id": call.call_id,
                "output": lookup(**json.loads(call.arguments)),
            }
            for call in calls
        ]
        response = await model.create(
            model=MODEL, input=results, previous_response_id=response.id, tools=[RESPONSES_TOOL]
        )
    return response.output_text


@app.post("/responses-parse")
def responses_parse(ask: Ask) -> Any:
    return openai(ask).responses.parse(model=MODEL, input=ask.question, text_format=Verdict).output_parsed


@app.post("/responses-stream")
def responses_stream(ask: Ask) -> StreamingResponse:
    def events() -> Iterator[str]:
        for part in openai(ask).responses.create(model=MODEL, input=ask.question, stream=True):
            yield f"event: {part.type}\n{event(part)}"

    return streamed(events())


@app.post("/responses-helper")
async def responses_helper(ask: Ask) -> StreamingResponse:
    async def events() -> AsyncIterator[str]:
        async with async_openai(ask).responses.stream(model=MODEL, input=ask.question) as parts:
            async for part in parts:
                yield f"event: {part.type}\n{event(part)}"

    return streamed(events())
