"""The request and response columns in all their shapes, and the Arrow batch."""

import base64
import json
from datetime import UTC, datetime
from typing import Any

import duckdb
import orjson
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_table import record
from inference_table.record import (
    DatabricksOutput,
    EncodedTrace,
    Row,
    client_request_id,
    request_column,
    return_trace,
    to_batch,
    wants_trace,
)
from inference_table.schema import SCHEMA

TRACE = {"info": {"trace_id": "tr-1"}, "data": {"spans": []}}
OUTPUT = DatabricksOutput("id-1")
OUTPUT_JSON = {"databricks_request_id": "id-1"}


def encoded(trace: object) -> EncodedTrace:
    text = orjson.dumps(trace)
    return EncodedTrace([text[:5], text[5:]], b"{}", "tr-1", "OK", 0)


def response_column(body: bytes, output: DatabricksOutput, **options: Any) -> bytes:
    return b"".join(record.response_column(body, output, **options))


def response(body: bytes, **options: Any) -> dict[str, Any]:
    """The column for ``body``, read as every reader must be able to."""
    column = response_column(body, OUTPUT, **options)
    column.decode()
    value: dict[str, Any] = orjson.loads(column)
    assert json.loads(column).keys() == value.keys()
    assert duckdb.execute("select json_valid(?)", [column.decode()]).fetchall() == [(True,)]
    assert list(value)[-1] == "databricks_output"
    return value


@pytest.mark.parametrize(
    ("body", "column"),
    [
        (b'{"a":1}', b'{"a":1,"databricks_output":{"databricks_request_id":"id-1"}}'),
        (b"{}", b'{"databricks_output":{"databricks_request_id":"id-1"}}'),
        (b" {\n } \n", b' {\n "databricks_output":{"databricks_request_id":"id-1"}} \n'),
        (
            b'{"a": 1.50, "a": 1e2 ,\t"\\u0062":[1, 2] }\r\n',
            b'{"a": 1.50, "a": 1e2 ,\t"\\u0062":[1, 2] ,'
            b'"databricks_output":{"databricks_request_id":"id-1"}}\r\n',
        ),
    ],
)
def test_an_object_stays_byte_for_byte(body: bytes, column: bytes) -> None:
    """Whitespace, number formats, escapes and repeated keys of the body are kept as they came."""
    assert response_column(body, OUTPUT) == column


def test_the_first_trace_is_trace_and_the_rest_are_other_traces() -> None:
    """The order of ``traces`` decides; stream facts stand beside them."""
    output = DatabricksOutput("id-1", [encoded(TRACE), encoded({"n": 2}), encoded({"n": 3})], {"events": 4})
    assert orjson.loads(response_column(b"{}", output))["databricks_output"] == {
        "trace": TRACE,
        "other_traces": [{"n": 2}, {"n": 3}],
        "databricks_request_id": "id-1",
        "stream": {"events": 4},
    }


@pytest.mark.parametrize(
    "body",
    [
        b'{"choices":[{"databricks_output":{"trace":1}}]}',
        b'{"text":"say \\"databricks_output\\": {}"}',
        b'{"a":"\\\\","b":"databricks_output"}',
    ],
)
def test_the_name_deeper_down_or_in_a_string_is_no_member(body: bytes) -> None:
    """Only a top-level member called databricks_output is the agent's own."""
    assert (
        response_column(body, OUTPUT) == body[:-1] + b',"databricks_output":{"databricks_request_id":"id-1"}}'
    )


@pytest.mark.parametrize("key", ["databricks_output", "\\u0064atabricks_output"])
def test_an_agents_own_output_is_merged(key: str) -> None:
    """Our trace and id win, the agent's trace moves to other_traces, its other keys and all else stay."""
    agent = (
        b'{"databricks_request_id":"theirs", "trace": {"t": 1} , "big": 123456789012345678901,'
        b'"other_traces":[ 7 ]}'
    )
    body = b'{ "a" : [1, {"x": "}"}] ,"' + key.encode() + b'": ' + agent + b' , "z":1.0 }'
    column = response_column(body, DatabricksOutput("id-1", [encoded(TRACE)]))
    assert column == (
        b'{ "a" : [1, {"x": "}"}] , "z":1.0 ,"databricks_output":{"trace":' + orjson.dumps(TRACE) + b","
        b'"other_traces":[{"t": 1},7],"databricks_request_id":"id-1", "big": 123456789012345678901}}'
    )


