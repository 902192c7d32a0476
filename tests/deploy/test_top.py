"""``tracelake top``: the traffic of real servers, once and on a terminal."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import httpx
import pyarrow as pa
import pytest
from deltalake import write_deltalake
from rich.cells import cell_len
from rich.console import Console

from deploy.top import Watch
from deploy.top_view import Frame, Traffic, curve, head_height, render
from inference_table.errors import TracelakeError
from inference_table.ids import uuid7
from inference_table.schema import PARTITION_COLUMN, SCHEMA
from inference_table.spool import Spool
from inference_table.table import InferenceTable
from tests.inference_table.rows import batch, storage
from tests.support import ROOT, served, wait_for

AGENT: Final = """
import mlflow
from fastapi import FastAPI, HTTPException

app = FastAPI()


@app.post("/ask")
def ask(body: dict) -> dict:
    if body["question"] == "fail":
        raise HTTPException(503)
    with mlflow.start_span("model", span_type="CHAT_MODEL") as span:
        span.set_inputs({"question": body["question"]})
        usage = {"input_tokens": 60, "output_tokens": 6, "total_tokens": 66}
        span.set_attribute("mlflow.chat.tokenUsage", usage)
        span.set_outputs("The answer to " + body["question"])
    return {"answer": "x"}
"""
ESCAPE: Final = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def top(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """One run of the command, without a terminal."""
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", "top", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **env},
        check=False,
        timeout=60,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """A server that has just been asked twelve times; it goes on running."""
    folder = tmp_path_factory.mktemp("top")
    (folder / "watched_agent.py").write_text(AGENT)
    place = ["--table", str(folder / "payload"), "--spool-dir", str(folder / "spool")]
    arguments = ["watched_agent:app", "--app-dir", str(folder), "--served-entity", "watched/7", *place]
    with served(*arguments, env={}, log=folder / "log") as (url, _):
        for number in range(10):
            httpx.post(f"{url}/ask", json={"question": f"\x1b[31mwhy {number}?"})
        for _ in range(2):
            httpx.post(f"{url}/ask", json={"question": "fail"})
        wait_for(lambda: looked(place)["total"]["requests"] == 12, "all rows to be seen", 60)
        yield place


def looked(place: list[str]) -> dict[str, Any]:
    done = top("--once", "--format", "json", "--window", "3600", *place)
    assert done.returncode == 0, done.stderr
    frame: dict[str, Any] = json.loads(done.stdout)
    return frame


def test_a_look_counts_what_was_answered(place: list[str]) -> None:
    """Requests, errors, tokens per second, each served entity, and the newest requests with what was said."""
    frame = looked(place)
    total = frame["total"]
    assert (total["requests"], total["errors"]) == (12, 2)
    assert total["per_second"] == pytest.approx(12 / 3600)
    assert total["input_tokens_per_second"] == pytest.approx(10 * 60 / 3600)
    assert total["p50_ms"] <= total["p95_ms"]
    assert [one["name"] for one in frame["entities"]] == ["watched/7"]
    assert sum(frame["slices"]) == 12 and frame["slices"][-1] == 12
    assert [one["status_code"] for one in frame["newest"][:3]] == [503, 503, 200]
    assert frame["newest"][2]["response"] == "The answer to \x1b[31mwhy 9?"
    assert "why 9?" in frame["newest"][2]["request"]


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_a_frame_fits_the_terminal(place: list[str], width: int) -> None:
    """At any width no line is longer, and no control character of a stranger's is left."""
    done = top("--once", "--window", "3600", *place, COLUMNS=str(width))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(cell_len(line.rstrip()) <= width for line in lines)
    assert "\x1b" not in done.stdout
    assert any(line.startswith("watched/7") for line in lines)
    assert sum(line.split()[1:2] == ["503"] for line in lines) == 2
    assert ("60 → 6" in done.stdout) == (width == 200)
    [named] = [line for line in lines if line.startswith("watched/7")]
    assert "2 (16.7 %)" in named and "…" not in named


