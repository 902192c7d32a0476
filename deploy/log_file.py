"""Log files of workers: written by them, shown in errors, cut by the supervisor."""

import os
import shutil
from pathlib import Path
from typing import Final

__all__ = ["cut", "open_log", "tail"]

MAX_BYTES: Final = 50 << 20
"""Of one file. There is one more of that size, which holds what was before."""
TAIL_BYTES: Final = 1 << 18
"""Read for a tail; a log may have lines of any length."""
MAX_LINE: Final = 2_000


def open_log(path: Path) -> int:
    """A descriptor that appends; the file is for its owner alone."""
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def tail(path: Path, lines: int) -> str:
    """The last lines, harmless to a terminal; empty where there is no log."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            text = file.read(TAIL_BYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    found = text.split("\n")
    if size > TAIL_BYTES:
        del found[0]  # its beginning is not here
    while found and not found[-1].strip():
        found.pop()
    return "\n".join(harmless(line) for line in found[-lines:]) if lines > 0 else ""


def harmless(line: str) -> str:
    shown = line.rstrip("\r")[:MAX_LINE]
    return "".join(
        char if char.isprintable() or char == "\t" else "\N{REPLACEMENT CHARACTER}" for char in shown
    )


def cut(path: Path) -> None:
    """Move what is in a log that has grown too large to ``<log>.1``. Its writers go on at the beginning.

    What they write between the copy and the cut is lost.
    """
    if path.stat().st_size > MAX_BYTES:
        shutil.copy(path, path.with_name(f"{path.name}.1"))  # with its mode
        os.truncate(path, 0)
