"""Settings of the server around an agent: who may call it, how much at once, and where its metrics are."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Self

from inference_table.settings import MIB, parse_bool, parse_bytes, parse_text, read_settings

__all__ = ["ADMIN_PORT_VARIABLE", "PYTHON_PATH_VARIABLE", "ServerSettings"]

ENV_PREFIX: Final = "TRACELAKE_"
ADMIN_PORT_VARIABLE: Final = ENV_PREFIX + "ADMIN_PORT"
PYTHON_PATH_VARIABLE: Final = ENV_PREFIX + "PYTHON_PATH"
"""The agent's folders, for the Python path of what serves it. Not PYTHONPATH, nor the path of a process that
starts others: a folder of the agent's called ``deploy`` or ``serving`` would take the place of ours."""


def parse_count(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError("a whole number, at least 1")
    return int(text)


def parse_port(text: str) -> int:
    if not text.strip().isdecimal() or int(text) > 65535:
        raise ValueError("a port, 0 to 65535, where 0 is any free one")
    return int(text)


def parse_path(text: str) -> Path:
    # Absolute: workers may have another current folder.
    return Path(parse_text(text)).expanduser().absolute()


def env(name: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    """Metadata of a field that is read from the environment variable ``TRACELAKE_<name>``."""
    return {"parse": parse, "env": ENV_PREFIX + name}


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What ``tracelake serve`` and the workers of ``deploy()`` put around an agent.

    Every field is also read from the environment variable ``TRACELAKE_<FIELD>``.
    """

    api_key_file: Path | None = field(default=None, metadata=env("API_KEY_FILE", parse_path))
    """Who may call the agent: see :mod:`serving.api_keys`. None: whoever reaches it."""
    max_request_bytes: int = field(default=128 * MIB, metadata=env("MAX_REQUEST_BYTES", parse_bytes))
    """Limit on a request's body. By default twice what is recorded of one: agents read bodies into memory."""
    max_concurrency: int = field(default=1000, metadata=env("MAX_CONCURRENCY", parse_count))
    """Requests that a worker runs at once. By default more than a core can keep up with: what comes on top
    would only wait, and hold memory meanwhile."""
    admin_port: int | None = field(default=None, metadata=env("ADMIN_PORT", parse_port))
    """Port of 127.0.0.1 for ``/metrics`` and ``/health``; 0 for any free one. None: ``/metrics`` is on the
    agent's port, unless there are API keys."""

    feedback: bool | None = field(default=None, metadata=env("FEEDBACK", parse_bool))
    """Whether ``POST /feedback`` takes what users say of answers: see :mod:`serving.feedback`. It lets
    clients write to a table. None: where there are API keys."""

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] | None = None, **overrides: Any) -> Self:
        """Settings from the environment, with keyword arguments that win.

        Raises:
            SettingsError: a value is not accepted.
        """
        return cls(**read_settings(cls, os.environ if environ is None else environ, overrides))

    def to_environ(self) -> dict[str, str]:
        """The environment variables by which other processes read the same settings."""
        values = {spec.metadata["env"]: getattr(self, spec.name) for spec in fields(self)}
        return {variable: str(value) for variable, value in values.items() if value is not None}
