"""What a replay says: its figures as one object for machines, as text for a terminal, as Markdown, as a plot.

Answers are what models and strangers wrote: a terminal gets no control character of theirs, and in Markdown
they stand in blocks of code.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from deploy.bench import percentile
from deploy.output import printable, write_result
from deploy.replay import Replay
from deploy.replay_compare import Difference, Outcome
from inference_table.errors import TracelakeError
from inference_table.result import QueryResult

__all__ = ["check_plot", "figures", "markdown", "to_json", "write_plot", "write_report"]

LATE_SECONDS: Final = 0.1
"""A request that is sent later than this is no longer at its recorded time."""
SHOWN: Final = 20
"""Changed and failed requests that a terminal lists."""
LISTED: Final = 1000
"""The same in Markdown."""
COLORS: Final = {"same": "#4a90d9", "changed": "#e8912d", "failed": "#d9534f"}


def figures(replay: Replay, target: str) -> dict[str, Any]:
    """All figures, ready for JSON: ms, seconds, tokens; None where there is none.

    Latency and tokens are those of the pairs of which both are known: their number is ``of``.
    """
    plan, outcomes = replay.plan, replay.outcomes
    verdicts = [one.verdict for one in outcomes]
    late = [one.late_seconds for one in outcomes if one.late_seconds > LATE_SECONDS]
    return {
        "run": plan.run,
        "target": target,
        "speed": "max" if plan.speed is None else plan.speed,
        "concurrency": plan.concurrency,
        "interrupted": replay.is_interrupted,
        "requests": {
            "chosen": replay.chosen.num_rows,
            "skipped": dict(replay.skipped),
            "answered": sum(one.error is None for one in outcomes),
            "under_way": replay.under_way,
            **{name: verdicts.count(name) for name in COLORS},
        },
        "changed": {
            name: sum(one.verdict == "changed" and name in one.changes for one in outcomes)
            for name in ("status", "answer", "tools")
        },
        "latency_ms": compared(outcomes, "ms", {"p50": 0.5, "p95": 0.95}),
        "input_tokens": compared(outcomes, "input_tokens", {}),
        "output_tokens": compared(outcomes, "output_tokens", {}),
        "rows_of_the_target": sum(one.is_row_read for one in outcomes),
        "late": {"requests": len(late), "seconds": max(late, default=0.0)},
        "seconds": replay.seconds,
        "outcomes": [outcome_json(one) for one in outcomes],
    }


def compared(outcomes: Sequence[Outcome], name: str, shares: Mapping[str, float]) -> dict[str, Any]:
    pairs = [
        (getattr(one.old, name), getattr(one.new, name))
        for one in outcomes
        if one.error is None and None not in (getattr(one.old, name), getattr(one.new, name))
    ]
    found: dict[str, Any] = {"of": len(pairs)}
    for side, label in enumerate(("old", "new")):
        values = [pair[side] for pair in pairs]
        if shares:
            found[label] = {key: number(percentile(values, share)) for key, share in shares.items()}
        else:
            found[label] = sum(values) if values else None
    return found


def number(value: float) -> float | None:
    return None if math.isnan(value) else value


def outcome_json(one: Outcome) -> dict[str, Any]:
    tools = one.tools
    sides = [
        {
            "status": side.status,
            "ms": side.ms,
            "input_tokens": side.input_tokens,
            "output_tokens": side.output_tokens,
            "tools": list(named),
        }
        for side, named in ((one.old, tools[0]), (one.new, tools[1]))
    ]
    return {
        "databricks_request_id": one.request_id,
        "replay_id": one.new_id,
        "verdict": one.verdict,
        "changes": one.changes,
        "error": one.error,
        "late_seconds": round(one.late_seconds, 3),
        "old": sides[0],
        "new": sides[1],
        "differences": [{"path": d.path, "old": d.old, "new": d.new} for d in one.differences],
    }


def sentences(found: Mapping[str, Any]) -> Iterator[str]:
    """What was sent, and what came of it."""
    requests = found["requests"]
    answered, seconds = requests["answered"], found["seconds"]
    rate = f" in {seconds:.1f} s, {answered / seconds:.1f} a second" if seconds and answered else ""
    yield f"{answered:,} answers of {found['target']}{rate}. Run {found['run']}."
    yield (
        f"{requests['same']:,} same, {requests['changed']:,} changed "
        f"({', '.join(f'{name} {count:,}' for name, count in found['changed'].items())}), "
        f"{requests['failed']:,} failed."
    )
    if found["interrupted"]:
        left = requests["chosen"] - sum(requests["skipped"].values()) - len(found["outcomes"])
        yield f"Interrupted: {left:,} requests have no answer, {requests['under_way']:,} of them were sent."
    if skipped := requests["skipped"]:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())
        yield f"Not sent, of {requests['chosen']:,} chosen: {reasons}."
    if late := found["late"]["requests"]:
        yield (
            f"{late:,} were sent late, by up to {found['late']['seconds']:.1f} s: {found['concurrency']:,} "
            "were under way (--concurrency), or this machine was busy."
        )
    by_rows = found["rows_of_the_target"]
    yield (
        f"New latency, tokens and tools: {by_rows:,} from the target's rows, {answered - by_rows:,} as seen "
        "from here."
    )


def summary_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    latency = found["latency_ms"]
    rows = [
        line(f"latency {name}, ms", latency["old"][name], latency["new"][name], latency["of"], 1)
        for name in ("p50", "p95")
    ]
    for name in ("input_tokens", "output_tokens"):
        one = found[name]
        rows.append(line(name.replace("_", " "), one["old"], one["new"], one["of"], 0))
    return rows


def line(what: str, old: float | None, new: float | None, of: int, places: int) -> dict[str, Any]:
    change = f"{100 * (new - old) / old:+.0f} %" if old and new is not None else ""
    texts = ("" if value is None else f"{value:,.{places}f}" for value in (old, new))
    return {"": what, **dict(zip(("recorded", "replayed"), texts, strict=True)), "change": change, "of": of}


def notable(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those that failed, then those that changed, each in the order of their answers."""
    return [one for verdict in ("failed", "changed") for one in outcomes if one.verdict == verdict]


