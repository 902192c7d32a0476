"""A support agent with all that MLflow's UI shows: sessions, documents, tools, tokens, cost, a failure."""

from typing import Any

import mlflow
from mlflow.entities import Document
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

PAGES = {
    "refund": "A refund reaches your bank within five days of the day we get the parcel back.",
    "delivery": "Parcels leave the warehouse within a day; delivery takes two more.",
    "invoice": "Invoices are sent by e-mail, and are in your account under Orders.",
}


@mlflow.trace(span_type="RETRIEVER")
def search_help(query: str) -> list[Document]:
    found = [word for word in PAGES if word in query.lower()] or ["delivery"]
    return [Document(PAGES[word], metadata={"doc_uri": f"help/{word}"}) for word in found]


@mlflow.trace(span_type="TOOL")
def order_status(order: int) -> dict[str, Any]:
    if order == 13:
        raise LookupError(f"there is no order {order}")
    return {"order": order, "status": "on its way", "days": order % 4}


@mlflow.trace(span_type="CHAT_MODEL")
def complete(messages: list[dict[str, str]]) -> dict[str, Any]:
    said = sum(len(message["content"]) for message in messages) // 4
    answer = f"Here is what I found: {messages[-1]['content'][:200]}"
    span = mlflow.get_current_active_span()
    assert span is not None
    span.set_attributes(
        {
            "mlflow.llm.model": "small-chat",
            "mlflow.llm.provider": "example",
            "mlflow.chat.tokenUsage": {
                "input_tokens": said,
                "output_tokens": 40,
                "total_tokens": said + 40,
            },
            "mlflow.llm.cost": {
                "input_cost": said * 1e-6,
                "output_cost": 4e-5,
                "total_cost": said * 1e-6 + 4e-5,
            },
        }
    )
    return {"choices": [{"message": {"role": "assistant", "content": answer}}]}


@mlflow.trace(span_type="AGENT")
def support(messages: list[dict[str, str]], session: str, user: str, order: int) -> dict[str, Any]:
    mlflow.update_current_trace(
        metadata={"mlflow.trace.session": session, "mlflow.trace.user": user},
        tags={"team": "returns" if order % 2 else "sales"},
    )
    pages = search_help(messages[-1]["content"])
    status = order_status(order)
    return complete([*messages, {"role": "user", "content": f"{pages[0].page_content} {status}"}])


async def invocations(request: Request) -> JSONResponse:
    asked = await request.json()
    return JSONResponse(support(asked["messages"], asked["session"], asked["user"], asked["order"]))


app = Starlette(routes=[Route("/invocations", invocations, methods=["POST"])])
