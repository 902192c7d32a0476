"""How fast rows are found, counted and taken apart in a table of 100,000 rows and more than a gigabyte.

Its rows are those of an agent of eight spans, recorded once and written again and again over some days with
times and ids of their own, by the real spool and committer; small files of hours that are over are merged.
Each kind of read has a process of its own, so that its memory is its own.
"""

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from benchmarks.query_process import Task, Timed
from benchmarks.report import Axes, Result, Target, main, scaled, write
from benchmarks.throughput import payload_bytes, recorded_rows
from deploy.bench import percentile
from inference_table.commit import Committer, open_or_create_table
from inference_table.merge import merge_some
from inference_table.record import Row, to_batch
from inference_table.settings import StorageSettings
from inference_table.spool import Spool
from inference_table.steps import ignore_step

ROWS: Final = 100_000
DAYS: Final = 5
COMMIT_ROWS: Final = 500
TRACE_BYTES: Final = 6_000
SEEDS: Final = 150
VERSIONS: Final = ("agent/1", "agent/2")
SEGMENTS: Final = 20
SEGMENT_ROWS: Final = 10
"""What waits between two commits of a server with 200 requests a second, in segments of 50 ms."""
REPEATS: Final = 15
NAIVE_REPEATS: Final = 5

COUNT: Final = "select count(*) from payload"
LISTING: Final = (
    "select databricks_request_id, state, duration_ms, total_tokens from requests"
    " order by request_time desc limit 200"
)
P95: Final = (
    "select served_entity_id, quantile_cont(duration_ms, 0.95) from requests"
    " where request_date = '{day}' group by all"
)
SPANS: Final = (
    "select type, count(*), avg(duration_ms) from spans where databricks_request_id in"
    " (select databricks_request_id from payload order by request_time desc limit 1000) group by all"
)
QUERIES: Final = {
    "count all rows": COUNT,
    "the same of the view requests": "select count(*) from requests",
    "a day's p95 by version": P95,
    "list the last 200 rows": LISTING,
    "the last 200 questions and answers": "select last_user_message, answer from requests"
    " order by request_time desc limit 200",
    "spans of the last 1,000 requests": SPANS,
}


@dataclass(frozen=True)
class Table:
    """The table that is read."""

    settings: StorageSettings
    ids: list[str]
    day: str
    """One that is whole."""
    nbytes: int
    """Of all requests, responses and trace infos, as text."""

    @property
    def day_bytes(self) -> int:
        """Of the day's files."""
        folder = self.settings.local_path / f"request_date={self.day}"
        return sum(path.stat().st_size for path in folder.glob("*.parquet"))

    def timed(self, kinds: list[str], repeats: int, sql: str = "") -> Timed:
        """Do it in a process of its own."""
        ids = random.Random(1).sample(self.ids, min(50, len(self.ids)))
        sql = sql.format(day=self.day)
        task = Task(self.settings.uri, str(self.settings.spool_dir), kinds, repeats, ids, sql)
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.query_process"]
        done = subprocess.run(
            command, input=json.dumps(asdict(task)), stdout=subprocess.PIPE, text=True, check=True
        )
        return Timed(**json.loads(done.stdout.splitlines()[-1]))


def made_table(folder: Path, templates: list[Row]) -> Table:
    settings = StorageSettings(uri=str(folder / "payload"), spool_dir=folder / "spool")
    end, ids = datetime.now(UTC), list[str]()

    def rows() -> Iterator[Row]:
        for row in rows_over_days(templates, scaled(ROWS), end):
            ids.append(row.databricks_request_id)
            yield row

    nbytes = fill(settings, rows())
    return Table(settings, ids, (end - timedelta(days=2)).date().isoformat(), nbytes)


def rows_over_days(templates: list[Row], count: int, end: datetime) -> Iterator[Row]:
    """Rows in the order of time, evenly over the days before ``end``, with ids that sort by it."""
    draw = random.Random(0)
    pause = timedelta(days=DAYS) / count
    for number in range(count):
        at = end - pause * (count - number)
        template = templates[number % len(templates)]
        request_id, trace_id = id_at(at, draw), f"tr-{draw.getrandbits(128):032x}"
        ids = [(template.databricks_request_id, request_id), (str(template.trace_id), trace_id)]
        yield replace(
            template,
            databricks_request_id=request_id,
            trace_id=trace_id,
            request_time=at,
            served_entity_id=VERSIONS[number % len(VERSIONS)],
            execution_duration_ms=draw.randrange(200, 20_000),
            response=[renamed(b"".join(template.response or ()), ids)],
            trace_info=renamed(template.trace_info or b"", ids),
        )


def renamed(text: bytes, names: list[tuple[str, str]]) -> bytes:
    for old, new in names:
        text = text.replace(old.encode(), new.encode())
    return text


