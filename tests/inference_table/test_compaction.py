"""Maintenance: fewer files, the same rows, whatever else happens to the table meanwhile."""

import os
import threading
import time
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError

from inference_table import merge as merge_module
from inference_table.commit import Committer, open_or_create_table
from inference_table.compaction import Maintenance
from inference_table.settings import StorageSettings
from inference_table.spool import Spool
from inference_table.steps import Step
from tests.inference_table.rows import NOON, batch, commit_all, ids_in_table, query, storage

LATER = NOON + timedelta(hours=2)


@pytest.fixture
def settings(tmp_path: Path) -> StorageSettings:
    found = storage(tmp_path)
    open_or_create_table(found)
    return found


def fill(settings: StorageSettings, commits: int, at: datetime = NOON, prefix: str = "") -> Counter[str]:
    """One file for each commit, a second apart; returns the ids."""
    spool, committer = Spool(settings), Committer(settings)
    ids = [f"{prefix}{number:03d}" for number in range(commits)]
    for number, one in enumerate(ids):
        spool.append(batch([one], at=at + timedelta(seconds=number)), sync=False)
        commit_all(committer)
    spool.close()
    committer.release()
    return Counter(ids)


def files(settings: StorageSettings) -> list[str]:
    found: list[str] = DeltaTable(settings.uri).file_uris()
    return found


def test_an_hour_becomes_one_file(settings: StorageSettings) -> None:
    """The small files of an hour that is over become one, with the same rows in order of time."""
    expected = fill(settings, 12)
    assert len(files(settings)) == 12
    maintenance = Maintenance(settings)
    assert maintenance.compact(LATER)
    assert not maintenance.compact(LATER)
    (merged,) = files(settings)
    assert ids_in_table(settings) == expected
    times = pq.ParquetFile(merged).read(["request_time"])["request_time"].to_pylist()
    assert times == sorted(times)
    assert query(
        settings, "select databricks_request_id from t where request_time = '2025-03-01T12:00:05Z'"
    ) == [{"databricks_request_id": "005"}]


def test_the_present_hour_is_left_alone(settings: StorageSettings) -> None:
    """Where it has few files: they wait until it is over and settled, so that each row is rewritten once."""
    fill(settings, 3)
    maintenance = Maintenance(settings)
    assert not maintenance.compact(NOON + timedelta(minutes=59))
    assert not maintenance.compact(NOON + timedelta(minutes=61))
    assert maintenance.compact(NOON + timedelta(minutes=66))


