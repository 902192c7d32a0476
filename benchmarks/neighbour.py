"""What big traces do to other requests of the same server.

One client polls a no-op endpoint of one millisecond without a pause, while another, in a process of its
own, posts traces of 10 MB on time, five a second; in rounds, in turn with and without capture.
"""

import tempfile
from concurrent.futures import Executor
from pathlib import Path
from time import sleep
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.load import Load, closed_loop, elsewhere, get, open_loop, post, served, shortened
from benchmarks.report import Axes, Result, Target, main, scaled, write
from deploy.bench import Endpoint, percentile
from inference_table.table import InferenceTable

TRACE_BYTES: Final = 10_000_000
TRACES_PER_SECOND: Final = 5.0
ROUNDS: Final = 6
ROUND_SECONDS: Final = 5.0
SETTLE_SECONDS: Final = 1.0
"""Between rounds: what one server still encodes and commits is not to burden the other's."""
WARM_UP: Final = 3
LIMIT_MS: Final = 5.0
NAMES: Final = {"without capture": False, "with capture": True}
ENCODE_SECONDS: Final = "tracelake_encode_seconds"

NOOP: Final = get("/noop")
TRACE: Final = post("/invocations", {"trace_bytes": TRACE_BYTES})

QUESTION: Final = "What do traces of 10 MB, five a second, do to a no-op endpoint of the same server?"
NOTES: Final = [
    "`GET /noop` waits 1 ms; polled over one connection, each request right after the last reply. The "
    "same load goes to the same agent without capture.",
    "The agent itself is one process with one interpreter: what it does for its own traced request delays "
    "the neighbour too, and is in both columns.",
]


def run() -> None:
    polls = {False: Load(), True: Load()}
    posts = {False: Load(), True: Load()}
    with tempfile.TemporaryDirectory() as folder, elsewhere() as another:
        with (
            served(Path(folder), capture=False) as plain,
            served(Path(folder), capture=True) as captured,
        ):
            for endpoint in (plain, captured):
                warm_up(endpoint)
            before = encoded(captured)
            for number in range(scaled(ROUNDS)):
                for capture in (False, True) if number % 2 == 0 else (True, False):
                    polled, posted = one_round(captured if capture else plain, another)
                    polls[capture].extend(polled)
                    posts[capture].extend(posted)
                    sleep(shortened(SETTLE_SECONDS))
            after = encoded(captured)
        recorded = InferenceTable(captured.table).count("span_count > 0")
    sent = len(posts[True].milliseconds) + WARM_UP
    notes = [f"{sent:,} traces of 10 MB were sent to be captured, {recorded:,} are rows.", *NOTES]
    if after[1] > before[1]:
        mean_ms = 1000 * (after[0] - before[0]) / (after[1] - before[1])
        notes.insert(1, f"Encoding one of them took {mean_ms:.1f} ms on average, in the background.")
    rows = [row(name, polls[capture], posts[capture]) for name, capture in NAMES.items()]
    added = percentile(polls[True].milliseconds, 0.99) - percentile(polls[False].milliseconds, 0.99)
    target = Target("added to a neighbour's p99", LIMIT_MS, added, "ms")
    write(Result("neighbour", QUESTION, rows, [target], notes), lambda axes: plot(axes, polls))


def warm_up(endpoint: Endpoint) -> None:
    for _ in range(WARM_UP):
        endpoint.client.post("/invocations", json={"trace_bytes": TRACE_BYTES}).raise_for_status()
    sleep(shortened(SETTLE_SECONDS))


def one_round(endpoint: Endpoint, another: Executor) -> tuple[Load, Load]:
    """What the poller and the sender of traces saw."""
    seconds = shortened(ROUND_SECONDS)
    posting = another.submit(open_loop, endpoint.url, TRACE, TRACES_PER_SECOND, seconds)
    polled = closed_loop(endpoint.url, NOOP, 1, seconds)
    return polled, posting.result(seconds + 60)


def row(name: str, polled: Load, posted: Load) -> dict[str, object]:
    return {
        "": name,
        "polls": len(polled.milliseconds),
        "p50 ms": percentile(polled.milliseconds, 0.5),
        "p95 ms": percentile(polled.milliseconds, 0.95),
        "p99 ms": percentile(polled.milliseconds, 0.99),
        "p99.9 ms": percentile(polled.milliseconds, 0.999),
        "max ms": max(polled.milliseconds),
        "traces posted": len(posted.milliseconds),
        "their p50 ms": percentile(posted.milliseconds, 0.5),
        "failed": polled.failed + posted.failed,
    }


def encoded(endpoint: Endpoint) -> tuple[float, float]:
    """Seconds spent encoding so far, and the number of records; zeros where no metric says."""
    text = endpoint.client.get("/metrics").text
    samples = {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith(ENCODE_SECONDS) and not sample.labels
    }
    return samples.get(f"{ENCODE_SECONDS}_sum", 0.0), samples.get(f"{ENCODE_SECONDS}_count", 0.0)


def plot(axes: Axes, polls: dict[bool, Load]) -> None:
    """The share of polls that took longer than so many ms."""
    for name, capture in NAMES.items():
        values = sorted(polls[capture].milliseconds)
        slower = [1 - number / len(values) for number in range(len(values))]
        axes.plot(values, slower, label=name)
    axes.set(xscale="log", yscale="log", xlabel="ms of a no-op request", ylabel="share that took longer")
    axes.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    axes.minorticks_off()
    axes.legend()


if __name__ == "__main__":
    main(run)
