"""Whether a commit takes longer the more commits, or the more rows, a table holds already.

Small batches go through the real spool and committer as fast as they can, with the maintenance it does by
itself. Then commits go to that table and to a young one in turn, so that whatever else the machine does hits
both alike; and the same with a table that holds a gigabyte and an empty one.
"""

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Final, Self

import pyarrow as pa

from benchmarks.report import Axes, Result, Target, main, scaled, write
from benchmarks.throughput import payload_bytes, recorded_rows
from deploy.bench import percentile
from inference_table.commit import Committer, open_or_create_table
from inference_table.compaction import Maintenance
from inference_table.ids import uuid7
from inference_table.record import Row, to_batch
from inference_table.settings import StorageSettings
from inference_table.spool import Spool

COMMITS: Final = 2000
WINDOW: Final = 50
"""Commits of which a median is taken; of the young table the first so many."""
BATCH_ROWS: Final = 10
BIG_BATCH_ROWS: Final = 300
PAIRS: Final = 40
HELD_BYTES: Final = 1_000_000_000
TRACE_BYTES: Final = 10_000
SEEDS: Final = 100

COMMIT_LIMIT: Final = 2.0
ROW_LIMIT: Final = 1.2


class Table:
    """A table with its spool, its committer and its maintenance, in this thread."""

    def __init__(self, folder: Path) -> None:
        self.settings = StorageSettings(uri=str(folder / "payload"), spool_dir=folder / "spool")
        open_or_create_table(self.settings)
        self._spool = Spool(self.settings)
        self._committer = Committer(self.settings)
        self._maintenance = Maintenance(self.settings)

    def spool(self, batch: pa.RecordBatch) -> None:
        self._spool.append(batch, sync=False)

    def commit(self) -> float:
        """Commit all that is spooled; returns milliseconds."""
        started = time.perf_counter()
        if not self._committer.acquire() or self._committer.commit_once() is None:
            raise RuntimeError("there was nothing to commit")
        return (time.perf_counter() - started) * 1000

    def maintain(self) -> float:
        """Do what is due after a commit; returns milliseconds."""
        started = time.perf_counter()
        self._maintenance.step()
        return (time.perf_counter() - started) * 1000

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._maintenance.close()
        self._committer.release()
        self._spool.close()


def batch_of(rows: list[Row], start: int, count: int) -> pa.RecordBatch:
    """``count`` of the rows from ``start`` on, over and over, with new ids."""
    taken = [rows[(start + number) % len(rows)] for number in range(count)]
    return to_batch([replace(row, databricks_request_id=uuid7()) for row in taken])


def grow(table: Table, rows: list[Row], count: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each of so many commits, and of the maintenance after it."""
    commits, maintenance = [], []
    for number in range(count):
        table.spool(batch_of(rows, number * BATCH_ROWS, BATCH_ROWS))
        commits.append(table.commit())
        maintenance.append(table.maintain())
    return commits, maintenance


def in_turn(
    first: Table, second: Table, rows: list[Row], batch: int, pairs: int
) -> tuple[list[float], list[float]]:
    """Milliseconds of commits of ``batch`` rows to one and the other; the order alternates."""
    times: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        for side in (0, 1) if pair % 2 == 0 else (1, 0):
            table = (first, second)[side]
            table.spool(batch_of(rows, pair * batch, batch))
            times[side].append(table.commit())
            table.maintain()
    return times


def fill(table: Table, rows: list[Row], nbytes: int) -> None:
    once = sum(map(payload_bytes, rows))
    copies = max(1, nbytes // once)
    for copy in range(copies):
        table.spool(batch_of(rows, 0, len(rows)))
        if copy % 10 == 9 or copy == copies - 1:
            table.commit()


def run() -> None:
    count, held = scaled(COMMITS), scaled(HELD_BYTES)
    window, pairs = max(10, scaled(WINDOW)), max(10, scaled(PAIRS))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        [rows] = recorded_rows(folder, [{"trace_bytes": TRACE_BYTES, "seed": seed} for seed in range(SEEDS)])
        with Table(folder / "old") as old, Table(folder / "young") as young:
            commits, maintenance = grow(old, rows, count - window // 2)
            by_commits = in_turn(young, old, rows, BATCH_ROWS, window)
        with Table(folder / "full") as full, Table(folder / "empty") as empty:
            fill(full, rows, held)
            by_rows = in_turn(empty, full, rows, BIG_BATCH_ROWS, pairs)
    table = [
        *lines(by_commits, (f"0 to {window} commits", f"{count} commits, around"), BATCH_ROWS),
        *lines(by_rows, ("empty", f"{held / 1e9:g} GB"), BIG_BATCH_ROWS),
    ]
    result = Result(
        "growth",
        "Does a commit take longer the more commits, or the more rows, the table holds already?",
        table,
        [
            Target(f"time per commit at {count} commits against 20", COMMIT_LIMIT, ratio(by_commits), "x"),
            Target("time per row against an empty table", ROW_LIMIT, ratio(by_rows), "x"),
        ],
        [
            "A commit goes from listing the spool to the deletion of its segments, with its fsyncs and every "
            "20th a checkpoint. Commits to the two tables that are compared were done in turn.",
            f"Maintenance after the {len(commits)} commits that made the old table took "
            f"{sum(maintenance) / 1000:.1f} s in all, {max(maintenance):.0f} ms at most. Small files are "
            "merged once their hour has 256 of them, so the old table has some hundred.",
            f"The empty table has {pairs} batches in the end, the full one as many beyond its first rows.",
        ],
    )
    write(result, lambda axes: plot(axes, commits))


def lines(
    times: tuple[list[float], list[float]], names: tuple[str, str], rows: int
) -> list[dict[str, object]]:
    return [
        {
            "table": name,
            "a commit of": f"{rows} rows",
            "commits timed": len(taken),
            "p50 ms": round(percentile(taken, 0.5), 1),
            "p99 ms": round(percentile(taken, 0.99), 1),
            "µs per row": round(percentile(taken, 0.5) * 1000 / rows),
        }
        for name, taken in zip(names, times, strict=True)
    ]


def ratio(times: tuple[list[float], list[float]]) -> float:
    """Of the medians."""
    return percentile(times[1], 0.5) / percentile(times[0], 0.5)


def plot(axes: Axes, commits: list[float]) -> None:
    axes.plot(range(1, len(commits) + 1), commits, linewidth=0.4, color="lightgrey", label="each commit")
    starts = range(0, max(1, len(commits) - WINDOW + 1), WINDOW // 2)
    medians = [percentile(commits[start : start + WINDOW], 0.5) for start in starts]
    axes.plot([start + WINDOW // 2 for start in starts], medians, label=f"median of {WINDOW}")
    axes.set(xlabel="commits in the table", ylabel="ms per commit", ylim=(0, percentile(commits, 0.99) * 1.2))
    axes.legend()


if __name__ == "__main__":
    main(run)
