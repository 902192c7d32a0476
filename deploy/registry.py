"""What is deployed, on disk: remembered across processes, whoever of them dies.

::

    <home>/endpoints/.<name>.lock   held while the endpoint is changed; it outlives the endpoint's folder
    <home>/endpoints/<name>/
        endpoint.json       what is wanted: by whom it is deployed, under the lock
        state.json          what is: by the supervisor (engine local), whole at each change
        supervisor.lock     held by the supervisor as long as it lives
        workers.lock        shared by the supervisor and its workers, as long as any of them lives
        versions/<number>/version.json, and the frozen copy of the agent in `code` or `model`
        logs/<number>.log, logs/supervisor.log

What holds:

- A JSON file is replaced by a rename: a reader sees the old one or the new one.
- A folder in `versions` has its final name only when all of it is there; it never changes after that.
- Files are readable by their owner alone: the environment of a version holds its secrets.
- A process lives if it holds its lock. Process ids are for people, and for signals while the lock is held.
"""

import fcntl
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any, Final, Self

from inference_table.errors import DeploymentError

__all__ = [
    "Endpoint",
    "EndpointFolder",
    "State",
    "Version",
    "VersionState",
    "endpoint_names",
    "home",
    "is_locked",
    "locked",
    "write_json",
]

HOME_VARIABLE: Final = "TRACELAKE_HOME"
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
LOCK_PAUSE_SECONDS: Final = 0.05


class Document:
    """A frozen dataclass that is a JSON file. Fields that an older tracelake doesn't know are left out."""

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Self:
        known = {spec.name for spec in fields(cls)}  # type: ignore[arg-type]
        return cls(**{name: value for name, value in document.items() if name in known})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)  # type: ignore[call-overload, no-any-return]


@dataclass(frozen=True, kw_only=True)
class Version(Document):
    """One version of an agent, as it was deployed. Never changes."""

    number: str
    """``"1"``, ``"2"``, ...: its folder, and its key in ``Endpoint.traffic``."""
    agent: str
    """The agent as it was given: ``my_agent:app``, ``models:/support-bot/3``."""
    target: str
    """What :func:`serving.app.load_app` takes, from within ``working_dir``."""
    model_name: str
    model_version: str
    working_dir: str
    """The frozen copy: current folder of its workers and the first on their Python path."""
    environment: dict[str, str]
    """Engine local: the whole environment of its workers. Engine ray: what is added to the cluster's."""
    workers: int = 1
    python: str
    """The interpreter that runs it."""
    created_at: str
    """UTC, ISO 8601."""
    tags: dict[str, str] = field(default_factory=dict)
    description: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    """What the engine alone understands: ``num_replicas``, ``autoscaling`` of Ray."""


@dataclass(frozen=True, kw_only=True)
class Endpoint(Document):
    """What is wanted of an endpoint."""

    name: str
    engine: str
    """``local`` or ``ray``."""
    host: str
    port: int | None
    """None: any free one, the conventional 8000 where it is free."""
    admin_port: int | None = None
    """Port of 127.0.0.1 for ``/metrics`` and ``/health``; 0 for any free one. None: ``/metrics`` is on
    ``port``, unless there are API keys, and ``/health`` is nowhere."""
    table: str
    """Absolute."""
    spool_dir: str
    """Absolute."""
    traffic: dict[str, int] = field(default_factory=dict)
    """Percent per version; empty: nothing is to run."""
    generation: int = 0
    """Counts the changes; the supervisor says which one it has carried out."""
    last_number: int = 0
    """The highest number a version ever had: a deleted one is not given again, for rows carry it."""
    wait_seconds: float = 60.0
    """How long new workers may take to answer before the change is given up."""
    drain_seconds: float = 60.0
    """How long old workers may take to finish what they are answering."""
    options: dict[str, Any] = field(default_factory=dict)
    """What the engine alone understands: ``address`` and ``route_prefix`` of Ray."""


