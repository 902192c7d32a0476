"""How many bytes a second go from the spool into the table, for a minute, and whether each row arrives once.

Rows are those of a captured agent, recorded beforehand, each with an id of its own when it is fed: as many
bytes in rows of 10 KB as of 100 KB and of 1 MB. They pass the real ``Writer``, ``Spool`` and commit loop.
"""

import multiprocessing
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
from deltalake import DeltaTable
from prometheus_client import REGISTRY

from benchmarks.report import Axes, Result, Target, main, quick, write
from deploy.bench import Endpoint, endpoint, percentile
from inference_table.commit import LOCK
from inference_table.disk import FileLock
from inference_table.ids import uuid7
from inference_table.record import Row
from inference_table.settings import StorageSettings
from inference_table.spool import spool_root, spool_stats
from inference_table.table import InferenceTable
from inference_table.writer import Writer

SECONDS: Final = 60.0
SHORT_SECONDS: Final = 20.0
"""Of the arrangements that are there to be compared with."""
COUNTS: Final = {10_000: 200, 100_000: 20, 1_000_000: 2}
"""Rows recorded of each size, in bytes: 6 MB in all, which is beyond what zstd looks back."""
PENDING_BYTES: Final = 512 * 1024 * 1024
"""What is kept waiting in the spool: two commits of the most that one takes."""
QUEUED_BYTES: Final = 64 * 1024 * 1024
"""What is kept in the writer's memory, a quarter of its limit."""
LOOK_ROWS: Final = 200
"""Rows between two looks at both, which read the spool's folder: about 5 MB."""
LEAST_FREE: Final = 0.1
"""Share of the disk below which feeding ends early; the spool refuses rows below half of that."""
DRAIN_SECONDS: Final = 60.0

RATE_LIMIT: Final = 150.0
DISK_LIMIT: Final = 0.4


# --- rows ---


def traces() -> list[dict[str, int]]:
    """Requests whose rows are traces of :data:`COUNTS`."""
    return [{"trace_bytes": size, "seed": seed} for size, count in COUNTS.items() for seed in range(count)]


def long_answers() -> list[dict[str, int]]:
    """Requests whose rows are answers of :data:`COUNTS`, with a short trace."""
    return [
        {"trace_bytes": 4000, "response_bytes": size, "seed": seed}
        for size, count in COUNTS.items()
        for seed in range(count)
    ]


def recorded_rows(folder: Path, *requests: list[dict[str, int]]) -> list[list[Row]]:
    """Send requests to an agent that is captured; returns the rows of each list, in a random order."""
    with endpoint("benchmarks.agent:app", folder, capture=True) as served:
        ids = [[send(served, request) for request in some] for some in requests]
    table = InferenceTable(served.table).to_arrow().to_pylist()
    rows = {values["databricks_request_id"]: to_row(values) for values in table}
    found = [[rows[request_id] for request_id in some] for some in ids]
    for some in found:
        random.Random(0).shuffle(some)
    return found


def send(served: Endpoint, request: dict[str, int]) -> str:
    reply = served.client.post("/invocations", json=request).raise_for_status()
    return reply.headers["x-databricks-request-id"]


def to_row(values: dict[str, Any]) -> Row:
    """A row of the table as the writer takes it."""
    if values["trace_info"] is None:
        raise RuntimeError(f"a row was recorded without its trace: {values['logging_error_codes']}")
    del values["request_date"]
    payload = {
        "request": values["request"].encode(),
        "response": [values["response"].encode()],
        "trace_info": values["trace_info"].encode(),
    }
    return Row(**{**values, **payload, "request_metadata": dict(values["request_metadata"])})


def payload_bytes(row: Row) -> int:
    return len(row.request or b"") + sum(map(len, row.response or ())) + len(row.trace_info or b"")


@dataclass
class Encoded:
    """A row for the writer's queue, in the place of an exchange."""

    row: Row
    reserved_bytes: int
    trace_bytes: int = 0

    def is_ready(self) -> bool:
        return True

    def drop_traces(self) -> None:
        """It has none of its own."""

    def encode(self, give_way: Callable[[], None]) -> Row:
        give_way()
        return self.row


# --- the processes ---


@dataclass(frozen=True)
class Fed:
    """What was handed over: ids, bytes of payload, when it began (seconds since 1970), and CPU seconds."""

    ids: list[str]
    bytes: int
    spooled: int
    started: float
    cpu_seconds: float


