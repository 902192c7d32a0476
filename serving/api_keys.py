"""API keys: who may call an agent.

A key file has one key per line, ``NAME KEY`` or ``NAME sha256:<64 hex digits>`` of the key; a name may stand
on several lines, so that a key can be replaced while the old one still counts. Blank lines and lines that
begin with ``#`` mean nothing.

What holds:

- No part of a key file or of a request's key is in a message, a log or a row; the name of the key is.
- Keys are compared as SHA-256 digests, each in constant time, with all keys of the file.
- A key goes no further than here: its header is taken out of the scope.
- The file is read again when it changes. One that turned bad or is gone changes nothing.
"""

import hashlib
import hmac
import logging
import os
import re
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from inference_table import metrics
from inference_table.errors import SettingsError
from serving.border import reporter
from serving.exchange import REQUESTER_KEY
from serving.invocation import error_response
from serving.refusals import refuse

__all__ = ["ApiKey", "ApiKeyCheck", "KeyFile", "read_keys"]

logger: Final = logging.getLogger("tracelake")

NAME: Final = re.compile(r"[A-Za-z0-9._@-]+")
KEY: Final = re.compile(r"[!-~]{16,}")
"""Printable ASCII without blanks. 16 hexadecimal digits are 64 bits: too many to guess over a network."""
SHA256: Final = "sha256:"
HEX_DIGEST: Final = re.compile(r"[0-9a-fA-F]{64}")
FORM: Final = "give NAME KEY or NAME sha256:DIGEST, and nothing more"
MAX_FILE_BYTES: Final = 128 * 1024
"""Some 1,500 keys. All are compared with each request's, in 0.2 ms then, and read on the event loop."""
LOOK_SECONDS: Final = 1.0
"""How soon a change of the file counts. Asking for its state takes some µs."""
API_KEY_HEADER: Final = b"x-api-key"
AUTHORIZATION: Final = b"authorization"
POLICY_VIOLATION: Final = 1008
"""A websocket's close code; before it is accepted, servers answer 403 in its place."""
MESSAGES: Final = {
    "missing": "an API key is needed: send it as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'",
    "wrong": "the API key is not one of those that are accepted here",
}

