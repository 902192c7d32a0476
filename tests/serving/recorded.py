"""An app with capture on that serves a whole module of tests, and the rows it makes meanwhile."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
from mlflow.entities import Span, Trace

from serving import InferenceTableMiddleware
from tests.support import output_of, rows, running, wait_for

NO_TLS: Final = False
"""For ``verify``: loading certificates, which takes longer than a request, is for ``https://``."""


@dataclass(frozen=True)
class Recorded:
    """A running app: where it is, and the table that it writes."""

    url: str
    table: Path

    def post(self, path: str, **options: Any) -> "Exchanged":
        """Send a request, and wait for its row."""
        reply = self.send(path, **options)
        return Exchanged(reply, self.row(reply))

    def send(self, path: str, **options: Any) -> httpx.Response:
        """Send a request on a connection of its own."""
        return httpx.post(self.url + path, timeout=60, verify=NO_TLS, **options)

    def stream(self, path: str, **options: Any) -> contextlib.AbstractContextManager[httpx.Response]:
        """Send a request and read its reply as it comes."""
        return httpx.stream("POST", self.url + path, timeout=60, verify=NO_TLS, **options)

    def post_all(self, requests: Sequence[tuple[str, Any]]) -> list[dict[str, Any]]:
        """Send requests, each a path and a JSON body, all at once; their rows in the same order."""
        with ThreadPoolExecutor(len(requests)) as pool:
            replies = list(pool.map(lambda request: self.send(request[0], json=request[1]), requests))
        ids = [reply.headers["x-databricks-request-id"] for reply in replies]
        found = self.find_all(f"databricks_request_id in {(*ids, '')}", len(ids))
        by_id = {row["databricks_request_id"]: row for row in found}
        return [by_id[request_id] for request_id in ids]

    def leave(self, path: str, *, after: str, **options: Any) -> dict[str, Any]:
        """The row of a streamed reply that the client leaves at the first line that holds ``after``."""
        with self.stream(path, **options) as reply:
            next(line for line in reply.iter_lines() if after in line)
        return self.row(reply)

    def row(self, reply: httpx.Response) -> dict[str, Any]:
        return self.find(f"databricks_request_id = '{reply.headers['x-databricks-request-id']}'")

    def find(self, where: str) -> dict[str, Any]:
        """The one row of a condition, once it is in the table."""
        [row] = self.find_all(where, 1)
        return row

    def find_all(self, where: str, count: int) -> list[dict[str, Any]]:
        """The rows of a condition, once there are so many."""
        read_at = 0

        def look() -> list[dict[str, Any]]:
            nonlocal read_at
            commits = sum(1 for _ in self.table.glob("_delta_log/*.json"))
            if commits == read_at:
                return []  # nothing new: reading a table takes longer than asking for its log
            read_at = commits
            found = rows(self.table, where)
            return found if len(found) >= count else []

        found = wait_for(look, f"{count} rows where {where}")
        return [{**row, "request_metadata": dict(row["request_metadata"])} for row in found]


@dataclass(frozen=True)
class Exchanged:
    """A reply and its row."""

    reply: httpx.Response
    row: dict[str, Any]


@contextlib.contextmanager
def recorded(app: Any, folder: Path, **options: Any) -> Iterator[Recorded]:
    """A real server around ``app`` with capture on."""
    options = {
        "uri": str(folder / "payload"),
        "spool_dir": str(folder / "spool"),
        "flush_seconds": 0.05,
        **options,
    }
    with running(InferenceTableMiddleware(app, enabled=True, **options)) as url:
        yield Recorded(url, folder / "payload")


def traces_of(row: Mapping[str, Any]) -> list[Trace]:
    """All traces of a row, in the order in which they started."""
    output = output_of(row)
    found = [output["trace"]] if "trace" in output else []
    return [Trace.from_dict(trace) for trace in (*found, *output.get("other_traces", []))]


def trace_of(row: Mapping[str, Any]) -> Trace:
    """The trace of a row that has one."""
    traces = traces_of(row)
    assert len(traces) == 1, [outline(trace) for trace in traces]
    return traces[0]


def outline(trace: Trace) -> str:
    """The names of a trace's spans as a tree, siblings by name: ``agent(llm tool(search search))``.

    Spans whose parent is not in the trace stand at the top.
    """
    spans = trace.data.spans
    known = {span.span_id for span in spans}

    def branch(parent: Span) -> str:
        inner = branches([span for span in spans if span.parent_id == parent.span_id])
        return f"{parent.name}({inner})" if inner else parent.name

    def branches(siblings: list[Span]) -> str:
        return " ".join(sorted(branch(span) for span in siblings))

    return branches([span for span in spans if span.parent_id not in known])


def span_named(trace: Trace, name: str) -> Span:
    """The one span of that name."""
    [span] = [span for span in trace.data.spans if span.name == name]
    return span
