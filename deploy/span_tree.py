"""A request and its trace, drawn for a terminal.

One line per span (name, type, duration, and a bar that shows when in the trace it ran), with what went in,
what came out and what went wrong below it, cut to the width unless everything is asked for.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import wraps
from typing import TYPE_CHECKING, Any, Final, ParamSpec

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from deploy.brief import as_json, brief
from deploy.output import printable

if TYPE_CHECKING:
    from mlflow.entities import Span, Trace

__all__ = ["render_request", "render_trace"]

P = ParamSpec("P")

BAR_WIDTH: Final = 20
DURATION_WIDTH: Final = 9
MIN_WIDTH: Final = 60
"""Below this a tree is no longer one: let the terminal wrap."""
MAX_SPANS: Final = 500
"""Spans that are drawn unless everything is asked for: a runaway agent has ten thousands."""
MAX_GUIDE: Final = 24
"""Cells of the lines before a span: twelve levels."""
MAX_FAILURE: Final = 300
"""Characters of the error in the headline; the span shows the rest."""
MAX_DOCUMENTS: Final = 5
"""Retrieved documents that are listed one by one."""
LABEL_WIDTH: Final = 5
TYPE_STYLES: Final = {
    "AGENT": "magenta",
    "CHAIN": "blue",
    "CHAT_MODEL": "cyan",
    "EMBEDDING": "cyan",
    "LLM": "cyan",
    "RETRIEVER": "green",
    "RERANKER": "green",
    "TOOL": "yellow",
}
LIBRARIES: Final = "/lib/python3"
"""In the path of every module that was installed, and of the standard library's."""
FRAME: Final = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')


def cleaned(render: Callable[P, Iterator[Text]]) -> Callable[P, Iterator[Text]]:
    """The one place where lines leave: what strangers and agents wrote must not steer the terminal."""

    @wraps(render)
    def lines(*args: P.args, **kwargs: P.kwargs) -> Iterator[Text]:
        for line in render(*args, **kwargs):
            # Of the same length, so styles stay where they are.
            line.plain = printable(line.plain)
            yield line

    return lines


@cleaned
def render_request(row: Mapping[str, Any], width: int, *, full: bool = False) -> Iterator[Text]:
    """The header of a request: what is in its row beside the trace.

    Args:
        row: values by column name.
        width: of the terminal, in cells.
        full: cut nothing.
    """
    metadata = as_dict(row.get("request_metadata"))
    status = row.get("status_code")
    failed = status is not None and status >= 400
    title = Text("request ", style="bold")
    title.append(str(row.get("databricks_request_id")), style="bold cyan")
    yield title
    first = Text("  ")
    first.append(f"{metadata.get('method', '')} {metadata.get('path', '')}".strip() or "request")
    first.append(" → ", style="dim")
    first.append(str(status), style="bold red" if failed else "bold green")
    first.append(f" in {duration_text(milliseconds(row.get('execution_duration_ms')))}")
    if row.get("time_to_first_byte_ms") is not None:
        first.append(f", first byte after {duration_text(milliseconds(row['time_to_first_byte_ms']))}", "dim")
    yield first
    if isinstance(at := row.get("request_time"), datetime):
        yield Text(f"  {at:%Y-%m-%d %H:%M:%S}.{at.microsecond // 1000:03} UTC", style="dim")
    facts = [
        ("endpoint", row.get("served_entity_id")),
        ("requester", row.get("requester")),
        ("client id", row.get("client_request_id")),
        ("tokens", tokens_text(row.get("input_tokens"), row.get("output_tokens"))),
        ("cost", None if row.get("total_cost_usd") is None else f"${row['total_cost_usd']:.6f}"),
    ]
    if known := [f"{name} {value}" for name, value in facts if value]:
        yield Text("  " + "   ".join(known))
    if codes := row.get("logging_error_codes"):
        yield Text("  recorded with " + ", ".join(codes), style="bold yellow")
    for label, column in (("in", "request"), ("out", "response")):
        yield from value_lines(label, body_of(row.get(column)), "  ", width, full)


