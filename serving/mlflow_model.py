"""MLflow's models and agents as ASGI apps. Whatever is one of them needs full MLflow, not the light SDK.

A model is served by MLflow's own scoring server, with its request forms, its errors and its time limit. What
that does not know is streams: a request with ``"stream": true`` to a model that has ``predict_stream`` is
answered here, with server-sent events. An agent that was not saved as a model is served as MLflow's
``AgentServer`` serves one.

Private name of MLflow, tested with 3.17.2: ``pyfunc.scoring_server._parse_json_data``.
"""

# mypy: disable-error-code="no-untyped-call"
# MLflow is typed in part only.

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final

import mlflow
from pydantic import BaseModel, TypeAdapter
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inference_table.errors import SettingsError
from serving.endpoint import function_app, json_object
from serving.function import AgentFunction, RequestError, is_traced, name_of
from serving.invocation import Invocation, root_span
from serving.json_value import to_jsonable

__all__ = ["ModelApp", "app_of", "fetch_model", "load_model", "version_of_alias"]

PYFUNC: Final = "mlflow.pyfunc"
LANGCHAIN: Final = "langchain"
PATH: Final = "/invocations"
STREAM: Final = "stream"
JSON_TYPES: Final = frozenset({"application/json", "application/json;charset=utf-8"})
"""What the scoring server takes for JSON; it refuses other parameters."""
RETRIES: Final = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
ARRAYS: Final = frozenset({"numpy", "pandas"})


def app_of(agent: Any) -> ASGIApp | None:
    """The app that serves an object of one of MLflow's classes; None for any other object.

    Raises:
        SettingsError: it has to be saved as a model first.
    """
    if is_instance(agent, "mlflow.genai.agent_server", "AgentServer"):
        app: ASGIApp = agent.app
        return app
    if is_instance(agent, PYFUNC, "PyFuncModel"):
        return ModelApp(agent)
    if is_instance(agent, PYFUNC, "ResponsesAgent"):
        return responses_agent_app(agent)
    if is_instance(agent, PYFUNC, "ChatAgent"):
        return chat_agent_app(agent)
    if is_instance(agent, PYFUNC, "PythonModel"):
        raise SettingsError(
            f"a {type(agent).__name__} is a PythonModel, which gets its signature and artifacts when it is "
            "saved: call mlflow.pyfunc.save_model('model', python_model=...) and serve the folder: ./model"
        )
    return None


def is_instance(agent: Any, module: str, name: str) -> bool:
    """Whether an object is of a class of MLflow's, which is imported then."""
    return isinstance(agent, getattr(sys.modules.get(module), name, ()))


# --- agents ---


def responses_agent_app(agent: Any) -> ASGIApp:
    """An app for a ``ResponsesAgent``, whose calls MLflow traces; OpenAI's client talks to ``/responses``."""
    from mlflow.types import responses as types

    function, stream = agent_functions(
        agent,
        types.ResponsesAgentRequest,
        (types.ResponsesAgentResponse, types.ResponsesAgentStreamEvent),
        lambda method: method,
    )
    return function_app(function, stream, paths=(PATH, "/responses"))


def chat_agent_app(agent: Any) -> ASGIApp:
    from mlflow.types import agent as types

    def unpacked(method: Callable[..., Any]) -> Callable[[Any], Any]:
        return lambda request: method(request.messages, request.context, request.custom_inputs)

    replies = (types.ChatAgentResponse, types.ChatAgentChunk)
    return function_app(*agent_functions(agent, types.ChatAgentRequest, replies, unpacked))


def agent_functions(
    agent: Any,
    request: type[BaseModel],
    replies: tuple[type[BaseModel], type[BaseModel]],
    taking: Callable[[Callable[..., Any]], Callable[[Any], Any]],
) -> tuple[AgentFunction, AgentFunction | None]:
    """``predict`` and, where the agent has one of its own, ``predict_stream``.

    Args:
        request: what a request is made into.
        replies: what the methods return: whole, and an item of a stream.
        taking: makes a method one that takes a request as its only argument.
    """
    whole, streamed = (
        AgentFunction(
            call=taking(method),
            name=method.__name__,
            is_traced=is_traced(method),
            request_type=TypeAdapter(request),
            convert=converter(reply),
        )
        for method, reply in zip((agent.predict, agent.predict_stream), replies, strict=True)
    )
    return whole, streamed if has_own_stream(agent) else None


