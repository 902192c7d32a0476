"""The command line as its users have it: a real process, its output, its exit code."""

import csv
import io
import json
import os
import pty
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest
from deltalake import write_deltalake

from inference_table.ids import uuid7
from inference_table.schema import PARTITION_COLUMN, SCHEMA
from inference_table.spool import Spool
from tests.deploy.agents import QUESTION, failing, record, rude, support
from tests.inference_table.rows import batch, storage
from tests.support import ROOT, rows, served, wait_for

START = datetime(2025, 3, 1, 23, 30, tzinfo=UTC)
IDS = [uuid7() for _ in range(2500)]


def run(*arguments: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """One run of the command line, without a terminal."""
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **env},
        check=False,
        timeout=60,
    )


def output(*arguments: str, **env: str) -> str:
    done = run(*arguments, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    """2,500 rows over two days; the newest three have traces, the last of them failed."""
    uri = str(tmp_path_factory.mktemp("cli") / "payload")
    traces = [
        record(lambda: support(QUESTION)),
        [*record(rude), *record(rude)],
        record(lambda: failing(QUESTION)),
    ]
    values = []
    for number, id_ in enumerate(IDS):
        main, *others = traces[number - 2497] if number >= 2497 else [None]
        row = batch([id_], at=START + timedelta(seconds=number)).to_pylist()[0]
        body: dict[str, Any] = {"answer": f"你好 | {number}\nsecond line"}
        if main is not None:
            body["databricks_output"] = {
                "trace": main.to_dict(),
                "other_traces": [other.to_dict() for other in others],
            }
            row["trace_id"] = main.info.trace_id
        row["response"] = json.dumps(body, ensure_ascii=False)
        row["status_code"] = 500 if number in (100, 2499) else 200
        values.append(row)
    for part in (values[:1000], values[1000:]):
        rows_of_part = pa.Table.from_pylist(part, schema=SCHEMA)
        write_deltalake(uri, rows_of_part, partition_by=[PARTITION_COLUMN], mode="append")
    return uri


def test_help_teaches_and_imports_nothing_heavy() -> None:
    """``--help`` of the program and of each command has examples, and loads no engine to say so."""
    code = (
        "import sys\n"
        "from deploy.cli import main\n"
        "for args in (['--help'], ['serve', '--help'], ['query', '--help'], ['trace', '--help']):\n"
        "    main(args, standalone_mode=False)\n"
        "heavy = {'mlflow', 'duckdb', 'deltalake', 'pyarrow', 'uvicorn', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Examples:") == 4
    for words in ("tracelake serve my_agent:app", "current_date", "tracelake trace last", "--durability"):
        assert words in done.stdout


def test_the_version_is_said() -> None:
    """``--version`` names the program."""
    assert output("--version").startswith("tracelake ")


def test_query_writes_a_json_object_per_line_into_a_pipe(table: str) -> None:
    """Without a terminal each row is a line of JSON, whatever is in it, and nothing else is written."""
    sql = (
        "select request_time, response->>'$.answer' as a, request_metadata, null as n, 1.5::decimal(3,1) as d"
    )
    done = run("query", f"{sql} from payload order by request_time limit 2", "--table", table)
    assert (done.returncode, done.stderr) == (0, "")
    first, second = map(json.loads, done.stdout.splitlines())
    assert first == {
        "request_time": "2025-03-01T23:30:00+00:00",
        "a": "你好 | 0\nsecond line",
        "request_metadata": {"path": "/"},
        "n": None,
        "d": "1.5",
    }
    assert second["a"].startswith("你好 | 1\n")


def test_query_counts_over_days_and_commits(table: str) -> None:
    """The SQL may come from standard input, the table from the environment."""
    sql = "select request_date::text as day, count(*) as n from payload group by all order by all"
    done = run("query", "-", stdin=sql, INFERENCE_TABLE_URI=table)
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        {"day": "2025-03-01", "n": 1800},
        {"day": "2025-03-02", "n": 700},
    ]


def test_query_writes_csv_and_markdown(table: str) -> None:
    """A spreadsheet gets its quotes, a document its escaped bars."""
    sql = "select response->>'$.answer' as a, status_code from payload order by request_time limit 1"
    text = output("query", sql, "--table", table, "--format", "csv")
    assert list(csv.reader(io.StringIO(text))) == [["a", "status_code"], ["你好 | 0\nsecond line", "200"]]
    text = output("query", sql, "--table", table, "--format", "markdown")
    assert text.splitlines() == ["| a | status_code |", "| --- | --- |", "| 你好 \\| 0 second line | 200 |"]


