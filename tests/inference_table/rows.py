"""Rows, spools and tables for the tests of the storage side."""

from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable, QueryBuilder

from inference_table.commit import Committer
from inference_table.schema import SCHEMA
from inference_table.settings import StorageSettings

NOON = datetime(2025, 3, 1, 12, tzinfo=UTC)


def storage(folder: Path, **overrides: Any) -> StorageSettings:
    """A table and a spool below a folder."""
    return StorageSettings(uri=str(folder / "table"), spool_dir=folder / "spool", **overrides)


def batch(ids: Iterable[str], *, at: datetime = NOON, text: str = "hello") -> pa.RecordBatch:
    """One row for each id."""
    rows = [
        {
            **dict.fromkeys(SCHEMA.names),
            "databricks_request_id": one,
            "request_date": at.date(),
            "request_time": at,
            "status_code": 200,
            "sampling_fraction": 1.0,
            "execution_duration_ms": 7,
            "request": f'{{"input": "{text}"}}',
            "response": f'{{"output": "{text}"}}',
            "logging_error_codes": [],
            "request_metadata": [("path", "/")],
            "trace_id": f"tr-{one}",
        }
        for one in ids
    ]
    return pa.RecordBatch.from_pylist(rows, schema=SCHEMA)


def commit_all(committer: Committer) -> int:
    """Commit until nothing is left; returns how many commits that took."""
    assert committer.acquire()
    commits = 0
    while committer.commit_once() is not None:
        commits += 1
    return commits


def query(settings: StorageSettings, sql: str) -> list[dict[str, Any]]:
    """Rows of a query on the table, which is called ``t``."""
    result: list[dict[str, Any]] = pa.table(
        QueryBuilder().register("t", DeltaTable(settings.uri)).execute(sql)
    ).to_pylist()
    return result


def ids_in_table(settings: StorageSettings) -> Counter[str]:
    """How often each id is in the table."""
    return Counter(
        row["databricks_request_id"] for row in query(settings, "select databricks_request_id from t")
    )
