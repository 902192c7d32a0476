"""Rows, traces and results as HTML for notebooks: Jupyter, VS Code, Colab.

No script and nothing to load: spans unfold by ``<details>``, so that it shows in a notebook that is opened
later, elsewhere, without a server. Colours are few, and of a kind that a light and a dark page bear. What
strangers and agents wrote is escaped in one place, :func:`text`. It is bounded too, as a notebook keeps what
it shows: the row itself has the rest.
"""

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from inference_table.errors import TableError

if TYPE_CHECKING:
    from mlflow.entities import Span, Trace

    from inference_table.table import InferenceRow

__all__ = ["result_html", "row_html", "row_text", "trace_html"]

MAX_ROWS: Final = 20
MAX_COLUMNS: Final = 50
MAX_CELL: Final = 200
"""Characters of a value in a table."""
MAX_PREVIEW: Final = 160
"""Characters of a value in its one line."""
MAX_VALUE: Final = 10_000
"""Characters of a value that is unfolded."""
MAX_VALUES: Final = 1_000_000
"""Characters of all unfolded values of a trace together; behind these there are the lines only."""
MAX_SPANS: Final = 500
MAX_DEPTH: Final = 40
"""Levels of spans within spans; what is deeper stands beside its parent. Chromium draws 512 elements deep."""
TOO_DEEP: Final = "(nested too deeply to be shown)"
STYLE: Final = """<style>
.tracelake { font: 13px/1.5 system-ui, sans-serif; max-width: 1100px; text-align: left; }
.tracelake summary { cursor: pointer; }
.tracelake .line { display: flex; gap: .6em; align-items: baseline; border-bottom: 1px solid #8883; }
.tracelake .name { flex: 1; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.tracelake .track { flex: 0 0 200px; align-self: center; background: #8882; height: 8px; }
.tracelake .track i { display: block; height: 8px; min-width: 2px; background: #4a90d9; }
.tracelake .failed > summary .track i { background: #d9534f; }
.tracelake .ms { flex: 0 0 6em; text-align: right; font-variant-numeric: tabular-nums; }
.tracelake .kind { font-size: 11px; padding: 0 .5em; border: 1px solid #8886; border-radius: 8px; }
.tracelake .dim { opacity: .7; }
.tracelake .bad, .tracelake .failed > summary b { color: #d9534f; }
.tracelake .good { color: #3a9d5d; }
.tracelake .span { margin-left: 1.2em; }
.tracelake .span > summary { margin-left: -1.2em; list-style: none; }
.tracelake .span > summary .name::before { content: "▸ "; opacity: .6; }
.tracelake .span[open] > summary .name::before { content: "▾ "; }
.tracelake .value > summary { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.tracelake pre { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 24em; overflow: auto;
  background: #8881; color: inherit; padding: .5em; margin: .2em 0; font-size: 12px; }
.tracelake .wide { overflow-x: auto; }
.tracelake td, .tracelake th { padding: .1em .6em; text-align: left; vertical-align: top; }
.tracelake td { max-width: 36em; overflow-wrap: anywhere; white-space: pre-wrap; }
.tracelake .number { text-align: right; font-variant-numeric: tabular-nums; }
</style>"""


def row_html(row: "InferenceRow") -> str:
    """A request, and the trees of its traces."""
    budget = Budget()
    parts = [*head_lines(row), *body_lines(row, budget)]
    try:
        main = row.trace()
        traces = [] if main is None else [main, *row.other_traces()]
        if not traces:
            parts.append('<div class="dim">no trace was recorded for this request</div>')
        for trace in traces:
            parts += trace_lines(trace, budget)
    except TableError as error:
        # Seen by who looks at the row, which is of use all the same.
        parts.append(f'<div class="bad">{text(str(error))}</div>')
    return page(parts)


def trace_html(trace: "Trace") -> str:
    """The tree of spans of one trace."""
    return page(trace_lines(trace, Budget()))


def row_text(row: Mapping[str, Any]) -> str:
    """One line: what a notebook keeps beside the HTML, in place of megabytes."""
    status, taken = row.get("status_code"), duration_text(row.get("execution_duration_ms"))
    return (
        f"<request {row.get('databricks_request_id')}: {route(row)} → {status} in {taken}, "
        f"{row.get('span_count') or 0} spans; values by column name, .trace() for the trace>"
    )


