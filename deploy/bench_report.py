"""What a comparison says: its figures as one object for machines, and as text for people.

Noise is the same comparison, of the agent without capture with itself. Its requests are split at random into
two halves, again and again; 19 of 20 such splits differ by less than the figure that is given. As halves are
smaller than the whole, it is rather too large. It costs no request.
"""

import json
import math
import os
import platform
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from importlib.metadata import PackageNotFoundError, version
from random import Random
from typing import Any, Final

import pyarrow as pa

from deploy.bench import percentile
from deploy.comparison import Comparison, Recorded, Reply
from deploy.output import printable, write_result
from inference_table.result import QueryResult
from serving.mlflow_version import installed_version

__all__ = ["figures", "noise_of", "problems", "progress", "to_json", "write_report"]

SHARES: Final = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
SIZES: Final = {"< 100 KB": 1e5, "< 1 MB": 1e6, "< 10 MB": 1e7, "≥ 10 MB": math.inf}
SPLITS: Final = 200
MEANINGFUL: Final = 0.95
"""Share of the splits that differ by less than the noise."""

Pair = tuple[Reply, Reply]


def figures(comparison: Comparison) -> dict[str, Any]:
    """All figures, ready for JSON: ms, bytes, and shares of one; nan where there is none.

    Where a figure is given for the agent ``without`` capture and ``with`` it, ``added`` is the difference.
    """
    plan, good = comparison.plan, comparison.good
    cpu_ms = [1000 * seconds / plan.measured for seconds in comparison.cpu_seconds]
    return {
        "target": plan.target,
        "path": plan.path,
        "settings": dict(plan.settings),
        "machine": machine(),
        "requests": {
            "bodies": len(plan.bodies),
            "concurrency": plan.concurrency,
            "sent_to_each": plan.sent,
            "measured": plan.measured,
            "failed_without": failures(comparison, 0),
            "failed_with": failures(comparison, 1),
            "captured": len(comparison.captured),
            "recorded": len(comparison.recorded),
        },
        "reply_ms": compared(good, lambda reply: reply.total_ms),
        "first_byte_ms": (
            compared(good, lambda reply: reply.first_byte_ms)
            if any(one.is_stream for one, _ in good)
            else None
        ),
        "cpu_ms_per_request": difference(*cpu_ms),
        "memory_bytes": difference(*comparison.rss_bytes),
        "capture_overhead": overhead(comparison, good),
        "by_trace_size": by_trace_size(comparison),
    }


def machine() -> dict[str, Any]:
    try:
        number = version("tracelake")
    except PackageNotFoundError:
        number = None
    return {
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "tracelake": number,
        "mlflow": installed_version(),
    }


def failures(comparison: Comparison, side: int) -> int:
    return sum(not pair[side].is_success for pair in comparison.pairs)


def difference(without: float, with_capture: float) -> dict[str, float]:
    return {"without": without, "with": with_capture, "added": with_capture - without}


def compared(pairs: Sequence[Pair], time_of: Callable[[Reply], float]) -> dict[str, dict[str, float]]:
    """By percentile: without, with, added, and the noise."""
    without, captured = ([time_of(pair[side]) for pair in pairs] for side in (0, 1))
    by_body = defaultdict[int, list[float]](list)
    for plain, _ in pairs:
        by_body[plain.body].append(time_of(plain))
    noise = noise_of(list(by_body.values()))
    return {
        name: {**difference(percentile(without, share), percentile(captured, share)), "noise": noise[name]}
        for name, share in SHARES.items()
    }


def noise_of(groups: Sequence[Sequence[float]]) -> dict[str, float]:
    """By percentile, what two random halves of the same measurements differ by at most, 19 times of 20.

    Args:
        groups: measurements of the same thing each, which are split evenly.
    """
    draw = Random(0)
    found: dict[str, list[float]] = {name: [] for name in SHARES}
    if sum(map(len, groups)) < 2:
        return dict.fromkeys(SHARES, math.nan)
    for _ in range(SPLITS):
        halves: tuple[list[float], list[float]] = ([], [])
        odd = draw.random() < 0.5
        for group in groups:
            shuffled = draw.sample(group, len(group))
            halves[odd].extend(shuffled[::2])
            halves[not odd].extend(shuffled[1::2])
            odd ^= len(group) % 2 == 1
        for name, share in SHARES.items():
            found[name].append(abs(percentile(halves[0], share) - percentile(halves[1], share)))
    return {name: percentile(values, MEANINGFUL) for name, values in found.items()}


def rows_of(comparison: Comparison, pairs: Iterable[Pair]) -> list[Recorded]:
    rows = (comparison.recorded.get(captured.request_id or "") for _, captured in pairs)
    return [row for row in rows if row is not None]


def overhead(comparison: Comparison, pairs: Sequence[Pair]) -> dict[str, float]:
    """Milliseconds of ``capture_overhead_us``, and the share of the added median that they explain.

    The share is nan where what was added is within the noise.
    """
    own = [row.capture_overhead_us / 1000 for row in rows_of(comparison, pairs)]
    p50 = compared(pairs, lambda reply: reply.total_ms)["p50"]
    share = percentile(own, 0.5) / p50["added"] if p50["added"] > p50["noise"] else math.nan
    return {"p50": percentile(own, 0.5), "p95": percentile(own, 0.95), "share_of_added": share}


