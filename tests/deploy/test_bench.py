"""``tracelake bench``: an agent with and without capture, over real sockets, and what is said about it."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest

from deploy.bench import endpoint, interleaved, percentile, session_stats
from deploy.bench_report import noise_of, problems
from deploy.cli import bench as command
from deploy.comparison import Body, Comparison, Plan, Recorded, Reply, read_bodies
from inference_table.errors import SettingsError, TracelakeError
from tests.support import ROOT, output_of, rows, wait_for

AGENT = """
import contextlib
import time

import mlflow
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from serving import InferenceTableMiddleware


@mlflow.trace
def retrieve(size):
    return "word " * (size // 5)


@mlflow.trace(span_type="AGENT")
def answer(request):
    time.sleep(request.get("sleep", 0))
    if request.get("reset"):
        mlflow.tracing.reset()
    if request.get("fail"):
        raise RuntimeError("the model is out")
    retrieve(request.get("size", 10))
    return {"is_traced": bool(mlflow.get_current_active_span())}


async def invocations(request):
    return JSONResponse(answer(await request.json()))


@contextlib.asynccontextmanager
async def lifespan(app):
    mlflow.tracing.enable()
    yield


routes = [Route("/invocations", invocations, methods=["POST"])]
app = Starlette(routes=routes)
app.add_middleware(InferenceTableMiddleware)
enabling = Starlette(routes=routes, lifespan=lifespan)


def stream(request: dict):
    for number in range(3):
        yield {"number": number}
"""
SMALL, LARGE, FAILING = {"size": 10}, {"size": 300_000}, {"fail": True}
BRISK = ("--pause", "0", "--setting", "flush_seconds=0.2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's project, which has a package called deploy of its own."""
    (tmp_path / "my_agent.py").write_text(AGENT, encoding="utf-8")
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy" / "__init__.py").write_text("raise RuntimeError('not this one')", encoding="utf-8")
    return tmp_path


def write_bodies(folder: Path, *bodies: object) -> str:
    """A file of bodies; its name."""
    (folder / "bodies.jsonl").write_text("\n".join(map(json.dumps, bodies)) + "\n", encoding="utf-8")
    return "bodies.jsonl"


def start(folder: Path, *arguments: str, **env: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "deploy.cli", "bench", *arguments],
        cwd=folder,
        env={**os.environ, "TMPDIR": str(folder), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def bench(folder: Path, *arguments: str, **env: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    with start(folder, *arguments, **env) as process:
        try:
            output, errors = process.communicate(timeout=90)
        finally:
            process.terminate()
    return process.returncode, output, errors


def figures_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "cost.json").read_text(encoding="utf-8"))
    return found


def test_calls_alternate() -> None:
    """Neither always follows the other, and the calls that warm up are not timed."""
    order: list[str] = []
    times = interleaved(lambda: order.append("A"), lambda: order.append("B"), count=3, warm_up=1)
    assert "".join(order) == "ABBAABBA"
    assert [len(one) for one in times] == [3, 3]
    assert all(ms >= 0 for one in times for ms in one)


def test_percentiles_are_interpolated() -> None:
    """As NumPy does by default."""
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2
    assert percentile([1, 2], 0.5) == 1.5
    assert percentile(list(range(101)), 0.99) == 99
    assert percentile([7.0], 0.95) == percentile([7.0], 0) == percentile([7.0], 1) == 7
    assert math.isnan(percentile([], 0.5))


def test_noise_is_what_the_same_thing_differs_by() -> None:
    """Each body is compared with itself: that bodies differ from one another is no noise."""
    assert noise_of([[5.0] * 20, [900.0] * 20]) == {"p50": 0, "p95": 0, "p99": 0}
    assert 0 < noise_of([[float(number % 10) for number in range(200)]])["p50"] <= 9
    assert math.isnan(noise_of([[5.0]])["p50"])
    assert math.isnan(noise_of([])["p50"])


def test_what_capture_costs(folder: Path) -> None:
    """A table with rows for both sizes of trace, the same as JSON, all requests recorded, nothing left."""
    bodies = write_bodies(folder, SMALL, LARGE)
    arguments = ("--requests", "12", "--warm-up", "2", *BRISK, "--json", "cost.json")
    code, output, errors = bench(folder, "my_agent:app", "--request", bodies, *arguments)
    assert (code, errors) == (
        0,
        "sending 28 requests: 12 with capture and 12 without, after 2 each to warm up\n",
    )
    names = [line.split("  ")[0] for line in output.splitlines()]
    for name in ("reply p50, ms", "reply p99, ms", "memory after the run, MB", "< 100 KB", "< 1 MB"):
        assert name in names
    assert "first byte p50, ms" not in names
    assert "Rows recorded: 14 of 14 requests" in output

    found = figures_of(folder)
    assert found["requests"]["captured"] == found["requests"]["recorded"] == 14
    assert found["requests"]["failed_without"] == found["requests"]["failed_with"] == 0
    assert [(one["trace"], one["requests"], one["spans"]) for one in found["by_trace_size"]] == [
        ("< 100 KB", 6, 2),
        ("< 1 MB", 6, 2),
    ]
    assert 300_000 < found["by_trace_size"][1]["trace_bytes"] < 310_000
    for values in found["reply_ms"].values():
        assert values["added"] == pytest.approx(values["with"] - values["without"])
    assert found["capture_overhead"]["p50"] > 0
    assert not list(folder.glob("tracelake-bench*"))


def test_a_stream_is_timed_to_its_first_byte_and_to_its_end(folder: Path) -> None:
    """A generator, several at a time, recorded before its end leaves; JSON alone on standard output."""
    (folder / "body.json").write_text("{}", encoding="utf-8")
    arguments = ("--requests", "7", "--warm-up", "1", "--concurrency", "4", "--setting", "durability=strict")
    code, output, errors = bench(
        folder, "my_agent:stream", "--request", "body.json", *arguments, *BRISK, "--json", "-"
    )
    assert code == 0, errors
    found = json.loads(output)
    assert (found["requests"]["measured"], found["requests"]["recorded"]) == (8, 12)
    assert found["settings"] == {"durability": "strict", "flush_seconds": "0.2"}
    for side in ("without", "with"):
        assert 0 < found["first_byte_ms"]["p50"][side] < found["reply_ms"]["p50"][side]


def test_an_agent_that_fails_at_once_is_not_measured(folder: Path) -> None:
    """The error says what was sent, what came back, and what the agent said; no more money is spent."""
    bodies = write_bodies(folder, FAILING)
    code, output, errors = bench(folder, "my_agent:app", "--request", bodies, "--requests", "500")
    assert (code, output) == (1, "")
    for words in (
        "without capture, the agent's answer to the request in line 1 of 'bodies.jsonl' is 500",
        "'Internal Server Error'",
        "RuntimeError: the model is out",
    ):
        assert words in errors


def test_an_agent_that_fails_at_times_is_reported(folder: Path) -> None:
    """Its good replies are measured; the exit code and the error tell of the others."""
    bodies = write_bodies(folder, SMALL, SMALL, FAILING)
    arguments = ("--requests", "6", "--warm-up", "2", *BRISK, "--json", "cost.json")
    code, output, errors = bench(folder, "my_agent:app", "--request", bodies, *arguments)
    assert code == 1
    assert "reply p50, ms" in output
    for where in ("without", "with"):
        assert f"2 of 6 replies {where} capture are no success (2 with 500)" in errors
    assert "line 3 of 'bodies.jsonl': 500 'Internal Server Error'" in errors
    found = figures_of(folder)
    assert found["requests"]["failed_with"] == 2
    assert [one["requests"] for one in found["by_trace_size"]] == [4]


def test_requests_that_are_not_recorded_are_reported() -> None:
    """Where the settings leave requests out, nothing is measured; a row that is missing is our fault."""
    plan = Plan(target="my_agent:app", bodies=[Body(b"{}", "'body.json'")], path="/chat")
    reply = Reply(0, 200, 1.0, 1.0, False, None, "")
    left_out = Comparison(plan, [(reply, reply)], [], {}, (0.0, 0.0), (0.0, 0.0), ("", ""))
    [message] = problems(left_out)
    assert message.startswith(
        "no request was captured: see whether POST /chat is among INFERENCE_TABLE_PATHS"
    )
    [message] = problems(replace(left_out, captured=["id"], last_words=("", "the disk is full")))
    assert message == (
        "1 of 1 captured requests are not in the table; the agent's last words: the disk is full"
    )
    assert not problems(replace(left_out, captured=["id"], recorded={"id": Recorded(100, 1000, 2)}))


def test_an_unknown_target_is_an_error(folder: Path) -> None:
    """The same as that of ``tracelake serve``, in one line."""
    code, output, errors = bench(folder, "my_agent:ap", "--request", write_bodies(folder, SMALL))
    assert (code, output) == (1, "")
    assert errors.splitlines()[1:] == [
        "Error: cannot serve 'my_agent:ap': module 'my_agent' has no attribute 'ap'"
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "body.json",
            '{"a":',
            r"the request in '.*body\.json' is not JSON: .* give a file with one JSON value",
        ),
        ("body.jsonl", '{"a": 1}\n\n{"a"\n', r"the request in line 3 of '.*body\.jsonl' is not JSON"),
        ("body.jsonl", "\n", r"there is no request in '.*body\.jsonl': write one JSON value in each line"),
        ("body.json", b"\xff", r"the request in '.*body\.json' is not JSON"),
    ],
)
def test_a_body_that_is_not_json_is_an_error(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    """It names the file and the line."""
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(SettingsError, match=message):
        read_bodies([path])


def test_bodies_are_sent_as_they_are(tmp_path: Path) -> None:
    """A file whole, a .jsonl file line by line, in the order given."""
    (tmp_path / "one.json").write_text('{\n "a": 1\n}\n', encoding="utf-8")
    (tmp_path / "more.jsonl").write_text('{"a": "ü"}\n\n[2]', encoding="utf-8")
    bodies = read_bodies([tmp_path / "one.json", tmp_path / "more.jsonl"])
    assert [body.content.decode() for body in bodies] == ['{\n "a": 1\n}\n', '{"a": "ü"}', "[2]"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"path": "http://elsewhere/chat"},
            "the path is 'http://elsewhere/chat': give one that begins with /",
        ),
        (
            {"settings": {"durability": "hard"}},
            "the argument durability is 'hard', .*: give relaxed, strict or committed",
        ),
        ({"settings": {"durabilty": "strict"}}, "unknown settings durabilty"),
        (
            {"settings": {"uri": "s3://bucket/payload"}},
            "cannot set uri: a measuring run has a table .* of its own",
        ),
    ],
)
def test_what_is_not_accepted_is_an_error(given: dict[str, Any], message: str) -> None:
    """Before anything is started."""
    with pytest.raises(SettingsError, match=message):
        Plan(target="my_agent:app", bodies=[], **given)


