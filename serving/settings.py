"""Settings of the capture side: which requests are recorded, and what clients may ask for."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from fnmatch import translate
from typing import Any, Final, Self

from inference_table.errors import SettingsError
from inference_table.settings import (
    StorageSettings,
    parse_bool,
    parse_fraction,
    parse_number,
    parse_text,
    read_settings,
    setting,
)

__all__ = ["CaptureSettings", "PathPatterns", "is_tracing_enabled", "settings_from"]

ENABLE_VARIABLE: Final = "ENABLE_MLFLOW_TRACING"
METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "*")


def is_tracing_enabled(environ: Mapping[str, str] | None = None) -> bool:
    """Whether ``ENABLE_MLFLOW_TRACING`` switches capture on.

    Raises:
        SettingsError: it is neither true nor false.
    """
    text = (os.environ if environ is None else environ).get(ENABLE_VARIABLE, "")
    try:
        return parse_bool(text)
    except ValueError as error:
        raise SettingsError(
            f"the environment variable {ENABLE_VARIABLE} is {text!r}, which is not accepted: give {error}"
        ) from None


@dataclass(frozen=True, slots=True)
class PathPatterns:
    """Which requests are captured, by method and path.

    Written as ``"POST /invocations, POST /v1/*, !/v1/embeddings"``: shell patterns, each with an optional
    method (POST where none is given, ``*`` for all), ``!`` for those left out.
    """

    included: re.Pattern[str]
    excluded: re.Pattern[str]

    @classmethod
    def parse(cls, text: str) -> Self:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        included = [pattern_of(part, "POST") for part in parts if not part.startswith("!")]
        excluded = [pattern_of(part[1:].strip(), "*") for part in parts if part.startswith("!")]
        return cls(any_of(included or [pattern_of("*", "POST")]), any_of(excluded))

    def match(self, method: str, path: str) -> bool:
        subject = f"{method} {path}"
        return self.included.match(subject) is not None and self.excluded.match(subject) is None


def pattern_of(part: str, default_method: str) -> str:
    method, _, glob = part.rpartition(" ")
    method = method.strip().upper() or default_method
    if method not in METHODS or not glob.startswith(("/", "*")):
        raise ValueError(f"patterns such as 'POST /v1/*, !/health'; {part!r} is none")
    return translate(f"{method} {glob}")


def any_of(patterns: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(patterns) or r"(?!)")


@dataclass(frozen=True, kw_only=True)
class CaptureSettings:
    """Which requests are recorded, and what clients may ask for.

    Every field is also read from the environment variable ``INFERENCE_TABLE_<FIELD>``. The last three let
    clients influence us and are off because they leak or cost.
    """

    paths: PathPatterns = setting(PathPatterns.parse("POST *"), PathPatterns.parse, "PATHS")
    """Requests that are captured: see :class:`PathPatterns`."""
    sampling_fraction: float = setting(1.0, parse_fraction, "SAMPLING_FRACTION")
    """Share of requests recorded, drawn at random. Strict and committed requests are always recorded."""
    served_entity: str | None = setting(None, parse_text, "SERVED_ENTITY")
    """Endpoint and version (``support-bot/3``), for the column ``served_entity_id``."""
    requester_header: str | None = setting(None, parse_text, "REQUESTER_HEADER")
    """Request header for the column ``requester``. Anyone can send it unless a proxy sets it."""
    trace_grace_seconds: float = setting(1.0, parse_number, "TRACE_GRACE_SECONDS")
    """How long a row waits, after the reply, for spans that are still open."""
    allow_return_trace: bool = setting(False, parse_bool, "ALLOW_RETURN_TRACE")
    """Whether ``databricks_options.return_trace`` in a request puts the trace into its reply."""
    allow_durability_header: bool = setting(False, parse_bool, "ALLOW_DURABILITY_HEADER")
    """Whether the request header ``x-inference-table-durability`` chooses the durability."""
    trust_traceparent: bool = setting(False, parse_bool, "TRUST_TRACEPARENT")
    """Whether an incoming ``traceparent`` becomes the parent of the request's root spans."""


def settings_from(
    options: Mapping[str, Any], environ: Mapping[str, str] | None = None
) -> tuple[CaptureSettings, StorageSettings]:
    """Both halves of the settings, from keyword arguments that win over the environment.

    Raises:
        SettingsError: an option is unknown, or a value is not accepted.
    """
    environ = os.environ if environ is None else environ
    known = {spec.name for cls in (CaptureSettings, StorageSettings) for spec in fields(cls)}
    if unknown := sorted(options.keys() - known):
        raise SettingsError(
            f"unknown settings {', '.join(unknown)}; the known ones are {', '.join(sorted(known))}"
        )
    if isinstance(paths := options.get("paths"), (list, tuple)):
        options = {**options, "paths": ",".join(paths)}
    return CaptureSettings(**read_settings(CaptureSettings, environ, options)), StorageSettings(
        **read_settings(StorageSettings, environ, options)
    )
