"""The data files that hold a table's traces, in the order in which a list looks at them.

A file's statistics say between which times its rows were requested, so a list by time begins with the newest
(or oldest) and ends where no other file can hold a row that comes before those it has.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from urllib.parse import unquote

import duckdb
import pyarrow as pa

from inference_table.scan import STORE, Snapshot, files_sql, store_files

__all__ = [
    "EARLIEST",
    "EPOCH",
    "LATEST",
    "TraceFile",
    "microseconds",
    "table_files",
    "trace_files",
    "windows",
]

FIRST_ROWS: Final = 2_000
"""Rows of the files that are looked at first: more than a page, less than the eye waits for."""
GROWTH: Final = 4
"""Each time that was not enough, so many times more."""
COLUMNS: Final = (
    "databricks_request_id",
    "request_time",
    "trace_id",
    "trace_state",
    "trace_info",
    "response",
    "input_tokens",
    "output_tokens",
)
"""What a list and a filter may look at."""
EARLIEST: Final = datetime(1, 1, 1, tzinfo=UTC)
LATEST: Final = datetime(9999, 12, 31, tzinfo=UTC)
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class TraceFile:
    """A data file: its rows were requested between ``low`` and ``high``."""

    path: str
    rows: int
    low: datetime
    high: datetime


def trace_files(snapshot: Snapshot) -> list[TraceFile]:
    """The data files of a version; one without statistics may hold rows of any time."""
    actions = pa.table(snapshot.table.get_add_actions(flatten=True))
    names = set(actions.column_names)
    wanted = ("path", "num_records", "min.request_time", "max.request_time")
    columns = [actions[name].to_pylist() if name in names else [None] * len(actions) for name in wanted]
    return [
        TraceFile(unquote(path), rows or FIRST_ROWS, low.astimezone(UTC) if low else EARLIEST, high_of(high))
        for path, rows, low, high in zip(*columns, strict=True)
    ]


def high_of(high: datetime | None) -> datetime:
    # Writers may cut microseconds from statistics.
    return high.astimezone(UTC).replace(microsecond=999_999) if high else LATEST


@contextmanager
def table_files(
    snapshot: Snapshot, connection: duckdb.DuckDBPyConnection, files: Iterable[TraceFile]
) -> Iterator[str]:
    """A query over what a list may look at in these files, valid on the connection within the context."""
    empty = connection.from_arrow(snapshot.schema.empty_table())
    types = dict(zip(empty.columns, map(str, empty.types), strict=True))
    types = {name: types.get(name, "VARCHAR") for name in COLUMNS}
    paths = [one.path for one in files]
    if snapshot.in_place:
        root = str(snapshot.settings.local_path)
        yield files_sql([f"{root}/{path}" for path in paths], types, [])
        return
    store = store_files(snapshot)
    connection.register_filesystem(store)
    try:
        yield files_sql([STORE + path for path in paths], types, [])
    finally:
        connection.unregister_filesystem(STORE.removesuffix("://"))


def windows(
    files: list[TraceFile], ascending: bool | None, start: list[Any] | None, limit: int
) -> Iterator[tuple[list[TraceFile], list[TraceFile]]]:
    """Files to look at in turn, each with those that are left after it; all at once if not by time."""
    if ascending is None:
        yield files, []
        return
    rest = sorted(files, key=lambda one: one.low if ascending else one.high, reverse=not ascending)
    if start is not None and start[0] is not None:
        rest = [
            one
            for one in rest
            if (microseconds(one.high) >= start[0] if ascending else microseconds(one.low) <= start[0])
        ]
    rows = max(FIRST_ROWS, 2 * limit)
    while rest:
        count = taken = 0
        while count < len(rest) and taken < rows:
            taken += rest[count].rows
            count += 1
        window, rest = rest[:count], rest[count:]
        yield window, rest
        rows *= GROWTH


def microseconds(at: datetime) -> int:
    return (at - EPOCH) // timedelta(microseconds=1)
