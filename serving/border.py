"""The capture border: past it, no failure of ours reaches the user's endpoint."""

import logging
from types import TracebackType
from typing import Final

from inference_table import metrics
from inference_table.reporting import Reporter

__all__ = ["Border", "reporter"]

reporter: Final = Reporter(logging.getLogger("tracelake"))


class Border:
    """A ``with`` block whose exceptions are counted and logged instead of raised.

    One instance per stage, reused: entering costs a method call. Cancellation and the like, which belong to
    the server, pass.
    """

    __slots__ = ("stage",)

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        metrics.CAPTURE_ERRORS.labels(self.stage).inc()
        reporter.failure(f"capture:{self.stage}", f"capturing a request failed ({self.stage})", error)
        return True
