"""MLflow's spans, sent to a tracking server by its exporter in the background."""

from benchmarks.peers.apps.agent import Asked, agent_app
from benchmarks.peers.apps.mlflow_spans import traced


def run(asked: Asked) -> str:
    return traced(asked.steps)


app = agent_app(run)
