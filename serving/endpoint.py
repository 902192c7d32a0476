"""The HTTP interface of an agent function: that of MLflow's scoring server, with streams.

``POST /invocations`` takes a JSON object, ``/ping`` and ``/health`` answer 200, ``/version`` tells MLflow's
version. A request with ``"stream": true`` goes to the agent's streaming function, where it has one.
"""

import json
from collections.abc import Sequence
from importlib import metadata
from typing import Any, Final

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from serving.function import AgentFunction, RequestError
from serving.invocation import Invocation, error_response

__all__ = ["Endpoint", "function_app"]

JSON: Final = "application/json"
JSON_KINDS: Final = {
    list: "array",
    str: "string",
    int: "number",
    float: "number",
    bool: "boolean",
    type(None): "null",
}


class Endpoint:
    """Answers the requests of one path, as an ASGI app.

    Args:
        function: called with each request.
        stream: called in its place where the request says ``"stream": true``.
    """

    def __init__(self, function: AgentFunction, stream: AgentFunction | None = None) -> None:
        self._function = function
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = json_object(await Request(scope, receive).body())
            function = self._function
            if self._stream is not None and body.get("stream") is True:
                function = self._stream
            argument = function.argument(body)
        except ClientDisconnect:
            return
        except RequestError as error:
            refusal = error_response(400, {"error_code": "BAD_REQUEST", "message": str(error)})
            await refusal(scope, receive, send)
            return
        await Invocation(function, body, argument)(scope, receive, send)


def json_object(body: bytes) -> dict[str, Any]:
    """The JSON object that a request's body is.

    Raises:
        RequestError: it is none.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the request's body is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise RequestError(f"the request's body is a JSON {JSON_KINDS[type(value)]}; send an object")
    return value


def function_app(
    function: AgentFunction, stream: AgentFunction | None = None, *, paths: Sequence[str] = ("/invocations",)
) -> Starlette:
    """An app that serves an agent function."""
    endpoint = Endpoint(function, stream)
    routes: list[BaseRoute] = [Route(path, endpoint, methods=["POST"]) for path in paths]
    return Starlette(
        routes=[*routes, Route("/ping", ping), Route("/health", ping), Route("/version", version)]
    )


async def ping(_: Request) -> Response:
    # As MLflow's scoring server answers.
    return Response("\n", media_type=JSON)


async def version(_: Request) -> Response:
    return Response(metadata.version("mlflow-tracing"), media_type=JSON)
