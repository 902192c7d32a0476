"""The commands ``tracelake replay`` and ``tracelake top``.

What they need is imported when they run, as in :mod:`deploy.cli`.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Final, TypeVar
from urllib.parse import urlsplit

import click

from deploy.options import headers_of, spool_option, table_option
from inference_table.errors import TracelakeError

__all__ = ["replay", "top"]

Command = TypeVar("Command", bound=Callable[..., Any])

PACED_CONCURRENCY: Final = 100
"""Requests under way at a time where they keep their recorded spacing: more is a target that is stuck."""
MAX_CONCURRENCY: Final = 8
"""The same as fast as possible: enough to keep a small server busy, few enough not to knock it over."""


class Speed(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.2 only
    """``recorded`` (1), a factor, or ``max``."""

    name = "speed"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        if value in ("recorded", 1.0):
            return 1.0
        if value == "max":
            return "max"
        try:
            factor = float(value)
        except ValueError:
            factor = 0.0
        if not 0 < factor < float("inf"):
            self.fail(f"{value!r} is none of: recorded, max, a number above 0", param, ctx)
        return factor


class Seconds(click.FloatRange):
    """A number of seconds: ``nan`` compares with no bound, so that a range lets it pass."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds: float = super().convert(value, param, ctx)
        if math.isnan(seconds):
            self.fail(f"{value!r} is no number of seconds", param, ctx)
        return seconds


def url_of(_: click.Context, __: click.Parameter, text: str) -> str:
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or not text.isprintable():
        raise click.BadParameter(f"{text!r} is not of the form http://host:port/path")
    return text


def in_a_folder(_: click.Context, __: click.Parameter, file: Any) -> Any:
    """A file to write, in a folder that is there: found out before anything is sent."""
    if file is not None:
        # A lazy file opens itself when it is asked for anything but its name.
        path = file if isinstance(file, Path) else Path(file.name)
        if not path.absolute().parent.is_dir():
            raise click.BadParameter(f"there is no folder '{path.parent}' to write '{path.name}' into")
    return file


def file_option(name: str, text: str) -> Callable[[Command], Command]:
    return click.option(
        name,
        f"{name.strip('-')}_file",
        type=click.Path(dir_okay=False, writable=True, path_type=Path),
        metavar="FILE",
        callback=in_a_folder,
        help=text,
    )


@click.command(
    epilog="""\b
Examples:
  tracelake replay --where "request_date = current_date" --to http://localhost:8001/invocations
  tracelake replay --from "select databricks_request_id from payload where status_code = 200
                   order by random() limit 100" --to http://localhost:8001/invocations --speed max
  tracelake replay --where "trace_state = 'ERROR'" --to https://agent.example/invocations
                   --header 'authorization: Bearer ...' --report replay.md --plot replay.png

\b
Each request goes to the address after --to, whatever path it came by. What is compared, and what of answers
is left out of the comparison: docs/replay.md. The exit code is 1 if a request failed."""
)
@click.option("--from", "sql", metavar="SQL", help="Query that yields databricks_request_id.")
@click.option("--where", metavar="SQL", help="Or a condition on the table's rows.")
@click.option("--to", "url", required=True, metavar="URL", callback=url_of, help="Where to POST them.")
@click.option(
    "--speed",
    default="recorded",
    show_default=True,
    type=Speed(),
    metavar="recorded|N|max",
    help="At the recorded spacing, N times faster, or as fast as --concurrency allows.",
)
@click.option(
    "--concurrency",
    type=click.IntRange(1, 10_000),
    metavar="REQUESTS",
    help=f"At a time.  [default: {PACED_CONCURRENCY}, {MAX_CONCURRENCY} with --speed max]",
)
@click.option(
    "--header",
    "headers",
    multiple=True,
    metavar="'NAME: VALUE'",
    callback=headers_of,
    help="Header to send; repeatable. None is recorded that would let you in.",
)
@click.option(
    "--timeout",
    default=120.0,
    show_default=True,
    type=Seconds(0, min_open=True),
    metavar="SECONDS",
    help="For a whole answer.",
)
@click.option("--limit", type=click.IntRange(1), metavar="REQUESTS", help="The first of them only.")
@click.option("--ignore", multiple=True, metavar="KEY", help="Key of answers not to compare; repeatable.")
@table_option
@spool_option
@click.option(
    "--target-table", metavar="URI", help="Where the target records, if elsewhere.  [default: --table]"
)
@click.option(
    "--record/--no-record",
    default=True,
    show_default=True,
    help="Write rows of the answers that the target does not record into --table.",
)
@file_option("--report", "Write the report as Markdown.")
@file_option("--plot", "Draw the latencies (extra `plot`).")
@click.option(
    "--json",
    "json_file",
    type=click.File("w", lazy=True),
    metavar="FILE",
    callback=in_a_folder,
    help="Write all figures; - is stdout.",
)
def replay(
    sql: str | None,
    where: str | None,
    speed: float | str,
    concurrency: int | None,
    limit: int | None,
    table: str | None,
    spool_dir: str | None,
    target_table: str | None,
    record: bool,
    report_file: Path | None,
    plot_file: Path | None,
    json_file: IO[str] | None,
    **options: Any,
) -> None:
    """Send recorded requests to another version of an agent, and compare its answers with the recorded ones.

    The answers are rows of the table too, which say what they are a replay of.
    """
    if (sql is None) == (where is None):
        raise click.UsageError("say which requests: give --from or --where, one of them")
    from deploy.replay import Plan, Replay
    from deploy.replay_report import check_plot
    from deploy.replay_rows import choose
    from inference_table.ids import uuid7
    from inference_table.settings import StorageSettings
    from inference_table.table import InferenceTable

    if plot_file is not None:
        check_plot(plot_file)
    settings = StorageSettings.from_environ(uri=table, spool_dir=spool_dir)
    target = StorageSettings.from_environ(uri=target_table or table, spool_dir=spool_dir)
    chosen = choose(
        InferenceTable(table, spool_dir=spool_dir),
        sql or f"select databricks_request_id from payload where ({where}\n)",
        limit,
        pending=True,
    )
    if not chosen.num_rows:
        raise TracelakeError(f"cannot replay: no request in '{settings.uri}' was chosen")
    factor = None if isinstance(speed, str) else speed
    plan = Plan(
        url=options["url"],
        run=uuid7(),
        speed=factor,
        concurrency=concurrency or (MAX_CONCURRENCY if factor is None else PACED_CONCURRENCY),
        timeout_seconds=options["timeout"],
        headers=options["headers"],
        ignored=frozenset(options["ignore"]),
    )
    run = Replay(plan, chosen)
    click.echo(announcement(run, record, settings.uri), err=True)
    carry_out(run, settings, target, record)
    write_files(run, report_file, plot_file, json_file)


