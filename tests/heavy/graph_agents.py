"""Writes LangGraph agents and MLflow models for the tests of ``deploy()``."""

from pathlib import Path

GRAPH = """
from typing import TypedDict

import mlflow
from langgraph.graph import END, START, StateGraph

mlflow.langchain.autolog()


class Order(TypedDict):
    question: str
    answer: str


def look_up(order: Order) -> dict:
    return {{"answer": f"{answer}: {{order['question']}}"}}


graph = StateGraph(Order)
graph.add_node("look_up", look_up)
graph.add_edge(START, "look_up")
graph.add_edge("look_up", END)
app = graph.compile()


def predict(request: dict) -> dict:
    return {{"answer": app.invoke({{"question": request["question"]}})["answer"]}}
"""


def write_graph(folder: Path, answer: str) -> None:
    """A LangGraph agent ``graph_agent:predict``."""
    (folder / "graph_agent.py").write_text(GRAPH.format(answer=answer), encoding="utf-8")


MODEL = """
import mlflow
from mlflow.pyfunc import PythonModel


class Echo(PythonModel):
    def predict(self, context, model_input: list[str], params=None) -> list[str]:
        return [f"{answer} {{text}}" for text in model_input]


mlflow.models.set_model(Echo())
"""


def write_model(folder: Path, answer: str) -> str:
    """The source of an MLflow model, to be saved from code."""
    path = folder / "echo_model.py"
    path.write_text(MODEL.format(answer=answer), encoding="utf-8")
    return str(path)
