"""Snapshots of the values that spans record: cheap to take while the agent runs, encoded later.

An agent goes on mutating its ``messages`` after a call, so a value must be recorded as it was. Strings,
which hold the bytes, are immutable and are shared; only containers are copied, so a snapshot costs per node,
not per byte. Everything else is converted when the snapshot is taken, to what MLflow's ``TraceJSONEncoder``
makes of it.

A snapshot consists of ``dict`` with ``str`` keys, ``list``, ``str``, ``int``, ``bool``, ``None``, finite
``float`` - all of exactly these types - and :class:`JsonText`.
"""

import json
import sys
from base64 import b64encode
from collections.abc import Callable, Iterable
from math import isfinite
from typing import Any, Final

import orjson
from mlflow.tracing.attachments import Attachment
from mlflow.tracing.utils import TraceJSONEncoder

__all__ = [
    "JsonText",
    "Snapshot",
    "compact_string",
    "head_text",
    "is_not_given",
    "mlflow_text",
    "readable_json",
    "snapshot",
    "thaw",
    "well_formed",
]

Snapshot = Any

NODE_BYTES: Final = 64
"""What a node costs besides its characters: a slot in its container, its key, its part of the JSON text."""
MAX_DEPTH: Final = 200
"""Levels copied by structure. Deeper values are kept as text: orjson gives up at 254 levels."""
UNCOUNTED: Final = frozenset({int, bool, type(None)})
NUMBERS: Final = UNCOUNTED | {float}
CONTAINERS: Final = frozenset({dict, list, tuple})
NOT_GIVEN: Final = frozenset({"Omit", "NotGiven"})
VENDORS: Final = frozenset({"openai", "anthropic"})


class JsonText:
    """A part of a snapshot that is kept as JSON text."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


def is_not_given(kind: type) -> bool:
    """Whether values of a type stand for arguments that were left out, as vendors' clients pass them on.

    MLflow's autologging records each by its address: ``<openai.Omit object at 0x7f...>`` (mlflow#22598).
    """
    return kind.__name__ in NOT_GIVEN and kind.__module__.partition(".")[0] in VENDORS


class TooDeepError(Exception):
    """A value has more levels than are copied by structure, or is circular."""


class Encoder(TraceJSONEncoder):
    """MLflow's encoder, without its attempt to import llama_index for every object.

    An object can only be llama_index's where that is loaded.
    """

    def _is_safe_to_encode_str(self, obj: Any) -> bool:
        return "llama_index.core" not in sys.modules or super()._is_safe_to_encode_str(obj)


ENCODER: Final[Any] = Encoder()


def snapshot(value: Any) -> tuple[Snapshot, int]:
    """A snapshot of any value, and about how many bytes it keeps alive. Never raises an Exception.

    What MLflow's encoder can't encode becomes its ``repr``, as in MLflow; what can't even be printed becomes
    a text that says so.
    """
    kind = type(value)
    if kind is str:
        return value, len(value) + NODE_BYTES
    if kind in UNCOUNTED:
        return value, NODE_BYTES
    copier = Copier()
    try:
        try:
            return copier.copy(value), copier.nbytes + NODE_BYTES
        except (TypeError, ValueError, TooDeepError):
            text = JsonText(text_of_whole(value))
            return text, len(text.text) + NODE_BYTES
    # The agent's own objects are asked to convert or print themselves, which may raise anything; a trace must
    # not fail the agent for it.
    except Exception as error:  # noqa: BLE001
        return unrecordable(value, error), NODE_BYTES


def text_of_whole(value: Any) -> str:
    """The text that MLflow records for a value: its encoder's, or else that of its ``repr``."""
    try:
        return json.dumps(value, cls=Encoder, ensure_ascii=False)
    except (TypeError, ValueError):
        return json.dumps(repr(value), ensure_ascii=False)


def unrecordable(value: Any, error: Exception) -> str:
    return f"<{type(value).__name__} could not be recorded: {type(error).__name__}>"


