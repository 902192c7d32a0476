"""The spool: what a writer leaves on disk, and what others find there."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from inference_table import spool as spool_module
from inference_table.commit import Committer
from inference_table.disk import FileLock, network_file_system
from inference_table.errors import SegmentError, SpoolError, SpoolFullError
from inference_table.quarantine import set_aside
from inference_table.schema import SCHEMA
from inference_table.spool import (
    Folder,
    Spool,
    folders,
    retry_quarantined,
    spool_root,
    spool_stats,
)
from inference_table.writer import Writer
from tests.inference_table.rows import batch, commit_all, storage
from tests.support import ROOT


def corrupt(path: Path) -> None:
    """Flip one byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def test_nothing_on_disk_before_the_first_record(tmp_path: Path) -> None:
    """A process that has recorded nothing leaves no file."""
    spool = Spool(storage(tmp_path))
    assert spool.spool_id is None
    assert spool.pending() == 0
    spool.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sync", [False, True])
def test_append_and_read(tmp_path: Path, sync: bool) -> None:
    """What is appended is read back, in order, as the same rows, by any Arrow reader."""
    settings = storage(tmp_path)
    spool = Spool(settings)
    first, second = batch(["a", "b"]), batch(["c"])
    assert [spool.append(first, sync=sync), spool.append(second, sync=sync)] == [1, 2]
    (folder,) = folders(spool_root(settings))
    assert folder.spool_id == spool.spool_id
    segments = folder.segments()
    assert [segment.sequence for segment in segments] == [1, 2]
    assert segments[0].read().equals(pa.Table.from_batches([first]))
    assert segments[1].read().equals(pa.Table.from_batches([second]))
    with pa.ipc.open_stream(segments[0].path.read_bytes()) as reader:
        assert reader.schema == SCHEMA
    assert spool.is_pending(1)
    assert spool.pending() == 2


def test_files_are_private(tmp_path: Path) -> None:
    """Other users of the machine can't read what is spooled."""
    settings = storage(tmp_path)
    Spool(settings).append(batch(["a"]), sync=True)
    for path in [settings.spool_dir, *settings.spool_dir.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_default_data_folder_is_kept_out_of_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default data folder carries a .gitignore that ignores all of it."""
    monkeypatch.chdir(tmp_path)
    spool = Spool(storage(tmp_path / "tracelake-data"))
    spool.append(batch(["a"]), sync=False)
    assert tmp_path.joinpath("tracelake-data", ".gitignore").read_text() == "*\n"


def test_one_root_per_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative and an absolute path to one table share a spool; two tables don't."""
    monkeypatch.chdir(tmp_path)
    absolute = storage(tmp_path)
    relative = storage(Path())
    assert spool_root(absolute) == spool_root(relative)
    assert spool_root(absolute) != spool_root(storage(tmp_path / "other"))
    Spool(absolute).append(batch(["a"]), sync=False)
    assert spool_root(absolute).joinpath("URI").read_text().strip() == str(tmp_path / "table")


def test_close_removes_an_empty_folder_only(tmp_path: Path) -> None:
    """After a clean stop a folder is gone if all of it was committed, and has no owner if not."""
    settings = storage(tmp_path)
    full, empty = Spool(settings), Spool(settings)
    full.append(batch(["a"]), sync=False)
    empty.append(batch(["b"]), sync=False)
    left, gone = (Folder(spool_root(settings) / str(one.spool_id)) for one in (full, empty))
    gone.segments()[0].path.unlink()
    assert left.owner_alive()
    assert not left.remove()
    full.close()
    empty.close()
    assert folders(spool_root(settings)) == [left]
    assert not left.owner_alive()
    assert not left.remove(), "there is a segment in it"


def test_owner_is_seen_alive_from_another_process(tmp_path: Path) -> None:
    """A killed owner is dead at once, a living one alive, whoever asks."""
    settings = storage(tmp_path)
    code = (
        "import sys, time; from pathlib import Path\n"
        "from tests.inference_table.rows import batch, storage\n"
        "from inference_table.spool import Spool\n"
        "spool = Spool(storage(Path(sys.argv[1]))); spool.append(batch(['a']), sync=True)\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE)
    assert owner.stdout is not None
    with owner.stdout:
        assert owner.stdout.readline() == b"ready\n"
        (folder,) = folders(spool_root(settings))
        assert folder.owner_alive()
        owner.kill()
        owner.wait()
    assert not folder.owner_alive()


def test_forked_child_writes_its_own_folder(tmp_path: Path) -> None:
    """A forked child gets its own spool id, and does not keep its parent's folder alive."""
    settings = storage(tmp_path)
    spool = Spool(settings)
    spool.append(batch(["parent"]), sync=True)
    parent_folder = folders(spool_root(settings))[0]
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            spool.append(batch(["child"]), sync=True)
            os.write(ready[1], b"1")
            os.read(go[0], 1)
        finally:
            os._exit(0)
    assert os.read(ready[0], 1) == b"1"
    try:
        others = [folder for folder in folders(spool_root(settings)) if folder != parent_folder]
        assert [one.read()["databricks_request_id"].to_pylist() for one in others[0].segments()] == [
            ["child"]
        ]
        assert [segment.sequence for segment in parent_folder.segments()] == [1]
        assert parent_folder.owner_alive()
        spool.close()
        assert not parent_folder.owner_alive()
        assert others[0].owner_alive()
    finally:
        os.write(go[1], b"1")
        os.waitpid(child, 0)
        for fd in (*ready, *go):
            os.close(fd)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "zeros"])
