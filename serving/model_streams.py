"""What MLflow's autologging leaves out of streamed model calls.

``mlflow.openai.autolog`` records each chunk of a stream, but adds up only the text: tool calls, refusals,
further choices and why they finished are lost, and all of it where the stream fails or is left early.
``mlflow.anthropic.autolog`` takes the stream itself for the answer, before the first event is read: it
records ``<anthropic.Stream object at 0x...>``, no tokens, and success.

Here the chunks of a call become its outputs when the trace is encoded (:func:`complete`), and a span of
Anthropic's goes on until its stream ends (:func:`follow`), by a wrapper around the stream's ``_iterator``,
which is what MLflow does to OpenAI's. ``_iterator`` is private in Anthropic's client; tested with 1.0 and
2.12. A stream that is left early leaves its span in progress, with what was read of it.
"""

# mypy: disable-error-code="no-untyped-call"
# MLflow is typed in part only.

from collections.abc import AsyncIterator, Iterator, Mapping, MutableMapping, Sequence
from itertools import zip_longest
from typing import Any, Final, Protocol

from mlflow.tracing.constant import SpanAttributeKey, TokenUsageKey

from serving.shapes import SHAPES
from serving.snapshot import Snapshot, snapshot, thaw

__all__ = ["complete", "follow", "is_model_stream"]

ANTHROPIC: Final = "anthropic"
FORMATS: Final = ("openai", ANTHROPIC)
"""Values of MLflow's attribute that says whose messages a span holds."""
STREAMS: Final = ("Stream", "AsyncStream")


class StreamSpan(Protocol):
    """The span of a streamed call."""

    def add_chunk(self, chunk: Any) -> None: ...
    def record_exception(self, exception: Exception) -> None: ...
    def end(self) -> None: ...


def is_model_stream(values: Mapping[str, Snapshot]) -> bool:
    """Whether the chunks of a span with these attributes come from a model, not from an agent's generator."""
    return values.get(SpanAttributeKey.MESSAGE_FORMAT) in FORMATS


def complete(values: MutableMapping[str, Snapshot], chunks: Sequence[Snapshot]) -> bool:
    """Add what ``chunks`` say to outputs, token usage and model; False where they are of no kind we know."""
    try:
        said = added_up([thaw(chunk) for chunk in chunks])
    except RecursionError:
        return False
    if said is None:
        return False
    outputs = thaw(values.get(SpanAttributeKey.OUTPUTS))
    if outputs is None or isinstance(outputs, dict):
        values[SpanAttributeKey.OUTPUTS] = snapshot(filled(outputs, said))[0]
    excludes_cached = values.get(SpanAttributeKey.MESSAGE_FORMAT) == ANTHROPIC
    if (usage := token_usage(said.get("usage"), excludes_cached=excludes_cached)) is not None:
        values.setdefault(SpanAttributeKey.CHAT_USAGE, usage)
    if isinstance(model := said.get("model"), str):
        values.setdefault(SpanAttributeKey.MODEL, model)
    return True


def added_up(events: Sequence[Any]) -> dict[str, Any] | None:
    shape = next((kind() for kind in SHAPES if events and kind.accepts(events[0])), None)
    if shape is None:
        return None
    for event in events:
        if shape.accepts(event):
            shape.add(event)
    return shape.result()


def filled(theirs: Any, ours: Any) -> Any:
    """What MLflow put together, with what it left out."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return {**theirs, **{key: filled(theirs.get(key), value) for key, value in ours.items()}}
    if isinstance(theirs, list) and isinstance(ours, list):
        return [filled(*pair) for pair in zip_longest(theirs, ours)]
    return theirs if ours is None else ours


def token_usage(usage: Any, *, excludes_cached: bool) -> dict[str, int] | None:
    """A vendor's usage in MLflow's terms.

    Args:
        usage: of a chat completion, a response or a message.
        excludes_cached: its input tokens are those beside the cached ones, which MLflow counts in.
    """
    inputs = count(usage, "input_tokens", "prompt_tokens")
    outputs = count(usage, "output_tokens", "completion_tokens")
    if inputs is None or outputs is None:
        return None
    details = usage.get("input_tokens_details") or usage.get("prompt_tokens_details")
    cached = count(usage, "cache_read_input_tokens")
    cached = count(details, "cached_tokens") if cached is None else cached
    created = count(usage, "cache_creation_input_tokens")
    if excludes_cached:
        inputs += (cached or 0) + (created or 0)
    counted = {
        TokenUsageKey.INPUT_TOKENS: inputs,
        TokenUsageKey.OUTPUT_TOKENS: outputs,
        TokenUsageKey.TOTAL_TOKENS: inputs + outputs,
        TokenUsageKey.CACHE_READ_INPUT_TOKENS: cached,
        TokenUsageKey.CACHE_CREATION_INPUT_TOKENS: created,
    }
    return {key: number for key, number in counted.items() if number is not None}


def count(usage: Any, *names: str) -> int | None:
    found = (usage.get(name) for name in names) if isinstance(usage, dict) else ()
    return next((number for number in found if isinstance(number, int)), None)


def follow(outputs: Any, span: StreamSpan) -> bool:
    """Let a span go on until the stream ends that was recorded as its outputs; False where they are none."""
    if not any(is_stream(kind) for kind in type(outputs).__mro__):
        return False
    chunks = getattr(outputs, "_iterator", None)
    if not isinstance(chunks, Iterator | AsyncIterator):
        return False
    try:
        outputs._iterator = (
            followed(chunks, span) if isinstance(chunks, Iterator) else followed_async(chunks, span)
        )
    except AttributeError:  # a version of the client that does not have it so
        return False
    return True


def is_stream(kind: type) -> bool:
    return kind.__name__ in STREAMS and kind.__module__.partition(".")[0] == ANTHROPIC


def followed(chunks: Iterator[Any], span: StreamSpan) -> Iterator[Any]:
    try:
        for chunk in chunks:
            span.add_chunk(chunk)
            yield chunk
    except GeneratorExit:
        raise  # its reader has had enough
    except BaseException as error:
        fail(span, error)
        raise
    span.end()


async def followed_async(chunks: AsyncIterator[Any], span: StreamSpan) -> AsyncIterator[Any]:
    try:
        async for chunk in chunks:
            span.add_chunk(chunk)
            yield chunk
    except GeneratorExit:
        raise
    except BaseException as error:
        fail(span, error)
        raise
    span.end()


def fail(span: StreamSpan, error: BaseException) -> None:
    if isinstance(error, Exception):
        span.record_exception(error)
    span.end()  # which records a cancellation by itself
