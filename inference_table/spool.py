"""The spool: records on local disk, from the moment they survive the process until they are in the table.

Layout::

    <spool_dir>/<hash of the table's URI>/        the root: one per table and machine
        URI                                       for humans
        <spool id>/                               one per process that writes
            lock                                  held by its owner
            <sequence>.arrow                      a segment
            <sequence>.gone                       a tombstone: the segment was set aside
            start                                 the first sequence that concerns the present table
        .new-<spool id>/                          a folder being made
        quarantine/<spool id>-<sequence>.arrow    segments that can't be read
        TABLE_ID, attempt.json, committer.lock    the committer's, see commit.py

What holds:

- A spool id is a fresh UUIDv7 per process, made at the first record; a forked child makes its own. It is
  never used again.
- Sequences of a folder begin at ``start`` (1 without) and have no gaps when written: a number is taken only
  by the rename.
- A segment is written under a temporary name and renamed. It never changes after that. With ``sync``,
  content, name and the names of all folders above are on disk before :meth:`Spool.append` returns.
- Who holds a folder's lock owns it. The folder is made under a ``.new-`` name with its lock held and then
  renamed, so a folder that can be seen is never without an owner before it has had one.
- Only a lock holder removes a folder, and only an empty one (tombstones don't count).
- A segment is set aside by a durable tombstone first and a rename second: the owner that finds neither
  segment nor tombstone may take it as committed. Tombstones live as long as their folder.
- Retrying a quarantined segment renames it into a new folder: it is in one place at any time.
"""

import hashlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pyarrow as pa

from inference_table.disk import (
    FileLock,
    free_fraction,
    make_data_dirs,
    network_file_system,
    sync_dir,
    sync_file,
    write_durably,
)
from inference_table.errors import SegmentError, SpoolError, SpoolFullError
from inference_table.folder import (
    Folder,
    SpoolStats,
    folders,
    new_folder,
    publish,
    quarantined_bytes,
    remove_empty,
    segment_name,
    spool_stats,
    tombstone_name,
)
from inference_table.quarantine import retry_quarantined
from inference_table.segment import Segment, write_segment
from inference_table.settings import StorageSettings
from inference_table.steps import Step, ignore_step

__all__ = [
    "Folder",
    "Segment",
    "Spool",
    "SpoolStats",
    "folders",
    "retry_quarantined",
    "spool_root",
    "spool_stats",
]

logger: Final = logging.getLogger("tracelake")

MIN_FREE_FRACTION: Final = 0.05
"""Part of the disk that is left to others: a full disk stops more than us."""
RECOUNT_SECONDS: Final = 0.5
"""How old the count of the spool's bytes may be: other processes fill it, the committer empties it."""

URI: Final = "URI"


def spool_root(settings: StorageSettings) -> Path:
    """The folder that holds everything spooled on this machine for this table."""
    key = hashlib.sha256(settings.uri.encode()).hexdigest()[:16]
    return settings.spool_dir / key


