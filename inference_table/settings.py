"""Settings of the storage side: where rows go, and the limits on the way there."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import unquote

from inference_table.errors import SettingsError

__all__ = ["Durability", "StorageSettings"]

ENV_PREFIX: Final = "INFERENCE_TABLE_"
DATA_DIR: Final = Path("tracelake-data")
MIB: Final = 1024 * 1024
TRUE: Final = frozenset({"true", "1"})
FALSE: Final = frozenset({"false", "0", ""})
CONTROLS: Final = frozenset(map(chr, [*range(32), 127]))


class Durability(StrEnum):
    """When the end of a reply may leave, relative to its record."""

    RELAXED = "relaxed"
    """At once; the record follows."""
    STRICT = "strict"
    """Once the record is fsynced in the spool."""
    COMMITTED = "committed"
    """Once the record is committed to the Delta table."""


def parse_bool(text: str) -> bool:
    lowered = text.strip().lower()
    if lowered in TRUE:
        return True
    if lowered in FALSE:
        return False
    raise ValueError("true or false")


def parse_fraction(text: str) -> float:
    value = parse_number(text)
    if value > 1:
        raise ValueError("a number from 0 to 1")
    return value


def parse_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError("a number of at least 0")
    return value


def parse_bytes(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError("a whole number of bytes, at least 1")
    return int(text)


def parse_durability(text: str) -> Durability:
    try:
        return Durability(text.strip().lower())
    except ValueError:
        raise ValueError("relaxed, strict or committed") from None


def parse_text(text: str) -> str:
    if not text.strip():
        raise ValueError("a text that is not empty")
    return text.strip()


def misread(path: str) -> str | None:
    """Why delta-rs would take a local path for another one, or for none; None where it doesn't."""
    if unquote(path) != path:
        return "delta-rs undoes its percent-encoding, and so looks elsewhere"
    if "\\" in path:
        return "delta-rs takes a backslash for a slash"
    if not CONTROLS.isdisjoint(path):
        return "delta-rs takes no control characters"
    try:
        path.encode()
    except UnicodeEncodeError:
        return "delta-rs takes UTF-8 only"
    return None


def setting(default: Any, parse: Callable[[str], Any], env: str) -> Any:
    """A dataclass field read from the environment variable ``INFERENCE_TABLE_<env>``."""
    return field(default=default, metadata={"parse": parse, "env": ENV_PREFIX + env})


def read_settings(cls: type[Any], environ: Mapping[str, str], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the dataclass ``cls``: keyword arguments first, then the environment.

    Keyword arguments are checked by the same parsers as the environment's text.

    Raises:
        SettingsError: a value is not accepted; names the variable or argument, the value and what is.
    """
    values = {}
    for spec in fields(cls):
        parse, env = spec.metadata.get("parse"), spec.metadata.get("env")
        if overrides.get(spec.name) is not None:
            source, raw = f"the argument {spec.name}", overrides[spec.name]
        elif env is not None and env in environ:
            source, raw = f"the environment variable {env}", environ[env]
        else:
            continue
        if parse is None:
            values[spec.name] = raw
            continue
        try:
            values[spec.name] = parse(str(raw))
        except ValueError as error:
            raise SettingsError(f"{source} is {str(raw)!r}, which is not accepted: give {error}") from None
    return values


@dataclass(frozen=True, kw_only=True)
class StorageSettings:
    """Where rows go, and the limits on the way there.

    Sizes are bytes, times are seconds. Every field is also read from the environment variable
    ``INFERENCE_TABLE_<FIELD>`` by :meth:`from_environ`.
    """

    uri: str = setting(str(DATA_DIR / "payload"), parse_text, "URI")
    """The Delta table: a path, or ``s3://``, ``az://``, ``gs://``. A path is made absolute."""
    spool_dir: Path = setting(DATA_DIR / "spool", lambda text: Path(parse_text(text)), "SPOOL_DIR")
    """Local disk that holds records until they are committed; made absolute. Not a network file system."""
    flush_seconds: float = setting(1.0, parse_number, "FLUSH_SECONDS")
    """Pause between two commits."""
    durability: Durability = setting(Durability.RELAXED, parse_durability, "DURABILITY")
    max_payload_bytes: int = setting(64 * MIB, parse_bytes, "MAX_PAYLOAD_BYTES")
    """Limit on the request, the response and the trace, each."""
    max_memory_bytes: int = setting(256 * MIB, parse_bytes, "MAX_MEMORY_BYTES")
    """Limit on what a process holds in flight, queued and being encoded."""
    max_spool_bytes: int = setting(8192 * MIB, parse_bytes, "MAX_SPOOL_BYTES")
    """Limit on the spool of one table on this machine; 5 % of the disk stays free in any case."""
    strict_timeout_seconds: float = setting(5.0, parse_number, "STRICT_TIMEOUT_SECONDS")
    """How long a strict or committed reply is held before it fails."""
    storage_options: Mapping[str, str] = field(default_factory=dict)
    """Options of the object store, as delta-rs takes them; its environment variables work without."""

    def __post_init__(self) -> None:
        uri = self.uri.rstrip("/")
        if self.is_local:
            uri = str(Path(self.uri.removeprefix("file://")).absolute())
            if why := misread(uri):
                raise SettingsError(
                    f"cannot use the table {uri!r}: {why}; give the table another folder, with "
                    "INFERENCE_TABLE_URI or the argument uri"
                )
        # Absolute from here on: an agent may change the current folder, or delete it.
        object.__setattr__(self, "uri", uri)
        object.__setattr__(self, "spool_dir", self.spool_dir.absolute())

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] | None = None, **overrides: Any) -> Self:
        """Settings from the environment, with keyword arguments that win.

        Raises:
            SettingsError: a value is not accepted.
        """
        return cls(**read_settings(cls, os.environ if environ is None else environ, overrides))

    @property
    def is_local(self) -> bool:
        """Whether the table lies on a local disk, where we are responsible for fsync."""
        return "://" not in self.uri or self.uri.startswith("file://")

    @property
    def local_path(self) -> Path:
        """The folder of a local table."""
        return Path(self.uri)
