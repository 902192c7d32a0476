"""What a value says, in one line: of a chat the last message, of an answer its text or the calls of tools.

Chats are read in the words of OpenAI (chat completions, responses), of Anthropic, LangChain and LlamaIndex,
whose messages have ``blocks``, and of OpenTelemetry's conventions for generative AI, whose have ``parts``.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

__all__ = ["as_json", "brief"]

CONVERSATIONS: Final = ("messages", "input")
CALLS: Final = frozenset({"function_call", "tool_use", "tool_call", "server_tool_use", "mcp_call"})
NAMES: Final = ("name", "tool_name")
ARGUMENTS: Final = ("arguments", "input", "args", "tool_kwargs")
ANSWERING: Final = frozenset({"assistant", "ai"})
WRAPPERS: Final = (
    *("message", "response", "result", "update", "tool_output", "ev"),
    *("query", "query_bundle", "str_or_query_bundle"),
)
"""Where LlamaIndex's replies and events and LangGraph's commands have what was said, beside much else."""
TEXTS: Final = ("text", "content", "parts", "blocks", "output", "response", "refusal", "thinking", "summary")
"""Where a part of a message may have its text, or further parts."""
TOO_DEEP: Final = "(nested too deeply to be shown)"


def brief(value: Any) -> str:
    """One line for a value, of whatever length."""
    if isinstance(value, str):
        return value
    try:
        return said_in(value) or as_json(value)
    except RecursionError:
        return TOO_DEEP


def as_json(value: Any, indent: int | None = None) -> str:
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, default=str)
    except RecursionError:
        return TOO_DEEP


def said_in(value: Any) -> str | None:
    """What a conversation or an answer says; None where a value is neither."""
    if is_conversation(value):
        return last_of(value)
    if (items := messages_of(value)) and all(map(is_call, items)):
        return part_text(items)
    if items and len(items) == 1:
        return wrapped_in(items[0])
    if not isinstance(value, dict):
        return None
    if is_message(value):
        return last_of([value])
    if is_call(value):
        return part_text(value)
    for key in CONVERSATIONS:
        if messages := messages_of(value.get(key)):
            return last_of(messages)
    if isinstance(value.get("model"), str) and isinstance(value.get("input"), str):
        return str(value["input"])
    if (answer := answer_of(value)) is not None:
        return answer
    if (answer := wrapped_in(value)) is not None:
        return answer
    if len(value) == 1 and isinstance(only := next(iter(value.values())), str):
        return f"{next(iter(value))}: {only}"
    return None


def answer_of(value: Mapping[str, Any]) -> str | None:
    """What a model's reply says: of a chat completion, a response, a message, or embeddings."""
    if (choices := messages_of(value.get("choices"))) and isinstance(choices[0].get("message"), dict):
        return message_text(choices[0]["message"])
    if value.get("object") == "response" and (items := messages_of(value.get("output"))):
        return " ".join(filter(None, map(part_text, items))) or None
    if value.get("type") == "message" and messages_of(value.get("content")):
        return message_text(value)
    if value.get("object") == "list" and (entries := messages_of(value.get("data"))):
        numbers = entries[0].get("embedding")
        if isinstance(numbers, list):
            return f"{len(entries)} embedding{'' if len(entries) == 1 else 's'} of {len(numbers):,} numbers"
    return None


def wrapped_in(value: Mapping[str, Any]) -> str | None:
    if isinstance(value.get("query_str"), str):
        return str(value["query_str"])
    if "source_nodes" in value and isinstance(value.get("response"), str):
        return str(value["response"])
    inner = (said_in(value[key]) for key in WRAPPERS if isinstance(value.get(key), dict))
    return next(filter(None, inner), None)


def is_conversation(value: Any) -> bool:
    messages = messages_of(value) or []
    return bool(messages) and all(
        is_message(item) or ("role" in item and item.keys() & {"content", "parts"}) for item in messages
    )


def is_message(value: Mapping[str, Any]) -> bool:
    """Whether a value is a message of LangChain's or LlamaIndex's, or what a tool of the latter says."""
    return bool(value.keys() & {"content", "blocks"}) and bool(
        value.keys() & {"additional_kwargs", "is_error"}
    )


def last_of(messages: list[dict[str, Any]]) -> str:
    """The last message, who said it unless it is an answer on its own, and how many were before."""
    message, earlier = messages[-1], len(messages) - 1
    role = message.get("role", message.get("type", "tool" if "tool_name" in message else "?"))
    text = message_text(message)
    if role in ANSWERING and not earlier:
        return text
    return f"{role}: {text}" + (f"  (+{earlier} earlier)" if earlier else "")


def messages_of(value: Any) -> list[dict[str, Any]] | None:
    """A list of objects, or None."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return value
    return None


def message_text(message: Mapping[str, Any]) -> str:
    says = is_call(message) or any(message.get(key) for key in TEXTS)
    said = [part_text(message)] if says else []
    if calls := messages_of(message.get("tool_calls")):
        said.append("calls " + ", ".join(map(call_text, calls)))
    return " ".join(filter(None, said)) or as_json(message.get("content"))


def part_text(part: Any) -> str:
    """A part of a message: text, the call of a tool or its result, or what kind of thing it is."""
    if isinstance(part, str):
        return part
    if isinstance(part, list):
        return " ".join(filter(None, map(part_text, part)))
    if not isinstance(part, dict):
        return as_json(part)
    kind = kind_of(part)
    if is_call(part):
        return f"calls {call_text(part)}"
    for key in TEXTS:
        if part.get(key):
            return part_text(part[key])
    return f"({kind})" if isinstance(kind, str) else as_json(part)


def kind_of(part: Mapping[str, Any]) -> Any:
    return part.get("type", part.get("block_type"))


def is_call(part: Mapping[str, Any]) -> bool:
    kind = kind_of(part)
    if kind is None:
        return part.keys() >= {"tool_name", "tool_kwargs"} and "tool_output" not in part
    return isinstance(kind, str) and kind in CALLS


def call_text(call: Mapping[str, Any]) -> str:
    if not is_call(call):
        return function_text(call.get("function"))
    name = next((call[key] for key in NAMES if key in call), None)
    return f"{name}({next(arguments_of(call), '')})"


def arguments_of(call: Mapping[str, Any]) -> Iterator[str]:
    for key in ARGUMENTS:
        if key in call:
            yield call[key] if isinstance(call[key], str) else as_json(call[key])


def function_text(function: Any) -> str:
    if isinstance(function, dict):
        return f"{function.get('name')}({function.get('arguments')})"
    return function if isinstance(function, str) else "a function"
