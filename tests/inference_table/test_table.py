"""Reading: SQL, rows, traces and frames over real Delta tables, and the rows still in the spool."""

import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from inference_table.commit import Committer, open_or_create_table
from inference_table.errors import (
    QueryError,
    SettingsError,
    SpoolError,
    TableError,
    TableNotFoundError,
    TableSchemaError,
)
from inference_table.ids import uuid7
from inference_table.schema import PARTITION_COLUMN, SCHEMA
from inference_table.settings import StorageSettings
from inference_table.spool import Spool, folders, retry_quarantined, spool_root
from inference_table.table import InferenceTable
from tests.deploy.agents import QUESTION, record, rude, support
from tests.inference_table.rows import batch, commit_all, storage

START = datetime(2025, 3, 1, 12, tzinfo=UTC)
DAYS = [date(2025, 3, 1), date(2025, 3, 2), date(2025, 3, 3)]
PER_DAY = 800
ANSWER = "Grüße 你好 🎉"


def id_at(at: datetime, number: int) -> str:
    """A UUIDv7 of a time."""
    milliseconds = int(at.timestamp() * 1000)
    return f"{milliseconds >> 16:08x}-{milliseconds & 0xFFFF:04x}-7000-8000-{number:012x}"


def make_row(number: int, at: datetime, **values: Any) -> dict[str, Any]:
    response = {"choices": [{"message": {"content": f"{ANSWER} {number}"}}], "number": number}
    return {
        **dict.fromkeys(SCHEMA.names),
        "databricks_request_id": id_at(at, number),
        "request_date": at.date(),
        "request_time": at,
        "status_code": 500 if number % 10 == 0 else 200,
        "execution_duration_ms": number,
        "request": json.dumps({"question": number}),
        "response": json.dumps(response) if number % 7 else None,
        "logging_error_codes": [],
        "request_metadata": [("path", "/ask")],
        "trace_id": f"tr-{number:032x}",
        "trace_state": "ERROR" if number % 10 == 0 else "OK",
        "input_tokens": number,
        **values,
    }


