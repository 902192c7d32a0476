"""``tracelake replay``: recorded requests go to another version of an agent, and what differs is found."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest
from click.testing import CliRunner
from deltalake import write_deltalake
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from deploy.cli import main
from deploy.replay_compare import Answer, differences, recorded_answer, sent_answer
from inference_table.ids import uuid7
from inference_table.schema import PARTITION_COLUMN, SCHEMA, ErrorCode
from tests.support import ROOT, rows, running, served, wait_for

AGENT = """
import json, os, random

import mlflow
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

app = FastAPI()
NEW = os.environ["AGENT_VERSION"] == "2"
DIES_AT = int(os.environ.get("DIES_AT", "-1"))


@mlflow.trace(span_type="TOOL")
def search(question):
    return ["returns.md"]


@mlflow.trace(span_type="TOOL")
def weather(question):
    return "sunny"


@mlflow.trace(span_type="AGENT")
def answer(question, n):
    search(question)
    if NEW and n % 7 == 3:
        weather(question)
    with mlflow.start_span("model", span_type="CHAT_MODEL") as span:
        usage = {"input_tokens": 100, "output_tokens": 15 if NEW else 10, "total_tokens": 0}
        span.set_attribute("mlflow.chat.tokenUsage", usage)
    return f"Within {14 if NEW and n % 5 == 0 else 30} days, question {n}."


@app.post("/{path}")
def invocations(path: str, body: dict):
    n = body["n"]
    if n == DIES_AT:
        os._exit(3)
    if NEW and n == 28:
        raise RuntimeError("the new version fails here")
    text = answer(body["question"], n)
    reply = {"id": f"chatcmpl-{random.getrandbits(64)}", "created": random.getrandbits(30), "model": "m"}
    if not body.get("stream"):
        message = {"role": "assistant", "content": text}
        return {**reply, "object": "chat.completion", "choices": [{"index": 0, "message": message}]}

    def events():
        for word in text.split(" "):
            delta = {"index": 0, "delta": {"role": "assistant", "content": word + " "}}
            chunk = {**reply, "object": "chat.completion.chunk", "choices": [delta]}
            yield f"data: {json.dumps(chunk)}\\n\\n"
        yield "data: [DONE]\\n\\n"

    return StreamingResponse(events(), media_type="text/event-stream")