def has_own_stream(agent: Any) -> bool:
    """Whether ``predict_stream`` is more than MLflow's, which raises NotImplementedError."""
    return not agent.predict_stream.__module__.startswith("mlflow.")


def converter(reply: type[BaseModel]) -> Callable[[Any], Any]:
    """Checks what an agent returns, as MLflow does when it serves one, and leaves out what is unset."""

    def convert(value: Any) -> Any:
        if isinstance(value, BaseModel):
            return value.model_dump(exclude_none=True)
        reply.model_validate(value)
        return value

    return convert


# --- models ---


def full_mlflow(module: str, what: str) -> Any:
    """A module that is not in MLflow's light SDK.

    Raises:
        SettingsError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SettingsError(
            f"cannot serve {what}: MLflow models need the whole of MLflow ({error}); "
            "pip install 'tracelake[mlflow]'"
        ) from error


def fetch_model(uri: str, into: str | None = None) -> str:
    """The local folder of a model, to which it is downloaded where it is elsewhere.

    Args:
        into: an existing folder that is to hold a copy; without one, a local model is where it is, and what
            is downloaded in a temporary folder that stays.

    Raises:
        SettingsError: there is no such model, or its store does not answer.
    """
    artifacts = full_mlflow("mlflow.artifacts", f"{uri!r}")
    try:
        with little_patience():
            folder: str = artifacts.download_artifacts(artifact_uri=uri, dst_path=into)
        full_mlflow("mlflow.models", f"{uri!r}").Model.load(folder)
    # What stands between us and a store (MLflow, requests, a cloud's SDK) raises whatever it likes.
    except Exception as error:
        store = mlflow.get_registry_uri() if uri.startswith("models:") else mlflow.get_tracking_uri()
        raise SettingsError(f"cannot get the model {uri!r} from {store}: {describe(error)}") from error
    return folder


def version_of_alias(name: str, alias: str) -> str:
    """The version of a registered model that an alias names now.

    Raises:
        SettingsError: there is none, or the registry does not answer.
    """
    client = full_mlflow("mlflow.tracking", f"'models:/{name}@{alias}'").MlflowClient()
    try:
        with little_patience():
            return str(client.get_model_version_by_alias(name, alias).version)
    except Exception as error:  # as above
        raise SettingsError(
            f"cannot find {alias!r} of the model {name!r} in {mlflow.get_registry_uri()}: {describe(error)}"
        ) from error


@contextmanager
def little_patience() -> Iterator[None]:
    """Give up after seconds where no tracking server answers: MLflow itself is silent for four minutes.

    Who set the number of its attempts gets that.
    """
    is_set = RETRIES in os.environ
    os.environ.setdefault(RETRIES, "2")
    try:
        yield
    finally:
        if not is_set:
            del os.environ[RETRIES]


def load_model(folder: str) -> Any:
    """A model, loaded by MLflow.

    Raises:
        SettingsError: it can't be loaded.
    """
    pyfunc = full_mlflow(PYFUNC, f"{folder!r}")
    try:
        # As Databricks does for chains it serves; before the model's own code, which may decide otherwise.
        if LANGCHAIN in full_mlflow("mlflow.models", f"{folder!r}").Model.load(folder).flavors:
            mlflow.langchain.autolog()
        return pyfunc.load_model(folder)
    # A model's code is a user's, and may raise anything.
    except Exception as error:
        raise SettingsError(f"cannot load the model {folder!r}: {describe(error)}") from error


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def is_python(model: Any) -> bool:
    """Whether a model is a user's Python code, rather than a library's object."""
    return str(model.loader_module).startswith(PYFUNC)


def is_streamable(model: Any) -> bool:
    # MLflow saves this for every ResponsesAgent and ChatAgent.
    is_marked: bool = model.metadata.flavors["python_function"].get("streamable", False)
    return is_marked and (not is_python(model) or has_own_stream(user_code(model)))


def user_code(model: Any) -> Any:
    """The user's object in a model that is Python code."""
    try:
        return model.get_raw_model()
    except NotImplementedError:
        return model.unwrap_python_model()