def write(uri: Path, rows: list[dict[str, Any]], schema: pa.Schema = SCHEMA, **options: Any) -> None:
    table = pa.Table.from_pylist(rows, schema=schema)
    write_deltalake(uri, table, partition_by=[PARTITION_COLUMN], mode="append", **options)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,400 rows of three days in six commits. Not to be changed: copy it."""
    uri = tmp_path_factory.mktemp("filled") / "payload"
    rows = [
        make_row(number, START + timedelta(days=number // PER_DAY, seconds=number % PER_DAY))
        for number in range(3 * PER_DAY)
    ]
    for first in range(0, len(rows), 400):
        write(uri, rows[first : first + 400])
    return uri


@pytest.fixture
def copied(filled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(filled, tmp_path / "payload"))


def damage(uri: Path, day: date, column: str | None = None) -> None:
    """Overwrite a day's files, or one column in them, so that reading it fails."""
    for path in (uri / f"{PARTITION_COLUMN}={day}").glob("*.parquet"):
        content = bytearray(path.read_bytes())
        if column is None:
            content[:] = b"x" * len(content)
        else:
            for group in range((metadata := pq.read_metadata(path)).num_row_groups):
                chunk = metadata.row_group(group).column(SCHEMA.names.index(column) - 1)
                first = chunk.dictionary_page_offset or chunk.data_page_offset
                content[first : first + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
        path.write_bytes(content)


def test_a_query_sees_every_row_of_every_commit_and_day(filled: Path) -> None:
    """Rows of several commits and partitions are one table, which knows its version."""
    result = InferenceTable(filled).query(
        "select request_date, count(*) as n, sum(input_tokens) as t from payload group by all order by all"
    )
    assert [(row["request_date"], row["n"]) for row in result] == [(day, PER_DAY) for day in DAYS]
    assert sum(row["t"] for row in result) == sum(range(3 * PER_DAY))
    assert (len(result), result.columns) == (3, ["request_date", "n", "t"])
    assert (result.version, result.pending_rows) == (5, 0)
    assert result.to_arrow().schema.field("t").type == pa.int64()


def test_all_columns_come_in_the_order_of_the_schema_with_their_values(filled: Path) -> None:
    """A row reads back as it was written: text beyond ASCII, nulls, maps, lists, times in UTC."""
    at = START + timedelta(seconds=3)
    (row,) = InferenceTable(filled).query("from payload where input_tokens = 3").to_dicts()
    assert list(row) == SCHEMA.names
    assert row == {**make_row(3, at), "request_metadata": {"path": "/ask"}}
    assert row["request_time"].utcoffset() == timedelta(0)


def test_json_functions_work_on_the_payloads(filled: Path) -> None:
    """An answer is taken out of ``response`` in SQL; a null response gives null."""
    sql = """select response->>'$.choices[0].message.content' as answer,
                    (request->'question')::int as question
             from payload where input_tokens in (6, 7) order by question"""
    assert InferenceTable(filled).query(sql).to_dicts() == [
        {"answer": f"{ANSWER} 6", "question": 6},
        {"answer": None, "question": 7},
    ]


def test_the_table_answers_to_its_folder_s_name_too(filled: Path, tmp_path: Path) -> None:
    """A query written for ``agent_payload`` runs on a folder of that name."""
    shutil.copytree(filled, tmp_path / "Agent-payload")
    table = InferenceTable(f"{tmp_path}/Agent-payload/")
    assert table.query(
        'select count(*) as n from "agent-payload" join payload using (trace_id)'
    ).to_dicts() == [{"n": 2400}]


def test_a_condition_on_the_date_leaves_other_days_unread(copied: Path) -> None:
    """With the files of two days destroyed, the third still answers, by date and by id."""
    damage(copied, DAYS[0])
    damage(copied, DAYS[2])
    table = InferenceTable(copied)
    assert table.count("request_date = '2025-03-02'") == PER_DAY
    assert table.count("request_date between date '2025-03-01' + 1 and '2025-03-02'") == PER_DAY
    id_ = id_at(START + timedelta(days=1, seconds=5), PER_DAY + 5)
    found = table.get(id_)
    assert found is not None and found["input_tokens"] == PER_DAY + 5
    with pytest.raises(QueryError):
        table.count("request_date = '2025-03-01'")


def test_a_listing_never_reads_the_payloads(copied: Path) -> None:
    """With the bytes of ``response`` destroyed, whatever doesn't name it still answers."""
    for day in DAYS:
        damage(copied, day, "response")
    table = InferenceTable(copied)
    sql = (
        "select quantile_cont(execution_duration_ms, 0.95) as p95 from payload"
        " where request_date = '2025-03-01'"
    )
    assert table.query(sql).to_dicts() == [{"p95": pytest.approx(759.05)}]
    assert table.to_arrow(["trace_id", "request"]).num_rows == 2400
    with pytest.raises(QueryError):
        table.query("select max(response) from payload")


def test_a_row_is_found_by_request_id_and_by_trace_id(filled: Path) -> None:
    """Both ids give the same row; an id that isn't there gives None, whatever is in it."""
    table = InferenceTable(filled)
    row = table.get(f"tr-{1234:032x}")
    assert row is not None
    assert row == table.get(row["databricks_request_id"])
    assert row["response"] == make_row(1234, START)["response"]
    assert row["request_metadata"] == {"path": "/ask"}
    for absent in (uuid7(), "tr-none", "", "it's", "' or true --"):
        assert table.get(absent) is None


def test_a_row_without_an_id_does_no_harm(tmp_path: Path) -> None:
    """A row of another writer that has no id is counted, and left out of the newest."""
    write(
        tmp_path / "payload",
        [make_row(1, START), make_row(2, START + timedelta(hours=1), databricks_request_id=None)],
    )
    table = InferenceTable(tmp_path / "payload")
    assert table.count() == 2
    assert [row["input_tokens"] for row in table.newest(2)] == [1]
    assert [row["input_tokens"] for row in table.newest(2, where="status_code = 200 or true")] == [1]


def test_newest_rows_come_first_and_meet_the_condition(filled: Path) -> None:
    """``newest`` sorts by time over all partitions; a comment in the condition does no harm."""
    table = InferenceTable(filled)
    assert [row["input_tokens"] for row in table.newest(3)] == [2399, 2398, 2397]
    failed = table.newest(2, where="status_code >= 500 -- only failures")
    assert [row["input_tokens"] for row in failed] == [2390, 2380]
    assert table.newest(2, where="false") == []


def with_trace(number: int, at: datetime, trace: dict[str, Any] | None, **output: Any) -> dict[str, Any]:
    body = {"databricks_output": {"trace": trace, **output}}
    trace_id = trace["info"]["trace_id"] if trace else None
    return make_row(number, at, response=json.dumps(body), trace_id=trace_id)


def test_traces_are_what_mlflow_recorded(tmp_path: Path) -> None:
    """MLflow loads the traces of the table, newest first; rows without one are passed over."""
    first = record(lambda: support(QUESTION))[0]
    second, other = record(rude)[0], record(rude)[0]
    write(
        tmp_path / "payload",
        [
            with_trace(1, START, first.to_dict()),
            with_trace(2, START + timedelta(days=1), second.to_dict(), other_traces=[other.to_dict()]),
            with_trace(3, START + timedelta(days=2), None),
        ],
    )
    table = InferenceTable(tmp_path / "payload")
    traces = table.traces()
    assert [trace.to_dict() for trace in traces] == [second.to_dict(), first.to_dict()]
    assert [span.name for span in traces[1].data.spans] == ["support", "search", "gpt"]
    assert len(table.traces(limit=1)) == 1
    assert table.traces(where=f"trace_id = '{first.info.trace_id}'")[0].to_dict() == first.to_dict()
    row = table.get(second.info.trace_id)
    assert row is not None
    assert [trace.info.trace_id for trace in row.other_traces()] == [other.info.trace_id]


def test_a_trace_without_spans_or_none_at_all_does_no_harm(tmp_path: Path) -> None:
    """A trace cut to its info has no spans; a truncated, textual or missing response has no trace."""
    trace = record(rude)[0]
    rows = [
        with_trace(1, START, {"info": trace.to_dict()["info"]}),
        *(
            make_row(number, START, response=response)
            for number, response in enumerate((None, "not json", "[]", '{"truncated_bytes": 1}', "3"), 2)
        ),
    ]
    write(tmp_path / "payload", rows)
    (only,) = InferenceTable(tmp_path / "payload").traces()
    assert only.info.trace_id == trace.info.trace_id
    assert only.data.spans == []


def test_a_trace_that_mlflow_does_not_take_is_a_clear_error(tmp_path: Path) -> None:
    """A trace that somebody damaged names what to look at."""
    write(tmp_path / "payload", [with_trace(1, START, {"info": {"trace_id": "tr-1"}, "data": 3})])
    with pytest.raises(TableError, match=r"databricks_output\.trace"):
        InferenceTable(tmp_path / "payload").traces()


@pytest.mark.parametrize(
    ("sql", "parameters"),
    [
        ("select count(*) as n from payload where status_code = ? and request_date = ?", [500, DAYS[0]]),
        (
            "select count(*) as n from payload where status_code = $s and request_date = $d",
            {"s": 500, "d": DAYS[0]},
        ),
    ],
)
def test_parameters_are_bound_by_position_and_by_name(filled: Path, sql: str, parameters: Any) -> None:
    """Values need not be pasted into SQL."""
    assert InferenceTable(filled).query(sql, parameters=parameters).to_dicts() == [{"n": 80}]


def test_a_result_outlives_the_table_and_goes_everywhere(copied: Path) -> None:
    """A result is in memory: pyarrow, pandas, Polars, DuckDB and Python take it when the table is gone."""
    result = InferenceTable(copied).query(
        "select * from payload where input_tokens < 10 order by input_tokens"
    )
    shutil.rmtree(copied)
    assert result.to_arrow().num_rows == len(result) == len(list(result)) == 10
    frame = result.to_pandas()
    assert isinstance(frame, pd.DataFrame) and list(frame["input_tokens"]) == list(range(10))
    assert frame["request_metadata"][0] == {"path": "/ask"}
    polars = result.to_polars()
    assert isinstance(polars, pl.DataFrame) and polars["response"].null_count() == 2
    assert pa.table(result).equals(result.to_arrow())
    assert (
        duckdb.connect()
        .from_arrow(pa.table(result))
        .aggregate("count(*) as n")
        .to_arrow_table()["n"][0]
        .as_py()
        == 10
    )
    assert "10 rows, table version 5" in repr(result)


def test_frames_of_chosen_columns_and_rows(filled: Path) -> None:
    """``to_pandas``, ``to_polars`` and ``to_arrow`` take columns and a condition."""
    table = InferenceTable(filled)
    arguments: dict[str, Any] = {"columns": ["trace_id", "status_code"], "where": "status_code = 500"}
    assert table.to_pandas(**arguments).shape == (240, 2)
    assert table.to_polars(**arguments).shape == (240, 2)
    assert table.to_arrow(**arguments).column_names == ["trace_id", "status_code"]
    assert table.count() == table.to_arrow(["trace_id"]).num_rows == 2400
    assert table.schema.equals(SCHEMA)


@pytest.mark.parametrize("package", ["pandas", "polars"])
def test_a_missing_extra_is_named(filled: Path, package: str) -> None:
    """Without pandas or Polars the error says which extra to install."""
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {package!r}: raise ModuleNotFoundError(name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from inference_table.table import InferenceTable\n"
        f"InferenceTable({str(filled)!r}).to_{package}(['trace_id'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"pip install 'tracelake[{package}]'" in done.stderr


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        ("select foo from payload", "foo"),
        ("selec 1", "syntax error"),
        ("select * from nope", "nope"),
        ("select cast(request as int) from payload", "Could not convert"),
        ("select error('boom') from payload", "boom"),
        ("select ? from payload", "parameter"),
        ("  ", "empty"),
        ("from read_csv('https://localhost:1/x.csv')", "httpfs"),
        ("select * from frame", "frame"),
    ],
)
def test_a_bad_query_is_one_line_of_duckdb_s_own_words(filled: Path, sql: str, says: str) -> None:
    """Wrong SQL, a failure while it runs, an extension that isn't there: one line, nothing downloaded."""
    frame = pa.table({"a": [1]})  # noqa: F841  # a variable in reach is not a table
    with pytest.raises(QueryError, match=re.escape(says)) as caught:
        InferenceTable(filled).query(sql)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_statements_before_the_last_take_effect(filled: Path) -> None:
    """A query may have several statements; what they make is gone with it."""
    table = InferenceTable(filled)
    sql = "create temp macro twice(x) as x * 2; select twice(input_tokens) as n from payload where n = 8"
    assert table.query(sql).to_dicts() == [{"n": 8}]
    table.query("create temp table scratch as select 1 as one")
    with pytest.raises(QueryError, match="scratch"):
        table.query("select * from scratch")


