"""Draining a spool: what processes that are dead have left there is committed, by nobody but this process.

For after a server is gone: a pod that was scaled away, a machine that is taken out of service. It is the
committer of commit.py that commits, so each row reaches the table exactly once, however often a spool is
drained, by how many at once, and whether a server spools there meanwhile.
"""

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deltalake.exceptions import DeltaError

from inference_table.commit import CommitResult, Committer
from inference_table.disk import network_file_system
from inference_table.errors import SpoolError, TableError
from inference_table.folder import NEW, folders, spool_stats
from inference_table.segment import SUFFIX
from inference_table.settings import StorageSettings
from inference_table.spool import URI, retry_quarantined, spool_root

__all__ = ["Drained", "SpooledTable", "drain", "spooled_tables"]

WAIT_SECONDS: Final = 30.0
"""How long to wait for another process that commits: some turns of one that is busy."""
POLL_SECONDS: Final = 0.1
ATTEMPTS: Final = 3
"""How often what may pass (a disk's hiccup, a commit that others were faster with) is tried."""
RETRY_SECONDS: Final = 1.0
ROOT: Final = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Drained:
    """What became of the rows that were spooled for one table.

    Attributes:
        uri: the table.
        rows: committed by this process, ``segments`` files of ``bytes`` in all.
        elsewhere: segments that another process has committed meanwhile.
        left: segments of dead processes that are still there; 0 after a complete drain.
        left_bytes: their size.
        locked: whether another process was the one that commits, all the time.
        alive: segments of processes that run, which commit them themselves.
        quarantined: segments that can't be read, kept in the folder ``quarantine``.
    """

    uri: str
    rows: int = 0
    segments: int = 0
    bytes: int = 0
    elsewhere: int = 0
    left: int = 0
    left_bytes: int = 0
    locked: bool = False
    alive: int = 0
    quarantined: int = 0


@dataclass(frozen=True, slots=True)
class SpooledTable:
    """A table that something was spooled for: its ``uri``, None where it isn't noted, and the ``root``."""

    uri: str | None
    root: Path

    @property
    def segments(self) -> int:
        """How many segments wait."""
        return spool_stats(self.root).segments


def spooled_tables(spool_dir: Path) -> list[SpooledTable]:
    """The tables that a spool has folders for.

    Raises:
        SpoolError: there is no such folder, or it can't be read.
    """
    try:
        roots = sorted(path for path in spool_dir.iterdir() if path.is_dir() and ROOT.fullmatch(path.name))
        return [SpooledTable(noted_uri(root), root) for root in roots]
    except OSError as error:
        raise SpoolError(
            f"cannot read the spool '{spool_dir}': {error.strerror}; give the folder that is the server's "
            "INFERENCE_TABLE_SPOOL_DIR, and run as the same user"
        ) from error


def noted_uri(root: Path) -> str | None:
    """The table that the spool's folder says it is of, where that is true."""
    try:
        uri = root.joinpath(URI).read_text(encoding="utf-8").removesuffix("\n")
    except FileNotFoundError:
        return None
    if not uri or spool_root(StorageSettings(uri=uri, spool_dir=root.parent)).name != root.name:
        return None
    return uri


def drain(settings: StorageSettings, wait_seconds: float = WAIT_SECONDS) -> Drained:
    """Commit what dead processes have spooled for a table on this machine. Doesn't create the table.

    Segments that could not be read and now can are committed too. Nothing is lost by an error: the same can
    be done again.

    Args:
        settings: which table, and where the spool is.
        wait_seconds: how long to wait while another process is the one that commits. It commits for the dead
            as well, so that there may be nothing left to do.

    Raises:
        TableNotFoundError: there is no such table.
        TableError: the table can't be reached or written to, or was replaced.
        SpoolError: the spool can't be read, or is on a network file system.
    """
    root = spool_root(settings)
    if not root.is_dir():
        return Drained(uri=settings.uri)
    if kind := network_file_system(root):
        raise SpoolError(
            f"cannot drain the spool {root}: {kind} is a network file system, where locks may mean nothing; "
            "copy the folder to a local disk and drain it there"
        )
    try:
        return drain_root(root, settings, wait_seconds)
    except OSError as error:
        raise SpoolError(
            f"cannot drain the spool {root}: {error}; run as the user that serves, and see to the disk"
        ) from error


def drain_root(root: Path, settings: StorageSettings, wait_seconds: float) -> Drained:
    found = len(orphans(root))
    committer = Committer(settings)
    try:
        is_ours = acquired(committer, time.monotonic() + wait_seconds)
        results = commit_orphans(committer) if is_ours else []
    finally:
        committer.release()
    left = orphans(root)
    stats = spool_stats(root)
    return Drained(
        uri=settings.uri,
        rows=sum(result.rows for result in results),
        segments=sum(result.segments for result in results),
        bytes=sum(result.bytes for result in results),
        elsewhere=0 if results else max(0, found - len(left)),
        left=len(left),
        left_bytes=sum(left.values()),
        locked=not is_ours,
        alive=max(0, stats.segments - len(left)),
        quarantined=stats.quarantined,
    )


def orphans(root: Path) -> dict[Path, int]:
    """Segments of dead processes, and their sizes in bytes."""
    found = [segment for one in folders(root) if not one.owner_alive() for segment in one.segments()]
    sizes = {segment.path: segment.size for segment in found}
    # What was given back from quarantine by a process that died then; it is adopted after a minute.
    return sizes | {path: path.stat().st_size for path in root.glob(f"{NEW}*/*{SUFFIX}")}


def acquired(committer: Committer, deadline: float) -> bool:
    """Become the one that commits; False where there is nothing left to do, or no time."""
    while not committer.acquire():
        if not orphans(committer.root) or time.monotonic() >= deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def commit_orphans(committer: Committer) -> list[CommitResult]:
    """Commit until nothing is left of dead processes."""
    results: list[CommitResult] = []
    for attempt in range(1, ATTEMPTS + 1):
        try:
            retry_quarantined(committer.root)
            while (result := committer.commit_once()) is not None:
                results.append(result)
                if not orphans(committer.root):
                    break  # a server that spools meanwhile would keep us here forever
            break
        except (OSError, MemoryError, DeltaError) as error:
            if attempt == ATTEMPTS:
                raise TableError(
                    f"cannot drain the spool {committer.root} into the table {committer.settings.uri}: "
                    f"{type(error).__name__}: {error}; its rows are kept, so see to it and drain again"
                ) from error
            time.sleep(RETRY_SECONDS)
    return results
