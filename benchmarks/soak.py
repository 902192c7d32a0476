"""Ten minutes of mixed load on two workers: does memory stay flat, and is each answered request one row?

Replies, streams and failures, with traces from 10 KB to 10 MB. ``BENCH_SOAK_SECONDS`` sets another length.
"""

import contextlib
import os
import random
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import httpx

from benchmarks.memory import dropped, memory_of, sampling
from benchmarks.report import Axes, Result, Target, main, scaled, write
from deploy.bench import Endpoint, endpoint, new_client, session_stats
from inference_table.settings import StorageSettings
from inference_table.spool import spool_root, spool_stats
from inference_table.table import InferenceTable

SECONDS: Final = 600
WORKERS: Final = 2
CLIENTS: Final = 4
PER_SECOND: Final = 12
SIZES: Final = {10_000: 62, 100_000: 30, 1_000_000: 7, 10_000_000: 1}
"""Bytes of the trace, and in how many of 100 requests."""
KINDS: Final = {"reply": 80, "stream": 15, "fail": 5}
SEEDS: Final = 2
WARM_UPS: Final = 6
"""Of each size and seed, so that what the agent itself keeps is on both workers before memory counts."""
REQUESTS_PER_CONNECTION: Final = 25
"""A new connection may reach the other worker."""
SETTLED_SHARE: Final = 0.2
"""Of the time, before the line is fitted."""

FLAT_LIMIT: Final = 5.0


@dataclass(frozen=True)
class Moment:
    """What a server looks like: sizes in MB, ages and times in seconds."""

    seconds: float
    rss: float
    pss: float
    anonymous: float
    spool: float
    oldest: float
    files: int


@dataclass
class Answers:
    """What clients were told: ids of all requests that got a reply, and how many of which status."""

    ids: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    """Why requests got no reply."""
    statuses: "Counter[int]" = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def noting_broken(self, started: float) -> Iterator[None]:
        """A connection that breaks costs its request, not the run."""
        try:
            yield
        except httpx.TransportError as error:
            self.broken.append(f"{error or type(error).__name__} after {time.monotonic() - started:.0f} s")

    def add(self, status: int, request_id: str) -> None:
        with self.lock:
            self.statuses[status] += 1
            self.ids.append(request_id)


def moment(server: Endpoint, root: Path, started: float) -> Moment:
    memory, stats = memory_of(server), spool_stats(root)
    oldest = stats.oldest_unix_seconds
    return Moment(
        seconds=time.monotonic() - started,
        rss=server.rss_bytes() / 1e6,
        pss=memory.total,
        anonymous=memory.anonymous,
        spool=stats.bytes / 1e6,
        oldest=0.0 if oldest is None else max(0.0, time.time() - oldest),
        files=sum(map(open_files, session_stats(server.pid))),
    )


def open_files(pid: int) -> int:
    with contextlib.suppress(OSError):  # it has ended since
        return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    return 0


