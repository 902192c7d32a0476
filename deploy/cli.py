"""The command line ``tracelake``.

What a command needs is imported when it runs: ``tracelake --help`` answers at once.
"""

import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import click

from deploy import commands, review_commands
from deploy.options import headers_of, spool_option, table_option
from deploy.spool_commands import spool
from deploy.ui import ui
from inference_table.errors import DeploymentError, TracelakeError

if TYPE_CHECKING:
    from inference_table.table import InferenceRow, InferenceTable

__all__ = ["main"]

LAST: Final = "last"


class Commands(click.Group):
    """Errors of ours are one line; a programmer's mistake keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TracelakeError as error:
            if ctx.params.get("debug"):
                raise
            from deploy.output import printable

            # An engine's message quotes the value that it failed on.
            head, _, log = (
                str(error).partition("\n") if isinstance(error, DeploymentError) else (error, "", "")
            )
            lines = [" ".join(str(head).split()), *log.splitlines()]
            raise click.ClickException("\n".join(map(printable, lines))) from error


def print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    try:
        number = version("tracelake")
    except PackageNotFoundError:
        number = "(not installed)"
    click.echo(f"tracelake {number}")
    ctx.exit()


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Examples:
  tracelake serve my_agent:app
  curl -d '{"question": "hi"}' -H 'content-type: application/json' localhost:8000/ask
  tracelake query "select request_time, status_code, response from payload"
  tracelake trace last
  tracelake bench my_agent:app --request body.json
  tracelake deploy my_agent:app""",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=print_version,
    help="Show the version.",
)
@click.option("--debug", is_flag=True, help="Show a traceback with an error.")
def main(debug: bool) -> None:
    """Inference tables for LLM agents: every request, response and MLflow trace is a row of a Delta table.

    `serve` runs an agent and records, `query` asks the table in SQL, `trace` draws one request, `bench`
    measures what recording costs; `deploy` keeps an agent running in the background, version after version;
    `replay` asks another version what was asked before, `top` watches the traffic, `ui` shows the table in
    MLflow's UI.
    """


@main.command(
    epilog="""\b
Examples:
  tracelake serve my_agent:app
  tracelake serve my_agent:app --table s3://bucket/agents/payload --workers 4
  tracelake serve my_agent:app --durability strict       answer only what is recorded
  tracelake serve my_agent:predict
  tracelake serve models:/support-bot/3
  tracelake serve my_agent:app --host 0.0.0.0 --api-key-file keys --admin-port 9000

\b
TARGET is module:attribute or an MLflow model, and needs no line of ours:
  an ASGI app (FastAPI, Starlette, ...), AgentServer   as it is
  a function of the request's JSON object              POST /invocations; what it yields is streamed
  an object with predict, ResponsesAgent, ChatAgent    the same; "stream": true is predict_stream
  models:/name/version, runs:/id/path, a folder        MLflow's scoring server, and streams

\b
Metrics are at /metrics; with --admin-port they are there alone. Keys and limits: docs/security.md
Each option is also an environment variable, INFERENCE_TABLE_DURABILITY, TRACELAKE_API_KEY_FILE and so on."""
)
@click.argument("target")
@table_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="Port to listen on."
)
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1), help="Server processes.")
@click.option(
    "--durability",
    type=click.Choice(["relaxed", "strict", "committed"]),
    help="When a reply may leave: at once, once its record is on disk, or once it is in the table.  "
    "[default: relaxed]",
)
@spool_option
@click.option("--flush-seconds", type=float, metavar="SECONDS", help="Pause between commits.  [default: 1]")
@click.option(
    "--sampling-fraction",
    type=float,
    metavar="0..1",
    help="Part of the requests that is recorded.  [default: 1]",
)
@click.option(
    "--served-entity", metavar="NAME", help="Endpoint and version, for the column served_entity_id."
)
@click.option(
    "--api-key-file",
    metavar="FILE",
    help="Lines `NAME KEY`: who may call the agent.  [default: whoever reaches it]",
)
@click.option(
    "--max-request-bytes",
    type=click.IntRange(1),
    metavar="BYTES",
    help="Larger requests get 413.  [default: 128 MiB]",
)
@click.option(
    "--max-concurrency",
    type=click.IntRange(1),
    metavar="REQUESTS",
    help="More at a time, in a worker, get 429.  [default: 1000]",
)
@click.option(
    "--admin-port",
    type=click.IntRange(0, 65535),
    help="Port of its own for /metrics and /health; 0 is any free one.",
)
@click.option(
    "--admin-host",
    default="127.0.0.1",
    show_default=True,
    help="Address of that port, which asks for no key.",
)
@click.option(
    "--app-dir", default=".", show_default=True, metavar="DIR", help="Folder to import the app from."
)
@click.option(
    "--log-level",
    default="info",
    show_default=True,
    type=click.Choice(["critical", "error", "warning", "info", "debug", "trace"]),
)
def serve(
    target: str,
    table: str | None,
    host: str,
    port: int,
    workers: int,
    app_dir: str,
    log_level: str,
    admin_host: str,
    api_key_file: str | None,
    max_request_bytes: int | None,
    max_concurrency: int | None,
    admin_port: int | None,
    **settings: Any,
) -> None:
    """Serve an agent and record every request it answers."""
    from serving.mlflow_version import check_mlflow

    check_mlflow()
    from serving.serve import serve as serve_target

    given = {name: value for name, value in {"uri": table, **settings}.items() if value is not None}
    serve_target(
        target,
        host=host,
        port=port,
        workers=workers,
        app_dir=app_dir,
        log_level=log_level,
        admin_host=admin_host,
        settings=given,
        server_settings={
            "api_key_file": api_key_file,
            "max_request_bytes": max_request_bytes,
            "max_concurrency": max_concurrency,
            "admin_port": admin_port,
        },
    )


