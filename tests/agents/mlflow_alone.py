"""An app with MLflow's own recording instead of ours, in a process of its own, to compare with.

``GET /traces`` answers the traces that have ended, oldest first, through the JSON that MLflow would send.
"""

# mypy: disable-error-code="no-untyped-call"
# MLflow is typed in part only.

import contextlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import httpx
import uvicorn
from mlflow.entities import Span, Trace
from mlflow.tracing.constant import SpanAttributeKey, TraceMetadataKey
from mlflow.tracing.utils import TraceJSONEncoder
from mlflow.tracking import fluent
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from uvicorn.importer import import_from_string

from tests.serving.tracing_agents import mlflow_recording
from tests.support import Process, answers, free_port, wait_for

__all__ = ["Alone", "comparable", "mlflow_alone"]

RANDOM: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|0x[0-9a-f]{6,}|\b[0-9a-f]{32}\b")
"""Ids and addresses, which differ from run to run."""
ELSEWHERE: Final = {
    SpanAttributeKey.REQUEST_ID: "the trace's id",
    SpanAttributeKey.LLM_COST: "worked out by MLflow's tracking server, which there is none of",
}
"""Attributes that are not compared, and why."""
COMPARED: Final = (
    TraceMetadataKey.TOKEN_USAGE,
    TraceMetadataKey.TRACE_SESSION,
    TraceMetadataKey.INPUTS,
    TraceMetadataKey.OUTPUTS,
)


def comparable(trace: Trace) -> str:
    """What two recordings of one request have in common, as JSON text: all but ids, times and order.

    Agents run steps side by side, so siblings come in the order of what they hold.
    """
    info = trace.info
    known = {span.span_id for span in trace.data.spans}
    value = {
        "state": info.state.value,
        "previews": [info.request_preview, info.response_preview],
        "metadata": {key: info.trace_metadata.get(key) for key in COMPARED},
        "spans": branches(trace, [span for span in trace.data.spans if span.parent_id not in known]),
    }
    return RANDOM.sub("<random>", json.dumps(value, indent=1, sort_keys=True, default=str))


def branches(trace: Trace, siblings: list[Span]) -> list[Any]:
    found = [branch(trace, span) for span in siblings]
    return sorted(found, key=lambda value: RANDOM.sub("", json.dumps(value, sort_keys=True, default=str)))


def branch(trace: Trace, span: Span) -> dict[str, Any]:
    return {
        "name": span.name,
        "type": span.span_type,
        "status": [span.status.status_code.value, span.status.description],
        "inputs": span.inputs,
        "outputs": span.outputs,
        "attributes": {key: value for key, value in span.attributes.items() if key not in ELSEWHERE},
        "events": [[event.name, without_stack(event.attributes)] for event in span.events],
        "children": branches(trace, [other for other in trace.data.spans if other.parent_id == span.span_id]),
    }


def without_stack(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """A stack trace has the frames of who runs the app."""
    return {key: value for key, value in attributes.items() if key != "exception.stacktrace"}


def main(app: str, port: int) -> None:
    # Without one, recording fails in the light SDK.
    fluent._active_experiment_id = "0"  # type: ignore[assignment] # annotated by its first value
    with mlflow_recording() as traces:

        def recorded(request: Request) -> Response:
            text = json.dumps([trace.to_dict() for trace in traces], cls=TraceJSONEncoder)
            return Response(text, media_type="application/json")

        routes = [Route("/traces", recorded), Mount("/", import_from_string(app))]
        uvicorn.run(Starlette(routes=routes), port=port, log_level="error")


class Alone:
    """A running app, and what MLflow recorded of it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._seen = len(self._traces())  # some agents make traces while they are imported

    def _traces(self) -> list[Any]:
        found: list[Any] = httpx.get(f"{self.url}/traces", timeout=60).json()
        return found

    def post(self, path: str, **options: Any) -> list[Trace]:
        """The traces that a request made, in the order in which they ended."""
        with contextlib.suppress(httpx.RemoteProtocolError):  # the app raised in the middle of a stream
            httpx.post(self.url + path, timeout=60, **options)
        values = self._traces()
        new, self._seen = values[self._seen :], len(values)
        return [Trace.from_dict(value) for value in new]


@contextlib.contextmanager
def mlflow_alone(app: str, env: Mapping[str, str], log: Path) -> Iterator[Alone]:
    """The app in a process of its own, with MLflow and without us."""
    port = free_port()
    command = [sys.executable, "-m", __name__, app, str(port)]
    # Nothing is sent there, but the light SDK fails without a tracking server's address.
    process = Process(command, {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", **env}, log)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: answers(url) or process.popen.poll() is not None, "MLflow alone", 60)
        if process.popen.poll() is not None:
            raise RuntimeError(log.read_text())
        yield Alone(url)
    finally:
        process.kill_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
