"""A support agent whose rows the views, and the queries of the SQL guide, are tried on."""

from collections.abc import Iterator
from typing import Any

import mlflow
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, StreamingResponse
from mlflow.entities import Document, SpanType
from mlflow.tracing.constant import SpanAttributeKey, TraceMetadataKey

__all__ = ["app"]

PASSAGES = {"returns.md": "Returns are accepted within 30 days.", "shipping.md": "Shipping takes 3 days."}


class StockError(Exception):
    """What the stock service answers."""


@mlflow.trace(span_type=SpanType.RETRIEVER)
def search(query: str) -> list[Document]:
    return [Document(page_content=text, metadata={"doc_uri": uri}) for uri, text in PASSAGES.items()]


@mlflow.trace(span_type=SpanType.TOOL)
def stock(article: str) -> dict[str, int]:
    if article == "broken":
        raise StockError("the stock service is down")
    return {"left": 3}


def ask(name: str, messages: list[dict[str, Any]]) -> dict[str, Any]:
    """A model's call, and in it the client's, which records the same tokens."""
    usage = {"input_tokens": 100, "output_tokens": 10, "total_tokens": 110}
    cost = {"input_cost": 0.2, "output_cost": 0.05, "total_cost": 0.25}
    message = {"role": "assistant", "content": f"{messages[-1]['content']} 30 days."}
    answer = {"object": "chat.completion", "model": name, "choices": [{"index": 0, "message": message}]}
    with (
        mlflow.start_span("llm", span_type=SpanType.CHAT_MODEL) as llm,
        mlflow.start_span("client", span_type=SpanType.LLM) as client,
    ):
        for span in (llm, client):
            span.set_inputs({"messages": messages})
            span.set_outputs(answer)
            span.set_attribute(SpanAttributeKey.CHAT_USAGE, usage)
            span.set_attribute(SpanAttributeKey.MODEL, name)
        client.set_attribute(SpanAttributeKey.LLM_COST, cost)
    return answer


@mlflow.trace(span_type=SpanType.AGENT)
def agent(messages: list[dict[str, Any]], article: str) -> dict[str, Any]:
    mlflow.update_current_trace(
        metadata={TraceMetadataKey.TRACE_SESSION: "session-1", TraceMetadataKey.TRACE_USER: "ann"}
    )
    search(messages[-1]["content"])
    ask("small", messages)
    stock(article)
    return ask("large", messages)


app = FastAPI()


@app.post("/chat")
def chat(body: dict[str, Any]) -> dict[str, Any]:
    """A chat completion; an error where the article is ``broken``."""
    return agent(body["messages"], body.get("article", "shoe"))


@app.post("/two")
def two(body: dict[str, Any]) -> dict[str, Any]:
    """Two root traces in one request."""
    search(body["question"])
    stock("shoe")
    return {"answer": "done"}


@app.post("/odd")
def odd(body: dict[str, Any]) -> dict[str, Any]:
    """Names that nobody knows: what is left are the trace's previews."""
    return {"verdict": judge(body["case"])}


@mlflow.trace
def judge(case: str) -> str:
    return f"guilty of {case}"


@app.post("/words")
def words(body: dict[str, Any]) -> StreamingResponse:
    """A stream of no known kind."""

    def events() -> Iterator[str]:
        yield from ('data: {"word": "so "}\n\n', 'data: {"word": "it is"}\n\n')

    return StreamingResponse(events(), media_type="text/event-stream")


@app.post("/text")
async def text(request: Request) -> PlainTextResponse:
    await request.body()
    return PlainTextResponse("plain")
