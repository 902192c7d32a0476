"""What a reader of each peer's store sees: through its own table, file or query API, as its users would.

A store tells how many spans of a record can be read. All peers record eight spans a request, so a record is
complete with eight.
"""

import contextlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol

import httpx
import orjson

from inference_table.errors import TableNotFoundError
from inference_table.table import InferenceTable

__all__ = ["BentomlLog", "DeltaTable", "MlflowServer", "PhoenixServer", "SpanLines", "Store"]

CHUNK: Final = 50
"""Traces in one of Phoenix's queries."""
TIMEOUT: Final = 60.0
ARTIFACTS: Final = "/api/2.0/mlflow-artifacts/artifacts/0/traces"
"""Where MLflow's default experiment keeps traces that its client has uploaded as files."""


class Store(Protocol):
    """Where a peer's records end up."""

    def spans(self, records: Sequence[str]) -> dict[str, int]:
        """Spans that can be read now, of those records that can be read at all."""
        ...


class DeltaTable:
    """tracelake's table, opened anew for each look. A row is there whole or not at all."""

    def __init__(self, uri: Path) -> None:
        self._uri = uri

    def spans(self, records: Sequence[str]) -> dict[str, int]:
        sql = "select trace_id, span_count from payload where trace_id in (select unnest($1))"
        try:
            rows = InferenceTable(self._uri).query(sql, parameters=[list(records)])
        except TableNotFoundError:  # nothing is committed yet
            return {}
        return {row["trace_id"]: row["span_count"] for row in rows}


class MlflowServer:
    """MLflow's REST API: a trace and its spans, from where MLflow's own client would take them."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=TIMEOUT, trust_env=False)

    def spans(self, records: Sequence[str]) -> dict[str, int]:
        return {record: count for record in records if (count := self._spans(record))}

    def _spans(self, record: str) -> int:
        # Without allow_partial the server would itself wait three seconds for spans that are missing.
        asked = {"trace_id": record, "allow_partial": "true"}
        try:
            reply = self._client.get("/api/3.0/mlflow/traces/get", params=asked)
            if reply.is_success:
                return len(reply.json()["trace"].get("spans", ()))
            if reply.is_server_error:  # its spans are not in the database: then they may be a file
                reply = self._client.get(f"{ARTIFACTS}/{record}/artifacts/traces.json")
                return len(reply.json()["spans"]) if reply.is_success else 0
        except httpx.TransportError:  # it was killed
            pass
        return 0


class PhoenixServer:
    """Phoenix's GraphQL API, which counts a trace's spans without sending them."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=TIMEOUT, trust_env=False)

    def spans(self, records: Sequence[str]) -> dict[str, int]:
        chunks = (records[start : start + CHUNK] for start in range(0, len(records), CHUNK))
        return {record: count for chunk in chunks for record, count in self._spans(chunk)}

    def _spans(self, records: Sequence[str]) -> Iterator[tuple[str, int]]:
        fields = (f't{id_}: getTraceByOtelId(traceId: "{id_}") {{ numSpans }}' for id_ in records)
        try:
            reply = self._client.post("/graphql", json={"query": f"{{ {' '.join(fields)} }}"})
        except httpx.TransportError:  # it was killed
            return
        if reply.is_success:
            for name, trace in (reply.json()["data"] or {}).items():
                if trace:
                    yield name[1:], trace["numSpans"]


class Lines(ABC):
    """A file of JSON lines that is read as it grows; a line counts once it has its end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._spans: Counter[str] = Counter()

    def spans(self, records: Sequence[str]) -> dict[str, int]:
        for line in self._new_lines():
            # A line that a kill has cut goes on with what was written next: a reader loses both.
            with contextlib.suppress(orjson.JSONDecodeError):
                record, count = self.read(line)
                self._spans[record] += count
        return {record: self._spans[record] for record in records if record in self._spans}

    def _new_lines(self) -> Iterator[bytes]:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                yield line

    @abstractmethod
    def read(self, line: bytes) -> tuple[str, int]:
        """The record that a line belongs to, and the number of its spans in it."""


class BentomlLog(Lines):
    """The file that ``bentoml.monitor`` writes: a request per line, with its trace as a string."""

    def read(self, line: bytes) -> tuple[str, int]:
        row = orjson.loads(line)
        return row["record"], len(orjson.loads(row["trace"]))


class SpanLines(Lines):
    """A file with a span per line, as OpenTelemetry's SDK writes them."""

    def read(self, line: bytes) -> tuple[str, int]:
        return orjson.loads(line)["context"]["trace_id"].removeprefix("0x"), 1
