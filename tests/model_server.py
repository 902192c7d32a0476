"""A local server that speaks the wire formats of model vendors, so that their clients in tests are real.

- ``POST /v1/chat/completions``, ``/v1/responses``, ``/v1/embeddings``: OpenAI.
- ``POST /v1/messages``: Anthropic.

All but embeddings stream where the request says ``"stream": true``. What a model "says" follows from the
request alone: offered tools and no result yet, it calls the first tool, each required argument being the
question; given a tool's result, it answers with that; asked for JSON by a schema, each property is the
question; else it answers ``You asked: <question>``. Tokens are words. A client chooses how the server behaves
by its base URL: ``<url>/<behaviour>/v1``:

- ``rate-limited`` answers 429, ``broken`` 500, always.
- ``flaky`` answers 429 to the first attempt of each question, then as usual: what retries are for.
- ``slow`` waits before the answer, and between the parts of a stream.
- ``cut`` breaks a stream off in the middle of its connection.
- ``failing`` sends an error event in the middle of a stream, under HTTP 200.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.support import running

__all__ = ["ModelServer", "Received", "model_server"]

SLOWNESS: Final = 0.15
BEHAVIOURS: Final = ("rate-limited", "broken", "flaky", "slow", "cut", "failing")


@dataclass(frozen=True)
class Received:
    """One request as it came in."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


@dataclass
class ModelServer:
    """A running server: where it is, and what it was asked."""

    url: str
    received: list[Received] = field(default_factory=list)

    def base_url(self, behaviour: str = "") -> str:
        """For ``OpenAI(base_url=...)``; Anthropic's client takes it without ``/v1``."""
        return f"{self.root(behaviour)}/v1"

    def root(self, behaviour: str = "") -> str:
        assert behaviour in ("", *BEHAVIOURS)
        return f"{self.url}/{behaviour}" if behaviour else self.url