def by_trace_size(comparison: Comparison) -> list[dict[str, Any]]:
    groups: dict[str, list[Pair]] = {name: [] for name in SIZES}
    for pair in comparison.good:
        for row in rows_of(comparison, [pair]):
            groups[next(name for name, limit in SIZES.items() if row.trace_bytes < limit)].append(pair)
    return [
        {
            "trace": name,
            "requests": len(pairs),
            "trace_bytes": percentile([row.trace_bytes for row in rows_of(comparison, pairs)], 0.5),
            "spans": percentile([row.span_count for row in rows_of(comparison, pairs)], 0.5),
            "reply_ms": compared(pairs, lambda reply: reply.total_ms),
            "capture_overhead": overhead(comparison, pairs),
        }
        for name, pairs in groups.items()
        if pairs
    ]


def problems(comparison: Comparison) -> list[str]:
    """What is wrong with the run, in sentences; none where all replies were 2xx and all rows are there."""
    plan = comparison.plan
    found = []
    for side, where in enumerate(("without", "with")):
        bad = [pair[side] for pair in comparison.pairs if not pair[side].is_success]
        if bad:
            first, statuses = bad[0], Counter(reply.status for reply in bad)
            words = comparison.last_words[side] if first.is_servers_fault else ""
            found.append(
                f"{len(bad):,} of {plan.measured:,} replies {where} capture are no success ("
                + ", ".join(
                    f"{number:,} with {status or 'none'}" for status, number in statuses.most_common()
                )
                + f") and count in no figure; the first, to the request in {plan.bodies[first.body].source}: "
                + str(first)
                + (f"; the agent's last words: {words}" if words else "")
            )
    if not comparison.captured:
        found.append(
            f"no request was captured: see whether POST {plan.path} is among INFERENCE_TABLE_PATHS, and what "
            "INFERENCE_TABLE_SAMPLING_FRACTION is"
        )
    if missing := len(set(comparison.captured) - comparison.recorded.keys()):
        found.append(
            f"{missing:,} of {len(comparison.captured):,} captured requests are not in the table; the "
            f"agent's last words: {comparison.last_words[1] or 'none'}"
        )
    return found


def to_json(found: Mapping[str, Any]) -> str:
    """Indented JSON; null where there is no figure."""
    return json.dumps(without_nan(found), indent=2, ensure_ascii=False) + "\n"


def without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def write_report(found: Mapping[str, Any], write: Callable[[str], object]) -> None:
    """The figures as tables, then what they mean; sentences go to ``write``, a line each."""
    requests = found["requests"]
    many = f", {requests['concurrency']:,} at a time" if requests["concurrency"] > 1 else ""
    write(printable(f"{found['target']}, POST {found['path']}: {requests['measured']:,} requests{many}"))
    write("")
    write_rows(cost_rows(found))
    if found["by_trace_size"]:
        write("")
        write("The median reply in ms, by the size of the recorded trace; `ours` is capture_overhead_us:")
        write("")
        write_rows([size_row(one) for one in found["by_trace_size"]])
    write("")
    for sentence in meaning(found):
        write(sentence)


def write_rows(rows: list[dict[str, Any]]) -> None:
    write_result(QueryResult(pa.Table.from_pylist(rows)), "table")


def cost_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = [
        figure_row(f"{what} {name}, ms", values)
        for what, key in (("reply", "reply_ms"), ("first byte", "first_byte_ms"))
        if found[key]
        for name, values in found[key].items()
    ]
    memory = {name: value / 1e6 for name, value in found["memory_bytes"].items()}
    rows.append(figure_row("CPU per request, ms", found["cpu_ms_per_request"]))
    rows.append(figure_row("memory after the run, MB", memory))
    return rows


def figure_row(name: str, values: Mapping[str, float]) -> dict[str, Any]:
    columns = {"without": "without", "with": "with capture", "added": "added", "noise": "noise"}
    return {"": name, **{title: decimal(values.get(key, math.nan)) for key, title in columns.items()}}


def size_row(one: Mapping[str, Any]) -> dict[str, Any]:
    p50 = one["reply_ms"]["p50"]
    return {
        "trace": one["trace"],
        "requests": one["requests"],
        "KB": decimal(one["trace_bytes"] / 1000),
        "without": decimal(p50["without"]),
        "with": decimal(p50["with"]),
        "added": decimal(p50["added"]),
        "noise": decimal(p50["noise"]),
        "ours": decimal(one["capture_overhead"]["p50"]),
    }


def decimal(value: float) -> Decimal | None:
    """With two places, so that a column lines up."""
    return None if math.isnan(value) else Decimal(f"{value:.2f}")


def meaning(found: Mapping[str, Any]) -> list[str]:
    requests, p50, own = found["requests"], found["reply_ms"]["p50"], found["capture_overhead"]
    lines = [
        f"Rows recorded: {requests['recorded']:,} of {requests['sent_to_each']:,} requests, with those "
        "that warmed up."
    ]
    if not math.isnan(p50["noise"]):
        lines.append(
            f"Noise: compared with itself, the agent without capture differs by up to {p50['noise']:.2f} ms "
            "(median reply); a smaller difference means nothing."
        )
    if p50["added"] > p50["noise"]:
        lines.append(
            f"Of the {p50['added']:.2f} ms added, our own code took {own['p50']:.2f} ms, "
            f"{own['share_of_added']:.0%} "
            "(capture_overhead_us); the rest is the tracing SDK's work, and waiting."
        )
    elif not math.isnan(own["p50"]):
        lines.append(
            f"Our own code took {own['p50']:.2f} ms (capture_overhead_us). What capture added to the reply "
            "can't be told from noise: send more requests, or give the agent a model that answers at once."
        )
    return lines


@contextmanager
def progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar, where a person may be waiting; yields what makes it advance."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task("requests", total=total)
        yield lambda number: bar.advance(task, number)
