"""The views: rows as a real server records them, rows of every form, odd ones, and what is read for them."""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake

from inference_table.annotations import Annotation, AnnotationLog
from inference_table.errors import QueryError, TableError
from inference_table.record import DatabricksOutput, request_column, response_column
from inference_table.schema import PARTITION_COLUMN, SCHEMA
from inference_table.settings import StorageSettings
from inference_table.spool import Spool
from inference_table.table import InferenceTable
from inference_table.views import named_views
from tests.inference_table.review_agent import app
from tests.serving.recorded import Recorded, recorded
from tests.support import ROOT

NOON = datetime(2025, 3, 1, 12, tzinfo=UTC)
GUIDE = (ROOT / "docs" / "sql.md").read_text(encoding="utf-8")
VIEWS = ("requests", "spans", "model_usage", "feedback")


@dataclass(frozen=True)
class Traffic:
    """A table that a server has written, and the ids of its requests by what they are."""

    table: InferenceTable
    ids: dict[str, str]

    def request(self, name: str) -> dict[str, Any]:
        """Its row of the view."""
        [row] = self.table.query(
            "from requests where databricks_request_id = ?", parameters=[self.ids[name]]
        ).to_dicts()
        return row


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}],
        **more,
    }


REQUESTS: dict[str, tuple[str, Any]] = {
    "first": ("/chat", chat("How long?", client_request_id="c1")),
    "failed": ("/chat", chat("Is it there?", client_request_id="c2", article="broken")),
    "two": ("/two", {"question": "both?"}),
    "odd": ("/odd", {"case": "theft"}),
    "words": ("/words", {"prompt": "go on"}),
    "absent": ("/absent", {"x": 1}),
    "invalid": ("/chat", [1]),
    "large": ("/odd", {"case": "y" * 60_000}),
}


@pytest.fixture(scope="module")
def traffic(tmp_path_factory: pytest.TempPathFactory) -> Traffic:
    """Requests of two versions, two users and all outcomes. Not to be changed."""
    folder = tmp_path_factory.mktemp("traffic")
    ids = {}
    with serving(folder, "support/1", max_payload_bytes=50_000) as server:
        for name, (path, body) in REQUESTS.items():
            ids[name] = sent(server, path, json=body, headers={"x-user": "ann"})
        ids["text"] = sent(server, "/text", content=b"as it is", headers={"x-user": "ann"})
    with serving(folder, "support/2") as server:
        ids["second"] = sent(server, "/chat", json=chat("And now?"), headers={"x-user": "bob"})
    log = AnnotationLog(StorageSettings(uri=str(folder / "payload")))
    for name, value in (("first", "true"), ("failed", "false")):
        log.append([assessment(name, ids[name], value=value)])
    return Traffic(InferenceTable(folder / "payload", spool_dir=folder / "spool"), ids)


def assessment(key: str, request_id: str, **values: Any) -> Annotation:
    values = {"name": "helpful", "type": "feedback", **values}
    return Annotation(kind="assessment", key=key, databricks_request_id=request_id, **values)


def serving(folder: Path, version: str, **options: Any) -> Any:
    return recorded(app, folder, served_entity=version, requester_header="x-user", **options)


def sent(server: Recorded, path: str, **options: Any) -> str:
    reply = server.send(path, **options)
    server.row(reply)
    return str(reply.headers["x-databricks-request-id"])


# --- requests ---