@contextlib.contextmanager
def model_server() -> Iterator[ModelServer]:
    """The server in a thread of this process, on a port of its own."""
    server = ModelServer("")
    with running(make_app(server.received)) as url:
        server.url = url
        yield server


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What the model says: a text, or the call of a tool."""

    model: str
    text: str
    call: ToolCall | None
    input_tokens: int
    output_tokens: int


def make_app(received: list[Received]) -> Starlette:
    vendors: dict[str, Vendor] = {
        "/v1/chat/completions": chat_completion,
        "/v1/responses": response_object,
        "/v1/messages": anthropic_message,
    }
    refused: set[str] = set()

    def endpoint(vendor: Vendor) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            body = await request.json()
            received.append(Received(request.url.path, dict(request.headers), body))
            behaviour = request.path_params.get("behaviour", "")
            if failure := refusal(behaviour, body, refused):
                return failure
            if behaviour == "slow":
                await asyncio.sleep(SLOWNESS)
            whole, events = vendor(body)
            if body.get("stream"):
                return StreamingResponse(played(events, behaviour), media_type="text/event-stream")
            return JSONResponse(whole, headers={"x-request-id": "req_test"})

        return answer

    routes = []
    for path, vendor in vendors.items():
        routes.append(Route(path, endpoint(vendor), methods=["POST"]))
        routes.append(Route("/{behaviour}" + path, endpoint(vendor), methods=["POST"]))
    routes.append(Route("/v1/embeddings", embeddings, methods=["POST"]))
    return Starlette(routes=routes)


Vendor = Callable[[dict[str, Any]], tuple[dict[str, Any], list[str]]]


def refusal(behaviour: str, body: dict[str, Any], refused: set[str]) -> Response | None:
    question = json.dumps(body, sort_keys=True)
    if behaviour == "rate-limited" or (behaviour == "flaky" and question not in refused):
        if behaviour == "flaky":
            refused.add(question)
        limit = {"message": "Rate limit reached", "type": "rate_limit_error", "code": "rate_limit_exceeded"}
        headers = {"retry-after-ms": "10", "retry-after": "0"}
        return JSONResponse({"type": "error", "error": limit}, 429, headers=headers)
    if behaviour == "broken":
        error: dict[str, Any] = {"message": "The server had an error", "type": "api_error", "code": None}
        return JSONResponse({"type": "error", "error": error}, 500)
    return None


async def played(events: list[str], behaviour: str) -> AsyncIterator[str]:
    middle = len(events) // 2
    for number, event in enumerate(events):
        if number == middle and behaviour == "cut":
            raise ConnectionError("this stream is to be cut off")
        if number == middle and behaviour == "failing":
            error = {"type": "server_error", "message": "overloaded", "code": "overloaded"}
            yield named("error", {**error, "error": error, "type": "error"})
            return
        if behaviour == "slow":
            await asyncio.sleep(SLOWNESS)
        yield event


def data(value: Any) -> str:
    return f"data: {json.dumps(value)}\n\n"


def named(name: str, value: dict[str, Any]) -> str:
    return f"event: {name}\n{data(value)}"


# --- what the model says ---


def text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return " ".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))


def answer_to(
    model: str,
    messages: list[dict[str, Any]],
    tools: list[tuple[str, dict[str, Any]]],
    result: str | None,
    form: dict[str, Any] | None = None,
) -> Answer:
    """The answer.

    Args:
        model: its name.
        messages: the conversation.
        tools: name and JSON schema of each that is offered.
        result: what a tool said since the last question.
        form: how structured output is asked for: an object with a JSON schema in it.
    """
    questions = [text_of(message.get("content")) for message in messages if message.get("role") == "user"]
    question = next((text for text in reversed(questions) if text), "")
    input_tokens = sum(len(text_of(message.get("content")).split()) for message in messages)
    if tools and result is None:
        name, schema = tools[0]
        names = schema.get("required") or list(schema.get("properties", {}))
        call = ToolCall(name, dict.fromkeys(names, question))
        return Answer(model, "", call, input_tokens, len(names) + 1)
    text = f"You asked: {question}" if result is None else f"The tool says: {result}"
    if form is not None and "schema" in form:
        text = json.dumps(dict.fromkeys(form["schema"]["properties"], question))
    return Answer(model, text, None, input_tokens, len(text.split()))


def words_of(text: str) -> list[str]:
    first, *others = text.split(" ")
    return [first, *(f" {word}" for word in others)]


# --- OpenAI: chat completions ---


def chat_completion(body: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    messages = body["messages"]
    last = messages[-1]
    result = text_of(last.get("content")) if last.get("role") == "tool" else None
    functions = [tool["function"] for tool in body.get("tools", [])]
    tools = [(function["name"], function.get("parameters", {})) for function in functions]
    form = (body.get("response_format") or {}).get("json_schema")
    answer = answer_to(body["model"], messages, tools, result, form)
    usage = {
        "prompt_tokens": answer.input_tokens,
        "completion_tokens": answer.output_tokens,
        "total_tokens": answer.input_tokens + answer.output_tokens,
    }
    calls: list[dict[str, Any]] | None = None
    if answer.call is not None:
        function = {"name": answer.call.name, "arguments": json.dumps(answer.call.arguments)}
        calls = [{"id": f"call_{len(messages)}", "type": "function", "function": function}]
    finish = "stop" if calls is None else "tool_calls"
    top = {"id": "chatcmpl-1", "created": 1_700_000_000, "model": answer.model}
    message: dict[str, Any] = {"role": "assistant", "content": answer.text or None, "refusal": None}
    if calls is not None:
        message["tool_calls"] = calls
    choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
    whole = {**top, "object": "chat.completion", "choices": [choice], "usage": usage}

    def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> str:
        entry = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return data({**top, "object": "chat.completion.chunk", "choices": [entry]})

    events = [chunk({"role": "assistant", "content": "" if calls is None else None})]
    if calls is None:
        events += [chunk({"content": word}) for word in words_of(answer.text)]
    else:
        [call] = calls
        start = {**call, "index": 0, "function": {"name": call["function"]["name"], "arguments": ""}}
        events.append(chunk({"tool_calls": [start]}))
        for part in words_of(call["function"]["arguments"]):
            events.append(chunk({"tool_calls": [{"index": 0, "function": {"arguments": part}}]}))
    events.append(chunk({}, finish))
    if (body.get("stream_options") or {}).get("include_usage"):
        events.append(data({**top, "object": "chat.completion.chunk", "choices": [], "usage": usage}))
    return whole, [*events, "data: [DONE]\n\n"]


# --- OpenAI: responses ---


def response_object(body: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    given = body["input"]
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    last = items[-1]
    result = text_of(last.get("output")) if last.get("type") == "function_call_output" else None
    tools = [(tool["name"], tool.get("parameters", {})) for tool in body.get("tools", []) if "name" in tool]
    form = (body.get("text") or {}).get("format")
    answer = answer_to(body["model"], items, tools, result, form)
    if answer.call is None:
        part = {"type": "output_text", "text": answer.text, "annotations": []}
        item: dict[str, Any] = {"type": "message", "id": "msg_1", "role": "assistant", "content": [part]}
    else:
        arguments = json.dumps(answer.call.arguments)
        item = {"type": "function_call", "id": "fc_1", "call_id": f"call_{len(items)}"}
        item |= {"name": answer.call.name, "arguments": arguments}
    item["status"] = "completed"
    usage = {
        "input_tokens": answer.input_tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": answer.output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": answer.input_tokens + answer.output_tokens,
    }
    whole = {
        "id": "resp_1",
        "object": "response",
        "created_at": 1_700_000_000,
        "status": "completed",
        "model": answer.model,
        "output": [item],
        "usage": usage,
        "error": None,
        "incomplete_details": None,
        "instructions": body.get("instructions"),
        "metadata": {},
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": body.get("tools", []),
        "top_p": 1.0,
    }
    return whole, numbered(response_events(whole, item))


def response_events(whole: dict[str, Any], item: dict[str, Any]) -> Iterator[dict[str, Any]]:
    begun = {**whole, "status": "in_progress", "output": [], "usage": None}
    where = {"item_id": item["id"], "output_index": 0}
    yield {"type": "response.created", "response": begun}
    yield {"type": "response.in_progress", "response": begun}
    if item["type"] == "message":
        [part] = item["content"]
        opened = {**item, "status": "in_progress", "content": []}
        yield {"type": "response.output_item.added", "output_index": 0, "item": opened}
        place = {**where, "content_index": 0}
        yield {"type": "response.content_part.added", **place, "part": {**part, "text": ""}}
        for word in words_of(part["text"]):
            yield {"type": "response.output_text.delta", **place, "delta": word, "logprobs": []}
        yield {"type": "response.output_text.done", **place, "text": part["text"], "logprobs": []}
        yield {"type": "response.content_part.done", **place, "part": part}
    else:
        opened = {**item, "status": "in_progress", "arguments": ""}
        yield {"type": "response.output_item.added", "output_index": 0, "item": opened}
        for piece in words_of(item["arguments"]):
            yield {"type": "response.function_call_arguments.delta", **where, "delta": piece}
        done = {"arguments": item["arguments"], "name": item["name"]}
        yield {"type": "response.function_call_arguments.done", **where, **done}
    yield {"type": "response.output_item.done", "output_index": 0, "item": item}
    yield {"type": "response.completed", "response": whole}


def numbered(events: Iterator[dict[str, Any]]) -> list[str]:
    return [named(event["type"], {**event, "sequence_number": number}) for number, event in enumerate(events)]


# --- OpenAI: embeddings ---


async def embeddings(request: Request) -> Response:
    body = await request.json()
    texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
    entries = [
        {"object": "embedding", "index": index, "embedding": [float(len(str(text))), 1.0, 0.5]}
        for index, text in enumerate(texts)
    ]
    tokens = sum(len(str(text).split()) for text in texts)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse({"object": "list", "data": entries, "model": body["model"], "usage": usage})


# --- Anthropic: messages ---


def anthropic_message(body: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    messages = body["messages"]
    content = messages[-1].get("content")
    blocks = [block for block in content if isinstance(block, dict)] if isinstance(content, list) else []
    results = [text_of(block.get("content")) for block in blocks if block.get("type") == "tool_result"]
    tools = [(tool["name"], tool.get("input_schema", {})) for tool in body.get("tools", [])]
    form = (body.get("output_config") or {}).get("format")
    answer = answer_to(body["model"], messages, tools, results[-1] if results else None, form)
    if answer.call is None:
        block: dict[str, Any] = {"type": "text", "text": answer.text}
        stop = "end_turn"
    else:
        block = {"type": "tool_use", "id": f"toolu_{len(messages)}", "name": answer.call.name}
        block["input"] = answer.call.arguments
        stop = "tool_use"
    whole = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": answer.model,
        "content": [block],
        "stop_reason": stop,
        "stop_sequence": None,
        "usage": {"input_tokens": answer.input_tokens, "output_tokens": answer.output_tokens},
    }
    return whole, [named(event["type"], event) for event in anthropic_events(whole, block, stop)]


def anthropic_events(whole: dict[str, Any], block: dict[str, Any], stop: str) -> Iterator[dict[str, Any]]:
    usage = whole["usage"]
    begun = {**whole, "content": [], "stop_reason": None, "usage": {**usage, "output_tokens": 1}}
    yield {"type": "message_start", "message": begun}
    is_text = block["type"] == "text"
    opened = {**block, "text": ""} if is_text else {**block, "input": {}}
    yield {"type": "content_block_start", "index": 0, "content_block": opened}
    for part in words_of(block["text"] if is_text else json.dumps(block["input"])):
        delta = (
            {"type": "text_delta", "text": part}
            if is_text
            else {"type": "input_json_delta", "partial_json": part}
        )
        yield {"type": "content_block_delta", "index": 0, "delta": delta}
    yield {"type": "content_block_stop", "index": 0}
    ending = {"stop_reason": stop, "stop_sequence": None}
    yield {"type": "message_delta", "delta": ending, "usage": {"output_tokens": usage["output_tokens"]}}
    yield {"type": "message_stop"}
