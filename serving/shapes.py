"""What the events of a stream add up to, one class per kind.

- Chat completion chunks: a ``chat.completion``; legacy completions too.
- Responses API events: the ``response`` of the final event, or, where there is none (MLflow's
  ``ResponsesAgent``, a cut-off stream), one of the items that are done and what is there of the others.
- Anthropic's events: the message.
- MLflow's ``ChatAgentChunk``: ``{"messages": [...]}``.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

__all__ = ["SHAPES", "Shape"]


class Shape(Protocol):
    """What a kind of events adds up to."""

    ended: bool

    @staticmethod
    def accepts(value: Any) -> bool: ...

    def add(self, value: dict[str, Any]) -> None: ...

    def result(self) -> dict[str, Any]: ...


class Text(list[str]):
    """Parts of a text: joined once, not at every delta."""


class Items(dict[object, Any]):
    """Entries of a list whose deltas say which entry they belong to."""


REPLACED: Final = frozenset({"role", "type", "id", "call_id", "object", "index"})
"""Texts that name something: a delta that repeats one is no more of it."""


def _merge(into: dict[str, Any], delta: Mapping[str, Any]) -> None:
    """Add a delta: texts grow, objects merge, lists grow or merge by ``index``, all else is replaced."""
    for key, new in delta.items():
        into[key] = _merged(key, into.get(key), new)


def _merged(key: str, old: Any, new: Any) -> Any:
    if new is None:
        return old
    if isinstance(new, str):
        if key in REPLACED:
            return new or old
        text = old if isinstance(old, Text) else Text()
        if not (
            key == "name" and text == [new]
        ):  # some servers repeat a tool's name, others send it in parts
            text.append(new)
        return text
    if isinstance(new, dict):
        merged = old if type(old) is dict else {}
        _merge(merged, new)
        return merged
    if isinstance(new, list):
        items = old if isinstance(old, Items) else Items()
        for item in new:
            _merge_item(items, item, calls=key == "tool_calls")
        return items
    return new


def _merge_item(items: Items, item: Any, *, calls: bool) -> None:
    if not isinstance(item, dict):
        items[len(items), ""] = item
        return
    key: object = item.get("index")
    if not isinstance(key, int):
        # Some servers give tool calls no index: an id starts one, what has none goes on with the last.
        key = item.get("id") if calls and isinstance(item.get("id"), str) else None
        if key is None:
            key = (
                next(reversed(items))
                if calls and items and "name" not in _function(item)
                else (len(items), "")
            )
    target = items.get(key)
    if not isinstance(target, dict):
        target = items[key] = {}
    _merge(target, {name: value for name, value in item.items() if not (calls and name == "index")})


def _function(call: dict[str, Any]) -> Mapping[str, Any]:
    function = call.get("function")
    return function if isinstance(function, dict) else {}


def _settled(node: Any) -> Any:
    """The plain JSON value of what deltas added up to."""
    if isinstance(node, Text):
        return "".join(node)
    if isinstance(node, Items):
        return [_settled(item) for item in node.values()]
    if isinstance(node, dict):
        return {key: _settled(item) for key, item in node.items()}
    return node


def _replace(into: dict[str, Any], values: Mapping[str, Any], *, without: tuple[str, ...]) -> None:
    """Take over values; null only where there is none yet."""
    for key, value in values.items():
        if key not in without and (value is not None or key not in into):
            into[key] = value


class ChatCompletion:
    """``chat.completion.chunk`` objects; also the chunks of legacy completions."""

    def __init__(self) -> None:
        self.ended = False
        self._top: dict[str, Any] = {}
        self._choices: dict[object, dict[str, Any]] = {}

    @staticmethod
    def accepts(value: Any) -> bool:
        choices = value.get("choices") if isinstance(value, dict) else None
        return isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices)

    def add(self, value: dict[str, Any]) -> None:
        _replace(self._top, value, without=("choices",))
        for choice in value["choices"]:
            self._add_choice(choice)

    def _add_choice(self, choice: dict[str, Any]) -> None:
        index = choice.get("index")
        number = index if isinstance(index, int) else 0
        into = self._choices.setdefault(number, {"index": number})
        _replace(into, choice, without=("index", "delta", "text", "logprobs"))
        grown: dict[str, Any] = {key: choice[key] for key in ("text", "logprobs") if key in choice}
        if isinstance(choice.get("delta"), dict):
            grown["message"] = choice["delta"]
            if not isinstance(into.get("message"), dict):
                into["message"] = {"role": "assistant", "content": None}
        _merge(into, grown)

    def result(self) -> dict[str, Any]:
        if self._top.get("object") == "chat.completion.chunk":
            self._top["object"] = "chat.completion"
        choices = sorted(self._choices.values(), key=lambda choice: choice["index"])
        for choice in choices:
            choice.setdefault("finish_reason", None)
        return {**self._top, "choices": [_settled(choice) for choice in choices]}


DELTAS: Final[Mapping[str, tuple[str, str, Mapping[str, Any], str]]] = {
    "response.output_text.delta": ("message", "content", {"type": "output_text", "annotations": []}, "text"),
    "response.refusal.delta": ("message", "content", {"type": "refusal"}, "refusal"),
    "response.reasoning_text.delta": ("reasoning", "content", {"type": "reasoning_text"}, "text"),
    "response.reasoning_summary_text.delta": ("reasoning", "summary", {"type": "summary_text"}, "text"),
    "response.function_call_arguments.delta": ("function_call", "", {}, "arguments"),
    "response.mcp_call_arguments.delta": ("mcp_call", "", {}, "arguments"),
    "response.custom_tool_call_input.delta": ("custom_tool_call", "", {}, "input"),
    "response.code_interpreter_call_code.delta": ("code_interpreter_call", "", {}, "code"),
}
"""Of each delta: its item's type, the list of the item it belongs to, an entry there, and the text's key."""


@dataclass
class OpenItem:
    """An item of a response that is not done: as it was added, and the texts that came since."""

    item: dict[str, Any]
    texts: dict[tuple[str, int], Text] = field(default_factory=dict)

    def result(self) -> dict[str, Any]:
        item = dict(self.item)
        for (kind, _), text in sorted(self.texts.items(), key=lambda entry: entry[0][1]):
            item_type, parts, part, key = DELTAS[kind]
            item.setdefault("type", item_type)
            if not parts:
                item[key] = "".join(text)
            else:
                item[parts] = [*(item.get(parts) or []), {**part, key: "".join(text)}]
        if item.get("type") == "message":
            item.setdefault("role", "assistant")
        return item


class Response:
    """Events of OpenAI's Responses API and of MLflow's ``ResponsesAgent``."""

    def __init__(self) -> None:
        self.ended = False
        self._response: dict[str, Any] = {"object": "response"}
        self._done: list[dict[str, Any]] = []
        self._open: dict[object, OpenItem] = {}
        self._custom: dict[str, Any] = {}

    @staticmethod
    def accepts(value: Any) -> bool:
        kind = value.get("type") if isinstance(value, dict) else None
        return isinstance(kind, str) and kind.startswith("response.") and kind != "response.error"

    def add(self, value: dict[str, Any]) -> None:
        kind, response, item = value["type"], value.get("response"), value.get("item")
        self.ended = self.ended or kind in ("response.completed", "response.failed", "response.incomplete")
        if isinstance(value.get("custom_outputs"), dict):
            self._custom.update(value["custom_outputs"])
        if isinstance(response, dict):
            self._response = dict(response)
        elif isinstance(item, dict):
            self._add_item(kind, value, item)
        elif kind in DELTAS and isinstance(value.get("delta"), str):
            self._add_delta(kind, value)

    def _add_item(self, kind: str, value: dict[str, Any], item: dict[str, Any]) -> None:
        key = _item_key(item.get("id"), value)
        if kind == "response.output_item.done":
            self._open.pop(key, None)
            self._done.append(item)
        else:
            self._open[key] = OpenItem(item)

    def _add_delta(self, kind: str, value: dict[str, Any]) -> None:
        key = _item_key(value.get("item_id"), value)
        item = {"id": value["item_id"]} if isinstance(value.get("item_id"), str) else {}
        part = next((value[name] for name in PART_INDEXES if isinstance(value.get(name), int)), 0)
        self._open.setdefault(key, OpenItem(item)).texts.setdefault((kind, part), Text()).append(
            value["delta"]
        )

    def result(self) -> dict[str, Any]:
        if not self._response.get("output"):
            self._response["output"] = [*self._done, *(item.result() for item in self._open.values())]
        if self._custom:
            self._response["custom_outputs"] = self._custom
        return self._response


PART_INDEXES: Final = ("content_index", "summary_index")


def _item_key(item_id: Any, event: Mapping[str, Any]) -> object:
    # By id first: an agent that calls a model several times passes on the same output_index several times.
    return item_id if isinstance(item_id, str) and item_id else (str(event.get("output_index")),)


class ChatAgent:
    """MLflow's ``ChatAgentChunk``: ``{"delta": {"role": ..., "content": ..., "id": ...}, ...}``."""

    def __init__(self) -> None:
        self.ended = False
        self._top: dict[str, Any] = {}
        self._messages: dict[object, dict[str, Any]] = {}
        self._last: object = None

    @staticmethod
    def accepts(value: Any) -> bool:
        delta = value.get("delta") if isinstance(value, dict) and "type" not in value else None
        return isinstance(delta, dict) and ("role" in delta or "content" in delta or "tool_calls" in delta)

    def add(self, value: dict[str, Any]) -> None:
        _replace(self._top, value, without=("delta", "messages"))
        message_id = value["delta"].get("id")
        self._last = message_id if isinstance(message_id, str) else self._last
        _merge(self._messages.setdefault(self._last, {}), value["delta"])

    def result(self) -> dict[str, Any]:
        return {"messages": [_settled(message) for message in self._messages.values()], **self._top}


