"""Golden sets: recorded requests and what people said of them, in the form that evaluation takes."""

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from inference_table.annotations import Annotation, AnnotationLog
from inference_table.commit import Committer, open_or_create_table
from inference_table.errors import QueryError
from inference_table.golden import golden
from inference_table.ids import uuid7
from inference_table.schema import SCHEMA
from inference_table.settings import StorageSettings
from inference_table.spool import Spool
from inference_table.table import InferenceTable
from tests.inference_table.rows import NOON, commit_all

ASKED: list[dict[str, Any]] = [
    {"request": '{"question": "why?"}', "response": '{"answer": "so"}'},
    {"request": '{"question": "why?"}', "response": '{"answer": "because"}'},
    {"request": '{"question": "who?"}', "status_code": 500, "response": None},
    {"request": '{"question": "when?"}', "trace_id": None},
    {"request": "[1, 2]", "response": '{"body": [3], "databricks_output": {"databricks_request_id": "x"}}'},
    {"request": "not json", "response": '{"body": "plain", "databricks_output": {}}'},
    {
        "request": '{"messages": [], "stream": true, "client_request_id": "c", "databricks_options": {}}',
        "response": '{"choices": [], "databricks_output": {"trace": {}}}',
    },
    {"request": None},
    {"request": '{"question": "lo', "logging_error_codes": ["MAX_REQUEST_SIZE_EXCEEDED"]},
]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> StorageSettings:
    folder = tmp_path_factory.mktemp("golden")
    settings = StorageSettings(uri=str(folder / "payload"), spool_dir=folder / "spool")
    open_or_create_table(settings)
    return settings


@pytest.fixture(scope="module")
def ids(settings: StorageSettings) -> Iterator[list[str]]:
    """A table of the requests above, in that order, with annotations of some."""
    ids = [uuid7() for _ in ASKED]
    rows = [
        {
            **dict.fromkeys(SCHEMA.names),
            "databricks_request_id": one,
            "request_date": NOON.date(),
            "request_time": NOON + timedelta(seconds=number),
            "status_code": 200,
            "logging_error_codes": [],
            "trace_id": f"tr-{number}",
            "response": "{}",
            **asked,
        }
        for number, (one, asked) in enumerate(zip(ids, ASKED, strict=True))
    ]
    Spool(settings).append(pa.RecordBatch.from_pylist(rows, schema=SCHEMA), sync=False)
    commit_all(Committer(settings))
    AnnotationLog(settings).append(
        [
            said(ids[0], "answer", '"so"', "expectation"),
            said(ids[0], "answer", '"because"', "expectation"),
            said(ids[0], "user_feedback", "false", rationale="no"),
            said(None, "guidelines", '["short"]', "expectation", trace_id="tr-2"),
            said(ids[1], "user_feedback", "true", key="a-1"),
            said(ids[1], "user_feedback", "true", key="a-1", is_deleted=True),
            Annotation(kind="tag", key="reviewed", value='"yes"', databricks_request_id=ids[0]),
            Annotation(kind="run", key="run-1", databricks_request_id=ids[0]),
        ]
    )
    return ids


def said(
    request_id: str | None, name: str, value: str, kind: str = "feedback", key: str = "", **fields: Any
) -> Annotation:
    return Annotation(
        kind="assessment",
        key=key or uuid7(),
        databricks_request_id=request_id,
        name=name,
        value=value,
        type=kind,
        source_id="ann",
        **fields,
    )


@pytest.fixture
def table(settings: StorageSettings, ids: list[str]) -> InferenceTable:
    return InferenceTable(settings.uri, spool_dir=settings.spool_dir)


def test_a_record(table: InferenceTable, ids: list[str]) -> None:
    """It has what was asked and answered, what people said of it, and where it is from."""
    made = golden(table, "request_time = ?", parameters=[NOON])
    [record] = made
    origin = record.pop("source")
    assert record == {
        "inputs": {"question": "why?"},
        "outputs": {"answer": "so"},
        "expectations": {"answer": "because"},
        "tags": {"reviewed": "yes"},
        "databricks_request_id": ids[0],
        "trace_id": "tr-0",
        "feedback": [{"name": "user_feedback", "value": False, "rationale": "no", "source_id": "ann"}],
    }
    assert origin["source_type"] == "TRACE"
    assert origin["source_data"] == {
        "trace_id": "tr-0",
        "databricks_request_id": ids[0],
        "table": table.uri,
        "table_version": made.version,
        "query": made.query,
    }
    assert (made.version, made.annotations_version) == (1, 1)


