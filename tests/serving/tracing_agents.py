"""Agents and values for the tests of trace collection, and the two ways to record them."""

import asyncio
import contextlib
import dataclasses
import datetime
import decimal
import enum
import inspect
import json
import math
import pathlib
import uuid
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import mlflow
import numpy as np
import pydantic
from mlflow.entities import Document, Link, SpanEvent, SpanType, Trace
from mlflow.entities.span import NO_OP_SPAN_TRACE_ID, NoOpSpan
from mlflow.tracing import provider as mlflow_provider
from mlflow.tracing.processor.mlflow_v3 import MlflowV3SpanProcessor
from mlflow.tracing.trace_manager import InMemoryTraceManager
from mlflow.tracing.utils import TraceJSONEncoder
from mlflow.tracing.utils.once import Once
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from inference_table.record import EncodedTrace
from serving import tracing
from serving.tracing import RequestTraces


@contextlib.contextmanager
def request(request_id: str = "request-1", **options: Any) -> Iterator[RequestTraces]:
    """The scope of one captured request, as the middleware makes it."""
    tracing.ensure_installed()
    traces = RequestTraces(request_id, **options)
    token = tracing.CURRENT.set(traces)
    try:
        yield traces
    finally:
        tracing.CURRENT.reset(token)


def load(encoded: EncodedTrace) -> Trace:
    return Trace.from_dict(json.loads(encoded.json))


def sealed(traces: RequestTraces) -> list[Trace]:
    return [load(snapshot.encode()) for snapshot in traces.seal()]


def record(agent: Callable[[], Any]) -> Trace:
    """The first trace of an agent run in a captured request."""
    with request() as traces:
        agent()
    return sealed(traces)[0]


class PoppingExporter(SpanExporter):
    """Takes finished traces out of MLflow's manager, as MLflow's exporters do."""

    def __init__(self) -> None:
        self.traces: list[Trace] = []

    def export(self, spans: Any) -> SpanExportResult:
        manager = InMemoryTraceManager.get_instance()
        for span in spans:
            if span.parent is None and (popped := manager.pop_trace(span.context.trace_id)):
                self.traces.append(popped.trace)
        return SpanExportResult.SUCCESS


@contextlib.contextmanager
def mlflow_recording() -> Iterator[list[Trace]]:
    """MLflow's own provider and processor in place of ours."""
    exporter = PoppingExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(MlflowV3SpanProcessor(exporter, export_metrics=False))
    once = Once()
    once._done = True
    mlflow_provider.provider._isolated_tracer_provider_once = once
    mlflow_provider.provider.set(provider)
    try:
        yield exporter.traces
    finally:
        tracing.ensure_installed()


def record_with_mlflow(agent: Callable[[], Any]) -> Trace:
    """The trace that MLflow itself records, through the JSON that its serving path would send."""
    with mlflow_recording() as traces:
        agent()
    return Trace.from_dict(json.loads(json.dumps(traces[0].to_dict(), cls=TraceJSONEncoder)))


class Client:
    """The part of full MLflow's ``MlflowClient`` that deals with live spans, as it is written there.

    The light SDK has no ``MlflowClient``.
    """

    def start_trace(self, name: str, **options: Any) -> Any:
        return mlflow.start_span_no_context(name, **options)

    def start_span(self, name: str, trace_id: str, parent_id: str, **options: Any) -> Any:
        if trace_id == NO_OP_SPAN_TRACE_ID:
            return NoOpSpan()
        parent = InMemoryTraceManager.get_instance().get_span_from_id(trace_id, parent_id)
        assert parent is not None
        return mlflow.start_span_no_context(name, parent_span=parent, **options)

    def end_span(self, trace_id: str, span_id: str, outputs: Any = None, status: str = "OK") -> None:
        if span := InMemoryTraceManager.get_instance().get_span_from_id(trace_id, span_id):
            span.end(outputs, None, status, None)

    def end_trace(self, trace_id: str, outputs: Any = None, status: str = "OK") -> None:
        if trace_id == NO_OP_SPAN_TRACE_ID:
            return
        root_id = InMemoryTraceManager.get_instance().get_root_span_id(trace_id)
        assert root_id is not None
        self.end_span(trace_id, root_id, outputs, status)


# --- values ---


class Message(pydantic.BaseModel):
    role: str
    content: str
    at: datetime.datetime = datetime.datetime(2026, 1, 2, 3, 4, 5)
    score: float = math.nan


@dataclasses.dataclass
class Step:
    name: str
    parents: tuple[str, ...] = ()
    message: Any = None


