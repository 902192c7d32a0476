"""Maintenance of the table: few large files instead of many small ones, and an end to what is no longer used.

At one commit a second a table gains 86,400 files a day. Once an hour of requests is over and settled, its
small files are merged, a bounded number of bytes at a time, so that commits are not held up; many small files
of an hour before it is over, because each commit takes longer for every one of them.

What holds:

- A merge adds no row and loses none, whatever else happens to the table. delta-rs does not notice when two
  commits remove the same file (its own ``optimize.compact`` neither: two at once double the rows). So the
  merge is committed against a version opened after the file was written, in which all its sources are still
  there, with no retry: if anybody commits in between, it fails and is tried again.
- That keeps any number of our merges apart, on any number of machines. It can't keep others from ours: never
  run ``optimize.compact`` or ``optimize.z_order`` on a table that a server of ours writes to. They commit,
  without a change of data, over a merge that has removed the same files meanwhile: rows would double.
- Transactions of spool ids are untouched: they are not in the data files.
- A merge of a local table that fails removes its file. On an object store a request may take effect after its
  failure was seen, so the file is left to the vacuum.
- Local tables are looked after in the committer's thread. On an object store each file that delta-rs opens
  for pyarrow holds the GIL for a round trip, and requests would wait; so a child process does the work
  (:mod:`inference_table.maintenance_process`). There is one at a time. It does a bounded amount of work, and
  ends when its parent has.
- Files are deleted a week after they were written, and only if no version of the table that can still be
  opened uses them. What crashes have left goes the same way.
"""

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Final

from inference_table import metrics
from inference_table.cleaning import clean
from inference_table.delta import open_table
from inference_table.errors import TableError
from inference_table.maintenance_process import MERGE, MaintenanceProcess
from inference_table.merge import OPEN_HOUR_FILES, merge_some, mergeable
from inference_table.settings import StorageSettings
from inference_table.spool import spool_root
from inference_table.steps import Step, ignore_step

__all__ = ["Maintenance"]

CHECK_SECONDS: Final = 60.0
"""Pause between two looks for work, which open the table (tens of ms) and list its files."""
CLEANING_SECONDS: Final[Mapping[str, float]] = {
    "log": 3600.0,
    # It lists all files of the table.
    "vacuum": 24 * 3600.0,
}
"""Pause between two clean-ups of the same kind on this machine."""


class Maintenance:
    """Keeps the table small. For one thread, that of the committer.

    Args:
        settings: which table.
        on_step: called with each point passed, but for what a child process does.
    """

    def __init__(self, settings: StorageSettings, on_step: Callable[[Step], None] = ignore_step) -> None:
        self.settings = settings
        self._on_step = on_step
        self._next_look = 0.0
        self._calls = 0
        self._child: MaintenanceProcess | None = None

    def step(self, now: datetime | None = None) -> bool:
        """Do one bounded piece of work if any is due, or start its process; returns whether there was any.

        Cheap to call after each commit: it looks for work once a minute or in some hundred calls, and goes on
        at once where it found some. While a child process is at work there is nothing to do.

        Raises:
            TableError: the table can't be reached or may not be written to, or the last child process failed.
            OSError, deltalake.exceptions.DeltaError: something failed; the table is as good as before.
        """
        if self._child is not None and not self._has_ended(self._child):
            return False
        self._calls += 1
        if time.monotonic() < self._next_look and self._calls < OPEN_HOUR_FILES:
            return False
        self._next_look, self._calls = time.monotonic() + CHECK_SECONDS, 0
        worked = False
        try:
            worked = self.compact(now or datetime.now(UTC))
        finally:
            # Merges that fail for ever must not keep cleaning from its turn.
            worked = worked or self._clean()
        if worked and self._child is None:
            self._next_look = 0.0
        return worked

    def compact(self, now: datetime) -> bool:
        """Merge some small files of one hour; returns whether there were any.

        On an object store this starts the child process that does it.
        """
        if not self.settings.is_local:
            found = any(mergeable(open_table(self.settings), now))
            if found:
                self._child = MaintenanceProcess(self.settings, MERGE)
            return found
        merged = merge_some(self.settings, now, self._on_step)
        metrics.COMPACTIONS.inc(merged)
        return merged

    def close(self) -> None:
        """End the child process, whatever it is at: what it has committed holds, the rest is left."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def _clean(self) -> bool:
        job = next((job for job in CLEANING_SECONDS if self._is_due(job)), None)
        if job is not None and self.settings.is_local:
            clean(self.settings, job)
        elif job is not None:
            self._child = MaintenanceProcess(self.settings, job)
        return job is not None

    def _is_due(self, job: str) -> bool:
        """Whether it is time again on this machine; the next time is counted from now, even if it fails."""
        stamp = spool_root(self.settings) / f"{job}.stamp"
        if not stamp.parent.is_dir():
            return False
        if stamp.exists() and time.time() - stamp.stat().st_mtime < CLEANING_SECONDS[job]:
            return False
        stamp.touch()
        return True

    def _has_ended(self, child: MaintenanceProcess) -> bool:
        code = child.poll()
        if code is None:
            return False
        self._child = None
        merges, last_words = child.close()
        metrics.COMPACTIONS.inc(merges)
        if code:
            raise TableError(
                f"the process that does the {child.job} of {self.settings.uri} ended with {code}: "
                f"{last_words}; the table is as good as before, and it is tried again"
            )
        if merges:
            self._next_look = 0.0
        return True
