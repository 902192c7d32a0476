"""Whole servers killed with SIGKILL under load: what was promised is in the table, once."""

import contextlib
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx
import orjson
import pytest

from inference_table.table import InferenceTable
from tests.support import Process, rows, served, wait_for

WORKERS = 2
CLIENTS = 8
ACKNOWLEDGED_PER_ROUND = 110


class Load:
    """Clients that post as fast as they are answered, until the server is gone."""

    def __init__(self, url: str) -> None:
        self.acknowledged: list[str] = []
        self._url = url
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _run(self, client_number: int) -> None:
        with httpx.Client(timeout=10) as client, contextlib.suppress(httpx.TransportError):
            number = 0
            while not self._stop.is_set():
                number += 1
                body = {"client": client_number, "number": number, "text": "word " * 400}
                reply = client.post(f"{self._url}/invocations", json=body)
                if reply.status_code == 200:
                    self.acknowledged.append(reply.headers["x-databricks-request-id"])

    def until(self, count: int) -> None:
        wait_for(lambda: len(self.acknowledged) >= count, f"{count} acknowledged requests", 60)

    def stop(self) -> list[str]:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        return self.acknowledged


def environment(folder: Path, **settings: str) -> dict[str, str]:
    return {
        "INFERENCE_TABLE_URI": str(folder / "payload"),
        "INFERENCE_TABLE_SPOOL_DIR": str(folder / "spool"),
        "INFERENCE_TABLE_FLUSH_SECONDS": "0.2",
        **{f"INFERENCE_TABLE_{name}": value for name, value in settings.items()},
    }


def serve(folder: Path, env: dict[str, str]) -> "contextlib.AbstractContextManager[tuple[str, Process]]":
    log = folder / "server.log"
    return served("tests.deploy.kill_agent:app", "--workers", str(WORKERS), env=env, log=log)


def killed_under_load(
    folder: Path, env: dict[str, str], rounds: int, before_kill: Callable[[], object] = bool
) -> list[str]:
    """Serve, load and kill ``rounds`` times, then serve once more and stop cleanly; the ids acknowledged."""
    acknowledged: list[str] = []
    for _ in range(rounds):
        with contextlib.suppress(ProcessLookupError), serve(folder, env) as (url, process):
            load = Load(url)
            load.until(ACKNOWLEDGED_PER_ROUND)
            before_kill()
            process.kill_group()
            acknowledged += load.stop()
    with serve(folder, env):
        wait_for(lambda: not list(folder.glob("spool/*/*/*.arrow")), "the spool to be committed", 60)
    return acknowledged


class Spooled:
    """The rows that a reader saw before each kill, spooled or committed."""

    def __init__(self, folder: Path) -> None:
        self._table = InferenceTable(str(folder / "payload"), spool_dir=folder / "spool")
        self.seen: set[str] = set()

    def look(self) -> None:
        """Read until there are rows that no earlier look saw."""
        known = len(self.seen)
        wait_for(lambda: self._read() > known, "rows of this round in the spool or the table", 60)

    def _read(self) -> int:
        found = self._table.query("select databricks_request_id from payload", pending=True).to_arrow()
        self.seen.update(found.column(0).to_pylist())
        return len(self.seen)


@pytest.mark.parametrize("rounds", [3, pytest.param(20, marks=[pytest.mark.heavy, pytest.mark.timeout(900)])])
def test_every_acknowledged_strict_request_survives_sigkill_exactly_once(tmp_path: Path, rounds: int) -> None:
    """2 workers, strict, killed again and again under load: no acknowledged row is lost, none is doubled."""
    acknowledged = killed_under_load(tmp_path, environment(tmp_path, DURABILITY="strict"), rounds)
    assert len(acknowledged) >= ACKNOWLEDGED_PER_ROUND * rounds
    recorded = Counter(row["databricks_request_id"] for row in rows(tmp_path / "payload"))
    assert [one for one in acknowledged if one not in recorded] == []
    assert [one for one, count in recorded.items() if count > 1] == []


def test_relaxed_rows_are_whole_and_never_doubled_after_sigkill(tmp_path: Path) -> None:
    """Relaxed may lose what was in memory, but nothing spooled; no row is torn and none is there twice."""
    spooled = Spooled(tmp_path)
    killed_under_load(tmp_path, environment(tmp_path), 3, spooled.look)
    recorded = rows(tmp_path / "payload")
    ids = {row["databricks_request_id"] for row in recorded}
    assert len(ids) == len(recorded)
    assert spooled.seen - ids == set()
    for row in recorded:
        response = orjson.loads(row["response"])
        assert response["answer"] == orjson.loads(row["request"])
        assert response["databricks_output"]["databricks_request_id"] == row["databricks_request_id"]


def test_a_clean_stop_loses_nothing(tmp_path: Path) -> None:
    """SIGTERM under relaxed durability: every answered request is committed before the server is gone."""
    with serve(tmp_path, environment(tmp_path)) as (url, process):
        load = Load(url)
        load.until(ACKNOWLEDGED_PER_ROUND)
        acknowledged = load.stop()
        assert process.stop() == 0
    recorded = Counter(row["databricks_request_id"] for row in rows(tmp_path / "payload"))
    assert set(acknowledged) <= set(recorded)
    assert max(recorded.values()) == 1
    assert not list(tmp_path.glob("spool/*/*/*.arrow"))
