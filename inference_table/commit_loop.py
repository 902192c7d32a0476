"""The loop of the commit thread: commit, compact, pause; back off while the table is away."""

import random
import threading
import time
from typing import Final

from inference_table import metrics
from inference_table.commit import TABLE_ID, Committer, open_or_create_table
from inference_table.compaction import Maintenance
from inference_table.reporting import Reporter
from inference_table.settings import StorageSettings
from inference_table.spool import Spool

__all__ = ["CommitLoop"]

MAX_BACKOFF_SECONDS: Final = 5.0
"""Longest pause after a failed commit: how stale the table may be once it is reachable again."""
LAST_PAUSE_SECONDS: Final = 0.05
"""Pause between two attempts at a clean stop, when another process may be the one that commits."""


class CommitLoop:
    """Commits what this machine has spooled for one table, where no other process does.

    Args:
        settings: which table.
        spool: this process's own, which a clean stop waits for.
        wanted: set to have the next commit at once.
        stopping: set to end the loop.
        drained: set once nothing more will be spooled.
    """

    def __init__(
        self,
        settings: StorageSettings,
        spool: Spool,
        reporter: Reporter,
        *,
        wanted: threading.Event,
        stopping: threading.Event,
        drained: threading.Event,
    ) -> None:
        self.settings = settings
        self.deadline = float("inf")
        self.table_checked = False
        self._spool = spool
        self._reporter = reporter
        self._wanted = wanted
        self._stopping = stopping
        self._drained = drained

    def run(self) -> None:
        """Loop until ``stopping``, then commit the last; gives the committer's lock back however it ends."""
        committer = Committer(self.settings)
        maintenance = Maintenance(self.settings)
        failures = 0
        try:
            while not self._stopping.is_set():
                self._wanted.wait(self._pause(failures))
                self._wanted.clear()
                failures = 0 if self._commit_all(committer) else failures + 1
                if not failures and committer.is_acquired:
                    self._maintain(maintenance)
            self._commit_last(committer)
        finally:
            maintenance.close()
            committer.release()

    def _pause(self, failures: int) -> float:
        if not failures:
            return self.settings.flush_seconds
        # Not all machines at once when a table comes back.
        return min(MAX_BACKOFF_SECONDS, self.settings.flush_seconds + 0.1 * 2.0**failures) * random.uniform(
            0.5, 1
        )

    def _commit_all(self, committer: Committer) -> bool:
        """Commit all that is spooled by now. False after a failure."""
        try:
            if committer.acquire():
                if not self.table_checked:
                    self._check_table(committer)
                # What is spooled meanwhile is for the next turn: else busy processes would commit without a
                # pause, tiny files as fast as they can.
                while (result := committer.commit_once()) is not None and result.is_full:
                    pass
        except Exception as error:  # the writer's border: whatever fails is tried again after a pause
            metrics.COMMIT_ERRORS.labels(type(error).__name__).inc()
            message = f"cannot commit to {self.settings.uri}; rows stay in the spool"
            self._reporter.failure("commit", message, error)
            return False
        return True

    def _check_table(self, committer: Committer) -> None:
        """What a server without a lifespan has not done. A table that was there before is not made anew."""
        if not committer.root.joinpath(TABLE_ID).exists():
            open_or_create_table(self.settings)
        self.table_checked = True

    def _commit_last(self, committer: Committer) -> None:
        """At a clean stop: until all of ours is committed, by us or by another process, or time is up."""
        self._drained.wait(max(0.0, self.deadline - time.monotonic()))
        while time.monotonic() < self.deadline:
            if self._commit_all(committer) and not self._spool.pending():
                return
            time.sleep(LAST_PAUSE_SECONDS)

    def _maintain(self, maintenance: Maintenance) -> None:
        try:
            maintenance.step()
        except Exception as error:  # the writer's border: a table that can't be compacted still takes rows
            metrics.COMMIT_ERRORS.labels("maintenance").inc()
            self._reporter.failure("maintenance", f"cannot compact {self.settings.uri}", error)
