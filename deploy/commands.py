"""The commands ``tracelake deploy``, ``deployments``, ``logs`` and ``undeploy``.

What they need is imported when they run, as in :mod:`deploy.cli`.
"""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from inference_table.errors import DeploymentError

if TYPE_CHECKING:
    from deploy.deployments import Deployment

__all__ = ["deploy", "deployments", "logs", "undeploy"]

PIPE_WIDTH: Final = 160
"""Cells of a line where there is no terminal to ask: URLs stay whole."""
FOLLOW_SECONDS: Final = 0.5
"""How often `logs --follow` looks for more."""


def pairs(_: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> dict[str, str]:
    """A dictionary of a repeatable option ``NAME=VALUE``."""
    found: dict[str, str] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not (name and separator):
            raise click.BadParameter(f"{text!r} is not of the form {parameter.metavar}")
        found[name] = value
    return found


def shares(
    context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]
) -> dict[str, int] | None:
    try:
        return {name: int(share) for name, share in pairs(context, parameter, texts).items()} or None
    except ValueError:
        raise click.BadParameter(f"{', '.join(texts)} is not of the form {parameter.metavar}") from None


@click.command(
    epilog="""\b
Examples:
  tracelake deploy my_agent:app
  tracelake deploy my_agent:predict --endpoint-name support --workers 4 --durability strict
  tracelake deploy my_agent:app --traffic 1=90 --traffic 2=10     the new version gets a tenth
  tracelake deploy my_agent:app --version 1                       back to version 1
  tracelake deploy support-bot --version 3                        a model in MLflow's registry
  tracelake deploy my_agent:app --engine ray --num-replicas 4
  tracelake deploy my_agent:app --table s3://bucket/agents/payload --render kubernetes --output k8s/

\b
The endpoint goes on in the background: `tracelake deployments` lists it, `tracelake logs` shows what it
writes, `tracelake undeploy` ends it. The folder is copied first, without what git ignores."""
)
@click.argument("agent")
@click.option("--version", metavar="N", help="Of a registered model; or one deployed before, to go back to.")
@click.option("--endpoint-name", metavar="NAME", help="By default the module's or the model's name.")
@click.option(
    "--table",
    metavar="URI",
    help="Delta table.  [default: the endpoint's, else INFERENCE_TABLE_URI, else ./tracelake-data/payload]",
)
@click.option("--engine", default="local", show_default=True, type=click.Choice(["local", "ray"]))
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1), help="Server processes.")
@click.option("--host", metavar="HOST", help="Address to listen on.  [default: 127.0.0.1]")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    help="Port to listen on.  [default: the endpoint's, else 8000 if free]",
)
@click.option(
    "--admin-port",
    type=click.IntRange(0, 65535),
    help="Port of 127.0.0.1 for /metrics and /health; 0 is any free one.  [default: 0 with keys, else none]",
)
@click.option(
    "--env",
    multiple=True,
    metavar="NAME=VALUE",
    callback=pairs,
    help="Environment variable of the agent; repeatable.",
)
@click.option(
    "--tag", multiple=True, metavar="NAME=VALUE", callback=pairs, help="Kept with the version; repeatable."
)
@click.option("--description", metavar="TEXT", help="Kept with the version.")
@click.option(
    "--traffic",
    multiple=True,
    metavar="VERSION=PERCENT",
    callback=shares,
    help="Split between two versions; repeatable.  [default: all to this one]",
)
@click.option(
    "--working-dir",
    type=click.Path(exists=True, file_okay=False),
    metavar="DIR",
    help="Folder of the agent's code.  [default: the current one]",
)
@click.option("--spool-dir", metavar="DIR", help="Where rows wait on this machine.")
@click.option("--durability", type=click.Choice(["relaxed", "strict", "committed"]))
@click.option(
    "--api-key-file",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="Requests need one of these keys: docs/security.md",
)
@click.option("--max-request-bytes", type=click.IntRange(1), metavar="BYTES", help="Larger ones get 413.")
@click.option("--max-concurrency", type=click.IntRange(1), metavar="N", help="Of a worker; more get 429.")
@click.option("--wait-seconds", default=60.0, show_default=True, type=click.FloatRange(0))
@click.option("--drain-seconds", default=60.0, show_default=True, type=click.FloatRange(0))
@click.option("--num-replicas", type=click.IntRange(1), help="Replicas (engine ray); of pods, with --render.")
@click.option("--ray-address", metavar="ADDRESS", help="Of the cluster (engine ray).")
@click.option("--route-prefix", metavar="PATH", help="Path on the cluster (engine ray).")
@click.option(
    "--render",
    type=click.Choice(["systemd", "kubernetes", "docker"]),
    help="Run nothing; write the files by which this would: docs/deploy-elsewhere.md",
)
@click.option(
    "--output",
    default=".",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder for --render.",
)
def deploy(
    agent: str, env: dict[str, str], tag: dict[str, str], render: str | None, output: Path, **options: Any
) -> None:
    """Serve an agent in the background and record every request it answers.

    AGENT is module:attribute, an MLflow model, or a registered model's name with --version.
    """
    if render is not None:
        from deploy.artifacts import write_artifacts

        for path in write_artifacts(render, output, agent, env, {**options, "tag": tag}):
            click.echo(path)
        return
    from deploy.launch import deploy as launch

    deployment = launch(agent, environment_vars=env, tags=tag, **options)
    click.echo(f"{deployment.served_entity_name} answers at {deployment.query_endpoint}", err=True)
    click.echo(f"table {deployment.table}", err=True)
    if deployment.admin_url:
        click.echo(f"metrics {deployment.admin_url}/metrics", err=True)
    click.echo(deployment.endpoint_url)


