"""tracelake beside what a user would pick instead: the same agent under each, one after the other.

Each peer has a virtual environment of its own under ``.venv-peers``, made by the first run with the machine's
pip; one that can't be installed or doesn't start is left out, with a line that says so.
"""

import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Final

import httpx

from benchmarks.peers.definitions import FLOOR, PEERS, Peer
from benchmarks.peers.environments import InstallError
from benchmarks.peers.measure import SIZES, SPANS, Cost, after_kill, measured, until_readable
from benchmarks.peers.processes import StartError
from benchmarks.peers.running import Running, running
from benchmarks.report import Axes, Result, main, quick, say, write
from deploy.bench import percentile

BUDGET_SECONDS: Final = 700.0
"""After that, of each peer only the smallest traces are measured, so that all ends in 15 minutes, but for
the time that pip takes."""
LEAST_PLOTTED_MS: Final = 0.01
"""Where a logarithmic axis ends: less, or nothing at all, is noise."""

QUESTION: Final = (
    "What do the alternatives cost, how soon can their records be read, and what survives a kill?"
)
NOTES: Final = (
    "The same agent of 8 calls behind Starlette and uvicorn (one process, asyncio, h11), one peer at a time; "
    "requests in turn to it and to the floor, the agent alone, over kept-alive connections. Each gets about "
    "20 a second (5 at 10 MB), so that work in the background falls within the run, as in production, where "
    "the floor meets it too. Added: difference of the percentiles.",
    "tracelake and MLflow record MLflow's spans; bentoml, phoenix and opentelemetry those of OpenTelemetry's "
    "SDK, with inputs and outputs as JSON. tracelake and bentoml also record request and response.",
    "CPU: user and system time of the process and its children per request, with the work after the reply. "
    "Memory: proportional set size after the last request; the agent's own runs of 1 and 10 MB are in it.",
    "Queryable: from the reply until the peer's own table, file or query API shows the record, median of 10; "
    f"readable: share of the records of the paced run that can be read, all {SPANS} spans, once all is calm.",
    "Killed: SIGKILL right after the last reply of a burst over 8 connections, with traces of 10 KB; records "
    "that can be read after all was started again, at once, and given its time. A kill leaves what the "
    "operating system holds: it is no loss of power, which only an fsync survives (tracelake strict).",
    "Disk: bytes on disk once all is calm, per byte of the readable runs' inputs and outputs as JSON.",
)


class Comparison:
    """Rows and notes as they come, peer by peer."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []
        self.notes: list[str] = []
        self.floors: dict[str, list[Cost]] = defaultdict(list)
        self.added: dict[str, dict[int, float]] = defaultdict(dict)
        """Milliseconds by the peer's name and the bytes of the trace."""
        self._started = time.monotonic()

    def compare(self, peer: Peer, floor: Running, folder: Path) -> None:
        try:
            self._install(peer)
            with running(peer, folder) as system:
                versions = ", ".join(environment.what for environment in peer.environments)
                self.notes.append(f"{peer.name} ({versions}): {peer.setting}.")
                self._sizes(system, floor)
        except (InstallError, StartError) as error:
            self.notes.append(f"{peer.name}: skipped, {error}")
            say(self.notes[-1])
        except httpx.HTTPError as error:
            self.notes.append(f"{peer.name}: stopped after what is in the table, {error}")
            say(self.notes[-1])

    def _install(self, peer: Peer) -> None:
        say(f"{peer.name}: installing and starting")
        before = time.monotonic()
        for environment in peer.environments:
            environment.install()
        self._started += time.monotonic() - before  # it doesn't count

    def _sizes(self, peer: Running, floor: Running) -> None:
        for size in SIZES[:1] if quick() else SIZES:
            if size is not SIZES[0] and time.monotonic() - self._started > BUDGET_SECONDS:
                self.notes.append(f"{peer.peer.name}: no traces of {size.name}, for want of time.")
                return
            say(f"{peer.peer.name}: {size.name}")
            cost = measured(peer, floor, size)
            self.floors[size.name].append(cost)
            self.added[peer.peer.name][size.trace_bytes] = cost.added_ms(0.5)
            row = row_of(peer.peer.name, size.name, cost) | {"queryable s": until_readable(peer, size)}
            self.rows.append(row)
            if cost.readable < 1:
                said = peer.endpoint.last_words() or "nothing"
                self.notes.append(
                    f"{peer.peer.name}, {size.name}: lost records; its endpoint's log says: {said}"
                )
            if size is SIZES[0]:
                row |= kills(peer)

    def all_rows(self) -> list[dict[str, object]]:
        return [*(floor_row(name, costs) for name, costs in self.floors.items()), *self.rows]

    def plot(self, axes: Axes) -> None:
        for name, added in self.added.items():
            axes.plot(
                list(added), [max(ms, LEAST_PLOTTED_MS) for ms in added.values()], marker="o", label=name
            )
        axes.set(xscale="log", yscale="log", xlabel="trace", ylabel="ms added to the reply, median")
        axes.set_xticks([size.trace_bytes for size in SIZES], [size.name for size in SIZES])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.legend(fontsize="small")


def row_of(peer: str, size: str, cost: Cost) -> dict[str, object]:
    return {
        "peer": peer,
        "trace": size,
        "added p50 ms": cost.added_ms(0.5),
        "added p99 ms": cost.added_ms(0.99),
        "CPU ms": cost.cpu_ms,
        "server CPU ms": cost.server_cpu_ms,
        "memory MB": cost.memory_mb,
        "server MB": cost.server_memory_mb,
        "readable %": 100 * cost.readable,
        "disk / raw": cost.disk_ratio,
    }


def floor_row(size: str, costs: list[Cost]) -> dict[str, object]:
    """The floor of all peers' runs together."""
    times = [ms for cost in costs for ms in cost.floor_ms]
    return {
        "peer": f"{FLOOR.name} (its own p50, p99)",
        "trace": size,
        "added p50 ms": percentile(times, 0.5),
        "added p99 ms": percentile(times, 0.99),
        "CPU ms": statistics.fmean(cost.floor_cpu_ms for cost in costs),
        "memory MB": costs[-1].floor_memory_mb,
    }


def kills(peer: Running) -> dict[str, object]:
    """What is left after a SIGKILL of the server, where there is one, and of the endpoint."""
    if peer.store is None:
        return {}
    found: dict[str, object] = {}
    # Servers take long to start again: too long for a quick run.
    if peer.server and not quick():
        found["server killed"] = "{} of {}".format(*after_kill(peer, peer.server, SIZES[0]))
    return {"endpoint killed": "{} of {}".format(*after_kill(peer, peer.endpoint, SIZES[0])), **found}


def run() -> None:
    """Install, serve and measure one peer after the other."""
    # So that one who stops the run (a timeout, say) leaves no servers behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    comparison = Comparison()
    with (
        tempfile.TemporaryDirectory(prefix="tracelake-peers-") as folder,
        running(FLOOR, Path(folder) / "floor") as floor,
    ):
        for number, peer in enumerate(PEERS):
            comparison.compare(peer, floor, Path(folder) / str(number))
    result = Result("peers", QUESTION, comparison.all_rows(), notes=[*NOTES, *comparison.notes])
    write(result, comparison.plot)


if __name__ == "__main__":
    main(run)
