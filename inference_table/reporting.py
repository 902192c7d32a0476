"""Failures in the log: once when they begin, then at most every half minute, with what was left out."""

import logging
import threading
import time
from typing import Final

__all__ = ["Reporter"]

REPEAT_SECONDS: Final = 30.0
"""A failing disk or table must not fill the log as well."""


class Reporter:
    """Logs each kind of failure at a bounded rate. Counting is the metrics' business, not its."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._lock = threading.Lock()
        self._last: dict[str, float] = {}
        self._suppressed: dict[str, int] = {}

    def failure(self, kind: str, message: str, error: BaseException | None = None) -> None:
        """Report a failure of one kind; the traceback goes to DEBUG."""
        now = time.monotonic()
        with self._lock:
            if now - self._last.get(kind, -REPEAT_SECONDS) < REPEAT_SECONDS:
                self._suppressed[kind] = self._suppressed.get(kind, 0) + 1
                return
            self._last[kind] = now
            suppressed = self._suppressed.pop(kind, 0)
        again = f" ({suppressed} more of this kind since it was last reported)" if suppressed else ""
        cause = f": {type(error).__name__}: {error}" if error is not None else ""
        self._logger.error("%s%s%s", message, cause, again)
        if error is not None:
            self._logger.debug("traceback of: %s", message, exc_info=error)