def test_a_query_leaves_nothing_to_the_next(filled: Path) -> None:
    """Tables, settings and attached databases of one query are unknown to the others."""
    table = InferenceTable(filled)
    for _ in range(2):
        assert table.query("create table mine as select 1 as one; from mine").to_dicts() == [{"one": 1}]
    table.query("attach ':memory:' as other; create view payload_2 as select 1")
    table.query("set global memory_limit = '1MB'; set global TimeZone = 'Asia/Tokyo'")
    rows = table.query("select request_time::text as at from payload where input_tokens = 0").to_dicts()
    assert rows == [{"at": "2025-03-01 12:00:00+00"}]
    for name in ("mine", "other.mine", "payload_2"):
        with pytest.raises(QueryError, match=re.escape(name.rpartition(".")[2])):
            table.query(f"from {name}")


@pytest.mark.parametrize(
    ("sql", "columns"),
    [
        ("select 1 as a, 2 as a, 3 as a", ["a", "a_1", "a_2"]),
        ("select 1 as a, 2 as a_1, 3 as a", ["a", "a_1", "a_2"]),
        ("select 1 as a, 2 as a, 3 as a_1", ["a", "a_2", "a_1"]),
    ],
)
def test_columns_with_equal_names_are_all_there(filled: Path, sql: str, columns: list[str]) -> None:
    """The second gets a number, in every form of the result."""
    result = InferenceTable(filled).query(sql)
    assert result.columns == columns
    assert result.to_dicts() == [{columns[0]: 1, columns[1]: 2, columns[2]: 3}]
    assert list(result.to_pandas().columns) == result.to_polars().columns == columns


