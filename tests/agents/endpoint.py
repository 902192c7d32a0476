"""An agent in a process of its own, as autologging patches libraries for a whole process, and its rows."""

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from mlflow.entities import Span, Trace

from tests.serving.recorded import Recorded
from tests.support import ROOT, Process, answers, free_port, output_of, served, wait_for

__all__ = ["Agent", "Asked", "exception_of", "serving", "uvicorn_serving"]


@dataclass(frozen=True)
class Asked:
    """What a client got, and the row of it."""

    status: int
    text: str
    """The reply, up to where its stream broke off."""
    row: dict[str, Any]

    @property
    def body(self) -> Any:
        return json.loads(self.text)

    @property
    def events(self) -> list[Any]:
        """The data of server-sent events."""
        lines = (line.removeprefix("data: ") for line in self.text.splitlines() if line.startswith("data: "))
        return [json.loads(line) for line in lines if line != "[DONE]"]

    @property
    def trace(self) -> Trace:
        """The first trace."""
        return self.traces[0]

    @property
    def traces(self) -> list[Trace]:
        output = output_of(self.row)
        found = [output["trace"]] if "trace" in output else []
        return [Trace.from_dict(trace) for trace in [*found, *output.get("other_traces", [])]]


class Agent(Recorded):
    """A running agent: where it is, and the table that it writes."""

    def ask(self, path: str, **body: Any) -> Asked:
        """Send a request, read its reply as far as it goes, and wait for its row."""
        with httpx.stream("POST", self.url + path, json=body, timeout=60) as reply:
            parts = []
            with contextlib.suppress(httpx.RemoteProtocolError):
                for part in reply.iter_text():
                    parts.append(part)
        return Asked(reply.status_code, "".join(parts), self.row(reply))


def exception_of(span: Span) -> str:
    """Type and message of the exception with which a span failed."""
    assert span.status.status_code.value == "ERROR"
    event = next(event for event in span.events if event.name == "exception")
    return f"{event.attributes['exception.type']!s}: {event.attributes['exception.message']!s}"


@contextlib.contextmanager
def serving(app: str, folder: Path, env: Mapping[str, str]) -> Iterator[Agent]:
    """``tracelake serve`` of an agent."""
    with served(app, env={**storage_in(folder), **env}, log=folder / "log") as (url, _):
        yield Agent(url, folder / "payload")


@contextlib.contextmanager
def uvicorn_serving(app: str, folder: Path, env: Mapping[str, str]) -> Iterator[Agent]:
    """A plain uvicorn around an agent, which adds our middleware itself if it wants it."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", app, "--port", str(port)]
    # In the test's folder: an agent that nobody captures has MLflow write a store where it runs.
    environment = {**storage_in(folder), "PYTHONPATH": str(ROOT), **env}
    process = Process(command, environment, folder / "log", cwd=folder)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: answers(url) or process.popen.poll() is not None, f"{url} to answer", 60)
        if process.popen.poll() is not None:
            raise RuntimeError((folder / "log").read_text())
        yield Agent(url, folder / "payload")
        process.stop()
    finally:
        process.kill_group()


def storage_in(folder: Path) -> dict[str, str]:
    return {
        "INFERENCE_TABLE_URI": str(folder / "payload"),
        "INFERENCE_TABLE_SPOOL_DIR": str(folder / "spool"),
        "INFERENCE_TABLE_FLUSH_SECONDS": "0.05",
    }
