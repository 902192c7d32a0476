"""The named points between a record and its row, at which a process may be killed without harm.

Spool and committer call ``on_step`` with each as they pass it; tests kill themselves there.
"""

from enum import StrEnum

__all__ = ["Step", "ignore_step"]


class Step(StrEnum):
    """What has just happened."""

    FOLDER_CREATED = "folder-created"
    """The spool folder exists under a temporary name, locked."""
    FOLDER_RENAMED = "folder-renamed"
    """The spool folder has its name; it may not survive a power failure yet."""
    SEGMENT_WRITTEN = "segment-written"
    """The segment is written under a temporary name."""
    SEGMENT_SYNCED = "segment-synced"
    """Strict only: its content survives a power failure."""
    SEGMENT_RENAMED = "segment-renamed"
    """The segment has its name: it is spooled."""
    SEGMENT_DURABLE = "segment-durable"
    """Strict only: its name survives a power failure; the reply may leave."""
    TOMBSTONE_WRITTEN = "tombstone-written"
    """The gap is closed that a segment will leave, because it can't be read."""
    SEGMENT_SET_ASIDE = "segment-set-aside"
    """The segment is in quarantine."""
    BATCH_READ = "batch-read"
    """All segments of the batch are checked; nothing is written."""
    ATTEMPT_NOTED = "attempt-noted"
    """The names of the data files to come are noted, for whoever has to clean up."""
    DATA_WRITTEN = "data-written"
    """The data files are written, in no commit yet."""
    DATA_SYNCED = "data-synced"
    """Local tables only: they survive a power failure."""
    COMMITTED = "committed"
    """The Delta commit is done."""
    COMMIT_SYNCED = "commit-synced"
    """Local tables only: it survives a power failure."""
    COMMIT_VERIFIED = "commit-verified"
    """A freshly opened table shows it."""
    SEGMENT_DELETED = "segment-deleted"
    """One of the segments is deleted; once for each."""
    FOLDER_REMOVED = "folder-removed"
    """The folder of a dead owner is removed."""
    COMPACTION_WRITTEN = "compaction-written"
    """The merged data file is written, in no commit yet."""
    COMPACTION_COMMITTED = "compaction-committed"
    """It has replaced the small ones in the table."""


def ignore_step(step: Step) -> None:
    """What runs where nobody watches."""
