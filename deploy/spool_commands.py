"""``tracelake spool``: what waits on this machine's disk for its table."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from inference_table.errors import TracelakeError

if TYPE_CHECKING:
    from inference_table.drain import Drained, SpooledTable

__all__ = ["spool"]

# Metrics of this process would stay behind among those of a server, as of one whose writer is down.
MULTIPROC_VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"


@click.group()
def spool() -> None:
    """Look after rows that wait on this machine's disk for their table."""


@spool.command(
    epilog="""\b
Examples:
  tracelake spool drain ./tracelake-data/spool
  tracelake spool drain /var/lib/bot/spool --table s3://bucket/agents/payload

\b
Each row reaches the table exactly once, however often this is done, also beside a server that runs.
The exit code is 0 if nothing is left that could be committed."""
)
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option("--table", metavar="URI", help="Only this table's rows.  [default: all tables of the spool]")
@click.option(
    "--wait-seconds",
    default=30.0,
    show_default=True,
    type=click.FloatRange(0),
    metavar="SECONDS",
    help="How long to wait while another process commits.",
)
@click.pass_context
def drain(ctx: click.Context, folder: Path, table: str | None, wait_seconds: float) -> None:
    """Commit what servers that are gone have left in the spool DIR (their INFERENCE_TABLE_SPOOL_DIR).

    For a spool whose server won't be started again on this machine: one that is, commits it by itself.
    """
    os.environ.pop(MULTIPROC_VARIABLE, None)
    from inference_table.drain import spooled_tables
    from inference_table.settings import StorageSettings
    from inference_table.spool import spool_root

    found = spooled_tables(folder)
    if table is not None:
        settings = StorageSettings.from_environ(uri=table, spool_dir=folder)
        wanted = spool_root(settings)
        others = [one for one in found if one.root.name != wanted.name]
        clean = drain_table(settings.uri, folder, wait_seconds)
        report_others(others)
    else:
        clean = True
        for one in found:
            if one.uri is not None:
                clean &= drain_table(one.uri, folder, wait_seconds)
        unknown = [one for one in found if one.uri is None]
        clean &= not report_others(unknown)
        if not found:
            click.echo(f"{folder}: nothing was ever spooled here")
    ctx.exit(0 if clean else 1)


def drain_table(uri: str, folder: Path, wait_seconds: float) -> bool:
    """Drain what waits for one table, and say so in one line; False if something is left."""
    from deploy.output import printable
    from inference_table.drain import drain
    from inference_table.settings import StorageSettings

    try:
        drained = drain(StorageSettings.from_environ(uri=uri, spool_dir=folder), wait_seconds)
    except TracelakeError as error:
        # Other tables of the same spool may be in reach.
        click.echo(printable(f"Error: {' '.join(str(error).split())}"), err=True)
        return False
    click.echo(printable(f"{uri}: {sentence(drained)}"))
    if drained.left:
        why = (
            "another process holds the committer's lock, and has not committed the rest within "
            f"{wait_seconds:g} s; see its log, or stop it, and drain again with a longer --wait-seconds"
            if drained.locked
            else "a process has died while the spool was drained; drain it again in a minute"
        )
        click.echo(f"Error: {why}", err=True)
    return not drained.left


def sentence(drained: "Drained") -> str:
    parts = [
        f"{drained.rows:,} rows committed, from {drained.segments:,} segments of {drained.bytes:,} bytes",
        f"{drained.elsewhere:,} segments were committed by another process" if drained.elsewhere else "",
        f"{drained.left:,} segments of {drained.left_bytes:,} bytes are left" if drained.left else "",
        f"{drained.alive:,} segments are of servers that run, and commit them" if drained.alive else "",
        f"{drained.quarantined:,} segments can't be read and stay in quarantine"
        if drained.quarantined
        else "",
    ]
    return "; ".join(part for part in parts if part)


def report_others(others: "list[SpooledTable]") -> bool:
    """Say what waits for tables that were not drained; whether there is anything."""
    waiting = 0
    for one in others:
        if count := one.segments:
            waiting += count
            whose = f"the table {one.uri}" if one.uri else "another table, whose URI is not noted"
            click.echo(f"{one.root}: holds {count:,} segments of {whose}; give its --table", err=True)
    return waiting > 0