class RecordedModel:
    """What the scoring server needs of a model, with a root span around code that has none of its own."""

    def __init__(self, model: Any) -> None:
        code = user_code(model)
        # A function that was saved as a model is in an object of MLflow's.
        predict = code.func if type(code).__module__.startswith(PYFUNC) else code.predict
        self.metadata = model.metadata
        self._predict = model.predict
        self._function = AgentFunction(model.predict, name_of(predict), is_traced(predict))

    def predict(self, data: Any, params: Any = None) -> Any:
        with root_span(self._function, readable(data)) as span:
            result = self._predict(data, params=params)
            span.set_outputs(readable(result))
        return result


def readable(value: Any) -> Any:
    """Data frames and arrays as lists: MLflow would record what ``print`` shows of them."""
    if isinstance(value, dict):
        return {key: readable(item) for key, item in value.items()}
    return to_jsonable(value) if type(value).__module__.partition(".")[0] in ARRAYS else value


class ModelApp:
    """A model's scoring server, with streams."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._server = full_mlflow("mlflow.pyfunc.scoring_server", "a model")
        self._app: ASGIApp = self._server.init(RecordedModel(model) if is_python(model) else model)
        self._schema = model.metadata.get_input_schema()
        self._stream: AgentFunction | None = None
        if is_streamable(model):
            is_recorded = not is_python(model) or is_traced(user_code(model).predict_stream)
            self._stream = AgentFunction(self._predict_stream, "predict_stream", is_recorded)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with prediction_context(self._model):
            if self._stream is None or not is_invocation(scope):
                await self._app(scope, receive, send)
            else:
                await self._invocation(self._stream, scope, receive, send)

    async def _invocation(self, stream: AgentFunction, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await Request(scope, receive).body()
        except ClientDisconnect:
            return
        if (request := stream_request(body)) is None:
            await self._app(scope, replaying(body, receive), send)
        else:
            await Invocation(stream, request, request)(scope, receive, send)

    def _predict_stream(self, body: dict[str, Any]) -> Any:
        request = {key: value for key, value in body.items() if key != STREAM}
        parsed = self._server._parse_json_data(request, self._model.metadata, self._schema)
        return self._model.predict_stream(parsed.data, params=parsed.params)


def prediction_context(model: Any) -> AbstractContextManager[None]:
    """Has a model's traces refer to it. A model sets this itself, but only once its own ``predict`` runs."""
    context = importlib.import_module("mlflow.pyfunc.context")
    schemas = (model.metadata.metadata or {}).get("dependencies_schemas", {})
    tags = {name: json.dumps(schema) for name, schema in schemas.items()}
    found: AbstractContextManager[None] = context.set_prediction_context(
        context.Context(model_id=model.model_id, dependencies_schemas=tags)
    )
    return found


def is_invocation(scope: Scope) -> bool:
    """Whether the scoring server would parse a request as JSON and predict."""
    return (
        scope["type"] == "http"
        and scope["method"] == "POST"
        and scope["path"].removeprefix(scope.get("root_path", "")) == PATH
        and Headers(scope=scope).get("content-type", "").replace(" ", "").lower() in JSON_TYPES
    )


def stream_request(body: bytes) -> dict[str, Any] | None:
    """The JSON object that a body is, where it asks for a stream."""
    if b'"stream"' not in body:
        return None
    try:
        request = json_object(body)
    except RequestError:
        return None  # the scoring server says what is wrong
    return request if request.get(STREAM) is True else None


def replaying(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that begins with a body that was read already."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