def test_damaged_segment_is_told_from_a_good_one(tmp_path: Path, damage: str) -> None:
    """A flipped bit, a missing end, no content and a hole are all seen before any row is used."""
    spool = Spool(storage(tmp_path))
    spool.append(batch(["a"], text="x" * 10_000), sync=False)
    segment = folders(spool.root)[0].segments()[0]
    content = segment.path.read_bytes()
    half = len(content) // 2
    if damage == "flip":
        corrupt(segment.path)
    else:
        left = {
            "cut": content[:half],
            "empty": b"",
            "zeros": content[:half] + bytes(4096) + content[half + 4096 :],
        }
        segment.path.write_bytes(left[damage])
    with pytest.raises(SegmentError, match="quarantine"):
        segment.read()


def test_a_segment_that_can_not_be_read_now_is_not_damaged(tmp_path: Path) -> None:
    """A failure of the machine is an OSError, so that nobody sets the segment aside for it."""
    spool = Spool(storage(tmp_path))
    spool.append(batch(["a"]), sync=False)
    segment = folders(spool.root)[0].segments()[0]
    segment.path.unlink()
    with pytest.raises(FileNotFoundError):
        segment.read()
    segment.path.mkdir()
    with pytest.raises(IsADirectoryError):
        segment.read()


def test_set_aside_is_no_commit(tmp_path: Path) -> None:
    """Whoever waits for a segment that was set aside learns that it is not committed."""
    spool = Spool(storage(tmp_path))
    spool.append(batch(["a"]), sync=False)
    spool.append(batch(["b"]), sync=False)
    folder = folders(spool.root)[0]
    set_aside(folder.segments()[0])
    assert [segment.sequence for segment in folder.segments()] == [2]
    with pytest.raises(SegmentError, match="set aside"):
        spool.is_pending(1)
    assert spool.is_pending(2)
    assert spool_stats(spool.root).quarantined == 1


def test_retry_gives_readable_segments_a_new_spool_id(tmp_path: Path) -> None:
    """Of the quarantined segments those that can be read now come back, once, under a new spool id."""
    settings = storage(tmp_path)
    spool = Spool(settings)
    for one in ("a", "b", "c"):
        spool.append(batch([one]), sync=False)
    folder = folders(spool.root)[0]
    for segment in folder.segments():
        if segment.sequence == 2:
            corrupt(segment.path)
        set_aside(segment)
    assert retry_quarantined(spool.root) == 2
    assert retry_quarantined(spool.root) == 0
    (new,) = [one for one in folders(spool.root) if one.spool_id != spool.spool_id]
    ids = [segment.read()["databricks_request_id"].to_pylist() for segment in new.segments()]
    assert ids == [["a"], ["c"]]
    assert not new.owner_alive()
    assert spool_stats(spool.root).quarantined == 1


def test_limit_of_the_whole_spool(tmp_path: Path) -> None:
    """The limit counts what all processes have spooled for this table, and names what to do."""
    size = batch(["a"], text="x" * 50_000).nbytes
    settings = storage(tmp_path, max_spool_bytes=3 * size)
    Spool(settings).append(batch(["a"], text="x" * 50_000), sync=False)
    other = Spool(settings)
    other.append(batch(["b"], text="x" * 50_000), sync=False)
    with pytest.raises(SpoolFullError, match="INFERENCE_TABLE_MAX_SPOOL_BYTES"):
        other.append(batch(["c"], text="x" * 50_000), sync=False)
    assert spool_stats(spool_root(settings)).segments == 2