Header = tuple[bytes, bytes]
FileState = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as it is compared, and who has it."""

    name: str
    digest: bytes = field(repr=False)
    """SHA-256 of the key."""


def read_keys(path: Path) -> list[ApiKey]:
    """The keys of a key file.

    Raises:
        SettingsError: it can't be read, holds no key, or has mistakes; all of them are named, by line.
    """
    return load(path)[0]


def load(path: Path) -> tuple[list[ApiKey], os.stat_result]:
    """The keys of a file, and the state in which it was read."""
    try:
        if not path.is_file():
            raise SettingsError(f"cannot read the API key file '{path}': {no_file(path)}")
        with path.open("rb") as file:
            state = os.fstat(file.fileno())  # before the text: what is written meanwhile is seen next time
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise SettingsError(
            f"cannot read the API key file '{path}': {error.strerror}; let the server's user read it"
        ) from error
    if len(content) > MAX_FILE_BYTES:
        raise SettingsError(
            f"cannot use the API key file '{path}': it has more than {MAX_FILE_BYTES:,} bytes; remove keys"
        )
    return parse(content.decode("utf-8-sig", "replace"), path), state


def no_file(path: Path) -> str:
    return "it is no regular file" if path.exists() else "there is none; give the path of one"


def parse(text: str, path: Path) -> list[ApiKey]:
    keys: list[ApiKey] = []
    mistakes: list[str] = []
    lines: dict[bytes, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            key = parse_line(line)
        except ValueError as error:
            mistakes.append(f"line {number}: {error}")
            continue
        if (first := lines.setdefault(key.digest, number)) != number:
            mistakes.append(f"line {number}: its key is that of line {first}; give each its own")
        keys.append(key)
    if not keys and not mistakes:
        mistakes.append(f"it holds no key; {FORM}, on a line for each key")
    if mistakes:
        raise SettingsError(f"cannot use the API key file '{path}': {'; '.join(mistakes)}")
    return keys


def parse_line(line: str) -> ApiKey:
    # Without any text of the line in an error: in a line that is mixed up, any part may be the key.
    parts = line.split()
    if len(parts) != 2:
        raise ValueError(FORM)
    name, key = parts
    if NAME.fullmatch(name) is None:
        raise ValueError("a name has letters, digits, '.', '_', '-' and '@' only")
    if key.lower().startswith(SHA256):
        digest = key[len(SHA256) :]
        if HEX_DIGEST.fullmatch(digest) is None:
            raise ValueError("a digest is sha256: and 64 hexadecimal digits")
        return ApiKey(name, bytes.fromhex(digest))
    if KEY.fullmatch(key) is None:
        raise ValueError("a key has at least 16 characters, printable ASCII without blanks")
    return ApiKey(name, digest_of(key.encode()))


def digest_of(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class KeyFile:
    """A key file that may change while it is used.

    Raises:
        SettingsError: see :func:`read_keys`; only at first.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._keys, state = load(path)
        self._seen = identity(state)
        self._next_look = time.monotonic() + LOOK_SECONDS
        if stat.S_IMODE(state.st_mode) & (stat.S_IRWXG | stat.S_IRWXO):
            logger.warning(
                "users other than its owner may read the API key file '%s'; chmod 600 it where you can", path
            )

    def name_of(self, key: bytes) -> str | None:
        """The name of a key, None where it is none of the file's."""
        self._look()
        digest = digest_of(key)
        name = None
        for known in self._keys:
            if hmac.compare_digest(known.digest, digest):
                name = known.name
        return name

    def _look(self) -> None:
        """Read the file again where it has changed."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_SECONDS
        try:
            if identity(self._path.stat()) == self._seen:
                return
            self._keys, state = load(self._path)
        except (OSError, SettingsError) as error:
            metrics.API_KEY_FILE_ERRORS.inc()
            reporter.failure(
                "api_keys", "the API key file is not used as it is now, the keys of before are", error
            )
            return
        self._seen = identity(state)
        logger.info("the API key file '%s' was read again: %d keys", self._path, len(self._keys))


def identity(state: os.stat_result) -> FileState:
    """What differs between two contents of a file, and between two files that a link led to."""
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


class ApiKeyCheck:
    """An ASGI app around another, for requests and websockets with a key alone.

    The scope that goes on has the key's name under ``tracelake.requester``, no ``x-api-key``, and no
    ``authorization`` with a key of the file.

    Args:
        app: the ASGI app.
        keys: whose requests go on.
    """

    def __init__(self, app: ASGIApp, keys: KeyFile) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        presented = presented_keys(scope["headers"])
        # With two of them, who knows which one a proxy before us went by?
        name = self._keys.name_of(presented[0]) if len(presented) == 1 else None
        if name is None:
            await refuse_unknown("wrong" if presented else "missing", scope, receive, send)
            return
        headers = [header for header in scope["headers"] if not self._holds_key(header, presented[0])]
        await self._app({**scope, "headers": headers, REQUESTER_KEY: name}, receive, send)

    def _holds_key(self, header: Header, used: bytes) -> bool:
        name, value = header
        if name == AUTHORIZATION:
            token = bearer_token(value)
            return token is not None and (token == used or self._keys.name_of(token) is not None)
        return name == API_KEY_HEADER


def presented_keys(headers: Iterable[Header]) -> list[bytes]:
    """The keys of ``x-api-key``, else of ``authorization``, which may be meant for the agent."""
    own = [value.strip() for name, value in headers if name == API_KEY_HEADER]
    tokens = (bearer_token(value) for name, value in headers if name == AUTHORIZATION)
    return own or [token for token in tokens if token is not None]


def bearer_token(value: bytes) -> bytes | None:
    scheme, _, token = value.strip().partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else None


async def refuse_unknown(reason: str, scope: Scope, receive: Receive, send: Send) -> None:
    metrics.UNAUTHENTICATED.labels(reason).inc()
    if scope["type"] == "http":
        description = {"error_code": "UNAUTHENTICATED", "message": MESSAGES[reason]}
        await refuse(scope, receive, send, error_response(401, description, {"www-authenticate": "Bearer"}))
    else:
        await send({"type": "websocket.close", "code": POLICY_VIOLATION, "reason": MESSAGES[reason]})