def warm_up(server: Endpoint, answers: Answers) -> None:
    for number in range(WARM_UPS * len(SIZES) * SEEDS):
        size = list(SIZES)[number % len(SIZES)]
        with new_client(server.url) as client:
            reply = client.post(
                "/invocations", json={"trace_bytes": size, "seed": number // len(SIZES) % SEEDS}
            )
        answers.add(reply.status_code, reply.headers["x-databricks-request-id"])


def send(server: Endpoint, seconds: float, answers: Answers, number: int) -> None:
    """One client's share of the load, on time unless replies take too long."""
    draw, started, sent = random.Random(number), time.monotonic(), 0
    while time.monotonic() < started + seconds:
        with new_client(server.url) as client, answers.noting_broken(started):
            for _ in range(REQUESTS_PER_CONNECTION):
                body = {
                    "trace_bytes": draw.choices(list(SIZES), list(SIZES.values()))[0],
                    "kind": draw.choices(list(KINDS), list(KINDS.values()))[0],
                    "seed": draw.randrange(SEEDS),
                }
                reply = client.post("/invocations", json=body)
                answers.add(reply.status_code, reply.headers["x-databricks-request-id"])
                sent += 1
                time.sleep(max(0.0, started + sent * CLIENTS / PER_SECOND - time.monotonic()))
                if time.monotonic() >= started + seconds or reply.is_server_error:
                    break  # uvicorn closes the connection of an app that raised, without saying so before


def growth(moments: list[Moment], seconds: float) -> float:
    """By how many per cent the resident memory grows from the settled part's beginning to its end."""
    settled = [one for one in moments if one.seconds >= SETTLED_SHARE * seconds]
    sizes = [one.rss for one in settled]
    slope = statistics.linear_regression([one.seconds for one in settled], sizes).slope
    return 100 * slope * (1 - SETTLED_SHARE) * seconds / statistics.mean(sizes)


def run() -> None:
    seconds = float(os.environ.get("BENCH_SOAK_SECONDS") or scaled(SECONDS))
    answers = Answers()
    with tempfile.TemporaryDirectory() as name:
        with endpoint("benchmarks.mixed_agent:app", Path(name), capture=True, workers=WORKERS) as server:
            members = set(session_stats(server.pid))
            settings = StorageSettings(uri=str(server.table), spool_dir=server.spool)
            look = partial(moment, server, spool_root(settings), time.monotonic())
            with sampling(look, 1.0) as moments, ThreadPoolExecutor(CLIENTS) as pool:
                warm_up(server, answers)
                left = seconds - moments[-1].seconds
                list(pool.map(partial(send, server, left, answers), range(CLIENTS)))
            lost = dropped(server)
            gone = members - set(session_stats(server.pid))
        ids = InferenceTable(settings.uri).to_arrow(["databricks_request_id"])[0].to_pylist()
    missing, double = len(set(answers.ids) - set(ids)), len(ids) - len(set(ids))
    grown = growth(moments, seconds)
    result = Result(
        "soak",
        "Does memory stay flat under mixed load, and is each answered request one row?",
        by_minute(moments, seconds),
        [
            Target("growth of memory after the first fifth", FLAT_LIMIT, grown, "%"),
            Target("requests without a reply", 0, len(answers.broken), ""),
            Target("answered requests that are no row", 0, missing, "rows"),
            Target("rows that are there twice", 0, double, "rows"),
        ],
        [
            f"{len(answers.ids):,} requests in {seconds:,.0f} s ({statuses(answers.statuses)}), {len(ids):,} "
            f"rows, {sum(lost.values())} records dropped. Of 100 requests {mix()}.",
            f"Without a reply: {'; '.join(answers.broken) or 'none'}. "
            f"Processes of the server that ended meanwhile: {len(gone)}.",
            f"Memory is that of all processes of {WORKERS} workers, each second. Growth is the slope of a "
            f"line fitted to the resident memory (rss) of the last {1 - SETTLED_SHARE:.0%} of the time, "
            "times that time, as a share of its mean. Proportional memory (pss) counts shared pages once; "
            "anonymous is what is no file's.",
        ],
    )
    write(result, lambda axes: plot(axes, moments))


def statuses(found: "Counter[int]") -> str:
    return ", ".join(f"{status}: {number:,}" for status, number in sorted(found.items()))


def mix() -> str:
    sizes = ", ".join(f"{share} have traces of {size // 1000:,} KB" for size, share in SIZES.items())
    kinds = ", ".join(f"{share} {kind}" for kind, share in KINDS.items() if kind != "reply")
    return f"{sizes}; {kinds}"


def by_minute(moments: list[Moment], seconds: float) -> list[dict[str, object]]:
    """The means of memory and the most of the rest, in tenths of the time."""
    tenths: dict[int, list[Moment]] = {}
    for one in moments:
        tenths.setdefault(min(9, int(10 * one.seconds / seconds)), []).append(one)
    return [
        {
            "until s": round((tenth + 1) * seconds / 10),
            "rss MB": round(statistics.mean(one.rss for one in found)),
            "pss MB": round(statistics.mean(one.pss for one in found)),
            "anonymous MB": round(statistics.mean(one.anonymous for one in found)),
            "spool MB, most": round(max(one.spool for one in found), 1),
            "oldest uncommitted s, most": round(max(one.oldest for one in found), 1),
            "open files, most": max(one.files for one in found),
        }
        for tenth, found in sorted(tenths.items())
    ]


def plot(axes: Axes, moments: list[Moment]) -> None:
    minutes = [one.seconds / 60 for one in moments]
    axes.plot(minutes, [one.rss for one in moments], label="rss")
    axes.plot(minutes, [one.anonymous for one in moments], label="anonymous")
    axes.plot(minutes, [one.spool for one in moments], label="spool")
    axes.set(xlabel="minutes", ylabel="MB", ylim=(0, None))
    axes.legend()


if __name__ == "__main__":
    main(run)