class Copier:
    """Copies one value by structure."""

    __slots__ = ("nbytes", "path")

    def __init__(self) -> None:
        self.nbytes = 0
        self.path: list[int] = []
        """The containers that are being copied. One that contains itself would be copied once per level."""

    def copy(self, value: Any) -> Snapshot:
        kind = type(value)
        if kind is str:
            self.nbytes += len(value)
            return value
        if kind in UNCOUNTED:
            return value
        if kind is float:
            return value if isfinite(value) else JsonText(float_text(value))
        path, identity = self.path, id(value)
        if len(path) >= MAX_DEPTH or identity in path:
            raise TooDeepError
        path.append(identity)
        if kind is dict:
            copied = self._copy_items(list(value.items()))
        elif kind is list or kind is tuple:
            copied = self._copy_list(list(value))
        else:
            copied = self._copy_foreign(value)
        path.pop()
        return copied

    def _copy_items(self, items: list[tuple[Any, Any]]) -> Snapshot:
        copied: dict[str, Snapshot] = {}
        nbytes = NODE_BYTES * len(items)
        for key, item in items:
            name = key if type(key) is str else key_text(key)
            kind = type(item)
            if kind is str:
                nbytes += len(item)
                copied[name] = item
            elif kind in UNCOUNTED:
                copied[name] = item
            elif kind in CONTAINERS or not is_not_given(kind):
                copied[name] = self.copy(item)
        self.nbytes += nbytes
        return copied

    def _copy_list(self, items: list[Any]) -> Snapshot:
        self.nbytes += NODE_BYTES * len(items)
        if len(items) > 16 and (size := uniform_size(items)) is not None:
            self.nbytes += size
            return items
        return [self.copy(item) for item in items]

    def _copy_foreign(self, value: Any) -> Snapshot:
        depth = len(self.path)
        try:
            return self._convert(value)
        except (TypeError, ValueError, TooDeepError):
            raise  # MLflow then records the whole value's repr
        except Exception as error:  # noqa: BLE001 - as in snapshot(), but the rest of the value is kept
            del self.path[depth:]
            return unrecordable(value, error)

    def _convert(self, value: Any) -> Snapshot:
        """What is not exactly a JSON type, in the order in which the standard library's encoder asks."""
        if isinstance(value, str):
            return self.copy(str.__str__(value))
        if isinstance(value, int):
            return int.__int__(value)
        if isinstance(value, float):
            return self.copy(float.__float__(value))
        if isinstance(value, list | tuple):
            return self._copy_list(list(value))
        if isinstance(value, dict):
            return self._copy_items(list(value.items()))
        if isinstance(value, Attachment):
            return self.copy(data_uri(value))
        return self.copy(ENCODER.default(value))


def uniform_size(items: list[Any]) -> int | None:
    """Characters in a list of only strings or only numbers, such as an embedding; None for others."""
    kinds = set(map(type, items))
    if kinds == {str}:
        return sum(map(len, items))
    if kinds == {float}:
        return 0 if all(map(isfinite, items)) else None
    if kinds <= NUMBERS:
        return 0 if all(isfinite(item) for item in items if type(item) is float) else None
    return None


def key_text(key: Any) -> str:
    """A dictionary's key as the standard library's encoder writes it.

    Raises:
        TypeError: it can't be one.
    """
    if isinstance(key, str):
        return str.__str__(key)
    if isinstance(key, float):
        return float_text(key)
    if key is True:
        return "true"
    if key is False:
        return "false"
    if key is None:
        return "null"
    if isinstance(key, int):
        return int.__repr__(key)
    raise TypeError(f"a JSON object has no keys of type {type(key).__name__}")


def float_text(value: float) -> str:
    if value != value:
        return "NaN"
    if isfinite(value):
        return float.__repr__(value)
    return "Infinity" if value > 0 else "-Infinity"


def data_uri(attachment: Attachment) -> str:
    """An attachment in the payload itself: there is no artifact store beside the table."""
    return f"data:{attachment.content_type};base64,{b64encode(attachment.content_bytes).decode()}"


