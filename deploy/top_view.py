"""A look of ``tracelake top``, drawn for a terminal of any width and height."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from deploy.output import printable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

__all__ = ["Frame", "Traffic", "head_height", "render"]

MAX_ENTITIES: Final = 8
WIDE: Final = 120
"""Cells from which there is room for tokens and entity beside what was said."""
LATE_SECONDS: Final = 10.0
"""A row that waits this long does not wait for the next commit, which comes after a second."""
COLUMNS: Final = {"req/s": 0, "errors": 0, "p50": 50, "p95": 0, "tok in/s": 70, "tok out/s": 70}
"""What is said of a served entity, and the cells of a terminal from which there is room for it."""
BARS: Final = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Traffic:
    """Requests of the window; ``errors`` are replies from 400 on, and failed traces."""

    name: str | None
    requests: int = 0
    per_second: float = 0.0
    errors: int = 0
    p50_ms: float | None = None
    p95_ms: float | None = None
    input_tokens_per_second: float = 0.0
    output_tokens_per_second: float = 0.0


@dataclass(frozen=True)
class Frame:
    """One look.

    Attributes:
        lag_seconds: age of the oldest row of this machine that is not committed; None if none waits.
        slices: requests in each of equal parts of the window, the oldest first.
        problem: why this is an earlier look, or one without the spool.
    """

    uri: str
    at: datetime
    window_seconds: float
    total: Traffic
    entities: list[Traffic] = field(default_factory=list)
    slices: list[int] = field(default_factory=list)
    newest: list[dict[str, Any]] = field(default_factory=list)
    version: int | None = None
    pending_rows: int = 0
    spool_bytes: int = 0
    spool_segments: int = 0
    quarantined: int = 0
    lag_seconds: float | None = None
    read_seconds: float = 0.0
    problem: str | None = None


def render(frame: Frame, width: int, lines: int) -> "RenderableType":
    """A frame for a terminal.

    Args:
        width: of the terminal, in cells.
        lines: how many newest requests there is room for.
    """
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [*head_lines(frame, width)]
    if frame.entities:
        parts += [Text(), traffic_table(frame, width)]
    if frame.newest and lines > 1:
        parts += [Text(), newest_table(frame.newest[: lines - 1], width)]
    if not frame.total.requests:
        parts += [Text(), Text(f"no request within {seconds_text(frame.window_seconds)}", style="dim")]
    return Group(*parts)


def head_height(frame: Frame) -> int:
    """Lines that a frame has above the newest requests, with the empty one between."""
    shown = min(len(frame.entities), MAX_ENTITIES + 1)
    return 3 + (frame.problem is not None) + (shown + 3 if shown else 0)


def head_lines(frame: Frame, width: int) -> "Iterator[Text]":
    from rich.text import Text

    first = Text("tracelake top", style="bold")
    first.append(f"  {frame.at:%H:%M:%S} UTC", style="dim")
    first.append(f"  {printable(frame.uri)}", style="dim")
    yield fitted(first, width)
    total = frame.total
    second = Text(f"{total.per_second:,.1f} requests/s ", style="bold")
    second.append(curve(merged(frame.slices, 1 if width >= WIDE else 3)), style="cyan")
    second.append(f"  {errors_text(total)} errors", style="bold red" if total.errors else "")
    second.append(f"  p50 {ms_text(total.p50_ms)}  p95 {ms_text(total.p95_ms)}")
    tokens = total.input_tokens_per_second + total.output_tokens_per_second
    second.append(f"  {rate_text(tokens)} tok/s")
    yield fitted(second, width)
    third = Text(f"window {seconds_text(frame.window_seconds)}")
    lag = "nothing waits" if frame.lag_seconds is None else f"oldest uncommitted {frame.lag_seconds:.1f} s"
    third.append(f"  {lag}", style="bold yellow" if (frame.lag_seconds or 0) > LATE_SECONDS else "")
    third.append(f"  spool {bytes_text(frame.spool_bytes)}, {frame.pending_rows:,} rows")
    if frame.quarantined:
        third.append(f"  {frame.quarantined:,} set aside", style="bold red")
    third.append(f"  version {frame.version}  read in {frame.read_seconds:.2f} s", style="dim")
    yield fitted(third, width)
    if frame.problem is not None:
        yield fitted(Text(printable(frame.problem), style="bold red"), width)


def traffic_table(frame: Frame, width: int) -> "Table":
    table = plain_table()
    names = [name for name, least in COLUMNS.items() if width >= least]
    # Each takes 10 cells at most, with the gap before it, a little more where an endpoint is busy.
    room = width - 2 - 10 * len(names)
    table.add_column("served entity", no_wrap=True, overflow="ellipsis", max_width=max(12, room))
    for name in names:
        table.add_column(name, justify="right", no_wrap=True, min_width=len(name))
    for one in frame.entities[:MAX_ENTITIES]:
        cells = {
            "req/s": f"{one.per_second:,.1f}",
            "errors": errors_text(one),
            "p50": ms_text(one.p50_ms),
            "p95": ms_text(one.p95_ms),
            "tok in/s": rate_text(one.input_tokens_per_second),
            "tok out/s": rate_text(one.output_tokens_per_second),
        }
        known = [cells[name] for name in names]
        add_cells(table, one.name or "(no name)", *known, style="red" if one.errors else "")
    if len(frame.entities) > MAX_ENTITIES:
        add_cells(
            table, f"… and {len(frame.entities) - MAX_ENTITIES:,} more", *[""] * len(names), style="dim"
        )
    return table


def newest_table(newest: Sequence[Mapping[str, Any]], width: int) -> "Table":
    wide = width >= WIDE
    table = plain_table(width)
    table.add_column("time", no_wrap=True, width=8)
    table.add_column("status", justify="right", no_wrap=True, width=6)
    table.add_column("took", justify="right", no_wrap=True, width=7)
    if wide:
        table.add_column("tokens", justify="right", no_wrap=True, min_width=11)
        table.add_column("entity", no_wrap=True, overflow="ellipsis", max_width=24)
    table.add_column("request", ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_column("answer", ratio=1, no_wrap=True, overflow="ellipsis")
    for one in newest:
        failed = (one["status_code"] or 0) >= 400 or one["trace_state"] == "ERROR"
        tokens = (one["input_tokens"], one["output_tokens"])
        known = "" if tokens == (None, None) else f"{tokens[0] or 0:,} → {tokens[1] or 0:,}"
        add_cells(
            table,
            f"{one['request_time']:%H:%M:%S}",
            str(one["status_code"]),
            ms_text(one["ms"]),
            *((known, one["served_entity_id"] or "") if wide else ()),
            one["request"] or one["path"] or "",
            one["response"] or "",
            style="red" if failed else "",
        )
    return table


def plain_table(width: int | None = None) -> "Table":
    from rich.table import Table

    return Table(box=None, width=width, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")


def add_cells(table: "Table", *cells: str, style: str) -> None:
    from rich.text import Text

    # What strangers wrote must not steer the terminal, nor be markup.
    table.add_row(*(Text(printable(" ".join(cell.split()))) for cell in cells), style=style)


def fitted(text: "Text", width: int) -> "Text":
    text.truncate(width, overflow="ellipsis")
    return text


def merged(slices: Sequence[int], size: int) -> list[int]:
    """Fewer, longer slices."""
    return [sum(slices[begin : begin + size]) for begin in range(0, len(slices), size)]


def curve(slices: Sequence[int]) -> str:
    most = max(slices, default=0)
    if not most:
        return ""
    return "".join(BARS[0 if not count else max(1, round(count / most * 8))] for count in slices)


def errors_text(one: Traffic) -> str:
    if not one.errors:
        return "0"
    return f"{one.errors:,} ({100 * one.errors / one.requests:.1f} %)"


def ms_text(taken: float | None) -> str:
    if taken is None:
        return "-"
    return f"{taken:,.0f} ms" if taken < 10_000 else f"{taken / 1000:,.1f} s"


def rate_text(rate: float) -> str:
    return f"{rate:,.1f}" if rate < 100 else f"{rate:,.0f}"


def seconds_text(seconds: float) -> str:
    return f"{seconds:g} s" if seconds < 120 else f"{seconds / 60:g} min"


def bytes_text(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
