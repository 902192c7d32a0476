"""The agent with spans of OpenTelemetry's SDK, under the names that OpenInference gives to attributes."""

import json
from collections.abc import Sequence

from opentelemetry.trace import Tracer, format_trace_id

from benchmarks.workload import Step

__all__ = ["traced"]

KINDS = {"CHAT_MODEL": "LLM"}
"""OpenInference's names of span kinds, where they differ from MLflow's."""


def traced(tracer: Tracer, steps: Sequence[Step]) -> str:
    """Run the calls, the first around all others; returns the id of the trace, in hex."""
    root, *within = steps
    with tracer.start_as_current_span(root.name, attributes=inputs_of(root)) as span:
        for step in within:
            with tracer.start_as_current_span(step.name, attributes=inputs_of(step)) as child:
                child.set_attributes(outputs_of(step))
        span.set_attributes(outputs_of(root))
    return format_trace_id(span.get_span_context().trace_id)


def inputs_of(step: Step) -> dict[str, str]:
    return {
        "openinference.span.kind": KINDS.get(step.span_type, step.span_type),
        "input.value": json.dumps(step.inputs),
        "input.mime_type": "application/json",
    }


def outputs_of(step: Step) -> dict[str, str]:
    return {"output.value": json.dumps(step.outputs), "output.mime_type": "application/json"}