def test_an_agents_own_trace_stays_where_we_have_none() -> None:
    """Without a trace of ours, the agent's remains ``trace``; its empty or null members vanish."""
    body = b'{"databricks_output":{"trace":{"t":1},"other_traces":[],"stream":{"events":1}}}'
    assert response(body)["databricks_output"] == OUTPUT_JSON | {"trace": {"t": 1}, "stream": {"events": 1}}
    assert response(b'{"databricks_output":{"trace":null}}')["databricks_output"] == OUTPUT_JSON
    assert response(b'{"databricks_output":null}')["databricks_output"] == OUTPUT_JSON


def test_an_agents_own_output_that_is_no_object_is_kept() -> None:
    """It becomes the member agent_output."""
    assert response(b'{"databricks_output":[1, 2]}')["databricks_output"] == OUTPUT_JSON | {
        "agent_output": [1, 2]
    }


def test_one_output_remains_of_two() -> None:
    """Of a repeated databricks_output the last counts, as JSON readers have it; none stays beside ours."""
    column = response_column(b'{"databricks_output":{"a":1},"b":2,"databricks_output":{"c":3}}', OUTPUT)
    assert column == b'{"b":2,"databricks_output":{"databricks_request_id":"id-1","c":3}}'


@pytest.mark.parametrize(
    ("body", "content_type", "value"),
    [
        (b"[1, 2]", "application/json", [1, 2]),
        (b" null ", "application/json; charset=utf-8", None),
        (b"-1.5e3", "application/problem+json", -1500.0),
        (b'"\\u00e9"', "", "é"),
        (b"true", "text/plain", "true"),
        (b'{"a":1}', "text/html", '{"a":1}'),
        (b"", "application/json", None),
        (b"", "text/plain", None),
        (b"no json", "application/json", "no json"),
        (b"[1],[2]", "application/json", "[1],[2]"),
        (b'{"a":NaN}', "application/json", '{"a":NaN}'),
        (b'{"a":1e999}', "application/json", '{"a":1e999}'),
        (b'{"a":"\\ud800"}', "application/json", '{"a":"\\ud800"}'),
        (b"\xef\xbb\xbftext", "text/plain", "text"),
        (b"[" * 1024 + b"]" * 1024, "application/json", "[" * 1024 + "]" * 1024),
        ("tab\t\x00 ünï \u2028".encode(), "text/plain", "tab\t\x00 ünï \u2028"),
    ],
)
def test_what_is_no_object_becomes_body(body: bytes, content_type: str, value: object) -> None:
    """Other JSON is kept as JSON, text as a string, and so is what readers do not agree to be JSON."""
    assert response(body, content_type=content_type) == {"body": value, "databricks_output": OUTPUT_JSON}


def test_a_byte_order_mark_is_left_out() -> None:
    """An object behind a BOM, which most JSON readers refuse, is stored without it."""
    assert response(b'\xef\xbb\xbf{"a":1}') == {"a": 1, "databricks_output": OUTPUT_JSON}


@pytest.mark.parametrize(
    "body", [b"\xff\x00", '"\ud800"'.encode("utf-8", "surrogatepass"), "é".encode("latin-1")]
)
def test_bytes_that_are_no_utf8_become_base64(body: bytes) -> None:
    """The column says so, in both columns alike; surrogates encoded as bytes are no UTF-8."""
    value = response(body, content_type="application/json")
    assert base64.b64decode(value.pop("body")) == body
    assert value == {"encoding": "base64", "databricks_output": OUTPUT_JSON}
    request = orjson.loads(request_column(body))
    assert base64.b64decode(request["body"]) == body
    assert request["encoding"] == "base64"


@pytest.mark.parametrize("body", [b"", b'{"a":\n1}', b"not json", "ünï\x00".encode(), b"\xef\xbb\xbf{}"])
def test_a_utf8_request_is_verbatim(body: bytes) -> None:
    """Nothing is added to a request, whatever it is."""
    assert request_column(body) == body