class Spool:
    """The one folder that this process writes; made at the first :meth:`append`. For one thread."""

    def __init__(self, settings: StorageSettings, on_step: Callable[[Step], None] = ignore_step) -> None:
        self.settings = settings
        self.root = spool_root(settings)
        self._on_step = on_step
        self._folder: Path | None = None
        self._lock: FileLock | None = None
        self._first = 1
        self._last = 0
        self._used = 0
        self._recount_at = 0.0

    @property
    def spool_id(self) -> str | None:
        return self._folder.name if self._folder else None

    def check(self) -> None:
        """Check at start-up that the spool can be written to.

        A full one is only warned of: what starts may be what commits the backlog, and makes room.

        Raises:
            SpoolError: it can't; names the folder and the remedy.
        """
        remedy = "set INFERENCE_TABLE_SPOOL_DIR to a folder on a local disk"
        probe = self.root / f".probe-{os.getpid()}"
        try:
            self._make_root()
            write_durably(probe, "")
            probe.unlink()
        except OSError as error:
            raise SpoolError(
                f"cannot write to the spool {self.root}: {error.strerror}; make it writable or {remedy}"
            ) from error
        if kind := network_file_system(self.root):
            raise SpoolError(f"cannot spool to {self.root}: {kind} is a network file system; {remedy}")
        try:
            self._check_room(0)
        except SpoolFullError as error:
            logger.warning("%s; new records are dropped until there is room", error)

    def append(self, batch: pa.RecordBatch, *, sync: bool) -> int:
        """Write records as one segment and return its sequence.

        Args:
            batch: the records, with the table's columns.
            sync: whether to wait until they survive a power failure.

        Raises:
            SpoolFullError: the limit of the spool, or of the disk, is reached.
            OSError: the disk failed; nothing was spooled, the same may be tried again.
            SpoolError: the records are spooled but may not survive a power failure. Don't try again: the rows
                would come twice.
        """
        self._check_room(batch.nbytes)
        folder = self._own_folder()
        sequence = self._last + 1
        temporary = folder / f".{sequence:020d}.tmp"
        try:
            write_segment(temporary, batch)
            self._on_step(Step.SEGMENT_WRITTEN)
            if sync:
                sync_file(temporary)
                self._on_step(Step.SEGMENT_SYNCED)
            size = temporary.stat().st_size
            temporary.rename(folder / segment_name(sequence))
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        self._last = sequence
        self._used += size
        self._on_step(Step.SEGMENT_RENAMED)
        if sync:
            self._sync_name(folder, sequence)
        return sequence

    def _sync_name(self, folder: Path, sequence: int) -> None:
        try:
            sync_dir(folder)
        except OSError as error:
            raise SpoolError(
                f"segment {sequence} in {folder} is spooled, but could not be synced: {error}"
            ) from error
        self._on_step(Step.SEGMENT_DURABLE)

    def is_pending(self, sequence: int) -> bool:
        """Whether a segment is not yet durably in the table.

        Raises:
            SegmentError: it never will be, unless retried: it can't be read and was set aside.
        """
        folder = self._folder
        if folder is None or sequence < self._first:
            raise SegmentError(f"segment {sequence} is lost: somebody removed its folder from {self.root}")
        if folder.joinpath(segment_name(sequence)).exists():
            return True
        # In this order: the tombstone comes before the segment goes.
        if folder.joinpath(tombstone_name(sequence)).exists():
            raise SegmentError(f"segment {sequence} of {folder} can't be read and was set aside; retry it")
        return False

    def pending(self) -> int:
        """How many segments of this process are not yet durably in the table."""
        return len(Folder(self._folder).segments()) if self._folder else 0

    def close(self) -> None:
        """Give up the folder; what is in it will be committed as that of a dead owner."""
        if self._lock is not None and self._lock.is_held and self._folder is not None:
            if self._folder.is_dir():
                remove_empty(self._folder)
            self._lock.release()
        self._folder = self._lock = None

    def _own_folder(self) -> Path:
        """The folder, made anew at the first record, in a forked child, and if somebody removed it."""
        folder, lock = self._folder, self._lock
        if folder is not None and lock is not None and lock.is_held and folder.is_dir():
            return folder
        self._make_root()
        new, self._lock = new_folder(self.root)
        self._on_step(Step.FOLDER_CREATED)
        self._first = self._last + 1
        if self._first > 1:
            Folder(new).set_start(self._first)
        self._folder = publish(new)
        self._on_step(Step.FOLDER_RENAMED)
        return self._folder

    def _make_root(self) -> None:
        make_data_dirs(self.root)
        uri = self.root / URI
        if not uri.exists():
            write_durably(uri, self.settings.uri + "\n")

    def _check_room(self, nbytes: int) -> None:
        if time.monotonic() >= self._recount_at:
            started = time.monotonic()
            self._used = spool_stats(self.root).bytes + quarantined_bytes(self.root)
            # A long backlog takes long to count: at most a tenth of the time goes there.
            self._recount_at = time.monotonic() + max(RECOUNT_SECONDS, 10 * (time.monotonic() - started))
        limit = self.settings.max_spool_bytes
        if self._used + nbytes > limit:
            raise SpoolFullError(
                f"the spool {self.root} is full: {self._used} of {limit} bytes wait for the "
                f"table {self.settings.uri}; see why it can't be written to, or raise "
                "INFERENCE_TABLE_MAX_SPOOL_BYTES"
            )
        free = free_fraction(self.root if self.root.is_dir() else existing_parent(self.root))
        if free < MIN_FREE_FRACTION:
            raise SpoolFullError(
                f"the disk of the spool {self.root} is full: {free:.1%} is free, {MIN_FREE_FRACTION:.0%} is "
                "left to others; free some, or set INFERENCE_TABLE_SPOOL_DIR to a folder on another disk"
            )


def existing_parent(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.is_dir())
