"""The note of a commit under way, by which the data files of one that failed are found and removed."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from deltalake import DeltaTable

from inference_table.delta import table_id, transaction_version
from inference_table.settings import StorageSettings

__all__ = ["Attempt"]

NAME: Final = "attempt.json"


class Attempt:
    """Kept in the spool by the holder of the committer's lock, from before the first data file is written.

    For local tables. On an object store a request that was given up may still arrive, so that nobody can be
    certain; files left there are removed by the vacuum.
    """

    def __init__(self, settings: StorageSettings, root: Path) -> None:
        self._settings = settings
        self._path = root / NAME

    def note(self, table: DeltaTable, transactions: Mapping[str, int], files: Sequence[str]) -> None:
        """Write down which files, below the table, will belong to a commit with these transactions."""
        note = {"table_id": table_id(table), "transactions": dict(transactions), "files": list(files)}
        self._path.write_text(json.dumps(note), encoding="utf-8")

    def forget(self) -> None:
        """The commit is done."""
        self._path.unlink(missing_ok=True)

    def clear(self, table: DeltaTable) -> None:
        """Remove the files of an attempt that did not commit, as a freshly opened table shows."""
        try:
            note = json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        except ValueError:
            note = {}  # killed while writing it, so before any data file
        transactions = note.get("transactions", {}).items()
        committed = any(transaction_version(table, spool_id) >= last for spool_id, last in transactions)
        if note.get("table_id") == table_id(table) and not committed:
            for name in note["files"]:
                self._settings.local_path.joinpath(name).unlink(missing_ok=True)
        self.forget()
