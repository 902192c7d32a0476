"""Streams become the object that a call without streaming would have returned."""

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_table.record import DatabricksOutput, response_column
from serving.streams import Aggregate, aggregate, is_stream, stream_facts

DONE = b"data: [DONE]\n\n"


def sse(*values: Any, names: bool = False) -> bytes:
    """Server-sent events holding ``values``; each named by its ``type`` where ``names``, as OpenAI does."""
    return b"".join(
        (f"event: {value['type']}\n" if names else "").encode()
        + b"data: "
        + json.dumps(value).encode()
        + b"\n\n"
        for value in values
    )


def chunk(delta: dict[str, Any] | None = None, *, index: int = 0, **extra: Any) -> dict[str, Any]:
    choice_keys = {"finish_reason", "logprobs"}
    choice = {"index": index, "delta": delta or {}, "finish_reason": None} | {
        key: value for key, value in extra.items() if key in choice_keys
    }
    top = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return (
        top | {"choices": [choice]} | {key: value for key, value in extra.items() if key not in choice_keys}
    )


def events(body: bytes) -> list[Any]:
    value = aggregate(body).value
    assert list(value) == ["events"]
    found: list[Any] = value["events"]
    return found


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"data: a\n\ndata: b\n\n", ["a", "b"]),
        (b"data: a\r\n\r\ndata: b\r\rdata: c\n\n", ["a", "b", "c"]),
        (b"\xef\xbb\xbfdata: a\n\n", ["a"]),
        (b": comment\n\n:\ndata: a\n\n", ["a"]),
        (b"data:a\ndata:  b\ndata\ndata:\n\n", ["a\n b\n\n"]),
        (b"id: 1\nretry: 5\nunknown: x\ndata: a\n\n", ["a"]),
        (b"event: tick\ndata: 1\n\ndata: 2\n\n", [{"event": "tick", "data": 1}, 2]),
        (b"event: empty\n\ndata: a\n\n", ["a"]),
        (b'data: {"a":\ndata: 1}\n\n', [{"a": 1}]),
        (b"data: last without a blank line", ["last without a blank line"]),
        ("data: \u2028\x0b\x85\n\n".encode(), ["\u2028\x0b\x85"]),
        (b"data: \xff\n\n", ["\ufffd"]),
        (b'data: {"score": NaN}\n\n', [{"score": None}]),
        (b"data: 123456789012345678901234567890\n\n", [1.2345678901234568e29]),
        (b"data: " + b"9" * 5000 + b"\n\n", ["9" * 5000]),
        (b"no events at all", []),
        (b"", []),
    ],
)
def test_events_are_parsed_as_specified(body: bytes, expected: list[Any]) -> None:
    """Line ends, comments, fields, several data lines and the byte order mark mean what WHATWG says."""
    value = json.loads(aggregate(body).body)
    assert value == {"events": expected}


def test_the_end_marker_is_no_event() -> None:
    """It says that the stream is complete, and is not counted."""
    assert aggregate(b"data: a\n\n" + DONE) == Aggregate(b'{"events":["a"]}', 1, True, None)
    assert aggregate(b"data: a\n\ndata: [DONE]").ended
    assert not aggregate(b"data: a\n\n").ended


def test_chat_chunks_become_a_chat_completion() -> None:
    """Text grows, what names something is replaced, usage comes from the last chunk, unknown keys stay."""
    body = sse(
        chunk({"role": "assistant", "content": "", "refusal": None}, system_fingerprint="fp", provider="p"),
        chunk({"role": "assistant", "content": "Hel", "reasoning_content": "think"}, system_fingerprint="fp"),
        chunk({"content": "lo", "reasoning_content": "ing"}, provider="p"),
        chunk({}, finish_reason="stop"),
        chunk() | {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}},
    )
    stream = aggregate(body + DONE)
    assert (stream.events, stream.ended, stream.error) == (5, True, None)
    assert stream.value == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "system_fingerprint": "fp",
        "provider": "p",
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "Hello",
                    "refusal": None,
                    "reasoning_content": "thinking",
                },
                "finish_reason": "stop",
            }
        ],
    }