def test_a_table_fits_the_terminal(table: str) -> None:
    """Long cells are cut, short columns and numbers keep their width, the count goes to stderr."""
    sql = (
        "select status_code, response, count(*) over () as n from payload where status_code = 500 order by 2"
    )
    done = run("query", sql, "--table", table, "--format", "table", COLUMNS="60")
    head, rule, *lines = done.stdout.splitlines()
    assert head.split() == ["status_code", "response", "n"]
    assert set(rule) == {"─", " "} and len(rule) <= 60
    assert len(lines) == 2
    assert all(line.startswith("        500  {") and line.endswith("  2") for line in lines)
    assert "second line" in lines[0] and "…" in lines[1]
    assert done.stderr.startswith("2 rows in ")


def test_more_columns_than_fit_become_lines(table: str) -> None:
    """``from payload`` on a terminal shows each row as a list of names and values."""
    text = output("query", "from payload limit 2", "--table", table, "--format", "table", COLUMNS="80")
    lines = text.splitlines()
    assert len(lines) == 2 * (len(SCHEMA) + 1)
    assert lines[0].startswith("── row 1 ─")
    assert [line.split()[0] for line in lines[1 : len(SCHEMA) + 1]] == SCHEMA.names
    assert all(len(line) <= 80 for line in lines)


def test_pending_rows_are_asked_for(tmp_path: Path) -> None:
    """``--pending`` reads what is spooled and says how much of it there was."""
    settings = storage(tmp_path)
    spool = Spool(settings)
    spool.append(batch(IDS[:3]), sync=False)
    place = ("--table", settings.uri, "--spool-dir", str(settings.spool_dir))
    done = run("query", "select count(*) as n from payload", *place, "--pending", "--format", "table")
    assert done.stdout.splitlines()[-1].strip() == "3"
    assert "3 pending rows read" in done.stderr
    assert run("query", "select 1", *place).returncode == 1
    assert f"request {IDS[0]}" in output("trace", IDS[0], *place)
    assert run("trace", IDS[0], *place, "--no-pending").returncode == 1
    spool.close()


def test_trace_draws_a_request_by_either_id(table: str) -> None:
    """A request id and its trace id draw the same header and tree."""
    text = output("trace", IDS[2497], "--table", table)
    lines = text.splitlines()
    assert lines[0] == f"request {IDS[2497]}"
    assert "→ 200 in 7.0 ms" in lines[1]
    trace_id = next(line for line in lines if line.startswith("trace ")).split()[1]
    assert [line.split(" ")[0] for line in lines if "●" in line] == ["●", "├─●", "└─●"]
    assert output("trace", trace_id, "--table", table) == text
    assert "x" * 5000 not in text
    assert "x" * 5000 in output("trace", trace_id, "--table", table, "--full")


def test_trace_last_draws_the_newest_that_meets_the_condition(table: str) -> None:
    """``last`` is the newest request; ``--where`` narrows it; further root traces are drawn too."""
    text = output("trace", "last", "--table", table)
    assert text.startswith(f"request {IDS[2499]}\n")
    assert "failed in call_stock_service: BusyError: stock service is busy: shoe-42" in text
    text = output("trace", "last", "--table", table, "--where", "status_code = 200")
    assert text.startswith(f"request {IDS[2498]}\n")
    assert text.count("\ntrace tr-") == 2
    text = output(
        "trace", "last", "--table", table, "--where", "status_code = 500 and trace_id not like 'tr-%0'"
    )
    assert text.startswith("request ")


def test_a_request_without_a_trace_is_drawn_all_the_same(table: str) -> None:
    """The header is there, and that there is no trace is said."""
    text = output("trace", IDS[5], "--table", table)
    assert text.startswith(f"request {IDS[5]}\n")
    assert text.endswith("no trace was recorded for this request\n")