"""
REQUESTS = 30
ANSWERS_DIFFER = {n for n in range(REQUESTS) if n % 5 == 0}
TOOLS_DIFFER = {n for n in range(REQUESTS) if n % 7 == 3}
FAILS = 28


def replay(*arguments: str, table: Path, spool: Path) -> subprocess.CompletedProcess[str]:
    """One run of the command, without a terminal."""
    return subprocess.run(
        command(arguments, table, spool), capture_output=True, text=True, cwd=ROOT, check=False
    )


def command(arguments: tuple[str, ...], table: Path, spool: Path) -> list[str]:
    place = ["--table", str(table), "--spool-dir", str(spool)]
    return [sys.executable, "-m", "deploy.cli", "replay", *arguments, *place]


def figures_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.stdout.startswith("{"), done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


class Home:
    """A folder with the agent, and the table and spool that all its versions share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.table = folder / "data" / "payload"
        self.spool = folder / "data" / "spool"
        (folder / "versioned_agent.py").write_text(AGENT)

    @contextmanager
    def version(self, number: str, **env: str) -> Iterator[str]:
        place = ["--table", str(self.table), "--spool-dir", str(self.spool), "--app-dir", str(self.folder)]
        arguments = ["versioned_agent:app", *place, "--served-entity", f"agent/{number}"]
        log = self.folder / f"log-{number}"
        with served(*arguments, env={"AGENT_VERSION": number, **env}, log=log) as (url, _):
            yield url

    def replay(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return replay(*arguments, table=self.table, spool=self.spool)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """Thirty requests, recorded by version 1; every third is streamed."""
    home = Home(tmp_path_factory.mktemp("replay"))
    with home.version("1") as url:
        for n in range(REQUESTS):
            body = {"question": "How long?", "n": n, "stream": n % 3 == 0}
            httpx.post(f"{url}/chat", json=body, timeout=30).raise_for_status()
    assert len(rows(home.table)) == REQUESTS
    return home


def by_number(home: Home, figures: dict[str, Any]) -> dict[int, dict[str, Any]]:
    numbers = {row["databricks_request_id"]: json.loads(row["request"])["n"] for row in rows(home.table)}
    return {numbers[one["databricks_request_id"]]: one for one in figures["outcomes"]}


def test_what_differs_is_found_and_joins_with_what_was_recorded(home: Home) -> None:
    """Other answers, tools, tokens and statuses are told from those that are the same; rows say of what."""
    report, plot = home.folder / "report.md", home.folder / "plot.png"
    with home.version("2") as url:
        done = home.replay(
            *("--from", "select databricks_request_id from payload where served_entity_id = 'agent/1'"),
            *("--to", f"{url}/invocations", "--speed", "5", "--report", str(report), "--json", "-"),
        )
    assert done.returncode == 1
    assert f"sending 30 requests to {url}/invocations, over about" in done.stderr
    figures = figures_of(done)
    changed = (ANSWERS_DIFFER | TOOLS_DIFFER) - {FAILS}
    assert figures["requests"] == {
        "chosen": 30,
        "skipped": {},
        "answered": 30,
        "under_way": 0,
        "same": 29 - len(changed),
        "changed": len(changed),
        "failed": 1,
    }
    outcomes = by_number(home, figures)
    assert {n for n, one in outcomes.items() if "answer" in one["changes"]} == ANSWERS_DIFFER | {FAILS}
    assert {n for n, one in outcomes.items() if "tools" in one["changes"]} == TOOLS_DIFFER
    assert outcomes[FAILS]["verdict"] == "failed" and outcomes[FAILS]["new"]["status"] == 500
    assert outcomes[3]["new"]["tools"] == ["search", "weather"]
    assert outcomes[15]["differences"][0]["path"] == "choices[0].message.content"  # streamed
    assert "Within 14 days" in outcomes[5]["differences"][0]["new"]
    assert figures["output_tokens"] == {"of": 29, "old": 290, "new": 29 * 15}
    assert figures["rows_of_the_target"] == 30

    recorded = {row["databricks_request_id"]: row for row in rows(home.table)}
    replayed = [row for row in recorded.values() if row["served_entity_id"] == "agent/2"]
    assert len(replayed) == REQUESTS
    for row in replayed:
        metadata = dict(row["request_metadata"])
        assert metadata["replay_run"] == figures["run"] and metadata["path"] == "/invocations"
        assert recorded[metadata["replay_of"]]["request"] == row["request"]
        assert row["trace_id"] or row["status_code"] == 500
    text = report.read_text()
    assert all((outcomes[n]["databricks_request_id"] in text) == (n in changed | {FAILS}) for n in outcomes)
    assert not plot.exists()


def test_the_sql_of_the_report_is_that_of_the_guide(home: Home) -> None:
    """Both name the same keys, and the report's runs."""
    from deploy.replay_report import SQL
    from inference_table.table import InferenceTable

    guide = (ROOT / "docs" / "replay.md").read_text()
    join = SQL.partition("where")[0].strip()
    assert join in guide
    assert InferenceTable(home.table).query(SQL.format(run="none")).columns == [
        "databricks_request_id",
        "recorded",
        "replayed",
    ]


def test_a_target_that_dies_midway_is_a_report_all_the_same(home: Home) -> None:
    """What it answered is compared; the rest failed, says why, and makes the exit code 1."""
    with home.version("2", DIES_AT="4") as url:
        done = home.replay(
            *("--where", "served_entity_id = 'agent/1'", "--to", f"{url}/chat", "--speed", "max"),
            *("--concurrency", "1", "--limit", "8", "--json", "-"),
        )
    assert done.returncode == 1
    figures = figures_of(done)
    assert (figures["requests"]["answered"], figures["requests"]["failed"]) == (4, 4)
    outcomes = by_number(home, figures)
    assert {n for n, one in outcomes.items() if one["error"]} == {4, 5, 6, 7}
    assert outcomes[4]["error"].startswith(("RemoteProtocolError", "ReadError"))
    assert outcomes[7]["error"].startswith("ConnectError")


def test_a_plot_is_drawn(home: Home) -> None:
    """``--plot`` makes a picture, also of a target that is no endpoint of ours; ``--no-record`` no rows."""
    pytest.importorskip("matplotlib")
    plot, report = home.folder / "plots" / "a plot).png", home.folder / "plotted.md"
    plot.parent.mkdir()
    before = len(rows(home.table))
    with running(Starlette(routes=[Route("/chat", echo, methods=["POST"])])) as url:
        done = home.replay(
            *("--where", "served_entity_id = 'agent/1'", "--to", f"{url}/chat", "--speed", "max"),
            *("--no-record", "--plot", str(plot), "--report", str(report)),
        )
    assert done.returncode == 0, done.stderr
    assert "0 same, 30 changed" in done.stdout and "0 from the target's rows, 30 as seen" in done.stdout
    assert "… and 10 more" in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "](plots/a%20plot%29.png)" in report.read_text()
    assert len(rows(home.table)) == before


def test_a_plot_that_cannot_be_drawn_sends_nothing(tmp_path: Path) -> None:
    """The kind of the picture is checked before the requests go out."""
    pytest.importorskip("matplotlib")
    write(tmp_path / "t", [payload("{}")])
    target = Target(yes)
    with running(target.app) as url:
        done = replay(
            *("--where", "true", "--to", url, "--plot", str(tmp_path / "plot.xyz")),
            table=tmp_path / "t",
            spool=tmp_path / "s",
        )
    assert done.returncode == 1 and "plot.xyz: its name ends in none of" in done.stderr
    assert not target.got


async def echo(request: Request) -> Response:
    return PlainTextResponse("no \x1b[31manswer | of ``` mine")


def payload(request: str | None, **values: Any) -> dict[str, Any]:
    """A row as a server would have made it."""
    at = values.pop("at", datetime(2025, 3, 1, 12, tzinfo=UTC))
    metadata = {"method": "POST", "path": "/x", "request_content_type": "application/json"}
    return {
        **dict.fromkeys(SCHEMA.names),
        "databricks_request_id": uuid7(),
        "request_date": at.date(),
        "request_time": at,
        "status_code": 200,
        "sampling_fraction": 1.0,
        "execution_duration_ms": 7,
        "request": request,
        "response": '{"answer": "yes", "databricks_output": {}}',
        "logging_error_codes": values.pop("codes", []),
        "request_metadata": list({**metadata, **values.pop("metadata", {})}.items()),
        **values,
    }


def write(table: Path, values: list[dict[str, Any]]) -> None:
    write_deltalake(
        str(table),
        pa.Table.from_pylist(values, schema=SCHEMA),
        partition_by=[PARTITION_COLUMN],
        mode="append",
    )


class Target:
    """A real endpoint that keeps what it gets; ``answer`` says what it replies."""

    def __init__(self, answer: Callable[[bytes], Response]) -> None:
        self.got: list[tuple[bytes, dict[str, str]]] = []
        self.answer = answer
        self.app = Starlette(routes=[Route("/{path:path}", self.reply, methods=["POST"])])

    async def reply(self, request: Request) -> Response:
        body = await request.body()
        self.got.append((body, dict(request.headers)))
        return self.answer(body)


def yes(_: bytes) -> Response:
    return JSONResponse({"answer": "yes"})


def test_bodies_go_out_as_they_came_in_and_others_are_counted(tmp_path: Path) -> None:
    """Each body is sent byte for byte with its content type; what was cut, binary or no POST is named."""
    verbatim = [
        ('{"a":  1,\n "ü": "\\ud800"}', "application/json"),
        ('{"truncated_bytes": 1, "head": "mine"}', "application/json"),
        ('{"body": "eA==", "encoding": "base64"}', "application/json; charset=utf-8"),
        ('{"body":["/w=="],"encoding":"base64"}', "application/json"),
        ("name=x&y=%20", "application/x-www-form-urlencoded"),
    ]
    base64 = '{"body":"/w==","encoding":"base64"}'
    cut = '{"truncated_bytes":9,"head":"x"}'
    write(
        tmp_path / "t",
        [
            *(payload(text, metadata={"request_content_type": kind}) for text, kind in verbatim),
            payload(cut, codes=[ErrorCode.MAX_REQUEST_SIZE_EXCEEDED]),
            payload(base64, metadata={"request_content_type": "image/png"}),
            payload(base64, metadata={"request_content_type": "application/json"}),
            payload(None),
            payload(None, codes=[ErrorCode.REDACTION_FAILED]),
            payload("", metadata={"method": "GET"}),
            payload("{}", metadata={"replay_of": "another"}),
        ],
    )
    target = Target(yes)
    with running(target.app) as url:
        done = replay(
            *("--where", "true", "--to", url, "--speed", "max", "--concurrency", "1", "--json", "-"),
            *("--header", "Authorization: Bearer x"),
            table=tmp_path / "t",
            spool=tmp_path / "s",
        )
    figures = figures_of(done)
    assert [(body.decode(), headers["content-type"]) for body, headers in target.got] == verbatim
    assert {headers["authorization"] for _, headers in target.got} == {"Bearer x"}
    sent = [one["databricks_request_id"] for one in figures["outcomes"]]
    assert [headers["x-tracelake-replay-of"] for _, headers in target.got] == sent
    assert figures["requests"]["skipped"] == {
        "GET request": 1,
        "is a replay itself": 1,
        "body was cut": 1,
        "body is binary": 2,
        "body was not read by the agent": 1,
        "body was withheld": 1,
    }
    assert (figures["requests"]["same"], done.returncode) == (5, 0)


def test_answers_that_nobody_records_become_rows(tmp_path: Path) -> None:
    """A target without capture: the replay writes rows with request, answer, status and what they replay."""
    events = b'data: {"text": "a"}\n\ndata: {"text": "b"}\n\n'
    answers = {
        b"json": lambda: JSONResponse(
            {"answer": "yes", "usage": {"prompt_tokens": 3, "completion_tokens": 4}}
        ),
        b"text": lambda: PlainTextResponse("no", 404),
        b"bytes": lambda: Response(b"\xff\x00", media_type="application/octet-stream"),
        b"events": lambda: StreamingResponse(iter([events]), media_type="text/event-stream"),
    }
    at = datetime(2025, 3, 1, 12, tzinfo=UTC)
    originals = [payload(one.decode(), at=at + timedelta(seconds=n)) for n, one in enumerate(answers)]
    write(tmp_path / "t", originals)
    with running(Target(lambda body: answers[body]()).app) as url:
        done = replay(
            *("--where", "true", "--to", f"{url}/a?b=c", "--speed", "max", "--json", "-"),
            table=tmp_path / "t",
            spool=tmp_path / "s",
        )
    figures = figures_of(done)
    found = {
        row["request"]: row for row in rows(tmp_path / "t") if dict(row["request_metadata"]).get("replay_of")
    }
    assert done.returncode == 1 and figures["requests"]["failed"] == 1  # the 404
    assert found.keys() == {"json", "text", "bytes", "events"}
    for original in originals:
        row = found[original["request"]]
        metadata = dict(row["request_metadata"])
        assert metadata["replay_of"] == original["databricks_request_id"]
        assert (metadata["replay_run"], metadata["path"]) == (figures["run"], "/a")
        assert row["served_entity_id"] == f"replay/{figures['run']}"
        output = json.loads(row["response"])["databricks_output"]
        assert output["databricks_request_id"] == row["databricks_request_id"]
    assert (found["json"]["input_tokens"], found["json"]["output_tokens"]) == (3, 4)
    assert found["text"]["status_code"] == 404 and json.loads(found["text"]["response"])["body"] == "no"
    assert json.loads(found["bytes"]["response"])["encoding"] == "base64"
    assert json.loads(found["events"]["response"])["events"] == [{"text": "a"}, {"text": "b"}]
    assert {one["replay_id"] for one in figures["outcomes"]} == {
        row["databricks_request_id"] for row in found.values()
    }


def test_a_redirect_is_no_answer(tmp_path: Path) -> None:
    """A target with another path sends the requests elsewhere: they failed, but for those that ever did."""
    write(tmp_path / "t", [payload("{}"), payload("{}", status_code=308), payload("{}", status_code=404)])
    with running(Target(lambda _: Response(status_code=307, headers={"location": "/"})).app) as url:
        done = replay(
            *("--where", "true", "--to", f"{url}/x/", "--speed", "max", "--no-record", "--json", "-"),
            table=tmp_path / "t",
            spool=tmp_path / "s",
        )
    figures = figures_of(done)
    verdicts = {one["old"]["status"]: one["verdict"] for one in figures["outcomes"]}
    assert verdicts == {200: "failed", 308: "changed", 404: "changed"}
    assert done.returncode == 1


def test_the_report_is_written_though_nobody_reads_the_terminal(tmp_path: Path) -> None:
    """``tracelake replay --report FILE | head -1`` leaves the file."""
    write(tmp_path / "t", [payload("{}") for _ in range(3)])
    report = tmp_path / "report.md"
    with running(Target(yes).app) as url:
        arguments = ("--where", "true", "--to", url, "--no-record", "--report", str(report))
        process = subprocess.Popen(
            command(arguments, tmp_path / "t", tmp_path / "s"), cwd=ROOT, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.close()
        process.wait(60)
    assert "3 same, 0 changed" in report.read_text()


def test_a_slow_answer_holds_up_no_other(tmp_path: Path) -> None:
    """At recorded speed requests go out in their order while earlier ones are still being answered."""
    at = datetime(2025, 3, 1, 12, tzinfo=UTC)
    write(tmp_path / "t", [payload(str(n), at=at + timedelta(milliseconds=50 * n)) for n in range(4)])
    last_came = threading.Event()
    order: list[str] = []

    def reply(request: Request) -> Response:
        order.append(request.headers["x-tracelake-replay-of"])
        if len(order) == 4:
            last_came.set()
        return JSONResponse({"answer": "yes" if last_came.wait(30) else "no"})

    with running(Starlette(routes=[Route("/", reply, methods=["POST"])])) as url:
        done = replay(
            *("--where", "true", "--to", url, "--no-record", "--json", "-"),
            table=tmp_path / "t",
            spool=tmp_path / "s",
        )
    assert figures_of(done)["requests"]["same"] == 4
    expected = [
        row["databricks_request_id"] for row in sorted(rows(tmp_path / "t"), key=lambda row: row["request"])
    ]
    assert order == expected


def test_an_interruption_leaves_a_partial_report(tmp_path: Path) -> None:
    """Ctrl-C ends the replay; what was answered by then is reported, and what is under way said."""
    write(tmp_path / "t", [payload(str(n)) for n in range(6)])
    stuck, release = threading.Event(), threading.Event()
    lock = threading.Lock()
    seen = []

    def reply(request: Request) -> Response:
        with lock:
            seen.append(request)
            number = len(seen)
        if number == 4:
            stuck.set()
            release.wait(60)
        return JSONResponse({"answer": "yes"})

    arguments = ("--where", "true", "--to", "URL", "--speed", "max", "--concurrency", "1", "--no-record")
    with running(Starlette(routes=[Route("/", reply, methods=["POST"])])) as url:
        full = [url if one == "URL" else one for one in command(arguments, tmp_path / "t", tmp_path / "s")]
        process = subprocess.Popen(full, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            wait_for(stuck.is_set, "the fourth request", 60)
            process.send_signal(signal.SIGINT)
            stdout, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
            release.set()
    assert process.returncode == 130, stderr
    assert "3 same, 0 changed" in stdout
    assert "Interrupted: 3 requests have no answer, 1 of them" in stdout


def test_an_answer_that_takes_too_long_failed(tmp_path: Path) -> None:
    """``--timeout`` is for the whole of an answer, not for each of its bytes."""
    write(tmp_path / "t", [payload("{}")])
    over = threading.Event()

    def drip() -> Iterator[bytes]:
        while not over.wait(0.05):
            yield b"."

    with running(Target(lambda _: StreamingResponse(drip())).app) as url:
        done = replay(
            *("--where", "true", "--to", url, "--timeout", "1", "--json", "-"),
            table=tmp_path / "t",
            spool=tmp_path / "s",
        )
        over.set()
    [outcome] = figures_of(done)["outcomes"]
    assert (outcome["error"], done.returncode) == ("no whole answer within 1 s", 1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--to", "http://x"], "give --from or --where"),
        (["--where", "true", "--from", "select 1", "--to", "http://x"], "give --from or --where"),
        (["--where", "true", "--to", "localhost:8000"], "not of the form http://host:port/path"),
        (["--where", "true", "--to", "http://x", "--speed", "0"], "none of: recorded, max"),
        (["--where", "true", "--to", "http://x", "--header", "x"], "not of the form 'NAME: VALUE'"),
        (["--where", "true", "--to", "http://x", "--header", "a b: x"], "not of the form 'NAME: VALUE'"),
        (["--where", "true", "--to", "http://x", "--header", "Content-Length: 5"], "leave it out"),
        (["--where", "true", "--to", "http://x", "--timeout", "nan"], "no number of seconds"),
        (["--where", "true", "--to", "http://x", "--report", "/no/such/r.md"], "no folder '/no/such'"),
        (["--where", "true", "--to", "http://x", "--json", "/no/such/r.json"], "no folder '/no/such'"),
        (["--from", "select status_code from payload", "--to", "http://x"], "yields databricks_request_id"),
        (["--from", "select 1; select 2", "--to", "http://x"], "yields databricks_request_id"),
        (["--where", "false", "--to", "http://x"], "was chosen"),
    ],
)
def test_a_wrong_command_sends_nothing_and_says_why(tmp_path: Path, arguments: list[str], says: str) -> None:
    """One line names what is missing, before anything is sent."""
    write(tmp_path / "t", [payload("{}")])
    place = ["--table", str(tmp_path / "t"), "--spool-dir", str(tmp_path / "s")]
    done = CliRunner().invoke(main, ["replay", *arguments, *place])
    assert done.exit_code in (1, 2)
    assert says in done.output and "sending" not in done.output


@pytest.mark.parametrize(
    ("old", "new", "paths"),
    [
        ({"id": "a", "created": 1, "x": 1}, {"id": "b", "created": 2, "x": 1}, []),
        ({"usage": {"total": 1}, "x": [1, 2]}, {"x": [1, 2]}, []),
        ({"x": {"id": "call_8fb1c2d3e4f5"}}, {"x": {"id": "call_00000000000a"}}, []),
        ({"x": {"id": "returns-7"}}, {"x": {"id": "returns-8"}}, ["x.id"]),
        ({"order": {"id": 41}}, {"order": {"id": 42}}, ["order.id"]),
        ({"x": {"created_at": 1.5}}, {"x": {"created_at": 2.5}}, []),
        ({"x": [1, 2]}, {"x": [1, 2, 3]}, ["x[2]"]),
        ({"x": 1}, {"y": 1}, ["x", "y"]),
        ({"x": 1}, {"x": True}, ["x"]),
        ({"x": None}, {}, ["x"]),
        ("a", "a", []),
        ("a", {"x": "a"}, [""]),
        ({str(n): n for n in range(9)}, {str(n): -n for n in range(9)}, ["1", "2", "3"]),
    ],
)
def test_answers_are_compared_by_what_they_say(old: Any, new: Any, paths: list[str]) -> None:
    """Ids and times made up for each answer are left out; a number of an order is not."""
    assert [found.path for found in differences(old, new)] == paths


def test_further_keys_are_left_out_wherever_they_are() -> None:
    """``--ignore``."""
    old, new = {"model": "a", "x": [{"seed": 1}]}, {"model": "b", "x": [{"seed": 2}]}
    assert [found.path for found in differences(old, new, frozenset({"model"}))] == ["x[0].seed"]
    assert differences(old, new, frozenset({"model", "seed"})) == []


def test_a_long_text_is_shown_where_it_differs() -> None:
    """Not its head, and not all of it."""
    [found] = differences("x" * 500 + "old" + "y" * 500, "x" * 500 + "new" + "y" * 500)
    assert found.old is not None and "xold" in found.old and len(found.old) < 130


def test_a_nested_answer_is_compared_or_said_not_to_be() -> None:
    """Thousands of levels end nothing."""
    deep: Any = "end"
    for _ in range(5000):
        deep = [deep]
    assert differences({"x": 1}, {"x": deep})
    assert sent_answer(b"[" * 5000 + b"]" * 5000, "application/json").value is not None


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b'{"a": 1}', "application/json"),
        (b"[1, 2]", "application/json"),
        (b'"text"', "application/json"),
        (b"plain", "text/plain"),
        (b"\xff\xfe\x00", "image/png"),
        (b"", ""),
        (b'data: {"x": 1}\n\ndata: [DONE]\n\n', "text/event-stream"),
    ],
)
def test_an_answer_equals_itself_recorded(body: bytes, content_type: str) -> None:
    """What came and what the table has of it are the same, whatever it was."""
    from inference_table.record import DatabricksOutput, response_column
    from serving.streams import aggregate, is_stream

    stored, kind = body, content_type
    if is_stream(content_type):
        stored, kind = aggregate(body, content_type).body, "application/json"
    column = b"".join(response_column(stored, DatabricksOutput("id"), content_type=kind)).decode()
    assert recorded_answer(column).value == sent_answer(body, content_type).value


