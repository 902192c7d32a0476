"""Streamed model calls have the outputs that MLflow's autologging leaves out of them.

The spans are made here as ``mlflow.openai.autolog`` and ``mlflow.anthropic.autolog`` make them; the real
clients are in ``tests/agents``.
"""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any, Final

import mlflow
import pytest
from mlflow.entities import Span, SpanEvent, Trace
from mlflow.tracing.constant import SpanAttributeKey
from mlflow.tracking import fluent

from serving.model_streams import complete
from tests.serving.tracing_agents import record, record_with_mlflow
from tests.support import ROOT

TOP: Final = {"id": "chatcmpl-1", "created": 1, "model": "gpt-4o-mini"}
CALL: Final = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}}


@pytest.fixture(autouse=True)
def tracking_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a tracking URI and an active experiment, MLflow's own recording fails in its light SDK."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(fluent, "_active_experiment_id", "0")


def chunk(delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
    return {**TOP, "object": "chat.completion.chunk", "choices": [choice], "usage": None, **more}


def arguments(text: str) -> dict[str, Any]:
    return {"content": None, "tool_calls": [{"index": 0, "id": None, "function": {"arguments": text}}]}


USAGE: Final = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8, "prompt_tokens_details": None}
TEXT: Final = [
    chunk({"role": "assistant", "content": "", "tool_calls": None}),
    chunk({"role": None, "content": "It ", "tool_calls": None}),
    chunk({"role": None, "content": "rains.", "tool_calls": None}),
    chunk({"role": None, "content": None, "tool_calls": None}, "stop"),
]
TOOL: Final = [
    chunk({"role": "assistant", "content": None, "tool_calls": [{**CALL, "index": 0}]}),
    chunk(arguments('{"city": ')),
    chunk(arguments('"Oslo"}')),
    chunk({}, "tool_calls"),
    chunk({}, choices=[], usage=USAGE),
]


def reconstructed(text: str) -> dict[str, Any]:
    """What MLflow makes of chunks: their text."""
    message = {"role": "assistant", "content": text, "refusal": None, "tool_calls": None}
    choice = {"index": 0, "finish_reason": "stop", "logprobs": None, "message": message}
    return {**TOP, "object": "chat.completion", "choices": [choice], "service_tier": None, "usage": None}


def openai_call(chunks: list[dict[str, Any]]) -> Any:
    attributes = {"model": "gpt-4o-mini", SpanAttributeKey.MESSAGE_FORMAT: "openai"}
    span = mlflow.start_span_no_context("Completions", span_type="CHAT_MODEL", attributes=attributes)
    for number, value in enumerate(chunks):
        event: dict[str, Any] = {"mlflow.chunk.value": json.dumps(value)}
        span.add_event(SpanEvent(f"mlflow.chunk.item.{number}", attributes=event))  # type: ignore[abstract] # it is not
    return span


def only_span(trace: Trace) -> Span:
    [span] = trace.data.spans
    return span


def choice_of(span: Span) -> dict[str, Any]:
    [choice] = span.outputs["choices"]
    return dict(choice)


def test_a_streamed_text_is_what_mlflow_makes_of_it() -> None:
    """Where MLflow loses nothing, the trace is the same under both."""

    def agent() -> None:
        openai_call(TEXT).end(outputs=reconstructed("It rains."))

    ours, theirs = only_span(record(agent)), only_span(record_with_mlflow(agent))
    assert ours.outputs == theirs.outputs == reconstructed("It rains.")
    assert [event.name for event in ours.events] == [event.name for event in theirs.events]


def test_a_streamed_tool_call_is_kept() -> None:
    """With its arguments, and the reason why the choice finished; the rest is as MLflow has it."""
    trace = record(lambda: openai_call(TOOL).end(outputs=reconstructed("")))
    choice = choice_of(only_span(trace))
    assert choice["finish_reason"] == "tool_calls"
    called = {**CALL, "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    assert choice["message"] == {
        "role": "assistant",
        "content": "",
        "refusal": None,
        "tool_calls": [called],
    }
    assert only_span(trace).outputs["service_tier"] is None
    assert trace.info.token_usage == {"input_tokens": 5, "output_tokens": 3, "total_tokens": 8}


def test_all_choices_are_kept() -> None:
    """Of a call that asked for more than one; MLflow mixes their texts in one."""
    second = chunk({"role": "assistant", "content": "It snows."}, "stop")
    second["choices"][0]["index"] = 1
    outputs = only_span(
        record(lambda: openai_call([*TEXT, second]).end(outputs=reconstructed("It rains.It snows.")))
    ).outputs
    assert [choice["message"]["content"] for choice in outputs["choices"]] == ["It rains.", "It snows."]


def test_a_stream_that_fails_keeps_what_was_said() -> None:
    """MLflow records the exception only."""

    def agent() -> None:
        span = openai_call(TEXT[:2])
        span.record_exception(ConnectionError("gone"))
        span.end(status="ERROR")

    trace = record(agent)
    assert trace.info.state == "ERROR"
    assert choice_of(only_span(trace))["message"]["content"] == "It "
    assert choice_of(only_span(trace))["finish_reason"] is None
    assert only_span(trace).get_attribute(SpanAttributeKey.MODEL) == "gpt-4o-mini"
    assert only_span(record_with_mlflow(agent)).outputs is None


