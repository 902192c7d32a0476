"""The example agent over a real socket, and its traces in a real table."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from mlflow.entities import Trace

from examples.docs_agent import MODULES, Entry, entries, library, named, quotes, sentences, tokens
from inference_table.errors import TableNotFoundError
from inference_table.table import InferenceTable

ROOT = Path(__file__).parents[2]


@dataclass
class Agent:
    """A running agent, and the table that it writes to."""

    url: str
    table: InferenceTable

    def ask(self, content: str, **options: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": content}]} | options
        return httpx.post(f"{self.url}/invocations", json=body, timeout=30, trust_env=False)

    def row(self, client_request_id: str) -> dict[str, Any]:
        """The row of a request, once it is there."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                rows = self.table.query(
                    "select * from payload where client_request_id = ?", parameters=[client_request_id]
                ).to_dicts()
            except TableNotFoundError:
                rows = []
            if rows:
                assert len(rows) == 1
                return rows[0]
            time.sleep(0.1)
        raise AssertionError(f"no row for {client_request_id}")


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    folder = tmp_path_factory.mktemp("agent")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environ = os.environ | {
        "ENABLE_MLFLOW_TRACING": "true",
        "INFERENCE_TABLE_URI": str(folder / "payload"),
        "INFERENCE_TABLE_SPOOL_DIR": str(folder / "spool"),
    }
    command = [sys.executable, "-m", "uvicorn", "examples.docs_agent:app", "--port", str(port)]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(300):
            try:
                httpx.get(f"{url}/health", trust_env=False).raise_for_status()
                break
            except httpx.TransportError:
                assert process.poll() is None, (folder / "server.log").read_text()
                time.sleep(0.1)
        yield Agent(url, InferenceTable(folder / "payload", spool_dir=folder / "spool"))
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) is not None


def content_of(stream: httpx.Response) -> str:
    """The text of a streamed chat completion, as a client puts it together."""
    lines = [line.removeprefix("data: ") for line in stream.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    chunks = [orjson.loads(line)["choices"][0] for line in lines[:-1]]
    assert chunks[-1]["finish_reason"] == "stop"
    return "".join(chunk["delta"].get("content", "") for chunk in chunks)


def test_it_quotes_the_documentation(agent: Agent) -> None:
    """The answer names its source, and holds the signature that the tool looked up."""
    reply = agent.ask("How do I merge several sorted inputs with heapq.merge?").json()
    assert reply["object"] == "chat.completion"
    lines = reply["choices"][0]["message"]["content"].splitlines()
    assert lines[0] == "Signature: heapq.merge(*iterables, key=None, reverse=False)"
    assert lines[1] == "“Merge multiple sorted inputs into a single sorted output.” (heapq.merge)"


def test_a_streamed_answer_is_the_same_answer(agent: Agent) -> None:
    """Streaming changes how it comes, not what it says; the table holds it as if it were not streamed."""
    asked = "How do I compute the median of some data?"
    whole = agent.ask(asked).json()["choices"][0]["message"]["content"]
    streamed = agent.ask(asked, stream=True, client_request_id="streamed")
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert content_of(streamed) == whole
    response = orjson.loads(agent.row("streamed")["response"])
    assert response["choices"][0]["message"] == {"role": "assistant", "content": whole}
    assert response["databricks_output"]["stream"]["ended"] is True


def test_its_trace_is_that_of_an_agent(agent: Agent) -> None:
    """A root of type AGENT over a retriever with documents, a tool, and a span with counted tokens."""
    question = "How can I parse JSON from a string with json.loads?"
    assert agent.ask(question, client_request_id="traced").status_code == 200
    row = agent.row("traced")
    trace = Trace.from_dict(orjson.loads(row["response"])["databricks_output"]["trace"])
    spans = {span.name: span for span in trace.data.spans}
    root = spans["docs_agent"]
    assert {name: span.span_type for name, span in spans.items()} == {
        "docs_agent": "AGENT",
        "retrieve": "RETRIEVER",
        "signature": "TOOL",
        "write_answer": "LLM",
    }
    assert [span.parent_id for span in trace.data.spans if span is not root] == [root.span_id] * 3
    assert root.inputs == {"messages": [{"role": "user", "content": question}]}
    assert root.outputs == spans["write_answer"].outputs
    documents = spans["retrieve"].outputs
    assert documents[0].keys() == {"page_content", "metadata", "id"}
    assert "json.loads" in [document["id"] for document in documents]
    read = tokens(question) + sum(tokens(document["page_content"]) for document in documents)
    assert (row["input_tokens"], row["output_tokens"]) == (read, tokens(root.outputs))


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"no json", 422),
        (b'{"messages": []}', 422),
        (b'{"messages": [{"role": "robot", "content": "x"}]}', 422),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}', 400),
        (b'{"messages": [{"role": "user", "content": " "}]}', 400),
    ],
)
def test_a_bad_request_is_refused(agent: Agent, body: bytes, status: int) -> None:
    """The client is told what is wrong, and no agent runs."""
    headers = {"content-type": "application/json"}
    reply = httpx.post(f"{agent.url}/invocations", content=body, headers=headers, trust_env=False)
    assert reply.status_code == status
    assert reply.json()["detail"]