def result_html(table: pa.Table, source: str) -> str:
    """The first rows of a result; ``source`` says of what it is."""
    shown = table.slice(0, MAX_ROWS).select(list(range(min(MAX_COLUMNS, table.num_columns))))
    classes = [' class="number"' if is_number(field.type) else "" for field in shown.schema]
    columns = [cells(column) for column in shown.columns]
    heads = "".join(
        f"<th{kind}>{text(name)}</th>" for kind, name in zip(classes, shown.column_names, strict=True)
    )
    rows = (
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(classes, row, strict=True)) + "</tr>"
        for row in zip(*columns, strict=True)
    )
    more = [f"{table.num_rows:,} row{'' if table.num_rows == 1 else 's'}"]
    if table.num_rows > MAX_ROWS:
        more.append(f"the first {MAX_ROWS} shown")
    if table.num_columns > MAX_COLUMNS:
        more.append(f"{MAX_COLUMNS} of {table.num_columns:,} columns shown")
    return page(
        [
            f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>',
            f'</div><div class="dim">{text(", ".join([*more, source]))}</div>',
        ]
    )


class Budget:
    """What is left of the characters of unfolded values."""

    def __init__(self) -> None:
        self.left = MAX_VALUES

    def take(self, value: str) -> str:
        """The head of a value, and how much of it is missing."""
        kept = min(len(value), MAX_VALUE, self.left)
        self.left -= kept
        missing = len(value) - kept
        return value[:kept] + (f"\n… and {missing:,} characters more" if missing else "")


def page(parts: Sequence[str]) -> str:
    return f'{STYLE}\n<div class="tracelake">\n' + "\n".join(parts) + "\n</div>"


def text(value: object) -> str:
    """The one place where text becomes HTML."""
    # A lone surrogate, which JSON may hold, can't be written into a notebook.
    return html.escape(str(value).encode("utf-8", "replace").decode())


def head_lines(row: Mapping[str, Any]) -> Iterator[str]:
    status = row.get("status_code")
    good = isinstance(status, int) and status < 400
    taken = duration_text(row.get("execution_duration_ms"))
    first = row.get("time_to_first_byte_ms")
    yield (
        f'<div><b>{text(route(row))}</b> → <b class="{"good" if good else "bad"}">{text(status)}</b> '
        f"in {taken}{'' if first is None else f', first byte after {duration_text(first)}'}</div>"
    )
    at = row.get("request_time")
    facts = [
        f"{at:%Y-%m-%d %H:%M:%S} UTC" if isinstance(at, datetime) else None,
        row.get("databricks_request_id"),
        named("endpoint", row.get("served_entity_id")),
        named("requester", row.get("requester")),
        named("client id", row.get("client_request_id")),
        tokens_text(row),
    ]
    yield f'<div class="dim">{text(" · ".join(str(fact) for fact in facts if fact))}</div>'
    if codes := row.get("logging_error_codes"):
        yield f'<div class="bad">recorded with {text(", ".join(codes))}</div>'


def body_lines(row: Mapping[str, Any], budget: Budget) -> Iterator[str]:
    yield from value_lines("request", parsed(row.get("request")), budget)
    response = parsed(row.get("response"))
    if isinstance(response, dict):
        response = {key: value for key, value in response.items() if key != "databricks_output"}
    yield from value_lines("response", response, budget)


def trace_lines(trace: "Trace", budget: Budget) -> list[str]:
    spans = sorted(trace.data.spans, key=lambda span: span.start_time_ns)
    state = str(trace.info.state.value)
    count = f"{len(spans):,} span{'' if len(spans) == 1 else 's'}"
    style = "good" if state == "OK" else "bad"
    lines = [
        f'<div><b>trace</b> {text(trace.info.trace_id)} <b class="{style}">{text(state)}</b> {count}</div>'
    ]
    if not spans:
        return lines
    begin = spans[0].start_time_ns
    end = max(span.end_time_ns or span.start_time_ns for span in spans)
    open_spans = 0
    for number, (depth, span) in enumerate(walk(spans)):
        if number == MAX_SPANS:
            lines.append(f'<div class="dim">… and {len(spans) - MAX_SPANS:,} more spans</div>')
            break
        level = min(depth, MAX_DEPTH)
        lines.append("</details>" * max(0, open_spans - level))
        lines += span_lines(span, begin, end, budget)
        open_spans = level + 1
    return [*lines, "</details>" * open_spans]


def walk(spans: "Sequence[Span]") -> "Iterator[tuple[int, Span]]":
    """Spans depth first, each with its depth."""
    ids = {span.span_id for span in spans}
    children: dict[str | None, list[Span]] = {}
    for span in spans:
        # A parent that is not in the trace was remote, or came too late to be recorded.
        children.setdefault(span.parent_id if span.parent_id in ids else None, []).append(span)
    stack = [(0, span) for span in reversed(children.get(None, []))]
    while stack:
        depth, span = stack.pop()
        yield depth, span
        stack += [(depth + 1, child) for child in reversed(children.get(span.span_id, []))]


