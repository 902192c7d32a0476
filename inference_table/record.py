"""One row of the table: the ``request`` and ``response`` columns, and how rows become an Arrow batch.

Shapes of ``response``, always valid UTF-8 and JSON; each has ``"databricks_output"`` as its last member:

- a JSON object: the body, byte for byte;
- any other JSON, or text: ``{"body": <json | string>}``;
- bytes that are no UTF-8: ``{"body": "<base64>", "encoding": "base64"}``;
- no bytes at all: ``{"body": null}``;
- the head of a body: ``{"truncated_bytes": n, "head": "..."}``, where n is the number of bytes missing, or
  null where nobody knows it, and the head is base64 as above where it is no UTF-8.

``request`` is the body verbatim where it is whole and UTF-8, else as above without ``databricks_output``.

JSON is what ``splice`` says. Readers disagree on the rest (DuckDB refuses the unpaired ``\\ud800`` and takes
``NaN``, orjson neither, Python's json both), so a body with such is text: kept as it is, in ``body``. A byte
order mark is left out.
"""

import base64
import codecs
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from itertools import accumulate
from typing import Any, Final

import orjson
import pyarrow as pa

from inference_table.schema import SCHEMA
from inference_table.splice import NOT_JSON, Member, append_member, elements, members, parse

__all__ = [
    "DatabricksOutput",
    "EncodedTrace",
    "Part",
    "Parts",
    "Row",
    "client_request_id",
    "no_pause",
    "request_column",
    "response_column",
    "return_trace",
    "to_batch",
    "wants_trace",
]

OUTPUT: Final = b"databricks_output"

MAX_CLIENT_REQUEST_ID: Final = 1024
"""Longest ``client_request_id``, in characters: listings read the column, and its text is a stranger's."""

JOIN_BYTES: Final = 64 * 1024
"""Parts below this size are joined with the GIL held (~10 µs), larger ones copied without it."""


def no_pause() -> None:
    """Give no way: for those whom nobody waits for."""


Part = bytes | memoryview
Parts = Sequence[Part]
"""A long text, to be joined once: joining megabytes at each step would copy them, with the GIL held."""


@dataclass(frozen=True, slots=True)
class EncodedTrace:
    """One MLflow trace, encoded.

    ``parts`` together are ``{"info": ..., "data": {"spans": [...]}}`` in UTF-8, as
    ``mlflow.entities.Trace.from_dict`` takes it; ``info`` is its ``info`` member alone.
    """

    parts: Parts
    info: bytes
    trace_id: str
    state: str
    span_count: int
    input_tokens: int | None = None
    output_tokens: int | None = None
    total_cost_usd: float | None = None

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.parts))

    @property
    def json(self) -> bytes:
        return b"".join(self.parts)


@dataclass(slots=True)
class Row:
    """Values of one row, named as the columns; payloads are UTF-8, ``response`` in parts."""

    databricks_request_id: str
    request_time: datetime
    status_code: int
    sampling_fraction: float
    execution_duration_ms: int
    request: bytes | None
    response: Parts | None
    client_request_id: str | None = None
    logging_error_codes: list[str] = field(default_factory=list)
    served_entity_id: str | None = None
    requester: str | None = None
    request_metadata: dict[str, str] = field(default_factory=dict)
    trace_id: str | None = None
    trace_state: str | None = None
    trace_info: bytes | None = None
    span_count: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    total_cost_usd: float | None = None
    time_to_first_byte_ms: int | None = None
    capture_overhead_us: int | None = None

    @property
    def request_date(self) -> date:
        return self.request_time.astimezone(UTC).date()

    @property
    def nbytes(self) -> int:
        """Bytes of the payloads, which is what counts."""
        response = sum(map(len, self.response or ()))
        return len(self.request or b"") + response + len(self.trace_info or b"") + 512