def head_line(one: Outcome) -> str:
    """What became of a request, in one line."""
    old, new = one.old, one.new
    what = one.verdict if one.error is not None else f"{one.verdict}: {', '.join(one.changes)}"
    line = f"{what} · status {old.status} → {new.status or '-'} · {shown(old.ms)} → {shown(new.ms)} ms"
    if new.input_tokens is None and new.output_tokens is None:
        return line
    return (
        f"{line} · tokens {shown(old.input_tokens)} in, {shown(old.output_tokens)} out → "
        f"{shown(new.input_tokens)} in, {shown(new.output_tokens)} out"
    )


def diff_lines(one: Outcome) -> Iterator[str]:
    """Where the answers differ, as a diff has it."""
    if one.error is not None:
        yield f"! {one.error}"
    tools = [Difference("tools", *(", ".join(names) or "none" for names in one.tools))]
    for found in [*(tools if "tools" in one.changes else []), *one.differences]:
        yield f"@ {found.path or 'answer'}"
        for sign, text in (("-", found.old), ("+", found.new)):
            if text is not None:
                yield f"{sign} {text}"


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def write_report(replay: Replay, found: Mapping[str, Any], write: Callable[[str], object]) -> None:
    """The figures for a terminal; sentences go to ``write``, a line each."""
    for sentence in sentences(found):
        write(printable(sentence))
    write("")
    write_rows(summary_rows(found))
    listed = notable(replay.outcomes)
    for one in listed[:SHOWN]:
        write("")
        write(f"{one.request_id}  {head_line(one)}")
        for text in diff_lines(one):
            write(f"  {printable(text)}")
    if len(listed) > SHOWN:
        write("")
        write(f"… and {len(listed) - SHOWN:,} more: --report FILE.md lists them, --json FILE has all")


def write_rows(rows: list[dict[str, Any]]) -> None:
    write_result(QueryResult(pa.Table.from_pylist(rows)), "table")


def markdown(replay: Replay, found: Mapping[str, Any], plot: str | None) -> str:
    """The report as a document; ``plot`` is the picture's path from there."""
    lines = ["# Replay", "", *(f"- {code_free(one)}" for one in sentences(found)), ""]
    if plot:
        lines += [f"![latency, recorded and replayed]({plot})", ""]
    lines += ["| | recorded | replayed | change | of |", "| --- | ---: | ---: | ---: | ---: |"]
    lines += [f"| {' | '.join(map(str, row.values()))} |" for row in summary_rows(found)]
    listed = notable(replay.outcomes)
    if listed:
        lines += ["", "## Failed and changed", ""]
    for one in listed[:LISTED]:
        lines += [f"### {one.request_id}", "", head_line(one), ""]
        lines += ["```diff", *map(printable, diff_lines(one)), "```", ""]
    if len(listed) > LISTED:
        lines += [f"… and {len(listed) - LISTED:,} more", ""]
    lines += ["", "## Both in SQL", "", "```sql", *SQL.format(run=replay.plan.run).splitlines(), "```", ""]
    return "\n".join(lines)


