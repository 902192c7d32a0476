"""Rows of a query as text: for a terminal, a pipe, a spreadsheet, a document."""

import csv
import io
import shutil
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

import click
import orjson

if TYPE_CHECKING:
    from inference_table.result import QueryResult

__all__ = ["write_result"]

MIN_COLUMN: Final = 10
"""Cells below which a column says nothing: then rows are written one value a line instead."""
GAP: Final = "  "
MAX_CELL: Final = 10_000
"""Characters of a value that are looked at for a terminal: a payload may be megabytes."""


def write_result(result: "QueryResult", style: str) -> None:
    """Write to standard output; ``style`` is table, json, csv or markdown."""
    writers = {"table": write_table, "json": write_json, "csv": write_csv, "markdown": write_markdown}
    writers[style](result)


def write_json(result: "QueryResult") -> None:
    for row in result:
        click.echo(to_json(row))


def write_csv(result: "QueryResult") -> None:
    write_csv_line(result.columns)
    for row in result:
        write_csv_line([cell(value) for value in row.values()])


def write_csv_line(values: Sequence[str]) -> None:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    click.echo(buffer.getvalue(), nl=False)


def write_markdown(result: "QueryResult") -> None:
    click.echo(markdown_line(result.columns))
    click.echo(markdown_line(["---"] * len(result.columns)))
    for row in result:
        click.echo(markdown_line(cell(value) for value in row.values()))


def markdown_line(values: Iterable[str]) -> str:
    escaped = (" ".join(value.split()).replace("\\", "\\\\").replace("|", "\\|") for value in values)
    return f"| {' | '.join(escaped)} |"


def write_table(result: "QueryResult") -> None:
    width = shutil.get_terminal_size().columns
    if not result.columns:
        return
    if width // len(result.columns) < MIN_COLUMN:
        write_records(result, width)
    else:
        write_grid(result, width)


def write_grid(result: "QueryResult", width: int) -> None:
    from rich.cells import cell_len, set_cell_size

    numeric = numeric_columns(result)
    rows = [result.columns, *([terminal_text(value) for value in row.values()] for row in result)]
    natural = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    widths = fit(natural, width - len(GAP) * (len(natural) - 1))

    def write(values: Sequence[str]) -> None:
        cells = []
        for name, text, size in zip(result.columns, values, widths, strict=True):
            fitted = text if cell_len(text) <= size else set_cell_size(text, size - 1) + "…"
            padding = " " * (size - cell_len(fitted))
            cells.append(padding + fitted if name in numeric else fitted + padding)
        click.echo(GAP.join(cells).rstrip())

    write(rows[0])
    write(["─" * size for size in widths])
    for values in rows[1:]:
        write(values)


def fit(natural: Sequence[int], available: int) -> list[int]:
    """Widths that fit: the narrow columns get what they need, the wide ones share the rest."""
    widths = list(natural)
    left = available
    for position, index in enumerate(sorted(range(len(natural)), key=lambda index: natural[index])):
        widths[index] = min(natural[index], max(1, left // (len(natural) - position)))
        left -= widths[index]
    return widths


def write_records(result: "QueryResult", width: int) -> None:
    """One value a line, for rows with more columns than fit side by side."""
    from rich.cells import set_cell_size

    label = max(map(len, result.columns))
    for number, row in enumerate(result, 1):
        click.echo(f"── row {number} ".ljust(width, "─"))
        for name, value in row.items():
            line = f"{name:<{label}}  {terminal_text(value)}"
            fitted = line if len(line) <= width else set_cell_size(line, width - 1).rstrip() + "…"
            click.echo(fitted)


def numeric_columns(result: "QueryResult") -> set[str]:
    import pyarrow.types as kinds

    tests = (kinds.is_integer, kinds.is_floating, kinds.is_decimal)
    return {field.name for field in result.to_arrow().schema if any(test(field.type) for test in tests)}


def terminal_text(value: Any) -> str:
    """One line of text without control characters: a payload must not steer the terminal."""
    text = " ".join(cell(value)[:MAX_CELL].split())
    return "".join(char if char.isprintable() else "�" for char in text)


def cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, (dict, list, bool)):
        return to_json(value)
    return str(value)


def to_json(value: Any) -> str:
    # `default` gets what JSON has no word for: decimals, intervals, bytes.
    return orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