def test_what_waits_is_seen_with_its_age(tmp_path: Path) -> None:
    """Rows of the spool count, and so do its bytes; there may be no table yet."""
    settings = storage(tmp_path)
    spool = Spool(settings)
    spool.append(batch([uuid7(), uuid7()], at=datetime.now(UTC)), sync=False)
    frame = Watch(settings.uri, str(settings.spool_dir), 60).look()
    assert (frame.total.requests, frame.pending_rows, frame.spool_segments, frame.version) == (2, 2, 1, None)
    assert frame.spool_bytes > 0 and frame.lag_seconds is not None
    spool.close()


def test_requests_without_a_trace_are_no_errors(tmp_path: Path) -> None:
    """Of an agent that is not traced the number of errors is 0, not unknown."""
    settings = storage(tmp_path)
    spool = Spool(settings)
    spool.append(batch([uuid7(), uuid7()], at=datetime.now(UTC)), sync=False)
    frame = Watch(settings.uri, str(settings.spool_dir), 60).look()
    assert [one["trace_state"] for one in frame.newest] == [None, None]
    assert (frame.total.errors, frame.entities[0].errors) == (0, 0)
    spool.close()


@pytest.mark.parametrize("option", ["--window", "--interval"])
@pytest.mark.parametrize("value", ["nan", "1e300"])
def test_no_number_of_seconds_is_refused(tmp_path: Path, option: str, value: str) -> None:
    """A traceback would not say which option it was."""
    done = top("--once", option, value, "--table", str(tmp_path / "payload"))
    assert done.returncode == 2 and f"Invalid value for '{option}'" in done.stderr


def test_old_rows_and_payloads_are_not_read(tmp_path: Path) -> None:
    """A file of another day may be damaged, and a response unreadable: neither is looked at."""
    now = datetime.now(UTC)
    uri = tmp_path / "payload"
    for at in (datetime(2024, 5, 1, tzinfo=UTC), now):
        table = pa.Table.from_batches([batch([uuid7()], at=at)], schema=SCHEMA)
        write_deltalake(str(uri), table, partition_by=[PARTITION_COLUMN], mode="append")
    [old] = uri.glob("request_date=2024-05-01/*.parquet")
    old.write_bytes(b"damaged")
    [new] = uri.glob(f"request_date={now.date()}/*.parquet")
    damage(new, "response")
    with pytest.raises(TracelakeError):
        InferenceTable(uri).query(
            "select sum(length(response)) from payload where request_date = current_date"
        )
    frame = Watch(str(uri), str(tmp_path / "spool"), 60).look()
    assert (frame.total.requests, len(frame.newest)) == (1, 1)
    assert curve(frame.slices).strip() == "█"


def damage(file: Path, column: str) -> None:
    """Overwrite the pages of a column."""
    import pyarrow.parquet as pq

    group = pq.ParquetFile(file).metadata.row_group(0)
    chunks = [group.column(index) for index in range(group.num_columns)]
    [chunk] = [chunk for chunk in chunks if chunk.path_in_schema == column]
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content = bytearray(file.read_bytes())
    content[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    file.write_bytes(content)


def test_without_requests_that_is_said(tmp_path: Path) -> None:
    """An empty window is no error; a table that isn't there is one."""
    uri = str(tmp_path / "payload")
    table = pa.Table.from_batches([batch([uuid7()])], schema=SCHEMA)
    write_deltalake(uri, table, partition_by=[PARTITION_COLUMN])
    done = top("--once", "--table", uri, "--spool-dir", str(tmp_path / "spool"))
    assert done.returncode == 0 and "no request within 60 s" in done.stdout
    done = top("--once", "--table", uri + "2", "--spool-dir", str(tmp_path / "spool"))
    assert done.returncode == 1 and "there is no Delta table" in done.stderr
    done = top("--table", uri)
    assert done.returncode == 2 and "add --once" in done.stderr


class Terminal:
    """A pseudo terminal with the command on it."""

    def __init__(self, place: list[str], columns: int, lines: int) -> None:
        self.descriptor, inner = pty.openpty()
        self.output = ""
        self.resize(columns, lines)
        # xdist sets COLUMNS, which would go before the terminal's own width.
        env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        arguments = ["-m", "deploy.cli", "top", "--interval", "0.5", "--window", "3600", *place]
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**env, "TERM": "xterm-256color"},
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
        )
        os.close(inner)

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def read(self) -> str:
        while select.select([self.descriptor], [], [], 0)[0]:
            try:
                chunk = os.read(self.descriptor, 65536)
            except OSError:  # Linux's end of a terminal that nobody has open any more
                break
            if not chunk:
                break
            self.output += chunk.decode(errors="replace")
        return self.output

    def shows(self, text: str) -> bool:
        return text in ESCAPE.sub("", self.read())

    def has_ended(self) -> bool:
        self.read()
        return self.process.poll() is not None


