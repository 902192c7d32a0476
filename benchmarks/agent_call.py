"""What capture adds to the agent's own call, by the size of the trace.

In process, without a server: an agent of eight spans under four recorders, each in a process of its own,
driven in turns, a block of calls at a time, so that whatever else the machine does hits all alike.
"""

import gc
import importlib
import multiprocessing
import os
import random
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from time import perf_counter_ns, thread_time_ns
from typing import Any, Final

from benchmarks.report import Axes, Result, Target, main, scaled, write
from benchmarks.workload import agent_run
from deploy.bench import percentile

SIZES: Final = {"10 KB": 10_000, "100 KB": 100_000, "1 MB": 1_000_000, "10 MB": 10_000_000}
BLOCKS: Final = {"10 KB": (50, 20), "100 KB": (40, 20), "1 MB": (40, 10), "10 MB": (24, 5)}
"""Blocks per recorder, and calls in a block, by the size of the trace."""
WARM_UP: Final = 3
SPANS: Final = 8
SEED: Final = 4

OFF, OPENTELEMETRY, TRACELAKE, MLFLOW = "off", "opentelemetry", "tracelake", "mlflow"
RECORDERS: Final = {
    OFF: {"ENABLE_MLFLOW_TRACING": "false"},
    OPENTELEMETRY: {"ENABLE_MLFLOW_TRACING": "false"},
    TRACELAKE: {"ENABLE_MLFLOW_TRACING": "true"},
    # As on Databricks' servers. MLflow asks for the tracking URI at each span, and never calls it here.
    MLFLOW: {
        "ENABLE_MLFLOW_TRACING": "true",
        "IS_IN_DB_MODEL_SERVING_ENV": "true",
        "MLFLOW_TRACKING_URI": "databricks",
    },
}
"""The environment of each recorder's process."""

PLOTTED_MS: Final = (0.1, 400)
"""From where to where plots reach."""
PUBLISHED: Final = {"10 KB": (1.0, 1.0), "1 MB": (50.0, 100.0), "10 MB": (150.0, 150.0)}
"""Databricks' table of its tracing's overhead per request, ms from and to; at 10 MB it says "and more"."""

ADDED_LIMIT_MS: Final = 0.5
FLAT_LIMIT: Final = 1.3
MLFLOW_LIMITS: Final = {"10 KB": 3.0, "1 MB": 12.0, "10 MB": 100.0}
PER_SPAN_LIMIT_US: Final = 50.0

REPLY_SECONDS: Final = 60.0
"""A block takes a second or two; a process that takes longer hangs."""

LABELS: Final = {
    MLFLOW: "MLflow's inference-table path",
    TRACELAKE: "tracelake",
    OPENTELEMETRY: "8 spans of OpenTelemetry's SDK alone",
}
QUESTION: Final = "What does capture add to the agent's own call, by the size of the trace?"
NOTES: Final = [
    "An agent of 8 spans, in process, without a server. Added: beyond the same agent with "
    "`mlflow.tracing.disable()`; medians, four processes in turns.",
    "opentelemetry: what 8 nested spans of the plain SDK add, without attributes or processors.",
    "mlflow: `InferenceTableSpanExporter`, and `pop_trace` within the call, as the original does before "
    "it replies. Ours encodes after the reply, in another thread: see added_latency and neighbour.",
    "counted by our hooks: what of this is in `capture_overhead_us`.",
    "values: what the inputs and outputs hold as JSON, containers included. A snapshot costs by these, not "
    "by bytes, and runs with more text have more messages, documents and rows too.",
]


@dataclass
class Samples:
    """Nanoseconds of each call: by the clock, of processor time, and what our own span hooks counted."""

    wall: list[int] = field(default_factory=list)
    cpu: list[int] = field(default_factory=list)
    own: list[int] = field(default_factory=list)

    def extend(self, other: "Samples") -> None:
        self.wall += other.wall
        self.cpu += other.cpu
        self.own += other.own


# --- in a recorder's process ---


class Off:
    """MLflow's tracing is disabled; its decorators are still there."""

    spans = 0
    """How many spans it records of a call."""

    def agent(self, size: int) -> Callable[[], object]:
        from benchmarks.agent import agent

        return agent(size, SEED)

    def call(self, agent: Callable[[], object]) -> None:
        """Timed: the agent, and what records it."""
        agent()

    def end(self) -> tuple[int, int]:
        """Not timed: drop what was recorded; the number of spans, and nanoseconds that our hooks counted."""
        return 0, 0


class OpenTelemetry(Off):
    """Beside that, eight nested spans of OpenTelemetry's SDK: no attributes, and nobody listens."""

    def __init__(self) -> None:
        from opentelemetry.sdk.trace import TracerProvider

        self._tracer = TracerProvider().get_tracer("benchmarks")

    def agent(self, size: int) -> Callable[[], object]:
        from benchmarks.agent import traced

        root, *steps = agent_run(size, SEED)
        within = [partial(self._spanned, step.name, traced(step, [])) for step in steps]
        return partial(self._spanned, root.name, traced(root, within))

    def _spanned(self, name: str, call: Callable[[], object]) -> object:
        with self._tracer.start_as_current_span(name):
            return call()


