"""Segments that can't be read: set aside, out of the way of others, and retried. See spool.py."""

import os
from collections.abc import Callable
from pathlib import Path

from inference_table import metrics
from inference_table.disk import create_private, make_private_dirs, sync_dir
from inference_table.errors import SegmentError
from inference_table.folder import QUARANTINE, Folder, new_folder, publish, segment_name, tombstone_name
from inference_table.segment import SUFFIX, Segment, read_segment
from inference_table.steps import Step, ignore_step

__all__ = ["finish_set_aside", "retry_quarantined", "set_aside"]


def set_aside(segment: Segment, on_step: Callable[[Step], None] = ignore_step) -> None:
    """Move a segment that can't be read out of the way. Repeating it after a crash finishes the move."""
    folder = segment.path.parent
    quarantine = folder.parent / QUARANTINE
    make_private_dirs(quarantine)
    os.close(create_private(folder / tombstone_name(segment.sequence)))
    sync_dir(folder)
    on_step(Step.TOMBSTONE_WRITTEN)
    segment.path.rename(quarantine / f"{folder.name}-{segment.path.name}")
    sync_dir(quarantine)
    sync_dir(folder)
    on_step(Step.SEGMENT_SET_ASIDE)
    metrics.QUARANTINED.inc()


def finish_set_aside(folder: Folder) -> None:
    """Finish what a crash left between tombstone and rename."""
    for sequence in folder.tombstones():
        path = folder.path / segment_name(sequence)
        if path.exists():
            stat = path.stat()
            set_aside(Segment(sequence, path, stat.st_size, stat.st_mtime))


def retry_quarantined(root: Path) -> int:
    """Give quarantined segments that can be read now to the committer; returns how many."""
    readable = [path for path in sorted(root.joinpath(QUARANTINE).glob(f"*{SUFFIX}")) if is_readable(path)]
    if not readable:
        return 0
    new, lock = new_folder(root)
    with lock:
        moved = 0
        for path in readable:
            path.rename(new / segment_name(moved + 1))
            moved += 1
        sync_dir(new)
        sync_dir(root / QUARANTINE)
        publish(new)
    return moved


def is_readable(path: Path) -> bool:
    try:
        read_segment(path)
    except SegmentError:
        return False
    return True
