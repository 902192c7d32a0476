"""What an app answers, as far as it can be told from its routes."""

from typing import Any, Final

from starlette.routing import BaseRoute, Match, Mount

__all__ = ["answers_invocations"]

PATH: Final = "/invocations"
MAX_DEPTH: Final = 50
"""Of apps within apps: more are a circle."""


def answers_invocations(app: Any) -> bool:
    """Whether an app has a route for ``POST /invocations``. False where it doesn't tell.

    Args:
        app: an ASGI app, perhaps behind middlewares that have it as ``app``.
    """
    scope = {
        "type": "http",
        "method": "POST",
        "path": PATH,
        "root_path": "",
        "headers": [],
        "query_string": b"",
    }
    return has_route(app, scope, MAX_DEPTH)


def has_route(app: Any, scope: dict[str, Any], depth: int) -> bool:
    for _ in range(depth):
        if isinstance(routes := getattr(app, "routes", None), list):
            return any(matches(route, scope, depth - 1) for route in routes)
        app = getattr(app, "app", None) or getattr(app, "_app", None)
        if app is None:
            return False
    return False


def matches(route: Any, scope: dict[str, Any], depth: int) -> bool:
    if not isinstance(route, BaseRoute):
        return False
    match, within = route.matches(scope)
    if match is not Match.FULL:
        return False
    # A mount matches whatever begins as it does.
    return has_route(route.app, {**scope, **within}, depth) if isinstance(route, Mount) else True