@dataclass(frozen=True, kw_only=True)
class VersionState(Document):
    """What one version does."""

    state: str
    """``starting``, ``serving``, ``draining`` or ``failed``; versions that don't run aren't listed."""
    workers: list[int] = field(default_factory=list)
    """Process ids of its workers that are up."""
    restarts: int = 0
    invocations: bool = False
    """Whether the agent answers ``POST /invocations``."""
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class State(Document):
    """What an endpoint does."""

    state: str
    """``starting``, ``serving``, ``stopping``, ``stopped`` (cleanly), ``failed`` (it gave up) or ``dead``."""
    generation: int = 0
    """The newest generation that is decided: carried out, or given up for the reason in ``error``."""
    pid: int | None = None
    host: str | None = None
    port: int | None = None
    admin_port: int | None = None
    traffic: dict[str, int] = field(default_factory=dict)
    """Percent per version, as it is now."""
    versions: dict[str, VersionState] = field(default_factory=dict)
    error: str | None = None

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Self:
        versions = {
            number: VersionState.from_json(one) for number, one in document.get("versions", {}).items()
        }
        return super().from_json({**document, "versions": versions})


def home() -> Path:
    """Where deployments are remembered: ``TRACELAKE_HOME``, else ``tracelake`` in the user's state folder."""
    if given := os.environ.get(HOME_VARIABLE):
        return Path(given).expanduser().absolute()
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state).absolute() / "tracelake"


def endpoint_names() -> list[str]:
    """The names of all endpoints that are remembered, sorted."""
    return sorted(path.parent.name for path in (home() / "endpoints").glob("*/endpoint.json"))


class EndpointFolder:
    """The files of one endpoint.

    Raises:
        DeploymentError: the name is none that a folder and a URL can carry.
    """

    def __init__(self, name: str, root: Path | None = None) -> None:
        if NAME.fullmatch(name) is None:
            raise DeploymentError(
                f"cannot use the endpoint name {name!r}: give up to 63 letters, digits, - and _, the first a "
                "letter or digit, with endpoint_name"
            )
        self.name = name
        root = root or home() / "endpoints"
        self.path = root / name
        self.supervisor_lock = self.path / "supervisor.lock"
        self.workers_lock = self.path / "workers.lock"
        self.deploy_lock = root / f".{name}.lock"
        self.versions = self.path / "versions"
        self.logs = self.path / "logs"

    def create(self) -> None:
        """Make the folders, for their owner alone."""
        for folder in (self.path, self.versions, self.logs):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def remove(self) -> None:
        """Forget the endpoint. Nothing of it may run."""
        # First that by which it is found: what a crash leaves here is no endpoint any more.
        (self.path / "endpoint.json").unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def endpoint(self) -> Endpoint | None:
        document = read_json(self.path / "endpoint.json")
        return None if document is None else Endpoint.from_json(document)

    def write_endpoint(self, endpoint: Endpoint) -> None:
        write_json(self.path / "endpoint.json", endpoint.to_json())

    def state(self) -> State | None:
        """What the supervisor last said, whether it lives or not."""
        document = read_json(self.path / "state.json")
        return None if document is None else State.from_json(document)

    def write_state(self, state: State) -> None:
        write_json(self.path / "state.json", state.to_json())

    def version(self, number: str) -> Version | None:
        document = read_json(self.version_folder(number) / "version.json")
        return None if document is None else Version.from_json(document)

    def version_folder(self, number: str) -> Path:
        return self.versions / number

    def version_numbers(self) -> list[str]:
        """All versions that are remembered, oldest first."""
        found = [path.parent.name for path in self.versions.glob("[!.]*/version.json")]
        return sorted((number for number in found if number.isdecimal()), key=int)

    def log(self, number: str) -> Path:
        return self.logs / f"{number}.log"


def read_json(path: Path) -> dict[str, Any] | None:
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DeploymentError(f"cannot read '{path}': {error}; deploy the endpoint again") from error
    return document


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Replace a file whole. Readable by its owner alone, as temporary files are."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    new = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
            file.flush()
            os.fsync(descriptor)
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


@contextmanager
def locked(path: Path, seconds: float, whose: str) -> Iterator[IO[bytes]]:
    """Hold a file lock.

    Args:
        seconds: how long to wait for it.
        whose: who else may hold it, for the error.

    Raises:
        DeploymentError: another process kept it.
    """
    with path.open("ab") as file:
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise DeploymentError(
                        f"cannot lock '{path}' within {seconds:g} s: held by {whose}; wait for it to end"
                    ) from None
                time.sleep(LOCK_PAUSE_SECONDS)
        yield file


def is_locked(path: Path) -> bool:
    """Whether a process holds a file lock. Takes it for a moment: who wants it must try more than once."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
