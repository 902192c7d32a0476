"""What a read sees: one version of the table and, if asked for, the rows still in this machine's spool.

A segment is in the spool, in the table, or, between commit and deletion, in both. Opening the segments before
the version is taken makes sure that none is missed; the version's transactions tell which of them it already
holds. So each record is seen exactly once.
"""

from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from inference_table.errors import SegmentError, SpoolError, TableNotFoundError
from inference_table.result import python_rows
from inference_table.scan import NewestSnapshot, Snapshot
from inference_table.schema import SCHEMA
from inference_table.settings import StorageSettings
from inference_table.spool import folders, spool_root

__all__ = ["View", "open_view"]

ATTEMPTS: Final = 20
"""How often a listing may be overtaken by commits, of which there is one a second by default."""


@dataclass(frozen=True)
class View:
    """What one read sees. ``snapshot`` is None where rows are spooled and the table is yet to be created."""

    snapshot: Snapshot | None
    pending: pa.Table

    @property
    def version(self) -> int | None:
        return self.snapshot.version if self.snapshot else None

    @property
    def schema(self) -> pa.Schema:
        return self.snapshot.schema if self.snapshot else SCHEMA

    def rows(self, column: str, values: list[str]) -> list[dict[str, Any]]:
        """The whole rows that have one of ``values``, in no order."""
        wanted = pc.is_in(self.pending[column], value_set=pa.array(values, pa.string()))
        missing = dict.fromkeys(self.schema.names)
        found = [{**missing, **row} for row in python_rows(self.pending.filter(wanted))]
        return found + (python_rows(self.snapshot.rows(column, values)) if self.snapshot else [])


def open_view(settings: StorageSettings, pending: bool, newest: NewestSnapshot | None = None) -> View:
    """What a read sees now; ``newest`` spares opening the table anew where it has not changed.

    Raises:
        TableNotFoundError: there is neither a table nor, with ``pending``, a row for it.
        TableError: the table can't be reached or read.
        SpoolError: the spool can't be read.
    """
    newest = newest or NewestSnapshot(settings)
    if not pending:
        return View(newest.open(), SCHEMA.empty_table())
    segments = open_segments(settings)
    try:
        snapshot = newest.open()
    except TableNotFoundError:
        if not segments:
            raise
        snapshot = None
    spool_ids = {spool_id for spool_id, _ in segments}
    committed = {spool_id: snapshot.committed(spool_id) if snapshot else 0 for spool_id in spool_ids}
    fresh = [rows for (spool_id, sequence), rows in segments.items() if sequence > committed[spool_id]]
    return View(snapshot, pa.concat_tables([SCHEMA.empty_table(), *fresh]))


def open_segments(settings: StorageSettings) -> dict[tuple[str, int], pa.Table]:
    """All segments of this machine, by spool id and sequence; they stay open when they are deleted."""
    root = spool_root(settings)
    for _ in range(ATTEMPTS):
        opened = {}
        try:
            for folder in folders(root):
                # Numbers below belong to a table that was here before this one.
                start = folder.start
                for segment in folder.segments():
                    if start is not None and segment.sequence < start:
                        continue
                    try:
                        opened[folder.spool_id, segment.sequence] = segment.read()
                    except SegmentError:
                        # Damaged: the committer sets it aside, counts and reports it.
                        continue
        except FileNotFoundError:
            continue
        except OSError as error:
            raise SpoolError(
                f"cannot read the spool '{root}': {error}; "
                "read as the user that serves, or without pending rows"
            ) from error
        return opened
    raise SpoolError(f"cannot read the spool '{root}': it was emptied {ATTEMPTS} times meanwhile; try again")