@pytest.mark.parametrize(
    ("arguments", "says", "code"),
    [
        (
            ["query", "select foo from payload"],
            'cannot run the query: Binder Error: Referenced column "foo"',
            1,
        ),
        (
            ["query", "select 1", "--table", "/nowhere/at/all"],
            "'/nowhere/at/all': there is no Delta table",
            1,
        ),
        (["query", "select 1", "--table", "per%20cent/payload"], "percent-encoding", 1),
        (["trace", "\udcff"], "cannot find the request", 1),
        (["trace", "tr-unknown"], "cannot find the request 'tr-unknown'", 1),
        (["trace", "last", "--where", "false"], "cannot find the request that meets the condition", 1),
        (["serve", "no_such_module:app"], "no_such_module", 1),
        (["serve", "examples.docs_agent:app", "--sampling-fraction", "2"], "sampling_fraction is '2", 1),
        (["trace", "x", "--where", "true"], "--where goes with `last`", 2),
        (["query"], "Missing argument 'SQL'", 2),
        (["query", "select 1", "--format", "xml"], "'xml' is not one of", 2),
        (["serve", "a:b", "--port", "99999"], "99999", 2),
        (["unknown"], "No such command 'unknown'", 2),
    ],
)
def test_errors_are_one_line_and_an_exit_code(table: str, arguments: list[str], says: str, code: int) -> None:
    """What went wrong is on stderr's last line, without a traceback; nothing is on stdout."""
    done = run(*arguments, INFERENCE_TABLE_URI=table)
    assert (done.returncode, done.stdout) == (code, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Error: ") and says in last
    assert "Traceback" not in done.stderr
    if code == 1:
        assert done.stderr.count("\n") == 1


def test_debug_shows_where_an_error_came_from(table: str) -> None:
    """``--debug`` is for those who look for the cause."""
    done = run("--debug", "query", "select foo", "--table", table)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "QueryError" in done.stderr


@pytest.mark.parametrize("arguments", [["query", "from payload"], ["trace", "last", "--full"]])
def test_a_closed_pipe_is_no_error(table: str, arguments: list[str]) -> None:
    """``tracelake ... | head`` ends quietly."""
    command = [sys.executable, "-m", "deploy.cli", *arguments, "--table", table]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""


def on_terminal(*arguments: str) -> tuple[int, str]:
    """Exit code and output of a run that has a terminal for both."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "deploy.cli", *arguments],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        cwd=ROOT,
    )
    os.close(follower)
    shown = b""
    try:
        while part := os.read(leader, 65536):
            shown += part
    except OSError:
        # How Linux says that the other side is closed.
        pass
    finally:
        os.close(leader)
    return process.wait(), shown.decode()


def test_on_a_terminal_a_query_is_a_table(table: str) -> None:
    """With a terminal for output the default is the table, in the terminal's width."""
    sql = "select status_code, count(*) as n from payload group by all order by all"
    code, text = on_terminal("query", sql, "--table", table)
    assert code == 0
    assert "status_code     n" in text
    assert "        200  2498" in text
    assert "2 rows in" in text


HOSTILE_PIVOT = "pivot (select chr(27) || ']0;owned' || chr(155) || '2J' as a, 1 as n) on a using sum(n)"


@pytest.mark.parametrize("style", ["table", "json", "csv", "markdown"])
def test_no_value_or_heading_steers_the_terminal(table: str, style: str) -> None:
    """On a terminal control characters are replaced, in JSON escaped; a line break of CSV stays."""
    sql = (
        "select chr(27) || ']0;owned' || chr(7) || chr(155) || '2J' || chr(127) || chr(13) as a, 'x\ny' as b"
    )
    for one in (sql, HOSTILE_PIVOT):
        code, text = on_terminal("query", one, "--table", table, "--format", style)
        assert code == 0
        # The status line that comes and goes before is rich's own.
        shown = text[text.rindex("\x1b[2K") + 4 :] if "\x1b[2K" in text else text
        assert "]0;owned" in shown
        assert not re.search(r"[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f]", shown), repr(shown)
        if style == "json":
            assert "\\u009b2J" in shown
        else:
            assert "�2J" in shown
    if style == "csv":
        assert '"x\r\ny"' in on_terminal("query", sql, "--table", table, "--format", style)[1]


def test_a_pipe_gets_what_the_values_are(table: str) -> None:
    """Without a terminal nothing is replaced: what a program reads is the data."""
    sql = "select chr(27) || '[31mred' || chr(155) || chr(127) as a"
    expected = "\x1b[31mred\x9b\x7f"
    assert json.loads(output("query", sql, "--table", table)) == {"a": expected}
    for style in ("csv", "markdown"):
        assert expected in output("query", sql, "--table", table, "--format", style)


def test_an_error_does_not_steer_the_terminal(table: str) -> None:
    """DuckDB quotes the value that it failed on."""
    done = run("query", "select (chr(27) || ']0;owned' || chr(155) || chr(7))::int", "--table", table)
    assert done.returncode == 1
    assert "�]0;owned��" in done.stderr
    assert done.stderr.rstrip("\n").isprintable()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One row that a stranger and an agent filled with escape sequences and half of a character."""
    uri = str(tmp_path_factory.mktemp("hostile") / "payload")
    row = batch(IDS[:1]).to_pylist()[0]
    (main,) = record(rude)
    value = main.to_dict()
    value["data"]["spans"][0]["name"] = "\x1b]0;owned\x07\ud800"
    row["response"] = json.dumps({"answer": 1, "databricks_output": {"trace": value}})
    row["trace_id"] = main.info.trace_id
    row["requester"] = row["client_request_id"] = row["served_entity_id"] = "\x1b[2J\x9b2J"
    row["request_metadata"] = [("method", "GET\x1b[2J"), ("path", "/\x1b]0;owned\x07")]
    rows_of_it = pa.Table.from_pylist([row], schema=SCHEMA)
    write_deltalake(uri, rows_of_it, partition_by=[PARTITION_COLUMN])
    return uri


@pytest.mark.parametrize("full", [[], ["--full"]])
def test_a_trace_of_a_stranger_is_drawn_and_not_obeyed(hostile: str, full: list[str]) -> None:
    """Every field of the row and every name in the trace leaves without its control characters."""
    text = output("trace", "last", "--table", hostile, *full)
    assert all(line.isprintable() for line in text.splitlines())
    assert "GET�[2J /�]0;owned" in text
    assert "● �]0;owned�" in text
    assert text.count("�[2J�2J") == 3


@pytest.mark.parametrize(
    "value",
    [
        "'infinity'::timestamp",
        "date '99999-01-01'",
        "map {[1]: 2}",
        "map {1.5::decimal(3, 1): 2}",
    ],
)
@pytest.mark.parametrize("style", ["json", "csv", "table"])
def test_a_value_that_cannot_be_written_is_one_line(table: str, value: str, style: str) -> None:
    """The error says to cast the column; cast, it is written."""
    place = ("--table", table, "--format", style)
    done = run("query", f"select {value} as odd", *place)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "cast" in done.stderr and "varchar" in done.stderr
    assert "odd" in output("query", f"select ({value})::varchar as odd", *place)


def test_columns_with_equal_names_are_all_written(table: str) -> None:
    """In every format the second has a name of its own."""
    place = ("--table", table, "--format")
    sql = "select 1 as a, 2 as a"
    assert json.loads(output("query", sql, *place, "json")) == {"a": 1, "a_1": 2}
    assert output("query", sql, *place, "csv").split() == ["a,a_1", "1,2"]
    assert output("query", sql, *place, "markdown").splitlines()[0] == "| a | a_1 |"
    assert output("query", sql, *place, "table").split()[:2] == ["a", "a_1"]


def test_thousands_of_columns_are_written(table: str) -> None:
    """With equal names too, in every format, whole."""
    sql = f"select {', '.join(f'{number} as c' for number in range(3000))}"
    for style in ("json", "csv", "markdown", "table"):
        assert "c_2999" in output("query", sql, "--table", table, "--format", style)


@pytest.mark.parametrize("style", ["json", "csv", "markdown", "table"])
def test_head_ends_a_query_quietly(table: str, style: str) -> None:
    """``tracelake query ... | head -1`` gets its line, and no error is said."""
    query = f"{sys.executable} -m deploy.cli query 'from payload' --table {table} --format {style}"
    command = f"{query} | head -1 | wc -l"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.strip() == "1"
    assert done.stderr == "" or re.fullmatch(r"2,500 rows in [\d.]+ s\n", done.stderr)


APP = """
import mlflow
from fastapi import FastAPI

app = FastAPI()

@app.post("/ask")
def ask(body: dict) -> dict:
    with mlflow.start_span("think"):
        return {"answer": body["question"].upper()}
"""


def test_what_serve_records_query_and_trace_show(tmp_path: Path) -> None:
    """An app with no line of ours is served; its requests are rows that the other commands show."""
    (tmp_path / "plain_agent.py").write_text(APP)
    table = str(tmp_path / "tables" / "payload")
    place = ["--table", table, "--spool-dir", str(tmp_path / "spool")]
    arguments = ["plain_agent:app", *place, "--app-dir", str(tmp_path), "--served-entity", "plain/1"]
    with served(*arguments, env={}, log=tmp_path / "log") as (url, _):
        reply = httpx.post(f"{url}/ask", json={"question": "wo?"})
        assert reply.json() == {"answer": "WO?"}
        id_ = reply.headers["x-databricks-request-id"]
        wait_for(lambda: rows(table), "the row")
    sql = "select response->>'$.answer' as a, served_entity_id as e, status_code as s from payload"
    assert json.loads(output("query", sql, *place)) == {"a": "WO?", "e": "plain/1", "s": 200}
    text = output("trace", id_, *place)
    assert "  POST /ask → 200 in " in text
    assert "● think" in text
    assert "answer: WO?" in text
