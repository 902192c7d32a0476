"""What is measured of one peer: latency, processor time, memory, freshness, disk, and what a kill leaves."""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from math import ceil, nan
from typing import Final

import orjson

from benchmarks.peers.probes import Store
from benchmarks.peers.processes import Process, folder_bytes, wait_until_idle
from benchmarks.peers.running import Running
from benchmarks.report import quick, scaled
from benchmarks.workload import agent_run
from deploy.bench import interleaved, percentile

__all__ = ["SIZES", "SPANS", "Cost", "Load", "Size", "after_kill", "measured", "until_readable"]

SPANS: Final = 8
WARM_UP: Final = 10
"""Pairs of requests that are not timed."""
IDLE_SECONDS: Final = 90.0
"""The longest that a peer may go on working after the last reply."""
LOOKED_AT: Final = 60
"""At most so many records of a run, spread over it, are looked up: some servers take long for each."""
LOOK_SECONDS: Final = 0.02
"""Pause between two looks at a store."""
FRESH: Final = 10
FRESH_PAUSE: Final = 0.37
"""Seconds between the requests whose way into the store is timed; no divisor of anyone's interval."""
FRESH_SECONDS: Final = 30.0
BURST: Final = 200


@dataclass(frozen=True)
class Size:
    """Traces of one size, and how many of them.

    Attributes:
        pairs: of requests, to the floor and to the peer.
        seeds: different runs, so that no compressor finds the same text again within its window.
        pause_seconds: after each request; a server sees one per two pauses.
    """

    name: str
    trace_bytes: int
    pairs: int
    seeds: int
    pause_seconds: float

    def raw_bytes(self) -> float:
        """Bytes of a run's inputs and outputs as JSON, on average."""
        runs = (agent_run(self.trace_bytes, seed) for seed in range(min(self.seeds, 8)))
        return statistics.fmean(
            sum(len(orjson.dumps(value)) for step in run for value in (step.inputs, step.outputs))
            for run in runs
        )


SIZES: Final = (
    Size("10 KB", 10_000, pairs=240, seeds=256, pause_seconds=0.025),
    Size("1 MB", 1_000_000, pairs=80, seeds=8, pause_seconds=0.025),
    Size("10 MB", 10_000_000, pairs=16, seeds=2, pause_seconds=0.1),
)


@dataclass
class Cost:
    """What one size of trace cost, with nan for what could not be measured.

    Attributes:
        floor_ms, peer_ms: of each request.
        cpu_ms: of a request at the endpoint, the work after the reply included; server_cpu_ms: at the server.
        floor_cpu_ms: of the same requests at the floor.
        memory_mb, server_memory_mb, floor_memory_mb: after the last request.
        readable: share of the records that can be read in the end, with all their spans.
        disk_ratio: bytes on disk for each byte of the runs that can be read.
    """

    floor_ms: list[float]
    peer_ms: list[float]
    cpu_ms: float
    server_cpu_ms: float
    floor_cpu_ms: float
    memory_mb: float
    server_memory_mb: float
    floor_memory_mb: float
    readable: float = nan
    disk_ratio: float = nan

    def added_ms(self, share: float) -> float:
        return percentile(self.peer_ms, share) - percentile(self.floor_ms, share)


@dataclass
class Load:
    """Requests of one size to one endpoint, each with the next of the runs."""

    running: Running
    size: Size
    records: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.running.prepare(self.size.trace_bytes, self.size.seeds)
        self._seeds: Iterator[int] = cycle(range(self.size.seeds))

    def send(self) -> str:
        record = self.running.call(self.size.trace_bytes, next(self._seeds))
        self.records.append(record)
        return record