def test_a_head_ends_at_a_whole_character() -> None:
    """Bytes of a character cut through count as missing."""
    head = "{é€".encode()
    assert response(head, missing=10)["head"] == "{é€"
    assert response(head[:-1], missing=10) == {
        "truncated_bytes": 12,
        "head": "{é",
        "databricks_output": OUTPUT_JSON,
    }
    assert request_column(head[:-2], missing=None) == '{"truncated_bytes":null,"head":"{é"}'.encode()


def test_a_head_of_bytes_is_base64() -> None:
    """What is no UTF-8 keeps all its bytes."""
    assert orjson.loads(request_column(b"\xff\xff\xc3", missing=1)) == {
        "truncated_bytes": 1,
        "head": base64.b64encode(b"\xff\xff\xc3").decode(),
        "encoding": "base64",
    }


def test_the_trace_is_returned_in_objects_only() -> None:
    """A reply that is no JSON object is not touched."""
    assert (
        return_trace(b'{"a": 1}', OUTPUT) == b'{"a": 1,"databricks_output":{"databricks_request_id":"id-1"}}'
    )
    for body in (b"[1]", b"1", b"text", b"", b"\xff", b'{"a":1', b'\xef\xbb\xbf{"a":1}'):
        assert return_trace(body, OUTPUT) is None


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"client_request_id": "abc"}', "abc"),
        (b'\xef\xbb\xbf{"client_request_id": "abc"}', "abc"),
        (b'{"x": {"client_request_id": "abc"}}', None),
        (b'{"x": "client_request_id"}', None),
        (b'{"client_request_id": 5}', None),
        (b'{"client_request_id": "%s"}' % (b"a" * 1025), None),
        (b'{"client_request_id": "abc"', None),
        (b'["client_request_id"]', None),
        (b"", None),
    ],
)
def test_client_request_id_is_the_top_level_member(body: bytes, expected: str | None) -> None:
    """Only a top-level string of a sane length counts; anything else is none."""
    assert client_request_id(body) == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"databricks_options": {"return_trace": true}}', True),
        (b'{"databricks_options": {"return_trace": false}}', False),
        (b'{"databricks_options": {"return_trace": "true"}}', False),
        (b'{"databricks_options": [{"return_trace": true}]}', False),
        (b'{"return_trace": true}', False),
        (b'{"messages": ["databricks_options return_trace true"]}', False),
        (b'{"databricks_options": {"return_trace": true}', False),
    ],
)
def test_a_trace_is_wanted_only_by_true(body: bytes, expected: bool) -> None:
    """Anything but ``databricks_options.return_trace: true`` does not ask for it."""
    assert wants_trace(body) is expected


NUMBERS = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=9) | st.just("databricks_output"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
)
KEYS = st.text() | st.sampled_from(["databricks_output", "trace", "other_traces", 'a"b', "\\"])
WHITESPACE = st.text(" \t\r\n", max_size=2)


@given(st.dictionaries(KEYS, JSON, max_size=4), st.booleans(), st.sampled_from([None, 1, "\t"]), WHITESPACE)
def test_any_object_keeps_its_other_members(
    value: dict[str, Any], ascii_only: bool, indent: int | str | None, around: str
) -> None:
    """However an object is written, its members but databricks_output read the same, and come first."""
    text = around + json.dumps(value, ensure_ascii=ascii_only, indent=indent) + around
    column = response_column(text.encode(), OUTPUT)
    read = orjson.loads(column)
    output = read.pop("databricks_output")
    assert output["databricks_request_id"] == "id-1"
    agent = value.pop("databricks_output", None)
    assert read == value
    if isinstance(agent, dict):
        kept = {
            key: item for key, item in agent.items() if key not in ("trace", "other_traces", *OUTPUT_JSON)
        }
        assert {key: output[key] for key in kept} == kept
    elif agent is None:
        assert column.startswith(text.encode().rstrip()[:-1]) or "databricks_output" in text