def test_a_stream_that_is_left_keeps_what_was_read() -> None:
    """Its span is in progress."""
    trace = record(lambda: openai_call(TEXT[:3]))
    assert trace.info.state == "IN_PROGRESS"
    assert choice_of(only_span(trace))["message"]["content"] == "It rains."


def test_a_long_stream_is_whole() -> None:
    """A span keeps 128 events, so the first chunks of a long answer are in none."""
    words = [f"{number} " for number in range(300)]
    chunks = [chunk({"content": word}) for word in words]
    span = only_span(record(lambda: openai_call(chunks)))
    assert len(span.events) == 128
    assert choice_of(span)["message"]["content"] == "".join(words)


def test_a_response_cut_short_has_its_usage() -> None:
    """``response.incomplete`` is the end of a stream that ran out of tokens; MLflow waits for another."""
    usage = {"input_tokens": 7, "output_tokens": 2, "input_tokens_details": {"cached_tokens": 4}}
    item = {"type": "message", "id": "msg_1", "content": [{"type": "output_text", "text": "It"}]}
    whole = {"id": "resp_1", "model": "m", "status": "incomplete", "output": [item], "usage": usage}
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": {**whole, "output": [], "usage": None}},
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": "response.incomplete", "response": whole},
    ]
    trace = record(lambda: openai_call(events).end(outputs={"output": [item], "usage": None, "tools": []}))
    assert only_span(trace).outputs == {**whole, "tools": []}
    counted = {"input_tokens": 7, "output_tokens": 2, "total_tokens": 9, "cache_read_input_tokens": 4}
    assert only_span(trace).get_attribute(SpanAttributeKey.CHAT_USAGE) == counted


def test_a_joined_text_stays() -> None:
    """Of legacy completions MLflow records the text alone."""
    events = [{**TOP, "object": "text_completion", "choices": [{"index": 0, "text": "It rains."}]}]
    assert only_span(record(lambda: openai_call(events).end(outputs="It rains."))).outputs == "It rains."


@pytest.mark.parametrize(
    "chunks", [[], ["text"], [{"choices": 5}], [{"type": "message_start", "message": 1}], [None, 1, []]]
)
@pytest.mark.parametrize("usage", [None, [], {"input_tokens": "1"}, {"input_tokens": 1}])
def test_chunks_of_no_kind_change_nothing_that_is_known(chunks: list[Any], usage: Any) -> None:
    """Whatever a server streams, the outputs that MLflow recorded are still there."""
    if chunks and isinstance(chunks[-1], dict):
        chunks = [*chunks, {**chunks[-1], "usage": usage}]
    values: dict[str, Any] = {SpanAttributeKey.OUTPUTS: {"known": 1}}
    complete(values, chunks)
    assert values[SpanAttributeKey.OUTPUTS]["known"] == 1
    assert SpanAttributeKey.CHAT_USAGE not in values


# --- streams that are recorded before they are read ---

EVENTS: Final[list[dict[str, Any]]] = [
    {
        "type": "message_start",
        "message": {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": "claude",
            "content": [],
            "stop_reason": None,
            "usage": {"input_tokens": 5, "output_tokens": 1, "cache_read_input_tokens": 100},
        },
    },
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "It "}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "rains."}},
    {"type": "content_block_stop", "index": 0},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 3}},
    {"type": "message_stop"},
]


class Stream:
    """As much of Anthropic's as matters here."""

    __module__ = "anthropic"

    def __init__(self, failure: Exception | None = None) -> None:
        self._iterator: Iterator[Any] = self.read(failure)
        self.closed = False

    def read(self, failure: Exception | None) -> Iterator[Any]:
        try:
            for number, event in enumerate(EVENTS):
                if failure is not None and number == 4:
                    raise failure
                yield event
        finally:
            self.closed = True

    def __iter__(self) -> Iterator[Any]:
        yield from self._iterator


class AsyncStream:
    __module__ = "anthropic"

    def __init__(self, seconds: float = 0.0) -> None:
        self._iterator: AsyncIterator[Any] = self.read(seconds)

    async def read(self, seconds: float) -> AsyncIterator[Any]:
        for event in EVENTS:
            yield event
            await asyncio.sleep(seconds)

    async def __aiter__(self) -> AsyncIterator[Any]:
        async for event in self._iterator:
            yield event


class OtherStream(Stream):
    """A version whose iterator can't be replaced."""

    __module__ = "anthropic"
    _iterator = property(lambda self: iter(EVENTS), lambda self, value: self.refuse())

    def refuse(self) -> None:
        raise AttributeError("read only")

    def __init__(self) -> None:
        pass


