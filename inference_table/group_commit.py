"""Group commit: calls of many threads at once share one commit.

There is no thread of ours. A call that finds no other at work leads: it commits what all have handed in until
then, tells them, and passes the lead to one of those that came meanwhile. A failure is the failure of all
whose items were in that commit.
"""

import os
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from inference_table.errors import TableError

__all__ = ["GroupCommit"]

T = TypeVar("T")


class Waiter(Generic[T]):
    """One call, and how it went."""

    def __init__(self, items: Sequence[T]) -> None:
        self.items = items
        self.called = threading.Event()
        """Set when its items are done with, or it is to lead."""
        self.is_done = False
        self.error: Exception | None = None


class GroupCommit(Generic[T]):
    """Calls ``commit`` from one thread at a time, with the items of all threads that wait, in order.

    Args:
        commit: returns once the items are committed, or raises.
    """

    def __init__(self, commit: Callable[[list[T]], None]) -> None:
        self._commit = commit
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._waiting: list[Waiter[T]] = []
        self._leader: Waiter[T] | None = None

    def submit(self, items: Sequence[T]) -> None:
        """Return once the items are committed.

        Raises:
            Exception: what ``commit`` raised for a group that held them.
            TableError: the thread that led the group was interrupted.
        """
        if self._pid != os.getpid():  # a forked child: the leader is a thread of its parent
            self._begin()
        waiter = Waiter(items)
        with self._lock:
            self._waiting.append(waiter)
            if self._leader is None:
                self._leader = waiter
                waiter.called.set()
        try:
            waiter.called.wait()
            if not waiter.is_done:
                self._lead()
        finally:
            self._leave(waiter)
        if waiter.error is not None:
            # One of its own for each thread: a traceback grows with each raise of one object.
            raise type(waiter.error)(*waiter.error.args) from waiter.error

    def _lead(self) -> None:
        with self._lock:
            group, self._waiting = self._waiting, []
        error: Exception | None = None
        try:
            self._commit([item for waiter in group for item in waiter.items])
        except Exception as raised:  # noqa: BLE001  # each caller raises it
            error = raised
        except BaseException as raised:
            # Such as KeyboardInterrupt, which is this thread's, or a panic of delta-rs.
            error = TableError(f"cannot commit: interrupted by {type(raised).__name__}; try again")
            raise
        finally:
            for waiter in group:
                waiter.error, waiter.is_done = error, True
                waiter.called.set()

    def _leave(self, waiter: Waiter[T]) -> None:
        """Pass the lead on; also where the wait was interrupted."""
        with self._lock:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            if self._leader is waiter:
                self._leader = self._waiting[0] if self._waiting else None
                if self._leader is not None:
                    self._leader.called.set()
