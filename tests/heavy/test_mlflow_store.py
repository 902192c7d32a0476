"""MLflow's client and API on an inference table: search, feedback, evaluation, datasets, charts."""

import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable

pytest.importorskip("mlflow.server", reason="needs the extra `heavy`: make test-all")
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

import mlflow
from mlflow.entities import AssessmentSource, Feedback, TraceInfo
from mlflow.entities.trace_location import TraceLocation
from mlflow.entities.trace_metrics import AggregationType, MetricAggregation, MetricViewType
from mlflow.entities.trace_state import TraceState
from mlflow.exceptions import MlflowException
from mlflow.genai import scorer
from mlflow.tracking import fluent

from inference_table.annotations import Annotation, AnnotationLog
from inference_table.commit import Committer, open_or_create_table
from inference_table.errors import SettingsError
from inference_table.mlflow_location import store_location, store_uri
from inference_table.mlflow_search import page_token
from inference_table.mlflow_store import InferenceTableStore, registry_store
from inference_table.settings import StorageSettings
from inference_table.spool import Spool
from inference_table.table import InferenceTable
from tests.heavy.ui_server import QUESTIONS, ROWS, SESSIONS, TURNS, fill
from tests.inference_table.rows import batch, commit_all
from tests.support import ROOT

pytestmark = [pytest.mark.heavy, pytest.mark.xdist_group("mlflow_store"), pytest.mark.timeout(600)]

