"""One read of the benchmark ``query``, again and again in a process that does nothing else.

``python -m benchmarks.query_process`` takes one JSON object from standard input (:class:`Task`), and writes
one (:class:`Timed`). It imports no more than a program that reads, so its memory is what reading takes. What
was read and how much memory there was it knows from Linux.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any, Final

from inference_table.table import InferenceTable

__all__ = ["Task", "Timed"]


@dataclass(frozen=True)
class Task:
    """What to do, and to do in turn with it."""

    uri: str
    spool_dir: str
    kinds: list[str]
    """Names of :data:`KINDS`; each is done once before any is timed."""
    repeats: int
    ids: list[str] = field(default_factory=list)
    sql: str = ""


@dataclass(frozen=True)
class Timed:
    """Milliseconds of each repeat by kind, bytes that one repeat read, and the most memory there was."""

    ms: dict[str, list[float]]
    bytes_read: dict[str, int]
    peak_mb: float


def get(table: InferenceTable, task: Task) -> Iterator[object]:
    for request_id in cycle(task.ids):
        yield table.get(request_id)


def naive(_: InferenceTable, task: Task) -> Iterator[object]:
    """What one writes without us: DuckDB over a dataset of pyarrow."""
    import duckdb
    from deltalake import DeltaTable

    for request_id in cycle(task.ids):
        payload = DeltaTable(task.uri).to_pyarrow_dataset()
        found = duckdb.sql(f"select * from payload where databricks_request_id = '{request_id}'")
        yield found.to_arrow_table().to_pylist()
        del payload


def query(table: InferenceTable, task: Task) -> Iterator[object]:
    while True:
        yield table.query(task.sql)


def pending(table: InferenceTable, task: Task) -> Iterator[object]:
    while True:
        yield table.query(task.sql, pending=True)


KINDS: Final[dict[str, Callable[[InferenceTable, Task], Iterator[object]]]] = {
    "get": get,
    "naive": naive,
    "query": query,
    "pending": pending,
}


def run(task: Task) -> Timed:
    table = InferenceTable(task.uri, spool_dir=task.spool_dir)
    runs = {kind: KINDS[kind](table, task) for kind in task.kinds}
    times: dict[str, list[float]] = {kind: [] for kind in runs}
    read = {}
    for repeat in range(task.repeats + 1):
        for kind, results in runs.items():
            before, started = bytes_read(), time.perf_counter()
            if next(results) is None:
                raise RuntimeError(f"{kind} found nothing")
            taken = (time.perf_counter() - started) * 1000
            read[kind] = bytes_read() - before
            if repeat:
                times[kind].append(taken)
    return Timed(times, read, peak_memory() / 1e6)


def bytes_read() -> int:
    """By this process so far."""
    counters = Path("/proc/self/io").read_text(encoding="ascii")
    return int(re.findall(r"rchar: (\d+)", counters)[0])


def peak_memory() -> int:
    """Bytes. Not ``ru_maxrss``, in which a child has its parent's."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) * 1024


def main(values: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(asdict(run(Task(**values)))) + "\n")


if __name__ == "__main__":
    main(json.load(sys.stdin))