def test_calls_and_tokens_are_read_from_an_answer() -> None:
    """In the words of chat completions, of responses and of Anthropic."""
    calls = [{"id": "call_1", "type": "function", "function": {"name": "search", "arguments": "{}"}}]
    chat = {
        "choices": [{"message": {"tool_calls": calls}}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2},
    }
    assert (Answer(chat).calls, Answer(chat).tokens) == (("search",), (1, 2))
    responses = {"output": [{"type": "function_call", "name": "search"}], "usage": {"input_tokens": 5}}
    assert (Answer(responses).calls, Answer(responses).tokens) == (("search",), (5, None))
    assert Answer({"content": [{"type": "tool_use", "name": "search"}]}).calls == ("search",)
    assert (Answer("text").calls, Answer("text").tokens) == ((), (None, None))


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without matplotlib a plot is refused before anything is sent, with what to install."""
    from deploy.replay_report import check_plot
    from inference_table.errors import TracelakeError

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(TracelakeError, match=r"pip install 'tracelake\[plot\]'"):
        check_plot(Path("plot.png"))


def test_the_guide_names_every_option() -> None:
    """``docs/replay.md`` has each option of the command."""
    from deploy.review_commands import replay as replay_command

    guide = (ROOT / "docs" / "replay.md").read_text()
    for option in replay_command.params:
        assert any(name in guide for name in [*option.opts, *option.secondary_opts]), option.opts