class Color(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Mode(enum.StrEnum):
    FAST = "fast"


class Shout(str):
    def __str__(self) -> str:
        return self.upper() + "!"


class Rows(dict):  # type: ignore[type-arg]
    pass


class Odd:
    """Neither text form is a plain one."""

    def __repr__(self) -> str:
        return '<Odd "quoted" \n>'


class Unconvertible:
    """Fails as MLflow's encoder expects, with a TypeError."""

    def __str__(self) -> str:
        raise TypeError("no text form")

    def __repr__(self) -> str:
        return "<Unconvertible>"


Point = namedtuple("Point", "x y")


def circular() -> Any:
    value: dict[str, Any] = {"name": "loop"}
    value["self"] = [value]
    return value


def circular_dataclass() -> Any:
    step = Step("loop")
    step.message = {"back": step}
    return {"step": step}


def nested(levels: int) -> Any:
    value: Any = "bottom"
    for level in range(levels):
        value = {"level": value} if level % 2 else [value]
    return value


VALUES: dict[str, Callable[[], Any]] = {
    "text": lambda: "plain",
    "empty": lambda: {"text": "", "list": [], "dict": {}, "none": None},
    "unicode": lambda: {"greek": "αβγ", "emoji": "👩‍👩‍👧", "controls": "\x00\n\t\x7f\u2028"},
    "scalars": lambda: [True, False, None, 0, -1, 2**63, -(2**63), 2**64 - 1, 1.5, -0.0, 1e300, 5e-324],
    "pydantic": lambda: {"messages": [Message(role="user", content="hi")]},
    "pydantic root": lambda: Message(role="user", content="hi"),
    "dataclass": lambda: Step("a", ("b", "c"), Message(role="user", content="é")),
    "dataclass class": lambda: Step,
    "tuple": lambda: (1, (2, ("three",)), [4]),
    "namedtuple": lambda: {"point": Point(1, 2)},
    "set": lambda: {"set": {1}, "frozen": frozenset({"a"})},
    "numpy": lambda: {
        "array": np.arange(6).reshape(2, 3),
        "float64": np.float64(0.25),
        "float32": np.float32(0.5),
        "int": np.int64(7),
        "bool": np.bool_(True),
        "nan": np.float64("nan"),
    },
    "bytes": lambda: {"bytes": b"\x00\xff'", "array": bytearray(b"x")},
    "nan": lambda: {"nan": math.nan, "values": [math.inf, -math.inf, 1.0]},
    "embedding": lambda: [0.1 * i for i in range(500)],
    "embedding with nan": lambda: [0.5] * 100 + [math.nan],
    "keys": lambda: {1: "int", 1.5: "float", False: "bool", None: "none", math.inf: "inf", Mode.FAST: "str"},
    "colliding keys": lambda: {1: "int", "1": "str"},
    "impossible keys": lambda: {"a": {frozenset({1}): "set"}},
    "circular": circular,
    "circular dataclass": circular_dataclass,
    "big integers": lambda: {"big": 2**64, "huge": -(10**400), "list": [2**70] * 30},
    "lone surrogates": lambda: {"a\ud800": ["b\udfff", "plain"]},
    "datetime": lambda: {
        "at": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
        "day": datetime.date(2026, 1, 1),
    },
    "enum": lambda: [Color.RED, Level.HIGH, Mode.FAST, {"c": Color.RED}],
    "subclasses": lambda: {
        "str": Shout("hey"),
        "dict": Rows(a=1),
        "ordered": OrderedDict(b=2),
        "default": defaultdict(list, c=[1]),
    },
    "ids and paths": lambda: [uuid.UUID(int=5), pathlib.PurePosixPath("/a/b"), decimal.Decimal("1.10")],
    "objects": lambda: {
        "odd": Odd(),
        "type": Odd,
        "range": range(3),
        "function": len,
        "error": ValueError("x"),
    },
    "failing conversion": lambda: {"good": 1, "bad": Unconvertible()},
    "nested": lambda: nested(150),
    "nested deeply": lambda: nested(500),
    "long": lambda: {"text": "0123456789" * 1_000_000},
    "long list": lambda: [{"i": i, "s": str(i)} for i in range(5_000)],
    "chat": lambda: {
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "the question " * 200}]
    },
    "chat parts": lambda: {"input": [{"role": "user", "content": [{"type": "text", "text": "part"}]}]},
    "completion": lambda: {"choices": [{"message": {"role": "assistant", "content": "the answer"}}]},
    "responses": lambda: {
        "output": [{"role": "assistant", "content": [{"type": "output_text", "text": "t"}]}]
    },
    "nested request": lambda: {"request": Message(role="user", content="x"), "messages": []},
}


# --- agents ---


def values_agent(make: Callable[[], Any]) -> Callable[[], Any]:
    """Records a value wherever one can be: as inputs, outputs and attributes, of a root and of a child."""

    def agent() -> None:
        with mlflow.start_span("root") as root:
            root.set_inputs(make())
            with mlflow.start_span("child", span_type=SpanType.TOOL, attributes={"given": make()}) as child:
                child.set_inputs({"nested": make()})
                child.set_attribute("value", make())
                child.set_outputs(make())
            root.set_outputs(make())

    return agent


@mlflow.trace(span_type=SpanType.RETRIEVER)
def retrieve(query: str) -> list[Document]:
    return [Document(page_content=f"{query} {i}", metadata={"source": i}, id=str(i)) for i in range(3)]