def test_a_join_of_the_table_with_itself_keeps_both_sides(filled: Path) -> None:
    """Each side's columns have values of their own."""
    sql = "from payload p join payload q on q.input_tokens = p.input_tokens + 1 where p.input_tokens = 1"
    (row,) = InferenceTable(filled).query(sql)
    assert (len(row), row["input_tokens"], row["input_tokens_1"]) == (2 * len(SCHEMA), 1, 2)


@pytest.mark.parametrize(
    ("value", "forms"),
    [
        ("'infinity'::timestamp", ["to_dicts"]),
        ("['infinity'::timestamptz]", ["to_dicts"]),
        ("date '99999-01-01'", ["to_dicts", "to_pandas"]),
        ("map {[1]: 2}", ["to_dicts", "to_pandas"]),
        ("interval 1 day", ["to_polars"]),
        ("union_value(k := 1)", ["to_pandas", "to_polars"]),
    ],
)
def test_a_value_that_does_not_fit_names_its_column(filled: Path, value: str, forms: list[str]) -> None:
    """What Python, pandas or Polars can't hold says which column to cast; as text it comes through."""
    table = InferenceTable(filled)
    result = table.query(f"select 1 as fine, {value} as odd")
    for form in forms:
        with pytest.raises(QueryError, match=r"column 'odd'.*cast it to varchar") as caught:
            getattr(result, form)()
        assert "\n" not in str(caught.value)
        assert len(getattr(table.query(f"select ({value})::varchar as odd"), form)()) == 1
    if "to_dicts" in forms:
        with pytest.raises(QueryError, match="'odd'"):
            list(result)


