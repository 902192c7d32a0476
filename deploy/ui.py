"""The command ``tracelake ui``: MLflow's own server on an inference table.

The server is a child in a session of its own, so that it ends with all its workers when we are told to end,
and on Linux also when we are killed.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Final

import click

from deploy.listening import listen, listen_anywhere, netloc, port_of
from deploy.options import table_option
from inference_table.errors import TracelakeError
from inference_table.mlflow_location import StoreLocation, store_location, store_uri
from inference_table.settings import StorageSettings

__all__ = ["ui"]

USUAL_PORT: Final = 5000
"""MLflow's."""
START_SECONDS: Final = 180.0
"""It imports most of MLflow, several times, and makes its database at the first start."""
STOP_SECONDS: Final = 10.0
"""What a server may take to end that was told to."""
POLL_SECONDS: Final = 0.1
PR_SET_PDEATHSIG: Final = 1
"""Of ``linux/prctl.h``."""
ALWAYS: Final[Mapping[str, str]] = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # It takes a database, which a table is not; without this the server warns of it at each start.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}
"""Of the server's environment, unless the user has set it."""


@click.command(
    epilog="""\b
Examples:
  tracelake ui
  tracelake ui --table s3://bucket/agents/payload
  tracelake ui --app-name basic-auth --host 0.0.0.0

\b
It is MLflow's own server: `mlflow.set_tracking_uri("http://127.0.0.1:5000")` works too, and with
`export MLFLOW_TRACKING_URI=inference-table:///path/to/payload` no server is needed. Docs: docs/ui.md"""
)
@table_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), help="Port to listen on.  [default: 5000, else any free one]"
)
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1), help="Server processes.")
@click.option(
    "--state-dir",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Where experiments, runs and prompts are kept.  [default: beside a local table, else "
    "~/.local/state/tracelake/mlflow]",
)
@click.option("--app-name", metavar="NAME", help="MLflow's app to serve, such as basic-auth.")
@click.option(
    "--allowed-hosts", metavar="HOSTS", help="Host headers to answer, where it is not reached as localhost."
)
def ui(
    table: str | None,
    host: str,
    port: int | None,
    workers: int,
    state_dir: str | None,
    app_name: str | None,
    allowed_hosts: str | None,
) -> None:
    """Show the table in MLflow's UI: traces, sessions, charts, feedback, evaluation."""
    from inference_table.scan import open_snapshot

    check_extra(app_name)
    settings = StorageSettings.from_environ(uri=table)
    open_snapshot(settings)
    uri = store_uri(settings, state_dir)
    location = store_location(uri)
    with location.making():
        pass  # else the server's traceback says that it can't
    chosen = port_for(host, port)
    options = {"--app-name": app_name, "--allowed-hosts": allowed_hosts}
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri),
        *("--host", host, "--port", str(chosen), "--workers", str(workers)),
        *("--artifacts-destination", str(location.artifacts)),
        *(text for name, value in options.items() if value for text in (name, value)),
    ]
    click.echo(f"starting MLflow {version('mlflow')} on {settings.uri} ...", err=True)
    with server(command) as process:
        wait_until_up(process, f"http://{netloc(host, chosen)}")
        click.echo(page(location, host, chosen))
        code = process.wait()
    if code:
        raise TracelakeError(f"MLflow's server ended with {code}; what it wrote says why")


def check_extra(app_name: str | None) -> None:
    """Check that the whole of MLflow is there.

    Raises:
        TracelakeError: it isn't.
    """
    try:
        version("mlflow")
    except PackageNotFoundError:
        raise TracelakeError(
            "cannot start MLflow's UI: only MLflow's light SDK is installed; pip install 'tracelake[ui]'"
        ) from None
    if app_name == "basic-auth":
        try:
            version("Flask-WTF")
        except PackageNotFoundError:
            raise TracelakeError(
                "cannot start MLflow's UI with basic-auth: Flask-WTF is missing; pip install 'tracelake[ui]'"
            ) from None


@contextlib.contextmanager
def server(command: list[str]) -> Iterator["subprocess.Popen[bytes]"]:
    """The server as a child, which has ended with its workers when this has, whatever ended it."""
    environment = {**ALWAYS, **os.environ}
    stopping = [signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGINT)]
    process = subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        preexec_fn=end_with_parent(os.getpid()),
    )
    try:
        yield process
    except Stopped:
        click.echo("stopped", err=True)
        raise SystemExit(0) from None
    finally:
        # Once more would leave the workers behind.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        end(process)
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), stopping, strict=True):
            signal.signal(number, handler)


def end_with_parent(parent: int) -> Callable[[], None] | None:
    """What a child calls to be told to end when we are killed, which we can't tell it; Linux alone has it."""
    if sys.platform != "linux":
        return None
    # Loaded here: a forked child had better not load anything.
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return ask


class Stopped(BaseException):
    """We were told to end."""


def leave(*_: object) -> None:
    raise Stopped


def end(process: "subprocess.Popen[bytes]") -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)


def wait_until_up(process: "subprocess.Popen[bytes]", url: str) -> None:
    """Return once the server answers.

    Raises:
        TracelakeError: it has ended, or answers nothing.
    """
    deadline = time.monotonic() + START_SECONDS
    while not answers(url):
        if process.poll() is not None:
            raise TracelakeError(
                f"MLflow's server ended with {process.returncode} before it answered; what it wrote says why"
            )
        if time.monotonic() > deadline:
            raise TracelakeError(f"MLflow's server did not answer at {url} within {START_SECONDS:g} s")
        time.sleep(POLL_SECONDS)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as reply:
            return bool(reply.status == 200)
    except urllib.error.HTTPError:
        # It is there, and asks who we are.
        return True
    except OSError:
        return False


def page(location: StoreLocation, host: str, port: int) -> str:
    return f"http://{netloc(host, port)}/#/experiments/{location.experiment_id}/traces"


def port_for(host: str, port: int | None) -> int:
    """A port that MLflow can have: the one asked for, else its usual one, else any free one.

    Raises:
        DeploymentError: that address can't be had.
    """
    with listen_anywhere(host, USUAL_PORT) if port is None else listen(host, port, "--port") as probe:
        return port_of(probe)
