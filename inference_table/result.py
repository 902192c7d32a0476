"""The result of a query."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl

__all__ = ["QueryResult", "python_rows"]


class QueryResult:
    """Rows of a query, in memory and independent of the table.

    Iterates as dictionaries. Whatever speaks Arrow (Polars, DuckDB, pandas, pyarrow) takes it as it is.

    Attributes:
        version: the table's version that was read, None where the table is yet to be created.
        pending_rows: rows of this machine's spool that the query saw beside those of the table; 0 unless
            ``pending=True`` was asked for.
    """

    def __init__(self, table: pa.Table, version: int | None = None, pending_rows: int = 0) -> None:
        self._table = table
        self.version = version
        self.pending_rows = pending_rows

    @property
    def columns(self) -> list[str]:
        return list(self._table.column_names)

    def to_arrow(self) -> pa.Table:
        """As a pyarrow table."""
        return self._table

    def to_pandas(self) -> "pd.DataFrame":
        """As a pandas frame.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        require("pandas")
        frame: pd.DataFrame = self._table.to_pandas(maps_as_pydicts="lossy")
        return frame

    def to_polars(self) -> "pl.DataFrame":
        """As a Polars frame.

        Raises:
            ModuleNotFoundError: Polars is not installed.
        """
        require("polars")
        import polars as pl

        frame = pl.from_arrow(self._table)
        assert isinstance(frame, pl.DataFrame)
        return frame

    def to_dicts(self) -> list[dict[str, Any]]:
        """As a list of dictionaries, one per row."""
        return python_rows(self._table)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._table.to_batches(max_chunksize=1024):
            yield from python_rows(batch)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self._table.__arrow_c_stream__(requested_schema)

    def __repr__(self) -> str:
        import duckdb

        with duckdb.connect() as connection:
            box = repr(connection.from_arrow(self._table)).rstrip() if self.columns else ""
        source = "no table yet" if self.version is None else f"table version {self.version}"
        pending = f", {self.pending_rows:,} pending rows" if self.pending_rows else ""
        return f"{box}\n{len(self):,} rows, {source}{pending}".lstrip()


def python_rows(table: pa.Table | pa.RecordBatch) -> list[dict[str, Any]]:
    """Rows as dictionaries; maps too, of which the last value of a key counts."""
    rows: list[dict[str, Any]] = table.to_pylist(maps_as_pydicts="lossy")
    return rows


def require(name: str) -> None:
    """Import an optional package, or say how to get it."""
    try:
        __import__(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ModuleNotFoundError(
            f"to_{name}() needs {name}, which is not installed: pip install 'tracelake[{name}]'", name=name
        ) from None