def test_a_failing_tool_fails_the_agent(agent: Agent) -> None:
    """The client gets 500; the row says where it failed."""
    assert agent.ask("What does json.lods do?", client_request_id="failed").status_code == 500
    row = agent.row("failed")
    assert (row["status_code"], row["trace_state"]) == (500, "ERROR")
    spans = orjson.loads(row["response"])["databricks_output"]["trace"]["data"]["spans"]
    failed = [span["name"] for span in spans if span["status"]["code"] == "STATUS_CODE_ERROR"]
    assert set(failed) == {"docs_agent", "signature"}


def test_a_stream_that_fails_says_so_in_an_event(agent: Agent) -> None:
    """The status is long sent; the table keeps the error beside the stream's facts."""
    reply = agent.ask("What does json.lods do?", stream=True, client_request_id="stream failed")
    assert reply.status_code == 200
    error = {"type": "LookupError", "message": "no documentation for 'json.lods'"}
    assert orjson.loads(reply.text.removeprefix("data: ")) == {"error": error}
    stream = orjson.loads(agent.row("stream failed")["response"])["databricks_output"]["stream"]
    assert stream["error"] == error["message"]


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("compute the median of some data", "statistics.median"),
        ("copies a whole directory tree", "shutil.copytree"),
        ("split a path into root and extension", "os.path.splitext"),
        ("compare digests in constant time", "secrets.compare_digest"),
    ],
)
def test_the_right_entry_is_found(question: str, expected: str) -> None:
    """A question that does not name the function finds it among the first five."""
    assert expected in [entry.name for entry in library().search(question, 5)]


def test_nothing_is_found_for_words_that_nobody_wrote() -> None:
    """No document is better than a wrong one."""
    assert library().search("xylophone zebra", 5) == []
    assert quotes("xylophone zebra", []) == []


def test_every_module_has_entries() -> None:
    """The list holds no module that documents nothing, and none twice."""
    assert len(MODULES) == len(set(MODULES)) >= 60
    assert all(any(True for _ in entries(name)) for name in MODULES)
    assert len(library().by_name) > 1500


def test_a_document_has_mlflows_form() -> None:
    """As MLflow's retriever spans and judges expect it."""
    document = Entry("a.b", "a", "function", "Text.", None).document()
    assert document == {
        "page_content": "Text.",
        "metadata": {"doc_uri": "python:a.b", "module": "a", "kind": "function"},
        "id": "a.b",
    }


def test_names_are_those_of_known_modules() -> None:
    """The tool is called for dotted names only, once each."""
    text = "Is json.loads like json.loads, numpy.array or xml.etree.ElementTree.parse? See docs.python.org."
    assert named(text) == ["json.loads", "xml.etree.ElementTree.parse"]


def test_sentences_leave_examples_out() -> None:
    """Doctests are no prose."""
    assert sentences("One. Two\nlines.\n\n>>> f(1)\n2\n\nThree e.g. this.") == [
        "One.",
        "Two lines.",
        "Three e.g. this.",
    ]