def feed(settings: StorageSettings, rows: list[Row], seconds: float, results: "Connection[Fed, Fed]") -> None:
    """A process that records: rows for so many seconds, never more than the committer has room for."""
    writer = Writer(settings)
    writer.check()
    root = spool_root(settings)
    ids: list[str] = []
    nbytes, before, started = 0, cpu_seconds(), time.time()
    until = time.monotonic() + seconds
    while time.monotonic() < until and has_room(settings.spool_dir):
        for row in rows:
            if len(ids) % LOOK_ROWS == 0:
                wait_for_room(writer, root)
            fresh = replace(row, databricks_request_id=uuid7())
            writer.budget.reserve(fresh.nbytes)
            writer.put(Encoded(fresh, fresh.nbytes))
            ids.append(fresh.databricks_request_id)
            nbytes += payload_bytes(fresh)
    writer.close(DRAIN_SECONDS)
    spooled = int(REGISTRY.get_sample_value("tracelake_spooled_total") or 0)
    results.send(Fed(ids, nbytes, spooled, started, cpu_seconds() - before))


def wait_for_room(writer: Writer, root: Path) -> None:
    while writer.budget.used > QUEUED_BYTES or spool_stats(root).bytes > PENDING_BYTES:
        time.sleep(0.005)


def has_room(folder: Path) -> bool:
    usage = shutil.disk_usage(folder.parent)
    return usage.free > LEAST_FREE * usage.total


def commit(settings: StorageSettings, orders: "Connection[float, None]") -> None:
    """A process that records nothing and commits what others have recorded, until it is told to stop."""
    writer = Writer(settings)
    writer.check()
    before = cpu_seconds()
    writer.start()
    orders.recv()
    writer.close(DRAIN_SECONDS)
    orders.send(cpu_seconds() - before)


def cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system


@contextmanager
def committer(settings: StorageSettings) -> Iterator[list[float]]:
    """A process that commits; when it has ended, the list holds its CPU seconds."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=commit, args=(settings, theirs))
    process.start()
    theirs.close()
    used: list[float] = []
    try:
        lock = spool_root(settings) / LOCK
        deadline = time.monotonic() + 60
        while not lock.exists() or FileLock.is_free(lock):
            if time.monotonic() > deadline or not process.is_alive():
                raise RuntimeError("the committing process did not start")
            time.sleep(0.05)
        yield used
        ours.send(None)
        used.append(ours.recv())
    finally:
        process.join(1 if not used else DRAIN_SECONDS)
        process.kill()


def fed(settings: StorageSettings, rows: list[Row], seconds: float) -> Fed:
    """Run :func:`feed` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=feed, args=(settings, rows, seconds, theirs))
    process.start()
    theirs.close()
    try:
        found: Fed = ours.recv()
        process.join()
        return found
    finally:
        process.kill()


# --- what is in the table then ---


@dataclass(frozen=True)
class Outcome:
    """One arrangement's figures; ``per_second`` is MB a second in each second since the start."""

    row: dict[str, object]
    rate: float
    lost: int
    double: int
    disk: float
    per_second: list[float]


def measure(folder: Path, what: str, rows: list[Row], seconds: float, *, processes: int) -> Outcome:
    settings = StorageSettings(uri=str(folder / "payload"), spool_dir=folder / "spool")
    if processes == 1:
        recorded = fed(settings, rows, seconds)
        committing = None
    else:
        with committer(settings) as used:
            recorded = fed(settings, rows, seconds)
        committing = used[0]
    found = outcome(what, processes, settings, recorded, committing)
    shutil.rmtree(folder)
    return found


def outcome(
    what: str, processes: int, settings: StorageSettings, recorded: Fed, committing: float | None
) -> Outcome:
    table = DeltaTable(settings.uri)
    commits = sorted(entry["timestamp"] / 1000 for entry in table.history())[1:]  # the first made the table
    waits = [later - earlier for earlier, later in pairwise(commits)]
    ids = (
        InferenceTable(settings.uri).to_arrow(["databricks_request_id"])["databricks_request_id"].to_pylist()
    )
    files = pa.table(table.get_add_actions(flatten=True))
    on_disk = sum(files["size_bytes"].to_pylist())
    taken = commits[-1] - recorded.started
    gb, rate, disk = recorded.bytes / 1e9, recorded.bytes / taken / 1e6, on_disk / recorded.bytes
    lost, double = len(set(recorded.ids) - set(ids)), len(ids) - len(set(ids))
    row: dict[str, object] = {
        "rows": what,
        "processes": processes,
        "seconds": round(taken, 1),
        "GB": round(gb, 2),
        "MB/s": round(rate, 1),
        "CPU s per GB, recording process": round(recorded.cpu_seconds / gb, 2),
        "committing process": None if committing is None else round(committing / gb, 2),
        "rows handed over": len(recorded.ids),
        "spooled": recorded.spooled,
        "in the table": len(ids),
        "lost": lost,
        "double": double,
        "disk bytes per byte": round(disk, 3),
        "commits": len(commits),
        "s per commit p50": round(percentile(waits, 0.5), 2),
        "s per commit p99": round(percentile(waits, 0.99), 2),
    }
    return Outcome(row, rate, lost, double, disk, per_second(files, recorded, taken))


