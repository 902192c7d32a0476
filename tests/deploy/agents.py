"""A support agent for the tests of the terminal, recorded as the middleware records it."""

import json
from collections.abc import Callable
from typing import Any

import mlflow
from mlflow.entities import Document, SpanType, Trace
from mlflow.tracing.constant import SpanAttributeKey

from serving import tracing
from serving.tracing import RequestTraces

QUESTION = "Wie groß ist der Rücksendezeitraum? 返品期限は?"


class BusyError(Exception):
    """What a busy tool raises."""


def search(query: str) -> list[Document]:
    texts = [f"Returns are accepted within {days} days.\nSection {days}" for days in range(30, 37)]
    with mlflow.start_span("search", span_type=SpanType.RETRIEVER) as span:
        span.set_inputs({"query": query})
        found = [
            Document(
                page_content=text, metadata={"doc_uri": f"returns-{index}.md", "score": 0.9 - index / 10}
            )
            for index, text in enumerate(texts)
        ]
        span.set_outputs(found)
    return found


def ask_model(question: str) -> dict[str, Any]:
    with mlflow.start_span("gpt", span_type=SpanType.CHAT_MODEL) as span:
        messages = [
            {"role": "system", "content": "You are terse."},
            {"role": "user", "content": question},
        ]
        span.set_inputs({"messages": messages})
        answer = {"choices": [{"message": {"role": "assistant", "content": "30 days. " + "x" * 5000}}]}
        span.set_outputs(answer)
        span.set_attribute(
            SpanAttributeKey.CHAT_USAGE, {"input_tokens": 1200, "output_tokens": 34, "total_tokens": 1234}
        )
    return answer


@mlflow.trace(span_type=SpanType.AGENT)
def support(question: str) -> dict[str, Any]:
    search(question)
    return ask_model(question)


@mlflow.trace(span_type=SpanType.TOOL)
def call_stock_service(article: str) -> None:
    raise BusyError(f"stock service is busy: {article}")


@mlflow.trace(span_type=SpanType.AGENT)
def failing(question: str) -> None:
    search(question)
    call_stock_service("shoe-42")


@mlflow.trace
def rude() -> str:
    """Answers with what would steer a terminal, were it printed as it is."""
    return "\x1b[2Jcleared\r\nsecond line [bold]markup[/bold] :smile:"


def record(agent: Callable[[], Any]) -> list[Trace]:
    """The traces of an agent run in a captured request, the first to start first."""
    tracing.ensure_installed()
    traces = RequestTraces("request-1")
    token = tracing.CURRENT.set(traces)
    try:
        agent()
    except BusyError:
        pass
    finally:
        tracing.CURRENT.reset(token)
    return [Trace.from_dict(json.loads(snapshot.encode().json)) for snapshot in traces.seal()]
