"""How long MLflow's UI and API wait for a table of 100,000 rows and a gigabyte and a half of payloads.

The rows are real ones, recorded from an agent of eight spans, then copied with ids, times, sessions and
durations of their own: a week of traffic, in files of the size at which merging stops. Calls go to the
tracking store, as the handlers of MLflow's server make them. Cold is the first list of a new process that has
opened the store.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from benchmarks.report import Axes, Result, Target, main, scaled, write
from benchmarks.throughput import recorded_rows
from benchmarks.ui_process import QUESTIONS
from deploy.bench import percentile
from inference_table.commit import open_or_create_table
from inference_table.ids import uuid7
from inference_table.mlflow_location import store_uri
from inference_table.parquet import align, data_columns, plan_files, row_groups, write_file
from inference_table.record import to_batch
from inference_table.schema import SCHEMA
from inference_table.settings import StorageSettings

ROWS: Final = 100_000
TRACE_BYTES: Final = 10_000
SEEDS: Final = 100
DAYS: Final = 7
FILE_ROWS: Final = 3_000
SESSION_ROWS: Final = 4
REPEATS: Final = 15
COLD_REPEATS: Final = 5

COLD_LIMIT: Final = 300.0
LIST: Final = next(iter(QUESTIONS))


def fill(settings: StorageSettings, templates: pa.Table, count: int) -> int:
    """A table of ``count`` copies of the templates, spread over :data:`DAYS` until now; bytes of payloads."""
    table = open_or_create_table(settings)
    schema = data_columns(table)
    draw, actions, payload = random.Random(0), [], 0
    end, step = datetime.now(UTC), timedelta(days=DAYS) / count
    originals = templates.to_pylist(maps_as_pydicts="lossy")
    for start in range(0, count, FILE_ROWS):
        numbers = range(start, min(count, start + FILE_ROWS))
        rows = [copied(draw, originals, number, end - step * (count - number)) for number in numbers]
        payload += sum(len(row["response"]) for row in rows)
        for file in plan_files([pa.Table.from_pylist(rows, schema=SCHEMA)]):
            groups = row_groups(align(part, schema) for part in file.consume())
            actions.append(write_file(settings.local_path, file.path, file.day, groups, compression_level=3))
    table.create_write_transaction(actions, "append", table.schema(), ["request_date"])
    return payload


def copied(draw: random.Random, originals: list[dict[str, Any]], number: int, at: datetime) -> dict[str, Any]:
    """A copy of one of the rows, at another time, with ids of its own."""
    row = dict(originals[number % len(originals)])
    trace_id, request_id = f"tr-{draw.getrandbits(128):032x}", uuid7()
    duration, state = int(draw.lognormvariate(5, 1)), "ERROR" if draw.random() < 0.02 else "OK"
    info = json.loads(row["trace_info"])
    info["trace_metadata"]["mlflow.trace.session"] = f"session-{number // SESSION_ROWS}"
    info |= {"state": state, "execution_duration_ms": duration, "request_time": at.isoformat()}
    changes = {row["trace_id"]: trace_id, row["databricks_request_id"]: request_id}
    return {
        **row,
        "databricks_request_id": request_id,
        "request_date": at.date(),
        "request_time": at,
        "execution_duration_ms": duration,
        "trace_id": trace_id,
        "trace_state": state,
        "trace_info": replaced(json.dumps(info, separators=(",", ":")), changes),
        "response": replaced(row["response"], changes),
        "request_metadata": list(row["request_metadata"].items()),
    }


def replaced(text: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        text = text.replace(old, new)
    return text


def rare_word(templates: pa.Table) -> str:
    """A word of one of the templates and no other."""
    texts = templates["response"].to_pylist()
    words = sorted({word for word in texts[0].split() if word.isalpha() and len(word) > 6})
    return next(word for word in words if sum(word in text for text in texts) == 1)


def asked(uri: str, word: str, repeats: int) -> dict[str, list[float]]:
    """What a process of its own measures."""
    command = [sys.executable, "-m", "benchmarks.ui_process", uri, word, str(repeats)]
    env = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def run() -> None:
    count, load = scaled(ROWS), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        [recorded] = recorded_rows(
            folder, [{"trace_bytes": TRACE_BYTES, "seed": seed} for seed in range(SEEDS)]
        )
        templates = pa.Table.from_batches([to_batch(recorded)])
        settings = StorageSettings(uri=str(folder / "payload"), spool_dir=folder / "spool")
        payload = fill(settings, templates, count)
        uri, word = store_uri(settings), rare_word(templates)
        warm = asked(uri, word, REPEATS)
        cold = [asked(uri, word, 1) for _ in range(COLD_REPEATS)]
    memory = warm.pop("memory MB")[0]
    first = [one[LIST][0] for one in cold]
    result = Result(
        "ui",
        "How long do MLflow's UI and API wait for a table of 100,000 rows?",
        [line(name, [one[name][0] for one in cold], warm[name]) for name in warm],
        [Target("list 200, first call of a process, p50", COLD_LIMIT, percentile(first, 0.5), "ms")],
        [
            f"{count:,} rows with {payload / 1e9:.2g} GB of payloads, over {DAYS} days, in files of about "
            f"{FILE_ROWS:,} rows.",
            f"'first': the median of {COLD_REPEATS} processes, each of which asks everything once, in this "
            "order: only the list is cold in every sense. 'then': the median of further calls in one.",
            "The first chart of spans reads every payload of its time once; the process keeps what it needs.",
            f"The process, MLflow included, took {memory:.0f} MB at its most.",
            f"The machine's load was {load:.1f} before the first call: others work on the same cores.",
        ],
    )
    write(result, lambda axes: plot(axes, warm))


def line(name: str, first: list[float], times: list[float]) -> dict[str, object]:
    return {
        "call": name,
        "first ms": round(percentile(first, 0.5), 1),
        "then p50 ms": round(percentile(times[1:], 0.5), 1),
    }


def plot(axes: Axes, warm: dict[str, list[float]]) -> None:
    """Median of each call."""
    names = list(reversed(warm))
    axes.barh(names, [percentile(warm[name][1:], 0.5) for name in names])
    axes.set(xlabel="ms, median of calls but the first", xscale="log")


if __name__ == "__main__":
    main(run)
