"""Data files of the table: how rows become Parquet, and what the Delta log says about each file.

On local disk pyarrow writes them, since delta-rs copies the whole batch of a partitioned write in memory
several times. On an object store delta-rs does: its file system for pyarrow holds the GIL while it opens a
file, so that the user's endpoint would wait for the network. Only compaction, which has a process of its own
there, writes them with pyarrow everywhere. What a data file holds is every column of the table but the
partition's; a column that the rows lack is null.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import ColumnProperties, DeltaTable, WriterProperties
from deltalake.transaction import AddAction

from inference_table.ids import uuid7
from inference_table.schema import PARTITION_COLUMN, PAYLOAD_COLUMNS, SKIPPING_COLUMNS

__all__ = [
    "DataFile",
    "align",
    "data_columns",
    "file_path",
    "plan_files",
    "row_groups",
    "write_file",
    "write_rows",
    "writer_properties",
]

ROW_GROUP_BYTES: Final = 32 * 1024 * 1024
"""Uncompressed bytes of a row group: the least a reader holds, and the most a writer does."""
PAGE_BYTES: Final = 1024 * 1024
"""Uncompressed bytes of a page: what a reader decompresses for one row."""
MAX_STAT_CHARS: Final = 64
"""Longest text in the log's statistics."""
NULL_PARTITION: Final = "__HIVE_DEFAULT_PARTITION__"

UNREAD_COLUMNS: Final = (*PAYLOAD_COLUMNS, "trace_info")
"""Columns that nobody compares or sorts by: statistics would only repeat what users wrote."""

DICTIONARY_COLUMNS: Final = (
    "status_code",
    "sampling_fraction",
    "served_entity_id",
    "requester",
    "trace_state",
    "logging_error_codes.list.element",
    "request_metadata.key_value.key",
    "request_metadata.key_value.value",
)
"""Columns whose values repeat. A dictionary of the others would only be built to be thrown away."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """A data file to be written: its ``path`` below the table, and the rows of one day."""

    path: str
    day: date | None
    tables: list[pa.Table]

    def consume(self) -> Iterator[pa.Table]:
        """The rows, once: what was read is let go, as it may be mapped from a file."""
        self.tables.reverse()
        while self.tables:
            yield self.tables.pop()


def plan_files(tables: Iterable[pa.Table]) -> list[DataFile]:
    """One file for each ``request_date``, with a name never used before."""
    days: dict[date | None, list[pa.Table]] = {}
    for table in tables:
        for day, part in split_days(table):
            days.setdefault(day, []).append(part)
    return [DataFile(file_path(day), day, parts) for day, parts in days.items()]


def file_path(day: date | None) -> str:
    return (
        f"{PARTITION_COLUMN}={NULL_PARTITION if day is None else day.isoformat()}/part-{uuid7()}.zstd.parquet"
    )


def split_days(table: pa.Table) -> Iterator[tuple[date | None, pa.Table]]:
    column = table.column(PARTITION_COLUMN)
    days = column.unique().to_pylist()
    for day in days:
        same = pc.is_null(column) if day is None else pc.equal(column, pa.scalar(day, column.type))
        yield day, table if len(days) == 1 else table.filter(same)


def data_columns(table: DeltaTable) -> pa.Schema:
    """Columns of the table's data files."""
    schema = pa.schema(table.schema().to_arrow())
    return pa.schema([field for field in schema if field.name != PARTITION_COLUMN])


