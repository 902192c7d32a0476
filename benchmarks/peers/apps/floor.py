"""The agent alone: the same calls, recorded by nobody."""

from typing import Any

from benchmarks.peers.apps.agent import Asked, agent_app
from benchmarks.workload import Step


def call(step: Step) -> Any:
    return step.outputs


def run(asked: Asked) -> str:
    for step in asked.steps:
        call(step)
    return ""


app = agent_app(run)
