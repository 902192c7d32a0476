"""Where MLflow's store on an inference table keeps what: its URI, its state file, its experiment.

``inference-table:///abs/path/payload`` is a table on this machine's disk, ``inference-table:s3://bucket/payload``
one on an object store (``az://``, ``gs://`` likewise). ``?state_dir=/some/folder`` names the folder of the
state: an SQLite file for what is not in the table, which are experiments, runs, datasets, prompts and the
traces of other experiments. By default it lies beside a local table, as ``payload.mlflow.db``, and for an
object store in the user's state folder.

The experiment's id is a hash of the table's address: it is the same on every machine, and stays the same when
the state file is lost.
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, quote, unquote, urlencode

from inference_table.disk import make_data_dir_of
from inference_table.errors import SettingsError
from inference_table.settings import StorageSettings

__all__ = ["SCHEME", "StoreLocation", "store_location", "store_uri"]

SCHEME: Final = "inference-table"
STATE_DIR: Final = "state_dir"
STATE_VARIABLE: Final = "XDG_STATE_HOME"
ID_BITS: Final = 31
"""Of the experiment's id: what every database and JSON reader takes for an integer."""


@dataclass(frozen=True)
class StoreLocation:
    """What a store URI says."""

    settings: StorageSettings
    """Of the table."""
    state: Path
    """The SQLite file."""

    @property
    def experiment_name(self) -> str:
        """The table's own folder."""
        return self.settings.uri.rpartition("/")[2] or "payload"

    @property
    def experiment_id(self) -> int:
        digest = hashlib.sha256(self.settings.uri.encode()).digest()
        # Far from the ids that the first other experiments get.
        return int.from_bytes(digest[:8], "big") >> (64 - ID_BITS) | 1 << (ID_BITS - 1)

    @property
    def database_uri(self) -> str:
        return f"sqlite:///{self.state}"

    @property
    def artifacts(self) -> Path:
        """The folder of artifacts of runs."""
        return self.state.with_suffix(".artifacts")

    @contextmanager
    def making(self) -> Iterator[None]:
        """Within it, nobody else makes the state file; it is the user's own.

        Raises:
            SettingsError: it can't be made.
        """
        try:
            make_data_dir_of(self.state)
            self.state.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Not the file itself: closing it would end SQLite's own locks on it.
            lock = os.open(self.state.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
            if not self.state.exists():
                os.close(os.open(self.state, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            raise SettingsError(
                f"cannot keep MLflow's experiments and runs in '{self.state}': {error}; name another folder "
                f"with --state-dir, or as ?{STATE_DIR}=/folder at the end of the store's URI"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def store_location(uri: str) -> StoreLocation:
    """What a store URI says.

    Raises:
        SettingsError: it names no table.
    """
    scheme, _, rest = uri.partition(":")
    # Not urlparse: a table's address is an URI of its own, and a path may hold what parsers stop at.
    address, _, query = rest.partition("?")
    path = address if "://" in address else unquote(address.removeprefix("//"))
    if scheme != SCHEME or not path or (rest.startswith("//") and not rest.startswith("///")):
        raise SettingsError(
            f"{uri!r} names no inference table: give {SCHEME}:///absolute/path/payload or "
            f"{SCHEME}:s3://bucket/path/payload"
        )
    settings = StorageSettings.from_environ(uri=path)
    folder = parse_qs(query).get(STATE_DIR, [None])[0]
    return StoreLocation(settings, state_file(settings, folder))


def store_uri(settings: StorageSettings, state_dir: str | Path | None = None) -> str:
    """The URI of the store on a table."""
    address = settings.uri
    base = f"{SCHEME}://{quote(address)}" if settings.is_local else f"{SCHEME}:{address}"
    return base if state_dir is None else f"{base}?{urlencode({STATE_DIR: str(Path(state_dir).absolute())})}"


def state_file(settings: StorageSettings, folder: str | None) -> Path:
    if settings.is_local and folder is None:
        return settings.local_path.with_name(f"{settings.local_path.name}.mlflow.db")
    home = Path(os.environ.get(STATE_VARIABLE) or Path.home() / ".local" / "state") / "tracelake" / "mlflow"
    digest = hashlib.sha256(settings.uri.encode()).hexdigest()[:12]
    name = settings.uri.rpartition("/")[2] or "payload"
    return (Path(folder) if folder else home).absolute() / f"{name}-{digest}.mlflow.db"
