"""The engine of ``tracelake top``: the traffic of the last minute, read from the table and the spool.

A look is one query over rows of the window, their payloads left out: what was asked and answered comes from
the previews in ``trace_info``. Looks are taken by a thread, so that keys and resizes are answered meanwhile.
"""

import contextlib
import json
import os
import select
import signal
import sys
import termios
import threading
import time
import tty
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import click

from deploy.brief import brief
from deploy.output import plain_console, printable
from deploy.top_view import Frame, Traffic, head_height, render
from inference_table.errors import SpoolError, TracelakeError
from inference_table.settings import StorageSettings
from inference_table.spool import SpoolStats, spool_root, spool_stats
from inference_table.table import InferenceTable

__all__ = ["Watch", "print_frame", "print_json", "watch"]

NEWEST: Final = 60
"""Requests that a look lists: as many as a high screen has lines."""
SLICES: Final = 30
"""Bars of the curve of the rate."""
PREVIEW: Final = 400
"""Characters of a preview: more fit on no line."""
ONCE_LINES: Final = 15
"""Newest requests where there is no screen to fill."""
KEY_SECONDS: Final = 0.1
"""How soon a key or a resize is noticed."""
QUITTING: Final = (b"q", b"Q", b"\x03", b"\x04", b"")
"""Keys that end it; the last is a terminal that is gone."""
SQL: Final = """
with recent as materialized (
    select served_entity_id, status_code, trace_state, execution_duration_ms as ms, input_tokens,
        output_tokens, least(floor((epoch(request_time) - $start) / $slice), $slices - 1)::int as slice
    from payload where request_date >= $day::date and request_time >= make_timestamptz($start_us::bigint)
), traffic as (
    select
        case grouping(served_entity_id, slice) when 3 then 'total' when 1 then 'entity' else 'slice' end
            as kind, served_entity_id, slice, count(*) as requests,
        count(*) filter (status_code >= 400 or trace_state = 'ERROR') as errors,
        quantile_cont(ms, 0.5) as p50_ms, quantile_cont(ms, 0.95) as p95_ms,
        sum(input_tokens)::bigint as input_tokens, sum(output_tokens)::bigint as output_tokens
    from recent group by grouping sets ((), (served_entity_id), (slice))
), newest as (
    select 'newest' as kind, databricks_request_id, request_time, status_code, trace_state, served_entity_id,
        execution_duration_ms as p50_ms, input_tokens, output_tokens, request_metadata['path'] as path,
        left(trace_info->>'$.request_preview', $preview) as request,
        left(trace_info->>'$.response_preview', $preview) as response
    from payload where request_date >= $day::date and request_time >= make_timestamptz($start_us::bigint)
    order by request_time desc limit $newest
)
from traffic union all by name from newest"""


class Watch:
    """What is looked at.

    Args:
        uri: the table; None is that of the environment.
        spool_dir: where this machine spools; None is that of the environment.
        window_seconds: how far back a look goes.

    Raises:
        SettingsError: a value is not accepted.
    """

    def __init__(self, uri: str | None, spool_dir: str | None, window_seconds: float) -> None:
        self._table = InferenceTable(uri, spool_dir=spool_dir)
        self._spool = spool_root(StorageSettings.from_environ(uri=uri, spool_dir=spool_dir))
        self._window = window_seconds

    @property
    def uri(self) -> str:
        return self._table.uri

    def look(self) -> Frame:
        """The traffic now.

        Raises:
            TableNotFoundError: there is no table.
            TableError: it can't be read.
        """
        now, begin = datetime.now(UTC), time.perf_counter()
        start = now - timedelta(seconds=self._window)
        parameters = {
            "start": start.timestamp(),
            "start_us": int(start.timestamp() * 1e6),
            "day": start.date().isoformat(),
            "slice": self._window / SLICES,
            "slices": SLICES,
            "preview": PREVIEW,
            "newest": NEWEST,
        }
        problem, spool = None, SpoolStats(0, 0, None, 0)
        try:
            found = self._table.query(SQL, pending=True, parameters=parameters)
            with contextlib.suppress(FileNotFoundError):  # segments were committed meanwhile
                spool = spool_stats(self._spool)
        except (SpoolError, PermissionError) as error:
            problem = str(error)
            found = self._table.query(SQL, parameters=parameters)
        frame = frame_of(found.to_dicts(), self._window)
        oldest = spool.oldest_unix_seconds
        return replace(
            frame,
            uri=self.uri,
            at=now,
            version=found.version,
            pending_rows=found.pending_rows,
            spool_bytes=spool.bytes,
            spool_segments=spool.segments,
            quarantined=spool.quarantined,
            lag_seconds=None if oldest is None else max(0.0, time.time() - oldest),
            read_seconds=time.perf_counter() - begin,
            problem=problem,
        )