def test_a_condition_is_in_order_of_time(table: InferenceTable, ids: list[str]) -> None:
    """All usable rows that meet it; the others are named, with the reason."""
    made = golden(table, "true -- all of them")
    assert [record["databricks_request_id"] for record in made] == ids[:7]
    assert made.skipped.keys() == set(ids[7:])
    assert "no request" in made.skipped[ids[7]]
    assert "MAX_REQUEST_SIZE_EXCEEDED" in made.skipped[ids[8]]
    assert len(golden(table, "status_code = 200", limit=2)) == 2


def test_a_query_is_in_its_own_order(table: InferenceTable, ids: list[str]) -> None:
    """Whatever it joins and however it begins; ids that are there twice or no row's don't count."""
    sql = """-- those that failed, and more
        select databricks_request_id from payload where status_code = 500
        union all select * from (values (?), (?), ('0199a037-none'), (null))"""
    made = golden(table, sql, parameters=[ids[0], ids[0]])
    assert {record["databricks_request_id"] for record in made} == {ids[0], ids[2]}
    assert made.skipped == {"0199a037-none": "there is no such row"}
    newest = golden(table, "from payload select databricks_request_id order by request_time desc")
    assert [record["databricks_request_id"] for record in newest] == ids[6::-1]
    assert golden(table, "with x as (select 'none' as databricks_request_id) from x").records == []


def test_what_is_said_by_trace_id_counts(table: InferenceTable, ids: list[str]) -> None:
    """Annotations that name only the trace are those of its row; deleted ones are not there."""
    [failed] = golden(table, "status_code = 500")
    assert failed["expectations"] == {"guidelines": ["short"]}
    assert failed["outputs"] is None
    [untraced] = golden(table, "trace_id is null")
    assert (untraced["trace_id"], untraced["source"]["source_type"]) == (None, "CODE")
    [_, withdrawn] = golden(table, f"databricks_request_id in ('{ids[0]}', '{ids[1]}')")
    assert withdrawn["feedback"] == []


def test_overridden_feedback_is_not_said(
    table: InferenceTable, settings: StorageSettings, ids: list[str]
) -> None:
    """MLflow keeps both; what holds is the later one."""
    AnnotationLog(settings).append(
        [
            said(ids[2], "tone", "1", key="a-first"),
            said(ids[2], "tone", "2", document='{"feedback": {"value": 2}, "overrides": "a-first"}'),
        ]
    )
    [failed] = golden(table, "status_code = 500")
    assert [one["value"] for one in failed["feedback"] if one["name"] == "tone"] == [2]


def test_bodies_of_any_form(table: InferenceTable, ids: list[str]) -> None:
    """What is no JSON object, and what says how to answer rather than what."""
    found = {record["databricks_request_id"]: record for record in golden(table, "true")}
    assert (found[ids[4]]["inputs"], found[ids[4]]["outputs"]) == ({"request": [1, 2]}, [3])
    assert (found[ids[5]]["inputs"], found[ids[5]]["outputs"]) == ({"request": "not json"}, "plain")
    assert (found[ids[6]]["inputs"], found[ids[6]]["outputs"]) == ({"messages": []}, {"choices": []})


def test_equal_inputs(table: InferenceTable, ids: list[str]) -> None:
    """On request one of them is kept: that with expectations, though another is newer."""
    asked = "request like '%why%'"
    assert len(golden(table, asked)) == 2
    [kept] = golden(table, asked, unique=True)
    assert kept["databricks_request_id"] == ids[0]


def test_to_pandas_and_jsonl(table: InferenceTable, tmp_path: Path) -> None:
    """Both have the same records; the file again makes the same set."""
    made = golden(table, "status_code = 200")
    frame = made.to_pandas()
    assert frame.to_dict("records") == made.records
    path = made.to_jsonl(tmp_path / "golden.jsonl")
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == made.records
    assert list(golden(table, "false").to_pandas().columns) == list(frame.columns)


def test_rows_that_are_not_committed(table: InferenceTable, settings: StorageSettings) -> None:
    """On request what this machine has spooled is there too."""
    row = {
        **dict.fromkeys(SCHEMA.names),
        "databricks_request_id": uuid7(),
        "request_date": NOON.date(),
        "request": '{"question": "now?"}',
    }
    Spool(settings).append(pa.RecordBatch.from_pylist([row], schema=SCHEMA), sync=False)
    asked = "request like '%now%'"
    assert len(golden(table, asked)) == 0
    assert len(golden(table, asked, pending=True)) == 1


def test_what_is_no_choice(table: InferenceTable) -> None:
    """A query that names no requests, and SQL that isn't valid, say so."""
    with pytest.raises(QueryError, match="select databricks_request_id"):
        golden(table, "select trace_id from payload")
    with pytest.raises(QueryError, match="nothing"):
        golden(table, "nothing = 1")