@pytest.fixture
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def test_without_capture_spans_cost_nothing(in_folder: Path) -> None:
    """No span is made, whatever the agent does to MLflow's tracing; with capture there are spans and rows."""
    # Where MLflow's own tracing can begin, though nobody is there to export to.
    environment = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    for capture in (False, True):
        with endpoint("my_agent:enabling", in_folder, capture=capture, environment=environment) as served:
            replies = [served.client.post("/invocations", json={"reset": reset}) for reset in (0, 1, 0)]
            assert served.cpu_seconds() > 0
            assert served.rss_bytes() > 10_000_000
        assert {reply.status_code for reply in replies} == {200}
        assert [reply.json()["is_traced"] for reply in replies] == [capture] * 3
        assert ["x-databricks-request-id" in reply.headers for reply in replies] == [capture] * 3
        assert not session_stats(served.pid)
        assert len(rows(served.table)) == (3 if capture else 0)
        assert not (in_folder / "tracelake-data").exists()
        assert not list(in_folder.glob("ml*"))
    assert output_of(rows(served.table)[0])["trace"]["data"]["spans"]


def test_several_workers_are_one_endpoint(tmp_path: Path) -> None:
    """All their processes count; without capture there can be one only."""
    (tmp_path / "my_agent.py").write_text(AGENT, encoding="utf-8")
    with endpoint("my_agent:app", tmp_path, capture=True, app_dir=str(tmp_path), workers=2) as served:
        assert wait_for(lambda: len(session_stats(served.pid)) >= 3, "two workers and who leads them")
        assert served.client.post("/invocations", json=SMALL).status_code == 200
    wait_for(lambda: not session_stats(served.pid), "the end of all processes")
    assert len(rows(served.table)) == 1
    with pytest.raises(ValueError, match="one process"), endpoint("x", tmp_path, capture=False, workers=2):
        pass