def test_a_request_is_one_typed_row(traffic: Traffic) -> None:
    """Question and answer as text, tokens, cost, session, user, tools, of a chat completion."""
    row = traffic.request("first")
    [payload] = traffic.table.query(
        "from payload where databricks_request_id = ?", parameters=[traffic.ids["first"]]
    )
    for name in ("client_request_id", "trace_id", "request_date", "request_time", "time_to_first_byte_ms"):
        assert row[name] == payload[name] is not None
    assert row["duration_ms"] == payload["execution_duration_ms"]
    expected = {
        "served_entity_id": "support/1",
        "requester": "ann",
        "session_id": "session-1",
        "user_id": "ann",
        "status_code": 200,
        "state": "OK",
        "last_user_message": "How long?",
        "answer": "How long? 30 days.",
        "input_tokens": 200,
        "output_tokens": 20,
        "total_tokens": 220,
        "cost_usd": 0.5,
        "span_count": 7,
        "tool_calls": ["stock"],
        "error": None,
        "logging_error_codes": [],
    }
    assert {name: row[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("name", "question", "answer", "error"),
    [
        ("failed", "Is it there?", "Internal Server Error", "StockError: the stock service is down"),
        ("two", "both?", "done", None),
        ("odd", '{"case": "theft"}', "guilty of theft", None),
        ("words", "go on", "so it is", None),
        ("text", "as it is", "plain", None),
        ("absent", None, None, "Not Found"),
        ("invalid", None, None, "Input should be a valid dictionary"),
    ],
)
def test_what_was_asked_answered_and_went_wrong(
    traffic: Traffic, name: str, question: str | None, answer: str | None, error: str | None
) -> None:
    """Of a failing tool, plain functions, a stream, a text, and replies that no agent made."""
    row = traffic.request(name)
    assert (row["last_user_message"], row["answer"], row["error"]) == (question, answer, error)


def test_a_request_that_was_cut_keeps_mlflow_s_previews(traffic: Traffic) -> None:
    """A body beyond the limit is no JSON of its own any more."""
    row = traffic.request("large")
    assert "MAX_REQUEST_SIZE_EXCEEDED" in row["logging_error_codes"]
    assert row["last_user_message"].startswith('{"case": "yyy')
    assert row["answer"].lstrip('"').startswith("guilty of yyy")


CHUNKS: list[dict[str, Any]] = [{"choices": [{"delta": {"content": word}}]} for word in ("a ", "b")]
FORMS: list[tuple[Any, Any, str | None, str | None]] = [
    # OpenAI: chat completions with parts, tools and an answer that is refused; legacy completions; responses
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "image_url"}]}]},
        {"choices": [{"message": {"role": "assistant", "content": [{"type": "text", "text": "B"}]}}]},
        *("A", "B"),
    ),
    (
        {"messages": [{"role": "user", "content": "A"}, {"role": "tool", "content": "T"}]},
        {"choices": [{"message": {"role": "assistant", "content": None, "tool_calls": [{}]}}]},
        *("A", None),
    ),
    ({"prompt": "A"}, {"choices": [{"text": "B"}]}, "A", "B"),
    (
        {"input": "A"},
        {"output": [{"type": "reasoning"}, assistant := {"role": "assistant", "content": "B"}]},
        "A",
        "B",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "A"}]}]},
        {
            "output": [
                {
                    "type": "message",
                    "role": "assistant",
                    "content": [{"type": "output_text", "text": "wait"}],
                },
                {"type": "function_call", "name": "f"},
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "B"}]},
            ]
        },
        *("A", "B"),
    ),
    # Anthropic
    (
        {"messages": [{"role": "user", "content": "A"}]},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "text", "text": "B"}, {"type": "tool_use"}],
        },
        *("A", "B"),
    ),
    # MLflow's ChatAgent, and LangChain's messages
    (
        {"messages": [{"role": "user", "content": "A"}], "context": {"conversation_id": "1"}},
        {"messages": [assistant, {"role": "tool", "content": "T"}, {"role": "assistant", "content": ""}]},
        *("A", "B"),
    ),
    (
        {"messages": [{"type": "human", "content": "A"}]},
        {"messages": [{"type": "human", "content": "A"}, {"type": "ai", "content": "B"}]},
        *("A", "B"),
    ),
    # MLflow's scoring server
    (
        {"dataframe_split": {"columns": ["question"], "data": [["A"], ["Z"]]}},
        {"predictions": ["B"]},
        "A",
        "B",
    ),
    (
        {
            "dataframe_split": {
                "columns": ["n", "messages"],
                "data": [[1, [{"role": "user", "content": "A"}]]],
            }
        },
        {"predictions": {"choices": [{"message": {"content": "B"}}]}},
        *("A", "B"),
    ),
    ({"dataframe_records": [{"query": "A"}, {"query": "Z"}]}, {"predictions": [{"result": "B"}]}, "A", "B"),
    ({"inputs": "A"}, {"predictions": "B"}, "A", "B"),
    ({"inputs": ["A"]}, {"predictions": {"content": "B"}}, "A", "B"),
    ({"inputs": {"question": ["A"]}}, {"predictions": [3]}, "A", "3"),
    ({"inputs": {"messages": [{"role": "user", "content": "A"}]}}, {"predictions": [[1, 2]]}, "A", "[1,2]"),
    ({"instances": [{"text": "A"}]}, {"predictions": [assistant]}, "A", "B"),
    # plain functions, texts, and other JSON
    ({"question": "A"}, {"answer": "B"}, "A", "B"),
    ({"query": {"text": "A"}}, {"message": "B"}, "A", "B"),
    ("A", "B", "A", "B"),
    ([{"role": "user", "content": "A"}], [assistant], "A", "B"),
    ({"unknown": "A"}, {"unknown": "B"}, None, None),
    (7, True, None, "true"),
    (None, None, None, None),
    # streams of no known kind
    ({"prompt": "A"}, {"events": CHUNKS}, "A", "a b"),
    (
        {"prompt": "A"},
        {"events": ["a ", {"event": "token", "data": "b"}, {"data": {"text": "!"}}]},
        "A",
        "a b!",
    ),
    ({"prompt": "A"}, {"events": [{"n": 1}, None, 3]}, "A", None),
]


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows of ``requests`` for :data:`FORMS`, each spliced as the middleware does, without a trace."""
    uri = tmp_path_factory.mktemp("forms") / "payload"
    bodies = [(encoded(request), encoded(response)) for request, response, _, _ in FORMS]
    write(uri, [payload_row(number, *body) for number, body in enumerate(bodies)])
    return InferenceTable(uri).query("from requests order by databricks_request_id").to_dicts()


@pytest.mark.parametrize("number", range(len(FORMS)))
def test_every_form_of_request_and_reply_is_read(forms: list[dict[str, Any]], number: int) -> None:
    """The last user's message and the answer are texts, whichever API they are of."""
    row, (_, _, question, answer) = forms[number], FORMS[number]
    assert (row["last_user_message"], row["answer"]) == (question, answer)


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


