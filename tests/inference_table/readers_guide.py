"""The snippets of the guide for other readers, and a table for them."""

import re
from datetime import timedelta
from typing import Any, Final

import pyarrow as pa

from inference_table.commit import Committer, open_or_create_table
from inference_table.settings import StorageSettings
from inference_table.spool import Spool
from tests.inference_table.rows import NOON, batch, commit_all
from tests.support import ROOT

__all__ = ["CLUSTER", "EXPECTED", "SNIPPETS", "SQL_FRAME", "fill", "run"]

GUIDE: Final = (ROOT / "docs" / "readers.md").read_text(encoding="utf-8")
SHOWN_URI: Final = '"./tracelake-data/payload"'
CLUSTER: Final = ("Daft", "Ray Data")
"""The sections about distributed engines."""

EXPECTED: Final = [("agent/1", 2), ("agent/2", 1)]
"""What each snippet finds, for :func:`fill`: requests of each version that were answered with 200."""
SQL_FRAME: Final = [("agent/1", 2), ("agent/2", 2)]
"""The same of the snippet that counts all requests."""


def snippets() -> dict[str, list[str]]:
    """The Python of each section."""
    sections = re.split(r"^##+ ", GUIDE, flags=re.MULTILINE)
    return {
        part.partition("\n")[0]: re.findall(r"```python\n(.*?)```", part, re.DOTALL) for part in sections[1:]
    }


SNIPPETS: Final = snippets()


def run(snippet: str, uri: str) -> list[tuple[str, int]]:
    """The rows of the frame that a snippet makes of the table at ``uri``."""
    assert SHOWN_URI in snippet
    names: dict[str, Any] = {}
    exec(snippet.replace(SHOWN_URI, repr(uri)), names)
    frame = pa.table(names["frame"])
    return [(row["served_entity_id"], row["requests"]) for row in frame.to_pylist()]


def fill(settings: StorageSettings) -> None:
    """Requests of two versions and two days, one of which failed, in three commits."""
    open_or_create_table(settings)
    spool, committer = Spool(settings), Committer(settings)
    for number, (version, status) in enumerate((("agent/1", 200), ("agent/2", 500), ("agent/2", 200))):
        ids = [f"0195-{number}{each}" for each in range(2 if number == 0 else 1)]
        rows = batch(ids, at=NOON + timedelta(days=number // 2)).to_pylist()
        rows = [{**row, "served_entity_id": version, "status_code": status} for row in rows]
        spool.append(pa.RecordBatch.from_pylist(rows, schema=batch([]).schema), sync=False)
        commit_all(committer)
    spool.close()
