"""The newest version of a table: kept while it is, opened anew once it is not."""

import os
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from deltalake import DeltaTable

from inference_table.commit import Committer, open_or_create_table
from inference_table.errors import TableNotFoundError
from inference_table.scan import NewestSnapshot
from inference_table.settings import StorageSettings
from inference_table.spool import Spool
from inference_table.table import InferenceTable
from tests.inference_table.rows import batch, commit_all, storage

LONG_AGO = datetime(2025, 1, 1, tzinfo=UTC).timestamp()


def commit(settings: StorageSettings, *ids: str) -> None:
    """A commit of its own, which looks as if it were old."""
    open_or_create_table(settings)
    spool, committer = Spool(settings), Committer(settings)
    spool.append(batch(ids), sync=False)
    commit_all(committer)
    committer.release()
    spool.close()
    for path in (settings.local_path / "_delta_log").iterdir():
        os.utime(path, (LONG_AGO, LONG_AGO))


@pytest.fixture
def settings(tmp_path: Path) -> StorageSettings:
    found = storage(tmp_path)
    commit(found, "0195-1")
    return found


def test_a_version_is_opened_once_while_it_is_the_newest(settings: StorageSettings) -> None:
    """Reads in between commits share what was opened; a commit is seen by the next read."""
    newest = NewestSnapshot(settings)
    first = newest.open()
    assert newest.open() is first
    commit(settings, "0195-2")
    assert newest.open().version == first.version + 1
    assert newest.open() is not first


def test_a_log_that_has_just_changed_is_not_relied_on(settings: StorageSettings) -> None:
    """Its files' times could not tell it from what replaces it within the same moment."""
    os.utime(settings.local_path / "_delta_log" / f"{1:020}.json")
    newest = NewestSnapshot(settings)
    assert newest.open() is not newest.open()


def test_a_table_that_replaces_another_is_seen(settings: StorageSettings) -> None:
    """Of the same version, at the same place; and so is that there is none any more."""
    table = InferenceTable(settings.uri, spool_dir=settings.spool_dir)
    assert table.get("0195-1") is not None
    version = table.version
    shutil.rmtree(settings.local_path)
    with pytest.raises(TableNotFoundError):
        table.get("0195-1")
    commit(replace(settings, spool_dir=settings.spool_dir.with_name("other")), "0195-3")
    assert table.version == version
    assert table.get("0195-3") is not None and table.get("0195-1") is None


def test_a_log_that_was_cleaned_is_read(settings: StorageSettings) -> None:
    """With the newest commit in the checkpoint alone nothing says that it is the newest: it is opened."""
    newest = NewestSnapshot(settings)
    version = newest.open().version
    DeltaTable(settings.uri).create_checkpoint()
    for path in (settings.local_path / "_delta_log").glob("*.json"):
        path.unlink()
    assert newest.open().version == version
    assert newest.open() is not newest.open()
