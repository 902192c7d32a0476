"""The memory that a process may spend on capture."""

import ctypes
import threading
from collections.abc import Callable
from typing import Final

import pyarrow as pa

__all__ = ["MemoryBudget", "give_memory_back"]

TRIM: "Final[Callable[[int], int] | None]" = getattr(ctypes.CDLL(None), "malloc_trim", None)
"""Of glibc, which otherwise keeps what large records took."""


def give_memory_back() -> None:
    """Give freed memory back to the system. Takes some milliseconds, without the GIL."""
    pa.default_memory_pool().release_unused()
    if TRIM is not None:
        TRIM(0)


class MemoryBudget:
    """Bytes that may be held in flight, queued and being encoded. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._lock = threading.Lock()

    def reserve(self, nbytes: int) -> bool:
        """Take ``nbytes``, or nothing and return False."""
        with self._lock:
            if self.used + nbytes > self.limit:
                return False
            self.used += nbytes
            return True

    def release(self, nbytes: int) -> None:
        with self._lock:
            self.used -= nbytes
