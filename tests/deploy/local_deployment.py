"""An endpoint of engine ``local`` for tests, deployed by the engine itself; and clients that keep it busy."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from deploy import local
from deploy.registry import Endpoint, EndpointFolder, State, Version, is_locked, write_json
from tests.support import wait_for

HERE = Path(__file__).parent
TARGET = "local_agents:app"


class LocalEndpoint:
    """One endpoint; versions are deployed by number."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.path = folder
        self.table, self.spool = folder / "payload", folder / "spool"
        self.files = EndpointFolder("bot", folder / "endpoints")
        self.files.create()
        self.wanted = Endpoint(
            name="bot",
            engine="local",
            table=str(self.table),
            spool_dir=str(self.spool),
            **{"host": "127.0.0.1", "port": 0, "wait_seconds": 120.0, "drain_seconds": 20.0, **options},
        )
        self.seen: set[int] = set()

    def add(
        self,
        number: str,
        *,
        workers: int = 1,
        target: str = TARGET,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Remember a version, as a deployer does."""
        variables = {
            **os.environ,
            "ENABLE_MLFLOW_TRACING": "true",
            "INFERENCE_TABLE_URI": str(self.table),
            "INFERENCE_TABLE_SPOOL_DIR": str(self.spool),
            "INFERENCE_TABLE_FLUSH_SECONDS": "0.2",
            "INFERENCE_TABLE_SERVED_ENTITY": f"bot/{number}",
            "TRACELAKE_APP": target,
            "TRACELAKE_PYTHON_PATH": str(HERE),
            **(environment or {}),
        }
        version = Version(
            number=number,
            agent=target,
            target=target,
            model_name=target,
            model_version=number,
            working_dir=str(HERE),
            environment=variables,
            workers=workers,
            python=sys.executable,
            created_at="2026-11-22T00:00:00Z",
        )
        self.files.version_folder(number).mkdir(parents=True)
        write_json(self.files.version_folder(number) / "version.json", version.to_json())

    def want(self, traffic: Mapping[str, int], **changes: Any) -> None:
        self.wanted = replace(
            self.wanted, traffic=dict(traffic), generation=self.wanted.generation + 1, **changes
        )
        self.files.write_endpoint(self.wanted)

    def apply(self, traffic: Mapping[str, int], **changes: Any) -> State:
        self.want(traffic, **changes)
        try:
            return local.apply(self.files, self.wanted)
        finally:
            self.state()

    def state(self) -> State:
        found = local.state(self.files, self.wanted)
        self.seen |= {pid for version in found.versions.values() for pid in version.workers}
        if found.pid is not None:
            self.seen.add(found.pid)
        return found

    def workers(self, number: str) -> list[int]:
        version = self.state().versions.get(number)
        return version.workers if version is not None else []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.state().port}"

    def ask(self, question: Any = "why") -> dict[str, Any]:
        reply = httpx.post(f"{self.url}/invocations", json={"question": question}, timeout=30)
        found: dict[str, Any] = reply.raise_for_status().json()
        return found

    def stop(self) -> None:
        local.stop(self.files, self.wanted)

    def clean_up(self) -> None:
        """End whatever a failed test left."""
        state = self.state()
        if is_locked(self.files.supervisor_lock) and state.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(state.pid, signal.SIGTERM)
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not is_locked(self.files.supervisor_lock), "the supervisor to end", 20)
        for pid in filter(is_ours, self.seen):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def local_endpoint(folder: Path, **options: Any) -> Iterator[LocalEndpoint]:
    endpoint = LocalEndpoint(folder, **options)
    try:
        yield endpoint
    finally:
        endpoint.clean_up()


def is_ours(pid: int) -> bool:
    """Whether a process still lives, and is a supervisor or a worker."""
    try:
        return b"deploy." in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


@dataclass
class Clients:
    """Clients that send one request after the other, and what came of it."""

    versions: list[str] = field(default_factory=list)
    """Of the version that answered, in order of the replies."""
    failures: list[str] = field(default_factory=list)

    def run(self, url: str, stopping: threading.Event, keep_alive: bool) -> None:
        with httpx.Client(timeout=30) as session:
            while not stopping.is_set():
                try:
                    reply = (session if keep_alive else httpx).post(
                        f"{url}/invocations", json={"question": 1}
                    )
                    self.versions.append(reply.raise_for_status().json()["version"])
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))


@contextlib.contextmanager
def busy(url: str, *, kept: int = 2, fresh: int = 2) -> Iterator[Clients]:
    """Clients at work for as long as the block runs, with kept-alive connections and with fresh ones."""
    clients, stopping = Clients(), threading.Event()
    threads = [
        threading.Thread(target=clients.run, args=(url, stopping, keep_alive))
        for keep_alive in [True] * kept + [False] * fresh
    ]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: len(clients.versions) > 20 or clients.failures, "the first replies")
        yield clients
    finally:
        stopping.set()
        for thread in threads:
            thread.join()
