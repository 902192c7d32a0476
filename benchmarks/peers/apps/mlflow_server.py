"""MLflow's spans, sent to a tracking server by its exporter in the background."""

import mlflow

from benchmarks.peers.apps.agent import Asked, agent_app
from benchmarks.peers.apps.mlflow_spans import traced

# The light SDK doesn't find the default experiment by itself.
mlflow.set_experiment(experiment_id="0")


def run(asked: Asked) -> str:
    return traced(asked.steps)


app = agent_app(run)