def test_many_small_files_of_the_present_hour_are_merged(
    settings: StorageSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file makes every commit and read slower, so many don't wait for the end of their hour."""
    monkeypatch.setattr(merge_module, "OPEN_HOUR_FILES", 5)
    expected = fill(settings, 4)
    maintenance = Maintenance(settings)
    now = NOON + timedelta(minutes=1)
    assert not maintenance.compact(now)
    expected += fill(settings, 4, prefix="b")
    assert maintenance.compact(now)
    assert len(files(settings)) == 1
    assert not maintenance.compact(now)
    expected += fill(settings, 2, prefix="c")
    assert maintenance.compact(LATER)
    assert len(files(settings)) == 1
    assert ids_in_table(settings) == expected


def test_hours_and_days_are_not_mixed(settings: StorageSettings) -> None:
    """Each hour has files of its own, so that pruning by time goes on working."""
    expected = fill(settings, 3, NOON, "a") + fill(settings, 3, NOON + timedelta(hours=1), "b")
    expected += fill(settings, 3, NOON + timedelta(days=1), "c")
    maintenance = Maintenance(settings)
    while maintenance.compact(NOON + timedelta(days=2)):
        pass
    assert len(files(settings)) == 3
    assert ids_in_table(settings) == expected


def test_one_step_is_bounded(settings: StorageSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes so many files at most, and the next one goes on."""
    monkeypatch.setattr(merge_module, "STEP_FILES", 4)
    expected = fill(settings, 8)
    maintenance = Maintenance(settings)
    assert maintenance.compact(LATER)
    assert len(files(settings)) == 5
    while maintenance.compact(LATER):
        pass
    assert len(files(settings)) < 4
    assert ids_in_table(settings) == expected


def test_exactly_once_survives(settings: StorageSettings) -> None:
    """Transactions are still there after a merge: what was committed is not committed again."""
    spool, committer = Spool(settings), Committer(settings)
    for one in "abc":
        spool.append(batch([one]), sync=False)
        path = next(spool.root.glob("*/*.arrow"))
        content = path.read_bytes()
        commit_all(committer)
    assert Maintenance(settings).compact(LATER)
    path.write_bytes(content)  # as if the power had failed before the deletion was on disk
    commit_all(committer)
    assert ids_in_table(settings) == {"a": 1, "b": 1, "c": 1}
    assert not path.exists()


def test_commits_beside_a_merge(settings: StorageSettings) -> None:
    """Appends during the merge, and right before its commit, cost neither any rows."""
    expected = fill(settings, 4)
    done = []

    def append(step: Step) -> None:
        if step is Step.COMPACTION_WRITTEN:
            done.append(fill(settings, 2, prefix="late-"))

    assert Maintenance(settings, append).compact(LATER)
    assert ids_in_table(settings) == expected + done[0]
    assert len(files(settings)) == 3


def test_busy_writer_beside_merges(settings: StorageSettings) -> None:
    """While a writer commits as fast as it can, merges succeed or fail whole."""
    expected = fill(settings, 6)
    written: list[Counter[str]] = []
    writer = threading.Thread(
        target=lambda: written.append(fill(settings, 25, NOON + timedelta(hours=5), "w"))
    )
    writer.start()
    maintenance = Maintenance(settings)
    while writer.is_alive():
        try:
            maintenance.compact(LATER)
        except CommitFailedError:
            continue
    writer.join()
    while maintenance.compact(LATER):
        pass
    assert ids_in_table(settings) == expected + written[0]
    assert len(files(settings)) == 26


@pytest.mark.parametrize("by", ["another merge", "a deletion"])
def test_sources_that_vanish(settings: StorageSettings, by: str) -> None:
    """A merge whose sources were removed by somebody else gives up: no row doubles, none comes back."""
    expected = fill(settings, 4)

    def interfere(step: Step) -> None:
        if step is not Step.COMPACTION_WRITTEN:
            return
        if by == "another merge":
            Maintenance(settings).compact(LATER)
        else:
            DeltaTable(settings.uri).delete("databricks_request_id = '002'")
            del expected["002"]

    with pytest.raises(CommitFailedError, match="meanwhile"):
        Maintenance(settings, interfere).compact(LATER)
    assert ids_in_table(settings) == expected
    on_disk = {str(path) for path in Path(settings.uri).glob("*/part-*.parquet")}
    merges = 1 if by == "another merge" else 0
    assert len(on_disk) == 4 + merges, "the merge that gave up has left its file"


def test_files_of_an_older_version_and_of_users(settings: StorageSettings) -> None:
    """Files written before a column was added merge with those written after."""
    fill(settings, 2, prefix="old-")
    newer = batch(["new"]).append_column("guardrail", pa.array(["ok"]))
    Spool(settings).append(newer, sync=False)
    commit_all(Committer(settings))
    assert Maintenance(settings).compact(LATER)
    assert len(files(settings)) == 1
    found = query(settings, "select databricks_request_id, guardrail from t order by 1")
    assert [tuple(row.values()) for row in found] == [("new", "ok"), ("old-000", None), ("old-001", None)]


def test_large_files_are_left_alone(settings: StorageSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is large enough is not written again."""
    fill(settings, 3)
    monkeypatch.setattr(merge_module, "SMALL_BYTES", 100)
    assert not Maintenance(settings).compact(LATER)


def test_step_looks_once_a_minute(settings: StorageSettings) -> None:
    """Called after every commit, it opens the table once a minute, unless there is work left."""
    fill(settings, 3)
    maintenance = Maintenance(settings)
    worked = [maintenance.step(LATER) for _ in range(10)]
    assert worked[0]
    assert len(files(settings)) == 1
    assert not worked[-1]
    fill(settings, 3, prefix="more-")
    assert not maintenance.step(LATER), "its next look is a minute away"


def test_deletion_from_disk_waits_a_week(settings: StorageSettings) -> None:
    """Left-overs are deleted a week after they were written; files that can still be read never."""
    expected = fill(settings, 3)
    sources = [Path(uri) for uri in files(settings)]
    Maintenance(settings).compact(LATER)
    orphan = sources[0].with_name("part-orphan.parquet")
    orphan.write_bytes(sources[0].read_bytes())
    root = Spool(settings).root
    eight_days_ago = time.time() - 8 * 24 * 3600

    def clean() -> None:
        for stamp in root.glob("*.stamp"):
            stamp.unlink()
        maintenance = Maintenance(settings)
        while maintenance.step(LATER):
            pass

    clean()
    assert all(path.exists() for path in [*sources, orphan])
    for path in [*sources, orphan, *map(Path, files(settings))]:
        os.utime(path, (eight_days_ago, eight_days_ago))
    clean()
    assert not orphan.exists()
    assert all(path.exists() for path in sources), "versions that use them can still be opened"
    assert ids_in_table(settings) == expected


def test_merging_many_bytes_is_bounded_in_row_groups(settings: StorageSettings) -> None:
    """Row groups of a merged file are as bounded as those of a commit."""
    spool, committer = Spool(settings), Committer(settings)
    for part in range(3):
        at = NOON + timedelta(seconds=part)
        spool.append(batch([f"{part}-{row}" for row in range(20)], at=at, text="x" * 700_000), sync=False)
        commit_all(committer)
    assert Maintenance(settings).compact(LATER)
    (merged,) = files(settings)
    metadata = pq.ParquetFile(merged).metadata
    assert metadata.num_row_groups > 1
    assert len(ids_in_table(settings)) == 60
