"""What a reply costs that may not leave before its record is safe, against one fsync of this disk.

Four servers of the same agent, one without capture and one for each durability, called in turn, and with
each turn a file of the trace's size is written beside the spools and fsynced.
"""

import os
import random
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from time import perf_counter_ns, sleep
from typing import Final

from benchmarks.load import OK, Client, post, served
from benchmarks.report import Result, Target, main, scaled, write
from benchmarks.workload import text
from deploy.bench import Endpoint, percentile

SIZES: Final = {"10 KB": 10_000, "1 MB": 1_000_000}
TURNS: Final = {"10 KB": 60, "1 MB": 60}
WARM_UP: Final = 3
PAUSE_SECONDS: Final = 0.02
"""After each call: an agent server rests between requests, and relaxed records are spooled meanwhile."""
UNTRACED, RELAXED, STRICT, COMMITTED, FSYNC = "untraced", "relaxed", "strict", "committed", "one fsync"
BEYOND_FSYNC_LIMIT_MS: Final = 2.0
RECEIPTS: Final = {RELAXED: "queued", STRICT: "spooled", COMMITTED: "committed"}
"""The reply header ``x-inference-table-durability`` of each."""

QUESTION: Final = "What does a reply cost that may not leave before its record is safe?"
NOTES: Final = [
    "strict: held until its record is fsynced in the spool; committed: until it is in the Delta table.",
    "one fsync: `os.fsync` of a file of the trace's size, just written beside the spools.",
]


def run() -> None:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        endpoints = {UNTRACED: stack.enter_context(served(Path(folder), capture=False))}
        for durability in RECEIPTS:
            environment = {"INFERENCE_TABLE_DURABILITY": durability}
            endpoints[durability] = stack.enter_context(
                served(Path(folder), capture=True, environment=environment)
            )
        found = {name: measured(name, endpoints, Path(folder)) for name in SIZES}
        disk = f"The spools are on {file_system(Path(folder))}; `TMPDIR` chooses another disk."
    rows = [row(name, kind, found[name]) for name in SIZES for kind in found[name]]
    target = Target("strict beyond one fsync, 1 MB", BEYOND_FSYNC_LIMIT_MS, beyond_fsync(found["1 MB"]), "ms")
    write(Result("durability", QUESTION, rows, [target], [*NOTES, disk]))


def measured(name: str, endpoints: dict[str, Endpoint], folder: Path) -> dict[str, list[float]]:
    """Milliseconds of each call, by durability, and of the fsyncs."""
    request = post("/invocations", {"trace_bytes": SIZES[name]})
    content = text(SIZES[name], seed=0).encode()
    calls: dict[str, Callable[[], float]] = {FSYNC: partial(one_fsync, folder / "file", content)}
    with ExitStack() as stack:
        for kind, endpoint in endpoints.items():
            client = stack.enter_context(closing(Client(endpoint.url)))
            calls[kind] = partial(one_reply, client, request, RECEIPTS.get(kind))
        times: dict[str, list[float]] = {kind: [] for kind in [*endpoints, FSYNC]}
        order, shuffle = list(calls), random.Random(0).shuffle
        for turn in range(WARM_UP + scaled(TURNS[name])):
            shuffle(order)  # so that none always comes after the same
            for kind in order:
                taken = calls[kind]()
                if turn >= WARM_UP:
                    times[kind].append(taken)
                sleep(PAUSE_SECONDS)
    return times


def one_reply(client: Client, request: bytes, receipt: str | None) -> float:
    """Milliseconds until the reply was there.

    Raises:
        RuntimeError: it is an error, or has not the receipt of its durability.
    """
    started = perf_counter_ns()
    reply = client.send(request)
    taken = perf_counter_ns() - started
    got = reply.headers.get("x-inference-table-durability")
    if reply.status != OK or got != receipt:
        raise RuntimeError(f"not {receipt!r} but {got!r}: {reply.status} {bytes(reply.body[:500])!r}")
    return taken / 1e6


def one_fsync(path: Path, content: bytes) -> float:
    with path.open("wb", buffering=0) as file:
        file.write(content)
        started = perf_counter_ns()
        os.fsync(file.fileno())
        taken = perf_counter_ns() - started
    path.unlink()
    return taken / 1e6


def file_system(path: Path) -> str:
    """The type of the file system that holds a path, as far as the system tells it."""
    try:
        lines = Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "a disk of unknown type"
    mounts = (line.split()[1:3] for line in lines)
    holding = [(point, kind) for point, kind in mounts if path.resolve().is_relative_to(point)]
    return max(holding, key=lambda mount: len(mount[0]))[1]


def row(name: str, kind: str, times: dict[str, list[float]]) -> dict[str, object]:
    found: dict[str, object] = {
        "trace": name,
        "durability": kind,
        "count": len(times[kind]),
        "p50 ms": percentile(times[kind], 0.5),
        "p99 ms": percentile(times[kind], 0.99),
    }
    if kind in RECEIPTS:
        found["added p50 ms"] = added(times, kind)
        found["added p99 ms"] = added(times, kind, 0.99)
    return found


def added(times: dict[str, list[float]], kind: str, share: float = 0.5) -> float:
    return percentile(times[kind], share) - percentile(times[UNTRACED], share)


def beyond_fsync(times: dict[str, list[float]]) -> float:
    return added(times, STRICT) - percentile(times[FSYNC], 0.5)


if __name__ == "__main__":
    main(run)
