"""Real parts for tests: servers over sockets, processes that can be killed, tables to read back."""

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import httpx
import orjson
import uvicorn
from deltalake import DeltaTable

T = TypeVar("T")

ROOT = Path(__file__).parent.parent


def wait_for(condition: Callable[[], T], what: str, seconds: float = 60.0) -> T:
    """The first true value of ``condition``; fails the test where none comes."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"waited {seconds} s in vain for {what}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def running(app: Any, **config: Any) -> Iterator[str]:
    """A real uvicorn around ``app`` in a thread of this process; yields its URL, stops it cleanly."""
    options = {"log_level": "error", "timeout_graceful_shutdown": 5, **config}
    server = uvicorn.Server(uvicorn.Config(app, port=0, **options))
    thread = threading.Thread(target=run_server, args=(server,))
    thread.start()
    try:
        wait_for(lambda: server.started or not thread.is_alive(), "the server to start")
        if not server.started:
            raise RuntimeError("the server refused to start")
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)


def run_server(server: uvicorn.Server) -> None:
    # uvicorn leaves a start that was refused by sys.exit().
    with contextlib.suppress(SystemExit):
        server.run()


class Process:
    """A child in its own process group, so that its workers can be killed with it."""

    def __init__(self, command: list[str], env: Mapping[str, str], log: Path, cwd: Path = ROOT) -> None:
        self.log = log
        with log.open("ab") as output:
            self.popen = subprocess.Popen(
                command,
                cwd=cwd,
                env={**os.environ, **env},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill_group(self) -> None:
        """SIGKILL the process and all its children at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()

    def stop(self, seconds: float = 30.0) -> int:
        """SIGTERM, and wait for a clean end."""
        self.popen.terminate()
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill_group()
            raise


@contextlib.contextmanager
def served(
    *arguments: str, env: Mapping[str, str], log: Path, port: int | None = None, cwd: Path = ROOT
) -> Iterator[tuple[str, Process]]:
    """``tracelake serve`` as a real process; yields its URL and the process, stops it cleanly."""
    port = port or free_port()
    command = [sys.executable, "-m", "deploy.cli", "serve", *arguments, "--port", str(port)]
    process = Process(command, env, log, cwd)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: answers(url) or process.popen.poll() is not None, f"{url} to answer", 60)
        if process.popen.poll() is not None:
            raise RuntimeError(log.read_text())
        yield url, process
        process.stop()
    finally:
        process.kill_group()


def answers(url: str) -> bool:
    try:
        httpx.get(f"{url}/metrics", timeout=2)
    except httpx.HTTPError:
        return False
    return True


def rows(table: Path | str, where: str = "true") -> list[dict[str, Any]]:
    """All rows of a table as any reader sees them: Parquet files named by the Delta log, read by DuckDB."""
    if not DeltaTable.is_deltatable(str(table)):
        return []
    files = DeltaTable(str(table)).file_uris()
    if not files:
        return []
    relation = (
        duckdb_connection()
        .cursor()
        .sql(
            f"select * from read_parquet({files!r}, hive_partitioning=true, union_by_name=true)"
            f" where {where} order by databricks_request_id"
        )
    )
    found: list[dict[str, Any]] = relation.to_arrow_table().to_pylist()
    return found


@functools.cache
def duckdb_connection() -> duckdb.DuckDBPyConnection:
    """One for all reads: making one takes longer than reading."""
    return duckdb.connect()


def output_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The ``databricks_output`` of a row."""
    output: dict[str, Any] = orjson.loads(row["response"])["databricks_output"]
    return output