@cleaned
def render_trace(trace: "Trace", width: int, *, full: bool = False) -> Iterator[Text]:
    """The tree of spans of one trace; arguments as :func:`render_request`."""
    spans = sorted(trace.data.spans, key=lambda span: span.start_time_ns)
    state = str(trace.info.state.value)
    title = Text("trace ", style="bold")
    title.append(str(trace.info.trace_id), style="bold cyan")
    title.append(f"  {state}", style=state_style(state))
    title.append(f"  {len(spans)} span{'' if len(spans) == 1 else 's'}")
    yield title
    if failure := first_failure(spans):
        # An agent that went on after an error, or a graph that waits for a person, did not fail.
        yield Text("  error in " if state == "OK" else "  failed in ", style="red").append(failure)
    if not spans:
        yield Text("  no spans were recorded", style="dim")
        return
    begin = spans[0].start_time_ns
    end = max(span.end_time_ns or span.start_time_ns for span in spans)
    passed_on = passed_on_errors(spans)
    for number, (guide, rest, span) in enumerate(walk(spans)):
        if number == MAX_SPANS and not full:
            yield Text(f"… and {len(spans) - MAX_SPANS:,} more spans; see them with --full", style="dim")
            return
        yield span_line(span, folded(guide), width, begin, end)
        yield from detail_lines(span, folded(rest), width, full)
        if span.span_id not in passed_on:
            yield from error_lines(span, folded(rest), width, full)


def passed_on_errors(spans: "Sequence[Span]") -> set[str | None]:
    """Spans that failed only because a child did: the error is shown once, where it began."""
    errors: dict[str | None, str] = {span.span_id: failure_text(span) for span in spans if is_error(span)}
    return {
        span.parent_id
        for span in spans
        if is_error(span) and errors.get(span.parent_id) == errors[span.span_id]
    }


def folded(guide: str) -> str:
    """The guide of a deep span, shortened so that there is room for the span."""
    return guide if len(guide) <= MAX_GUIDE else "⋯" + guide[1 - MAX_GUIDE :]


def walk(spans: "Sequence[Span]") -> "Iterator[tuple[str, str, Span]]":
    """Spans depth first, each with the lines to draw before its own line and before those below it."""
    ids = {span.span_id for span in spans}
    children: dict[str | None, list[Span]] = {}
    for span in spans:
        # A parent that is not in the trace was remote, or came too late to be recorded.
        children.setdefault(span.parent_id if span.parent_id in ids else None, []).append(span)
    stack = [("", "", span) for span in reversed(children.get(None, []))]
    while stack:
        guide, below, span = stack.pop()
        own = children.get(span.span_id, [])
        yield guide, below + ("│ " if own else "  "), span
        for child in reversed(own):
            last = child is own[-1]
            stack.append((below + ("└─" if last else "├─"), below + ("  " if last else "│ "), child))


def span_line(span: "Span", guide: str, width: int, begin: int, end: int) -> Text:
    line = Text(guide, style="dim")
    failed = is_error(span)
    kind = str(span.span_type or "")
    line.append(f"{'✗' if failed else '●'} ", style="bold red" if failed else TYPE_STYLES.get(kind, ""))
    line.append(str(span.name), style="bold red" if failed else "bold")
    if kind and kind != "UNKNOWN":
        line.append(f" {kind}", style=TYPE_STYLES.get(kind, "dim"))
    for fact in (span_tokens(span), span_model(span)):
        if fact:
            line.append(f" {fact}", style="dim")
    left = max(width, MIN_WIDTH) - BAR_WIDTH - DURATION_WIDTH - 2
    # A control character is as wide as what will stand for it.
    line.plain = printable(line.plain)
    line.truncate(left, overflow="ellipsis", pad=True)
    taken = None if span.end_time_ns is None else (span.end_time_ns - span.start_time_ns) / 1e6
    line.append(f"{duration_text(taken):>{DURATION_WIDTH}} ", style="red" if failed else "")
    line.append(
        bar(span.start_time_ns, span.end_time_ns or end, begin, end), style="red" if failed else "blue"
    )
    return line


