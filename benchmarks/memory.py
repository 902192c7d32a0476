"""How much more memory an endpoint takes with capture on: idle, under small requests, under many large ones.

Two servers get the same requests, one after the other in each phase. All processes of a server count.
"""

import contextlib
import math
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Final, TypeVar

from benchmarks.report import Axes, Result, Target, main, quick, scaled, write
from deploy.bench import PROC, Endpoint, endpoint, new_client, session_stats

__all__ = ["Use", "dropped", "memory_of", "sampling"]

SMALL_BYTES: Final = 10_000
SMALL_REQUESTS: Final = 2000
LARGE_BYTES: Final = 10_000_000
LARGE_CLIENTS: Final = 8
LARGE_SECONDS: Final = 12.0
WORK_MS: Final = 1000
"""What an agent with traces of 10 MB takes at least. Without it, eight clients make 300 MB/s."""
SEEDS: Final = 4
IDLE_SECONDS: Final = 4.0
"""The last rows are committed meanwhile."""
SAMPLE_SECONDS: Final = 0.05

SMALL_LIMIT_MB: Final = 150.0
LARGE_LIMIT_MB: Final = 400.0

T = TypeVar("T")


@dataclass(frozen=True)
class Use:
    """Memory at one moment: MB in all, and of them those that are no file's (nan where nobody knows)."""

    total: float
    anonymous: float


def memory_of(server: Endpoint) -> Use:
    """Proportional set size of all processes of a server; resident set size where the kernel has no other.

    A page that several processes share counts once in all. What is a file's, such as code and what is mapped
    of the spool, the system can take back.
    """
    total = anonymous = 0
    for pid in session_stats(server.pid):
        with contextlib.suppress(OSError):  # it has ended since
            lines = (PROC / str(pid) / "smaps_rollup").read_text(encoding="utf-8").splitlines()[1:]
            sizes = {name: int(size) for name, size, *_ in map(str.split, lines)}
            total += sizes["Pss:"]
            anonymous += sizes.get("Pss_Anon:", 0)
    return (
        Use(total * 1024 / 1e6, anonymous * 1024 / 1e6) if total else Use(server.rss_bytes() / 1e6, math.nan)
    )


