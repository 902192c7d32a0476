"""A Python function that answers one request, as it is called, and what may be served as one."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from functools import partial
from inspect import Parameter
from typing import Any, Final, Self, get_type_hints

from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.requests import HTTPConnection

from inference_table.errors import SettingsError

__all__ = ["AgentFunction", "RequestError", "is_asgi", "is_traced", "name_of"]

POSITIONAL: Final = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
WSGI: Final = ["environ", "start_response"]


class RequestError(Exception):
    """A request that the agent does not take; the text is for its client."""


def unchanged(value: Any) -> Any:
    return value


@dataclass(frozen=True, slots=True)
class AgentFunction:
    """What is called with a request: any function of one argument, sync or async, generators among them."""

    call: Callable[[Any], Any]
    name: str
    is_traced: bool = False
    """Whether MLflow makes a span of each call already."""
    request_type: TypeAdapter[Any] | None = None
    """What the JSON object becomes before the call; None leaves it as it is."""
    convert: Callable[[Any], Any] = unchanged
    """Applied to what is returned, or to each item of it."""

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Self:
        """A user's function, whose first parameter takes the request; others have defaults.

        Raises:
            SettingsError: it can't be called so.
        """
        return cls(
            call=function,
            name=name_of(function),
            is_traced=is_traced(function),
            request_type=validated_type(function, request_parameter(function)),
        )

    def argument(self, body: dict[str, Any]) -> Any:
        """What the function is called with.

        Raises:
            RequestError: the body is not of the type that the function takes.
        """
        if self.request_type is None:
            return body
        try:
            return self.request_type.validate_python(body)
        except ValidationError as error:
            raise RequestError(f"the request is no {error.title}: {faults(error)}") from error


def faults(error: ValidationError) -> str:
    """Each field that is wrong, with what is wrong."""
    return "; ".join(
        f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" if fault["loc"] else fault["msg"]
        for fault in error.errors(include_url=False, include_context=False, include_input=False)
    )


def is_asgi(agent: Callable[..., Any]) -> bool:
    """Whether a callable is an ASGI app: it needs ``scope``, ``receive`` and ``send``."""
    signature = signature_of(agent)
    if signature is None:
        return not inspect.isroutine(agent)
    parameters = signature.parameters.values()
    if any(parameter.kind is Parameter.VAR_POSITIONAL for parameter in parameters):
        # Wrappers tell nothing. Around an app they are objects, mostly; around an agent, functions.
        return not inspect.isroutine(agent)
    return len(required(signature)) == 3


def signature_of(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # some that are written in C have none
        return None


def required(signature: inspect.Signature) -> list[str]:
    """The positional parameters without a default."""
    return [
        name
        for name, parameter in signature.parameters.items()
        if parameter.kind in POSITIONAL and parameter.default is Parameter.empty
    ]


def request_parameter(function: Callable[..., Any]) -> Parameter | None:
    """The parameter that takes the request, where it has a name.

    Raises:
        SettingsError: there is none, or others would be missing.
    """
    signature = signature_of(function)
    if signature is None:
        return None
    label = f"{name_of(function)}{signature.replace(return_annotation=signature.empty)}"
    parameters = list(signature.parameters.values())
    if not parameters:
        raise SettingsError(
            f"{label} takes no argument, an agent takes the request; if it makes an app, call it in its "
            f"module (app = {name_of(function)}()) and serve that"
        )
    if required(signature) == WSGI:
        raise SettingsError(f"{label} is a WSGI app; make it an ASGI app, with a2wsgi for example")
    first = parameters[0]
    if first.kind not in (*POSITIONAL, Parameter.VAR_POSITIONAL):
        raise SettingsError(f"{label} has no positional parameter, by which it would be given the request")
    by_name = [
        one.name for one in parameters if one.kind is Parameter.KEYWORD_ONLY and one.default is one.empty
    ]
    if missing := required(signature)[1:] + by_name:
        raise SettingsError(
            f"{label} can't be called with the request alone; give {', '.join(missing)} a default, or a "
            "value with functools.partial"
        )
    return first if first.kind in POSITIONAL else None


def validated_type(function: Any, parameter: Parameter | None) -> TypeAdapter[Any] | None:
    """The type that requests are validated against: a pydantic model or a dataclass.

    Raises:
        SettingsError: the parameter is not for a JSON object.
    """
    annotation = None if parameter is None else parameter.annotation
    if parameter is not None and isinstance(annotation, str):
        annotation = resolved(function).get(parameter.name)
    if isinstance(annotation, type) and issubclass(annotation, HTTPConnection):
        raise SettingsError(
            f"{name_of(function)} takes a Starlette {annotation.__name__}, an agent function the request's "
            "JSON object; take that, or make it a route: app = Starlette(routes=[Route('/invocations', "
            f"{name_of(function)}, methods=['POST'])])"
        )
    if isinstance(annotation, type) and (issubclass(annotation, BaseModel) or is_dataclass(annotation)):
        return TypeAdapter(annotation)
    return None


def resolved(function: Any) -> dict[str, Any]:
    """Annotations of a module that has ``from __future__ import annotations``."""
    function = innermost(function)
    try:
        return get_type_hints(inspect.unwrap(function if inspect.isroutine(function) else function.__call__))
    except (AttributeError, NameError, SyntaxError, TypeError):  # some are for type checkers only
        return {}


def innermost(function: Any) -> Any:
    while isinstance(function, partial):
        function = function.func
    return function


def name_of(function: Any) -> str:
    function = innermost(function)
    name: str = getattr(function, "__name__", type(function).__name__)
    return name


def is_traced(function: Any) -> bool:
    """Whether a function is decorated with ``@mlflow.trace``, which leaves this mark on it."""
    function = innermost(function)
    marks = (getattr(one, "__mlflow_traced__", False) for one in (function, type(function).__call__))
    return any(marks)
