"""Members of JSON objects, added and read in their bytes, so that what is not touched stays byte for byte.

What JSON is here: that which orjson accepts, RFC 8259 without numbers beyond a double, unpaired surrogate
escapes, and more than 1,024 levels.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

import orjson

__all__ = ["NOT_JSON", "WHITESPACE", "Member", "append_member", "elements", "members", "parse"]

WHITESPACE: Final = b" \t\n\r"

NOT_JSON: Final = object()
"""What :func:`parse` returns for a body that is no JSON: None is the value of ``null``."""


def parse(body: bytes) -> Any:
    """The value of ``body``, or ``NOT_JSON``."""
    # A list is parsed inside another, as the column will hold it: it must be valid one level deeper too.
    nested = body.lstrip(WHITESPACE).startswith(b"[")
    try:
        value = orjson.loads(b"[" + body + b"]" if nested else body)
    except orjson.JSONDecodeError:
        return NOT_JSON
    if nested:
        return value[0] if len(value) == 1 else NOT_JSON
    return value


def append_member(
    body: bytes, key: bytes, value: Iterable[bytes | memoryview], *, empty: bool = False
) -> list[bytes | memoryview]:
    """The JSON object ``body``, ``empty`` or not, with one more member; all its bytes stay.

    The value and the result are in parts, to be joined.
    """
    end = body.rindex(b"}")
    comma = b"" if empty else b","
    return [memoryview(body)[:end], comma + b'"' + key + b'":', *value, memoryview(body)[end:]]


class Member(NamedTuple):
    """A member of a JSON object; ``raw`` is all that stands between its separators."""

    key: str
    raw: bytes
    value: bytes


STRUCTURE: Final = re.compile(rb'["{}\[\]]')
COLON: Final = re.compile(rb"[ \t\n\r]*:")
BACKSLASH: Final = ord("\\")


def members(body: bytes) -> Iterator[Member]:
    """Top-level members of ``body``, which is known to be a JSON object."""
    keys: list[tuple[int, int, int]] = []
    depth, at, end = 0, 0, len(body)
    while (token := STRUCTURE.search(body, at)) is not None:
        at = token.end()
        if token[0] == b'"':
            at = _string_end(body, at)
            if depth == 1 and (colon := COLON.match(body, at)) is not None:
                keys.append((token.start(), at, colon.end()))
        elif token[0] in b"{[":
            depth += 1
        else:
            depth, end = depth - 1, token.start()
    start = body.index(b"{") + 1
    for number, (key, key_end, value) in enumerate(keys, 1):
        # Between a value and the next key stands one comma, and what else is there is whitespace.
        stop = end if number == len(keys) else body.rindex(b",", value, keys[number][0])
        yield Member(orjson.loads(body[key:key_end]), body[start:stop], body[value:stop].strip(WHITESPACE))
        start = stop + 1


def _string_end(body: bytes, at: int) -> int:
    """Where the string ends whose first character is at ``at``."""
    # bytes.index runs through megabytes many times faster than a regular expression, which would hold the
    # GIL for all of the string.
    while True:
        quote = body.index(b'"', at)
        first = quote
        while body[first - 1] == BACKSLASH and first > at:
            first -= 1
        at = quote + 1
        if (quote - first) % 2 == 0:
            return at


def elements(value: bytes) -> list[bytes]:
    """The elements of a JSON array as one text between commas; else ``value``, unless null."""
    if not value.startswith(b"["):
        return [] if value == b"null" else [value]
    inner = value[1:-1].strip(WHITESPACE)
    return [inner] if inner else []
