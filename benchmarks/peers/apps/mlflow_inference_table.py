"""MLflow's own inference-table path, as the server of the original drives it.

The trace is popped from its buffer before the reply leaves. What the original's server then does with it, to
write it to a table, is not open: here it is dropped.
"""

import uuid

from mlflow.pyfunc.context import (  # type: ignore[import-not-found] # the light SDK lacks it
    Context,
    set_prediction_context,
)
from mlflow.tracing.export.inference_table import pop_trace

from benchmarks.peers.apps.agent import Asked, agent_app
from benchmarks.peers.apps.mlflow_spans import traced


def run(asked: Asked) -> str:
    request_id = uuid.uuid4().hex
    with set_prediction_context(Context(request_id=request_id)):
        traced(asked.steps)
    trace = pop_trace(request_id)
    if trace is None or len(trace["data"]["spans"]) != len(asked.steps):
        raise RuntimeError("MLflow's inference-table path recorded no trace, or not all of it")
    return request_id


app = agent_app(run)