def call(index: int | None, arguments: str, **names: str) -> dict[str, Any]:
    function = {"arguments": arguments} | ({"name": names["name"]} if "name" in names else {})
    rest = {"id": names["id"], "type": "function"} if "id" in names else {}
    return {"tool_calls": [({} if index is None else {"index": index}) | rest | {"function": function}]}


@pytest.mark.parametrize(
    "deltas",
    [
        [call(0, "", id="a", name="f"), call(0, '{"x"'), call(0, ":1}"), call(1, "{}", id="b", name="g")],
        [call(0, '{"x"', id="a", name="f"), call(1, "{}", id="b", name="g"), call(0, ":1}")],
        [
            call(0, '{"x"', id="a", name="f"),
            call(0, ":1}", id="a", name="f"),
            call(1, "{}", id="b", name="g"),
        ],
        [call(None, '{"x"', id="a", name="f"), call(None, ":1}"), call(None, "{}", id="b", name="g")],
        [call(None, '{"x":1}', id="a", name="f"), call(None, "{}", id="b", name="g")],
    ],
    ids=["in order", "interleaved", "names repeated", "without index", "whole"],
)
def test_tool_calls_are_put_together(deltas: list[dict[str, Any]]) -> None:
    """Arguments grow by call, however a server says which call they belong to."""
    message = aggregate(sse(*map(chunk, deltas))).value["choices"][0]["message"]
    assert message["tool_calls"] == [
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}},
        {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]
    assert message["content"] is None


def test_choices_are_kept_apart_and_in_order() -> None:
    """Several choices come interleaved; logprobs grow; a legacy function call is put together."""
    tokens: list[dict[str, Any]] = [{"token": token, "logprob": -0.5, "bytes": None} for token in "ab"]
    body = sse(
        chunk({"content": "B"}, index=1, logprobs={"content": [tokens[0]], "refusal": None}),
        chunk({"function_call": {"name": "f", "arguments": "{"}}, index=0),
        chunk({"function_call": {"arguments": "}"}}, index=0, finish_reason="function_call"),
        chunk({"content": "C"}, index=1, logprobs={"content": [tokens[1]]}, finish_reason="length"),
    )
    first, second = aggregate(body).value["choices"]
    assert first["message"]["function_call"] == {"name": "f", "arguments": "{}"}
    assert second["message"]["content"] == "BC"
    assert [entry["token"] for entry in second["logprobs"]["content"]] == ["a", "b"]
    assert (first["finish_reason"], second["finish_reason"]) == ("function_call", "length")


def test_content_parts_are_kept_in_order() -> None:
    """Content sent as lists of parts, as reasoning models of some vendors do, is one list."""
    parts = [{"type": "reasoning", "summary": "s"}, {"type": "text", "text": "t"}]
    body = sse(chunk({"content": parts[:1]}), chunk({"content": parts[1:]}))
    assert aggregate(body).value["choices"][0]["message"]["content"] == parts


def test_legacy_completions_grow_too() -> None:
    """Chunks with ``text`` instead of a delta are a text completion."""
    body = sse(*({"object": "text_completion", "choices": [{"index": 0, "text": text}]} for text in "ab"))
    assert aggregate(body).value == {
        "object": "text_completion",
        "choices": [{"index": 0, "text": "ab", "finish_reason": None}],
    }


def test_an_emoji_cut_in_two_deltas_is_whole_again() -> None:
    """Halves of a surrogate pair join; one that stays alone becomes U+FFFD, as no UTF-8 can hold it."""
    body = sse(chunk({"content": "\ud83d"}), chunk({"content": "\ude00"}), chunk({"content": " \ud83d"}))
    assert aggregate(body).value["choices"][0]["message"]["content"] == "\U0001f600 \ufffd"


