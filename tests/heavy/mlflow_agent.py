"""Agents that need full MLflow: its client API, and a tracking store of its own."""

import threading
from typing import Any

import mlflow
from fastapi import FastAPI
from mlflow import MlflowClient

app = FastAPI()
client = MlflowClient()


@app.post("/client")
def client_api(body: dict[str, Any]) -> dict[str, Any]:
    """A trace made by the client API; one span is started and ended on another thread."""
    root = client.start_trace("root", inputs=body)

    def work() -> None:
        span = client.start_span("child", root.trace_id, root.span_id, inputs={"in": 1})
        client.end_span(root.trace_id, span.span_id, outputs={"out": 2})

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    client.end_trace(root.trace_id, outputs={"done": True})
    return {"trace_id": root.trace_id}


@app.post("/experiment")
def experiment(body: dict[str, Any]) -> dict[str, Any]:
    """An agent that sets an experiment, or resets tracing, at run time."""
    mlflow.set_experiment(body["name"])
    with mlflow.start_span("after set_experiment"):
        pass
    mlflow.tracing.reset()
    with mlflow.start_span("after reset"):
        pass
    return {}
