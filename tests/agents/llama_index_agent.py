"""LlamaIndex query engines and agents as users write them, behind one FastAPI app.

The model is where ``MODEL_SERVER`` says. ``AUTOLOG`` holds the arguments of ``mlflow.llama_index.autolog``.
"""

import json
import os
from collections.abc import AsyncIterator, Iterator
from functools import cache
from typing import Any, Final

import mlflow
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from llama_index.core import Settings, VectorStoreIndex
from llama_index.core.agent.workflow import AgentStream, FunctionAgent
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.chat_engine.types import ChatMode
from llama_index.core.schema import TextNode
from llama_index.core.tools import FunctionTool
from llama_index.core.workflow import Event, StartEvent, StopEvent, Workflow, step
from llama_index.llms.openai_like import OpenAILike  # type: ignore[import-untyped]
from openai import AsyncOpenAI, OpenAI

mlflow.llama_index.autolog(**json.loads(os.environ.get("AUTOLOG", "{}")))

app = FastAPI()

Body = dict[str, Any]
DOCUMENTS: Final = {
    "faq/returns": "Returns are free within 30 days of delivery, with the receipt.",
    "faq/shipping": "Shipping takes two days.",
    "faq/cards": "Gift cards never expire.",
}


def base_url(behaviour: str = "") -> str:
    return "/".join(filter(None, [os.environ["MODEL_SERVER"], behaviour, "v1"]))


EMBEDDINGS: Final = OpenAI(base_url=base_url(), api_key="secret-key").embeddings
ASYNC_EMBEDDINGS: Final = AsyncOpenAI(base_url=base_url(), api_key="secret-key").embeddings


class Embedding(BaseEmbedding):
    """Embeds by OpenAI's client."""

    def _get_text_embedding(self, text: str) -> list[float]:
        return EMBEDDINGS.create(input=text, model=self.model_name).data[0].embedding

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return (await ASYNC_EMBEDDINGS.create(input=query, model=self.model_name)).data[0].embedding


@cache
def model(behaviour: str = "", streaming: bool = False) -> OpenAILike:
    return OpenAILike(
        model="gpt-4o-mini",
        api_base=base_url(behaviour),
        api_key="secret-key",
        is_chat_model=True,
        is_function_calling_model=True,
        max_retries=0,
        # Without it, a stream does not say how many tokens it took.
        additional_kwargs={"stream_options": {"include_usage": True}} if streaming else {},
    )


Settings.tokenizer = str.split  # the default one is downloaded
Settings.embed_model = Embedding(model_name="text-embedding-test")
INDEX: Final = VectorStoreIndex(
    [TextNode(id_=name, text=text, metadata={"source": name}) for name, text in DOCUMENTS.items()]
)


@cache
def engine(behaviour: str = "", streaming: bool = False) -> Any:
    return INDEX.as_query_engine(llm=model(behaviour, streaming), streaming=streaming, similarity_top_k=2)


@app.post("/query")
def query(body: Body) -> Body:
    return {"answer": str(engine(body.get("behaviour", "")).query(body["question"]))}


@app.post("/aquery")
async def aquery(body: Body) -> Body:
    return {"answer": str(await engine(body.get("behaviour", "")).aquery(body["question"]))}


@app.post("/stream")
def stream(body: Body) -> StreamingResponse:
    def chunks() -> Iterator[str]:
        for text in engine(body.get("behaviour", ""), streaming=True).query(body["question"]).response_gen:
            yield event(text)

    return StreamingResponse(chunks(), media_type="text/event-stream")


@app.post("/astream")
async def astream(body: Body) -> StreamingResponse:
    async def chunks() -> AsyncIterator[str]:
        response = await engine(body.get("behaviour", ""), streaming=True).aquery(body["question"])
        async for text in response.response_gen:
            yield event(text)

    return StreamingResponse(chunks(), media_type="text/event-stream")


def event(value: Any) -> str:
    return f"data: {json.dumps(value)}\n\n"


@app.post("/chat")
def chat(body: Body) -> Body:
    """Two turns: the second sees the first."""
    conversation = INDEX.as_chat_engine(chat_mode=ChatMode.CONTEXT, llm=model(body.get("behaviour", "")))
    return {"answers": [str(conversation.chat(question)) for question in body["questions"]]}


@app.post("/chat/astream")
async def chat_astream(body: Body) -> StreamingResponse:
    conversation = INDEX.as_chat_engine(chat_mode=ChatMode.CONTEXT, llm=model(streaming=True))

    async def chunks() -> AsyncIterator[str]:
        response = await conversation.astream_chat(body["question"])
        async for text in response.async_response_gen():
            yield event(text)

    return StreamingResponse(chunks(), media_type="text/event-stream")


# --- agents and workflows ---


def lookup(topic: str) -> str:
    """Look a topic up."""
    return f"all about {topic}"


async def alookup(topic: str) -> str:
    """Look a topic up."""
    with mlflow.start_span("inside", span_type="PARSER") as span:
        span.set_inputs({"topic": topic})
        return f"all about {topic}"


def failing(topic: str) -> str:
    """Look a topic up."""
    raise ValueError(f"nothing about {topic}")


TOOLS: Final = {
    "lookup": FunctionTool.from_defaults(lookup),
    "alookup": FunctionTool.from_defaults(async_fn=alookup),
    "failing": FunctionTool.from_defaults(failing),
}


def agent(body: Body, streaming: bool = False) -> FunctionAgent:
    return FunctionAgent(
        name="helper",
        tools=[TOOLS[body["tool"]]],
        llm=model(body.get("behaviour", ""), streaming),
        streaming=streaming,
        system_prompt="You help.",
    )


@app.post("/agent")
async def run_agent(body: Body) -> Body:
    return {"answer": str(await agent(body).run(body["question"]))}


@app.post("/agent/stream")
async def stream_agent(body: Body) -> StreamingResponse:
    async def chunks() -> AsyncIterator[str]:
        handler = agent(body, streaming=True).run(body["question"])
        async for happened in handler.stream_events():
            if isinstance(happened, AgentStream) and happened.delta:
                yield event(happened.delta)
        await handler

    return StreamingResponse(chunks(), media_type="text/event-stream")


class Drafted(Event):
    text: str


class Writing(Workflow):
    """Two steps; the second asks the model again."""

    @step
    async def draft(self, start: StartEvent) -> Drafted:
        return Drafted(text=(await model(start.behaviour).acomplete(start.topic)).text)

    @step
    async def polish(self, drafted: Drafted) -> StopEvent:
        return StopEvent(result=(await model().acomplete(drafted.text)).text)


@app.post("/workflow")
async def workflow(body: Body) -> Body:
    return {"answer": await Writing().run(topic=body["topic"], behaviour=body.get("behaviour", ""))}


@app.post("/traced")
@mlflow.trace(span_type="AGENT")
async def traced(body: Body) -> Body:
    """MLflow's decorator around a query."""
    return {"answer": str(await engine().aquery(body["question"]))}
