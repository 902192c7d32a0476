"""``POST /feedback``: what users of a chat say of an answer, from the moment they have it.

The request, a JSON object:

==========================  =====================================================================
``databricks_request_id``   the reply's header ``x-databricks-request-id``; or
``trace_id``                MLflow's, ``tr-...``
``value``                   any JSON value; null withdraws what ``feedback_id`` names
``name``                    of what is judged; default ``user_feedback``
``type``                    ``feedback`` (default), or ``expectation``: what the answer should be
``rationale``               why, in words
``source_id``               who says so; with API keys the key's name does
``feedback_id``             of an earlier reply, to change that one; of one's own, to repeat safely
==========================  =====================================================================

The reply is ``{"feedback_id": ...}``, with status 200, once it is committed to the table of annotations, and
on disk. Nobody asks whether the request is a row yet, so feedback is never too early.
"""

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Final

from prometheus_client import Counter
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from inference_table.annotations import Annotation, AnnotationLog
from inference_table.errors import TableError
from inference_table.settings import StorageSettings
from serving.border import reporter
from serving.exchange import REQUESTER_KEY
from serving.function import RequestError
from serving.invocation import error_response
from serving.opinion import Opinion, read_opinion
from serving.refusals import refuse

__all__ = ["FEEDBACK_PATH", "FeedbackApp", "FeedbackRoute"]

FEEDBACK_PATH: Final = "/feedback"
MAX_BODY_BYTES: Final = 256 * 1024
MAX_WAITING: Final = 1000
"""Requests that wait for their commit in one process: a second or so of them."""
COMMIT_THREADS: Final = 16
"""Calls that share a commit."""
TIMEOUT_SECONDS: Final = 30.0
"""Some retries of a commit; then a client would rather know."""

REQUESTS: Final = Counter(
    "tracelake_feedback_total", "Requests to the feedback route, by what became of them.", ["outcome"]
)


class FeedbackApp:
    """An ASGI app that takes feedback, for ``/feedback`` of ``tracelake serve`` or any route of an app.

    ``app.router.routes.append(Route("/feedback", FeedbackApp()))`` in FastAPI or Starlette. It needs no
    capture to be on. Who may call it, and from which origin, is for those around it to say.

    Args:
        settings: of the payload table; from the environment by default.

    Raises:
        SettingsError: a setting is not accepted.
    """

    def __init__(self, settings: StorageSettings | None = None) -> None:
        self._log = AnnotationLog(settings or StorageSettings.from_environ())
        self._threads: ThreadPoolExecutor | None = None
        self._waiting = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"FeedbackApp answers http only, not {scope['type']!r}")
        if scope["method"] != "POST":
            reply = refusal(HTTPStatus.METHOD_NOT_ALLOWED, "POST it", {"allow": "POST"})
            await refuse(scope, receive, send, reply)
            return
        try:
            body = await read_body(Request(scope, receive))
        except ClientDisconnect:
            return
        if body is None:
            REQUESTS.labels("invalid").inc()
            message = f"feedback has at most {MAX_BODY_BYTES:,} bytes"
            await refuse(scope, receive, send, refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message))
            return
        reply = await self._answer(body, scope.get(REQUESTER_KEY))
        await reply(scope, receive, send)

    async def _answer(self, body: bytes, requester: str | None) -> Response:
        try:
            opinion = read_opinion(body, requester)
            annotation = opinion.annotation()
        except (RequestError, ValueError) as error:
            REQUESTS.labels("invalid").inc()
            return refusal(HTTPStatus.BAD_REQUEST, str(error))
        if self._waiting >= MAX_WAITING:
            REQUESTS.labels("full").inc()
            return unavailable("too much feedback is waiting here; try again later", opinion)
        self._waiting += 1
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                await self._append(annotation)
        except (TableError, TimeoutError) as error:
            REQUESTS.labels("failed").inc()
            reporter.failure("feedback", "feedback could not be committed", error)
            message = "it is unknown whether the feedback is committed; send it again with this feedback_id"
            return unavailable(message, opinion)
        finally:
            self._waiting -= 1
        REQUESTS.labels("committed").inc()
        return error_response(HTTPStatus.OK, {"feedback_id": opinion.feedback_id})

    async def _append(self, annotation: Annotation) -> None:
        if self._threads is None:
            # Threads of our own: the agent's functions run in those of the event loop.
            self._threads = ThreadPoolExecutor(COMMIT_THREADS, thread_name_prefix="tracelake-feedback")
        await asyncio.get_running_loop().run_in_executor(self._threads, self._log.append, [annotation])


class FeedbackRoute:
    """An ASGI app around another, with :class:`FeedbackApp` at one path.

    Args:
        app: gets all other requests.
        feedback: what answers at ``path``.
    """

    def __init__(self, app: ASGIApp, feedback: FeedbackApp, path: str = FEEDBACK_PATH) -> None:
        self._app = app
        self._feedback = feedback
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (self._feedback if self._is_feedback(scope) else self._app)(scope, receive, send)

    def _is_feedback(self, scope: Scope) -> bool:
        if scope["type"] != "http" or scope["method"] != "POST":
            return False
        path: str = scope["path"]
        return path.removeprefix(scope.get("root_path", "")) == self._path


async def read_body(request: Request) -> bytes | None:
    """The whole body; None where it is too long.

    Raises:
        ClientDisconnect: there is nobody to answer.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            return None
    return bytes(body)


def refusal(status: HTTPStatus, message: str, headers: Mapping[str, str] | None = None) -> Response:
    return error_response(status, {"error_code": status.name, "message": message}, headers)


def unavailable(message: str, opinion: Opinion) -> Response:
    status = HTTPStatus.SERVICE_UNAVAILABLE
    description = {"error_code": status.name, "message": message, "feedback_id": opinion.feedback_id}
    return error_response(status, description, {"retry-after": "1"})