def id_at(at: datetime, draw: random.Random) -> str:
    """A UUIDv7 of a time."""
    number = int(at.timestamp() * 1000) << 80 | 0x7 << 76 | draw.getrandbits(12) << 64 | draw.getrandbits(62)
    digits = f"{number | 0b10 << 62:032x}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def fill(settings: StorageSettings, rows: Iterator[Row]) -> int:
    """Commit rows as a server does, and merge the small files of hours that are over; returns their bytes."""
    open_or_create_table(settings)
    spool, committer = Spool(settings), Committer(settings)
    written, waiting = 0, list[Row]()
    for row in rows:
        waiting.append(row)
        if len(waiting) == COMMIT_ROWS:
            written += commit(spool, committer, waiting)
            waiting = []
    written += commit(spool, committer, waiting)
    committer.release()
    spool.close()
    while merge_some(settings, datetime.now(UTC), ignore_step):
        pass
    return written


def commit(spool: Spool, committer: Committer, rows: list[Row]) -> int:
    if rows:
        spool.append(to_batch(rows), sync=False)
        if not committer.acquire() or committer.commit_once() is None:
            raise RuntimeError("there was nothing to commit")
    return sum(map(payload_bytes, rows))


def spool_some(settings: StorageSettings, rows: list[Row]) -> None:
    """Rows that wait for a commit."""
    spool = Spool(settings)
    for number in range(SEGMENTS):
        spool.append(to_batch([rows[number % len(rows)]] * SEGMENT_ROWS), sync=False)
    spool.close()


def run() -> None:
    repeats, naive_repeats = max(3, scaled(REPEATS)), max(2, scaled(NAIVE_REPEATS))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        [templates] = recorded_rows(
            folder, [{"trace_bytes": TRACE_BYTES, "seed": one} for one in range(SEEDS)]
        )
        table = made_table(folder / "table", templates)
        get = table.timed(["get"], repeats)
        naive = table.timed(["naive"], naive_repeats)
        again = table.timed(["get"], repeats)
        timed = {title: table.timed(["query"], repeats, sql) for title, sql in QUERIES.items()}
        spool_some(table.settings, templates)
        waiting = table.timed(["query", "pending"], repeats, LISTING)
        day_bytes = table.day_bytes
    lines = [
        line("one row by its id", get, "get"),
        line("the same by DuckDB over pyarrow's dataset", naive, "naive"),
        line("one row by its id, again", again, "get"),
        *(line(title, one, "query") for title, one in timed.items()),
        line(f"list, with {SEGMENTS * SEGMENT_ROWS:,} pending rows", waiting, "pending"),
    ]
    p95, spans = timed["a day's p95 by version"], timed["spans of the last 1,000 requests"]
    peak = max(get.peak_mb, waiting.peak_mb, *(one.peak_mb for one in timed.values()))
    found = Result(
        "query",
        "How fast are rows found, counted and taken apart?",
        lines,
        [
            Target("one row by its id", 20.0, median(get, "get"), "ms"),
            Target(
                "the same by DuckDB over pyarrow's dataset, against it before and after",
                20.0,
                2 * median(naive, "naive") / (median(get, "get") + median(again, "get")),
                "x",
                at_most=False,
            ),
            Target(
                "bytes read for a day's p95, of its files'",
                5.0,
                100 * p95.bytes_read["query"] / day_bytes,
                "%",
            ),
            Target("spans of the last 1,000 requests", 1000.0, median(spans, "query"), "ms"),
            Target("memory of a process that reads", 300.0, peak, "MB"),
            Target(
                "added to a listing by pending=True, in turn with listings without",
                50.0,
                median(waiting, "pending") - median(waiting, "query"),
                "ms",
            ),
        ],
        [
            f"{len(table.ids):,} rows of {DAYS} days, {table.nbytes / 1e9:.2f} GB of text. {repeats} reads "
            f"after one that is not counted, {naive_repeats} of pyarrow's dataset, which finds the file by "
            "its statistics too.",
            f"The files of the day have {day_bytes / 1e6:.1f} MB, of which its p95 read "
            f"{p95.bytes_read['query'] / 1e6:.2f}, the log and the footers included.",
            "Memory is the most that the process had, with interpreter and libraries; the target does not "
            "count pyarrow's dataset. Each query starts a DuckDB of its own.",
        ],
    )
    write(found, lambda axes: plot(axes, lines))


def median(timed: Timed, kind: str) -> float:
    return percentile(timed.ms[kind], 0.5)


def line(title: str, timed: Timed, kind: str) -> dict[str, object]:
    return {
        "read": title,
        "p50 ms": round(median(timed, kind), 1),
        "worst ms": round(max(timed.ms[kind]), 1),
        "MB read": round(timed.bytes_read[kind] / 1e6, 2),
        "peak MB": round(timed.peak_mb),
    }


def plot(axes: Axes, lines: list[dict[str, object]]) -> None:
    titles = [str(one["read"]) for one in reversed(lines)]
    axes.barh(titles, [one["p50 ms"] for one in reversed(lines)])
    axes.set(xscale="log", xlabel="ms, median")


if __name__ == "__main__":
    main(run)