@main.command(
    epilog="""\b
Examples:
  tracelake query "select status_code, count(*) from payload group by all"
  tracelake query "select response->>'$.choices[0].message.content' from payload
                   where request_date = current_date limit 10"
  tracelake query "from payload where trace_state = 'ERROR'" | jq .trace_id
  tracelake query "select last_user_message, answer, error from requests order by request_time desc limit 10"
  tracelake query "select name, duration_ms from spans where type = 'TOOL'
                   and request_date = current_date order by 2 desc limit 10"
  tracelake query "from model_usage where request_date = current_date"
  echo "select count(*) from payload" | tracelake query -

\b
The SQL is DuckDB's: https://duckdb.org/docs/sql/introduction. request and response are JSON text.
Name a request_date and whole days are left unread; leave out response and none of it is read.
Columns of the views, and queries to start from: docs/sql.md. error, answer and all of spans read
response: name a request_date with them."""
)
@click.argument("sql")
@table_option
@click.option("--pending", is_flag=True, help="Also read what this machine has not yet committed.")
@spool_option
@click.option(
    "--format",
    "style",
    type=click.Choice(["table", "json", "csv", "markdown"]),
    help="json is one object per line.  [default: table on a terminal, else json]",
)
def query(sql: str, table: str | None, pending: bool, spool_dir: str | None, style: str | None) -> None:
    """Ask the table in SQL: payload, and the views requests, spans, model_usage and feedback.

    With - the SQL is read from standard input.
    """
    from deploy.output import write_result

    text = sys.stdin.read() if sql == "-" else sql
    begin = time.monotonic()
    source = open_table(table, spool_dir)
    with waiting(f"reading {source.uri}"):
        result = source.query(text, pending=pending)
    chosen = style or ("table" if sys.stdout.isatty() else "json")
    write_result(result, chosen)
    if chosen == "table":
        rows = f"{len(result):,} row{'' if len(result) == 1 else 's'}"
        also = f", {result.pending_rows:,} pending rows read" if pending else ""
        click.echo(f"{rows} in {time.monotonic() - begin:.2f} s{also}", err=True)


@main.command(
    epilog="""\b
Examples:
  tracelake trace last
  tracelake trace last --where "status_code >= 500"
  tracelake trace 019aa8b4-bb00-7244-813e-99135dcd95f4
  tracelake trace tr-5f2b7c60a0b34c3e9b2d --full | less -R

\b
The id is the reply's header x-databricks-request-id (column databricks_request_id) or MLflow's trace id."""
)
@click.argument("id_", metavar="ID|last")
@table_option
@click.option(
    "--pending/--no-pending",
    default=True,
    show_default=True,
    help="Also look among what this machine has not yet committed.",
)
@spool_option
@click.option("--where", metavar="SQL", help="With `last`: the newest request that meets this condition.")
@click.option("--full", is_flag=True, help="Show inputs, outputs and stack traces whole.")
@click.option(
    "--html",
    "html_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write MLflow's viewer with the traces in it, one file that opens offline (extra `ui`).",
)
def trace(
    id_: str,
    table: str | None,
    pending: bool,
    spool_dir: str | None,
    where: str | None,
    full: bool,
    html_file: Path | None,
) -> None:
    """Draw one request: its spans, how long they took, what went in and out, and what failed.

    ID is a databricks_request_id or an MLflow trace id; `last` is the newest request.
    """
    if where is not None and id_ != LAST:
        raise click.UsageError("--where goes with `last`: an id names one request")
    source = open_table(table, spool_dir)
    with waiting(f"reading {source.uri}"):
        row = find_row(source, id_, where, pending)
    if html_file is None:
        print_request(row, full)
        return
    from deploy.trace_html import write_page

    write_page(row, html_file)
    click.echo(f"wrote {html_file}: it opens offline", err=True)