FAILED = "attributes.status = 'ERROR'"
COUNT = [MetricAggregation(AggregationType.COUNT)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("store")
    fill(found)
    return found


@pytest.fixture(scope="module")
def table(folder: Path) -> InferenceTable:
    return InferenceTable(folder / "payload", spool_dir=folder / "spool")


@pytest.fixture(scope="module")
def uri(folder: Path) -> str:
    return store_uri(settings_of(folder))


@pytest.fixture(scope="module")
def store(uri: str) -> InferenceTableStore:
    return InferenceTableStore(uri)


@pytest.fixture
def experiment(uri: str, store: InferenceTableStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """MLflow's client at the table, by direct URI; the id of its experiment."""
    # What a test sets by `set_experiment` would be the experiment of those that follow in this process.
    monkeypatch.setattr(fluent, "_active_experiment_id", None)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "0")
    mlflow.set_tracking_uri(uri)
    yield store.experiment_id
    mlflow.set_tracking_uri(None)


def settings_of(folder: Path) -> StorageSettings:
    return StorageSettings(uri=str(folder / "payload"), spool_dir=folder / "spool")


def search(store: InferenceTableStore, filter_string: str | None = None, **options: Any) -> list[TraceInfo]:
    options = {"max_results": 1000, **options}
    return store.search_traces([store.experiment_id], filter_string, **options)[0]


def names(store: InferenceTableStore, trace_id: str) -> list[tuple[str, Any, bool | None]]:
    """Name, value and validity of the assessments of a trace."""
    return [(one.name, one.value, one.valid) for one in store.get_trace_info(trace_id).assessments]


def test_the_list_is_the_tables_traces_newest_first(
    store: InferenceTableStore, table: InferenceTable
) -> None:
    """Each is where MLflow's UI looks for it, and carries the id that its caller got."""
    found = search(store)
    rows = table.query("select * from payload order by request_time desc").to_dicts()
    assert [one.trace_id for one in found] == [row["trace_id"] for row in rows]
    assert [one.client_request_id for one in found] == [row["databricks_request_id"] for row in rows]
    assert {one.experiment_id for one in found} == {store.experiment_id}
    assert {one.tags["mlflow.trace.spansLocation"] for one in found} == {"TRACKING_STORE"}
    assert [one.request_time for one in found] == [
        int(row["request_time"].timestamp() * 1000) for row in rows
    ]
    assert store.search_traces(locations=[], max_results=1)[0][0].trace_id == rows[0]["trace_id"]


def test_a_trace_is_the_one_that_was_recorded(store: InferenceTableStore, table: InferenceTable) -> None:
    """Its spans, previews, metadata and duration are those of the row."""
    [recorded] = table.traces(1, where="trace_state = 'ERROR'")
    found = store.get_trace(recorded.info.trace_id)
    assert [span.to_dict() for span in found.data.spans] == [span.to_dict() for span in recorded.data.spans]
    for name in ("trace_metadata", "request_preview", "response_preview", "execution_duration", "state"):
        assert getattr(found.info, name) == getattr(recorded.info, name)
    assert store.batch_get_traces(["tr-none", recorded.info.trace_id])[0].info == found.info
    with pytest.raises(MlflowException, match="tr-none"):
        store.get_trace_info("tr-none")


FILTERS = {
    # As MLflow's UI writes them.
    "attributes.status = 'OK'": ROWS - 1,
    "attributes.execution_time_ms >= 0": ROWS,
    "attributes.execution_time_ms < 0": 0,
    "attributes.timestamp_ms > 0 AND attributes.timestamp_ms < 9999999999999": ROWS,
    "attributes.timestamp_ms > 9999999999999": 0,
    "attributes.name = 'support'": ROWS,
    "attributes.run_id = 'none'": 0,
    "tags.team = 'sales' AND attributes.status = 'OK'": 31,
    "tags.`team` != 'sales'": 32,
    "tags.team IS NULL": 0,
    "tags.absent IS NULL": ROWS,
    "request_metadata.\"mlflow.trace.user\" = 'user-3'": 4 * TURNS,
    "request_metadata.mlflow.trace.session = 'session-07'": TURNS,
    "request_metadata.mlflow.trace.session ILIKE '%SESSION-0%'": 10 * TURNS,
    "prompt = 'greeting/1'": 0,
    "feedback.`none` = 'true'": 0,
    "feedback.`none` IS NULL": ROWS,
    "expectation.`none` = 'x'": 0,
    "span.name ILIKE 'SEARCH_HELP'": ROWS,
    "span.name ILIKE '%status%'": ROWS,
    "span.type ILIKE 'retriever'": ROWS,
    "span.type = 'EMBEDDING'": 0,
    "span.status = 'ERROR'": 1,
    "span.content ILIKE '%HELP/INVOICE%'": 16,
    "issue.id = 'none'": 0,
    "trace.text ILIKE '%nobody asked this%'": 0,
    # As people do.
    "span.name = 'order_status' AND span.status = 'ERROR'": 1,
    "span.name = 'search_help' AND span.status = 'ERROR'": 0,
    "span.name IN ('complete', 'none')": ROWS - 1,
    "span.name NOT IN ('support', 'search_help', 'order_status', 'complete')": 0,
    "span.attributes.mlflow.llm.model = 'small-chat'": ROWS - 1,
    "span.attributes.`mlflow.llm.provider` LIKE 'ex%'": ROWS - 1,
    "span.attributes.absent RLIKE '.'": 0,
    "status IN ('ERROR', 'IN_PROGRESS')": 1,
    "name RLIKE '^sup+'": ROWS,
    "name LIKE 'SUPPORT'": 0,
    f"execution_time_ms < {10**40} AND execution_time_ms > -{10**400}": ROWS,
    "timestamp_ms < 1e999 AND end_time_ms < 1e999": ROWS,
    "feedback.none > 1e999": 0,
    "trace.text LIKE '%there is no order%'": 1,
}


@pytest.mark.parametrize("filter_string", FILTERS)
def test_a_filter_leaves_the_rows_that_meet_it(store: InferenceTableStore, filter_string: str) -> None:
    """Each filter that MLflow's UI can send, and what people write, counts the rows it should."""
    assert len(search(store, filter_string)) == FILTERS[filter_string]


def test_the_search_box_takes_text_as_it_was_typed(store: InferenceTableStore, table: InferenceTable) -> None:
    """Quotes in a question are found, though they are escaped twice where they are kept."""
    asked = table.query("select count(*) as n from payload where request like '%express%'").to_dicts()[0]["n"]
    assert 0 < asked < ROWS
    assert len(search(store, "trace.text ILIKE '%Is \"express\" delivery%'")) == asked


@pytest.mark.parametrize(
    "filter_string",
    [
        "request = 'x'",
        "tags.team > 'x'",
        "status > 'OK' OR status = 'OK'",
        "span.duration = 'x'",
        "span.content = 'x'",
        "name RLIKE '('",
        "prompt LIKE 'x'",
        "feedback.x > 'text'",
        "timestamp_ms LIKE '1%'",
        "timestamp_ms > '5'",
        "execution_time_ms > 'x'",
    ],
)
def test_what_is_not_known_is_refused(store: InferenceTableStore, filter_string: str) -> None:
    """A filter is never left out: it raises MLflow's own error."""
    with pytest.raises(MlflowException) as caught:
        search(store, filter_string)
    assert caught.value.error_code == "INVALID_PARAMETER_VALUE"


def test_orders_put_nulls_last_and_pages_join(store: InferenceTableStore) -> None:
    """By duration, name or tag, page after page gives each trace once, in order."""
    for order in (
        "execution_time DESC",
        "execution_time ASC",
        "tags.team DESC",
        "tags.absent ASC",
        "timestamp ASC",
    ):
        found, token = [], None
        while True:
            page, token = store.search_traces([store.experiment_id], None, 10, [order], token)
            found += page
            if token is None:
                break
        assert len({one.trace_id for one in found}) == len(found) == ROWS
        assert found == search(store, order_by=[order])
    durations = [one.execution_duration for one in search(store, order_by=["execution_time DESC"])]
    assert durations == sorted(durations, reverse=True)
    teams = [one.tags["team"] for one in search(store, order_by=["tags.team ASC"])]
    assert teams == sorted(teams)


@pytest.mark.parametrize(
    "token",
    [
        "x",
        "eyJvZmZzZXQiOiAxfQ==",
        "eyJhZnRlciI6IFsxXX0=",
        page_token([None, None]),
        page_token(["support", "an id"]),
        page_token([1.5, "an id"]),
    ],
)
def test_a_token_of_another_list_is_refused(store: InferenceTableStore, token: str) -> None:
    """MLflow's own tokens count rows, which move while rows are added; ours are of one order."""
    with pytest.raises(MlflowException, match="page token"):
        search(store, page_token=token)


def test_pages_stay_while_rows_are_added(tmp_path: Path) -> None:
    """A page begins where the one before ended, whatever came in between."""
    settings = settings_of(tmp_path)
    open_or_create_table(settings)
    spool, committer = Spool(settings), Committer(settings)

    def add(ids: list[str], hour: int) -> None:
        spool.append(batch(ids, at=datetime(2026, 1, 1, hour, tzinfo=UTC)), sync=False)
        commit_all(committer)

    add([f"b-{number:03}" for number in range(50)], 2)
    store = InferenceTableStore(store_uri(settings))
    first, token = store.search_traces([store.experiment_id], None, 20)
    add([f"c-{number:03}" for number in range(30)], 3)
    add([f"a-{number:03}" for number in range(5)], 1)
    second, token = store.search_traces([store.experiment_id], None, 20, page_token=token)
    third, token = store.search_traces([store.experiment_id], None, 20, page_token=token)
    spool.close()
    assert token is None
    expected = [f"b-{number:03}" for number in reversed(range(50))] + [
        f"a-{number:03}" for number in reversed(range(5))
    ]
    assert [one.client_request_id for one in first + second + third] == expected
    assert search(store)[0].client_request_id == "c-029"


def test_a_list_reads_no_response(tmp_path: Path) -> None:
    """Nor do filters on anything but spans: of 30 MB of payloads next to nothing is read."""
    settings = settings_of(tmp_path)
    open_or_create_table(settings)
    spool, committer = Spool(settings), Committer(settings)
    for number in range(30):
        spool.append(
            batch([f"r-{number:02}"], text=random.Random(number).randbytes(500_000).hex()), sync=False
        )
    commit_all(committer)
    spool.close()
    store = InferenceTableStore(store_uri(settings))
    assert len(search(store, max_results=1)) == 1
    before = bytes_read()
    assert len(search(store)) == 30
    assert not search(store, "tags.x = 'y' AND feedback.z IS NOT NULL AND execution_time_ms > 0")
    assert bytes_read() - before < 1_000_000
    assert not search(store, "trace.text LIKE '%nowhere%'")
    assert bytes_read() - before > 10_000_000


def bytes_read() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def test_feedback_of_a_chat_front_end_is_mlflows_and_back(
    store: InferenceTableStore, table: InferenceTable, folder: Path
) -> None:
    """What was said by request id alone is seen, changed and deleted by MLflow, and SQL sees the change."""
    [row] = table.newest(1, where="request like '%invoice%'")
    log = AnnotationLog(settings_of(folder))
    request_id, trace_id = row["databricks_request_id"], row["trace_id"]
    log.append(
        [
            Annotation(
                kind="assessment",
                key="a-chat",
                databricks_request_id=request_id,
                name="thumb",
                type="feedback",
                value='"up"',
                source_type="HUMAN",
                source_id="ann",
                rationale="quick",
            )
        ]
    )
    found = store.get_assessment(trace_id, "a-chat")
    assert (found.name, found.value, found.rationale, found.source.source_id) == (
        "thumb",
        "up",
        "quick",
        "ann",
    )
    assert [one.trace_id for one in search(store, "feedback.thumb = 'up'")] == [trace_id]
    store.update_assessment(trace_id, "a-chat", feedback=Feedback(name="thumb", value="down").feedback)
    said = "select value, rationale, source_id from feedback where name = 'thumb'"
    assert table.query(said).to_dicts() == [{"value": '"down"', "rationale": "quick", "source_id": "ann"}]
    assert not search(store, "feedback.thumb = 'up'")
    store.delete_assessment(trace_id, "a-chat")
    assert not table.query(said).to_dicts()
    assert not names(store, trace_id)


def test_a_golden_sets_traces_have_the_assessments_of_the_store(
    store: InferenceTableStore, table: InferenceTable, folder: Path
) -> None:
    """Also what was said without MLflow's document; what is overridden is not valid there either."""
    info = search(store)[45]
    plain = Annotation(
        kind="assessment",
        key="a-plain",
        databricks_request_id=info.client_request_id,
        name="rule",
        type="expectation",
        value='"four days"',
    )
    AnnotationLog(settings_of(folder)).append([plain])
    first = store.create_assessment(Feedback(name="tidy", value=1, trace_id=info.trace_id))
    store.create_assessment(
        Feedback(name="tidy", value=2, trace_id=info.trace_id, overrides=first.assessment_id)
    )
    golden = table.golden(f"trace_id = '{info.trace_id}'")
    [trace] = golden.traces()
    assert [(one.name, one.value, one.valid) for one in trace.info.assessments] == [
        ("rule", "four days", True),
        ("tidy", 1, False),
        ("tidy", 2, True),
    ]
    assert trace.info.assessments == store.get_trace_info(info.trace_id).assessments


def test_feedback_is_searched_by_value(experiment: str, store: InferenceTableStore) -> None:
    """Numbers, booleans, text and expectations; what is overridden counts no more."""
    first, second, third = (one.trace_id for one in search(store)[5:8])
    source = AssessmentSource(source_type="HUMAN", source_id="bob")
    for trace_id, score in ((first, 5), (second, 2.5)):
        mlflow.log_feedback(trace_id=trace_id, name="score", value=score, source=source)
    said = mlflow.log_feedback(trace_id=third, name="is_right", value=False, source=source, rationale="no")
    mlflow.log_expectation(trace_id=third, name="answer", value={"days": [1, 2]}, source=source)
    mlflow.log_expectation(trace_id=first, name="fact", value="five days", source=source)

    def found(filter_string: str) -> set[str]:
        return {one.trace_id for one in search(store, filter_string)}

    assert found("feedback.score >= 2.5") == {first, second}
    assert found("feedback.score > 2.5") == found("feedback.score = '5'") == {first}
    assert found("feedback.score != '5'") == {second}
    assert found("feedback.is_right = 'false'") == {third}
    assert found("expectation.answer IS NOT NULL") == {third}
    assert found("expectation.fact LIKE '%days'") == found("expectation.fact = 'five days'") == {first}
    assert len(found("feedback.score IS NULL")) == ROWS - 2
    changed = mlflow.override_feedback(
        trace_id=third, assessment_id=said.assessment_id, value=True, source=source
    )
    assert names(store, third) == [
        ("is_right", False, False),
        ("answer", {"days": [1, 2]}, True),
        ("is_right", True, True),
    ]
    assert not found("feedback.is_right = 'false'")
    mlflow.delete_assessment(third, changed.assessment_id)
    assert found("feedback.is_right = 'false'") == {third}
    assert store.get_assessment(third, said.assessment_id).rationale == "no"


def test_feedback_on_a_session_covers_its_traces(store: InferenceTableStore) -> None:
    """As in MLflow, an assessment that names a session counts for each of its traces."""
    whole = search(store, "request_metadata.mlflow.trace.session = 'session-03'")
    store.create_assessment(
        Feedback(
            name="solved",
            value=True,
            trace_id=whole[-1].trace_id,
            metadata={"mlflow.trace.session": "session-03"},
        )
    )
    assert search(store, "feedback.solved = 'true'") == search(
        store, "request_metadata.mlflow.trace.session = 'session-03'"
    )
    assert len(whole) == TURNS


def test_tags_are_set_changed_and_deleted(experiment: str, store: InferenceTableStore) -> None:
    """Also those that were recorded with the trace, which the table itself keeps."""
    trace_id = search(store)[9].trace_id
    team = store.get_trace_info(trace_id).tags["team"]
    mlflow.set_trace_tag(trace_id, "re/view: ed", "it's done")
    mlflow.set_trace_tag(trace_id, "team", "research")
    assert store.get_trace_info(trace_id).tags["re/view: ed"] == "it's done"
    assert [one.trace_id for one in search(store, "tags.team = 'research'")] == [trace_id]
    mlflow.delete_trace_tag(trace_id, "team")
    assert [one.trace_id for one in search(store, "tags.team IS NULL")] == [trace_id]
    mlflow.set_trace_tag(trace_id, "team", team)
    assert store.get_trace_info(trace_id).tags["team"] == team
    mlflow.delete_trace_tag(trace_id, "re/view: ed")
    with pytest.raises(MlflowException, match="re/view"):
        mlflow.delete_trace_tag(trace_id, "re/view: ed")
    with pytest.raises(MlflowException, match="tr-none") as caught:
        mlflow.set_trace_tag("tr-none", "team", "sales")
    assert caught.value.error_code == "RESOURCE_DOES_NOT_EXIST"


@scorer
def says_when(outputs: Any) -> bool:
    """Whether the answer names a time."""
    return "day" in str(outputs)


@pytest.mark.filterwarnings("default")
def test_evaluation_of_traces_in_the_tables_experiment(experiment: str, store: InferenceTableStore) -> None:
    """Scores become feedback on the very traces, which the run then links to."""
    mlflow.set_experiment(experiment_id=experiment)
    traces = mlflow.search_traces(locations=[experiment], max_results=6, filter_string="status = 'OK'")
    result = mlflow.genai.evaluate(data=traces, scorers=[says_when])
    linked = search(store, f"run_id = '{result.run_id}'")
    assert {one.trace_id for one in linked} == set(traces["trace_id"])
    scores = [names(store, one.trace_id) for one in linked]
    share = sum(("says_when", True, True) in one for one in scores) / len(scores)
    assert result.metrics["says_when/mean"] == pytest.approx(share)
    assert len(search(store, "feedback.says_when IS NOT NULL")) == 6
    store.unlink_traces_from_run([linked[0].trace_id], result.run_id)
    assert len(search(store, f"run_id = '{result.run_id}'")) == 5


@pytest.mark.filterwarnings("default")
def test_evaluation_in_another_experiment_makes_traces_there(
    experiment: str, store: InferenceTableStore
) -> None:
    """A new version of an agent is evaluated on a data set of the table's traces, beside the table."""
    other = mlflow.set_experiment("next version").experiment_id
    dataset = mlflow.genai.datasets.create_dataset(name="questions", experiment_id=[other])
    dataset.merge_records(mlflow.search_traces(locations=[experiment], max_results=3))
    before = len(search(store))
    result = mlflow.genai.evaluate(
        data=dataset, predict_fn=lambda messages, **_: f"in a day: {len(messages)}", scorers=[says_when]
    )
    assert result.metrics["says_when/mean"] == 1.0
    made = mlflow.search_traces(locations=[other], run_id=result.run_id, return_type="list")
    assert len(made) == 3
    assert mlflow.get_trace(made[0].info.trace_id).data.spans
    assert len(search(store)) == before


def test_only_the_endpoint_writes_traces(store: InferenceTableStore) -> None:
    """Logging to the table's experiment, or deleting from it, is refused with what to do instead."""
    info = TraceInfo("tr-1", TraceLocation.from_experiment_id(store.experiment_id), 0, TraceState.OK)
    with pytest.raises(MlflowException, match="set_experiment"):
        store.start_trace(info)
    with pytest.raises(MlflowException, match="recorded by the endpoint"):
        store.log_spans(store.experiment_id, [])
    with pytest.raises(MlflowException, match="Cannot delete traces"):
        store.delete_traces(store.experiment_id, trace_ids=[search(store)[0].trace_id])
    with pytest.raises(MlflowException, match="Cannot delete the experiment"):
        store.delete_experiment(store.experiment_id)


def points(
    store: InferenceTableStore, view: MetricViewType, metric: str, *args: Any, **more: Any
) -> dict[Any, Any]:
    """Values of a chart by their dimensions."""
    aggregations = args[0] if args else COUNT
    found = store.query_trace_metrics([store.experiment_id], view, metric, aggregations, **more)
    return {tuple(one.dimensions.values()): one.values for one in found}


def test_charts_sum_up_the_traces(store: InferenceTableStore, table: InferenceTable) -> None:
    """Counts, percentiles, tokens, tools and costs, as SQL over the table has them."""
    traces, spans = MetricViewType.TRACES, MetricViewType.SPANS
    by_status = points(store, traces, "trace_count", dimensions=["trace_status"])
    assert by_status == {("ERROR",): {"COUNT": 1}, ("OK",): {"COUNT": ROWS - 1}}
    assert points(store, traces, "session_count") == {(): {"COUNT": SESSIONS}}
    tokens = table.query("select sum(input_tokens) as n from payload").to_dicts()[0]["n"]
    total = [MetricAggregation(AggregationType.SUM)]
    assert points(store, traces, "input_tokens", total) == {(): {"SUM": tokens}}
    tools = points(
        store, spans, "span_count", dimensions=["span_name", "span_status"], filters=['span.type = "TOOL"']
    )
    assert tools == {
        ("order_status", "ERROR"): {"COUNT": 1},
        ("order_status", "OK"): {"COUNT": ROWS - 1},
    }
    cost = table.query("select sum(total_cost_usd) as cost from payload").to_dicts()[0]["cost"]
    [found] = points(store, spans, "total_cost", total, dimensions=["span_model_name"]).items()
    assert found[0] == ("small-chat",) and found[1]["SUM"] == pytest.approx(cost)
    durations = sorted(one.execution_duration for one in search(store))
    middle = [MetricAggregation(AggregationType.PERCENTILE, percentile_value=50.0)]
    assert points(store, traces, "latency", middle) == {(): {"P50.0": durations[ROWS // 2]}}


def test_charts_take_filters_and_times(store: InferenceTableStore) -> None:
    """By tag, session, status and time; a point of a time names its beginning."""
    traces = MetricViewType.TRACES
    of_sales = points(store, traces, "trace_count", filters=['trace.tag.team = "sales"'])
    assert of_sales == {(): {"COUNT": len(search(store, "tags.team = 'sales'"))}}
    of_session = ['trace.metadata.`mlflow.trace.session` = "session-01"', 'trace.status = "OK"']
    assert points(store, traces, "trace_count", filters=of_session) == {(): {"COUNT": TURNS}}
    times = [one.request_time for one in search(store)]
    between = {"start_time_ms": min(times), "end_time_ms": max(times)}
    hours = points(store, traces, "trace_count", time_interval_seconds=3600, **between)
    assert sum(one["COUNT"] for one in hours.values()) == ROWS
    first = datetime.fromtimestamp(min(times) // 3_600_000 * 3600, tz=UTC)
    assert (first.isoformat(),) in hours
    before = points(store, traces, "trace_count", dimensions=["trace_name"], end_time_ms=min(times) - 1)
    assert before == {}
    with pytest.raises(MlflowException, match="time_interval_seconds"):
        points(store, traces, "trace_count", time_interval_seconds=60)


def test_a_time_is_cut_off_not_rounded(tmp_path: Path) -> None:
    """The last moment of an hour is in that hour, for the list, for filters and for charts."""
    settings = settings_of(tmp_path)
    open_or_create_table(settings)
    spool, committer = Spool(settings), Committer(settings)
    spool.append(batch(["x"], at=datetime(2026, 1, 1, 0, 59, 59, 999_900, tzinfo=UTC)), sync=False)
    commit_all(committer)
    spool.close()
    store = InferenceTableStore(store_uri(settings))
    [found] = search(store)
    hour = int(datetime(2026, 1, 1, tzinfo=UTC).timestamp() * 1000)
    assert found.request_time == hour + 3_599_999
    assert search(store, f"timestamp_ms = {found.request_time} AND end_time_ms = {found.request_time}")
    assert not search(store, f"timestamp_ms > {found.request_time}")
    between = {"start_time_ms": hour, "end_time_ms": found.request_time, "time_interval_seconds": 3600}
    assert [*points(store, MetricViewType.TRACES, "trace_count", **between)] == [
        ("2026-01-01T00:00:00+00:00",)
    ]


def test_charts_sum_up_assessments(store: InferenceTableStore) -> None:
    """By name and value; what is overridden doesn't count."""
    trace_id = search(store)[20].trace_id
    first = store.create_assessment(Feedback(name="tone", value="rude", trace_id=trace_id))
    store.create_assessment(
        Feedback(name="tone", value="kind", trace_id=trace_id, overrides=first.assessment_id)
    )
    found = points(
        store,
        MetricViewType.ASSESSMENTS,
        "assessment_count",
        dimensions=["assessment_name", "assessment_value"],
        filters=['assessment.name = "tone"', 'assessment.type = "feedback"'],
    )
    assert found == {("tone", '"kind"'): {"COUNT": 1}}


def test_sessions_that_ended_are_found(store: InferenceTableStore) -> None:
    """Online scorers ask for sessions whose last trace is so old, and whose first meets a filter."""
    last = max(one.request_time for one in search(store))
    found = store.find_completed_sessions(store.experiment_id, 0, last)
    assert [one.session_id for one in found] == [f"session-{number:02}" for number in range(SESSIONS)]
    [failed] = search(store, FAILED)
    assert len(store.find_completed_sessions(store.experiment_id, 0, failed.request_time)) == 7
    ours = store.find_completed_sessions(
        store.experiment_id, 0, last, 2, "metadata.`mlflow.trace.user` = 'user-1'"
    )
    assert [one.session_id for one in ours] == ["session-01", "session-06"]


def test_filters_are_correlated(store: InferenceTableStore) -> None:
    """How many traces meet one filter, the other, and both."""
    found = store.calculate_trace_filter_correlation(
        [store.experiment_id], FAILED, "span.status = 'ERROR'", "name = 'support'"
    )
    assert (found.filter1_count, found.filter2_count, found.joint_count, found.total_count) == (1, 1, 1, ROWS)
    assert found.npmi == 1.0
    none = store.calculate_trace_filter_correlation([store.experiment_id], FAILED, FAILED, "name = 'none'")
    assert (none.filter1_count, none.joint_count, none.total_count) == (0, 0, 0)


def test_a_table_that_is_gone_is_not_asked_again(tmp_path: Path) -> None:
    """Clients repeat what fails with an internal error, for minutes."""
    folder = tmp_path / "payload"
    store = InferenceTableStore(store_uri(StorageSettings(uri=str(folder))))
    with pytest.raises(MlflowException, match="no Delta table") as caught:
        search(store)
    assert caught.value.error_code == "RESOURCE_DOES_NOT_EXIST"


def test_a_row_that_waits_in_the_spool_takes_feedback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Feedback is never too early: a trace that is not in the table yet is found by its id."""
    settings = settings_of(tmp_path)
    open_or_create_table(settings)
    spool, committer = Spool(settings), Committer(settings)
    spool.append(batch(["early"]), sync=False)
    commit_all(committer)
    spool.append(batch(["late"]), sync=False)
    monkeypatch.setenv("INFERENCE_TABLE_SPOOL_DIR", str(settings.spool_dir))
    store = InferenceTableStore(store_uri(settings))
    assert [one.trace_id for one in search(store)] == ["tr-early"]
    store.create_assessment(Feedback(name="x", value=1, trace_id="tr-late"))
    assert names(store, "tr-late") == [("x", 1, True)]
    commit_all(committer)
    spool.close()
    assert [one.trace_id for one in search(store, "feedback.x = '1'")] == ["tr-late"]


def test_a_trace_that_is_no_longer_there_takes_no_feedback(tmp_path: Path) -> None:
    """A server that has shown it goes by the table, not by what it remembers."""
    settings = settings_of(tmp_path)
    open_or_create_table(settings)
    spool, committer = Spool(settings), Committer(settings)
    spool.append(batch(["old"]), sync=False)
    commit_all(committer)
    spool.close()
    store = InferenceTableStore(store_uri(settings))
    assert [one.trace_id for one in search(store)] == ["tr-old"]
    DeltaTable(settings.uri).delete()
    with pytest.raises(MlflowException) as caught:
        store.create_assessment(Feedback(name="x", value=1, trace_id="tr-old"))
    assert caught.value.error_code == "RESOURCE_DOES_NOT_EXIST"


def test_the_address_of_a_store(tmp_path: Path) -> None:
    """A path or an object store's address, and where its state is; the same table has the same experiment."""
    local = store_location(f"inference-table://{tmp_path}/a%20b/payload")
    assert local.settings.local_path == tmp_path / "a b" / "payload"
    assert local.state == tmp_path / "a b" / "payload.mlflow.db"
    remote = store_location(f"inference-table:s3://bucket/agents/support?state_dir={tmp_path}")
    assert remote.settings.uri == "s3://bucket/agents/support"
    assert remote.experiment_name == "support"
    assert remote.state.parent == tmp_path
    again = store_location(store_uri(remote.settings, "/elsewhere"))
    assert again.experiment_id == remote.experiment_id != local.experiment_id
    for wrong in ("inference-table:", "inference-table://host/path", "sqlite:///x"):
        with pytest.raises(SettingsError, match="names no inference table"):
            store_location(wrong)


def test_a_state_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    """It says where it was to be, and how to choose another place."""
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="--state-dir"):
        InferenceTableStore(f"inference-table://{tmp_path}/payload?state_dir={tmp_path}/file/below")


def test_a_state_that_is_no_database_is_an_error(tmp_path: Path) -> None:
    """It names the file, and says what is not lost with it."""
    location = store_location(f"inference-table://{tmp_path}/payload")
    location.state.write_bytes(random.Random(1).randbytes(20_000))
    for opened in (InferenceTableStore, registry_store):
        with pytest.raises(SettingsError, match=f"(?s){location.state.name}.*move it away"):
            opened(f"inference-table://{tmp_path}/payload")


@pytest.mark.usefixtures("experiment")
def test_artifacts_that_a_server_stored_are_found_without_it(
    store: InferenceTableStore, uri: str, tmp_path: Path
) -> None:
    """``tracelake ui`` gives runs addresses that lead to a server; a client of the table knows the folder."""
    made = store.create_experiment("made by a server", artifact_location="mlflow-artifacts:/77")
    (tmp_path / "note.txt").write_text("seen")
    with mlflow.start_run(experiment_id=made) as run:
        mlflow.log_artifact(str(tmp_path / "note.txt"), "notes")
    assert run.info.artifact_uri == f"mlflow-artifacts:/77/{run.info.run_id}/artifacts"
    kept = store_location(uri).artifacts / "77" / run.info.run_id / "artifacts" / "notes" / "note.txt"
    assert kept.read_text() == "seen"
    assert mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/notes/note.txt") == "seen"
    outside = "mlflow-artifacts:/77/../../outside"
    with pytest.raises(MlflowException, match="Cannot use the artifacts"):
        mlflow.artifacts.list_artifacts(artifact_uri=outside)


def test_questions_are_previews(store: InferenceTableStore) -> None:
    """What the list shows of a trace is what was asked and answered."""
    previews = {
        question
        for question in QUESTIONS
        for one in search(store)
        if question.split()[-1] in str(one.request_preview)
    }
    assert previews == set(QUESTIONS)


def test_prompts_are_kept_beside_the_table(experiment: str, store: InferenceTableStore) -> None:
    """MLflow's registry is found by the same URI; a trace can be linked to a prompt, and found by it."""
    prompt = mlflow.genai.register_prompt(name="greeting", template="Say hello to {{name}}.")
    assert mlflow.genai.load_prompt("prompts:/greeting/1").template == "Say hello to {{name}}."
    trace_id = search(store)[30].trace_id
    store.link_prompts_to_trace(trace_id, [prompt])
    assert [one.trace_id for one in search(store, "prompt = 'greeting/1'")] == [trace_id]
    assert not search(store, "prompt = 'greeting/2'")


def test_the_guides_python_runs(uri: str, table: InferenceTable, tmp_path: Path) -> None:
    """docs/ui.md, from top to bottom, on this table."""
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "ui.md").read_text(encoding="utf-8"), re.DOTALL
    )
    address = "inference-table:///data/agents/payload"
    assert address in blocks[0]
    program = tmp_path / "guide.py"
    program.write_text("\n".join(blocks).replace(address, uri).replace("max_results=100", "max_results=4"))
    env = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    done = subprocess.run([sys.executable, program], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = table.query(
        "select name, value from feedback where trace_id in"
        " (select trace_id from payload where trace_state = 'ERROR')"
        " and name in ('answer', 'severity') order by name"
    )
    assert said.to_dicts() == [
        {"name": "answer", "value": '"There is no such order."'},
        {"name": "severity", "value": "3"},
    ]