@dataclass(frozen=True, slots=True)
class DatabricksOutput:
    """The member ``databricks_output``: the traces, our request id, and what is known of a stream."""

    databricks_request_id: str
    traces: Sequence[EncodedTrace] = ()
    """The first to start comes first: it is ``trace``, the others are ``other_traces``."""
    stream: Mapping[str, object] | None = None
    """What is known of a streamed response (``serving.streams.stream_facts``)."""

    def to_json(self, agent: bytes = b"") -> list[Part]:
        """The member's value, in parts; ``agent`` is the value that the agent itself had set.

        The agent's other keys stay, ours win. Its trace moves to ``other_traces``, or stays ``trace`` where
        we have none. A value that is no object stays as ``agent_output``.
        """
        traces: list[Parts] = [trace.parts for trace in self.traces]
        rest = [b'"databricks_request_id":' + orjson.dumps(self.databricks_request_id)]
        if self.stream is not None:
            rest.append(b'"stream":' + orjson.dumps(self.stream))
        for member in _agent_members(agent):
            if member.key == "trace":
                traces += [[member.value]] if member.value != b"null" else []
            elif member.key == "other_traces":
                traces += [[element] for element in elements(member.value)]
            elif member.key != "databricks_request_id" and (member.key != "stream" or self.stream is None):
                rest.append(member.raw)
        parts: list[Part] = [b"{"]
        for trace in traces[:1]:
            parts += (b'"trace":', *trace, b",")
        if others := traces[1:]:
            parts += (b'"other_traces":[', *others[0])
            for trace in others[1:]:
                parts += (b",", *trace)
            parts.append(b"],")
        return [*parts, b",".join(rest), b"}"]


def request_column(body: bytes, *, missing: int | None = 0) -> bytes:
    """Value of the column ``request``: ``body`` itself where it is whole and UTF-8.

    ``missing`` is the number of bytes that ``body``, a head then, does not hold; None where nobody knows.
    """
    if missing == 0:
        return body if _is_utf8(body) else b"{" + _text(b"body", body) + b"}"
    return _truncated(body, missing)


def response_column(
    body: bytes, output: DatabricksOutput, *, content_type: str = "", missing: int | None = 0
) -> Parts:
    """Parts of the column ``response``: ``body`` with ``output`` as its member ``databricks_output``.

    The body is taken for JSON where ``content_type`` says so or is empty; an aggregated stream is passed as
    ``application/json``. ``missing`` as in :func:`request_column`.
    """
    body = body.removeprefix(codecs.BOM_UTF8)
    if missing != 0:
        return append_member(_truncated(body, missing), OUTPUT, output.to_json())
    if not body:
        return append_member(b'{"body":null}', OUTPUT, output.to_json())
    value = parse(body) if is_json(content_type) else NOT_JSON
    if isinstance(value, dict):
        return _splice(body, value, output)
    member = _text(b"body", body) if value is NOT_JSON else b'"body":' + body
    return append_member(b"{" + member + b"}", OUTPUT, output.to_json())


def return_trace(body: bytes, output: DatabricksOutput) -> bytes | None:
    """A reply with ``output`` in it, for the client who asked for it; None where it is no JSON object."""
    value = parse(body)
    return b"".join(_splice(body, value, output)) if isinstance(value, dict) else None


def is_json(content_type: str) -> bool:
    """Whether a ``content-type`` means JSON; a missing one may."""
    media_type = content_type.partition(";")[0].strip().lower()
    return media_type in ("", "application/json") or media_type.endswith("+json")


def client_request_id(body: bytes) -> str | None:
    """The top-level ``client_request_id`` of a request; None where it is no text, or too long for one."""
    value = _member(body, "client_request_id")
    return value if isinstance(value, str) and len(value) <= MAX_CLIENT_REQUEST_ID else None


def wants_trace(body: bytes) -> bool:
    """Whether a request asks for its trace: ``{"databricks_options": {"return_trace": true}}``."""
    if b"return_trace" not in body:
        return False
    options = _member(body, "databricks_options")
    return isinstance(options, dict) and options.get("return_trace") is True


def _member(body: bytes, key: str) -> Any:
    # The byte search comes first: parsing megabytes for a key that few send would be the larger cost.
    value = parse(body.removeprefix(codecs.BOM_UTF8)) if key.encode() in body else None
    return value.get(key) if isinstance(value, dict) else None


