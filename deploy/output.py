"""Rows of a query as text: for a terminal, a pipe, a spreadsheet, a document.

A program gets values as they are. A terminal gets no control character of theirs: a payload, a heading or the
name of a span must not steer it.
"""

import csv
import io
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

import click
import orjson

from inference_table.errors import QueryError

if TYPE_CHECKING:
    from rich.console import Console

    from inference_table.result import QueryResult

__all__ = ["plain_console", "printable", "write_result"]

MIN_COLUMN: Final = 10
"""Cells below which a column says nothing: then rows are written one value a line instead."""
GAP: Final = "  "
MAX_CELL: Final = 10_000
"""Characters of a value that are looked at for a terminal: a payload may be megabytes."""
CONTROLS: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""C0, DEL and C1, but for tab and line break, which CSV needs."""
PIPE_WIDTH: Final = 120
"""Cells of a line where there is no terminal to ask: most files and logs are read at that width or wider."""


def plain_console() -> "Console":
    """Standard output for drawing: text of others is taken for no markup."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPE_WIDTH
    return console


def write_result(result: "QueryResult", style: str) -> None:
    """Write to standard output; ``style`` is table, json, csv or markdown."""
    writers = {"table": write_table, "json": write_json, "csv": write_csv, "markdown": write_markdown}
    writers[style](result)


def write_json(result: "QueryResult") -> None:
    for row in result:
        write_text(to_json(row) + "\n", lambda found: f"\\u{ord(found[0]):04x}")


def write_csv(result: "QueryResult") -> None:
    write_csv_line(result.columns)
    for row in result:
        write_csv_line([cell(value) for value in row.values()])


def write_csv_line(values: Sequence[str]) -> None:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    write_text(buffer.getvalue())


def write_markdown(result: "QueryResult") -> None:
    write_text(markdown_line(result.columns))
    write_text(markdown_line(["---"] * len(result.columns)))
    for row in result:
        write_text(markdown_line(cell(value) for value in row.values()))


def markdown_line(values: Iterable[str]) -> str:
    escaped = (" ".join(value.split()).replace("\\", "\\\\").replace("|", "\\|") for value in values)
    return f"| {' | '.join(escaped)} |\n"


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
    rows = [
        [*map(terminal_text, result.columns)],
        *([terminal_text(value) for value in row.values()] for row in result),
    ]
    natural = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    widths = fit(natural, width - len(GAP) * (len(natural) - 1))

    def write(values: Sequence[str]) -> None:
        cells = []
        for name, text, size in zip(result.columns, values, widths, strict=True):
            fitted = text if cell_len(text) <= size else set_cell_size(text, size - 1) + "…"
            padding = " " * (size - cell_len(fitted))
            cells.append(padding + fitted if name in numeric else fitted + padding)
        write_text(GAP.join(cells).rstrip() + "\n")

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
    from rich.cells import cell_len, set_cell_size

    names = [terminal_text(name) for name in result.columns]
    label = max(map(cell_len, names))
    for number, row in enumerate(result, 1):
        write_text(f"── row {number} ".ljust(width, "─") + "\n")
        for name, value in zip(names, row.values(), strict=True):
            line = f"{set_cell_size(name, label)}  {terminal_text(value)}"
            fitted = line if cell_len(line) <= width else set_cell_size(line, width - 1).rstrip() + "…"
            write_text(fitted + "\n")


def numeric_columns(result: "QueryResult") -> set[str]:
    import pyarrow.types as kinds

    tests = (kinds.is_integer, kinds.is_floating, kinds.is_decimal)
    return {field.name for field in result.to_arrow().schema if any(test(field.type) for test in tests)}


def write_text(text: str, replaced: str | Callable[[re.Match[str]], str] = "�") -> None:
    """The one place where rows leave; ``replaced`` stands for a control character on a terminal."""
    shown = CONTROLS.sub(replaced, text) if sys.stdout.isatty() else text
    # Without `color` click takes escape sequences out of what a program is to get.
    click.echo(shown, nl=False, color=True)


def printable(text: str) -> str:
    """Text of the same length that a terminal shows, obeys nothing of, and can encode."""
    return "".join(char if char.isprintable() or char == "\t" else "�" for char in text)


def terminal_text(value: Any) -> str:
    """One line of text."""
    return printable(" ".join(cell(value)[:MAX_CELL].split()))


def cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, (dict, list, bool)):
        return to_json(value)
    return str(value)


def to_json(value: Any) -> str:
    try:
        # `default` gets what JSON has no word for: decimals, intervals, bytes.
        return orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
    except TypeError as error:
        raise QueryError(
            f"cannot write a value as JSON: {error}; cast its column to varchar in the query"
        ) from error
