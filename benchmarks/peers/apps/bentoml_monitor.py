"""``bentoml.monitor`` with three columns: the request, the response, and the trace as JSON.

BentoML has no spans of its own that hold inputs and outputs, so OpenTelemetry's are collected in memory until
the agent is done.
"""

import os

import bentoml  # type: ignore[import-not-found] # is in the peer's environment
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from benchmarks.peers.apps.agent import Asked, agent_app
from benchmarks.peers.apps.opentelemetry_spans import traced

collected = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(collected))
tracer = provider.get_tracer("agent")


def run(asked: Asked) -> str:
    record = traced(tracer, asked.steps)
    # The agent doesn't await, so no other request's spans are among them.
    spans = [span.to_json(indent=None) for span in collected.get_finished_spans()]
    collected.clear()
    with bentoml.monitor(
        "payload", monitor_class="default", monitor_options={"log_path": os.environ["PEER_FOLDER"]}
    ) as monitor:
        monitor.log(record, "record", "feature", "categorical")
        monitor.log(asked.body.decode(), "request", "feature", "categorical")
        monitor.log(asked.answer.decode(), "response", "prediction", "categorical")
        monitor.log(f"[{','.join(spans)}]", "trace", "prediction", "categorical")
    return record


app = agent_app(run)