def payload_row(number: int, request: bytes, response: bytes, **values: Any) -> dict[str, Any]:
    output = DatabricksOutput(f"0195-{number:06}")
    return {
        **dict.fromkeys(SCHEMA.names),
        "databricks_request_id": output.databricks_request_id,
        "request_date": NOON.date(),
        "request_time": NOON + timedelta(seconds=number),
        "status_code": 200,
        "request": request_column(request).decode(),
        "response": b"".join(response_column(response, output)).decode(),
        "logging_error_codes": [],
        **values,
    }


def write(uri: Path, rows: list[dict[str, Any]], **options: Any) -> None:
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    write_deltalake(uri, table, partition_by=[PARTITION_COLUMN], mode="append", **options)


# --- spans ---


def test_spans_are_those_that_mlflow_reads(traffic: Traffic) -> None:
    """Ids, names, types, times, values and states of all spans are what MLflow makes of the same rows."""
    rows = traffic.table.newest(100, where="trace_id is not null")
    expected = {
        (row["databricks_request_id"], span.span_id): {
            "trace_id": row["trace_id"],
            "other_trace_id": None if trace.info.trace_id == row["trace_id"] else trace.info.trace_id,
            "parent_span_id": span.parent_id,
            "name": span.name,
            "type": span.span_type,
            "status": span.status.status_code.value,
            "status_message": span.status.description or None,
            "start_time": datetime.fromtimestamp(0, UTC) + timedelta(microseconds=span.start_time_ns // 1000),
            "duration_ms": ((span.end_time_ns or 0) - span.start_time_ns) / 1e6,
            "inputs": span.inputs,
            "outputs": span.outputs,
            "attributes": span.attributes,
            "model": span.model_name,
        }
        for row in rows
        for trace in filter(None, (row.trace(), *row.other_traces()))
        for span in trace.data.spans
    }
    found = {}
    for span in traffic.table.query("from spans"):
        values = {
            name: None if span[name] is None else json.loads(span[name]) for name in ("inputs", "outputs")
        }
        values["attributes"] = {
            name: json.loads(value) for name, value in json.loads(span["attributes"]).items()
        }
        found[span["databricks_request_id"], span["span_id"]] = {**span, **values}
    assert found.keys() == expected.keys() and len(found) == 7 + 5 + 2 + 1 + 7
    for key, values in expected.items():
        assert {name: found[key][name] for name in values} == values
    assert any(values["other_trace_id"] for values in found.values())


def test_a_failing_span_has_its_exception(traffic: Traffic) -> None:
    """Its type and stack trace are columns."""
    [span] = traffic.table.query("from spans where name = 'stock' and status = 'ERROR'")
    assert span["exception_type"] == "StockError"
    assert "in stock" in span["exception_stacktrace"]


def test_no_token_is_counted_twice(traffic: Traffic) -> None:
    """Of spans in each other that say how many tokens they took the innermost counts; so in the rows."""
    rows = traffic.table.query("from model_usage order by served_entity_id, model").to_dicts()
    today = traffic.request("first")["request_date"]
    assert [tuple(row.values()) for row in rows] == [
        (today, "support/1", "large", 1, 1, 100, 10, 110, 0.25),
        (today, "support/1", "small", 2, 2, 200, 20, 220, 0.5),
        (today, "support/2", "large", 1, 1, 100, 10, 110, 0.25),
        (today, "support/2", "small", 1, 1, 100, 10, 110, 0.25),
    ]
    [sums] = traffic.table.query("select sum(input_tokens) as n, sum(total_cost_usd) as usd from payload")
    assert sums == {"n": 500, "usd": 1.25}


# --- odd rows ---

KEYS = (
    *(
        "messages",
        "input",
        "inputs",
        "role",
        "content",
        "text",
        "type",
        "choices",
        "message",
        "output",
        "data",
    ),
    *("predictions", "body", "encoding", "events", "dataframe_split", "columns", "error", "detail", "answer"),
    *("databricks_output", "trace", "other_traces", "spans", "attributes", "status", "span_id", "stream"),
    *(
        "start_time_unix_nano",
        "end_time_unix_nano",
        "mlflow.spanType",
        "mlflow.chat.tokenUsage",
        "",
        "a'b\"$.[0]",
    ),
)
LEAVES = (
    "user",
    "assistant",
    "",
    "x",
    '{"a"',
    "null",
    None,
    True,
    0,
    -1,
    2**63,
    2**64,
    1e308,
    1.5,
    "\x00",
    "🙂",
    [],
    {},
)


def odd_value(draw: random.Random, depth: int = 0) -> Any:
    """JSON of our words in any order."""
    kind = draw.random()
    if depth > 6 or kind < 0.3:
        return draw.choice(LEAVES)
    if kind < 0.5:
        return [odd_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {draw.choice(KEYS): odd_value(draw, depth + 1) for _ in range(draw.randrange(5))}


def odd_text(draw: random.Random) -> str | None:
    kind = draw.random()
    if kind < 0.05:
        return None
    text = json.dumps(odd_value(draw), ensure_ascii=draw.random() < 0.5)
    if kind < 0.3:
        return text[: draw.randrange(len(text) + 1)]
    if kind < 0.35:
        return text.replace('"', draw.choice(("'", '\\"', '"\\ud800')))
    if kind < 0.4:
        return draw.choice(
            ("", " ", "NaN", "[" * 5000, '{"a":' * 5000, "plain", "\ufeff{}", '{"a":1}{"a":2}')
        )
    return text


def odd_trace(draw: random.Random) -> str:
    """A response with spans, of which some member is not what it should be."""
    spans = [
        {
            "trace_id": "L6lwzb4kEEJ4OLFJYL27cA==",
            "span_id": f"scnHb7BauA{number}=",
            "parent_span_id": None,
            "name": "n",
            "start_time_unix_nano": 1,
            "end_time_unix_nano": 2,
            "events": [{"name": "exception", "attributes": {"exception.message": "m"}}],
            "status": {"code": "STATUS_CODE_ERROR", "message": "m"},
            "attributes": {"mlflow.spanType": '"TOOL"', "mlflow.chat.tokenUsage": '{"input_tokens": 1}'},
        }
        for number in range(draw.randrange(3))
    ]
    for span in spans:
        for _ in range(draw.randrange(3)):
            span[draw.choice(list(span))] = draw.choice((odd_value(draw), *LEAVES))
    trace = {"data": {"spans": spans}}
    return json.dumps(
        {"databricks_output": {"trace": trace, "other_traces": draw.choice(([trace], None, "x"))}}
    )


def test_no_row_fails_a_view(tmp_path: Path) -> None:
    """A thousand rows of cut, malformed and misleading JSON are a thousand requests with every column."""
    draw = random.Random(6)
    rows = [
        {
            **payload_row(number, b"", b""),
            "status_code": draw.choice((None, 200, 500)),
            "trace_state": draw.choice((None, "OK", "ERROR")),
            "trace_id": f"tr-{number}",
            "span_count": draw.choice((None, 0, 3)),
            "request": odd_text(draw),
            "response": odd_trace(draw) if draw.random() < 0.5 else odd_text(draw),
            "trace_info": odd_text(draw),
        }
        for number in range(1000)
    ]
    write(tmp_path / "t", rows)
    table = InferenceTable(tmp_path / "t")
    requests = table.query("from requests").to_dicts()
    assert len(requests) == len(rows)
    assert sum(row["error"] is not None for row in requests) > 100
    assert len(table.query("from spans")) > 100
    assert len(table.query("from model_usage")) > 0


# --- what is read ---

DAYS = [date(2025, 3, 1) + timedelta(days=days) for days in range(3)]


@pytest.fixture
def days(tmp_path: Path) -> Path:
    """Three days of 50 rows whose payloads don't compress; those of the first two days can't be read.

    They are committed in another order, as after a merge of old files.
    """
    uri, draw = tmp_path / "payload", random.Random(1)
    span = {"name": "n", "start_time_unix_nano": 1, "end_time_unix_nano": 1_000_001, "attributes": {}}
    for number, day in sorted(enumerate(DAYS), key=lambda pair: (pair[0] + 2) % 3):
        rows = [
            payload_row(
                number * 100 + row,
                encoded({"question": draw.randbytes(1000).hex()}),
                encoded({"answer": draw.randbytes(10_000).hex()}),
                request_date=day,
                request_time=datetime(day.year, day.month, day.day, tzinfo=UTC) + timedelta(seconds=row),
                execution_duration_ms=row,
                served_entity_id=f"v/{row % 2}",
                trace_id=f"tr-{number * 100 + row}",
                span_count=1,
            )
            for row in range(50)
        ]
        for row in rows:
            output = {"databricks_output": {"trace": {"data": {"spans": [span]}}}}
            row["response"] = json.dumps({**json.loads(row["response"]), **output})
        write(uri, rows)
    for day in DAYS[:2]:
        for path in (uri / f"{PARTITION_COLUMN}={day}").glob("*.parquet"):
            spoil(path, "response")
    return uri


def spoil(path: Path, column: str) -> None:
    """Overwrite a column's pages, so that reading them fails."""
    content = bytearray(path.read_bytes())
    metadata = pq.read_metadata(path)
    for group in range(metadata.num_row_groups):
        chunk = next(
            found
            for index in range(metadata.num_columns)
            if (found := metadata.row_group(group).column(index)).path_in_schema == column
        )
        first = chunk.dictionary_page_offset or chunk.data_page_offset
        content[first : first + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("sql", "count"),
    [
        ("select max(duration_ms), max(error) from requests where request_date = '2025-03-03'", 1),
        ("from spans where request_date = '2025-03-03'", 50),
        ("from spans where request_time >= '2025-03-03'", 50),
        ("from spans where databricks_request_id = '0195-000207'", 1),
        ("from spans where trace_id = 'tr-207'", 1),
        ("from requests where trace_id = 'tr-207'", 1),
        ("from requests where databricks_request_id in ('0195-000207', '0195-000208')", 2),
        ("from requests order by request_time desc limit 20", 20),
        (
            "from spans where databricks_request_id in"
            " (select databricks_request_id from requests order by request_time desc limit 20)",
            20,
        ),
        ("select calls from model_usage where request_date = '2025-03-03'", 0),
    ],
)
def test_conditions_on_a_view_leave_payloads_unread(days: Path, sql: str, count: int) -> None:
    """A day, a time, an id or a limit reaches the files: days whose payloads are damaged do no harm."""
    assert len(InferenceTable(days).query(sql)) == count
    with pytest.raises(QueryError):
        InferenceTable(days).query("select max(answer) from requests")


def bytes_read() -> int:
    """Bytes that this process has read so far, from files too."""
    [line] = re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text())
    return int(line)


def test_a_day_s_latency_reads_no_payload(days: Path) -> None:
    """p95 of each version takes a small part of a file's bytes, and its answers take most of them."""
    table = InferenceTable(days)
    [path] = (days / f"{PARTITION_COLUMN}={DAYS[2]}").glob("*.parquet")
    where = "from requests where request_date = '2025-03-03' group by all order by all"

    def read(sql: str) -> tuple[int, list[dict[str, Any]]]:
        before = bytes_read()
        rows = table.query(sql).to_dicts()
        return bytes_read() - before, rows

    read("select count(*) from requests")  # what is read once
    nbytes, rows = read(f"select served_entity_id, quantile_cont(duration_ms, 0.95) as p95 {where}")
    assert [tuple(row.values()) for row in rows] == [
        ("v/0", pytest.approx(45.6)),
        ("v/1", pytest.approx(46.6)),
    ]
    assert nbytes < path.stat().st_size / 4
    nbytes, _ = read(f"select served_entity_id, max(answer) {where}")
    assert nbytes > path.stat().st_size / 2


# --- beside the table ---


def test_the_views_see_what_is_pending(tmp_path: Path) -> None:
    """Rows in this machine's spool are requests and spans before there is a table."""
    settings = StorageSettings(uri=str(tmp_path / "t"), spool_dir=tmp_path / "s")
    span = {"name": "n", "attributes": {"mlflow.spanType": '"TOOL"'}}
    trace = {"databricks_output": {"trace": {"data": {"spans": [span]}}}}
    row = {**payload_row(1, b'{"question": "A"}', b""), "response": json.dumps(trace), "span_count": 1}
    spool = Spool(settings)
    spool.append(pa.RecordBatch.from_pylist([row], schema=SCHEMA), sync=False)
    spool.close()
    table = InferenceTable(settings.uri, spool_dir=settings.spool_dir)
    result = table.query("select last_user_message, tool_calls from requests", pending=True)
    assert result.to_dicts() == [{"last_user_message": "A", "tool_calls": ["n"]}]
    assert table.query("select name, type from spans", pending=True).to_dicts() == [
        {"name": "n", "type": "TOOL"}
    ]


def test_what_a_query_makes_goes_before_a_view(traffic: Traffic) -> None:
    """A table, a temporary one or a common table expression of the same name is what the query means."""
    for make in ("create table spans", "create temp table spans", "create view spans"):
        assert traffic.table.query(f"{make} as select 1 as one; from spans").to_dicts() == [{"one": 1}]
    assert traffic.table.query("with spans as (select 2 as two) from spans").to_dicts() == [{"two": 2}]


def test_views_are_there_for_whoever_lists_them(traffic: Traffic) -> None:
    """``show tables`` names them, a frame's condition may use one, and so may a name in quotes."""
    assert {*VIEWS, "payload"} <= {row["name"] for row in traffic.table.query("show tables")}
    where = "databricks_request_id in (select databricks_request_id from SPANS where type = 'TOOL')"
    assert traffic.table.count(where) == len(traffic.table.newest(9, where=where)) == 4
    assert len(traffic.table.query('from "requests"')) == len(traffic.ids)


def test_a_query_gets_the_views_that_it_names() -> None:
    """Making one takes time: a column's name, an alias or a part of a word is none."""
    assert named_views("select count(*) as requests from payload where spans_2 > 1") == []
    assert named_views("from payload where request->>'$.query' is null") == []
    assert named_views("select * from Spans join feedback using (trace_id)") == ["spans", "feedback"]
    assert named_views("from query_table('requests')") == [*VIEWS]


def test_a_table_may_be_called_like_a_view(tmp_path: Path) -> None:
    """The view is what queries find; the table is ``payload`` as ever."""
    write(tmp_path / "requests", [payload_row(1, b'{"question": "A"}', b"")])
    table = InferenceTable(tmp_path / "requests")
    assert table.query("select last_user_message from requests").to_dicts() == [{"last_user_message": "A"}]
    assert table.count("request is not null") == 1


def test_feedback_is_what_holds_now(tmp_path: Path) -> None:
    """Empty before the first, then one row for each assessment, not for what it was before; no tags."""
    write(tmp_path / "t", [payload_row(1, b'{"question": "A"}', b"", trace_id="tr-1")])
    table = InferenceTable(tmp_path / "t")
    empty = table.query("from feedback")
    log = AnnotationLog(StorageSettings(uri=str(tmp_path / "t")))
    both = {"databricks_request_id": "0195-000001", "trace_id": "tr-1"}
    log.append([assessment("a", "0195-000001", trace_id="tr-1", value="true")])
    changed = {"value": "false", "rationale": "no", "source_type": "HUMAN", "source_id": "ann"}
    log.append([assessment("a", "0195-000001", **changed)])
    log.append([Annotation(kind="tag", key="t", value='"x"', **both)])
    # What MLflow's store leaves where an assessment is deleted that was recorded with the trace.
    log.append([Annotation(kind="assessment", key="recorded", **both)])
    log.append([assessment("overridden", "0195-000001", value="1")])
    log.append([assessment("a", "0195-000001", **changed, document='{"overrides": "overridden"}')])
    [row] = table.query("select feedback.*, last_user_message from feedback join requests using (trace_id)")
    assert row.pop("feedback_time").utcoffset() == timedelta(0)
    assert row == {**both, "name": "helpful", "type": "feedback", **changed, "last_user_message": "A"}
    assert (len(empty), empty.columns) == (0, [*both, "name", "type", *changed, "feedback_time"])


def test_annotations_are_opened_for_feedback_alone(tmp_path: Path) -> None:
    """A damaged table of annotations fails a query that names them, and no other."""
    write(tmp_path / "t", [payload_row(1, b"{}", b"")])
    log = tmp_path / "t_annotations" / "_delta_log"
    log.mkdir(parents=True)
    (log / f"{0:020}.json").write_text("damaged", encoding="utf-8")
    table = InferenceTable(tmp_path / "t")
    assert table.query("select count(*) as requests, (select count(*) from spans) as n from requests")
    with pytest.raises(TableError, match="t_annotations"):
        table.query("from feedback")


# --- the guide ---


def test_the_columns_of_the_guide_are_those_of_the_views(traffic: Traffic) -> None:
    """Names and types, in order."""
    for view, lines in zip(("requests", "spans"), guide_tables(), strict=True):
        shown = {row["column_name"]: row["column_type"] for row in traffic.table.query(f"describe {view}")}
        assert lines == shown
    for view in ("model_usage", "feedback"):
        [text] = re.findall(rf"\*\*`{view}`\*\*:(.*?)\n\n", GUIDE, re.DOTALL)
        columns = traffic.table.query(f"from {view} limit 0").columns
        assert set(columns) == set(re.findall(r"`([a-z_]+)`", text)) - {"feedback", "expectation"}


def guide_tables() -> Iterator[dict[str, str]]:
    for text in re.findall(r"\| column \| type \| \|\n\|---\|---\|---\|\n((?:\|.*\n)+)", GUIDE):
        lines = [line.split("|")[1:3] for line in text.splitlines()]
        yield {name: kind.strip() for names, kind in lines for name in re.findall(r"`(\w+)`", names)}


def guide_queries() -> dict[str, list[str]]:
    """The queries for DuckDB below each heading."""
    sections = re.split(r"^##+ ", GUIDE, flags=re.MULTILINE)
    return {
        part.partition("\n")[0]: found
        for part in sections
        if (found := re.findall(r"```sql\n(.*?)```", part, re.DOTALL))
    }


def test_the_guide_has_both_dialects_of_each_query() -> None:
    """Each heading has one for Databricks and at least one for DuckDB, all of which a test below runs."""
    sections = re.split(r"^### ", GUIDE, flags=re.MULTILINE)[1:]
    assert all("Databricks SQL" in part and re.search(r"^DuckDB\b", part, re.MULTILINE) for part in sections)
    titles = {part.partition("\n")[0] for part in sections}
    assert guide_queries().keys() == {*titles, "What is read"} == EXPECTED.keys()


EXPECTED: dict[str, list[list[dict[str, Any]]]] = {
    "What is read": [
        [
            {"type": "AGENT", "spans": 3},
            {"type": "CHAT_MODEL", "spans": 5},
            {"type": "LLM", "spans": 5},
            {"type": "RETRIEVER", "spans": 4},
            {"type": "TOOL", "spans": 4},
            {"type": "UNKNOWN", "spans": 1},
        ]
    ],
    "Error rate and p95 per version and day": [
        [
            {"served_entity_id": "support/1", "requests": 9, "error_rate": pytest.approx(3 / 9)},
            {"served_entity_id": "support/2", "requests": 1, "error_rate": 0.0},
        ]
    ],
    "Last messages": [
        [
            {"last_user_message": "And now?", "answer": "And now? 30 days."},
            {"last_user_message": "as it is", "answer": "plain"},
        ],
        [{"asked": "And now?", "answer": "And now? 30 days."}, {"asked": None, "answer": None}],
    ],
    "Tokens per requester": [
        [
            {"requester": "ann", "requests": 9, "input_tokens": 300, "output_tokens": 30},
            {"requester": "bob", "requests": 1, "input_tokens": 200, "output_tokens": 20},
        ]
    ],
    "Tokens and cost per model": [
        [
            {"model": "large", "calls": 1, "total_tokens": 110, "cost_usd": 0.25},
            {"model": "large", "calls": 1, "total_tokens": 110, "cost_usd": 0.25},
            {"model": "small", "calls": 2, "total_tokens": 220, "cost_usd": 0.5},
            {"model": "small", "calls": 1, "total_tokens": 110, "cost_usd": 0.25},
        ]
    ],
    "Slowest tools": [
        [
            {"name": "stock", "inputs": f'{{"article":"{name}"}}'}
            for name in ("broken", "shoe", "shoe", "shoe")
        ]
    ],
    "Where the time goes": [],
    "Documents of requests that failed": [
        [
            {"error": "StockError: the stock service is down", "doc_uri": uri, "passage": passage}
            for uri, passage in (
                ("returns.md", "Returns are accepted within 30 days."),
                ("shipping.md", "Shipping takes 3 days."),
            )
        ]
    ],
    "What was cut or withheld": [
        [
            {"code": "MAX_REQUEST_SIZE_EXCEEDED", "requests": 1},
            {"code": "MAX_RESPONSE_SIZE_EXCEEDED", "requests": 1},
            {"code": "MAX_TRACE_SIZE_EXCEEDED", "requests": 1},
        ]
    ],
    "Joined with labels of your own": [
        [
            {"label": "bad", "requests": 1, "an_answer": "Internal Server Error"},
            {"label": "good", "requests": 1, "an_answer": "How long? 30 days."},
        ]
    ],
    "What people thought of it": [
        [
            {"name": "helpful", "value": "false", "times": 1, "for_example": "Is it there?"},
            {"name": "helpful", "value": "true", "times": 1, "for_example": "How long?"},
        ]
    ],
}
"""Of each row what doesn't depend on the clock."""


@pytest.mark.parametrize(
    ("title", "number"),
    [(title, number) for title, all_rows in EXPECTED.items() for number in range(len(all_rows))],
)
def test_the_queries_of_the_guide_run_as_they_stand(
    traffic: Traffic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, title: str, number: int
) -> None:
    """On a table that the real server has written, with the rows that are to be expected."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels.csv").write_text("client_request_id,label\nc1,good\nc2,bad\n", encoding="utf-8")
    rows = traffic.table.query(guide_queries()[title][number]).to_dicts()
    expected = EXPECTED[title][number]
    found = [{name: row[name] for name in want} for row, want in zip(rows, expected, strict=False)]
    if title in ("What is read", "Slowest tools"):  # in no order, or that of time
        found, expected = sorted(found, key=str), sorted(expected, key=str)
    assert found == expected
    assert len(rows) == len(expected) or title == "Last messages"


def test_the_time_of_a_request_is_broken_down_by_the_guide(traffic: Traffic) -> None:
    """Types with counts and quantiles; the agent's span is no shorter than the tools' in it."""
    [sql] = guide_queries()["Where the time goes"]
    rows = {row["type"]: row for row in traffic.table.query(sql)}
    assert (rows["AGENT"]["spans"], rows["TOOL"]["spans"], rows["RETRIEVER"]["spans"]) == (3, 4, 4)
    assert rows["AGENT"]["p95_ms"] >= rows["TOOL"]["p50_ms"] > 0