def align(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """The rows with exactly these columns: missing ones null, others left out.

    Raises:
        pyarrow.ArrowInvalid: a value does not fit the column's type.
    """
    names = set(rows.column_names)
    columns = []
    for field in schema:
        column = rows.column(field.name) if field.name in names else pa.nulls(rows.num_rows, field.type)
        columns.append(column if column.type == field.type else column.cast(field.type))
    return pa.Table.from_arrays(columns, schema=schema)


def row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in pieces of about :data:`ROW_GROUP_BYTES`, by reference."""
    gathered: list[pa.Table] = []
    size = 0
    for table in tables:
        for piece, nbytes in pieces(table):
            gathered.append(piece)
            size += nbytes
            if size >= ROW_GROUP_BYTES:
                yield pa.concat_tables(gathered, promote_options="default")
                gathered, size = [], 0
    if gathered:
        yield pa.concat_tables(gathered, promote_options="default")


def pieces(table: pa.Table) -> Iterator[tuple[pa.Table, int]]:
    nbytes = table.get_total_buffer_size()  # Table.nbytes is slow where there are many small segments
    rows = max(1, table.num_rows * ROW_GROUP_BYTES // max(1, nbytes))
    for offset in range(0, table.num_rows, rows):
        piece = table.slice(offset, rows)
        yield piece, nbytes * piece.num_rows // table.num_rows


def write_file(
    root: Path,
    path: str,
    day: date | None,
    groups: Iterable[pa.Table],
    *,
    compression_level: int,
) -> AddAction:
    """Write one data file of new rows, and say what the log needs to know about it.

    Args:
        root: the table's folder.
        path: the file's name below it.
        day: its partition.
        groups: its row groups, with the columns of :func:`data_columns`; not empty.
        compression_level: of zstd.
    """
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(target), "wb") as sink:
        return write_rows(sink, path, day, groups, compression_level=compression_level, data_change=True)


def write_rows(
    sink: pa.NativeFile,
    path: str,
    day: date | None,
    groups: Iterable[pa.Table],
    *,
    compression_level: int,
    data_change: bool,
) -> AddAction:
    """The same into a file that is open; ``data_change`` says whether the rows are new to the table."""
    stats = Stats()
    writer: pq.ParquetWriter | None = None
    for group in groups:
        stats.add(group)
        if writer is None:
            writer = parquet_writer(sink, group, compression_level)
        writer.write_table(group, row_group_size=max(1, group.num_rows))
    if writer is not None:
        writer.close()
    return AddAction(
        path=path,
        size=sink.tell(),
        partition_values={PARTITION_COLUMN: None if day is None else day.isoformat()},
        modification_time=int(time.time() * 1000),
        data_change=data_change,
        stats=stats.json(),
    )


def parquet_writer(sink: Any, sample: pa.Table, compression_level: int) -> pq.ParquetWriter:
    schema = sample.schema
    row_bytes = sample.nbytes // max(1, sample.num_rows)
    return pq.ParquetWriter(
        sink,
        schema,
        compression="zstd",
        compression_level=compression_level,
        use_dictionary=[column for column in DICTIONARY_COLUMNS if column.partition(".")[0] in schema.names],
        write_statistics=[
            field.name
            for field in schema
            if field.name not in UNREAD_COLUMNS and not pa.types.is_nested(field.type)
        ],
        data_page_size=PAGE_BYTES,
        # The size of a page is looked at only after so many rows.
        write_batch_size=max(1, min(1024, PAGE_BYTES // max(1, row_bytes))),
        write_page_index=True,
        # Types are Delta's to say; a copy of the Arrow schema in each file could only disagree.
        store_schema=False,
    )


def writer_properties(nbytes: int, rows: int, compression_level: int) -> WriterProperties:
    """The same layout as far as delta-rs writes it."""
    payload = ColumnProperties(dictionary_enabled=False, statistics_enabled="NONE")
    return WriterProperties(
        compression="ZSTD",
        compression_level=compression_level,
        data_page_size_limit=PAGE_BYTES,
        max_row_group_size=max(1, rows * ROW_GROUP_BYTES // max(1, nbytes)),
        column_properties=dict.fromkeys(UNREAD_COLUMNS, payload),
    )


class Stats:
    """Statistics of a data file, as the Delta protocol writes them.

    https://github.com/delta-io/delta/blob/master/PROTOCOL.md#per-file-statistics
    """

    def __init__(self) -> None:
        self._rows = 0
        self._low: dict[str, Any] = {}
        self._high: dict[str, Any] = {}
        self._nulls: dict[str, int] = {}

    def add(self, rows: pa.Table) -> None:
        self._rows += rows.num_rows
        for name in SKIPPING_COLUMNS:
            if name not in rows.column_names:
                continue
            column = rows.column(name)
            self._nulls[name] = self._nulls.get(name, 0) + column.null_count
            if column.null_count < len(column):
                found = pc.min_max(column).as_py()
                self._low[name] = min(self._low.get(name, found["min"]), found["min"])
                self._high[name] = max(self._high.get(name, found["max"]), found["max"])

    def json(self) -> str:
        return json.dumps(
            {
                "numRecords": self._rows,
                "minValues": {name: low_bound(value) for name, value in self._low.items()},
                "maxValues": high_bounds(self._high),
                "nullCount": self._nulls,
            },
            separators=(",", ":"),
        )


def low_bound(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return value[:MAX_STAT_CHARS] if isinstance(value, str) else value


def high_bounds(values: Mapping[str, Any]) -> dict[str, Any]:
    """Upper bounds; none for a text that is too long, since its head sorts before it."""
    short = {name: value for name, value in values.items() if len(str(value)) <= MAX_STAT_CHARS}
    return {name: low_bound(value) for name, value in short.items()}
