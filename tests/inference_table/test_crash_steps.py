"""A process that is killed at each step between record and row, in turn."""

import os
import signal
import subprocess
import sys
from collections import defaultdict
from datetime import timedelta
from pathlib import Path

import duckdb
import pytest
from deltalake import DeltaTable

from inference_table.commit import Committer, open_or_create_table
from inference_table.compaction import Maintenance
from inference_table.settings import StorageSettings
from inference_table.spool import folders, retry_quarantined, spool_root, spool_stats
from inference_table.steps import Step
from tests.inference_table.rows import NOON, commit_all, ids_in_table, storage
from tests.support import ROOT

STRICT_ONLY = {Step.SEGMENT_SYNCED, Step.SEGMENT_DURABLE}


def run_until_killed(folder: Path, step: Step, mode: str) -> dict[str, set[str]]:
    """Start the process, see it killed by its own hand, and return what it has said, by verb."""
    command = [sys.executable, "-m", "tests.inference_table.crash_process", str(folder), step, mode]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    said: dict[str, set[str]] = defaultdict(set)
    for line in ended.stdout.splitlines():
        verb, _, record = line.partition(" ")
        said[verb].add(record)
    return said


def restart_and_drain(folder: Path, settings: StorageSettings) -> None:
    """What the next process on this machine does, an operator's repair of damaged segments included."""
    open_or_create_table(settings)
    root = spool_root(settings)
    for new in root.glob(".new-*"):
        os.utime(new, (0, 0))
    committer = Committer(settings)
    commit_all(committer)
    for path in root.glob("quarantine/*"):
        path.write_bytes(folder.joinpath(f"good-{path.name}").read_bytes())
    retry_quarantined(root)
    commit_all(committer)
    Maintenance(settings).compact(NOON + timedelta(days=1))


def assert_no_leftovers(settings: StorageSettings) -> None:
    root = spool_root(settings)
    assert spool_stats(root).segments == 0
    assert spool_stats(root).quarantined == 0
    assert folders(root) == []
    assert {path.name for path in root.iterdir()} <= {"URI", "TABLE_ID", "committer.lock", "quarantine"}


@pytest.mark.parametrize("step", list(Step))
def test_strict_killed_at(tmp_path: Path, step: Step) -> None:
    """Every acknowledged record is in the table exactly once, whatever step the process was killed at."""
    said = run_until_killed(tmp_path, step, "strict")
    settings = storage(tmp_path)
    restart_and_drain(tmp_path, settings)
    found = ids_in_table(settings)
    assert said["acknowledged"] <= set(found)
    assert said["renamed"] <= set(found) <= said["try"]
    assert set(found.values()) <= {1}
    assert_no_leftovers(settings)


@pytest.mark.parametrize("step", [step for step in Step if step not in STRICT_ONLY])
def test_relaxed_killed_at(tmp_path: Path, step: Step) -> None:
    """What was renamed arrives, nothing comes twice, and every data file in the table can be read."""
    said = run_until_killed(tmp_path, step, "relaxed")
    settings = storage(tmp_path)
    restart_and_drain(tmp_path, settings)
    found = ids_in_table(settings)
    assert said["renamed"] == set(found) & said["try"] == set(found)
    assert set(found.values()) <= {1}
    assert_no_leftovers(settings)
    if files := DeltaTable(settings.uri).file_uris():
        rows = duckdb.connect().sql(f"select request, response from read_parquet({files!r})").fetchall()
        assert rows == [('{"input": "hello"}', '{"output": "hello"}')] * len(found)
