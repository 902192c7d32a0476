"""A ``PythonModel`` of data frames, whose ``predict`` is not traced itself."""

from collections.abc import Iterator
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext


@mlflow.trace(span_type="RETRIEVER")
def search(question: str) -> list[str]:
    return [f"about {question}"]


@mlflow.trace(span_type="TOOL")
def shout(text: str) -> str:
    return text.upper()


class Model(PythonModel):
    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        loud = bool(params and params.get("loud"))
        answers = []
        for question, top in zip(model_input["question"], model_input["top"], strict=True):
            if question == "fail":
                raise RuntimeError("the model broke")
            [found] = search(question)[:top]
            answers.append(shout(found) if loud else found)
        return pd.DataFrame({"answer": answers})

    def predict_stream(
        self, context: PythonModelContext, model_input: Any, params: dict[str, Any] | None = None
    ) -> Iterator[dict[str, Any]]:
        for word in model_input["question"].split():
            if word == "fail":
                raise RuntimeError("the model broke")
            yield {"delta": shout(word)}


mlflow.models.set_model(Model())
