"""An agent under the paths of a Databricks workspace, where MLflow's deployment client asks for it."""

from typing import Any

import mlflow
from fastapi import FastAPI

app = FastAPI()


@app.get("/api/2.0/serving-endpoints/{name}")
def describe(name: str) -> dict[str, Any]:
    return {"name": name, "endpoint_type": "AGENT"}


@app.post("/serving-endpoints/{name}/invocations")
def invoke(name: str, body: dict[str, Any]) -> dict[str, Any]:
    return answer(body["messages"])


@mlflow.trace(span_type="AGENT")
def answer(messages: list[dict[str, Any]]) -> dict[str, Any]:
    question = messages[-1]["content"]
    with mlflow.start_span("retrieve", span_type="RETRIEVER") as span:
        span.set_outputs([{"page_content": f"about {question}"}])
    message = {"role": "assistant", "content": f"You asked: {question}"}
    return {"object": "chat.completion", "choices": [{"index": 0, "message": message}]}
