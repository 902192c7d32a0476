"""How long after its reply a request is a row that a fresh reader sees.

An agent is served at default settings under a steady load. For each sample a request is sent at a random
moment, and from its reply on a new ``InferenceTable`` is asked for its id, again and again: for committed
rows, and with ``pending=True`` also for those that this machine has only spooled.
"""

import random
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from deltalake import DeltaTable

from benchmarks.report import Axes, Result, Target, main, scaled, write
from deploy.bench import Endpoint, endpoint, new_client, percentile
from inference_table.table import InferenceTable

SAMPLES: Final = 60
LOAD_PER_SECOND: Final = 20
TRACE_BYTES: Final = 10_000
SEEDS: Final = 50
POLL_PAUSE_SECONDS: Final = 0.02
"""Between two polls: with none, polling would take one of two cores from the server."""
PENDING_POLL_PAUSE_SECONDS: Final = 0.005
GIVE_UP_SECONDS: Final = 30.0

P50_LIMIT: Final = 1.0
P99_LIMIT: Final = 2.0
PENDING_LIMIT: Final = 0.1


@dataclass
class Samples:
    """Seconds from a reply to the end of the first poll that saw its row, and seconds of each poll."""

    visible: list[float] = field(default_factory=list)
    polls: list[float] = field(default_factory=list)


def request(seed: int) -> dict[str, int]:
    return {"trace_bytes": TRACE_BYTES, "seed": seed % SEEDS}


@contextmanager
def load(served: Endpoint) -> Iterator[list[float]]:
    """Requests at a steady rate from a thread; the list gets ``time.monotonic()`` of each reply."""
    stop, replies = threading.Event(), list[float]()

    def send() -> None:
        started = time.monotonic()
        with new_client(served.url) as client:
            while not stop.wait(max(0.0, started + len(replies) / LOAD_PER_SECOND - time.monotonic())):
                client.post("/invocations", json=request(len(replies))).raise_for_status()
                replies.append(time.monotonic())

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield replies
    finally:
        stop.set()
        thread.join()


def sample(served: Endpoint, count: int, *, pending: bool) -> Samples:
    """Send so many requests, each at a random moment, and wait for the row of each."""
    found, draw = Samples(), random.Random(count)
    pause = PENDING_POLL_PAUSE_SECONDS if pending else POLL_PAUSE_SECONDS
    for number in range(count):
        # A wait that ended with a commit would always begin the next one right after it.
        time.sleep(draw.random())
        reply = served.client.post("/invocations", json=request(number))
        replied = time.perf_counter()
        reply.raise_for_status()
        request_id = reply.headers["x-databricks-request-id"]
        while True:
            asked = time.perf_counter()
            row = InferenceTable(served.table, spool_dir=served.spool).get(request_id, pending=pending)
            now = time.perf_counter()
            found.polls.append(now - asked)
            if row is not None:
                found.visible.append(now - replied)
                break
            if now - replied > GIVE_UP_SECONDS:
                raise RuntimeError(f"the row {request_id} was not seen within {GIVE_UP_SECONDS:g} s")
            time.sleep(pause)
    return found


def line(name: str, samples: Samples) -> dict[str, object]:
    return {
        "reader": name,
        "samples": len(samples.visible),
        **{f"p{share} s": round(percentile(samples.visible, share / 100), 3) for share in (50, 90, 99)},
        "max s": round(max(samples.visible), 3),
        "polls per sample": round(len(samples.polls) / len(samples.visible), 1),
        "one poll p50 ms": round(percentile(samples.polls, 0.5) * 1000, 1),
    }


def run() -> None:
    count = scaled(SAMPLES)
    with (
        tempfile.TemporaryDirectory() as folder,
        endpoint("benchmarks.agent:app", Path(folder), capture=True) as served,
        load(served) as replies,
    ):
        time.sleep(3)  # the agent's first requests, and the table's first commits, are over
        began, before = time.monotonic(), DeltaTable(served.table).version()
        committed = sample(served, count, pending=False)
        seconds, commits = time.monotonic() - began, DeltaTable(served.table).version() - before
        rate = sum(replied >= began for replied in replies) / seconds
        spooled = sample(served, count, pending=True)
    p50, p99 = (percentile(committed.visible, share) for share in (0.5, 0.99))
    pending_p50, pending_p99 = (percentile(spooled.visible, share) for share in (0.5, 0.99))
    result = Result(
        "freshness",
        "How long after its reply is a request a row that a fresh reader sees?",
        [line("committed", committed), line("pending=True", spooled)],
        [
            Target("reply to visible row, p50", P50_LIMIT, p50, "s"),
            Target("reply to visible row, p99", P99_LIMIT, p99, "s"),
            Target("with pending=True, p50", PENDING_LIMIT, pending_p50, "s"),
            Target("with pending=True, p99", PENDING_LIMIT, pending_p99, "s"),
        ],
        [
            "From the reply in the client's hands to the end of the poll that saw the row: that poll is in "
            "it, and on average half of the one before and half the pause. Nothing is subtracted.",
            "A poll is InferenceTable(table).get(id), which opens the table anew; the pause between two is "
            f"{POLL_PAUSE_SECONDS * 1000:g} ms, with pending=True {PENDING_POLL_PAUSE_SECONDS * 1000:g} ms.",
            f"Meanwhile {rate:.0f} other requests a second with traces of 10 KB, and "
            f"{commits / seconds:.1f} commits a second (INFERENCE_TABLE_FLUSH_SECONDS is 1, its default).",
        ],
    )
    write(result, lambda axes: plot(axes, committed, spooled))


def plot(axes: Axes, committed: Samples, spooled: Samples) -> None:
    """Share of requests that are visible so long after their reply."""
    for name, samples in (("committed", committed), ("pending=True", spooled)):
        count = len(samples.visible)
        shares = [100 * (place + 1) / count for place in range(count)]
        axes.step(sorted(samples.visible), shares, where="post", label=name)
    axes.set(xlabel="seconds since the reply", ylabel="% visible", xlim=(0, None), ylim=(0, 101))
    axes.legend()


if __name__ == "__main__":
    main(run)
