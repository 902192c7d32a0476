"""Two answers to the same request: whether they say the same, where they differ, what they cost.

Answers are compared as the table keeps them: JSON as its value, a stream as the object that it adds up to,
anything else as text. Left out is what differs between any two answers: at the top ``databricks_output``, the
``id``, the times and ``usage`` (tokens are compared by themselves), and below it the times and those ids that
look made up by a machine.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

import orjson

from inference_table.record import DatabricksOutput, response_column
from serving.streams import aggregate, is_stream

__all__ = ["Answer", "Difference", "Outcome", "Side", "differences", "recorded_answer", "sent_answer"]

TIMES: Final = frozenset({"created", "created_at", "completed_at", "timestamp"})
OUTER: Final = TIMES | {"databricks_output", "id", "usage", "system_fingerprint", "service_tier"}
"""Keys at the top of an answer that say nothing about what was answered."""
IDS: Final = frozenset({"id", "call_id", "item_id", "tool_call_id", "message_id", "response_id", "trace_id"})
MACHINE_ID: Final = re.compile(r"(?=[^\s]*\d)[\w:.-]{12,}")
"""An id such as ``call_8fb1...`` or a UUID; ``returns-7`` and 42 are names, and mean something."""
MAX_DIFFERENCES: Final = 3
EXCERPT: Final = 120
"""Characters of a value where it differs."""
CONTEXT: Final = 30
"""Of these, those before the difference."""
CALLS: Final = frozenset({"function_call", "tool_use", "mcp_call"})


@dataclass(frozen=True, slots=True)
class Difference:
    """One place where two answers differ; None is what is not there."""

    path: str
    old: str | None
    new: str | None


@dataclass(frozen=True, slots=True)
class Answer:
    """What was answered: ``value`` as the table has it, without ``databricks_output``.

    ``tools`` are the names of the tool spans of the trace, None where there is no trace with spans.
    """

    value: Any
    tools: tuple[str, ...] | None = None

    @property
    def calls(self) -> tuple[str, ...]:
        """Names of the tools that the answer asks its client to call."""
        return tuple(islice(called(self.value), 100))

    @property
    def tokens(self) -> tuple[int | None, int | None]:
        """Input and output tokens, as far as the answer itself says."""
        usage = self.value.get("usage") if isinstance(self.value, dict) else None
        found = usage if isinstance(usage, dict) else {}
        return (
            count_of(found.get("input_tokens", found.get("prompt_tokens"))),
            count_of(found.get("output_tokens", found.get("completion_tokens"))),
        )


@dataclass(slots=True)
class Side:
    """What is known of one of two exchanges. Times are milliseconds."""

    status: int | None = None
    ms: float | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    calls: tuple[str, ...] = ()
    tools: tuple[str, ...] | None = None


@dataclass(slots=True)
class Outcome:
    """A request that was sent again.

    Attributes:
        request_id: of the recorded request.
        new_id: the row of the new answer, where one is recorded; by the target, unless ``is_recorded_here``.
        error: why there is no whole answer.
        is_answer_changed: whether the answers differ; ``differences`` are the first few of the places where.
        is_row_read: whether ``new`` is what the target's own row says, and not only what was seen from here.
        late_seconds: how much later it was sent than it was due.
    """

    request_id: str
    old: Side
    new: Side = field(default_factory=Side)
    new_id: str | None = None
    error: str | None = None
    is_answer_changed: bool = False
    differences: list[Difference] = field(default_factory=list)
    is_recorded_here: bool = False
    is_row_read: bool = False
    late_seconds: float = 0.0

    @property
    def tools(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Tools that were called: by the traces where both are known, else those that the answers ask for."""
        if self.old.tools is not None and self.new.tools is not None:
            return self.old.tools, self.new.tools
        return self.old.calls, self.new.calls

    @property
    def changes(self) -> list[str]:
        """What differs, of status, answer and tools."""
        if self.error is not None:
            return []
        old, new = self.tools
        found = {
            "status": self.old.status != self.new.status,
            "answer": self.is_answer_changed,
            "tools": Counter(old) != Counter(new),
        }
        return [name for name, differs in found.items() if differs]

    @property
    def verdict(self) -> str:
        """``failed`` without a whole answer, or with an error or a redirect that is new; else ``changed`` or
        ``same``."""
        if self.error is not None or badness(self.new.status) > badness(self.old.status):
            return "failed"
        return "changed" if self.changes else "same"


def badness(status: int | None) -> int:
    """0 is an answer, 1 a redirect, which is not followed, 2 an error."""
    return 2 if status is None or status >= 400 else int(status >= 300)


