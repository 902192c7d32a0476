"""How many requests a second the agent answers with capture on, as a share of those without.

Eight connections, each sending the next request when it has its reply, from a process of their own; in
rounds, in turn with and without capture. A trivial agent shows the worst; one that takes 20 ms is fast for
an agent.
"""

import tempfile
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import sleep
from typing import Final

from benchmarks.load import Load, closed_loop, elsewhere, post, served, shortened
from benchmarks.report import Result, Target, main, scaled, write
from deploy.bench import Endpoint, percentile
from inference_table.table import InferenceTable

TRACE_BYTES: Final = 10_000
CONNECTIONS: Final = 8
AGENTS: Final = {"trivial": 0, "20 ms": 20}
"""Milliseconds that each agent waits."""
WARM_UP: Final = 20
ROUNDS: Final = 4
ROUND_SECONDS: Final = 4.0
SETTLE_SECONDS: Final = 1.0
"""Between rounds: what one server still encodes and commits is not to burden the other's."""
LIMIT_PERCENT: Final = 80.0

QUESTION: Final = (
    "How many requests a second does the agent answer with capture on, as a share of those without?"
)
NOTES: Final = [
    f"{CONNECTIONS} connections in a closed loop, traces of 10 KB, one server process. Medians of rounds; "
    "the share is the median of paired rounds.",
    "The clients, the agent, and what encodes and commits in the background share the machine's cores.",
]


@dataclass
class Rounds:
    """What two servers answered, round by round."""

    plain: list[Load] = field(default_factory=list)
    captured: list[Load] = field(default_factory=list)

    def percent(self) -> float:
        pairs = zip(self.plain, self.captured, strict=True)
        return 100 * median(per_second(captured) / per_second(plain) for plain, captured in pairs)


def per_second(load: Load) -> float:
    return len(load.milliseconds) / load.seconds


def run() -> None:
    with tempfile.TemporaryDirectory() as folder:
        with (
            elsewhere() as another,
            served(Path(folder), capture=False) as plain,
            served(Path(folder), capture=True) as captured,
        ):
            found = {name: measured(another, plain, captured, work) for name, work in AGENTS.items()}
        recorded = InferenceTable(captured.table).count()
    answered = sum(WARM_UP + replies(rounds.captured) for rounds in found.values())
    count = f"{answered:,} requests were answered with capture on, {recorded:,} are rows."
    rows = [row(name, rounds) for name, rounds in found.items()]
    share = found["20 ms"].percent()
    target = Target("requests/s with capture, 20 ms agent", LIMIT_PERCENT, share, "%", at_most=False)
    write(Result("requests_per_second", QUESTION, rows, [target], [count, *NOTES]))


def measured(another: Executor, plain: Endpoint, captured: Endpoint, work_ms: int) -> Rounds:
    body = {"trace_bytes": TRACE_BYTES, "work_ms": work_ms}
    for endpoint in (plain, captured):
        for _ in range(WARM_UP):
            endpoint.client.post("/invocations", json=body).raise_for_status()
    request = post("/invocations", body)
    seconds = shortened(ROUND_SECONDS)
    rounds = Rounds()
    sides = [(plain, rounds.plain), (captured, rounds.captured)]
    for _ in range(scaled(ROUNDS)):
        for endpoint, loads in sides:
            loading = another.submit(closed_loop, endpoint.url, request, CONNECTIONS, seconds)
            loads.append(loading.result(seconds + 60))
            sleep(shortened(SETTLE_SECONDS))
        sides.reverse()
    return rounds


def replies(loads: list[Load]) -> int:
    return sum(len(load.milliseconds) for load in loads)


def row(name: str, rounds: Rounds) -> dict[str, object]:
    return {
        "agent": name,
        "without, requests/s": median(map(per_second, rounds.plain)),
        "with, requests/s": median(map(per_second, rounds.captured)),
        "share %": rounds.percent(),
        "without p50 ms": median(percentile(load.milliseconds, 0.5) for load in rounds.plain),
        "with p50 ms": median(percentile(load.milliseconds, 0.5) for load in rounds.captured),
        "requests": replies(rounds.plain) + replies(rounds.captured),
        "failed": sum(load.failed for load in rounds.plain + rounds.captured),
    }


if __name__ == "__main__":
    main(run)
