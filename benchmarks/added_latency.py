"""How much longer a reply takes with capture on, by the size of the trace.

Two uvicorn servers run the same agent, one with capture and one without; requests go to them in turn over
kept-alive connections, so that whatever else the machine does hits both alike. Run: ``make bench``.
"""

import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import httpx

SIZES = {"10 KB": 10_000, "100 KB": 100_000, "1 MB": 1_000_000, "10 MB": 10_000_000}
REQUESTS = {"10 KB": 600, "100 KB": 400, "1 MB": 150, "10 MB": 40}
WARM_UP = 20
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("mlflow-tracing", "deltalake", "pyarrow", "orjson", "starlette", "uvicorn")


@contextlib.contextmanager
def server(folder: Path, *, capture: bool) -> Iterator[httpx.Client]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "ENABLE_MLFLOW_TRACING": str(capture).lower(),
        "INFERENCE_TABLE_URI": str(folder / "payload"),
        "INFERENCE_TABLE_SPOOL_DIR": str(folder / "spool"),
    }
    command = [
        sys.executable,
        "-m",
        "uvicorn",
        "benchmarks.agent:app",
        "--port",
        str(port),
        "--log-level",
        "warning",
    ]
    process = subprocess.Popen(command, env=environment, cwd=Path(__file__).parent.parent)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            wait_until_up(client, process)
            yield client
    finally:
        process.terminate()
        process.wait(60)


def wait_until_up(client: httpx.Client, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            client.get("/")
            return
        time.sleep(0.05)
    raise RuntimeError("the server did not start")


def measure(
    plain: httpx.Client, captured: httpx.Client, size: int, requests: int
) -> tuple[list[float], list[float]]:
    """Milliseconds of each request, without and with capture."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(WARM_UP + requests):
        for client, into in zip((plain, captured), times, strict=True):
            started = time.perf_counter()
            client.post("/invocations", json={"size": size}).raise_for_status()
            if number >= WARM_UP:
                into.append((time.perf_counter() - started) * 1000)
    return times


def main() -> None:
    table = []
    with (
        tempfile.TemporaryDirectory() as folder,
        server(Path(folder), capture=False) as plain,
        server(Path(folder), capture=True) as captured,
    ):
        for name, size in SIZES.items():
            without, with_capture = measure(plain, captured, size, REQUESTS[name])
            row = {
                "trace": name,
                "requests": REQUESTS[name],
                "median_ms": round(statistics.median(without), 3),
                "median_captured_ms": round(statistics.median(with_capture), 3),
            }
            row["added_ms"] = round(row["median_captured_ms"] - row["median_ms"], 3)
            table.append(row)
            print(row)  # noqa: T201 - a command-line program
    write(table)


def write(table: list[dict[str, object]]) -> None:
    machine = {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "added_latency.json").write_text(
        json.dumps({"machine": machine, "rows": table}, indent=2) + "\n"
    )
    lines = ["| trace | without, median ms | with capture, median ms | added ms |", "|---|---|---|---|"]
    lines += [
        f"| {r['trace']} | {r['median_ms']} | {r['median_captured_ms']} | {r['added_ms']} |" for r in table
    ]
    lines += ["", ", ".join(f"{name} {value}" for name, value in machine.items())]
    (RESULTS / "added_latency.md").write_text("\n".join(lines) + "\n")
    plot(table)


def plot(table: list[dict[str, object]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    sizes = [SIZES[str(row["trace"])] for row in table]
    for key, label in (("median_captured_ms", "with capture"), ("median_ms", "without")):
        axes.plot(sizes, [row[key] for row in table], marker="o", label=label)
    axes.set(xscale="log", xlabel="bytes of the trace", ylabel="median reply, ms", ylim=(0, None))
    axes.legend()
    figure.savefig(RESULTS / "added_latency.png", dpi=120)


if __name__ == "__main__":
    main()
