"""Delete what a table no longer uses: old entries of its log, and data files that no version needs."""

from typing import Final

from inference_table.delta import NO_HOOKS, open_table
from inference_table.settings import StorageSettings

__all__ = ["clean"]

RETENTION_HOURS: Final = 168
"""Least age of a file that may be deleted: Delta's own limit, beyond any reader or writer still at work."""


def clean(settings: StorageSettings, job: str) -> None:
    """Delete what is no longer used: old entries of the ``log``, or data files by a ``vacuum``."""
    table = open_table(settings)
    if job == "log":
        table.cleanup_metadata()
    else:
        table.vacuum(
            retention_hours=RETENTION_HOURS, dry_run=False, full=True, post_commithook_properties=NO_HOOKS
        )
