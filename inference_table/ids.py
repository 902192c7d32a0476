"""Ids that sort by time of creation: UUID version 7 (RFC 9562), the cheapest index a Delta table has."""

import os
import time
import uuid

__all__ = ["uuid7"]


def uuid7() -> str:
    """A new UUIDv7: 48 bits of Unix milliseconds, 74 random bits."""
    milliseconds = time.time_ns() // 1_000_000
    random = int.from_bytes(os.urandom(10), "big")
    high = (random >> 62) & 0xFFF
    low = random & 0x3FFF_FFFF_FFFF_FFFF
    return str(uuid.UUID(int=milliseconds << 80 | 0x7 << 76 | high << 64 | 0b10 << 62 | low))
