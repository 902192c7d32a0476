"""All results in one place: which targets are met, and where the figures are."""

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from benchmarks.report import Target, cell, main, markdown_table, results_folder, say, target_row

__all__ = ["summary"]

ORDER: Final = (
    "agent_call",
    "added_latency",
    "durability",
    "neighbour",
    "requests_per_second",
    "throughput",
    "freshness",
    "memory",
    "soak",
    "growth",
    "query",
    "ui",
    "deployment",
    "peers",
)
"""Of the questions; a result with another name comes behind."""
FILE: Final = "README.md"


def run() -> None:
    folder = results_folder()
    text = summary(folder)
    (folder / FILE).write_text(text, encoding="utf-8")
    say(text)


def summary(folder: Path) -> str:
    """Markdown: the targets of all results in a folder, met or not, and a line for each result.

    Raises:
        FileNotFoundError: there are no results.
    """
    results = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    if not results:
        raise FileNotFoundError(f"no results in '{folder}': run a benchmark first")
    results.sort(key=place)
    rows = [
        {"benchmark": link(result), **target_row(target_from(target))}
        for result in results
        for target in result["targets"]
    ]
    met = sum(target["met"] for result in results for target in result["targets"])
    lines = ["# Benchmarks", "", f"{met} of {len(rows)} targets are met.", "", *markdown_table(rows), ""]
    lines += [f"- {link(result)}: {result['question']}{remark(result)}" for result in results]
    return "\n".join([*lines, "", *machines(results)]) + "\n"


def place(result: dict[str, Any]) -> tuple[int, str]:
    name = result["name"]
    return (ORDER.index(name) if name in ORDER else len(ORDER), name)


def title(result: dict[str, Any]) -> str:
    return str(result["name"]).replace("_", " ")


def link(result: dict[str, Any]) -> str:
    return f"[{title(result)}]({result['name']}.md)"


def remark(result: dict[str, Any]) -> str:
    return " (A quick run: no figures to believe.)" if result["quick"] else ""


def target_from(target: dict[str, Any]) -> Target:
    values = {field.name: target[field.name] for field in fields(Target)}
    if values["measured"] is None:
        values["measured"] = math.nan
    return Target(**values)


def machines(results: list[dict[str, Any]]) -> list[str]:
    """A line for each machine and set of versions; which benchmarks ran there, if there are several."""
    found: dict[str, list[str]] = {}
    for result in results:
        description = ", ".join(f"{name} {cell(value)}" for name, value in result["machine"].items())
        found.setdefault(description, []).append(title(result))
    if len(found) == 1:
        return list(found)
    return [f"- {', '.join(titles)}: {description}" for description, titles in found.items()]


if __name__ == "__main__":
    main(run)
