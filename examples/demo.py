"""``make demo``: real requests to a real agent become rows of a Delta inference table.

Starts ``examples.docs_agent`` under uvicorn, sends it questions, broken requests and impatient clients all at
once, stops it, and shows that the table holds exactly what was sent. The table stays; each run adds to it.
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from os.path import relpath
from pathlib import Path
from shutil import which
from typing import IO, Any, Final
from uuid import uuid4

import httpx
import orjson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.syntax import Syntax
from rich.table import Table

from inference_table.errors import TableNotFoundError
from inference_table.settings import StorageSettings
from inference_table.table import InferenceTable

QUESTIONS: Final = (
    "How do I merge several sorted inputs with heapq.merge?",
    "How can I parse JSON from a string with json.loads?",
    "What does functools.lru_cache do?",
    "How do I compute the median of some data?",
    "How do I split a path into its root and extension?",
    "Which function copies a whole directory tree?",
    "How does itertools.groupby group elements?",
    "How can I create a temporary directory that is removed afterwards?",
    "How do I decode base64 data?",
    "What is a named tuple, and how do I make one?",
    "How do I compare two digests in constant time?",
    "How do I run a command in a subprocess and get its output?",
    "How can I wrap a paragraph of text to a width?",
    "How do I find close matches of a word with difflib.get_close_matches?",
    "What does contextlib.suppress suppress?",
    "How do I parse the query string of a URL?",
    "How do I keep a list sorted while inserting?",
    "How do I make a random choice without replacement?",
    "What is a weak reference good for?",
    "How do I read rows of a CSV file as dictionaries?",
)
PLAIN, STREAMS, LEAVERS = 34, 20, 3
LONG_QUESTION: Final = (
    "What are the signatures of subprocess.run, subprocess.Popen, argparse.ArgumentParser, json.dumps,"
    " json.loads, shutil.copytree, logging.basicConfig, textwrap.TextWrapper, pathlib.Path.open,"
    " tempfile.NamedTemporaryFile, difflib.unified_diff and dataclasses.dataclass?"
)
"""Its answer streams for a second or more, so that a client can leave before the end."""
FAILING_QUESTION: Final = "What does json.lods do?"
"""The agent's tool fails at a name that the library does not have."""
CONCURRENCY: Final = 12
START_SECONDS: Final = 30.0
LANDING_SECONDS: Final = 15.0
STOP_SECONDS: Final = 20.0
LEFT_AFTER_EVENTS: Final = 3
CLIENT_GONE: Final = 499
"""How the table records a client that left: no status ever reached it."""

console = Console()


@dataclass
class Call:
    """A request to send, and what came of it."""

    kind: str
    body: bytes
    expected_status: int = 200
    streamed: bool = False
    leaves: bool = False
    client_request_id: str = ""
    request_id: str | None = None
    status: int | None = None
    milliseconds: float = 0.0
    answer: str | None = field(default=None, repr=False)
    failure: str | None = None


def question(kind: str, text: str, *, role: str = "user", **options: Any) -> Call:
    client_request_id = f"demo-{uuid4().hex}"
    streamed = bool(options.get("streamed"))
    messages = [{"role": role, "content": text}]
    body = {"messages": messages, "client_request_id": client_request_id, "stream": streamed}
    return Call(kind, orjson.dumps(body), client_request_id=client_request_id, **options)


def calls() -> list[Call]:
    """Everything that is sent: questions, streams, and what goes wrong in production."""

    def ask(number: int) -> str:
        return QUESTIONS[number % len(QUESTIONS)]

    return [
        *(question("answer", ask(number)) for number in range(PLAIN)),
        *(question("stream", ask(number), streamed=True) for number in range(STREAMS)),
        *(
            question("client leaves", LONG_QUESTION, streamed=True, leaves=True, expected_status=CLIENT_GONE)
            for _ in range(LEAVERS)
        ),
        Call("bad request", b'{"messages": "not a list"}', expected_status=422),
        Call("bad request", b"this is not JSON", expected_status=422),
        question("bad request", "I am no user", role="assistant", expected_status=400),
        question("agent fails", FAILING_QUESTION, expected_status=500),
        question("agent fails", "And what about os.pth?", expected_status=500),
        question("stream fails", FAILING_QUESTION, streamed=True),
    ]


async def send(client: httpx.AsyncClient, call: Call) -> None:
    started = time.perf_counter()
    headers = {"content-type": "application/json"}
    if call.expected_status == 500:
        # uvicorn closes the connection after an exception without saying so; no other request must be on it.
        headers["connection"] = "close"
    async with client.stream("POST", "/invocations", content=call.body, headers=headers) as response:
        call.status = response.status_code
        call.request_id = response.headers.get("x-databricks-request-id")
        if call.streamed:
            call.answer = await read_stream(response, call.leaves)
        else:
            await response.aread()
            if response.status_code == 200:
                call.answer = response.json()["choices"][0]["message"]["content"]
    call.milliseconds = (time.perf_counter() - started) * 1000


