"""Agents inside apps of FastAPI and Starlette: what these do around an agent keeps its trace together."""

from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any

import mlflow
import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse as FastAPIResponse
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

from tests.serving.apps import answer
from tests.serving.recorded import Exchanged, Recorded, outline, recorded, trace_of, traces_of

Body = dict[str, Any]
ANSWER = "answer(retrieve)"


class BusyError(Exception):
    """What the agent raises when it is busy."""


@mlflow.trace
def note(text: str) -> str:
    return text


# --- Starlette ---


async def async_route(request: Any) -> JSONResponse:
    return JSONResponse(answer((await request.json())["question"]))


def sync_route(request: Any) -> JSONResponse:
    return JSONResponse(answer(request.path_params["question"]))


class Endpoint(HTTPEndpoint):
    async def post(self, request: Any) -> JSONResponse:
        return JSONResponse(answer((await request.json())["question"]))


async def failing_route(request: Any) -> JSONResponse:
    with mlflow.start_span("failing"):
        raise BusyError("the agent is busy")


async def busy(request: Any, error: Exception) -> JSONResponse:
    note("handled")
    return JSONResponse({"error": str(error)}, 503)


async def noting(request: Any, call_next: Any) -> Any:
    """A middleware that has a trace of its own before and after the agent's."""
    note("before")
    response = await call_next(request)
    note("after")
    return response


def starlette_app() -> Starlette:
    return Starlette(
        routes=[
            Route("/async", async_route, methods=["POST"]),
            Route("/sync/{question}", sync_route, methods=["POST"]),
            Route("/endpoint", Endpoint),
            Route("/failing", failing_route, methods=["POST"]),
        ],
        exception_handlers={BusyError: busy},
    )


# --- FastAPI ---


class Question(BaseModel):
    question: str


async def session() -> AsyncIterator[str]:
    """A span around the endpoint, which ends when the reply has gone."""
    with mlflow.start_span("session"):
        yield "session"


def index() -> Iterator[str]:
    note("open")
    yield "index"
    note("close")


router = APIRouter(prefix="/routed")


@router.post("/async")
async def routed(body: Question) -> Body:
    return answer(body.question)


def fastapi_app() -> FastAPI:
    app = FastAPI()
    app.include_router(router)

    @app.exception_handler(BusyError)
    async def handle(request: Request, error: BusyError) -> FastAPIResponse:
        return FastAPIResponse({"error": str(error)}, 503)

    @app.post("/async-dependency")
    async def async_dependency(body: Question, _: Annotated[str, Depends(session)]) -> Body:
        return answer(body.question)

    @app.post("/async-dependency-sync-endpoint")
    def sync_endpoint(body: Question, _: Annotated[str, Depends(session)]) -> Body:
        return answer(body.question)

    @app.post("/sync-dependency")
    def sync_dependency(body: Question, _: Annotated[str, Depends(index)]) -> Body:
        return answer(body.question)

    @app.post("/stream-in-dependency")
    async def stream_in_dependency(body: Question, _: Annotated[str, Depends(session)]) -> StreamingResponse:
        def lines() -> Iterator[str]:
            for word in body.question.split():
                yield f"{note(word)}\n"

        return StreamingResponse(lines(), media_type="text/plain")

    @app.post("/busy")
    async def raising() -> None:
        with mlflow.start_span("failing"):
            raise BusyError("the agent is busy")

    @app.post("/refusing")
    async def refusing(body: Question) -> None:
        answer(body.question)
        raise HTTPException(409, "not now")

    @app.post("/background")
    def background(body: Question, tasks: BackgroundTasks) -> Body:
        tasks.add_task(note, "afterwards")
        return answer(body.question)

    return app


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    """Both apps, each mounted under an outer one."""
    app = Starlette(
        routes=[
            Mount("/starlette", starlette_app()),
            Mount("/fastapi", fastapi_app()),
            Mount("/noting", starlette_app(), middleware=[Middleware(BaseHTTPMiddleware, dispatch=noting)]),
        ]
    )
    with recorded(app, tmp_path_factory.mktemp("containers"), trace_grace_seconds=30) as endpoint:
        yield endpoint


def ask(server: Recorded, path: str) -> Exchanged:
    return server.post(path, json={"question": "why not"})


@pytest.mark.parametrize("route", ["async", "sync/why", "endpoint"])
def test_starlettes_routes(server: Recorded, route: str) -> None:
    """Async routes, sync ones, which run in threads, and endpoint classes."""
    exchanged = ask(server, f"/starlette/{route}")
    assert exchanged.reply.status_code == 200
    assert outline(trace_of(exchanged.row)) == ANSWER
    assert exchanged.row["request_metadata"]["path"] == f"/starlette/{route}"


def test_starlettes_exception_handlers(server: Recorded) -> None:
    """The row has what the handler answered, and the traces of the failure and of the handler."""
    exchanged = ask(server, "/starlette/failing")
    assert exchanged.reply.status_code == exchanged.row["status_code"] == 503
    assert [outline(trace) for trace in traces_of(exchanged.row)] == ["failing", "note"]
    assert exchanged.row["trace_state"] == "ERROR"


def test_spans_of_middlewares_around_an_agent(server: Recorded) -> None:
    """``BaseHTTPMiddleware`` runs the app in a task of its own; its traces and the agent's are in one row."""
    exchanged = ask(server, "/noting/async")
    assert [outline(trace) for trace in traces_of(exchanged.row)] == ["note", ANSWER, "note"]


@pytest.mark.parametrize("route", ["async-dependency", "async-dependency-sync-endpoint"])
def test_a_dependency_around_an_endpoint(server: Recorded, route: str) -> None:
    """The span of one that yields is the parent of the agent's, and ends after the reply."""
    row = ask(server, f"/fastapi/{route}").row
    assert outline(trace_of(row)) == f"session({ANSWER})"
    assert row["trace_state"] == "OK"


def test_a_sync_dependency(server: Recorded) -> None:
    """It runs in threads, before the endpoint and after it: three traces, in the order they began."""
    row = ask(server, "/fastapi/sync-dependency").row
    assert [outline(trace) for trace in traces_of(row)] == ["note", ANSWER, "note"]


def test_a_stream_within_a_dependency(server: Recorded) -> None:
    """Starlette takes each item in a thread; the dependency's span is around them all."""
    exchanged = ask(server, "/fastapi/stream-in-dependency")
    assert exchanged.reply.text == "why\nnot\n"
    assert outline(trace_of(exchanged.row)) == "session(note note)"
    assert exchanged.row["trace_state"] == "OK"


def test_fastapis_errors(server: Recorded) -> None:
    """Handled exceptions, HTTPException and requests that do not validate are what the client got."""
    handled = ask(server, "/fastapi/busy")
    assert handled.reply.json() == {"error": "the agent is busy"}
    assert (handled.row["status_code"], handled.row["trace_state"]) == (503, "ERROR")
    refused = ask(server, "/fastapi/refusing")
    assert (refused.row["status_code"], outline(trace_of(refused.row))) == (409, ANSWER)
    invalid = server.post("/fastapi/async-dependency", json={})
    assert (invalid.row["status_code"], invalid.reply.json()["detail"][0]["type"]) == (422, "missing")


def test_fastapis_routers_and_background_tasks(server: Recorded) -> None:
    assert outline(trace_of(ask(server, "/fastapi/routed/async").row)) == ANSWER
    row = ask(server, "/fastapi/background").row
    assert [outline(trace) for trace in traces_of(row)] == [ANSWER, "note"]