@click.command(
    epilog="""\b
Examples:
  tracelake deployments
  tracelake deployments support --format json | jq .status.workers"""
)
@click.argument("name", required=False)
@click.option(
    "--format",
    "style",
    type=click.Choice(["table", "json"]),
    help="json is one object per line.  [default: table on a terminal, else json]",
)
def deployments(name: str | None, style: str | None) -> None:
    """List what is deployed: each version, whether it runs, and its share of the traffic."""
    from deploy.deployments import get_deployments, list_deployments

    found = list_deployments() if name is None else get_deployments(name)
    if name is not None and not found:
        raise DeploymentError(f"{name!r} is not deployed; see `tracelake deployments`")
    if style == "json" or (style is None and not sys.stdout.isatty()):
        write_json_lines(found)
    else:
        write_table(found)


def write_json_lines(found: "list[Deployment]") -> None:
    import json
    from dataclasses import asdict

    for one in found:
        click.echo(json.dumps({**asdict(one), "status": asdict(one.status())}))


def write_table(found: "list[Deployment]") -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("deployment", "agent", "state", "traffic", "workers", "restarts", "url"):
        table.add_column(heading, overflow="fold")
    for one in found:
        status = one.status()
        shown = status.state if status.error is None else f"{status.state}: {status.error}"
        cells = (
            one.served_entity_name,
            one.model_name,
            " ".join(shown.split()),
            f"{status.traffic} %",
            str(len(status.workers)),
            str(status.restarts),
            one.query_endpoint if status.traffic else "",
        )
        table.add_row(*map(Text, cells))
    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH)
    console.print(table)


@click.command(
    epilog="""\b
Examples:
  tracelake logs support
  tracelake logs support --version 2 --lines 1000
  tracelake logs support --follow"""
)
@click.argument("name")
@click.option("--version", metavar="N", help="[default: the newest]")
@click.option("-n", "--lines", default=100, show_default=True, type=click.IntRange(1))
@click.option("-f", "--follow", is_flag=True, help="Go on until Ctrl-C (engine local).")
def logs(name: str, version: str | None, lines: int, follow: bool) -> None:
    """Show what an endpoint's workers wrote."""
    from deploy.endpoints import engine_of, remembered

    folder, endpoint = remembered(name)
    numbers = folder.version_numbers()
    if version is not None and version not in numbers:
        raise DeploymentError(f"{name!r} has no version {version}, only {', '.join(numbers)}")
    if follow and endpoint.engine != "local":
        raise click.UsageError("--follow goes with engine local only")
    path = folder.log(version or numbers[-1])
    begin = path.stat().st_size if follow and path.exists() else 0
    click.echo(engine_of(endpoint).logs(folder, endpoint, version, lines).rstrip("\n"))
    if follow:
        for more in appended(path, begin):
            click.echo(more, nl=False)


def appended(path: Path, position: int) -> Iterator[bytes]:
    """What is written to a file from now on; where it was cut, from its beginning."""
    while True:
        size = path.stat().st_size if path.exists() else 0
        if size < position:
            position = 0
        if size > position:
            with path.open("rb") as file:
                file.seek(position)
                more = file.read()
            position += len(more)
            yield more
        time.sleep(FOLLOW_SECONDS)


@click.command(
    epilog="""\b
Examples:
  tracelake undeploy support
  tracelake undeploy support --version 2      traffic goes back to the version before"""
)
@click.argument("name")
@click.option("--version", metavar="N", help="Only this one.")
def undeploy(name: str, version: str | None) -> None:
    """End an endpoint, or one version of it. What it was asked is answered and recorded; the table stays."""
    from deploy.deployments import delete_deployment

    delete_deployment(name, version)