def frame_of(rows: Sequence[Mapping[str, Any]], window: float) -> Frame:
    kinds: dict[str, list[Mapping[str, Any]]] = {"total": [], "entity": [], "slice": [], "newest": []}
    for row in rows:
        kinds[row["kind"]].append(row)
    entities = sorted((traffic_of(row, window) for row in kinds["entity"]), key=lambda one: -one.requests)
    slices = [0] * SLICES
    for row in kinds["slice"]:
        slices[max(0, row["slice"])] += row["requests"]
    newest = sorted(kinds["newest"], key=lambda row: row["request_time"], reverse=True)
    return Frame(
        uri="",
        at=datetime.now(UTC),
        window_seconds=window,
        total=traffic_of(kinds["total"][0], window) if kinds["total"] else Traffic(None),
        entities=entities,
        slices=slices,
        newest=[newest_of(row) for row in newest],
    )


def traffic_of(row: Mapping[str, Any], window: float) -> Traffic:
    return Traffic(
        name=row["served_entity_id"],
        requests=row["requests"],
        per_second=row["requests"] / window,
        errors=row["errors"],
        p50_ms=row["p50_ms"],
        p95_ms=row["p95_ms"],
        input_tokens_per_second=(row["input_tokens"] or 0) / window,
        output_tokens_per_second=(row["output_tokens"] or 0) / window,
    )


def newest_of(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "databricks_request_id": row["databricks_request_id"],
        "request_time": row["request_time"],
        "status_code": row["status_code"],
        "trace_state": row["trace_state"],
        "served_entity_id": row["served_entity_id"],
        "path": row["path"],
        "ms": row["p50_ms"],
        "input_tokens": row["input_tokens"],
        "output_tokens": row["output_tokens"],
        "request": preview(row["request"]),
        "response": preview(row["response"]),
    }


def preview(text: str | None) -> str | None:
    """What a preview says; one that was cut is no JSON any more, and stays as it is."""
    if text is None:
        return None
    try:
        return brief(json.loads(text))
    except (ValueError, RecursionError):
        return text


def print_frame(frame: Frame) -> None:
    """One frame, on standard output."""
    console = plain_console()
    console.print(render(frame, console.width, ONCE_LINES + 1))


def print_json(source: Watch, interval: float | None) -> None:
    """A frame as one line of JSON; every ``interval`` seconds, or once where there is none."""
    import orjson

    with contextlib.suppress(KeyboardInterrupt):
        while True:
            click.echo(orjson.dumps(asdict(source.look())).decode())
            if interval is None:
                return
            time.sleep(interval)


class Looker:
    """A thread that looks again and again; ``frame`` is the newest look."""

    def __init__(self, source: Watch, interval: float) -> None:
        self._source = source
        self._interval = interval
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tracelake-top", daemon=True)
        self.frame: Frame | None = None
        self.error: BaseException | None = None

    def __enter__(self) -> "Looker":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(10)

    def _run(self) -> None:
        while not self._stopping.is_set():
            begin = time.monotonic()
            try:
                self.frame = self._source.look()
            except TracelakeError as error:
                if self.frame is None:
                    self.error = error
                    return
                # A table that can't be read for once is no reason to stop looking.
                self.frame = replace(self.frame, problem=" ".join(str(error).split()))
            except BaseException as error:  # noqa: BLE001  # shown by the main thread, which raises it
                self.error = error
                return
            # A busy machine, or a distant table, shall not spend its time on being looked at.
            self._stopping.wait(max(self._interval, time.monotonic() - begin))


def watch(source: Watch, interval: float) -> None:
    """Draw frames on the terminal until q or Ctrl-C.

    Raises:
        TableNotFoundError, TableError: the first look failed.
    """
    from rich.live import Live
    from rich.text import Text

    console = plain_console()
    # A signal leaves the terminal as it was.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda caught, _: sys.exit(128 + caught))
    with contextlib.suppress(KeyboardInterrupt), single_keys(), Looker(source, interval) as looker:
        waiting = Text(f"reading {printable(source.uri)}", style="dim")
        with Live(waiting, console=console, screen=True, auto_refresh=False) as live:
            drawn: tuple[Frame | None, tuple[int, int]] | None = None
            while looker.error is None:
                now = (looker.frame, (console.size.width, console.size.height))
                if now != drawn and now[0] is not None:
                    frame, (width, height) = now[0], now[1]
                    live.update(render(frame, width, height - head_height(frame)), refresh=True)
                drawn = now
                if pressed(KEY_SECONDS) in QUITTING:
                    return
        raise looker.error


@contextlib.contextmanager
def single_keys() -> Iterator[None]:
    """A terminal that hands over each key as it is pressed, and shows none."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def pressed(seconds: float) -> bytes | None:
    """The key that is pressed within a time; None where none is."""
    descriptor = sys.stdin.fileno()
    ready, _, _ = select.select([descriptor], [], [], seconds)
    return os.read(descriptor, 1) if ready else None