def per_second(files: pa.Table, recorded: Fed, taken: float) -> list[float]:
    """MB a second, from when files were written and how many rows they have; all mixes weigh the same."""
    mb = recorded.bytes / len(recorded.ids) / 1e6
    rates = [0.0] * (int(taken) + 1)
    for written, count in zip(files["modification_time"], files["num_records"], strict=True):
        second = int(written.cast(pa.int64()).as_py() / 1000 - recorded.started)
        rates[min(max(second, 0), len(rates) - 1)] += mb * count.as_py()
    return rates


def targets(outcomes: list[Outcome]) -> list[Target]:
    return [
        Target("spool to committed Delta, traces, sustained", RATE_LIMIT, outcomes[0].rate, "MB/s", False),
        Target("spool to committed Delta, long answers", RATE_LIMIT, outcomes[1].rate, "MB/s", False),
        Target("rows lost or double", 0, sum(one.lost + one.double for one in outcomes), "rows"),
        Target("bytes on disk per byte, the worst", DISK_LIMIT, max(one.disk for one in outcomes), ""),
    ]


def notes(outcomes: list[Outcome], wanted: float) -> list[str]:
    found = [
        "MB are 10^6 bytes of request, response and trace_info, uncompressed. The time is from the first row "
        "handed over to the last commit, with the wait for the first commit and the emptying of the spool.",
        "Two processes are the usual arrangement: several workers record, and one of them commits for all. "
        "Where one process does both, encoding and committing share an interpreter lock.",
        f"The feeder keeps about {PENDING_BYTES >> 20} MiB waiting in the spool. It makes rows from such as "
        "were recorded before, so the CPU seconds are those of queue, batch, spool and commit, not of "
        "encoding traces.",
        "Rows of traces repeat themselves as an agent's messages do, and compress well for it. Long answers "
        "have each sentence once: what the compressor is slowest with.",
    ]
    if outcomes[0].row["seconds"] < 0.9 * wanted:  # type: ignore[operator]  # cells of a table
        found.append(f"Cut short of {wanted:g} s: less than {LEAST_FREE:.0%} of the disk was free.")
    return found


def plot(axes: Axes, outcomes: list[Outcome]) -> None:
    """MB committed in each second, by when the data file was finished."""
    for one in outcomes:
        label = f"{one.row['rows']}, {one.row['processes']} process(es)"
        axes.step(range(len(one.per_second)), smoothed(one.per_second), label=label)
    axes.axhline(RATE_LIMIT, color="grey", linestyle="--", label="target")
    axes.set(xlabel="seconds", ylabel="MB/s, mean of 5 s", ylim=(0, None))
    axes.legend(fontsize="small")


def smoothed(values: list[float]) -> list[float]:
    windows = [values[max(0, end - 5) : end] for end in range(1, len(values) + 1)]
    return [sum(window) / len(window) for window in windows]


def run() -> None:
    seconds, short = (SECONDS / 20, SHORT_SECONDS / 20) if quick() else (SECONDS, SHORT_SECONDS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        of_traces, of_answers = recorded_rows(folder, traces(), long_answers())
        outcomes = [
            measure(folder / "a", "traces", of_traces, seconds, processes=2),
            measure(folder / "b", "long answers", of_answers, short, processes=2),
            measure(folder / "c", "traces", of_traces, short, processes=1),
        ]
    result = Result(
        "throughput",
        "How many bytes a second go from the spool into the table, and does each row arrive once?",
        [one.row for one in outcomes],
        targets(outcomes),
        notes(outcomes, seconds),
    )
    write(result, lambda axes: plot(axes, outcomes))


if __name__ == "__main__":
    main(run)