def thaw(value: Snapshot) -> Any:
    """The value a reader of the trace gets: fresh containers, nothing but JSON's types."""
    kind = type(value)
    if kind is dict:
        return {key: thaw(item) for key, item in value.items()}
    if kind is list:
        return [thaw(item) for item in value]
    if kind is JsonText:
        try:
            return json.loads(value.text)
        except (ValueError, RecursionError):  # no JSON after all, or of more levels than Python reads
            return value.text
    return value


def compact_string(value: Snapshot) -> bytes:
    """A JSON string, in UTF-8, of JSON text that loads as :func:`thaw` returns it.

    But for lone surrogates: see :func:`readable_json`.
    """
    texts: list[str] = []

    def fragment(part: JsonText) -> orjson.Fragment:
        texts.append(part.text)
        return orjson.Fragment(part.text)

    try:
        text = orjson.dumps(value, default=fragment)
    except TypeError:
        # orjson refuses integers beyond 64 bits and lone surrogates.
        return orjson.dumps(well_formed(guarded(lambda: json.dumps(thaw(value), ensure_ascii=False))))
    if texts:  # what orjson didn't write itself may hold escapes that can't be read, and control characters
        return orjson.dumps(readable_json(text.decode()))
    if text.isascii():
        return orjson.dumps(text.decode())
    # By way of a str 1 MB with an emoji in it takes 2.0 ms, so 0.6; ASCII takes 0.5 so, and 0.2 by way of
    # one. JSON text holds nothing else that a string must escape.
    return b'"' + text.replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"'


def readable_json(text: str) -> str:
    """A JSON text without escapes of half a character (a lone surrogate, ``\\ud83d``).

    Python reads and writes them; stricter readers, orjson and DuckDB among them, refuse the whole text for
    one. What is no JSON text is returned as it is.
    """
    if "\\ud" not in text and "\\uD" not in text:
        return text
    try:
        plain = json.dumps(json.loads(text), ensure_ascii=False)
    except (ValueError, RecursionError):
        return text
    repaired = well_formed(plain)
    return text if repaired == plain else repaired


def well_formed(text: str) -> str:
    """A text that UTF-8 can hold: U+FFFD, the replacement character, for each lone surrogate."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def mlflow_text(value: Snapshot) -> str:
    """JSON text in MLflow's own spelling, for those who read the text itself."""
    if type(value) is JsonText:
        return value.text
    return guarded(lambda: json.dumps(thaw(value), ensure_ascii=False))


def guarded(dump: Callable[[], str]) -> str:
    try:
        return dump()
    except (ValueError, RecursionError) as error:
        # An integer of more digits than Python converts (sys.set_int_max_str_digits), or too many levels.
        return json.dumps(f"<could not be recorded: {error}>")


def head_text(value: Snapshot, limit: int) -> str:
    """The first ``limit`` characters of :func:`mlflow_text`, and one more if there is more.

    Costs according to the limit, not to the value.
    """
    if type(value) is JsonText:
        return value.text[: limit + 1]
    return mlflow_text(Clipper(limit + 1).clip(value))[: limit + 1]


class Clipper:
    """Cuts a snapshot once what was kept is surely longer than ``room`` characters of JSON."""

    __slots__ = ("room",)

    def __init__(self, room: int) -> None:
        self.room = room

    def clip(self, value: Snapshot) -> Snapshot:
        self.room -= 1
        kind = type(value)
        if kind is dict:
            return {self._cut(key): self.clip(item) for key, item in self._while_room(value.items())}
        if kind is list:
            return [self.clip(item) for item in self._while_room(value)]
        return self._cut(value) if kind is str else value

    def _cut(self, text: str) -> str:
        cut = text[: max(self.room, 1)]
        self.room -= len(cut)
        return cut

    def _while_room(self, items: Iterable[Any]) -> Iterable[Any]:
        for item in items:
            if self.room <= 0:
                return
            yield item
