"""The folders of a spool: making, listing and removing them. What holds of them stands in spool.py."""

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from inference_table.disk import FileLock, sync_dir, write_durably
from inference_table.errors import SpoolError
from inference_table.ids import uuid7
from inference_table.segment import SUFFIX, Segment

__all__ = [
    "Folder",
    "SpoolStats",
    "adopt_abandoned",
    "folders",
    "new_folder",
    "publish",
    "remove_empty",
    "spool_stats",
]

ABANDONED_SECONDS: Final = 60.0
"""Age from which a ``.new-`` folder that nobody holds is a crash's, not one between mkdir and lock."""

LOCK: Final = "lock"
START: Final = "start"
QUARANTINE: Final = "quarantine"
NEW: Final = ".new-"
TOMBSTONE: Final = ".gone"


@dataclass(frozen=True, slots=True)
class Folder:
    """What one process has spooled."""

    path: Path

    @property
    def spool_id(self) -> str:
        return self.path.name

    def segments(self) -> list[Segment]:
        """What is there now, by sequence. No snapshot: n + 1 may be seen without n."""
        entries = list(scan(self.path))
        gone = tombstones(entries)
        found = []
        for entry in entries:
            sequence = parse_sequence(entry.name, SUFFIX)
            if sequence is None or sequence in gone:
                continue
            try:
                stat = entry.stat()
            except FileNotFoundError:
                continue
            found.append(Segment(sequence, Path(entry.path), stat.st_size, stat.st_mtime))
        return sorted(found, key=lambda segment: segment.sequence)

    def tombstones(self) -> frozenset[int]:
        """Sequences that were set aside."""
        return tombstones(scan(self.path))

    @property
    def start(self) -> int | None:
        """The first sequence that concerns the present table; None: whichever is the first there."""
        try:
            text = self.path.joinpath(START).read_text(encoding="utf-8")
        except FileNotFoundError:
            return 1
        return int(text) if text.isdecimal() else None

    def set_start(self, sequence: int | None) -> None:
        """Set :attr:`start`, durably."""
        write_durably(self.path / START, "any" if sequence is None else str(sequence))

    def owner_alive(self) -> bool:
        return not FileLock.is_free(self.path / LOCK)

    def remove(self) -> bool:
        """Remove the folder of a dead owner, unless there are segments in it."""
        try:
            with FileLock(self.path / LOCK) as lock:
                return lock.acquire() and remove_empty(self.path)
        except FileNotFoundError:
            return False


def tombstone_name(sequence: int) -> str:
    return f"{sequence:020d}{TOMBSTONE}"


def scan(path: Path) -> Iterator["os.DirEntry[str]"]:
    """Entries of a folder, none if it is gone."""
    try:
        with os.scandir(path) as entries:
            yield from entries
    except FileNotFoundError:
        return


def segment_name(sequence: int) -> str:
    return f"{sequence:020d}{SUFFIX}"


def parse_sequence(name: str, suffix: str) -> int | None:
    stem = name.removesuffix(suffix)
    return int(stem) if stem != name and stem.isdecimal() else None


def tombstones(entries: Iterable["os.DirEntry[str]"]) -> frozenset[int]:
    numbers = (parse_sequence(entry.name, TOMBSTONE) for entry in entries)
    return frozenset(number for number in numbers if number is not None)


def folders(root: Path) -> list[Folder]:
    """The folders of all processes that have spooled, oldest first."""
    names = (entry.name for entry in scan(root) if entry.is_dir())
    return [Folder(root / name) for name in sorted(names) if name != QUARANTINE and not name.startswith(".")]


def remove_empty(path: Path) -> bool:
    """Remove a folder whose lock the caller holds, unless there are segments in it."""
    entries = list(scan(path))
    # One with a tombstone counts: a crash has left it half set aside.
    if any(parse_sequence(entry.name, SUFFIX) is not None for entry in entries):
        return False
    for entry in entries:
        Path(entry.path).unlink(missing_ok=True)
    path.rmdir()
    return True


@dataclass(frozen=True, slots=True)
class SpoolStats:
    """What a spool holds: ``bytes`` and ``segments`` that wait, and how many are in ``quarantined``.

    ``oldest_unix_seconds`` is when the oldest waiting segment was written, None if none waits.
    """

    bytes: int
    segments: int
    oldest_unix_seconds: float | None
    quarantined: int


def spool_stats(root: Path) -> SpoolStats:
    """Count what is on disk now."""
    waiting = [segment for folder in folders(root) for segment in folder.segments()]
    return SpoolStats(
        bytes=sum(segment.size for segment in waiting),
        segments=len(waiting),
        oldest_unix_seconds=min((segment.mtime for segment in waiting), default=None),
        quarantined=sum(1 for _ in scan(root / QUARANTINE)),
    )


def quarantined_bytes(root: Path) -> int:
    return sum(entry.stat().st_size for entry in scan(root / QUARANTINE))


def new_folder(root: Path) -> tuple[Path, FileLock]:
    """Make a folder for a new spool id, not visible yet, and hold its lock."""
    folder = root / f"{NEW}{uuid7()}"
    folder.mkdir(mode=0o700)
    lock = FileLock(folder / LOCK)
    if not lock.acquire():
        raise SpoolError(f"cannot lock the new spool folder {folder}: another process holds it; try again")
    return folder, lock


def publish(new: Path) -> Path:
    """Give a new folder its name, durably."""
    folder = new.with_name(new.name.removeprefix(NEW))
    new.rename(folder)
    sync_dir(folder.parent)
    return folder


def adopt_abandoned(root: Path) -> None:
    """Finish or remove the new folders of processes that died while they made them."""
    for entry in scan(root):
        if not entry.name.startswith(NEW) or entry.stat().st_mtime > time.time() - ABANDONED_SECONDS:
            continue
        path = Path(entry.path)
        with FileLock(path / LOCK) as lock:
            if lock.acquire() and not remove_empty(path):
                publish(path)