async def read_stream(response: httpx.Response, leaves: bool) -> str:
    answer, events = "", 0
    async for line in response.aiter_lines():
        if not line.startswith("data: {"):
            continue
        for choice in orjson.loads(line.removeprefix("data: ")).get("choices", ()):
            answer += choice["delta"].get("content", "")
        events += 1
        if leaves and events == LEFT_AFTER_EVENTS:
            break
    return answer


async def send_all(url: str, planned: list[Call], sent: Callable[[], None]) -> None:
    gate = asyncio.Semaphore(CONCURRENCY)
    async with httpx.AsyncClient(base_url=url, timeout=30, trust_env=False) as client:

        async def one(call: Call) -> None:
            async with gate:
                try:
                    await send(client, call)
                except httpx.TransportError as error:
                    call.failure = repr(error)
            sent()

        await asyncio.gather(*map(one, planned))


@contextmanager
def server(uri: str) -> Iterator[str]:
    """The agent under uvicorn, with the one setting that switches recording on; its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environ = os.environ | {
        "ENABLE_MLFLOW_TRACING": "true",
        "INFERENCE_TABLE_URI": uri,
        "INFERENCE_TABLE_SERVED_ENTITY": "docs-agent/1",
    }
    command = [sys.executable, "-m", "uvicorn", "examples.docs_agent:app", "--port", str(port)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
        try:
            wait_until_up(process, f"http://127.0.0.1:{port}", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            stop(process)


def wait_until_up(process: subprocess.Popen[bytes], url: str, log: IO[str]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            httpx.get(f"{url}/health", trust_env=False).raise_for_status()
            return
        except httpx.TransportError:
            time.sleep(0.1)
    log.seek(0)
    console.print(log.read(), markup=False)
    raise SystemExit("the agent's server did not start; its log is above")


def stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, as an orchestrator would: uvicorn finishes requests, the middleware flushes its rows."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        console.print(f"[red]the server did not stop within {STOP_SECONDS:g} s and was killed")


def landed(table: InferenceTable, since: datetime) -> list[dict[str, Any]]:
    """This run's rows, without their large columns but for what the client was told."""
    sql = """
        select databricks_request_id, client_request_id, status_code, execution_duration_ms, trace_id,
               input_tokens, output_tokens, response->>'$.choices[0].message.content' as answer
        from payload where request_date >= ? and request_time >= ?
    """
    try:
        return table.query(sql, parameters=[since.date(), since]).to_dicts()
    except TableNotFoundError:
        return []


@dataclass(frozen=True)
class Match:
    """Calls and their rows."""

    pairs: list[tuple[Call, dict[str, Any]]]
    complaints: list[str]


def match(planned: list[Call], rows: list[dict[str, Any]]) -> Match:
    """Pair each call with its row by id, and say where they disagree.

    The id is our reply header; where the agent failed, the framework's own reply has none, and the caller's
    ``client_request_id`` leads to the row.
    """
    by_id: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        for key in {row["databricks_request_id"], row["client_request_id"]} - {None}:
            by_id.setdefault(key, []).append(row)
    pairs, complaints = [], []
    for call in planned:
        name = call.request_id or call.client_request_id
        if call.failure or (call.status != call.expected_status and not call.leaves):
            complaints.append(f"{call.kind} {name}: the client got {call.failure or call.status}")
        found = by_id.get(name, [])
        if len(found) != 1:
            complaints.append(f"{call.kind} {name}: {len(found)} rows")
            continue
        pairs.append((call, found[0]))
        if found[0]["status_code"] != call.expected_status:
            complaints.append(f"{call.kind} {name}: status {found[0]['status_code']} in the table")
        if call.expected_status not in (400, 422) and found[0]["trace_id"] is None:
            complaints.append(f"{call.kind} {name}: no trace in the table")
        if call.answer and not call.leaves and found[0]["answer"] != call.answer:
            complaints.append(f"{call.kind} {name}: the answer in the table is not the client's")
    return Match(pairs, complaints)


def wait_for_rows(table: InferenceTable, planned: list[Call], since: datetime, progress: Progress) -> None:
    task = progress.add_task("rows in the table", total=len(planned))
    deadline = time.monotonic() + LANDING_SECONDS
    while time.monotonic() < deadline:
        found = len(match(planned, landed(table, since)).pairs)
        progress.update(task, completed=found)
        if found == len(planned):
            return
        time.sleep(0.2)


