"""The engine of ``tracelake bench``: an agent served with and without capture, and calls in turn to both.

Without capture an agent is what it would be had tracing never been switched on: ``tracelake serve`` minus the
middleware, and with MLflow's tracing disabled, so that its spans cost nothing. (MLflow's default is to make
them and to send them to a tracking store.) Each server is a process of its own, with a table of its own.
"""

import contextlib
import math
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from inference_table.errors import TracelakeError
from serving.mlflow_version import check_mlflow
from serving.settings import ENABLE_VARIABLE

if TYPE_CHECKING:
    import httpx

__all__ = [
    "PROC",
    "Endpoint",
    "cpu_seconds_of",
    "endpoint",
    "free_port",
    "interleaved",
    "new_client",
    "percentile",
    "session_stats",
]

START_SECONDS: Final = 300.0
"""Agents may load models when they start."""
STOP_SECONDS: Final = 60.0
"""A server that stops commits what is left, which takes about a second."""
REPLY_SECONDS: Final = 600.0
"""Agents may think for minutes; one that never answers shall not hang a measuring run."""
KEEP_ALIVE_SECONDS: Final = 4.0
"""Less than uvicorn's 5, so that no request meets a connection that the server is about to close."""
LOG_LEVEL: Final = "warning"
"""A line of log per request would be measured too."""
NO_START: Final = "ERROR:    Application startup failed. Exiting."
"""uvicorn's last words, before which it says why."""
POLL_SECONDS: Final = 0.05
CLOCK_TICKS: Final = os.sysconf("SC_CLK_TCK")
PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
PROC: Final = Path("/proc")


@dataclass
class Endpoint:
    """An agent that is being served.

    Attributes:
        url: ``http://127.0.0.1:<port>``.
        pid: of the server, which leads a session of its own.
        table: folder of the Delta table; there is none without capture.
        spool: folder of the spool.
        log: what the server and the agent wrote to standard output and standard error.
        client: kept alive, with ``url`` as its base.
    """

    url: str
    pid: int
    table: Path
    spool: Path
    log: Path
    client: "httpx.Client"

    def cpu_seconds(self) -> float:
        """User and system time of the server and its children so far, to 10 ms; nan without /proc."""
        stats = session_stats(self.pid)
        return cpu_seconds_of(stats) if stats else math.nan

    def rss_bytes(self) -> float:
        """Resident memory of the server and its children now; nan without /proc."""
        stats = session_stats(self.pid)
        return float(sum(int(stat[21]) for stat in stats.values()) * PAGE_BYTES) if stats else math.nan

    def last_words(self) -> str:
        """The last line that the server or the agent wrote."""
        text = self.log.read_text(encoding="utf-8", errors="replace").replace(NO_START, "")
        return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def session_stats(session: int) -> dict[int, list[str]]:
    """Fields of ``/proc/<pid>/stat`` from the third on (proc(5)), by pid, of the processes of a session."""
    found = {}
    for path in PROC.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended since
            # The second field, the name, is in brackets and may hold anything.
            stat = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if int(stat[3]) == session:
                found[int(path.parent.name)] = stat
    return found


def cpu_seconds_of(stats: Mapping[int, list[str]]) -> float:
    """User and system time of processes, as :func:`session_stats` has them, and of their ended children."""
    return sum(sum(map(int, stat[11:15])) for stat in stats.values()) / CLOCK_TICKS