def _splice(body: bytes, value: Mapping[str, object], output: DatabricksOutput) -> Parts:
    if OUTPUT.decode() not in value:
        return append_member(body, OUTPUT, output.to_json(), empty=not value)
    found = list(members(body))
    agent = [member.value for member in found if member.key == OUTPUT.decode()][-1]
    others = b",".join(member.raw for member in found if member.key != OUTPUT.decode())
    head, tail = body[: body.index(b"{") + 1], body[body.rindex(b"}") :]
    return append_member(head + others + tail, OUTPUT, output.to_json(agent), empty=not others)


def _is_utf8(body: bytes) -> bool:
    # Arrow looks at it without the GIL.
    offsets = pa.py_buffer(array("i", (0, len(body))))
    try:
        pa.StringArray.from_buffers(1, offsets, pa.py_buffer(body)).validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _text(key: bytes, body: bytes) -> bytes:
    """A member holding ``body`` as a string; as base64, and saying so, where it is no UTF-8."""
    try:
        return b'"%b":%b' % (key, orjson.dumps(body.decode()))
    except UnicodeDecodeError:
        return b'"%b":"%b","encoding":"base64"' % (key, base64.b64encode(body))


def _truncated(head: bytes, missing: int | None) -> bytes:
    whole = _whole_characters(head)
    count = b"null" if missing is None else b"%d" % (missing + len(head) - len(whole))
    return b'{"truncated_bytes":' + count + b"," + _text(b"head", whole) + b"}"


def _whole_characters(head: bytes) -> bytes:
    """``head`` without the first bytes of a character that was cut through; as it is where it is no UTF-8."""
    try:
        head.decode()
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
            return head[: error.start]
    return head


def _agent_members(agent: bytes) -> Iterator[Member]:
    if agent.startswith(b"{"):
        yield from members(agent)
    elif agent and agent != b"null":
        yield Member("agent_output", b'"agent_output":' + agent, agent)


def to_batch(rows: Sequence[Row], give_way: Callable[[], None] = no_pause) -> pa.RecordBatch:
    """Rows as one Arrow batch of the table's schema.

    Args:
        rows: the rows.
        give_way: called now and then, to let other threads run.

    Raises:
        OverflowError: a payload column exceeds 2 GiB, the most an Arrow ``string`` can hold.
    """
    columns = []
    for one in SCHEMA:
        columns.append(_column(one, rows))
        give_way()
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _column(field: pa.Field, rows: Sequence[Row]) -> pa.Array:
    values = [getattr(row, field.name) for row in rows]
    if field.name == "response":
        return _payloads(values)
    if field.name in BYTES_COLUMNS:
        return _payloads([None if value is None else (value,) for value in values])
    if field.name in FOREIGN_COLUMNS:
        values = [_encodable(value) for value in values]
    return pa.array(values, field.type)


BYTES_COLUMNS: Final = frozenset({"request", "trace_info"})
FOREIGN_COLUMNS: Final = frozenset({"client_request_id", "requester", "request_metadata"})
"""Columns with text from outside, where a surrogate, which UTF-8 has no bytes for, would fail the batch."""


def _encodable(value: Any) -> Any:
    if isinstance(value, dict):
        return [(_encodable(key), _encodable(item)) for key, item in value.items()]
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _payloads(values: Sequence[Parts | None]) -> pa.Array:
    """A string column, its bytes copied once and without the GIL."""
    if not values:
        return pa.array([], pa.string())
    offsets = array("i", accumulate((sum(map(len, parts or ())) for parts in values), initial=0))
    data = pa.allocate_buffer(offsets[-1])
    with pa.FixedSizeBufferWriter(data) as sink:
        for parts in values:
            for part in grouped(parts or ()):
                sink.write(part)
    valid = pa.array([parts is not None for parts in values]).buffers()[1]
    return pa.StringArray.from_buffers(
        len(values), pa.py_buffer(offsets), data, valid, sum(parts is None for parts in values)
    )


def grouped(parts: Parts) -> Iterator[Part]:
    """The same text in fewer parts: small ones are joined, as each write takes the GIL back."""
    small: list[Part] = []
    size = 0
    for part in parts:
        if len(part) < JOIN_BYTES:
            small.append(part)
            size += len(part)
        if small and (size >= JOIN_BYTES or len(part) >= JOIN_BYTES):
            yield b"".join(small)
            small, size = [], 0
        if len(part) >= JOIN_BYTES:
            yield part
    if small:
        yield b"".join(small)