def show_comparison(planned: list[Call], found: Match) -> None:
    view = Table(
        "request", "sent", "rows", "client got", "table says", "median ms", "tokens", title="Sent and landed"
    )
    for kind in dict.fromkeys(call.kind for call in planned):
        pairs = [(call, row) for call, row in found.pairs if call.kind == kind]
        durations = sorted(row["execution_duration_ms"] for _, row in pairs)
        told = Counter("left" if call.leaves else str(call.status) for call in planned if call.kind == kind)
        view.add_row(
            kind,
            str(sum(call.kind == kind for call in planned)),
            str(len(pairs)),
            ", ".join(sorted(told)),
            ", ".join(sorted({str(row["status_code"]) for _, row in pairs})),
            str(durations[len(durations) // 2]) if durations else "",
            str(sum((row["input_tokens"] or 0) + (row["output_tokens"] or 0) for _, row in pairs) or ""),
        )
    console.print(view)
    for complaint in found.complaints:
        console.print(f"[red]✗[/] {complaint}", highlight=False)
    if not found.complaints:
        console.print(
            f"[green]✓[/] {len(planned)} requests sent, {len(found.pairs)} rows: one each, and they agree.\n"
        )


def show_query(table: InferenceTable, title: str, sql: str) -> None:
    console.print(f"\n[bold]{title}")
    console.print(Syntax(sql, "sql", background_color="default", word_wrap=True))
    result = table.query(sql)
    view = Table(*result.columns)
    for row in result:
        view.add_row(*("" if value is None else str(value) for value in row.values()))
    console.print(view)


def show_trace(uri: str, call: Call) -> None:
    console.print(f"\n[bold]What the agent did in one of them[/]\n$ tracelake trace {call.request_id}")
    command = [sys.executable, "-c", "from deploy.cli import main; main()", "trace", str(call.request_id)]
    width = {"COLUMNS": str(console.width)} | ({"FORCE_COLOR": "1"} if console.is_terminal else {})
    result = subprocess.run([*command, "--table", uri], env=os.environ | width, check=False)
    if result.returncode:
        raise SystemExit("the trace could not be shown")


def show(table: InferenceTable, uri: str, planned: list[Call], since: datetime) -> None:
    when = f"request_time >= '{since:%Y-%m-%d %H:%M:%S+00}'"
    show_query(
        table,
        "The response column is JSON: answers and traces in one query",
        "select request->>'$.messages[0].content' as question,\n"
        "       (response->>'$.choices[0].message.content')[:150] || ' ...' as answer,\n"
        "       json_array_length(response->'$.databricks_output.trace.data.spans') as spans\n"
        f"from payload where {when} and status_code = 200 and span_count > 3\n"
        "order by request_time desc limit 3",
    )
    show_trace(uri, next(call for call in planned if call.kind == "answer"))
    show_query(
        table,
        "Latency, tokens and what recording cost on the request path",
        "select status_code as status, count(*) as rows,\n"
        "       quantile_cont(execution_duration_ms, 0.5)::int as p50_ms,\n"
        "       quantile_cont(execution_duration_ms, 0.95)::int as p95_ms,\n"
        "       sum(input_tokens)::bigint as tokens_in,\n"
        "       sum(output_tokens)::bigint as tokens_out,\n"
        "       quantile_cont(capture_overhead_us, 0.5)::int as capture_us\n"
        f"from payload where {when} group by all order by 1",
    )


def show_next(table: InferenceTable) -> None:
    # Beside the interpreter that runs this, unless its environment is activated.
    tracelake = "tracelake" if which("tracelake") else relpath(Path(sys.executable).with_name("tracelake"))
    count = table.query("select count(*) as n from payload").to_dicts()[0]["n"]
    console.print(
        f"\nThe table, {count} rows by now: [bold]{table.uri}[/]\nNext, try:\n"
        f'  {tracelake} query "select request_time, status_code, trace_id from payload'
        ' order by request_time desc limit 5"\n'
        f"  {tracelake} trace last\n"
        f"  {tracelake} serve my_agent:app     # record your own agent",
        highlight=False,
        soft_wrap=True,
    )


def main() -> int:
    uri = StorageSettings.from_environ().uri
    table, planned = InferenceTable(uri), calls()
    console.print("Starting an agent that answers questions about Python's standard library ...")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with server(uri) as url, Progress(*columns, console=console) as progress:
        since = datetime.now(UTC) - timedelta(milliseconds=1)
        task = progress.add_task("requests answered", total=len(planned))
        asyncio.run(send_all(url, planned, lambda: progress.advance(task)))
        wait_for_rows(table, planned, since, progress)
    found = match(planned, landed(table, since))
    show_comparison(planned, found)
    if found.complaints:
        return 1
    show(table, uri, planned, since)
    show_next(table)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped")
