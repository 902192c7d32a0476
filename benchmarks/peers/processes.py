"""Child processes: started in a session of their own, measured, and ended with all that they have started."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

from deploy.bench import PROC, cpu_seconds_of, session_stats

__all__ = ["Process", "StartError", "folder_bytes", "wait_for", "wait_until_idle"]

ROOT: Final = Path(__file__).parents[2]
BLOCK_BYTES: Final = 512
"""The unit of ``st_blocks``."""
STOP_SECONDS: Final = 30.0
POLL_SECONDS: Final = 0.05
IDLE_SHARE: Final = 0.15
"""Of a processor: what servers without work take."""
IDLE_SECONDS: Final = 0.5


class StartError(Exception):
    """A server does not start; the message is the last that it said."""


class Process:
    """A command that runs in a session of its own.

    Args:
        command: what to run.
        environment: what is to differ from this process's environment.
        log: file that its output is added to.
        cwd: its working folder.
    """

    def __init__(
        self, command: list[str], environment: Mapping[str, str], log: Path, cwd: Path = ROOT
    ) -> None:
        self.log = log
        with log.open("ab") as output:
            self._popen = subprocess.Popen(
                command,
                cwd=cwd,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until_up(self, is_up: Callable[[], bool], seconds: float) -> None:
        """Wait until the server answers.

        Raises:
            StartError: it has ended, or doesn't answer in time.
        """
        if not wait_for(lambda: is_up() or self._popen.poll() is not None, seconds):
            raise StartError(f"no answer within {seconds:g} s: {self.last_words()}")
        if self._popen.poll() is not None:
            raise StartError(self.last_words() or f"exit code {self._popen.returncode}")

    def last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "")[:300]

    def members(self) -> list[int]:
        """Ids of all processes of its session."""
        return list(session_stats(self._popen.pid))

    def cpu_seconds(self) -> float:
        """User and system time so far, of its children too, those that have ended included."""
        return cpu_seconds_of(session_stats(self._popen.pid))

    def pss_bytes(self) -> int:
        """Resident memory; pages shared between its processes count once."""
        return sum(pss_of(PROC / str(pid)) for pid in self.members())

    def kill(self) -> None:
        """SIGKILL all of its session at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        # A server may have put its workers into process groups of their own.
        for pid in self.members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._popen.wait()

    def stop(self) -> None:
        """SIGTERM, a clean end, and SIGKILL for what is left."""
        self._popen.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(STOP_SECONDS)
        self.kill()


def pss_of(process: Path) -> int:
    try:
        lines = (process / "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def folder_bytes(folder: Path) -> int:
    """Bytes that a folder takes on the disk."""
    return sum(blocks_of(path) for path in folder.rglob("*")) * BLOCK_BYTES


def blocks_of(path: Path) -> int:
    try:
        return path.lstat().st_blocks
    except OSError:  # removed since it was listed
        return 0


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def wait_until_idle(processes: Iterable[Process], seconds: float) -> None:
    """Wait until processes have nothing left to do, going by the processor time they take."""
    watched = list(processes)
    deadline = time.monotonic() + seconds
    before = float("-inf")
    while time.monotonic() < deadline:
        taken = sum(process.cpu_seconds() for process in watched)
        if taken - before < IDLE_SHARE * IDLE_SECONDS:
            return
        before = taken
        time.sleep(IDLE_SECONDS)