def recorded_answer(response: str | None) -> Answer:
    """The answer in a row's column ``response``."""
    column = parsed(response or "null")
    if not isinstance(column, dict):
        return Answer(column)
    output = column.pop("databricks_output", None)
    return Answer(unwrapped(column), tool_names(output))


def sent_answer(body: bytes, content_type: str) -> Answer:
    """An answer as it came, brought into the form in which the table would have it."""
    if is_stream(content_type):
        body, content_type = aggregate(body, content_type).body, "application/json"
    parts = response_column(body, DatabricksOutput(""), content_type=content_type)
    return Answer(recorded_answer(b"".join(parts).decode()).value)


def parsed(text: str) -> Any:
    try:
        return orjson.loads(text)
    except ValueError:
        pass
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def unwrapped(value: dict[str, Any]) -> Any:
    """What is no JSON object is kept as the member ``body`` of one."""
    return value["body"] if value.keys() == {"body"} else value


def tool_names(output: Any) -> tuple[str, ...] | None:
    trace = output.get("trace") if isinstance(output, dict) else None
    data = trace.get("data") if isinstance(trace, dict) else None
    spans = data.get("spans") if isinstance(data, dict) else None
    if not isinstance(spans, list) or not spans:
        return None
    return tuple(str(span.get("name")) for span in spans if isinstance(span, dict) and is_tool(span))


def is_tool(span: Mapping[str, Any]) -> bool:
    attributes = span.get("attributes")
    return isinstance(attributes, dict) and attributes.get("mlflow.spanType") in ('"TOOL"', "TOOL")


def called(value: Any, depth: int = 0) -> Iterator[str]:
    """Names in tool calls, in the words of OpenAI (chat completions, responses) and of Anthropic."""
    if depth > 8:
        return
    if isinstance(value, list):
        for item in value:
            yield from called(item, depth + 1)
    if not isinstance(value, dict):
        return
    function = value.get("function")
    if isinstance(function, dict) and isinstance(function.get("name"), str):
        yield function["name"]
    elif value.get("type") in CALLS and isinstance(value.get("name"), str):
        yield value["name"]
    for key in ("choices", "message", "tool_calls", "output", "content", "messages"):
        yield from called(value.get(key), depth + 1)


def count_of(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def differences(old: Any, new: Any, ignored: frozenset[str] = frozenset()) -> list[Difference]:
    """The first places where two answers differ; none where they say the same.

    Args:
        ignored: further keys that are left out, wherever they are.
    """
    try:
        return list(islice(found_in(old, new, "", ignored | OUTER, ignored), MAX_DIFFERENCES))
    except RecursionError:
        return [] if old == new else [Difference("", "(nested too deeply to be compared)", None)]


def found_in(
    old: Any, new: Any, path: str, left_out: frozenset[str], ignored: frozenset[str]
) -> Iterator[Difference]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            if key in left_out or (key in IDS and is_made_up(old.get(key)) and is_made_up(new.get(key))):
                continue
            inner = f"{path}.{key}" if path else key
            if key in old and key in new:
                yield from found_in(old[key], new[key], inner, ignored | TIMES, ignored)
            else:
                yield Difference(inner, *(shown(one[key]) if key in one else None for one in (old, new)))
    elif isinstance(old, list) and isinstance(new, list):
        for index in range(max(len(old), len(new))):
            inner = f"{path}[{index}]"
            if index < len(old) and index < len(new):
                yield from found_in(old[index], new[index], inner, ignored | TIMES, ignored)
            else:
                sides = (shown(one[index]) if index < len(one) else None for one in (old, new))
                yield Difference(inner, *sides)
    elif isinstance(old, str) and isinstance(new, str):
        if old != new:
            begin = max(0, common_length(old, new) - CONTEXT)
            yield Difference(path, *(excerpt(one, begin) for one in (old, new)))
    elif type(old) is not type(new) or old != new:
        yield Difference(path, shown(old), shown(new))


def is_made_up(value: Any) -> bool:
    return value is None or (isinstance(value, str) and MACHINE_ID.fullmatch(value) is not None)


def common_length(old: str, new: str) -> int:
    return next(
        (n for n, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new))
    )


def shown(value: Any) -> str:
    return excerpt(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str), 0)


def excerpt(text: str, begin: int) -> str:
    head, tail = "…" if begin else "", "…" if len(text) > begin + EXCERPT else ""
    return head + " ".join(text[begin : begin + EXCERPT].split()) + tail
