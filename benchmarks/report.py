"""What every benchmark ends with: one result as JSON, as a Markdown table and, where it has one, as a plot.

Results go to ``benchmarks/results``, or to the folder that ``BENCH_RESULTS`` names. ``BENCH_QUICK=1`` does
a tenth of the work: enough to see that a benchmark runs, too little to believe its figures.
"""

import argparse
import datetime
import importlib
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

__all__ = [
    "Axes",
    "Result",
    "Target",
    "cell",
    "machine",
    "main",
    "markdown_table",
    "quick",
    "results_folder",
    "say",
    "scaled",
    "target_row",
    "write",
]

Axes = Any
"""``matplotlib.axes.Axes``; matplotlib comes with the extra ``bench`` and is imported for a plot only."""

PACKAGES: Final = (
    "mlflow-tracing",
    "opentelemetry-sdk",
    "deltalake",
    "pyarrow",
    "duckdb",
    "orjson",
    "starlette",
    "uvicorn",
    "httpx",
)
QUICK_SHARE: Final = 10
"""A quick run does the count of a full one divided by this."""


@dataclass(frozen=True)
class Target:
    """A limit that was set, and what was measured against it, in the same unit."""

    what: str
    limit: float
    measured: float
    unit: str
    at_most: bool = True

    @property
    def met(self) -> bool:
        """Whether the measured value keeps to the limit. What could not be measured (NaN) does not."""
        return self.measured <= self.limit if self.at_most else self.measured >= self.limit


@dataclass(frozen=True)
class Result:
    """What one benchmark found.

    Args:
        name: of its module, and of the files.
        question: what it answers, in one sentence.
        rows: the table: one mapping of heading to value per line; a heading that a line lacks is left empty.
        targets: limits and what was measured against them.
        notes: how it was measured, and what the figures do not say.
    """

    name: str
    question: str
    rows: list[dict[str, object]]
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def machine() -> dict[str, object]:
    """The machine and the versions that figures hold for."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gb": memory_gb(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: found for name in PACKAGES if (found := installed(name))},
    }


def processor() -> str:
    """The processor's name where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (ValueError, OSError):
        return None


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def quick() -> bool:
    """Whether this run is to show that the benchmark works, not to measure."""
    return os.environ.get("BENCH_QUICK", "").lower() in {"1", "true"}


def scaled(count: int) -> int:
    """How many of what a full run does ``count`` times this run does; at least one."""
    return max(1, count // QUICK_SHARE) if quick() else count


def results_folder() -> Path:
    """Where results are written and read."""
    return Path(os.environ.get("BENCH_RESULTS") or Path(__file__).parent / "results")


def write(result: Result, plot: Callable[[Axes], None] | None = None) -> None:
    """Write ``<name>.json``, ``<name>.md`` and, given a ``plot``, ``<name>.png``; print the Markdown.

    Args:
        plot: draws into the axes it is given. Without matplotlib there is no picture, and a line says so.
    """
    folder = results_folder()
    folder.mkdir(parents=True, exist_ok=True)
    found = machine()
    picture = folder / f"{result.name}.png"
    drawn = plot is not None and draw(plot, picture)
    if not drawn:
        picture.unlink(missing_ok=True)  # a picture of another run beside this table would mislead
    text = markdown(result, found, picture.name if drawn else None)
    (folder / f"{result.name}.json").write_text(
        json.dumps(as_json(result, found), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (folder / f"{result.name}.md").write_text(text, encoding="utf-8")
    say(text)


def as_json(result: Result, found: Mapping[str, object]) -> dict[str, object]:
    return {
        "name": result.name,
        "question": result.question,
        "quick": quick(),
        "machine": dict(found),
        "rows": result.rows,
        "targets": [target_json(target) for target in result.targets],
        "notes": result.notes,
    }


def target_json(target: Target) -> dict[str, object]:
    measured = None if math.isnan(target.measured) else target.measured  # JSON has no NaN
    return {**asdict(target), "measured": measured, "met": target.met}


def draw(plot: Callable[[Axes], None], path: Path) -> bool:
    try:
        figures: Any = importlib.import_module("matplotlib.figure")
    except ImportError:
        say(f"no plot {path.name}: matplotlib is missing (pip install 'tracelake[bench]')")
        return False
    figure = figures.Figure(figsize=(7, 4.2), layout="constrained")
    plot(figure.subplots())
    figure.savefig(path, dpi=120)
    return True


def markdown(result: Result, found: Mapping[str, object], picture: str | None) -> str:
    lines = [f"# {result.name.replace('_', ' ')}", "", result.question, ""]
    if quick():
        lines += ["A quick run, a tenth of the work: it shows that the benchmark runs, no more.", ""]
    if picture:
        lines += [f"![{result.name}]({picture})", ""]
    lines += [*markdown_table(result.rows), ""]
    if result.targets:
        lines += [*markdown_table([target_row(target) for target in result.targets]), ""]
    lines += [f"- {note}" for note in result.notes]
    if result.notes:
        lines += [""]
    lines += [", ".join(f"{name} {cell(value)}" for name, value in found.items())]
    return "\n".join(lines) + "\n"


def target_row(target: Target) -> dict[str, object]:
    sign = "≤" if target.at_most else "≥"
    return {
        "target": target.what,
        "limit": f"{sign} {cell(target.limit)} {target.unit}".rstrip(),
        "measured": f"{cell(target.measured)} {target.unit}".rstrip(),
        "": "met" if target.met else "**not met**",
    }


def markdown_table(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Lines of a Markdown table whose columns are the keys of all rows, in the order they first appear."""
    headings = list(dict.fromkeys(key for row in rows for key in row))
    if not headings:
        return []
    lines = [headings, ["---"] * len(headings)]
    lines += [[cell(row[name]) if name in row else "" for name in headings] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def cell(value: object) -> str:
    """A value as people read it: figures to three digits, thousands set apart, a dash for none."""
    if value is None or value != value:  # NaN
        return "\N{EN DASH}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value).replace("|", "\\|")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(run: Callable[[], None]) -> None:
    """The command line of a benchmark, ``python -m benchmarks.<name>``: no arguments, but ``--help``."""
    parser = argparse.ArgumentParser(
        description=sys.modules[run.__module__].__doc__,
        epilog=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args()
    run()
