"""One process that calls MLflow's store on a table, and says how long each call took."""

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["QUESTIONS", "measure"]

Question = Mapping[str, Any]

QUESTIONS: dict[str, Question] = {
    "list 200, newest first": {},
    "status = 'ERROR'": {"filter_string": "attributes.status = 'ERROR'"},
    "execution time above a second": {"filter_string": "attributes.execution_time_ms > 1000"},
    "one session": {"filter_string": "metadata.`mlflow.trace.session` = 'session-77'"},
    "a tag that no trace has": {"filter_string": "tags.absent = 'x'"},
    "a feedback that no trace has": {"filter_string": "feedback.absent = 'x'"},
    "span.type = 'TOOL'": {"filter_string": "span.type ILIKE 'TOOL'"},
    "a span's name that none has": {"filter_string": "span.name ILIKE '%absent%'"},
    "search box, in one trace of 100": {"filter_string": "trace.text ILIKE '%{word}%'"},
    "search box, in none": {"filter_string": "trace.text ILIKE '%nobody wrote this%'"},
    "slowest 200": {"order_by": ["execution_time DESC"]},
}
"""What the list is asked for, by name."""


def measure(uri: str, word: str, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each call, the first one first; and ``memory MB``, at its most."""
    from mlflow.entities.trace_metrics import AggregationType, MetricAggregation, MetricViewType

    from inference_table.mlflow_store import tracking_store

    store = tracking_store(uri)
    place = [store.experiment_id]
    found: dict[str, list[float]] = {}

    def search(asked: Question, page_token: str | None = None) -> str | None:
        filter_string = asked.get("filter_string", "").replace("{word}", word)
        infos, token = store.search_traces(place, filter_string, 200, asked.get("order_by"), page_token)
        ids.extend(info.trace_id for info in infos)
        return token

    ids: list[str] = []
    for name, asked in QUESTIONS.items():
        found[name] = timed(lambda asked=asked: search(asked), repeats)  # type: ignore[misc]
    second = search({})
    found["the next 200"] = timed(lambda: search({}, second), repeats)
    shown = iter(ids)
    found["get_trace, of a listed one"] = timed(lambda: store.get_trace(next(shown)), repeats)
    count = [MetricAggregation(AggregationType.COUNT)]
    for view, metric in ((MetricViewType.TRACES, "trace_count"), (MetricViewType.SPANS, "span_count")):
        ask = (place, view, metric, count)
        found[f"chart: {metric} of all"] = timed(lambda ask=ask: store.query_trace_metrics(*ask), repeats)  # type: ignore[misc]
    found["memory MB"] = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]
    return found


def timed(call: Callable[[], Any], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1000)
        # What takes seconds is the same each time.
        if statistics.fmean(times) > 1000 and len(times) >= 3:
            break
    return times


if __name__ == "__main__":
    uri, word, repeats = sys.argv[1:]
    sys.stdout.write(json.dumps(measure(uri, word, int(repeats))) + "\n")
