"""OpenTelemetry spans, sent to Phoenix as its documentation says for production: OTLP over HTTP in batches.

The server's address is in ``PHOENIX_COLLECTOR_ENDPOINT``.
"""

import os

from phoenix.otel import register  # type: ignore[import-not-found] # is in the peer's environment

from benchmarks.peers.apps.agent import Asked, agent_app
from benchmarks.peers.apps.opentelemetry_spans import traced

provider = register(
    endpoint=f"{os.environ['PHOENIX_COLLECTOR_ENDPOINT']}/v1/traces",
    protocol="http/protobuf",
    project_name="default",
    batch=True,
    verbose=False,
)
tracer = provider.get_tracer("agent")


def run(asked: Asked) -> str:
    return traced(tracer, asked.steps)


app = agent_app(run)