def test_a_stream_cut_off_in_an_event_keeps_what_was_complete() -> None:
    """The half event is discarded, and the stream has not ended."""
    body = sse(chunk({"content": "Hel"}), chunk({"content": "lo"}))[:-20]
    stream = aggregate(body)
    assert stream.value["choices"][0]["message"]["content"] == "Hel"
    assert stream.value["choices"][0]["finish_reason"] is None
    assert (stream.events, stream.ended) == (1, False)
    assert "events" not in stream.value


@pytest.mark.parametrize(
    ("failure", "message", "kept"),
    [
        (b'data: {"error": {"message": "boom", "code": 500}}\n\n', "boom", {"message": "boom", "code": 500}),
        (b'data: {"error": "boom"}\n\n', "boom", "boom"),
        (b'event: error\ndata: {"detail": "boom"}\n\n', '{"detail":"boom"}', {"detail": "boom"}),
        (b"event: error\ndata: boom\n\n", "boom", "boom"),
        (b'data: {"type": "error", "message": "boom"}\n\n', "boom", {"type": "error", "message": "boom"}),
    ],
)
def test_an_error_in_the_middle_is_reported_and_kept(failure: bytes, message: str, kept: object) -> None:
    """Under HTTP 200 an agent can only say in an event that it failed."""
    stream = aggregate(sse(chunk({"content": "Hel"})) + failure)
    assert stream.error == message
    assert stream.value["error"] == kept
    assert stream.value["choices"][0]["message"]["content"] == "Hel"
    assert "events" not in stream.value
    alone = aggregate(failure)
    assert alone.error == message
    assert len(alone.value["events"]) == 1


def test_other_events_stand_beside_the_object() -> None:
    """What is not of the kind is not lost; a databricks_output that an agent passes on becomes its member."""
    body = (
        b"event: ping\ndata: 1\n\n"
        + sse(chunk({"content": "a"}))
        + b'data: text\n\ndata: {"databricks_output": {"trace": 1}}\n\n'
    )
    value = aggregate(body).value
    assert value["events"] == [{"event": "ping", "data": 1}, "text"]
    assert value["databricks_output"] == {"trace": 1}


RESPONSE: dict[str, Any] = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1.0,
    "model": "m",
    "status": "in_progress",
    "output": [],
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
    "error": None,
}
MESSAGE: dict[str, Any] = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "status": "completed",
    "content": [{"type": "output_text", "text": "Hello", "annotations": []}],
}
STARTED: list[dict[str, Any]] = [
    {"type": "response.created", "sequence_number": 0, "response": RESPONSE},
    {"type": "response.in_progress", "sequence_number": 1, "response": RESPONSE},
    {
        "type": "response.output_item.added",
        "output_index": 0,
        "item": MESSAGE | {"content": [], "status": "in_progress"},
    },
    {
        "type": "response.content_part.added",
        "item_id": "msg_1",
        "output_index": 0,
        "content_index": 0,
        "part": {"type": "output_text", "text": "", "annotations": []},
    },
    *(
        {
            "type": "response.output_text.delta",
            "item_id": "msg_1",
            "output_index": 0,
            "content_index": 0,
            "delta": delta,
        }
        for delta in ("Hel", "lo")
    ),
]
ITEM_DONE = {"type": "response.output_item.done", "output_index": 0, "item": MESSAGE}


@pytest.mark.parametrize("status", ["completed", "incomplete"])
def test_the_final_event_of_a_response_is_the_response(status: str) -> None:
    """Its object is kept as it is."""
    final = RESPONSE | {"status": status, "output": [MESSAGE], "usage": {"total_tokens": 3}}
    stream = aggregate(
        sse(*STARTED, ITEM_DONE, {"type": f"response.{status}", "response": final}, names=True)
    )
    assert stream.value == final
    assert (stream.events, stream.ended, stream.error) == (8, True, None)


def test_a_failed_response_is_reported() -> None:
    """Its error is the stream's error; items that its object leaves out are there."""
    failure = {"code": "server_error", "message": "boom"}
    final = RESPONSE | {"status": "failed", "error": failure}
    stream = aggregate(sse(*STARTED, ITEM_DONE, {"type": "response.failed", "response": final}, names=True))
    assert (stream.ended, stream.error) == (True, "boom")
    assert stream.value == final | {"output": [MESSAGE]}


