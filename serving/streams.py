"""A streamed response as the object that a call without streaming would have returned.

Server-sent events are read as the `WHATWG specification
<https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream>`_ says, but a last
event without its blank line counts, as many servers leave it out. What they add up to is decided by the first
event that one of ``shapes`` knows. Anything else, and newline-delimited JSON, becomes ``{"events": [...]}``:
of each the JSON value or the text, or ``{"event": name, "data": ...}`` where it has a name.

Events of another kind in between are kept in the member ``events``, an error in ``error``.
"""

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import orjson

from serving.shapes import SHAPES, Shape

__all__ = ["Aggregate", "aggregate", "is_stream", "stream_facts"]

SERVER_SENT: Final = "text/event-stream"
JSON_LINES: Final = frozenset(
    {"application/x-ndjson", "application/ndjson", "application/jsonl", "application/x-jsonlines"}
)
END_MARKER: Final = "[DONE]"
"""How OpenAI's chat completions say that they are complete; no event of its own."""


@dataclass(frozen=True, slots=True)
class Aggregate:
    """A stream in one piece."""

    body: bytes
    """JSON, always an object."""
    events: int
    """How many there were, without the end marker."""
    ended: bool
    """Whether the stream itself said that it is complete."""
    error: str | None
    """What an error event said, under whatever status."""

    @property
    def value(self) -> dict[str, Any]:
        """``body``, parsed."""
        value: dict[str, Any] = orjson.loads(self.body)
        return value


def is_stream(content_type: str) -> bool:
    """Whether a ``content-type`` is one that :func:`aggregate` reads."""
    media_type = _media_type(content_type)
    return media_type == SERVER_SENT or media_type in JSON_LINES


def aggregate(body: bytes, content_type: str = SERVER_SENT) -> Aggregate:
    """The stream ``body``, whole or cut off anywhere. Never raises, whatever it holds."""
    lines = _media_type(content_type) in JSON_LINES
    try:
        return _aggregate(_json_lines(body) if lines else _server_sent(body), () if lines else SHAPES)
    except RecursionError:
        # Nested deeper than Python's JSON can write (~1,000 levels): such events stay text.
        events = [event.data for event in (_json_lines(body) if lines else _server_sent(body))]
        return Aggregate(orjson.dumps({"events": events}), len(events), END_MARKER in events, None)


def stream_facts(
    stream: Aggregate,
    *,
    time_to_first_event_ms: int | None,
    largest_gap_ms: int | None,
    clean_end: bool,
    cut_off_by_client: bool,
    error: str | None = None,
) -> dict[str, object]:
    """``databricks_output.stream``: what the aggregated object does not say any more. Times only of events.

    Args:
        stream: the aggregated stream.
        time_to_first_event_ms: from the request's first byte to the first chunk that is no mere comment.
        largest_gap_ms: longest wait for another event.
        clean_end: whether the agent closed the stream by itself.
        cut_off_by_client: whether the client left before.
        error: why the agent failed midway, where it raised; else what an error event said.
    """
    failure = error or stream.error
    return {
        "events": stream.events,
        "time_to_first_event_ms": time_to_first_event_ms if stream.events else None,
        "largest_gap_ms": largest_gap_ms if stream.events else None,
        "ended": stream.ended or clean_end,
        "cut_off_by_client": cut_off_by_client,
        # An exception's text may hold surrogates, which UTF-8 has no bytes for.
        "error": failure and failure.encode("utf-8", "replace").decode(),
    }


@dataclass(frozen=True, slots=True)
class Event:
    name: str
    data: str
    complete: bool = True

    def value(self) -> Any:
        """The JSON value of the data, or the data."""
        try:
            return orjson.loads(self.data)
        except orjson.JSONDecodeError:
            pass
        try:
            # Half a surrogate pair is what a token limit makes of an emoji; orjson refuses it.
            return json.loads(self.data, parse_constant=lambda _: None)
        except ValueError:
            return self.data


def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _json_lines(body: bytes) -> Iterator[Event]:
    for line in body.removeprefix(codecs.BOM_UTF8).splitlines():
        if line.strip():
            yield Event("", line.decode("utf-8", "replace"))


def _server_sent(body: bytes) -> Iterator[Event]:
    name, data = b"", list[bytes]()
    # splitlines of bytes knows LF, CR and CRLF, and no other line ends: just what the specification says.
    for line in body.removeprefix(codecs.BOM_UTF8).splitlines():
        if not line:
            if data:
                yield _event(name, data)
            name, data = b"", []
            continue
        key, _, value = line.partition(b":")
        if key == b"data":
            data.append(value.removeprefix(b" "))
        elif key == b"event":
            name = value.removeprefix(b" ")
    if data:
        yield _event(name, data, complete=False)


def _event(name: bytes, data: list[bytes], *, complete: bool = True) -> Event:
    return Event(name.decode("utf-8", "replace"), b"\n".join(data).decode("utf-8", "replace"), complete)


def _aggregate(events: Iterator[Event], shapes: tuple[type[Shape], ...]) -> Aggregate:
    shape: Shape | None = None
    others: list[Other] = []
    count, ended, error = 0, False, None
    for event in events:
        if event.data == END_MARKER:
            ended = True
            continue
        value = event.value()
        if shape is not None and not event.complete and value is event.data:
            continue  # cut off in the middle: the specification discards it
        count += 1
        failure = _error(event, value)
        error = error if failure is None else failure
        shape = shape or next((kind() for kind in shapes if kind.accepts(value)), None)
        if shape is not None and shape.accepts(value):
            shape.add(value)
        else:
            others.append(Other({"event": event.name, "data": value} if event.name else value, failure))
    if shape is None:
        result = {"events": [other.value for other in others]}
    else:
        result = shape.result()
        ended = ended or shape.ended
        _keep(result, others, error)
    return Aggregate(_encode(result), count, ended, _message(error))


class Other(NamedTuple):
    """An event that is none of the shape, and what it says as an error."""

    value: Any
    error: Any


def _keep(result: dict[str, Any], others: list[Other], error: Any) -> None:
    """Put what is not part of the shape beside it."""
    if error is not None and result.get("error") is None:
        result["error"] = error
    for value, failure in others:
        if isinstance(value, dict) and "databricks_output" in value:
            # An agent that passes on what another endpoint returned for `return_trace`.
            result["databricks_output"] = value["databricks_output"]
        elif failure is None or failure is not result["error"]:
            result.setdefault("events", []).append(value)


def _error(event: Event, value: Any) -> Any:
    """What an error event says; None for any other."""
    if not isinstance(value, dict):
        return value if event.name == "error" else None
    response = value.get("response")
    inner = value.get("error") or (response.get("error") if isinstance(response, dict) else None)
    is_error = event.name == "error" or value.get("type") in ("error", "response.error")
    return inner or (value if is_error else None)


def _message(error: Any) -> str | None:
    if isinstance(error, dict):
        error = error.get("message") or error
    if error is None:
        return None
    text = _encode(error)
    return str(orjson.loads(text)) if isinstance(error, str) else text.decode()


def _encode(value: Any) -> bytes:
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:
        # Surrogates, integers beyond 64 bits, more than 254 levels. Two halves of a pair that came in two
        # deltas are a character again; what stays half becomes U+FFFD.
        text = json.dumps(value, ensure_ascii=False).encode("utf-16-le", "surrogatepass")
        return text.decode("utf-16-le", "replace").encode()