def test_room_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the committer has emptied a full spool, records are taken again."""
    monkeypatch.setattr(spool_module, "RECOUNT_SECONDS", 0.0)
    spool = Spool(storage(tmp_path, max_spool_bytes=20_000))
    spool.append(batch(["a"], text="x" * 4_000), sync=False)
    with pytest.raises(SpoolFullError):
        spool.append(batch(["b"], text="x" * 9_000), sync=False)
    folders(spool.root)[0].segments()[0].path.unlink()
    while True:
        try:
            spool.append(batch(["b"], text="x" * 4_000), sync=False)
            break
        except SpoolFullError:
            continue


def test_disk_is_never_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the share of the disk that is left to others nothing is spooled."""
    monkeypatch.setattr(spool_module, "MIN_FREE_FRACTION", 1.1)
    spool = Spool(storage(tmp_path))
    with pytest.raises(SpoolFullError, match="INFERENCE_TABLE_SPOOL_DIR"):
        spool.append(batch(["a"]), sync=False)


@pytest.mark.parametrize("full", ["the spool", "the disk"])
def test_a_restart_empties_a_full_spool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, full: str
) -> None:
    """Start-up warns of a spool or disk without room and goes on: what starts commits the backlog."""
    settings = storage(tmp_path)
    stopped = Spool(settings)
    stopped.append(batch(["a"]), sync=False)
    stopped.close()
    if full == "the disk":
        monkeypatch.setattr(spool_module, "MIN_FREE_FRACTION", 1.1)
    else:
        settings = storage(tmp_path, max_spool_bytes=100)
    with caplog.at_level("WARNING", logger="tracelake"):
        Writer(settings).check()
    (warning,) = caplog.records
    assert warning.name == "tracelake"
    assert warning.levelname == "WARNING"
    assert full in warning.message
    assert "is full" in warning.message
    assert commit_all(Committer(settings)) == 1
    assert spool_stats(spool_root(settings)).bytes == 0
    caplog.clear()
    monkeypatch.undo()
    Writer(settings).check()
    assert not caplog.records, "there is room again"


def test_check_names_folder_and_remedy(tmp_path: Path) -> None:
    """A spool that can't be written to stops start-up with a message that says where and what to do."""
    tmp_path.joinpath("spool").write_text("a file, where a folder should be")
    spool = Spool(storage(tmp_path))
    with pytest.raises(SpoolError, match="INFERENCE_TABLE_SPOOL_DIR") as caught:
        spool.check()
    assert str(spool.root) in str(caught.value)


def test_check_leaves_a_good_spool_alone(tmp_path: Path) -> None:
    """Checking a spool twice, and beside records, changes nothing in it."""
    spool = Spool(storage(tmp_path))
    spool.check()
    spool.append(batch(["a"]), sync=False)
    before = sorted(spool.root.rglob("*"))
    Spool(spool.settings).check()
    assert sorted(spool.root.rglob("*")) == before


def test_network_file_systems_are_recognised(tmp_path: Path) -> None:
    """The nearest mount decides; of two on one folder the later one."""
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "1 0 8:1 / / rw - ext4 /dev/sda rw\n"
        "2 1 0:1 / /mnt/share rw shared:1 - nfs4 server:/export rw\n"
        "3 2 8:2 / /mnt/share/disk rw - xfs /dev/sdb rw\n"
        "4 1 0:2 / /mnt/with\\040space rw - cifs //server rw\n"
        "5 1 0:3 / /mnt/covered rw - nfs server:/x rw\n"
        "6 1 8:3 / /mnt/covered rw - ext4 /dev/sdc rw\n"
    )
    assert network_file_system(Path("/mnt/share/spool"), mounts) == "nfs4"
    assert network_file_system(Path("/mnt/with space/spool"), mounts) == "cifs"
    for local in ("/home", "/mnt/share/disk/spool", "/mnt/shared", "/mnt/covered"):
        assert network_file_system(Path(local), mounts) is None, local
    assert network_file_system(tmp_path, tmp_path / "no-proc-here") is None


def test_folder_removed_by_hand(tmp_path: Path) -> None:
    """Removing a live folder loses what was in it, is told to who waits, and the next record is spooled."""
    spool = Spool(storage(tmp_path))
    lost = spool.append(batch(["a"]), sync=False)
    folder = folders(spool.root)[0].path
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    kept = spool.append(batch(["b"]), sync=False)
    assert spool.is_pending(kept)
    with pytest.raises(SegmentError, match="lost"):
        spool.is_pending(lost)


def test_lock_excludes(tmp_path: Path) -> None:
    """One holder at a time, in one process as between two; a released lock is free."""
    path = tmp_path / "lock"
    assert FileLock.is_free(path)
    first, second = FileLock(path), FileLock(path)
    assert first.acquire()
    assert first.acquire(), "again is no error"
    assert not second.acquire()
    assert not FileLock.is_free(path)
    first.release()
    assert FileLock.is_free(path)
    assert second.acquire()
    second.release()