@given(JSON.filter(lambda value: not isinstance(value, dict)), WHITESPACE)
def test_any_other_json_is_the_body(value: object, around: str) -> None:
    """It reads the same inside ``body``, and its bytes are in the column."""
    text = (around + json.dumps(value) + around).encode()
    column = response_column(text, OUTPUT)
    assert orjson.loads(column)["body"] == value
    assert text in column


@given(st.binary(), st.sampled_from(["application/json", "text/plain", ""]), st.none() | st.integers(0, 9))
def test_any_bytes_give_json_that_holds_them(body: bytes, content_type: str, missing: int | None) -> None:
    """No body makes an invalid column, and text and bytes can be had back from it."""
    value = response(body, content_type=content_type, missing=missing)
    assert value["databricks_output"] == OUTPUT_JSON
    text = value["body"] if missing == 0 and "body" in value else value.get("head")
    if isinstance(text, str) and content_type == "text/plain":
        got = base64.b64decode(text) if "encoding" in value else text.encode()
        assert body.removeprefix(b"\xef\xbb\xbf").startswith(got)


def row(**values: Any) -> Row:
    defaults: dict[str, Any] = {
        "databricks_request_id": "id",
        "request_time": datetime(2025, 1, 2, 23, 59, 59, 123456, tzinfo=UTC),
        "status_code": 200,
        "sampling_fraction": 1.0,
        "execution_duration_ms": 12,
        "request": b"{}",
        "response": ["{é".encode(), b"}"],
    }
    return Row(**defaults | values)


def test_a_batch_has_the_tables_schema_and_the_rows_values() -> None:
    """Every column comes back as it went in, nulls included."""
    full = row(
        client_request_id="c",
        logging_error_codes=["A", "B"],
        served_entity_id="e",
        requester="r",
        request_metadata={"path": "/x"},
        trace_id="tr-1",
        trace_state="OK",
        trace_info=b'{"i":1}',
        span_count=3,
        input_tokens=2**40,
        output_tokens=1,
        total_cost_usd=0.25,
        time_to_first_byte_ms=4,
        capture_overhead_us=5,
    )
    batch = to_batch([full, row(request=None, response=None)])
    batch.validate(full=True)
    assert batch.schema.equals(SCHEMA, check_metadata=True)
    first, second = batch.to_pylist()
    assert first == {
        name: value.decode() if isinstance(value := getattr(full, name), bytes) else value
        for name in SCHEMA.names
    } | {"request_metadata": [("path", "/x")], "response": b"".join(full.response or ()).decode()}
    assert (second["request"], second["response"], second["trace_info"]) == (None, None, None)
    assert (second["logging_error_codes"], second["request_metadata"]) == ([], [])


def test_no_rows_give_an_empty_batch() -> None:
    """An empty batch has the schema too."""
    assert to_batch([]).num_rows == 0


@given(st.lists(st.none() | st.sampled_from([0, 1, 300, 200_000, 300_000])))
def test_payloads_of_any_size_keep_their_rows(sizes: list[int | None]) -> None:
    """Joining payloads in pieces mixes no rows up, wherever the pieces end."""
    payloads = [None if size is None else str(i % 10).encode() * size for i, size in enumerate(sizes)]
    batch = to_batch([row(request=payload) for payload in payloads])
    batch.validate(full=True)
    assert batch["request"].to_pylist() == [None if value is None else value.decode() for value in payloads]


def test_text_from_outside_cannot_fail_a_batch() -> None:
    """A surrogate in a header, a path or an id is replaced: UTF-8 has no bytes for it."""
    batch = to_batch(
        [row(requester="a\ud800", client_request_id="\udfff", request_metadata={"path": "/\udc80"})]
    )
    assert batch["requester"].to_pylist() == ["a?"]
    assert batch["client_request_id"].to_pylist() == ["?"]
    assert batch["request_metadata"].to_pylist() == [[("path", "/?")]]


def test_a_row_before_midnight_utc_belongs_to_that_day() -> None:
    """The partition is the day in UTC, whatever zone the time is given in."""
    late = datetime.fromisoformat("2025-01-03T00:30:00+02:00")
    assert str(row(request_time=late).request_date) == "2025-01-02"
    assert to_batch([row(request_time=late)])["request_time"].type == pa.timestamp("us", tz="UTC")
