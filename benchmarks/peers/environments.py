"""A virtual environment for each peer, made once by the machine's pip, with its usual configuration."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = [
    "BENTOML",
    "MLFLOW",
    "MLFLOW_TRACING",
    "OPENTELEMETRY",
    "OWN",
    "PHOENIX",
    "PHOENIX_OTEL",
    "Environment",
    "InstallError",
]

FOLDER: Final = Path(__file__).parents[2] / ".venv-peers"
STAMP: Final = "requirements.txt"
"""Written into an environment when all of it is installed."""
INSTALL_SECONDS: Final = 1200.0

AGENT: Final = ("orjson==3.13.0", "starlette==1.10.0", "uvicorn==0.54.0")
"""What serves the agent is the same everywhere, and as in ``constraints.txt``."""


class InstallError(Exception):
    """A peer can't be installed; the message says why."""


@dataclass(frozen=True)
class Environment:
    """Where a peer's server and the agent run.

    Attributes:
        name: of its own folder.
        requirements: as pip takes them. None at all: the environment that the benchmark itself runs in.
        folder: of all environments.
    """

    name: str
    requirements: tuple[str, ...]
    folder: Path = FOLDER

    @property
    def bin(self) -> Path:
        """The folder of its commands."""
        return self.folder / self.name / "bin" if self.requirements else Path(sys.executable).parent

    @property
    def what(self) -> str:
        """The first of its requirements, which it is made for."""
        return self.requirements[0] if self.requirements else "this version"

    def install(self) -> None:
        """Make it, unless a run before has.

        Raises:
            InstallError: pip fails, or takes longer than INSTALL_SECONDS.
        """
        if not self.requirements:
            return
        stamp = self.folder / self.name / STAMP
        wanted = "\n".join(self.requirements)
        if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
            return
        checked([sys.executable, "-m", "venv", str(self.folder / self.name)])
        pip = [str(self.bin / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        checked([*pip, *self.requirements])
        stamp.write_text(wanted, encoding="utf-8")


def checked(command: list[str]) -> None:
    """Run a command; its last line of errors is the message when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise InstallError(f"pip takes longer than {INSTALL_SECONDS:g} s") from error
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise InstallError((errors or done.stderr.splitlines() or ["pip failed"])[-1])


OWN: Final = Environment("own", ())
MLFLOW: Final = Environment("mlflow", ("mlflow==3.17.2", *AGENT))
# What agents install to send traces to a server is light; the servers are not.
MLFLOW_TRACING: Final = Environment("mlflow-tracing", ("mlflow-tracing==3.17.2", *AGENT))
PHOENIX: Final = Environment("phoenix", ("arize-phoenix==20.26.1",))
PHOENIX_OTEL: Final = Environment("phoenix-otel", ("arize-phoenix-otel==0.17.2", *AGENT))
OPENTELEMETRY: Final = Environment("opentelemetry", ("opentelemetry-sdk==1.45.2", *AGENT))
# BentoML's instrumentors were one release behind; telling pip so spares it a minute of looking.
BENTOML: Final = Environment("bentoml", ("bentoml==1.4.39", "opentelemetry-sdk==1.45.1", *AGENT))
