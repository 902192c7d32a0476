"""Spans of threads that an agent starts belong to its request, under the span that was active there."""

import asyncio
import contextvars
import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool
from typing import Any

import mlflow
import pytest

from inference_table import metrics
from serving.threads import carry_into_threads
from serving.tracing import CURRENT
from tests.serving.tracing_agents import request, sealed

OTHERS = contextvars.ContextVar("others", default="unset")


def work(name: str) -> str:
    with mlflow.start_span(name):
        return name


def parents(traces: Any) -> dict[str, str | None]:
    """Of each span of the only trace, the name of its parent."""
    (trace,) = sealed(traces)
    names = {span.span_id: span.name for span in trace.data.spans}
    assert len(set(names.values())) == len(names)
    return {span.name: names.get(span.parent_id) for span in trace.data.spans}


def by_thread(call: Callable[[], Any]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def by_subclass(call: Callable[[], Any]) -> None:
    class Worker(threading.Thread):
        def run(self) -> None:
            call()

    worker = Worker()
    worker.start()
    worker.join()


def by_timer(call: Callable[[], Any]) -> None:
    timer = threading.Timer(0.0, call)
    timer.start()
    timer.join()


def by_executor(call: Callable[[], Any]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(call).result()


def by_executor_map(call: Callable[[], Any]) -> None:
    with ThreadPoolExecutor(1) as pool:
        list(pool.map(lambda _: call(), [None]))


def by_thread_pool(call: Callable[[], Any]) -> None:
    with ThreadPool(1) as pool:
        pool.apply(call)
        pool.close()
        pool.join()


def by_event_loop(call: Callable[[], Any]) -> None:
    async def run() -> None:
        await asyncio.get_running_loop().run_in_executor(None, call)

    asyncio.run(run())


WAYS = [by_thread, by_subclass, by_timer, by_executor, by_executor_map, by_thread_pool, by_event_loop]


@pytest.mark.parametrize("run", WAYS)
def test_spans_in_another_thread_nest(run: Callable[[Callable[[], Any]], None]) -> None:
    """However a thread is started, its spans are children of the span that was active there."""
    with request() as traces, mlflow.start_span("root"), mlflow.start_span("step"):
        run(lambda: work("elsewhere"))
    assert parents(traces) == {"root": None, "step": "root", "elsewhere": "step"}


def test_threads_of_threads() -> None:
    """A thread that another thread started belongs to the request as well."""
    with request() as traces, mlflow.start_span("root"):

        def outer() -> None:
            with mlflow.start_span("outer"):
                by_thread(lambda: work("inner"))

        by_thread(outer)
    assert parents(traces) == {"root": None, "outer": "root", "inner": "outer"}


def test_a_thread_before_any_span() -> None:
    """A thread that is started where no span is active yet makes its own root in the request."""
    with request() as traces:
        by_thread(lambda: work("alone"))
    assert parents(traces) == {"alone": None}


def test_a_pool_that_serves_two_requests() -> None:
    """A pool's worker that was started in one request works for another too: each item keeps its own."""
    with ThreadPoolExecutor(1) as pool:

        def serve(name: str) -> Any:
            with request() as traces, mlflow.start_span(name):
                pool.submit(work, f"of {name}").result()
            return traces

        found = [parents(contextvars.Context().run(serve, name)) for name in ("first", "second")]
    assert found == [{"first": None, "of first": "first"}, {"second": None, "of second": "second"}]


def test_a_worker_forgets_the_request_that_started_it() -> None:
    """An item submitted outside of any request belongs to none, wherever its worker was started."""
    with ThreadPoolExecutor(1) as pool:
        with request() as traces, mlflow.start_span("root"):
            pool.submit(work, "inside").result()
        assert pool.submit(CURRENT.get).result() is None
        before = metrics.ORPHAN_TRACES._value.get()
        pool.submit(work, "outside").result()
        assert metrics.ORPHAN_TRACES._value.get() == before + 1
    assert parents(traces) == {"root": None, "inside": "root"}


def test_outside_of_requests_nothing_is_carried() -> None:
    """Threads of the application itself start as Python starts them."""
    carry_into_threads()
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.append(CURRENT.get()))
    thread.start()
    assert "run" not in vars(thread)
    thread.join()
    assert seen == [None]


def test_an_agents_own_context_variables_are_not_carried() -> None:
    """Only tracing is carried: a thread sees the agent's other context variables as without us, unset."""
    OTHERS.set("set")
    seen: list[str] = []
    with request():
        by_thread(lambda: seen.append(OTHERS.get()))
    assert seen == ["unset"]


def test_failures_come_out_as_ever() -> None:
    """What a thread or an item raises, and a second start, are what they are without us."""
    with request(), mlflow.start_span("root"):
        with ThreadPoolExecutor(1) as pool, pytest.raises(ZeroDivisionError):
            pool.submit(lambda: 1 / 0).result()
        with pytest.raises(RuntimeError, match="after shutdown"):
            pool.submit(work, "never")
        thread = threading.Thread(target=work, args=("once",))
        thread.start()
        thread.join()
        with pytest.raises(RuntimeError, match="only be started once"):
            thread.start()


def test_a_start_that_is_refused_can_be_tried_again() -> None:
    """A thread that the system had no room for does its work when it is started later."""
    done: list[str] = []
    with request() as traces, mlflow.start_span("root"):
        thread = threading.Thread(target=lambda: done.append(work("late")))
        before = threading.stack_size(2**46)  # more than there is
        try:
            with pytest.raises(RuntimeError, match="can't start new thread"):
                thread.start()
        finally:
            threading.stack_size(before)
        thread.start()
        thread.join()
    assert done == ["late"]
    assert parents(traces) == {"root": None, "late": "root"}


def test_a_finished_thread_is_not_kept_alive() -> None:
    """A thread of a request is gone when nobody holds it, without the garbage collector's help."""
    gc.disable()
    try:
        with request(), mlflow.start_span("root"):
            thread = threading.Thread(target=work, args=("once",))
            thread.start()
            thread.join()
        gone = weakref.ref(thread)
        del thread
        assert gone() is None
    finally:
        gc.enable()


def test_carrying_is_installed_once() -> None:
    """Installing again wraps nothing twice."""
    carry_into_threads()
    before = (threading.Thread.start, ThreadPoolExecutor.submit)
    carry_into_threads()
    assert (threading.Thread.start, ThreadPoolExecutor.submit) == before
