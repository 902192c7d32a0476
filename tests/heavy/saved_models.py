"""Saves the models of ``tests/heavy/models`` as their users would."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest

MODELS = Path(__file__).parent / "models"


def code(name: str) -> str:
    return str(MODELS / f"{name}.py")


def save_frames(folder: Path) -> None:
    question = pd.DataFrame({"question": ["why"], "top": [1]})
    answer = pd.DataFrame({"answer": ["about why"]})
    signature = mlflow.models.infer_signature(question, answer, params={"loud": False})
    mlflow.pyfunc.save_model(
        folder, python_model=code("python_model"), signature=signature, pip_requirements=[]
    )


def save_python(name: str) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        mlflow.pyfunc.save_model(folder, python_model=code(name), pip_requirements=[])

    return save


def save_langchain(name: str) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        mlflow.langchain.save_model(code(name), folder, pip_requirements=[])

    return save


@contextlib.contextmanager
def advice_ignored() -> Iterator[None]:
    """MLflow warns those who save models without input examples or type hints, and of its own SQLAlchemy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def save_all(folder: Path) -> None:
    """Each model to a folder of its name."""
    with advice_ignored():
        for name, save in SAVES.items():
            save(folder / name)


def save_broken(folder: Path) -> None:
    """A model whose code can't be run where it is served."""
    source = folder.with_suffix(".py")
    source.write_text(
        "import mlflow, os\n"
        "assert 'SAVING' in os.environ, 'the keys are missing'\n"
        "mlflow.models.set_model(lambda question: question)\n"
    )
    with pytest.MonkeyPatch.context() as patch, advice_ignored():
        patch.setenv("SAVING", "1")
        mlflow.pyfunc.save_model(folder, python_model=str(source), pip_requirements=[])


SAVES: dict[str, Callable[[Path], Any]] = {
    "frames": save_frames,
    "typed": save_python("typed_model"),
    "function": save_python("function_model"),
    "responses": save_python("responses_agent"),
    "chat": save_python("chat_agent"),
    "chain": save_langchain("chain"),
    "graph": save_langchain("graph"),
}