def test_no_table_is_an_error_that_names_it(tmp_path: Path) -> None:
    """A missing path, a folder that is no table, an unknown scheme: the URI and what to do."""
    (tmp_path / "folder").mkdir()
    reads: list[Callable[[InferenceTable], object]] = [
        lambda table: table.count(),
        lambda table: table.version,
        lambda table: table.get("x"),
        lambda table: table.count(pending=True),
    ]
    for uri in (str(tmp_path / "missing"), str(tmp_path / "folder")):
        for read in reads:
            with pytest.raises(TableNotFoundError, match="INFERENCE_TABLE_URI") as caught:
                read(InferenceTable(uri, spool_dir=tmp_path / "spool"))
            assert uri in str(caught.value)
    assert not (tmp_path / "missing").exists()


def test_a_store_that_does_not_answer_is_one_line() -> None:
    """An unreachable object store names the table and what to check."""
    options = {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "key",
        "AWS_REGION": "us-east-1",
        "max_retries": "0",
        "retry_timeout": "1s",
    }
    with pytest.raises(TableError, match=r"s3://bucket/payload.*credentials") as caught:
        InferenceTable("s3://bucket/payload", storage_options=options).count()
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


def test_the_uri_comes_from_the_environment(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``InferenceTable()`` reads what the servers write to."""
    monkeypatch.setenv("INFERENCE_TABLE_URI", str(filled))
    assert InferenceTable().count() == 2400
    with pytest.raises(SettingsError):
        InferenceTable("  ")


def test_the_next_query_sees_the_next_commit(copied: Path) -> None:
    """One object follows the table: new rows, and a new table in its place."""
    table = InferenceTable(copied)
    assert (table.count(), table.version) == (2400, 5)
    write(copied, [make_row(5000, START)])
    assert (table.count(), table.version) == (2401, 6)
    shutil.rmtree(copied)
    write(copied, [make_row(1, START)])
    assert (table.count(), table.version) == (1, 0)
    assert table.get(id_at(START, 5000)) is None


def test_older_files_and_user_columns_are_survived(tmp_path: Path) -> None:
    """What a file lacks is null, what users added is there, a narrower type widens."""
    uri = tmp_path / "payload"
    old = pa.schema([field for field in SCHEMA if field.name != "total_cost_usd"])
    write(uri, [{name: make_row(1, START)[name] for name in old.names}], old)
    write(uri, [make_row(2, START, total_cost_usd=0.5)], schema_mode="merge")
    labels = pa.struct([("grade", pa.int64()), ("tags", pa.list_(pa.string()))])
    wider = SCHEMA.append(pa.field("label", labels))
    write(uri, [make_row(3, START, label={"grade": 5, "tags": ["good"]})], wider, schema_mode="merge")
    table = InferenceTable(uri)
    assert table.query(
        "select total_cost_usd as c, label.grade as g from payload order by input_tokens"
    ).to_dicts() == [
        {"c": None, "g": None},
        {"c": 0.5, "g": None},
        {"c": None, "g": 5},
    ]
    assert set(table.schema.names) == {*SCHEMA.names, "label"}
    assert table.query("select label from payload where input_tokens < 3").to_dicts() == [{"label": None}] * 2
    assert table.to_polars().shape == (3, len(SCHEMA) + 1)


def test_an_empty_table_has_columns_and_no_rows(tmp_path: Path) -> None:
    """A table that was created and not yet written to can be queried."""
    DeltaTable.create(tmp_path / "payload", SCHEMA, partition_by=[PARTITION_COLUMN])
    table = InferenceTable(tmp_path / "payload")
    assert table.query("from payload").columns == SCHEMA.names
    assert (table.count(), table.newest(), table.traces(), table.get("x")) == (0, [], [], None)


@pytest.mark.parametrize("name", ["pay[1]oad", "pay*", "what?"])
def test_a_folder_with_wildcards_in_its_name_is_one_folder(filled: Path, tmp_path: Path, name: str) -> None:
    """Such a table, as one in an object store, is read through delta-rs' store: the same rows, only these."""
    shutil.copytree(filled, tmp_path / name)
    shutil.copytree(filled, tmp_path / "pay1oad")
    table = InferenceTable(tmp_path / name)
    assert table.count() == 2400
    assert table.count("request_date = '2025-03-02' and status_code = 500") == 80
    answers = table.query("select response->>'$.number' as n from payload order by request_time desc limit 2")
    assert answers.to_dicts() == [{"n": "2399"}, {"n": "2398"}]
    assert table.newest(1)[0]["input_tokens"] == 2399


@pytest.mark.parametrize(
    "name",
    [
        "a b",
        "100%",
        "per%zz",
        "ünï 🎉",
        'dq"x',
        "quo'te",
        "hash#x",
        "{a,b}",
        "a+b",
        "q?x y",
        "br[a] b",
        "semi;x",
    ],
)
def test_a_folder_of_any_name_is_written_and_read(tmp_path: Path, name: str) -> None:
    """Blanks, percent signs, quotes and letters beyond ASCII in a path: rows go in and come out."""
    settings = storage(tmp_path / name)
    open_or_create_table(settings)
    spool = Spool(settings)
    id_ = uuid7()
    spool.append(batch([id_]), sync=False)
    commit_all(Committer(settings))
    spool.close()
    table = InferenceTable(settings.uri)
    assert table.query("select databricks_request_id as id, request_date as d from payload").to_dicts() == [
        {"id": id_, "d": DAYS[0]}
    ]
    assert table.get(id_) == table.newest(1)[0]
    shutil.copytree(settings.uri, tmp_path / name / name)
    assert InferenceTable(tmp_path / name / name).count("request_date = '2025-03-01'") == 1


@pytest.mark.parametrize("folder", ["plain", "a b", "pay[1]oad x"])
def test_partitions_of_any_value_are_read(tmp_path: Path, folder: str) -> None:
    """The folder of a partition is percent-encoded on disk, whatever the folder of the table is called."""
    values = ["x", "y z", "100%", "a/b", "ü", "p%20q", None]
    schema = SCHEMA.append(pa.field("team", pa.string()))
    rows = [make_row(number, START, team=team) for number, team in enumerate(values)]
    data = pa.Table.from_pylist(rows, schema=schema)
    write_deltalake(tmp_path / "written", data, partition_by=[PARTITION_COLUMN, "team"])
    (tmp_path / "written").rename(tmp_path / folder)
    table = InferenceTable(tmp_path / folder)
    assert [row["team"] for row in table.query("select team from payload order by input_tokens")] == values


@pytest.mark.parametrize(
    "name", ["per%20cent", "plus%2Bx", "a%C3%BC", "back\\slash", "new\nline", "del\x7f", "\udc80"]
)
def test_a_path_that_delta_rs_mistakes_for_another_is_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before anything is written, by name and with what to do; a store's URI may have it."""
    path = str(tmp_path / name / "payload")
    for given in (path, f"file://{path}"):
        with pytest.raises(SettingsError, match="give the table another folder") as caught:
            StorageSettings(uri=given)
        assert repr(path)[1:-1] in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(SettingsError):
        InferenceTable(path)
    assert list(tmp_path.iterdir()) == []
    if name.isprintable():
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        with pytest.raises(SettingsError):
            StorageSettings.from_environ({})
    assert StorageSettings(uri="s3://bucket/per%20cent").uri == "s3://bucket/per%20cent"


@pytest.mark.parametrize("name", ["payload", "pay[1]oad"])
@pytest.mark.parametrize("harm", ["deleted", "overwritten", "cut"])
def test_a_missing_or_damaged_file_is_a_clear_error(
    filled: Path, tmp_path: Path, name: str, harm: str
) -> None:
    """Whatever reads a file that was vacuumed or damaged says so in one line of our own."""
    uri = Path(shutil.copytree(filled, tmp_path / name))
    for path in list(uri.rglob("*.parquet")):
        if harm == "deleted":
            path.unlink()
        else:
            path.write_bytes(b"x" * 10_000 if harm == "overwritten" else path.read_bytes()[:100])
    table = InferenceTable(uri)
    reads: list[Callable[[], object]] = [
        table.count,
        table.newest,
        table.traces,
        table.to_arrow,
        lambda: table.get(id_at(START + timedelta(seconds=3), 3)),
    ]
    for read in reads:
        with pytest.raises((TableError, QueryError)) as caught:
            read()
        assert "\n" not in str(caught.value)


def rewrite_log(uri: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the actions of the first commit, as a writer with other features would have written them."""
    (path,) = (uri / "_delta_log").glob("*.json")
    actions = [json.loads(line) for line in path.read_text().splitlines()]
    for action in actions:
        change(action)
    path.write_text("\n".join(map(json.dumps, actions)))


def test_column_mapping_is_refused(tmp_path: Path) -> None:
    """Files whose columns are called otherwise would read as nulls: refused, with the reason."""
    write(tmp_path / "payload", [make_row(1, START)])

    def change(action: dict[str, Any]) -> None:
        if "metaData" in action:
            action["metaData"]["configuration"] = {
                "delta.columnMapping.mode": "name",
                "delta.columnMapping.maxColumnId": str(len(SCHEMA)),
            }
            schema = json.loads(action["metaData"]["schemaString"])
            for number, field in enumerate(schema["fields"], 1):
                field["metadata"] = {
                    "delta.columnMapping.id": number,
                    "delta.columnMapping.physicalName": f"c{number}",
                }
            action["metaData"]["schemaString"] = json.dumps(schema)
        if "add" in action:
            values = action["add"]["partitionValues"]
            action["add"]["partitionValues"] = {
                f"c{SCHEMA.names.index(name) + 1}": values[name] for name in values
            }
        if "protocol" in action:
            action["protocol"].update(minReaderVersion=2, minWriterVersion=5)

    rewrite_log(tmp_path / "payload", change)
    with pytest.raises(TableSchemaError, match="column mapping"):
        InferenceTable(tmp_path / "payload").count()


def test_deletion_vectors_are_refused(tmp_path: Path) -> None:
    """Deleted rows would come back: refused, with the remedy."""
    write(tmp_path / "payload", [make_row(number, START) for number in range(40)])

    def change(action: dict[str, Any]) -> None:
        if "add" in action:
            # The example of the Delta protocol: rows 3, 4, 7, 11, 18 and 29.
            action["add"]["deletionVector"] = {
                "storageType": "i",
                "pathOrInlineDv": "^Bg9^0rr910000000000iXQKl0rr91000f55c8Xg0@@D72lkbi5=-{L",
                "sizeInBytes": 44,
                "cardinality": 6,
            }
        if "protocol" in action:
            features = ["deletionVectors"]
            action["protocol"] = {
                "minReaderVersion": 3,
                "minWriterVersion": 7,
                "readerFeatures": features,
                "writerFeatures": features,
            }

    rewrite_log(tmp_path / "payload", change)
    with pytest.raises(TableSchemaError, match="REORG TABLE"):
        InferenceTable(tmp_path / "payload").count()


def test_many_threads_read_at_once(filled: Path) -> None:
    """Queries, lookups and listings from eight threads on one object don't meet."""
    table = InferenceTable(filled)
    wrong: list[Any] = []

    def read(number: int) -> None:
        for step in range(6):
            wanted = number * 100 + step
            sql = "select execution_duration_ms as n from payload where input_tokens = ?"
            found = table.query(sql, parameters=[wanted]).to_dicts()
            row = table.get(f"tr-{wanted:032x}")
            if found != [{"n": wanted}] or row is None or row["input_tokens"] != wanted:
                wrong.append((wanted, found, row))

    threads = [threading.Thread(target=read, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("name", ["payload", "pay[1]oad"])
def test_a_program_that_read_ends_quietly(filled: Path, tmp_path: Path, name: str) -> None:
    """Reading leaves no thread or handle that spoils the end of the interpreter."""
    shutil.copytree(filled, tmp_path / name)
    code = (
        "from inference_table.table import InferenceTable\n"
        f"table = InferenceTable({str(tmp_path / name)!r})\n"
        "table.query('from payload limit 1'); table.newest(1); result = table.select(['trace_id'])\n"
    )
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture
def spooled(tmp_path: Path) -> Iterator[tuple[StorageSettings, Spool, InferenceTable]]:
    settings = storage(tmp_path)
    spool = Spool(settings)
    yield settings, spool, InferenceTable(settings.uri, spool_dir=settings.spool_dir)
    spool.close()


def test_pending_rows_are_seen_before_there_is_a_table(
    spooled: tuple[StorageSettings, Spool, InferenceTable],
) -> None:
    """Spooled rows answer SQL, lookups and listings, and the result says how many there are."""
    _, spool, table = spooled
    ids = [uuid7() for _ in range(3)]
    spool.append(batch(ids[:2]), sync=False)
    spool.append(batch(ids[2:]), sync=False)
    result = table.query("select databricks_request_id as id from payload", pending=True)
    assert {row["id"] for row in result} == set(ids)
    assert (result.pending_rows, result.version) == (3, None)
    assert "3 pending rows" in repr(result)
    assert table.count(pending=True) == 3
    found = table.get(ids[2], pending=True)
    assert found is not None and found["request_metadata"] == {"path": "/"}
    assert len(table.newest(5, pending=True)) == 3
    with pytest.raises(TableNotFoundError):
        table.count()


def test_a_row_is_seen_once_before_during_and_after_its_commit(
    spooled: tuple[StorageSettings, Spool, InferenceTable],
) -> None:
    """A segment that is committed and not yet deleted is not counted twice; a new one beside it is."""
    settings, spool, table = spooled
    open_or_create_table(settings)
    ids = [uuid7() for _ in range(6)]
    spool.append(batch(ids[:3]), sync=False)
    (segment,) = folders(spool_root(settings))[0].segments()
    kept = segment.path.read_bytes()
    commit_all(Committer(settings))
    assert table.count(pending=True) == 3
    # As after a crash between the commit and the deletion.
    segment.path.write_bytes(kept)
    assert table.count(pending=True) == 3
    spool.append(batch(ids[3:]), sync=False)
    result = table.query(
        "select count(*) as n, count(distinct databricks_request_id) as d from payload", pending=True
    )
    assert result.to_dicts() == [{"n": 6, "d": 6}]
    assert (result.pending_rows, result.version is not None) == (3, True)
    assert [row["databricks_request_id"] in ids for row in table.newest(10, pending=True)] == [True] * 6
    assert table.count() == 3


def test_pending_rows_have_the_columns_that_users_added(
    spooled: tuple[StorageSettings, Spool, InferenceTable],
) -> None:
    """A column that only the table has is null in a pending row, in SQL and in a lookup."""
    settings, spool, table = spooled
    wider = SCHEMA.append(pa.field("label", pa.string()))
    write(Path(settings.uri), [make_row(1, START, label="good")], wider)
    id_ = uuid7()
    spool.append(batch([id_]), sync=False)
    sql = "select label from payload order by label nulls last"
    assert table.query(sql, pending=True).to_dicts() == [{"label": "good"}, {"label": None}]
    found = table.get(id_, pending=True)
    assert found is not None and list(found) == [*SCHEMA.names, "label"]


def test_readers_beside_a_committer_never_miss_or_repeat_a_row(
    spooled: tuple[StorageSettings, Spool, InferenceTable],
) -> None:
    """While segments are written, committed and deleted, every read sees each spooled row exactly once."""
    settings, spool, table = spooled
    open_or_create_table(settings)
    spool.append(batch([uuid7()]), sync=False)
    written = 1
    stop = threading.Event()

    def commit() -> None:
        committer = Committer(settings)
        while not stop.is_set():
            commit_all(committer)
        committer.release()

    thread = threading.Thread(target=commit)
    thread.start()
    seen = []
    try:
        for _ in range(15):
            spool.append(batch([uuid7(), uuid7()]), sync=False)
            written += 2
            sql = "select count(*) as n, count(distinct databricks_request_id) as d from payload"
            (row,) = table.query(sql, pending=True)
            seen.append((row["n"], row["d"], written))
    finally:
        stop.set()
        thread.join()
    assert seen == [(count, count, count) for _, _, count in seen]


def test_a_damaged_segment_is_passed_over(spooled: tuple[StorageSettings, Spool, InferenceTable]) -> None:
    """What can't be read is the committer's to report; the rest is seen."""
    settings, spool, table = spooled
    spool.append(batch([uuid7()]), sync=False)
    spool.append(batch([uuid7()]), sync=False)
    folders(spool_root(settings))[0].segments()[0].path.write_bytes(b"not a segment")
    assert table.count(pending=True) == 1


def test_a_segment_that_was_set_aside_and_retried_is_seen_once(
    spooled: tuple[StorageSettings, Spool, InferenceTable],
) -> None:
    """Under its new spool id it is pending once, and the table's once it is committed."""
    settings, spool, table = spooled
    open_or_create_table(settings)
    committer = Committer(settings)
    ids = [uuid7() for _ in range(3)]
    spool.append(batch(ids[:1]), sync=False)
    spool.append(batch(ids[1:]), sync=False)
    root = spool_root(settings)
    second = folders(root)[0].segments()[1].path
    content = second.read_bytes()
    second.write_bytes(b"not a segment")
    commit_all(committer)
    (aside,) = root.joinpath("quarantine").iterdir()
    assert table.count(pending=True) == 1
    aside.write_bytes(content)
    assert table.count(pending=True) == 1
    assert retry_quarantined(root) == 1
    sql = "select databricks_request_id as id from payload order by id"
    for pending in (2, 0):
        result = table.query(sql, pending=True)
        assert [row["id"] for row in result] == sorted(ids)
        assert result.pending_rows == pending
        commit_all(committer)
    assert table.count() == 3


def test_a_spool_of_another_user_is_a_clear_error(
    spooled: tuple[StorageSettings, Spool, InferenceTable],
) -> None:
    """A spool that can't be listed is named, with what to do."""
    settings, spool, table = spooled
    spool.append(batch([uuid7()]), sync=False)
    root = spool_root(settings)
    shutil.rmtree(root)
    root.write_text("a file where the folder was")
    with pytest.raises(SpoolError, match=re.escape(str(root))):
        table.count(pending=True)
    root.unlink()
