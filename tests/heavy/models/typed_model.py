"""A ``PythonModel`` with a type hint, whose ``predict`` is traced by hand."""

import mlflow
from mlflow.pyfunc import PythonModel
from pydantic import BaseModel


class Question(BaseModel):
    text: str


@mlflow.trace(span_type="TOOL")
def search(question: str) -> str:
    return f"about {question}"


class Model(PythonModel):
    @mlflow.trace(span_type="AGENT", name="mine")
    def predict(self, model_input: list[Question]) -> list[str]:
        return [search(question.text) for question in model_input]


mlflow.models.set_model(Model())
