"""What values of frameworks say in one line; those of vendors are in test_span_tree.py."""

from typing import Any

import pytest

from deploy.brief import brief


def langchain(kind: str, content: str, **more: Any) -> dict[str, Any]:
    """A message as LangChain's objects are recorded."""
    return {"content": content, "additional_kwargs": {}, "response_metadata": {}, "type": kind, **more}


def llama_index(role: str, *blocks: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A message as LlamaIndex's objects are recorded."""
    return {"role": role, "additional_kwargs": more, "blocks": list(blocks)}


def text(value: str) -> dict[str, Any]:
    return {"block_type": "text", "text": value}


CALL = {"name": "lookup", "args": {"topic": "tea"}, "id": "call_1", "type": "tool_call"}
WISH = langchain("ai", "", tool_calls=[CALL])
TOOL_BLOCK = {"block_type": "tool_call", "tool_name": "lookup", "tool_kwargs": '{"topic": "tea"}'}
TOOL_EVENT = {"tool_name": "lookup", "tool_kwargs": {"topic": "tea"}, "tool_id": "call_1"}
TOOL_OUTPUT = {"blocks": [text("all about tea")], "tool_name": "lookup", "is_error": False}
QUERY = {"query_str": "shipping?", "image_path": None, "custom_embedding_strs": None, "embedding": None}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"messages": [langchain("human", "hi"), WISH]}, 'ai: calls lookup({"topic": "tea"})  (+1 earlier)'),
        ([langchain("human", "hi"), langchain("ai", "hello")], "ai: hello  (+1 earlier)"),
        (langchain("tool", "all about tea", tool_call_id="call_1"), "tool: all about tea"),
        (langchain("ai", "hello"), "hello"),
        ([CALL], 'calls lookup({"topic": "tea"})'),
        ([{"graph": None, "update": {"messages": [WISH]}, "resume": None}], 'calls lookup({"topic": "tea"})'),
        ({"graph": None, "update": None, "resume": True}, '{"graph": null, "update": null, "resume": true}'),
    ],
)
def test_langchain(value: Any, said: str) -> None:
    """Messages, the calls that models wish for, and LangGraph's commands."""
    assert brief(value) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (
            {"messages": [llama_index("system", text("help")), llama_index("user", text("hi"))]},
            "user: hi  (+1 earlier)",
        ),
        ({"message": llama_index("assistant", text("hello")), "raw": {"id": 1}}, "hello"),
        ({"message": llama_index("assistant", TOOL_BLOCK)}, 'calls lookup({"topic": "tea"})'),
        ({"response": "two days", "source_nodes": [{"node": {}}], "metadata": {}}, "two days"),
        ({"result": {"response": llama_index("assistant", text("hello")), "tool_calls": []}}, "hello"),
        ({"query_bundle": QUERY}, "shipping?"),
        ({"query": QUERY, "nodes": [{"node": {}}]}, "shipping?"),
        ({"ctx": "<Context>", "ev": TOOL_EVENT}, 'calls lookup({"topic": "tea"})'),
        ({**TOOL_EVENT, "tool_output": TOOL_OUTPUT}, "tool: all about tea"),
    ],
)
def test_llama_index(value: Any, said: str) -> None:
    """Messages of blocks, replies, queries, and the events of an agent's workflow."""
    assert brief(value) == said


@pytest.mark.parametrize(
    "value",
    [
        {"response": "sure", "confidence": 0.3},
        {"message": "hi", "level": 3},
        {"result": {"rows": [1, 2]}},
        [{"role": "user"}],
        [{"page_content": "text", "metadata": {}}],
        {"blocks": 3, "height": 4},
        {"tool_name": "hammer"},
    ],
)
def test_what_is_no_message_is_shown_whole(value: Any) -> None:
    """Nothing of an agent's own values is left out for a name that frameworks use, too."""
    assert all(str(part) in brief(value) for part in flat(value))


def flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [part for item in value.values() for part in flat(item)]
    return [part for item in value for part in flat(item)] if isinstance(value, list) else [value]