def bar(start: int, stop: int, begin: int, end: int) -> str:
    """When in the trace a span ran: at least one mark, so that a short one is seen."""
    scale = BAR_WIDTH / max(1, end - begin)
    first = min(BAR_WIDTH - 1, int((start - begin) * scale))
    last = min(BAR_WIDTH, max(first + 1, round((stop - begin) * scale)))
    return "·" * first + "━" * (last - first) + "·" * (BAR_WIDTH - last)


def detail_lines(span: "Span", rest: str, width: int, full: bool) -> Iterator[Text]:
    yield from value_lines("in", span.inputs, rest, width, full)
    if span.span_type == "RETRIEVER" and (documents := documents_of(span.outputs)):
        yield from document_lines(documents, rest, width, full)
    else:
        yield from value_lines("out", span.outputs, rest, width, full)


def error_lines(span: "Span", rest: str, width: int, full: bool) -> Iterator[Text]:
    exceptions = [event for event in span.events if event.name == "exception"]
    for event in exceptions:
        attributes = as_dict(event.attributes)
        stack = str(attributes.get("exception.stacktrace") or "")
        yield from labelled("error", exception_text(attributes), rest, width, full, "bold red")
        if full:
            yield from labelled("", stack, rest, width, full, "red")
        elif where := last_frame(stack):
            yield from labelled("", f"at {where}", rest, width, full, "red")
    if not exceptions and is_error(span) and (why := failure_text(span)):
        yield from labelled("error", why, rest, width, full, "bold red")


def value_lines(label: str, value: Any, rest: str, width: int, full: bool) -> Iterator[Text]:
    if value is not None and value != {}:
        yield from labelled(label, pretty(value) if full else brief(value), rest, width, full)


def document_lines(documents: list[Any], rest: str, width: int, full: bool) -> Iterator[Text]:
    many = f"{len(documents)} document{'' if len(documents) == 1 else 's'}"
    yield from labelled("out", many, rest, width, full)
    for number, document in enumerate(documents, 1):
        if number > MAX_DOCUMENTS and not full:
            yield from labelled("", f"… and {len(documents) - MAX_DOCUMENTS} more", rest, width, full)
            return
        yield from labelled("", f"{number}. {document_text(document)}", rest, width, full)


def labelled(label: str, text: str, rest: str, width: int, full: bool, style: str = "") -> Iterator[Text]:
    """Lines of text under a span: the first one only, cut to the width, unless ``full``."""
    lines = text.splitlines() or [""]
    for number, line in enumerate(lines if full else [" ".join(text.split())]):
        out = Text(rest, style="dim", end="\n")
        out.append(f"{label if number == 0 else '':<{LABEL_WIDTH}} ", style="dim")
        body = line if full else cut(line, max(width, MIN_WIDTH) - cell_len(rest) - LABEL_WIDTH - 1)
        out.append(body, style=style or "not dim")
        yield out


def cut(text: str, width: int) -> str:
    """Text that fits, and how much of it is missing."""
    # Measured on what could fit at all, as it will be shown: a payload may be megabytes.
    head = printable(text[:width])
    if len(text) <= width and cell_len(head) <= width:
        return head
    note = f"… ({len(text):,} characters)"
    return set_cell_size(head, max(1, width - cell_len(note))).rstrip() + note


def as_dict(value: Any) -> Mapping[str, Any]:
    """A value where MLflow's conventions have an object: agents put there what they like."""
    return value if isinstance(value, dict) else {}


def pretty(value: Any) -> str:
    return value if isinstance(value, str) else as_json(value, indent=2)


