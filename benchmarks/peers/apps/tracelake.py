"""tracelake: the middleware around the agent with MLflow's spans, and nothing else."""

from benchmarks.peers.apps.agent import Asked, agent_app
from benchmarks.peers.apps.mlflow_spans import traced
from serving import InferenceTableMiddleware


def run(asked: Asked) -> str:
    return traced(asked.steps)


app = agent_app(run)
app.add_middleware(InferenceTableMiddleware)
