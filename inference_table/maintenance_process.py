"""The process that compacts and cleans a table on an object store.

pyarrow reads and writes there through delta-rs with the interpreter's lock held for each round trip, which
would stall the endpoint; and listing a large bucket takes long. So this is done in a process of its own,
``python -m inference_table.maintenance_process``. It gets its work as one line of JSON on standard input,
where no other user sees the credentials, and ends when that input does, which is with its parent.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from datetime import UTC, datetime
from types import TracebackType
from typing import Final

from deltalake.exceptions import CommitFailedError

from inference_table.cleaning import clean
from inference_table.merge import merge_some
from inference_table.settings import StorageSettings
from inference_table.steps import ignore_step

__all__ = ["MERGE", "MaintenanceProcess"]

MERGE: Final = "merge"
CHILD_MERGES: Final = 20
"""Merges of one child process, of a second to a minute each, depending on how far the store is."""
CHILD_SECONDS: Final = 3600
"""End of a child that hangs, whatever it hangs in."""
CHILD_NICE: Final = 10
"""Requests come first."""


class MaintenanceProcess:
    """A process that does one ``job``, and ends when its parent does."""

    def __init__(self, settings: StorageSettings, job: str) -> None:
        self.job = job
        # A pipe would fill up, and hold up the child, with nobody there to read it.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the child has ended
        self._process = subprocess.Popen(
            [sys.executable, "-m", "inference_table.maintenance_process"],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            # Its metrics would stay behind as those of a dead process; what it has merged is counted here.
            env={
                key: value for key, value in os.environ.items() if key.upper() != "PROMETHEUS_MULTIPROC_DIR"
            },
        )
        work = {"uri": settings.uri, "storage_options": dict(settings.storage_options), "job": job}
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already; poll() says how
            self._process.stdin.write(json.dumps(work).encode() + b"\n")

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        return self._process.poll()

    def close(self) -> tuple[int, str]:
        """How many merges the ended process has done, and the last line of its errors."""
        assert self._process.stdout is not None
        with self._process, self._errors:
            self._errors.seek(0)
            lines = self._errors.read().decode(errors="replace").split("\n")
            return len(self._process.stdout.read()), next((line for line in lines[::-1] if line.strip()), "")

    def kill(self) -> None:
        self._process.kill()
        self.close()


def run_child() -> None:
    """Do the job that standard input names; one byte on standard output for each merge."""
    sys.excepthook = end_with_one_line
    work = json.loads(sys.stdin.readline())
    threading.Thread(target=end_with_parent, daemon=True).start()
    signal.alarm(CHILD_SECONDS)
    os.nice(CHILD_NICE)
    settings = StorageSettings(uri=work["uri"], storage_options=work["storage_options"])
    if work["job"] == MERGE:
        merge_many(settings)
    else:
        clean(settings, work["job"])
    # At once: pyarrow's threads may still hold files of delta-rs, which abort an interpreter that ends.
    os._exit(0)


def merge_many(settings: StorageSettings) -> None:
    """Merge what can be merged now, at most :data:`CHILD_MERGES` times.

    Raises:
        CommitFailedError: others were faster each time.
    """
    merges, lost = 0, None
    for _ in range(CHILD_MERGES):
        try:
            if not merge_some(settings, datetime.now(UTC), ignore_step):
                return
        except CommitFailedError as error:  # another machine has merged the same: there may be more to do
            lost = error
            continue
        merges += 1
        os.write(sys.stdout.fileno(), b".")
    if lost is not None and not merges:
        raise lost


def end_with_parent() -> None:
    """Wait for the end of standard input, which the parent keeps open as long as it lives."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def end_with_one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a failure so that its last line says it all: an answer of a store may be a page of XML."""
    traceback.print_exception(kind, error, trace)
    sys.stderr.write(f"{kind.__name__}: {' '.join(str(error).split())}\n")


if __name__ == "__main__":
    run_child()
