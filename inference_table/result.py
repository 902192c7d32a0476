"""The result of a query."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, TypeVar

import pyarrow as pa

from inference_table.errors import QueryError

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl

__all__ = ["QueryResult", "python_rows"]

T = TypeVar("T")
MISFITS: Final = (OverflowError, TypeError, ValueError, pa.ArrowException)
"""What pyarrow and pandas raise for a value that they can't convert."""


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
            QueryError: it holds a value that pandas can't.
        """
        require("pandas")
        frame: pd.DataFrame = converted(
            self._table, "pandas", lambda table: table.to_pandas(maps_as_pydicts="lossy")
        )
        return frame

    def to_polars(self) -> "pl.DataFrame":
        """As a Polars frame.

        Raises:
            ModuleNotFoundError: Polars is not installed.
            QueryError: it holds a value that Polars can't.
        """
        require("polars")
        return converted(self._table, "Polars", polars_frame)

    def to_dicts(self) -> list[dict[str, Any]]:
        """As a list of dictionaries, one per row.

        Raises:
            QueryError: it holds a value that Python can't, such as a time before the year 1.
        """
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
        return f"{box}\n{len(self):,} rows, {self._source()}".lstrip()

    def _repr_html_(self) -> str:
        """The first rows, for notebooks."""
        from inference_table.notebook import result_html

        return result_html(self._table, self._source())

    def _source(self) -> str:
        source = "no table yet" if self.version is None else f"table version {self.version}"
        return source + (f", {self.pending_rows:,} pending rows" if self.pending_rows else "")


def python_rows(table: pa.Table | pa.RecordBatch) -> list[dict[str, Any]]:
    """Rows as dictionaries; maps too, of which the last value of a key counts."""
    rows: list[dict[str, Any]] = converted(
        table, "Python", lambda part: part.to_pylist(maps_as_pydicts="lossy")
    )
    return rows


def polars_frame(table: pa.Table) -> "pl.DataFrame":
    import polars as pl

    try:
        frame = pl.from_arrow(table)
    except pl.exceptions.PolarsError as error:
        raise ValueError(str(error)) from error
    assert isinstance(frame, pl.DataFrame)
    return frame


def converted(table: Any, to: str, convert: Callable[[Any], T]) -> T:
    """A table or batch as ``convert`` makes it, or an error that names the column that doesn't convert."""
    try:
        return convert(table)
    except MISFITS as error:
        name = next(
            (
                name
                for index, name in enumerate(table.schema.names)
                if misfits(table.select([index]), convert)
            ),
            "?",
        )
        raise QueryError(
            f"cannot turn the column {name!r} into values of {to}: {' '.join(str(error).split())}; "
            "cast it to varchar in the query"
        ) from error


def misfits(table: Any, convert: Callable[[Any], object]) -> bool:
    try:
        convert(table)
    except MISFITS:
        return True
    return False


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