@contextmanager
def terminal(place: list[str], columns: int = 80, lines: int = 24) -> Iterator[Terminal]:
    made = Terminal(place, columns, lines)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.wait()
        os.close(made.descriptor)


def test_a_terminal_shows_it_resizes_it_and_gets_itself_back(place: list[str]) -> None:
    """Frames are drawn on a screen of their own; a wider one shows more; q ends it and restores all."""
    with terminal(place) as screen:
        before = termios.tcgetattr(screen.descriptor)[3]
        wait_for(lambda: screen.shows("watched/7"), "the first frame", 60)
        assert "\x1b[?1049h" in screen.output and not screen.shows("60 → 6")
        screen.resize(160, 40)
        wait_for(lambda: screen.shows("60 → 6"), "the wider frame")
        assert "\x1b[2J" not in screen.output.partition("watched/7")[2]  # a screen that is cleared flickers
        os.write(screen.descriptor, b"q")
        wait_for(screen.has_ended, "the end")
        assert screen.process.returncode == 0
        assert "\x1b[?1049l" in screen.output and "\x1b[?25h" in screen.output
        assert termios.tcgetattr(screen.descriptor)[3] == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_a_signal_leaves_the_terminal_as_it_was(place: list[str], number: signal.Signals, code: int) -> None:
    """Ctrl-C is a way to end it; a signal to stop restores the screen too."""
    with terminal(place) as screen:
        wait_for(lambda: screen.shows("watched/7"), "the first frame", 60)
        screen.process.send_signal(number)
        wait_for(screen.has_ended, "the end")
        assert screen.process.returncode == code
        assert "\x1b[?1049l" in screen.output


def test_many_entities_and_requests_fit_the_height() -> None:
    """What does not fit is counted; the frame is as high as the terminal at most."""
    now = datetime.now(UTC)
    newest = {
        **dict.fromkeys(("trace_state", "served_entity_id", "path", "ms", "input_tokens", "output_tokens")),
        "databricks_request_id": "x",
        "request_time": now,
        "status_code": 200,
        "request": "[bold]markup[/bold] :smile: 返品",
        "response": "y" * 500,
    }
    frame = Frame(
        uri="/t" * 100,
        at=now,
        window_seconds=600,
        total=Traffic(None, requests=1),
        entities=[Traffic(f"{'entity' * 20}/{number}", requests=1) for number in range(30)],
        newest=[newest] * 60,
        problem="the table is gone\x1b[31m",
    )
    console = Console(width=80, height=40, highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(render(frame, 80, 40 - head_height(frame)))
    lines = captured.get().splitlines()
    assert len(lines) == 40
    assert all(cell_len(line.rstrip()) <= 80 for line in lines)
    assert any("… and 22 more" in line for line in lines)
    assert any("[bold]markup" in line for line in lines)
