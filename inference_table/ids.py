"""Ids that sort by time of creation: UUID version 7 (RFC 9562), the cheapest index a Delta table has."""

import os
import threading
import time
import uuid
from typing import Final

__all__ = ["uuid7"]

RANDOM_BITS: Final = 74
STEP_BITS: Final = 32
"""Of the random step between two ids of one millisecond: ids stay hard to guess."""


class Clock:
    """The last id of this process, as a number: milliseconds, then random bits."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """The state of a new process; a forked child must not go on from its parent's last id."""
        self._lock = threading.Lock()
        self._last = 0

    def tick(self) -> int:
        random = int.from_bytes(os.urandom(10), "big")
        now = time.time_ns() // 1_000_000 << RANDOM_BITS | random & ((1 << RANDOM_BITS) - 1)
        with self._lock:
            if now <= self._last:
                now = self._last + 1 + (random & ((1 << STEP_BITS) - 1))
            self._last = now
        return now


CLOCK: Final = Clock()
os.register_at_fork(after_in_child=CLOCK.reset)


def uuid7() -> str:
    """A new UUIDv7. Those of one process sort in the order in which they were made."""
    number = CLOCK.tick()
    milliseconds, random = number >> RANDOM_BITS, number & ((1 << RANDOM_BITS) - 1)
    high, low = random >> 62, random & ((1 << 62) - 1)
    return str(uuid.UUID(int=milliseconds << 80 | 0x7 << 76 | high << 64 | 0b10 << 62 | low))
