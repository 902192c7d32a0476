"""Any agent as an ASGI app: what :func:`as_app` takes is what ``tracelake serve`` can serve."""

import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any, Final

from starlette.types import ASGIApp

from inference_table.errors import SettingsError
from serving import mlflow_model
from serving.endpoint import function_app
from serving.function import AgentFunction, is_asgi

__all__ = ["as_app", "load_app", "prepare"]

MODEL_FILE: Final = "MLmodel"
URI: Final = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:/")


def as_app(agent: Any) -> ASGIApp:
    """An agent as an ASGI app.

    Args:
        agent: one of

            - an ASGI app (FastAPI, Starlette, a function of ``scope``, ``receive`` and ``send``), as it is;
            - a Python function that takes the request's JSON object, sync, async or a generator;
            - an object with ``predict`` and perhaps ``predict_stream``, for requests with ``"stream": true``;
            - MLflow's ``ResponsesAgent``, ``ChatAgent``, ``AgentServer``, or a model that
              ``mlflow.pyfunc.load_model`` returned.

    Raises:
        SettingsError: it is nothing of these.
    """
    if inspect.isclass(agent):
        raise SettingsError(
            f"{agent.__name__} is a class; make an instance of it in its module, and serve that"
        )
    if (app := mlflow_model.app_of(agent)) is not None:
        return app
    if callable(agent) and is_asgi(agent):
        asgi: ASGIApp = agent
        return asgi
    if callable(predict := getattr(agent, "predict", None)):
        stream = getattr(agent, "predict_stream", None)
        return function_app(AgentFunction.of(predict), AgentFunction.of(stream) if callable(stream) else None)
    if callable(agent):
        return function_app(AgentFunction.of(agent))
    raise SettingsError(
        f"a {type(agent).__name__} is neither an ASGI app nor a function, and has no predict"
        + ("; serve a function that calls its invoke" if hasattr(agent, "invoke") else "")
    )


def prepare(target: str) -> str:
    """Check that what an import string or a model's URI names is there, without running it.

    Returns:
        What :func:`load_app` takes in its place: a model is downloaded where it is elsewhere.

    Raises:
        SettingsError: it is not.
    """
    if is_model(target):
        return mlflow_model.fetch_model(target)
    module, _ = split_target(target)
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise SettingsError(
            f"cannot import {target!r}: there is no module {module!r} in {Path.cwd()} or on the Python path;"
            " start in its folder or give --app-dir"
        )
    return target


def load_app(target: str) -> ASGIApp:
    """The app behind an import string, or that of the model at a URI or in a folder.

    Raises:
        SettingsError: there is no such module, attribute or model, or it can't be served.
        Exception: what the module itself raises while it is imported.
    """
    if is_model(target := prepare(target)):
        return mlflow_model.ModelApp(mlflow_model.load_model(target))
    try:
        return as_app(imported(target))
    except SettingsError as error:
        raise SettingsError(f"cannot serve {target!r}: {error}") from error


def is_model(target: str) -> bool:
    """Whether a target is a URI, such as ``models:/name/1``, or a folder with an MLflow model."""
    return URI.match(target) is not None or (Path(target) / MODEL_FILE).is_file()


def split_target(target: str) -> tuple[str, str]:
    module, separator, attribute = target.partition(":")
    if not (module and separator and attribute):
        raise SettingsError(
            f"{target!r} is no import string and no folder with an MLflow model: give module:attribute, such "
            "as my_agent:app, or models:/name/version"
        )
    return module, attribute


def imported(target: str) -> Any:
    module, attribute = split_target(target)
    found: Any = importlib.import_module(module)
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise SettingsError(f"module {module!r} has no attribute {attribute!r}")
        found = getattr(found, name)
    return found