class Tracelake(Off):
    """What :mod:`serving.recorder` does around an agent. Encoding comes later and elsewhere."""

    spans = SPANS

    def __init__(self) -> None:
        from serving import tracing

        tracing.ensure_installed()
        self._tracing = tracing
        self._traces: Any = None

    def call(self, agent: Callable[[], object]) -> None:
        self._tracing.ensure_installed()
        self._traces = traces = self._tracing.RequestTraces("benchmark")
        token = self._tracing.CURRENT.set(traces)
        try:
            agent()
        finally:
            self._tracing.CURRENT.reset(token)

    def end(self) -> tuple[int, int]:
        traces, self._traces = self._traces, None
        return sum(len(trace.spans) for trace in traces.seal()), traces.overhead_ns


class MLflow(Off):
    """MLflow's own inference-table path, with the trace popped from its buffer before the reply."""

    spans = SPANS

    def __init__(self) -> None:
        self._context = prediction_context()
        from mlflow.tracing.export import inference_table

        self._pop: Callable[[str], Any] = inference_table.pop_trace
        self._trace: Any = None

    def call(self, agent: Callable[[], object]) -> None:
        with self._context("benchmark"):
            agent()
        self._trace = self._pop("benchmark")

    def end(self) -> tuple[int, int]:
        trace, self._trace = self._trace, None
        return len(trace["data"]["spans"]) if trace else 0, 0


def prediction_context() -> Any:
    """``set_prediction_context(Context(request_id=...))`` of MLflow, by which its recorder knows the request.

    The light SDK looks for it and lacks it, so it gets what full MLflow has: a context variable.
    """
    try:
        found = importlib.import_module("mlflow.pyfunc.context")
    except ImportError:
        pass
    else:
        return lambda request_id: found.set_prediction_context(found.Context(request_id=request_id))

    current: ContextVar[Any] = ContextVar("mlflow_prediction_request_context", default=None)

    @contextmanager
    def setting(request_id: str) -> Iterator[None]:
        token = current.set(
            types.SimpleNamespace(
                request_id=request_id, dependencies_schemas=None, model_id=None, endpoint_name=None
            )
        )
        try:
            yield
        finally:
            current.reset(token)

    pyfunc, context = types.ModuleType("mlflow.pyfunc"), types.ModuleType("mlflow.pyfunc.context")
    vars(context)["get_prediction_context"] = current.get
    sys.modules.update({"mlflow.pyfunc": pyfunc, "mlflow.pyfunc.context": context})
    return setting


KINDS: Final = {OFF: Off, OPENTELEMETRY: OpenTelemetry, TRACELAKE: Tracelake, MLFLOW: MLflow}


def work(recorder: str, parent: "Connection[Samples, tuple[int, int] | None]") -> None:
    """A recorder's process: measures as many calls of the size that it is told to, again and again."""
    # Before MLflow is imported. With an experiment it would send traces to its server as well.
    os.environ.pop("MLFLOW_EXPERIMENT_ID", None)
    os.environ.update(RECORDERS[recorder])
    kind = KINDS[recorder]()
    while (order := parent.recv()) is not None:
        parent.send(measure(kind, *order))


def measure(kind: Off, size: int, count: int) -> Samples:
    agent, samples = kind.agent(size), Samples()
    gc.collect()  # what others left behind is not for these calls to clean up
    # The first call, which finds the processor's caches as another process left them, does not count.
    for counts in [False] + [True] * count:
        cpu = thread_time_ns()
        started = perf_counter_ns()
        kind.call(agent)
        wall = perf_counter_ns() - started
        cpu = thread_time_ns() - cpu
        spans, own = kind.end()
        if spans != kind.spans:
            raise RuntimeError(f"{type(kind).__name__} recorded {spans} spans of {kind.spans}")
        if counts:
            samples.extend(Samples([wall], [cpu], [own]))
    return samples


# --- in the process that drives them ---