def test_a_response_cut_off_holds_what_was_said() -> None:
    """An item that is not done has the text of its deltas, and the response says that it is in progress."""
    stream = aggregate(sse(*STARTED, names=True))
    assert not stream.ended
    assert stream.value == RESPONSE | {"output": [MESSAGE | {"status": "in_progress"}]}


def test_deltas_without_their_item_become_one() -> None:
    """Arguments, reasoning and refusals find their place though no event announced the item."""
    body = sse(
        {"type": "response.reasoning_summary_text.delta", "item_id": "r", "summary_index": 1, "delta": "two"},
        {"type": "response.reasoning_summary_text.delta", "item_id": "r", "summary_index": 0, "delta": "one"},
        {"type": "response.function_call_arguments.delta", "output_index": 1, "delta": "{"},
        {"type": "response.function_call_arguments.delta", "output_index": 1, "delta": "}"},
        {"type": "response.refusal.delta", "item_id": "m", "delta": "no"},
    )
    assert aggregate(body).value == {
        "object": "response",
        "output": [
            {
                "id": "r",
                "type": "reasoning",
                "summary": [{"type": "summary_text", "text": "one"}, {"type": "summary_text", "text": "two"}],
            },
            {"type": "function_call", "arguments": "{}"},
            {
                "id": "m",
                "type": "message",
                "content": [{"type": "refusal", "refusal": "no"}],
                "role": "assistant",
            },
        ],
    }


def test_mlflows_responses_agent_needs_no_final_event() -> None:
    """All items that are done are the output, also where they share an index; custom outputs are kept."""
    item_call = {"type": "function_call", "id": "fc_1", "call_id": "c", "name": "f", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "c", "output": "42"}
    body = sse(
        {"type": "response.output_item.done", "output_index": 0, "item": item_call},
        {"type": "response.output_item.done", "item": output},
        {"type": "response.output_text.delta", "item_id": "msg_1", "delta": "Hello"},
        ITEM_DONE | {"custom_outputs": {"a": 1}},
    )
    stream = aggregate(body + DONE)
    assert stream.value == {
        "object": "response",
        "output": [item_call, output, MESSAGE],
        "custom_outputs": {"a": 1},
    }
    assert stream.ended


def test_mlflows_chat_agent_chunks_become_messages() -> None:
    """Deltas with the same id are one message, another id begins another."""
    body = sse(
        {"delta": {"role": "assistant", "content": "Hel", "id": "1"}},
        {"delta": {"role": "assistant", "content": "lo", "id": "1"}, "finish_reason": None},
        {"delta": {"role": "tool", "content": "42", "id": "2", "tool_call_id": "c", "name": "f"}},
        {
            "delta": {"role": "assistant", "content": "!", "id": "3"},
            "finish_reason": "stop",
            "usage": {"total_tokens": 3},
        },
    )
    assert aggregate(body).value == {
        "messages": [
            {"role": "assistant", "content": "Hello", "id": "1"},
            {"role": "tool", "content": "42", "id": "2", "tool_call_id": "c", "name": "f"},
            {"role": "assistant", "content": "!", "id": "3"},
        ],
        "finish_reason": "stop",
        "usage": {"total_tokens": 3},
    }


# What Anthropic's documentation shows for a text and a tool call, with thinking before.
CLAUDE: dict[str, Any] = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "m",
    "content": [],
    "stop_reason": None,
    "stop_sequence": None,
    "usage": {"input_tokens": 25, "output_tokens": 1},
}


def block(index: int, started: dict[str, Any], *deltas: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"type": "content_block_start", "index": index, "content_block": started},
        *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": index},
    ]