def test_a_server_that_does_not_start_says_why(in_folder: Path) -> None:
    """The last line of its log is the error."""
    (in_folder / "broken.py").write_text("raise KeyError('OPENAI_API_KEY')", encoding="utf-8")
    with (
        pytest.raises(TracelakeError, match="KeyError: 'OPENAI_API_KEY'"),
        endpoint("broken:app", in_folder, capture=True),
    ):
        pass


def test_a_run_that_is_stopped_leaves_nothing(folder: Path) -> None:
    """SIGTERM ends its servers and takes their tables away."""
    bodies = write_bodies(folder, {"sleep": 0.05})
    with start(folder, "my_agent:app", "--request", bodies, "--app-dir", str(folder)) as process:
        try:
            wait_for(lambda: list(folder.glob("tracelake-bench-*/captured-*/spool")), "both servers")
            assert len(commands_with(folder)) == 3
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    assert not commands_with(folder)
    assert not list(folder.glob("tracelake-bench*"))


def commands_with(folder: Path) -> list[bytes]:
    """Command lines of the processes that were given ``folder``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes())
        except OSError:  # it has ended since
            continue
    return [command for command in found if str(folder).encode() in command]


def test_help_has_examples_and_loads_nothing_heavy() -> None:
    """``bench --help`` answers at once."""
    code = (
        "import sys\n"
        "from deploy.cli import main\n"
        "main(['bench', '--help'], standalone_mode=False)\n"
        "heavy = {'mlflow', 'duckdb', 'deltalake', 'pyarrow', 'rich', 'httpx'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "tracelake bench my_agent:app --request body.json" in done.stdout


def test_the_guide_names_every_option() -> None:
    """With its default."""
    guide = (ROOT / "docs" / "bench.md").read_text(encoding="utf-8")
    for option in command.params:
        if isinstance(option, click.Option):
            assert f"`{option.opts[0]}" in guide
            assert not option.show_default or str(option.default) in guide


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--header", "content-length: 5"), "content-length follows from the body"),
        (("--header", "a b: x"), "'a b: x' is not of the form 'NAME: VALUE'"),
        (("--setting", "durability"), "'durability' is not of the form NAME=VALUE"),
    ],
)
def test_pairs_that_cannot_be_used_are_refused(folder: Path, options: tuple[str, ...], message: str) -> None:
    """At once: every request would fail by them."""
    code, output, errors = bench(folder, "my_agent:app", *options)
    assert (code, output) == (2, "")
    assert message in " ".join(errors.split())
