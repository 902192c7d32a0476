"""Engine ``local``: an endpoint on this machine, run by a supervisor process that outlives its deployer.

The functions are those that every engine has. Whoever changes an endpoint holds its lock.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from typing import Final

from deploy.leftovers import commit_leftovers
from deploy.log_file import open_log, tail
from deploy.registry import Endpoint, EndpointFolder, State, is_locked, locked
from inference_table.errors import DeploymentError

__all__ = ["apply", "logs", "state", "stop"]

POLL_SECONDS: Final = 0.02
START_SECONDS: Final = 60.0
"""What a supervisor may take to start, and to say what became of a change, beside the time that its workers
have. It does so at once; a machine under load does not."""
STOP_SECONDS: Final = 240.0
"""The same for an end: workers may be given time to flush, and what is left in the spool to be committed."""
TAIL_LINES: Final = 20
ENDED: Final = frozenset({"stopped", "failed"})
SUPERVISOR_LOG: Final = "supervisor.log"


def apply(folder: EndpointFolder, endpoint: Endpoint) -> State:
    """Bring about what ``endpoint.json`` says, and wait until it is so.

    Args:
        endpoint: what the caller has written there.

    Raises:
        DeploymentError: it did not come about; with the reason and the end of the log. What served before
            serves on.
    """
    found = decided(folder, endpoint)
    wanted = {number: percent for number, percent in endpoint.traffic.items() if percent > 0}
    if found.error is None and (found.traffic == wanted or not wanted):
        return found
    raise DeploymentError(explained(folder, endpoint, found))


def decided(folder: EndpointFolder, endpoint: Endpoint) -> State:
    """The state once the supervisor has carried out a change, or given it up."""
    deadline = time.monotonic() + endpoint.wait_seconds + START_SECONDS
    told = started = False
    while time.monotonic() < deadline:
        is_alive = is_locked(folder.supervisor_lock)
        found = folder.state()
        is_decided = found is not None and found.generation >= endpoint.generation
        if is_alive:
            if found is not None and is_decided and found.state == "serving":
                return found
            if not (told or started) and found is not None and found.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(found.pid, signal.SIGHUP)
                told = True
        elif found is not None and (told or started) and is_decided and found.state in ENDED:
            return found
        elif started:
            log = tail(folder.logs / SUPERVISOR_LOG, TAIL_LINES)
            raise DeploymentError(
                f"cannot deploy endpoint {endpoint.name!r}: its supervisor died; deploy it again; the end of "
                f"'{folder.logs / SUPERVISOR_LOG}':\n{log}"
            )
        else:
            # There is none, or it was about to end and did not hear.
            (folder.path / "state.json").unlink(missing_ok=True)
            start(folder)
            started = True
        time.sleep(POLL_SECONDS)
    raise DeploymentError(
        f"cannot deploy endpoint {endpoint.name!r}: its supervisor does not say what became of it; see "
        f"'{folder.logs / SUPERVISOR_LOG}'"
    )


def start(folder: EndpointFolder) -> None:
    """Start a supervisor, which outlives whoever starts it: in a session of its own, and without a parent.

    When this returns it holds its lock.
    """
    path = folder.logs / SUPERVISOR_LOG
    log = open_log(path)
    try:
        status = subprocess.run(
            # Not from the current folder, which may have modules with names of ours.
            [sys.executable, "-P", "-m", "deploy.supervisor", str(folder.path)],
            cwd=folder.path,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            check=False,
        ).returncode
    finally:
        os.close(log)
    if status != 0:
        raise DeploymentError(
            f"cannot start the supervisor of endpoint {folder.name!r}; the end of '{path}':\n"
            f"{tail(path, TAIL_LINES)}"
        )


def explained(folder: EndpointFolder, endpoint: Endpoint, found: State) -> str:
    """Why a state is not what was wanted, with the end of the log of the version that failed."""
    text = f"cannot deploy endpoint {endpoint.name!r}: {found.error or 'it was stopped meanwhile'}"
    if found.state == "serving":
        text += f"; version {' and '.join(found.traffic)} goes on serving"
    failed = [number for number, version in found.versions.items() if version.state == "failed"]
    if failed and "\n" not in (found.error or ""):
        log = folder.log(failed[-1])
        if lines := tail(log, TAIL_LINES):
            text += f"; the end of '{log}':\n{lines}"
    return text


def state(folder: EndpointFolder, endpoint: Endpoint) -> State:
    """What an endpoint does now; ``dead`` where its supervisor ended without a word."""
    # In this order: a supervisor says how it ended before it lets go of its lock.
    is_alive = is_locked(folder.supervisor_lock)
    found = folder.state()
    if found is None:
        nothing = "starting" if is_alive else "dead" if endpoint.traffic else "stopped"
        return State(state=nothing, host=endpoint.host, port=endpoint.port, admin_port=endpoint.admin_port)
    if is_alive or found.state in ENDED:
        return found
    error = f"its supervisor, process {found.pid}, was killed; deploy it again"
    return replace(found, state="dead", pid=None, versions={}, error=error)


def stop(folder: EndpointFolder, endpoint: Endpoint) -> None:
    """Stop an endpoint: what it was asked is answered, and its rows are in the table. Fine where it isn't up.

    Raises:
        DeploymentError: it takes too long.
    """
    deadline = time.monotonic() + endpoint.drain_seconds + STOP_SECONDS
    told = False
    while is_locked(folder.supervisor_lock):
        found = folder.state()
        if not told and found is not None and found.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(found.pid, signal.SIGTERM)
            told = True
        if time.monotonic() > deadline:
            raise DeploymentError(
                f"cannot stop endpoint {endpoint.name!r}: its supervisor, process "
                f"{found.pid if found else 'unknown'}, still waits for its workers; see "
                f"'{folder.logs / SUPERVISOR_LOG}'"
            )
        time.sleep(POLL_SECONDS)
    found = folder.state()
    if found is not None and found.state not in ENDED:
        # Of a killed supervisor: what they still answer reads the frozen copy, and is recorded.
        with locked(folder.workers_lock, endpoint.drain_seconds + STOP_SECONDS, "workers that finish"):
            commit_leftovers(folder, endpoint)
            folder.write_state(replace(found, state="stopped", pid=None, versions={}))


def logs(
    folder: EndpointFolder,
    endpoint: Endpoint,  # noqa: ARG001 - of other engines
    number: str | None,
    lines: int,
) -> str:
    """The last lines that the workers of a version wrote; of the newest version where none is named."""
    chosen = number or next(reversed(folder.version_numbers()), None)
    return "" if chosen is None else tail(folder.log(chosen), lines)
