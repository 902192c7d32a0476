"""Rows that killed workers left in the spool: committed by a process of its own when an endpoint stops."""

import os
import subprocess
from pathlib import Path
from typing import Final

from deploy.log_file import open_log
from deploy.process import say
from deploy.registry import Endpoint, EndpointFolder

__all__ = ["commit_leftovers"]

SEGMENTS: Final = "*/*/*.arrow"
"""Within the spool folder: a root per table, a folder per process."""
COMMIT_SECONDS: Final = 120.0
"""What is not committed by then stays for the next process that has the table."""


def commit_leftovers(folder: EndpointFolder, endpoint: Endpoint) -> None:
    """Commit what is left in the spool, if anything is. What goes wrong is in the supervisor's log."""
    numbers = folder.version_numbers()
    version = folder.version(numbers[-1]) if numbers else None
    if version is None or next(Path(endpoint.spool_dir).glob(SEGMENTS), None) is None:
        return
    command = [version.python, "-P", "-m", "deploy.cli", "spool", "drain", endpoint.spool_dir]
    log = open_log(folder.logs / "supervisor.log")
    with os.fdopen(log, "wb") as output:
        try:
            status = subprocess.run(
                [*command, "--table", endpoint.table],
                env=version.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=COMMIT_SECONDS,
                check=False,
            ).returncode
        except (OSError, subprocess.TimeoutExpired) as error:
            say(f"cannot commit what is left in '{endpoint.spool_dir}': {error}")
            return
    if status != 0:
        say(f"rows are left in '{endpoint.spool_dir}': `tracelake spool drain` ended with status {status}")