SQL: Final = """select old.databricks_request_id, old.response as recorded, new.response as replayed
from payload as old join payload as new
    on new.request_metadata['replay_of'] = old.databricks_request_id
where new.request_metadata['replay_run'] = '{run}'"""


def code_free(text: str) -> str:
    """A sentence in which Markdown and HTML find nothing of theirs."""
    return "".join(f"\\{char}" if char in "\\`*_[]<>|!" else char for char in printable(text))


def to_json(found: Mapping[str, Any]) -> str:
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


def check_plot(file: Path) -> None:
    """Find out before anything is sent whether there will be a plot.

    Raises:
        TracelakeError: matplotlib is not installed, or draws no picture of the kind that ``file`` ends in.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ModuleNotFoundError as error:
        raise TracelakeError(
            "cannot draw the plot: matplotlib is not installed; pip install 'tracelake[plot]', "
            "or leave out --plot"
        ) from error
    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if file.suffix.removeprefix(".").lower() not in kinds:
        raise TracelakeError(
            f"cannot draw the plot into {file}: its name ends in none of .{', .'.join(kinds)}"
        )


def write_plot(replay: Replay, file: Path) -> None:
    """Latency of each pair, and how both are distributed, as a picture of the kind that ``file`` ends in."""
    from matplotlib.figure import Figure

    pairs = [
        (one.old.ms, one.new.ms, one.verdict)
        for one in replay.outcomes
        if one.error is None and one.old.ms is not None and one.new.ms is not None
    ]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    # Logarithms have no zero; rows hold whole milliseconds.
    points = [(max(old, 0.5), max(new, 0.5), verdict) for old, new, verdict in pairs]
    draw_pairs(left, points)
    draw_shares(right, points)
    failed = sum(one.error is not None for one in replay.outcomes)
    figure.suptitle(
        f"{len(pairs):,} requests, recorded and replayed"
        + (f"; {failed:,} more have no answer" if failed else "")
    )
    try:
        figure.savefig(file, dpi=130)
    except (OSError, ValueError) as error:
        raise TracelakeError(f"cannot draw the plot into {file}: {error}") from error


def draw_pairs(axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    values = [value for point in points for value in point[:2]] or [1.0]
    low, high = min(values) / 1.4, max(values) * 1.4
    axes.plot([low, high], [low, high], color="#999999", linewidth=1, zorder=1)
    axes.text(high / 1.1, high / 1.6, "as long as before", ha="right", va="top", color="#777777", fontsize=8)
    for verdict, color in COLORS.items():
        own = [point for point in points if point[2] == verdict]
        if own:
            axes.scatter(
                [old for old, _, _ in own],
                [new for _, new, _ in own],
                s=18,
                color=color,
                alpha=0.7,
                linewidths=0,
                label=f"{verdict} ({len(own):,})",
                zorder=2,
            )
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(low, high),
        ylim=(low, high),
        xlabel="recorded, ms",
        ylabel="replayed, ms",
        title="latency of each request",
    )
    if points:
        axes.legend(frameon=False, loc="upper left")
    axes.grid(alpha=0.2)
    plain_numbers(axes.xaxis, axes.yaxis)


def draw_shares(axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    for side, (label, color) in enumerate((("recorded", "#888888"), ("replayed", "#4a90d9"))):
        values = sorted(float(point[side]) for point in points)
        if not values:
            continue
        shares = [(index + 1) / len(values) for index in range(len(values))]
        p50, p95 = (f"{percentile(values, share):,.0f}" for share in (0.5, 0.95))
        axes.step(values, shares, where="post", color=color, label=f"{label}: p50 {p50}, p95 {p95} ms")
    axes.set(
        xscale="log", xlabel="ms", ylabel="share of the requests", ylim=(0, 1.02), title="latency of all"
    )
    if points:
        axes.legend(frameon=False, loc="upper left")
    axes.grid(alpha=0.2)
    plain_numbers(axes.xaxis)


def plain_numbers(*logarithmic: Any) -> None:
    """100 in place of a power of ten."""
    from matplotlib.ticker import FuncFormatter

    for axis in logarithmic:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
