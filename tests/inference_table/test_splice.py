"""Members of JSON objects, read in their bytes."""

import json
from typing import Any

import orjson
from hypothesis import given
from hypothesis import strategies as st

from inference_table.splice import NOT_JSON, append_member, elements, members, parse

SCALARS = st.none() | st.booleans() | st.text(max_size=5) | st.sampled_from(['"', "\\", "{", "]", ",", ":"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(max_size=3), VALUES, max_size=4), st.sampled_from([None, 0, 2]), st.booleans())
def test_members_are_those_of_a_parser(value: dict[str, Any], indent: int | None, ascii_only: bool) -> None:
    """Keys and values are the same as json's, and joined by commas they are the object again."""
    body = json.dumps(value, indent=indent, ensure_ascii=ascii_only).encode()
    found = list(members(body))
    assert {member.key: orjson.loads(member.value) for member in found} == value
    assert b"{" + b",".join(member.raw for member in found) + b"}" == body or not value


@given(st.lists(VALUES, max_size=4), st.sampled_from([None, 0, 2]))
def test_elements_are_what_stands_in_the_array(value: list[Any], indent: int | None) -> None:
    """Put into brackets again they are the array."""
    body = json.dumps(value, indent=indent).encode()
    assert orjson.loads(b"[" + b",".join(elements(body)) + b"]") == value


def test_a_member_is_appended_before_the_last_brace() -> None:
    """With a comma where there are others; what follows the brace stays behind it."""
    assert b"".join(append_member(b'{"a":{}} \n', b"b", [b"1"])) == b'{"a":{},"b":1} \n'
    assert b"".join(append_member(b"{ }", b"b", [b"[1", b"]"], empty=True)) == b'{ "b":[1]}'


def test_null_is_json_and_nonsense_is_not() -> None:
    """The two are told apart."""
    assert parse(b"null") is None
    assert parse(b"nonsense") is NOT_JSON
    assert parse(b"") is NOT_JSON


def test_megabytes_of_escapes_are_walked() -> None:
    """JSON inside JSON, as an agent's own trace holds it, is a string of nothing but escapes."""
    inner = json.dumps({f"k{number}": "\\" * (number % 5) for number in range(100_000)})
    body = json.dumps({"a": inner, "b": inner + "\\", "c": 1}).encode()
    assert [(member.key, orjson.loads(member.value)) for member in members(body)] == [
        ("a", inner),
        ("b", inner + "\\"),
        ("c", 1),
    ]