def settings_of(_: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not (name.strip() and separator):
            raise click.BadParameter(f"{text!r} is not of the form {parameter.metavar}")
        found[name.strip().lower()] = value.strip()
    return found


@main.command(
    epilog="""\b
Examples:
  tracelake bench my_agent:app --request body.json
  tracelake bench my_agent:app --request questions.jsonl --path /chat --header 'authorization: Bearer x'
  tracelake bench my_agent:app --request body.json --setting durability=strict --json cost.json

\b
TARGET is what `tracelake serve` takes. It is served twice, with a table in the folder for temporary files.
Each request is a call of your agent, with all that it costs; how many there will be is said first.
What the figures mean: docs/bench.md"""
)
@click.argument("target")
@click.option(
    "--request",
    "requests_from",
    required=True,
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="JSON body to send, or a .jsonl file with one in each line; repeatable. They are sent in turn.",
)
@click.option("--path", default="/invocations", show_default=True, help="Where to POST it.")
@click.option(
    "--header",
    "headers",
    multiple=True,
    metavar="'NAME: VALUE'",
    callback=headers_of,
    help="Header to send; repeatable.",
)
@click.option(
    "--requests",
    default=200,
    show_default=True,
    type=click.IntRange(1),
    help="Requests to measure, with capture and as many without.",
)
@click.option(
    "--warm-up", default=20, show_default=True, type=click.IntRange(1), help="Requests before these, to each."
)
@click.option(
    "--pause",
    default=0.05,
    show_default=True,
    type=click.FloatRange(0),
    metavar="SECONDS",
    help="After each request.",
)
@click.option(
    "--concurrency", default=1, show_default=True, type=click.IntRange(1, 256), help="Requests at a time."
)
@click.option(
    "--setting",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    callback=settings_of,
    help="Setting of capture, such as durability=strict; repeatable.",
)
@click.option(
    "--json",
    "json_file",
    type=click.File("w", lazy=False),
    help="Write all figures to FILE; - is standard output.",
)
@click.option(
    "--app-dir", default=".", show_default=True, metavar="DIR", help="Folder to import the app from."
)
def bench(
    requests_from: tuple[Path, ...], requests: int, pause: float, json_file: IO[str] | None, **options: Any
) -> None:
    """Measure what capture costs your own agent: it is served with and without, and asked in turn."""
    from deploy.bench_report import figures, problems, progress, to_json, write_report
    from deploy.comparison import Plan, compare, read_bodies

    plan = Plan(bodies=read_bodies(requests_from), requests=requests, pause_seconds=pause, **options)
    click.echo(
        f"sending {2 * plan.sent:,} requests: {plan.measured:,} with capture and {plan.measured:,} without, "
        f"after {plan.sent - plan.measured:,} each to warm up",
        err=True,
    )
    # What is stopped by a signal stops its servers too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="tracelake-bench-") as folder, progress(2 * plan.sent) as advance:
        comparison = compare(plan, Path(folder), advance)
    if comparison.good:
        found = figures(comparison)
        if json_file is not None:
            json_file.write(to_json(found))
        if json_file is None or json_file.name != "<stdout>":
            write_report(found, click.echo)
    if wrong := problems(comparison):
        raise TracelakeError(". ".join(wrong))


def open_table(uri: str | None, spool_dir: str | None) -> "InferenceTable":
    from inference_table.table import InferenceTable

    return InferenceTable(uri, spool_dir=spool_dir)


def find_row(source: "InferenceTable", id_: str, where: str | None, pending: bool) -> "InferenceRow":
    if id_ == LAST:
        rows = source.newest(1, where=where, pending=pending)
        found = rows[0] if rows else None
    else:
        found = source.get(id_, pending=pending)
    if found is None:
        what = (
            f"request {id_!r}" if id_ != LAST else "request that meets the condition" if where else "request"
        )
        raise click.ClickException(
            f"cannot find the {what} in '{source.uri}': it may wait in another machine's spool or have been "
            'sampled out; try `tracelake query "select databricks_request_id, request_time from payload"`'
        )
    return found


def print_request(row: "InferenceRow", full: bool) -> None:
    from deploy.output import plain_console
    from deploy.span_tree import render_request, render_trace

    console = plain_console()
    for line in render_request(row, console.width, full=full):
        console.print(line, soft_wrap=True)
    console.print()
    main_trace = row.trace()
    if main_trace is None:
        console.print("no trace was recorded for this request", style="dim")
        return
    for one in [main_trace, *row.other_traces()]:
        for line in render_trace(one, console.width, full=full):
            console.print(line, soft_wrap=True)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say what is waited for, where a person may be waiting."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text(what)):
        yield


for command in (ui, review_commands.replay, review_commands.top):
    main.add_command(command)
for command in (commands.deploy, commands.deployments, commands.logs, commands.undeploy, spool):
    main.add_command(command)


if __name__ == "__main__":
    main()