def span_lines(span: "Span", begin: int, end: int, budget: Budget) -> Iterator[str]:
    """The opening of a span's element, and what is said of the span; its children follow."""
    kind = str(span.span_type or "")
    badge = f' <span class="kind">{text(kind)}</span>' if kind not in ("", "UNKNOWN") else ""
    taken = None if span.end_time_ns is None else (span.end_time_ns - span.start_time_ns) / 1e6
    width = max(1, end - begin)
    left = 100 * (span.start_time_ns - begin) / width
    share = min(100 - left, 100 * ((span.end_time_ns or end) - span.start_time_ns) / width)
    error = failure_text(span)
    yield (
        f'<details open class="span{"" if error is None else " failed"}"><summary class="line">'
        f'<span class="name"><b>{text(span.name)}</b>{badge}</span>'
        f'<span class="ms">{duration_text(taken)}</span>'
        f'<span class="track"><i style="margin-left:{left:.2f}%;width:{share:.2f}%"></i></span></summary>'
    )
    yield from value_lines("in", span.inputs, budget)
    yield from value_lines("out", span.outputs, budget)
    if error is not None:
        yield f'<div class="bad">{text(cut(error, MAX_VALUE))}</div>'


def value_lines(label: str, value: Any, budget: Budget) -> Iterator[str]:
    """A value in one line, which unfolds if there is more to it."""
    if value is None or value == {}:
        return
    line = one_line(value)
    head = f'<span class="dim">{label}</span> {text(cut(line, MAX_PREVIEW))}'
    if len(line) <= MAX_PREVIEW or not budget.left:
        yield f"<div>{head}</div>"
        return
    yield (
        f'<details class="value"><summary>{head}</summary><pre>{text(budget.take(pretty(value)))}</pre>'
        "</details>"
    )


def failure_text(span: "Span") -> str | None:
    """Why a span failed; None for one that did not."""
    if str(span.status.status_code.value) != "ERROR":
        return None
    for event in span.events:
        if event.name == "exception" and isinstance(event.attributes, dict):
            said = (event.attributes.get(f"exception.{key}") for key in ("type", "message"))
            return ": ".join(str(part) for part in said if part) or "an exception"
    return str(span.status.description or "") or "failed"


def cells(column: pa.ChunkedArray) -> list[str]:
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        # Cut before it becomes Python's: a payload may be megabytes.
        lengths = pc.utf8_length(column).to_pylist()
        heads = pc.utf8_slice_codeunits(column, 0, MAX_CELL).to_pylist()
        return [
            "" if head is None else text(head if length <= MAX_CELL else f"{head}… ({length:,} characters)")
            for head, length in zip(heads, lengths, strict=True)
        ]
    try:
        values = column.to_pylist(maps_as_pydicts="lossy")
    except (OverflowError, TypeError, ValueError, pa.ArrowException):
        return ['<span class="dim">(no value of Python)</span>'] * len(column)
    return ["" if value is None else text(cut(one_line(value), MAX_CELL)) for value in values]


def is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def one_line(value: Any) -> str:
    if isinstance(value, str):
        # Of a long text its head decides.
        return value if len(value) > MAX_VALUE else " ".join(value.split())
    return as_json(value) if isinstance(value, (dict, list, bool)) else str(value)


def pretty(value: Any) -> str:
    return value if isinstance(value, str) else as_json(value, indent=2)


def as_json(value: Any, indent: int | None = None) -> str:
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, default=str)
    except (RecursionError, TypeError, ValueError):
        return TOO_DEEP


def parsed(column: Any) -> Any:
    """A payload as what it means, or as its text."""
    if not isinstance(column, str):
        return None
    try:
        return json.loads(column)
    except (ValueError, RecursionError):
        return column


def cut(line: str, length: int) -> str:
    return line if len(line) <= length else f"{line[:length]}… ({len(line):,} characters)"


def named(name: str, value: Any) -> str | None:
    return f"{name} {value}" if value else None


def route(row: Mapping[str, Any]) -> str:
    metadata = row.get("request_metadata")
    known = metadata if isinstance(metadata, dict) else {}
    return f"{known.get('method', '')} {known.get('path', '')}".strip() or "request"


def tokens_text(row: Mapping[str, Any]) -> str | None:
    counts = [row.get("input_tokens"), row.get("output_tokens")]
    if counts == [None, None]:
        return None
    cost = row.get("total_cost_usd")
    said = f"{counts[0] or 0:,} tokens in, {counts[1] or 0:,} out"
    return said if cost is None else f"{said}, ${cost:.6f}"


def duration_text(taken: float | None) -> str:
    """A duration given in milliseconds; None is one that has not ended."""
    if taken is None:
        return "running"
    if taken < 10:
        return f"{taken:.1f} ms"
    return f"{taken:,.0f} ms" if taken < 1000 else f"{taken / 1000:,.2f} s"
