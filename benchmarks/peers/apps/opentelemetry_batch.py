"""OpenTelemetry's batch span processor in front of its own console exporter, which writes to a file here."""

import os
from pathlib import Path

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

from benchmarks.peers.apps.agent import Asked, agent_app
from benchmarks.peers.apps.opentelemetry_spans import traced


def as_line(span: ReadableSpan) -> str:
    return f"{span.to_json(indent=None)}\n"


sink = (Path(os.environ["PEER_FOLDER"]) / "spans.jsonl").open("a", encoding="utf-8")
provider = TracerProvider()
provider.add_span_processor(BatchSpanProcessor(ConsoleSpanExporter(out=sink, formatter=as_line)))
tracer = provider.get_tracer("agent")


def run(asked: Asked) -> str:
    return traced(tracer, asked.steps)


app = agent_app(run)