def anthropic_call(stream: Any) -> Any:
    span = mlflow.start_span_no_context(
        "Messages.create",
        span_type="CHAT_MODEL",
        attributes={SpanAttributeKey.MESSAGE_FORMAT: "anthropic", SpanAttributeKey.MODEL: "claude-alias"},
    )
    span.end(outputs=stream)
    return stream


def said(text: str, **more: Any) -> dict[str, Any]:
    message = EVENTS[0]["message"] | {"content": [{"type": "text", "text": text}]} | more
    return dict(message)


WHOLE: Final = said(
    "It rains.",
    stop_reason="end_turn",
    usage={"input_tokens": 5, "output_tokens": 3, "cache_read_input_tokens": 100},
)


def test_a_stream_of_anthropics_is_its_message() -> None:
    """The span ends with the stream; input tokens count the cached ones in, as everywhere in MLflow."""
    received: list[Any] = []
    trace = record(lambda: received.extend(anthropic_call(Stream())))
    assert received == EVENTS
    span = only_span(trace)
    assert trace.info.state == "OK"
    assert span.outputs == WHOLE
    assert span.get_attribute(SpanAttributeKey.MODEL) == "claude-alias"
    assert trace.info.token_usage == {
        "input_tokens": 105,
        "output_tokens": 3,
        "total_tokens": 108,
        "cache_read_input_tokens": 100,
    }
    assert "<anthropic.Stream object" in str(
        only_span(record_with_mlflow(lambda: anthropic_call(Stream()))).outputs
    )


def test_an_async_stream_of_anthropics_is_its_message() -> None:
    """The same under ``async for``."""

    async def agent() -> list[Any]:
        return [event async for event in anthropic_call(AsyncStream())]

    trace = record(lambda: asyncio.run(agent()))
    assert (only_span(trace).outputs, trace.info.state) == (WHOLE, "OK")


def test_a_stream_of_anthropics_that_fails_is_an_error() -> None:
    """The exception reaches the agent as it was, and the span, with what was said before."""
    failure = ConnectionError("gone")

    def agent() -> None:
        with pytest.raises(ConnectionError) as raised:
            list(anthropic_call(Stream(failure)))
        assert raised.value is failure

    trace = record(agent)
    span = only_span(trace)
    assert (trace.info.state, span.outputs) == ("ERROR", said("It rains."))
    assert span.status.description == "ConnectionError: gone"
    [event] = span.events
    assert event.attributes["exception.type"] == "ConnectionError"


def test_a_stream_of_anthropics_that_is_left_is_in_progress() -> None:
    """Its connection is closed at once, as without us."""
    streams: list[Stream] = []

    def agent() -> None:
        streams.append(anthropic_call(Stream()))
        for number, _ in enumerate(streams[0]):
            if number == 2:
                break
        del streams[0]._iterator

    trace = record(agent)
    assert (trace.info.state, only_span(trace).outputs) == ("IN_PROGRESS", said("It "))
    assert streams[0].closed


def test_a_stream_of_anthropics_that_is_never_read_is_in_progress() -> None:
    """Nothing was answered as far as the agent knows."""
    kept: list[Any] = []
    trace = record(lambda: kept.append(anthropic_call(Stream())))
    assert (trace.info.state, only_span(trace).outputs) == ("IN_PROGRESS", None)


def test_a_cancelled_reader_makes_its_call_an_error() -> None:
    """As any cancellation does."""

    async def agent() -> None:
        async def read() -> None:
            async for _ in anthropic_call(AsyncStream(seconds=60)):
                pass

        task = asyncio.create_task(read())
        await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    trace = record(lambda: asyncio.run(agent()))
    assert trace.info.state == "ERROR"
    assert only_span(trace).events[0].attributes["exception.type"] == "CancelledError"


def test_other_processors_see_the_message() -> None:
    """What exports spans beside us gets the outputs of a followed stream, too."""
    code = """
from mlflow.tracing.provider import get_bridged_tracer_provider
from opentelemetry.sdk.trace import SpanProcessor
from tests.serving.test_model_streams import Stream, anthropic_call
from tests.serving.tracing_agents import request
class Watching(SpanProcessor):
    def on_end(self, span):
        print(span.attributes["mlflow.spanOutputs"])
get_bridged_tracer_provider().add_span_processor(Watching())
with request():
    list(anthropic_call(Stream()))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    seen = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert json.loads(seen.stdout) == WHOLE, seen.stderr


def test_a_client_that_changed_inside_ends_its_span_at_once() -> None:
    """Its stream is the agent's alone, whatever that means for the trace."""
    received: list[Any] = []
    trace = record(lambda: received.extend(anthropic_call(OtherStream())._iterator))
    assert received == EVENTS
    assert (trace.info.state, len(trace.data.spans)) == ("OK", 1)


def test_other_streams_are_left_alone() -> None:
    """An object that merely looks like a stream is what the agent recorded."""

    class Stream:
        def __init__(self) -> None:
            self._iterator = iter([1, 2])

    mine = Stream()
    iterator = mine._iterator
    trace = record(lambda: anthropic_call(mine))
    assert mine._iterator is iterator
    assert trace.info.state == "OK"