@mlflow.trace(span_type=SpanType.CHAT_MODEL, attributes={"temperature": 0.5})
def call_model(messages: list[dict[str, Any]]) -> dict[str, Any]:
    span = mlflow.get_current_active_span()
    if span is not None:  # tracing may be off
        span.set_attribute(
            "mlflow.chat.tokenUsage", {"input_tokens": 7, "output_tokens": 5, "total_tokens": 12}
        )
        span.set_attribute("mlflow.llm.model", "a-model-with-no-price")
    return {"choices": [{"message": {"role": "assistant", "content": "answer"}}]}


@mlflow.trace(span_type=SpanType.AGENT)
def chat_agent(messages: list[dict[str, Any]]) -> str:
    retrieve(messages[-1]["content"])
    reply = call_model(messages)
    messages.append(reply["choices"][0]["message"])
    call_model(messages)
    messages.clear()
    return "done"


def chat() -> None:
    chat_agent([{"role": "user", "content": "question"}])


@mlflow.trace
def updating() -> str:
    mlflow.update_current_trace(
        tags={"tag": "1"},
        metadata={"meta": "2", "long": "x" * 400},
        session_id="session-1",
        user="user-1",
        request_preview="my request",
        response_preview="my response",
        state="ERROR",
    )
    return "updated"


def in_context() -> None:
    with mlflow.tracing.context(metadata={"m": "1"}, tags={"t": "2"}, session_id="s", user="u"):
        updating()


@mlflow.trace
def failing_tool() -> None:
    raise ValueError("tool failed: é")


@mlflow.trace
def failing_agent() -> str:
    with contextlib.suppress(ValueError):
        failing_tool()
    raise KeyError("agent failed")


def failing() -> None:
    with contextlib.suppress(KeyError):
        failing_agent()


@mlflow.trace(output_reducer=lambda chunks: "".join(chunks))
def words(text: str) -> Iterator[str]:
    for word in text.split():
        with mlflow.start_span(f"word {word}"):
            pass
        yield word


@mlflow.trace
def failing_stream() -> Iterator[Any]:
    yield {"chunk": Step("a")}
    raise RuntimeError("stream broke")


@mlflow.trace
def streaming_agent() -> int:
    with contextlib.suppress(RuntimeError):
        list(failing_stream())
    return len(list(words("one two three")))


@mlflow.trace
async def slow(x: int) -> int:
    await asyncio.sleep(0)
    return x


@mlflow.trace
async def ticks(count: int) -> Any:
    for i in range(count):
        yield await slow(i)


@mlflow.trace
async def async_agent() -> int:
    first = await slow(1)
    second = await slow(2)
    return first + second + sum([tick async for tick in ticks(3)])


def asynchronous() -> None:
    asyncio.run(async_agent())


# MLflow 3.17 and later take a description.
DESCRIBED: dict[str, Any] = (
    {"description": "says nothing"}
    if "description" in inspect.signature(mlflow.start_span_no_context).parameters
    else {}
)


def manual() -> None:
    """The client API's primitives: explicit parents, times, events, links, statuses, levels."""
    root = mlflow.start_span_no_context(
        "root", inputs={"a": 1}, tags={"t": "v"}, metadata={"m": "v"}, attributes={"x": [1]}
    )
    child = mlflow.start_span_no_context("child", parent_span=root, span_type="CUSTOM", log_level="WARNING")
    child.add_event(SpanEvent("event", timestamp=1, attributes={"k": "v", "n": 1, "l": [1, 2]}))
    child.add_link(Link("tr-" + "ab" * 16, "cd" * 8, {"why": "because"}))
    child.set_status("ERROR")
    child.end(outputs=[1], attributes={"late": True})
    silent = mlflow.start_span_no_context("silent", parent_span=root, **DESCRIBED)
    silent.record_exception("a text")
    silent.end(status="OK")
    root.set_attribute("", "no name")
    root.set_attribute("twice", 1)
    root.set_attribute("twice", 2)
    root.end(outputs="bye", status="OK")


def nested_spans(levels: int) -> Callable[[], None]:
    def agent() -> None:
        spans = [mlflow.start_span_no_context("0")]
        for level in range(1, levels):
            spans.append(mlflow.start_span_no_context(str(level), parent_span=spans[-1]))
        for span in reversed(spans):
            span.set_attribute(
                "mlflow.chat.tokenUsage", {"input_tokens": 1, "output_tokens": 1, "total_tokens": 2}
            )
            span.end()

    return agent


def many_spans(count: int) -> Callable[[], None]:
    def agent() -> None:
        with mlflow.start_span("root") as root:
            for i in range(count - 1):
                mlflow.start_span_no_context("step", parent_span=root, inputs={"i": i}).end()

    return agent


AGENTS: dict[str, Callable[[], Any]] = {
    "chat": chat,
    "updating": updating,
    "context": in_context,
    "failing": failing,
    "streaming": streaming_agent,
    "async": asynchronous,
    "manual": manual,
    "nested spans": nested_spans(500),
    "many spans": many_spans(10_000),
}
