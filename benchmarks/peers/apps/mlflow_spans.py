"""The agent with MLflow's spans."""

from collections.abc import Sequence

import mlflow

from benchmarks.workload import Step

__all__ = ["traced"]


def traced(steps: Sequence[Step]) -> str:
    """Run the calls, the first around all others; returns MLflow's id of the trace."""
    root, *within = steps
    with mlflow.start_span(root.name, span_type=root.span_type) as span:
        span.set_inputs(root.inputs)
        for step in within:
            with mlflow.start_span(step.name, span_type=step.span_type) as child:
                child.set_inputs(step.inputs)
                child.set_outputs(step.outputs)
        span.set_outputs(root.outputs)
    if not span.trace_id.startswith("tr-"):
        raise RuntimeError("MLflow made no spans; MLFLOW_LOGGING_LEVEL=DEBUG tells why")
    return str(span.trace_id)