@contextmanager
def sampling(look: Callable[[], T], seconds: float) -> Iterator[list[T]]:
    """Look every so many seconds, from a thread, until the block ends; the list has what was seen."""
    stop, seen = threading.Event(), [look()]

    def run() -> None:
        while not stop.wait(seconds):
            seen.append(look())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def dropped(server: Endpoint) -> dict[str, int]:
    """Records that capture has dropped, by reason, from the server's metrics."""
    from prometheus_client.parser import text_string_to_metric_families

    text = server.client.get("/metrics").raise_for_status().text
    return {
        sample.labels["reason"]: int(sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "tracelake_dropped_total" and sample.value
    }


# --- phases ---


@dataclass(frozen=True)
class Phase:
    """What both servers get; ``run`` adds the status of each reply to the counter."""

    name: str
    run: Callable[[Endpoint, "Counter[int]"], None]


def idle(seconds: float, server: Endpoint, statuses: "Counter[int]") -> None:  # noqa: ARG001 - no replies
    time.sleep(seconds)


def one_client(requests: int, server: Endpoint, statuses: "Counter[int]") -> None:
    for number in range(requests):
        reply = server.client.post("/invocations", json=request(SMALL_BYTES, number))
        statuses[reply.status_code] += 1


def many_clients(seconds: float, work_ms: int, server: Endpoint, statuses: "Counter[int]") -> None:
    until = time.monotonic() + seconds

    def client(first: int) -> "Counter[int]":
        seen: Counter[int] = Counter()
        with new_client(server.url) as connection:
            for number in count(first):
                if time.monotonic() >= until:
                    return seen
                body = {**request(LARGE_BYTES, number), "work_ms": work_ms}
                seen[connection.post("/invocations", json=body).status_code] += 1
        return seen

    with ThreadPoolExecutor(LARGE_CLIENTS) as pool:
        for seen in pool.map(client, range(LARGE_CLIENTS)):
            statuses.update(seen)


def request(trace_bytes: int, number: int) -> dict[str, int]:
    return {"trace_bytes": trace_bytes, "seed": number % SEEDS}


def phases() -> list[Phase]:
    share = 0.1 if quick() else 1.0
    rest = partial(idle, share * IDLE_SECONDS)
    return [
        Phase("idle", rest),
        Phase("10 KB, one client", partial(one_client, scaled(SMALL_REQUESTS))),
        Phase("idle after it", rest),
        Phase("10 MB, eight at once", partial(many_clients, share * LARGE_SECONDS, WORK_MS)),
        Phase("idle after it", rest),
        Phase("10 MB, without a pause", partial(many_clients, share * LARGE_SECONDS, 0)),
        Phase("idle at the end", rest),
    ]


@dataclass(frozen=True)
class Measured:
    """Of one phase, without capture and with it: samples, and how many replies of which status."""

    name: str
    plain: list[Use]
    captured: list[Use]
    plain_statuses: "Counter[int]"
    statuses: "Counter[int]"

    @property
    def added(self) -> float:
        """MB by which the peak is higher with capture."""
        return peak(self.captured).total - peak(self.plain).total


def peak(samples: list[Use]) -> Use:
    return max(samples, key=lambda use: use.total)


def measure(phase: Phase, plain: Endpoint, captured: Endpoint) -> Measured:
    found: list[tuple[list[Use], Counter[int]]] = []
    for server in (plain, captured):
        statuses: Counter[int] = Counter()
        with sampling(partial(memory_of, server), SAMPLE_SECONDS) as samples:
            phase.run(server, statuses)
        found.append((samples, statuses))
    return Measured(phase.name, found[0][0], found[1][0], found[0][1], found[1][1])


def line(measured: Measured) -> dict[str, object]:
    plain, captured = peak(measured.plain), peak(measured.captured)
    return {
        "phase": measured.name,
        "replies without": sum(measured.plain_statuses.values()),
        "replies": sum(measured.statuses.values()),
        "without, peak MB": round(plain.total, 1),
        "with capture, peak MB": round(captured.total, 1),
        "added MB": round(measured.added, 1),
        "of the captured peak no file's": round(captured.anonymous, 1),
        "captured at the phase's end": round(measured.captured[-1].total, 1),
    }


def run() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (
            endpoint("benchmarks.mixed_agent:app", folder, capture=False) as plain,
            endpoint("benchmarks.mixed_agent:app", folder, capture=True) as captured,
        ):
            found = [measure(phase, plain, captured) for phase in phases()]
            lost = dropped(captured)
        # Not before: what this process maps of pyarrow and delta-rs would count as half the server's.
        from inference_table.table import InferenceTable

        rows = InferenceTable(captured.table).count()
    statuses = sum((measured.statuses for measured in found), Counter[int]())
    result = Result(
        "memory",
        "How much more memory does an endpoint take with capture on?",
        [line(measured) for measured in found],
        [
            Target(
                "more memory, idle to 10 KB load", SMALL_LIMIT_MB, max(one.added for one in found[:3]), "MB"
            ),
            Target(
                "more memory, peak at eight concurrent 10 MB traces", LARGE_LIMIT_MB, found[3].added, "MB"
            ),
            Target("replies other than 200", 0, statuses.total() - statuses[200], ""),
        ],
        [
            "Proportional set size of all processes of a server, every 50 ms. Each request's texts are new "
            "objects, so what capture holds on to shows. Eight clients send the next request when they have "
            "the reply to the last; the agent takes a second for one, or none: then traces come faster than "
            "they can be encoded, and `INFERENCE_TABLE_MAX_MEMORY_BYTES` (256 MiB) is what bounds memory.",
            f"{statuses.total()} requests to the captured endpoint: {rows} rows, "
            f"{sum(lost.values())} records dropped{reasons(lost)}.",
            "What is a file's (code, and segments of the spool while they are committed) the system takes "
            "back when it needs it.",
        ],
    )
    write(result, lambda axes: plot(axes, found))


def reasons(lost: dict[str, int]) -> str:
    return f" ({', '.join(f'{reason}: {number}' for reason, number in lost.items())})" if lost else ""


def plot(axes: Axes, found: list[Measured]) -> None:
    names = [measured.name.replace(", ", ",\n") for measured in found]
    places = range(len(names))
    axes.bar(
        [place - 0.2 for place in places], [peak(one.plain).total for one in found], 0.4, label="without"
    )
    axes.bar(
        [place + 0.2 for place in places],
        [peak(one.captured).total for one in found],
        0.4,
        label="with capture",
    )
    axes.set_xticks(list(places), names, fontsize="small")
    axes.set(ylabel="MB, peak of the phase")
    axes.legend()


if __name__ == "__main__":
    main(run)