def documents_of(value: Any) -> list[Any]:
    """Documents of a retriever's output, as MLflow writes them."""
    if isinstance(value, list) and all(isinstance(item, dict) and "page_content" in item for item in value):
        return value
    return []


def document_text(document: Mapping[str, Any]) -> str:
    metadata = as_dict(document.get("metadata"))
    named = metadata.get("doc_uri") or metadata.get("source") or metadata.get("title") or document.get("id")
    score = metadata.get("score", metadata.get("similarity_score"))
    parts = [
        str(named) if named else "",
        f"({score:.3f})" if isinstance(score, float) else "",
        " ".join(str(document["page_content"]).split()),
    ]
    return "  ".join(part for part in parts if part)


def body_of(text: str | None) -> Any:
    """A request or response body; the trace within it is drawn apart."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if not isinstance(value, dict):
        return value
    shown = {key: part for key, part in value.items() if key != "databricks_output"}
    return shown["body"] if set(shown) == {"body"} else shown


def span_model(span: "Span") -> str | None:
    # The second is all that MLflow's autologging of OpenAI leaves on a call that failed.
    models = (span.get_attribute(key) for key in ("mlflow.llm.model", "model"))
    return next((model for model in models if isinstance(model, str)), None)


def span_tokens(span: "Span") -> str | None:
    usage = as_dict(span.get_attribute("mlflow.chat.tokenUsage"))
    return tokens_text(usage.get("input_tokens"), usage.get("output_tokens"))


def tokens_text(inputs: Any, outputs: Any) -> str | None:
    counts = [count if isinstance(count, (int, float)) else None for count in (inputs, outputs)]
    if counts == [None, None]:
        return None
    return f"{counts[0] or 0:,} in / {counts[1] or 0:,} out"


def milliseconds(value: Any) -> float | None:
    return None if value is None else float(value)


def duration_text(taken: float | None) -> str:
    """A duration given in milliseconds; None is one that has not ended."""
    if taken is None:
        return "running"
    if taken < 10:
        return f"{taken:.1f} ms"
    if taken < 1000:
        return f"{taken:.0f} ms"
    if taken < 60_000:
        return f"{taken / 1000:.2f} s"
    return f"{int(taken // 60_000)} m {taken % 60_000 / 1000:.0f} s"


def is_error(span: "Span") -> bool:
    return str(span.status.status_code.value) == "ERROR"


def state_style(state: str) -> str:
    return {"OK": "green", "ERROR": "bold red"}.get(state, "yellow")


def first_failure(spans: "Sequence[Span]") -> str | None:
    """Where an error began: the deepest failed span of the first branch that failed."""
    failed = {span.span_id: span for span in spans if is_error(span)}
    parents = {span.parent_id for span in failed.values()}
    origin = next((span for span in failed.values() if span.span_id not in parents), None)
    if origin is None:
        return None
    why = failure_text(origin)
    return cut(f"{origin.name}: {why}" if why else str(origin.name), MAX_FAILURE)


def failure_text(span: "Span") -> str:
    event = next((event for event in span.events if event.name == "exception"), None)
    if event is not None:
        return exception_text(as_dict(event.attributes))
    # OpenTelemetry's convention for those that record no exception.
    return str(span.status.description or span.get_attribute("error.type") or "")


def exception_text(attributes: Mapping[str, Any]) -> str:
    kind, message = attributes.get("exception.type"), attributes.get("exception.message")
    return ": ".join(str(part) for part in (kind, message) if part) or "an exception"


def last_frame(stack: str) -> str | None:
    """Where an exception was raised, as an editor opens it: the last line of the agent's own, if it has one.

    In a library, its path there, which says more than the place of the environment.
    """
    frames = list(FRAME.finditer(stack))
    if not frames:
        return None
    own = [frame for frame in frames if LIBRARIES not in frame["file"]]
    frame = (own or frames)[-1]
    return f"{frame['file'].rpartition('/site-packages/')[2]}:{frame['line']} in {frame['function']}"
