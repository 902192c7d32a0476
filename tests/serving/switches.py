"""Serves agents with ``ENABLE_MLFLOW_TRACING`` unset, off and on, one after the other.

For a process of its own, in which capture has never been on before it is. The table is the environment's.
"""

import os
from pathlib import Path

import httpx

from serving import InferenceTableMiddleware
from tests.serving.conformance_agents import make_app
from tests.serving.recorded import outline, trace_of
from tests.support import rows, running

SWITCHES = ((None, False), ("false", False), ("0", False), ("true", True), ("True", True), ("1", True))
EXPECTED = ["agent(double estimate)", "agent(estimate)"]


def check(value: str | None, on: bool, table: Path) -> None:
    """Fluent and client APIs work with the switch at ``value``; both requests are recorded, or neither."""
    os.environ.pop("ENABLE_MLFLOW_TRACING", None)
    if value is not None:
        os.environ["ENABLE_MLFLOW_TRACING"] = value
    before = len(rows(table))
    app = make_app()
    app.add_middleware(InferenceTableMiddleware)
    with running(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        forms = ("function", "client")
        replies = [client.post(f"/invocations/{form}", json={"text": "two words"}) for form in forms]
    assert [reply.json() for reply in replies] == [{"weight": 18}, {"weight": 18}], value
    assert ["x-databricks-request-id" in reply.headers for reply in replies] == [on, on], value
    outlines = [outline(trace_of(row)) for row in rows(table)[before:]]
    assert outlines == (EXPECTED if on else []), (value, outlines)


if __name__ == "__main__":
    for value, on in SWITCHES:
        check(value, on, Path(os.environ["INFERENCE_TABLE_URI"]))
