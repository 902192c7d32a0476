"""How much longer a reply takes with capture on: end to end, over uvicorn and kept-alive connections.

Two servers run the same agent, one with capture and one without; requests go to them in turn. Paced, with a
pause after each, a server gets what one agent server might, and encodes meanwhile; back to back it never
rests.
"""

import math
import tempfile
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from benchmarks.agent_call import SIZES, draw_published, on_sizes
from benchmarks.load import OK, Client, Reply, post, served
from benchmarks.report import Axes, Result, Target, main, scaled, write
from deploy.bench import Endpoint, interleaved, percentile
from inference_table.table import InferenceTable

WARM_UP: Final = 10
SMALL: Final = 500
"""Bytes of a small response."""
REQUEST_ID: Final = "x-databricks-request-id"
PACED, BACK_TO_BACK = "paced", "back to back"


@dataclass(frozen=True)
class Case:
    """A trace and a response of some size, how often, and how long a pause lets servers rest."""

    trace: str
    response: str
    pairs: int
    pause_seconds: float
    limit_ms: float | None = None
    """What capture may add at the median, paced."""


# Pauses come after each of the two calls of a pair: 25 ms make 20 requests/s and server, 100 ms 5.
CASES: Final = (
    Case("10 KB", "small", 300, 0.025, 0.7),
    Case("100 KB", "small", 300, 0.025),
    Case("1 MB", "small", 300, 0.025, 0.8),
    Case("10 MB", "small", 100, 0.1, 1.0),
    Case("10 KB", "1 MB", 200, 0.025, 1.0),
    Case("10 KB", "10 MB", 100, 0.1, 3.0),
)

QUESTION: Final = "How much longer does a reply take with capture on, by the sizes of trace and response?"
NOTES: Final = [
    "Milliseconds as the client sees them; added is the difference of the two servers' percentiles.",
    "paced: about 20 requests/s per server, 5 where trace or response has 10 MB, and the targets are for "
    "these; back to back: no pause at all.",
    "explained: the median of `capture_overhead_us` in the rows, as a share of what was added. It sees "
    "our own code on the request path; not the tracing SDK's work, nor the interpreter lock while the "
    "background thread encodes.",
]


@dataclass
class Measured:
    """Milliseconds of each reply without and with capture, and the request ids of the latter."""

    case: Case
    traffic: str
    without: list[float]
    captured: list[float]
    ids: list[str]
    overheads_ms: list[float] = field(default_factory=list)
    """``capture_overhead_us`` of these requests' rows."""

    def added(self, share: float = 0.5) -> float:
        return percentile(self.captured, share) - percentile(self.without, share)

    def explained(self) -> float:
        """The share of the added median that our own clock saw, in percent; nan where noise hid it."""
        return 100 * percentile(self.overheads_ms, 0.5) / self.added() if self.added() > 0 else math.nan


def run() -> None:
    with tempfile.TemporaryDirectory() as folder:
        with (
            served(Path(folder), capture=False) as plain,
            served(Path(folder), capture=True) as captured,
        ):
            ids: list[str] = []
            found = [
                measured(plain, captured, case, traffic, ids)
                for case in CASES
                for traffic in (PACED, BACK_TO_BACK)
            ]
        # It has stopped: all that it recorded is in the table.
        rows = InferenceTable(captured.table).to_arrow(["databricks_request_id", "capture_overhead_us"])
    overheads: dict[str, int] = dict(zip(*rows.to_pydict().values(), strict=True))
    for one in found:
        one.overheads_ms = [overheads[id_] / 1000 for id_ in one.ids if id_ in overheads]
    lost, surplus = len(set(ids) - overheads.keys()), rows.num_rows - len(overheads)
    count = f"{len(ids):,} replies captured, {lost:,} of them not in the table, {surplus:,} rows twice."
    result = Result("added_latency", QUESTION, [row(one) for one in found], targets(found), [count, *NOTES])
    write(result, lambda axes: plot(axes, found))


def measured(plain: Endpoint, captured: Endpoint, case: Case, traffic: str, ids: list[str]) -> Measured:
    """Both servers in turn; the ids of all captured requests are added to ``ids``."""
    body = {"trace_bytes": SIZES[case.trace], "response_bytes": SIZES.get(case.response, SMALL)}
    request = post("/invocations", body)
    before, warm_up = len(ids), scaled(WARM_UP)
    with closing(Client(plain.url)) as floor, closing(Client(captured.url)) as recorded:
        without, with_capture = interleaved(
            lambda: answered(floor.send(request)),
            lambda: ids.append(answered(recorded.send(request)).headers[REQUEST_ID]),
            count=scaled(case.pairs),
            warm_up=warm_up,
            pause_seconds=case.pause_seconds if traffic == PACED else 0.0,
        )
    return Measured(case, traffic, without, with_capture, ids[before + warm_up :])


def answered(reply: Reply) -> Reply:
    if reply.status != OK:
        raise RuntimeError(f"the agent answered {reply.status}: {bytes(reply.body[:500])!r}")
    return reply


def row(one: Measured) -> dict[str, object]:
    return {
        "trace": one.case.trace,
        "response": one.case.response,
        "traffic": one.traffic,
        "pairs": len(one.captured),
        "without p50 ms": percentile(one.without, 0.5),
        "with p50 ms": percentile(one.captured, 0.5),
        "added p50 ms": one.added(),
        "added p95 ms": one.added(0.95),
        "added p99 ms": one.added(0.99),
        "capture_overhead ms": percentile(one.overheads_ms, 0.5),
        "explained %": one.explained(),
    }


def targets(found: list[Measured]) -> list[Target]:
    return [
        Target(
            f"added to a reply, trace {one.case.trace}, response {one.case.response}",
            limit,
            one.added(),
            "ms",
        )
        for one in found
        if one.traffic == PACED and (limit := one.case.limit_ms) is not None
    ]


def plot(axes: Axes, found: list[Measured]) -> None:
    for traffic in (PACED, BACK_TO_BACK):
        drawn = [one for one in found if one.traffic == traffic and one.case.response == "small"]
        on_sizes(axes, {one.case.trace: one.added() for one in drawn}, f"tracelake, {traffic}")
    draw_published(axes, "ms added to the reply, median")


if __name__ == "__main__":
    main(run)