@contextmanager
def recording(recorder: str) -> Iterator[Callable[[int, int], Samples]]:
    """A recorder's process, as a function of size and count."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=work, args=(recorder, theirs), daemon=True)
    process.start()
    theirs.close()  # so that we see the end of it if it dies

    def run(size: int, count: int) -> Samples:
        ours.send((size, count))
        if not ours.poll(REPLY_SECONDS):
            raise TimeoutError(f"{recorder}: {count} calls took longer than {REPLY_SECONDS:.0f} s")
        try:
            samples: Samples = ours.recv()
        except EOFError:
            raise RuntimeError(f"the process of {recorder!r} has ended; it said why above") from None
        return samples

    try:
        yield run
        ours.send(None)
        process.join(10)
    finally:
        process.kill()
        process.join()


def measured() -> dict[str, dict[str, Samples]]:
    """Samples by size and recorder."""
    with ExitStack() as stack:
        runs = {recorder: stack.enter_context(recording(recorder)) for recorder in RECORDERS}
        return {name: in_turns(runs, name) for name in SIZES}


def in_turns(runs: dict[str, Callable[[int, int], Samples]], name: str) -> dict[str, Samples]:
    blocks, calls = BLOCKS[name]
    found = {recorder: Samples() for recorder in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    for recorder in order:
        runs[recorder](SIZES[name], WARM_UP)
    for _ in range(scaled(blocks)):
        shuffle(order)  # so that none always comes after the same
        for recorder in order:
            found[recorder].extend(runs[recorder](SIZES[name], calls))
    return found


def ms(nanoseconds: list[int], share: float = 0.5) -> float:
    return percentile(nanoseconds, share) / 1e6


def run() -> None:
    found = measured()
    rows = [row(name, recorder, found[name]) for name in SIZES for recorder in RECORDERS]
    write(Result("agent_call", QUESTION, rows, targets(found), NOTES), lambda axes: plot(axes, found))


def added(by_recorder: dict[str, Samples], recorder: str, share: float = 0.5) -> float:
    """Milliseconds of the clock beyond the agent without tracing."""
    return ms(by_recorder[recorder].wall, share) - ms(by_recorder[OFF].wall, share)


def row(name: str, recorder: str, by_recorder: dict[str, Samples]) -> dict[str, object]:
    samples, off = by_recorder[recorder], by_recorder[OFF]
    found: dict[str, object] = {
        "trace": name,
        "values": values_of(SIZES[name]),
        "recorder": recorder,
        "calls": len(samples.wall),
        "median ms": ms(samples.wall),
        "p99 ms": ms(samples.wall, 0.99),
        "CPU ms": ms(samples.cpu),
    }
    if recorder != OFF:
        found["added ms"] = added(by_recorder, recorder)
        found["added CPU ms"] = ms(samples.cpu) - ms(off.cpu)
        found["added p99 ms"] = added(by_recorder, recorder, 0.99)
    if recorder == TRACELAKE:
        found["per span beyond OpenTelemetry µs"] = per_span_us(by_recorder)
        found["counted by our hooks ms"] = ms(samples.own)
    if recorder == MLFLOW:
        found["times ours"] = times_ours(by_recorder)
    return found


def per_span_us(by_recorder: dict[str, Samples]) -> float:
    return (added(by_recorder, TRACELAKE) - added(by_recorder, OPENTELEMETRY)) * 1000 / SPANS


def times_ours(by_recorder: dict[str, Samples]) -> float:
    return added(by_recorder, MLFLOW) / added(by_recorder, TRACELAKE)


def values_of(size: int) -> int:
    """How many values, containers among them, the agent's inputs and outputs hold as JSON."""
    return sum(count(step.inputs) + count(step.outputs) for step in agent_run(size, SEED))


def count(value: object) -> int:
    if isinstance(value, dict):
        return 1 + sum(map(count, value.values()))
    if isinstance(value, list):
        return 1 + sum(map(count, value))
    return 1


def targets(found: dict[str, dict[str, Samples]]) -> list[Target]:
    ours = {name: added(found[name], TRACELAKE) for name in SIZES}
    return [
        *(Target(f"added to the agent's call at {name}", ADDED_LIMIT_MS, ours[name], "ms") for name in SIZES),
        Target("flat: added at 10 MB against 10 KB", FLAT_LIMIT, ours["10 MB"] / ours["10 KB"], "x"),
        *(
            Target(
                f"MLflow's inference-table path adds, at {name}",
                limit,
                times_ours(found[name]),
                "x ours",
                False,
            )
            for name, limit in MLFLOW_LIMITS.items()
        ),
        Target(
            "per span beyond OpenTelemetry's SDK, the worst size",
            PER_SPAN_LIMIT_US,
            max(per_span_us(by_recorder) for by_recorder in found.values()),
            "µs",
        ),
    ]


def plot(axes: Axes, found: dict[str, dict[str, Samples]]) -> None:
    for recorder, label in LABELS.items():
        on_sizes(axes, {name: added(found[name], recorder) for name in SIZES}, label)
    draw_published(axes, "ms added to the agent's call, median")


def on_sizes(axes: Axes, values: dict[str, float], label: str) -> None:
    """A line of milliseconds by the size of the trace."""
    axes.plot([SIZES[name] for name in values], list(values.values()), marker="o", label=label)


def draw_published(axes: Axes, what: str) -> None:
    """The original's published figures as bars behind the lines, and the axes for both."""
    label = "Databricks' published overhead"
    for name, (low, high) in PUBLISHED.items():
        middle, reach = SIZES[name], 0.2 * SIZES[name]
        axes.bar(middle, high, width=2 * reach, color="lightgrey", zorder=0, label=label)
        axes.plot([middle - reach, middle + reach], [low, low], color="grey", linewidth=1, zorder=1)
        label = ""  # named once
    axes.text(SIZES["10 MB"], PUBLISHED["10 MB"][1], "and more", ha="center", va="bottom", fontsize="small")
    axes.set(xscale="log", yscale="log", xlabel="trace", ylabel=what, ylim=PLOTTED_MS)
    axes.set_xticks(list(SIZES.values()), list(SIZES))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.legend(fontsize="small")


if __name__ == "__main__":
    main(run)