def announcement(run: Any, record: bool, table: str) -> str:
    from deploy.output import printable

    plan = run.plan
    many = f"{run.chosen.num_rows:,} request{'' if run.chosen.num_rows == 1 else 's'}"
    if plan.speed is None:
        pace = f"{plan.concurrency:,} at a time"
    else:
        pace = f"over about {lasting(run.recorded_seconds / plan.speed)}"
    rows = f"; answers that it does not record go into {table}" if record else ""
    return printable(f"sending {many} to {plan.url}, {pace} (run {plan.run}){rows}")


def lasting(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def carry_out(run: Any, settings: Any, target: Any, record: bool) -> None:
    """Send, and read what the target recorded; an interruption ends the one or the other."""
    from deploy.bench_report import progress
    from deploy.replay import run as send
    from deploy.replay_record import TableRecorder
    from deploy.replay_rows import read_targets

    recorder = TableRecorder(settings) if record else None
    try:
        with progress(run.sendable) as advance:
            send(run, settings, pending=True, recorder=recorder, advance=advance)
        if not run.is_interrupted:
            read_targets(run.outcomes, target)
    except KeyboardInterrupt:
        run.is_interrupted = True
    finally:
        if recorder is not None:
            recorder.close()
            if recorder.dropped:
                click.echo(f"{recorder.dropped:,} answers could not be recorded; the log says why", err=True)


def write_files(
    run: Any, report_file: Path | None, plot_file: Path | None, json_file: IO[str] | None
) -> None:
    from deploy.replay_report import figures, markdown, to_json, write_plot, write_report

    found = figures(run, run.plan.url)
    try:
        if report_file is not None:
            write_markdown(report_file, markdown(run, found, picture(report_file, plot_file)))
        if json_file is not None:
            json_file.write(to_json(found))
        if plot_file is not None:
            write_plot(run, plot_file)
    finally:
        # Whoever reads the terminal's text may have gone, as `head` has; a file that fails leaves it.
        if json_file is None or json_file.name != "-":
            write_report(run, found, click.echo)
    if run.is_interrupted:
        sys.exit(130)
    if found["requests"]["failed"]:
        sys.exit(1)


def write_markdown(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise TracelakeError(f"cannot write the report {file}: {error.strerror}") from error


def picture(report: Path, plot: Path | None) -> str | None:
    """The plot's path from the report's folder, as Markdown takes it."""
    import os
    from urllib.parse import quote

    if plot is None:
        return None
    return quote(Path(os.path.relpath(plot.absolute(), report.absolute().parent)).as_posix())


@click.command(
    epilog="""\b
Examples:
  tracelake top
  tracelake top --table s3://bucket/agents/payload --interval 10 --window 600
  tracelake top --once --format json | jq .total

\b
Reads the rows of the last minute, those of this machine's spool among them; never their payloads.
q or Ctrl-C ends it."""
)
@table_option
@spool_option
@click.option(
    "--interval",
    default=2.0,
    show_default=True,
    type=Seconds(0.2, 86400),
    metavar="SECONDS",
    help="Between two looks.",
)
@click.option(
    "--window",
    default=60.0,
    show_default=True,
    type=Seconds(1, 86400),
    metavar="SECONDS",
    help="How far back they look.",
)
@click.option("--once", is_flag=True, help="One look, then end.")
@click.option(
    "--format",
    "style",
    default="table",
    show_default=True,
    type=click.Choice(["table", "json"]),
    help="json is one object per look.",
)
def top(
    table: str | None, spool_dir: str | None, interval: float, window: float, once: bool, style: str
) -> None:
    """Watch the traffic: rate, errors, latency, tokens, the newest requests, what is not committed yet."""
    if style == "table" and not once and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise click.UsageError("there is no terminal to draw on: add --once, or --format json")
    from deploy.top import Watch, print_frame, print_json, watch

    source = Watch(table, spool_dir, window)
    if style == "json":
        print_json(source, None if once else interval)
    elif once:
        print_frame(source.look())
    else:
        watch(source, interval)
