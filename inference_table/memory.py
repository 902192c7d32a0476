"""The memory that a process may spend on capture."""

import threading

__all__ = ["MemoryBudget"]


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