MESSAGE_EVENTS: Final = frozenset(
    {
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    }
)
HELPER_EVENTS: Final = frozenset({"text", "input_json", "thinking", "citation"})
"""What the helper of Anthropic's client adds to them, each with a ``snapshot`` of what came before."""


@dataclass
class OpenBlock:
    """A content block: as it was started, and the texts that came since."""

    block: dict[str, Any]
    texts: dict[str, Text] = field(default_factory=dict)
    citations: list[Any] = field(default_factory=list)

    def add(self, delta: Mapping[str, Any]) -> None:
        for key, value in delta.items():
            if key == "citation":
                self.citations.append(value)
            elif key != "type" and isinstance(value, str):
                self.texts.setdefault(key, Text()).append(value)

    def result(self) -> dict[str, Any]:
        block = dict(self.block)
        for key, parts in self.texts.items():
            text = "".join(parts)
            if key == "partial_json":
                block["input"] = _json_or_text(text)
            else:
                old = block.get(key)
                block[key] = old + text if isinstance(old, str) else text
        if self.citations:
            block["citations"] = [*(block.get("citations") or []), *self.citations]
        return block


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text) if text else {}
    except ValueError:  # cut off
        return text


class Message:
    """Events of Anthropic's Messages API."""

    def __init__(self) -> None:
        self.ended = False
        self._message: dict[str, Any] = {"type": "message", "role": "assistant"}
        self._blocks: dict[int, OpenBlock] = {}

    @staticmethod
    def accepts(value: Any) -> bool:
        kind = value.get("type") if isinstance(value, dict) else None
        if not isinstance(kind, str):
            return False
        return kind in MESSAGE_EVENTS or (kind in HELPER_EVENTS and "snapshot" in value)

    def add(self, value: dict[str, Any]) -> None:
        kind, index = value["type"], value.get("index")
        number = index if isinstance(index, int) else 0
        self.ended = self.ended or kind == "message_stop"
        if kind == "message_start" and isinstance(value.get("message"), dict):
            self._message = dict(value["message"])
        elif kind == "content_block_start" and isinstance(value.get("content_block"), dict):
            self._blocks[number] = OpenBlock(value["content_block"])
        elif kind == "content_block_delta" and isinstance(value.get("delta"), dict):
            self._blocks.setdefault(number, OpenBlock({"type": "text"})).add(value["delta"])
        elif kind == "message_delta":
            self._add_ending(value)

    def _add_ending(self, value: dict[str, Any]) -> None:
        if isinstance(value.get("delta"), dict):
            _replace(self._message, value["delta"], without=())
        if isinstance(usage := value.get("usage"), dict):  # cumulative, says Anthropic
            known = self._message.get("usage")
            self._message["usage"] = dict(known) if isinstance(known, dict) else {}
            _replace(self._message["usage"], usage, without=())

    def result(self) -> dict[str, Any]:
        blocks = [block.result() for _, block in sorted(self._blocks.items())]
        given = self._message.get("content")
        return {**self._message, "content": [*(given if isinstance(given, list) else []), *blocks]}


SHAPES: Final[tuple[type[Shape], ...]] = (ChatCompletion, Response, ChatAgent, Message)