CLAUDE_EVENTS: list[dict[str, Any]] = [
    {"type": "message_start", "message": CLAUDE},
    *block(
        0,
        {"type": "thinking", "thinking": "", "signature": ""},
        {"type": "thinking_delta", "thinking": "Let me "},
        {"type": "thinking_delta", "thinking": "see."},
        {"type": "signature_delta", "signature": "Eq="},
    ),
    *block(
        1,
        {"type": "text", "text": ""},
        {"type": "text_delta", "text": "Hel"},
        {"type": "text_delta", "text": "lo"},
        {"type": "citations_delta", "citation": {"cited_text": "here"}},
    ),
    *block(
        2,
        {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {}},
        {"type": "input_json_delta", "partial_json": ""},
        {"type": "input_json_delta", "partial_json": '{"city": '},
        {"type": "input_json_delta", "partial_json": '"Oslo"}'},
    ),
    {
        "type": "message_delta",
        "delta": {"stop_reason": "tool_use", "stop_sequence": None},
        "usage": {"output_tokens": 15},
    },
    {"type": "message_stop"},
]


def test_anthropics_events_become_the_message() -> None:
    """Blocks in their order, texts grown, a tool's input parsed, usage and stop reason from the end."""
    stream = aggregate(sse(*CLAUDE_EVENTS, names=True))
    assert (stream.events, stream.ended, stream.error) == (len(CLAUDE_EVENTS), True, None)
    assert stream.value == CLAUDE | {
        "content": [
            {"type": "thinking", "thinking": "Let me see.", "signature": "Eq="},
            {"type": "text", "text": "Hello", "citations": [{"cited_text": "here"}]},
            {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Oslo"}},
        ],
        "stop_reason": "tool_use",
        "usage": {"input_tokens": 25, "output_tokens": 15},
    }


def test_events_that_anthropics_client_adds_are_no_more_of_the_message() -> None:
    """Its stream helper repeats each text with a snapshot, and each tool's input."""
    helped = [
        *CLAUDE_EVENTS[:7],
        {"type": "text", "text": "Hel", "snapshot": "Hel"},
        *CLAUDE_EVENTS[7:13],
        {"type": "input_json", "partial_json": '{"city": ', "snapshot": {}},
        *CLAUDE_EVENTS[13:],
    ]
    assert aggregate(sse(*helped, names=True)).value == aggregate(sse(*CLAUDE_EVENTS, names=True)).value


def test_a_message_cut_off_holds_what_was_said() -> None:
    """Half of a tool's input stays text; a stream that is joined late has a message all the same."""
    stream = aggregate(sse(*CLAUDE_EVENTS[:14], names=True))
    assert not stream.ended
    assert stream.value["content"][-1]["input"] == '{"city": '
    assert stream.value["usage"] == CLAUDE["usage"]
    late = aggregate(sse({"type": "content_block_delta", "delta": {"type": "text_delta", "text": "lo"}}))
    assert late.value["content"] == [{"type": "text", "text": "lo"}]


def test_an_error_event_of_anthropics_is_kept_beside_the_message() -> None:
    """Overload comes under HTTP 200, in the middle of an answer."""
    error = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    stream = aggregate(sse(*CLAUDE_EVENTS[:3], error, names=True))
    assert (stream.ended, stream.error) == (False, "Overloaded")
    assert stream.value["error"] == error["error"]
    assert stream.value["content"] == [{"type": "thinking", "thinking": "Let me ", "signature": ""}]


def test_json_lines_become_events() -> None:
    """Each line is a value; a line cut off is text."""
    stream = aggregate(b'{"a":1}\r\n\n"b"\n{"c":', "application/x-ndjson; charset=utf-8")
    assert stream == Aggregate(b'{"events":[{"a":1},"b","{\\"c\\":"]}', 3, False, None)


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        ("text/event-stream", True),
        ("Text/Event-Stream;charset=utf-8", True),
        ("application/jsonl", True),
        ("application/json", False),
        ("text/plain", False),
        ("", False),
    ],
)
def test_what_counts_as_a_stream(content_type: str, expected: bool) -> None:
    """The media type decides, not how many chunks a body came in."""
    assert is_stream(content_type) is expected