def measured(peer: Running, floor: Running, size: Size) -> Cost:
    """Requests in turn to the floor and to the peer, paced; then what the peer made of them."""
    loads = Load(floor, size), Load(peer, size)
    processes = [process for process in (floor.endpoint, peer.endpoint, peer.server) if process]
    # What is imported and set up at the first requests is not charged to those that are measured.
    for load in loads:
        load.send()
    if not quick():
        settle(peer, processes)
    disk = folder_bytes(peer.folder)
    sent = len(loads[1].records)
    before = [process.cpu_seconds() for process in processes]
    floor_ms, peer_ms = interleaved(
        loads[0].send,
        loads[1].send,
        count=scaled(size.pairs),
        warm_up=scaled(WARM_UP),
        pause_seconds=size.pause_seconds,
    )
    records = loads[1].records[sent:]
    memory = [process.pss_bytes() / 1e6 for process in processes]
    settle(peer, processes)
    cpu_ms = [
        (process.cpu_seconds() - earlier) * 1000 / len(records)
        for process, earlier in zip(processes, before, strict=True)
    ]
    cost = Cost(
        floor_ms,
        peer_ms,
        cpu_ms=cpu_ms[1],
        server_cpu_ms=cpu_ms[2] if peer.server else nan,
        floor_cpu_ms=cpu_ms[0],
        memory_mb=memory[1],
        server_memory_mb=memory[2] if peer.server else nan,
        floor_memory_mb=memory[0],
    )
    if peer.store:
        disk = folder_bytes(peer.folder) - disk
        looked_at = records[:: ceil(len(records) / LOOKED_AT)]
        cost.readable = len(complete(peer.store, looked_at)) / len(looked_at)
        if cost.readable:
            cost.disk_ratio = disk / (cost.readable * len(records) * size.raw_bytes())
    return cost


def settle(peer: Running, processes: Sequence[Process]) -> None:
    """Wait until records that are held back for a batch have gone too, and nobody works any more."""
    time.sleep(peer.peer.batch_seconds)
    wait_until_idle(processes, IDLE_SECONDS)


def complete(store: Store, records: Sequence[str]) -> set[str]:
    """Those of the records that can be read with all their spans."""
    return {record for record, spans in store.spans(records).items() if spans == SPANS}


def until_readable(peer: Running, size: Size) -> float:
    """Seconds from a reply until its record can be read, the median of a few spread over time.

    Returns:
        nan when more than half of them cannot be read within FRESH_SECONDS.
    """
    if peer.store is None:
        return nan
    load = Load(peer, size)
    waiting: dict[str, float] = {}
    seconds: list[float] = []
    started = time.monotonic()
    count = max(3, scaled(FRESH))
    while (len(load.records) < count or waiting) and time.monotonic() - started < FRESH_SECONDS:
        if len(load.records) < count and time.monotonic() - started >= len(load.records) * FRESH_PAUSE:
            waiting[load.send()] = time.monotonic()
        for record in complete(peer.store, list(waiting)):
            seconds.append(time.monotonic() - waiting.pop(record))
        time.sleep(LOOK_SECONDS)
    lost = [float("inf")] * (count - len(seconds))
    median = statistics.median(seconds + lost)
    return median if median < FRESH_SECONDS else nan


def after_kill(peer: Running, victim: Process, size: Size) -> tuple[int, int]:
    """SIGKILL right after the last reply of a burst; then the victim is started again, and given its time.

    Returns:
        Records that can be read afterwards, and requests that were answered.
    """
    peer.prepare(size.trace_bytes, size.seeds)
    records = peer.burst(scaled(BURST), size.trace_bytes, size.seeds, then=victim.kill)
    server = peer.server
    peer.restart(victim)
    # Senders that don't reach their server try again, with pauses of some seconds.
    patience = 15.0 if victim is server else 2.0 if quick() else 5.0
    return readable_in_the_end(peer, records, patience=patience), len(records)


def readable_in_the_end(peer: Running, records: Sequence[str], patience: float) -> int:
    """How many records can be read once nothing more of them has come for ``patience`` seconds."""
    assert peer.store is not None
    missing = set(records)
    assert len(missing) == len(records), "each record has a name of its own"
    changed = time.monotonic()
    while missing and time.monotonic() - changed < patience:
        time.sleep(0.5)
        if found := complete(peer.store, list(missing)):
            missing -= found
            changed = time.monotonic()
    return len(records) - len(missing)
