"""What deploying takes, whether a replacement is noticed, and what a split between two versions costs.

A small FastAPI agent is deployed with engine ``local``, as a user does it. It is replaced under load, several
times. Then requests go in turn to an endpoint of one version and to one that splits between two.
"""

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.load import Client, Reply, post
from benchmarks.report import Axes, Result, Target, main, scaled, write
from deploy import Deployment, delete_deployment, deploy
from deploy.bench import interleaved, percentile

AGENT: Final = """
import mlflow
from fastapi import FastAPI

app = FastAPI()


@mlflow.trace
def answer(question: str) -> str:
    return f"You asked: {question}"


@app.post("/invocations")
async def invocations(body: dict) -> dict:
    return {"answer": answer(body["question"])}
"""
REQUEST: Final = post("/invocations", {"question": "why?"})
STARTS: Final = 3
REPLACEMENTS: Final = 5
PAIRS: Final = 1_000
WARM_UP: Final = 50
PAUSE_SECONDS: Final = 0.005
KEPT, FRESH = "kept-alive connections", "a connection per request"
OK: Final = 200


class Caller:
    """A client over one kept-alive connection, made anew when the server says so, or before each request."""

    def __init__(self, url: str, *, kept: bool) -> None:
        self._url = url
        self._kept = kept
        self._client: Client | None = None

    def __call__(self) -> None:
        client = self._client or Client(self._url)
        self._client = None
        try:
            reply: Reply = client.send(REQUEST)
        except BaseException:
            client.close()
            raise
        if reply.status != OK:
            raise ConnectionError(f"the agent answered {reply.status}")
        if self._kept and reply.headers.get("connection") != "close":
            self._client = client
        else:
            client.close()

    def close(self) -> None:
        if self._client is not None:
            self._client.close()


@dataclass
class Seen:
    """What clients saw under load: milliseconds of each reply, and what failed."""

    milliseconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@contextmanager
def load(url: str) -> Iterator[Seen]:
    """Four clients with kept-alive connections and four with fresh ones, for as long as the block runs."""
    seen, stop = Seen(), threading.Event()

    def send(kept: bool) -> None:
        with closing(Caller(url, kept=kept)) as caller:
            while not stop.wait(0.01):
                begun = time.perf_counter()
                try:
                    caller()
                except OSError as error:
                    seen.failures.append(repr(error))
                seen.milliseconds.append((time.perf_counter() - begun) * 1000)

    threads = [threading.Thread(target=send, args=(kept,)) for kept in (True, False) * 4]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def run() -> None:
    with tempfile.TemporaryDirectory(prefix="tracelake-bench-") as name:
        folder = Path(name)
        (folder / "small_agent.py").write_text(AGENT, encoding="utf-8")
        os.environ["TRACELAKE_HOME"] = str(folder / "home")
        starts = [first_start(folder, number) for number in range(scaled(STARTS))]
        single = deployed(folder, "single")
        try:
            with load(single.endpoint_url) as seen:
                replacements = [replaced(folder) for _ in range(scaled(REPLACEMENTS))]
            split_rows = splits(folder, deployed(folder, "single"))
        finally:
            for endpoint in ("single", "split"):
                delete_deployment(endpoint)
    rows = [
        seconds_row("deploy() of a first version, until it answers", starts),
        seconds_row("deploy() of a further version, under load", replacements),
        {
            "what": "replies while versions are replaced",
            "count": len(seen.milliseconds),
            "failed": len(seen.failures),
            "p50 ms": percentile(seen.milliseconds, 0.5),
            "p99 ms": percentile(seen.milliseconds, 0.99),
            "max ms": max(seen.milliseconds),
        },
        *split_rows,
    ]
    targets = [Target("failed requests while versions are replaced", 0, len(seen.failures), "")]
    notes = [
        "deploy() is called in this process: the copy of the agent's folder is in it, Python's start is not.",
        "The load is eight clients, four with kept-alive connections, that pause 10 ms between requests.",
        "A split: 50/50 between two versions with a worker each, beside one version with one worker; "
        "requests go to both in turn. While traffic is split each reply ends its connection, so that each "
        "request is drawn anew: a kept-alive client pays for a new connection each time.",
    ]
    question = "How long does a deployment take, who notices a replacement, and what does a split cost?"
    write(Result("deployment", question, rows, targets, notes), lambda axes: plot(axes, rows))


def deployed(folder: Path, endpoint: str) -> Deployment:
    return deploy(
        "small_agent:app",
        endpoint_name=endpoint,
        working_dir=folder,
        port=None,
        table=folder / endpoint / "payload",
        spool_dir=folder / endpoint / "spool",
        drain_seconds=10,
    )


def first_start(folder: Path, number: int) -> float:
    begun = time.perf_counter()
    deployed(folder, f"first-{number}")
    seconds = time.perf_counter() - begun
    delete_deployment(f"first-{number}")
    return seconds


def replaced(folder: Path) -> float:
    begun = time.perf_counter()
    deployed(folder, "single")
    return time.perf_counter() - begun


def splits(folder: Path, single: Deployment) -> list[dict[str, object]]:
    deployed(folder, "split")
    split = deploy(
        "small_agent:app",
        endpoint_name="split",
        working_dir=folder,
        traffic={"1": 50, "2": 50},
        drain_seconds=10,
    )
    found = []
    for how, kept in ((FRESH, False), (KEPT, True)):
        with (
            closing(Caller(single.endpoint_url, kept=kept)) as one,
            closing(Caller(split.endpoint_url, kept=kept)) as two,
        ):
            alone, shared = interleaved(
                one, two, count=scaled(PAIRS), warm_up=WARM_UP, pause_seconds=PAUSE_SECONDS
            )
        found += [
            milliseconds_row(f"one version, {how}", alone),
            milliseconds_row(f"split, {how}", shared)
            | {f"x one version p{share}": ratio(shared, alone, share) for share in (50, 99)},
        ]
    return found


def ratio(measured: list[float], beside: list[float], share: int) -> float:
    return percentile(measured, share / 100) / percentile(beside, share / 100)


def milliseconds_row(what: str, found: list[float]) -> dict[str, object]:
    shares = {f"p{share} ms": percentile(found, share / 100) for share in (50, 99)}
    return {"what": what, "count": len(found), **shares, "max ms": max(found)}


def plot(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Median and 99th percentile of the replies."""
    shown = [row for row in reversed(rows) if "p50 ms" in row]
    names = [row["what"] for row in shown]
    for share, dot in ((50, "o"), (99, "|")):
        axes.plot([row[f"p{share} ms"] for row in shown], names, dot, label=f"p{share}")
    axes.set(xlabel="ms until a reply is there", xscale="log")
    axes.xaxis.set_minor_formatter("")
    axes.legend()


def seconds_row(what: str, found: list[float]) -> dict[str, object]:
    return {"what": what, "count": len(found), "p50 s": percentile(found, 0.5), "max s": max(found)}


if __name__ == "__main__":
    main(run)