def test_nesting_beyond_python_stays_text() -> None:
    """An event, or a delta, of 5,000 levels cannot be put together: all events are kept as text."""
    for value in (
        "[" * 5000 + "]" * 5000,
        '{"choices":[{"delta":' + '{"a":' * 5000 + "1" + "}" * 5000 + "}]}",
    ):
        stream = aggregate(f"data: {value}\n\ndata: x\n\n".encode())
        assert stream.value == {"events": [value, "x"]}
        assert stream.events == 2


def test_a_long_stream_takes_linear_time() -> None:
    """Fifty thousand tool calls and 150,000 deltas come together without copying all before at each."""
    deltas = (chunk({"tool_calls": [{"index": i, "function": {"arguments": "x"}}]}) for i in range(50_000))
    assert len(aggregate(sse(*deltas)).value["choices"][0]["message"]["tool_calls"]) == 50_000
    text = aggregate(sse(chunk({"content": "word "})) * 150_000).value["choices"][0]["message"]["content"]
    assert text == "word " * 150_000


def test_stream_facts_tell_how_it_went() -> None:
    """A clean end counts where there is no marker; what the agent raised goes before what an event says."""
    stream = aggregate(b"data: a\n\n")
    facts = stream_facts(
        stream, time_to_first_event_ms=5, largest_gap_ms=7, clean_end=True, cut_off_by_client=False
    )
    assert facts == {
        "events": 1,
        "time_to_first_event_ms": 5,
        "largest_gap_ms": 7,
        "ended": True,
        "cut_off_by_client": False,
        "error": None,
    }
    failed = stream_facts(
        aggregate(b'data: {"error": "said"}\n\n'),
        time_to_first_event_ms=None,
        largest_gap_ms=None,
        clean_end=False,
        cut_off_by_client=True,
        error="raised \ud800",
    )
    assert (failed["ended"], failed["cut_off_by_client"], failed["error"]) == (False, True, "raised ?")


def test_a_streamed_row_looks_like_any_other() -> None:
    """The aggregate goes into the response column like a JSON body, its facts beside the trace."""
    stream = aggregate(sse(chunk({"content": "a"})) + DONE)
    column = orjson.loads(
        b"".join(response_column(stream.body, DatabricksOutput("id-1", stream={"events": 1})))
    )
    assert column.pop("databricks_output") == {"databricks_request_id": "id-1", "stream": {"events": 1}}
    assert column == stream.value


KEYS = [
    *(
        "choices",
        "delta",
        "index",
        "role",
        "content",
        "tool_calls",
        "id",
        "function",
        "name",
        "error",
        "type",
    ),
    *("item", "response", "usage", "text", "output", "logprobs", "item_id", "output_index", "content_index"),
    *("custom_outputs", "message", "finish_reason", "content_block", "partial_json", "citation"),
]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None), max_size=5)
    | st.sampled_from(["response.output_text.delta", "response.completed", "error"])
    | st.sampled_from(["message_start", "content_block_start", "content_block_delta", "message_delta"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(KEYS),
            inner,
            max_size=4,
        )
    ),
    max_leaves=25,
)


@given(st.lists(JSON, max_size=6))
def test_hostile_events_give_an_object(values: list[Any]) -> None:
    """Whatever the known keys hold, the result is a JSON object that fits into the column."""
    stream = aggregate(sse(*values))
    assert isinstance(stream.value, dict)
    assert stream.events == len(values)
    output = DatabricksOutput("id-1", stream={"error": stream.error})
    assert "databricks_output" in orjson.loads(b"".join(response_column(stream.body, output)))


LINES = st.sampled_from(
    [b"data: ", b"data", b"event: error", b"\n", b"\r", b"\n\n", b":", b"{", b"[DONE]", b"\xff"]
)


@given(
    st.lists(LINES | st.binary(max_size=5), max_size=30),
    st.sampled_from(["text/event-stream", "application/jsonl"]),
)
def test_hostile_bytes_give_an_object(parts: list[bytes], content_type: str) -> None:
    """No bytes make it raise."""
    assert isinstance(aggregate(b"".join(parts), content_type).value, dict)