@contextlib.contextmanager
def endpoint(
    target: str,
    folder: Path,
    *,
    capture: bool,
    environment: Mapping[str, str] | None = None,
    app_dir: str = ".",
    workers: int = 1,
) -> Iterator[Endpoint]:
    """Serve an agent in a process of its own for as long as the block runs; then all its rows are committed.

    Args:
        target: what ``tracelake serve`` takes.
        folder: an existing one; gets a subfolder with the table, the spool and the log.
        capture: False serves the agent alone, its MLflow spans switched off.
        environment: what is to differ from this process's environment.
        app_dir: folder to import the agent from.
        workers: server processes; without capture there can be one only.

    Raises:
        TracelakeError: it doesn't start; the message is what the server said last.
        ValueError: several workers without capture.
    """
    if workers > 1 and not capture:
        raise ValueError("without capture an agent is served by one process")
    home = Path(tempfile.mkdtemp(prefix="captured-" if capture else "plain-", dir=folder))
    table, spool, log = home / "payload", home / "spool", home / "log"
    variables = {
        **os.environ,
        **(environment or {}),
        ENABLE_VARIABLE: str(capture).lower(),
        "INFERENCE_TABLE_URI": str(table),
        "INFERENCE_TABLE_SPOOL_DIR": str(spool),
    }
    port = free_port()
    command = ["deploy.bench"]
    if capture:
        command = ["deploy.cli", "serve", "--log-level", LOG_LEVEL, "--workers", str(workers)]
    url = f"http://127.0.0.1:{port}"
    with new_client(url) as client:
        with log.open("wb") as output:
            process = subprocess.Popen(
                # -P: a folder called deploy beside the agent is not ours.
                [
                    sys.executable,
                    "-P",
                    "-m",
                    *command,
                    "--port",
                    str(port),
                    "--app-dir",
                    app_dir,
                    "--",
                    target,
                ],
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            served = Endpoint(url, process.pid, table, spool, log, client)
            wait_until_up(process, port, served)
            yield served
        finally:
            stop(process)


def new_client(url: str) -> "httpx.Client":
    """A client that keeps connections alive, and waits for as long as agents may think.

    Raises:
        TracelakeError: httpx is not installed.
    """
    try:
        import httpx
    except ModuleNotFoundError as error:
        raise TracelakeError(
            "sending requests needs httpx, which is not installed: pip install 'tracelake[bench]'"
        ) from error

    limits = httpx.Limits(keepalive_expiry=KEEP_ALIVE_SECONDS)
    # Proxies that the environment names are for the way out.
    return httpx.Client(base_url=url, timeout=REPLY_SECONDS, limits=limits, trust_env=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until_up(process: "subprocess.Popen[bytes]", port: int, served: Endpoint) -> None:
    """Wait for the socket, which uvicorn opens once the agent's own start-up is done; send no request."""
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(POLL_SECONDS)
    if process.poll() is None:
        raise TracelakeError(f"the agent has not started within {START_SECONDS:g} s: {served.last_words()}")
    raise TracelakeError(served.last_words().removeprefix("Error: ") or f"exit code {process.returncode}")


def stop(process: "subprocess.Popen[bytes]") -> None:
    """SIGTERM, and wait for a clean end; whatever is left of its session is killed."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise TracelakeError(f"the server {process.pid} has not stopped within {STOP_SECONDS:g} s") from error
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def interleaved(
    first: Callable[[], object],
    second: Callable[[], object],
    *,
    count: int,
    warm_up: int,
    pause_seconds: float = 0.0,
) -> tuple[list[float], list[float]]:
    """Call both in turn and take the time, so that whatever else the machine does hits both alike.

    Args:
        count: pairs of calls that are timed. Their order alternates (AB, BA), so that neither always follows
            the other.
        warm_up: pairs before these, not timed.
        pause_seconds: after each call, on average: a steady beat could fall in with what is measured.

    Returns:
        Milliseconds of the calls of ``first`` and of ``second``, pair by pair.
    """
    calls = (first, second)
    draw = random.Random(0)
    times: tuple[list[float], list[float]] = ([], [])
    for pair in range(warm_up + count):
        for side in (0, 1) if pair % 2 == 0 else (1, 0):
            started = time.perf_counter_ns()
            calls[side]()
            taken = time.perf_counter_ns() - started
            if pair >= warm_up:
                times[side].append(taken / 1e6)
            if pause_seconds:
                time.sleep(pause_seconds * draw.uniform(0.5, 1.5))
    return times


def percentile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` (0 to 1) of all are at most, interpolated between neighbours; nan for none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


# --- in the process of the server without capture ---


class PlainApp:
    """The user's app, with MLflow's tracing switched off again if its start-up has switched it on."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return

        async def started(message: Any) -> None:
            disable_tracing()
            await send(message)

        await self._app(scope, receive, started)


def disable_tracing() -> None:
    import mlflow

    mlflow.tracing.disable()


@click.command()
@click.argument("target")
@click.option("--port", type=int, required=True)
@click.option("--app-dir", required=True)
def serve_plain(target: str, port: int, app_dir: str) -> None:
    """What ``tracelake serve`` does, without capture."""
    sys.path.insert(0, str(Path(app_dir).absolute()))
    # What the agent may do to MLflow's provider later (set_experiment(), reset()) must not export its spans.
    os.environ["MLFLOW_TRACE_SAMPLING_RATIO"] = "0"
    try:
        check_mlflow()
        import uvicorn

        from serving.app import load_app

        disable_tracing()  # instrumentors that the agent sets up take the provider of that moment
        app = PlainApp(load_app(target))
    except TracelakeError as error:
        raise click.ClickException(str(error)) from error
    disable_tracing()
    uvicorn.run(app, port=port, log_level=LOG_LEVEL)


if __name__ == "__main__":
    serve_plain()
