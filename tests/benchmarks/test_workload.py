"""The benchmarks' text: the same everywhere, of the size asked for, and as hard to compress as text."""

import hashlib
import subprocess
import sys

import orjson
import pyarrow as pa
import pytest

from benchmarks.workload import agent_run, json_bytes, request_body, response_body, text
from tests.support import ROOT

PRINT_DIGEST = """
import hashlib
from benchmarks.workload import text
print(hashlib.sha256(text(50_000, 7).encode()).hexdigest())
"""


def ratio(content: bytes) -> float:
    return len(content) / len(pa.Codec("zstd", compression_level=1).compress(content, asbytes=True))


def test_the_same_seed_gives_the_same_text_in_any_process() -> None:
    command = [sys.executable, "-c", PRINT_DIGEST]
    other = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    ours = hashlib.sha256(text(50_000, 7).encode()).hexdigest()
    assert other.stdout.strip() == ours
    # The same in all versions of Python, so that results can be compared.
    assert ours == "befdbc8d48fe7a1646f26219bee2cbd9aea3c5ad9146d4b501999f6ce079aa4e"


def test_another_seed_gives_another_text() -> None:
    assert text(1000, 1) != text(1000, 2)


@pytest.mark.parametrize("nbytes", [0, 1, 100, 10_000, 1_000_000])
def test_a_text_has_the_bytes_asked_for(nbytes: int) -> None:
    assert nbytes - 3 <= len(text(nbytes, 3).encode()) <= nbytes


@pytest.mark.parametrize("nbytes", [100_000, 1_000_000])
def test_a_text_compresses_like_text(nbytes: int) -> None:
    assert 2.3 < ratio(text(nbytes, 4).encode()) < 3.5


def test_a_text_has_other_scripts_figures_and_links() -> None:
    sample = text(3_000_000, 5)
    for found in ("東京", "Zürich", "https://", "```python", "\n\n"):
        assert found in sample
    assert max(map(ord, sample)) > 0xFFFF  # an emoji


@pytest.mark.parametrize("nbytes", [4_000, 10_000, 300_000, 1_000_000, 16_000_000])
def test_a_run_has_about_the_bytes_asked_for(nbytes: int) -> None:
    assert abs(json_bytes(agent_run(nbytes, 1)) - nbytes) <= nbytes / 10


@pytest.mark.parametrize("nbytes", [10_000, 1_000_000])
def test_a_run_is_a_chat_that_grows(nbytes: int) -> None:
    steps = agent_run(nbytes, 1)
    assert [step.span_type for step in steps] == [
        "AGENT",
        "RETRIEVER",
        "RERANKER",
        "CHAT_MODEL",
        "TOOL",
        "CHAT_MODEL",
        "TOOL",
        "CHAT_MODEL",
    ]
    asked = steps[0].inputs["messages"]
    for chat in (step for step in steps if step.span_type == "CHAT_MODEL"):
        messages = chat.inputs["messages"]
        assert messages[: len(asked)] == asked
        assert len(messages) > len(asked)
        asked = messages
    assert orjson.loads(asked[-1]["content"]) == steps[-2].outputs


@pytest.mark.parametrize("nbytes", [1_000, 10_000, 1_000_000])
def test_bodies_are_chat_completions_of_the_size_asked_for(nbytes: int) -> None:
    request, response = request_body(nbytes, 1), response_body(nbytes, 1)
    for body in (request, response):
        assert abs(len(body) - nbytes) <= nbytes / 50
    assert orjson.loads(request)["messages"][-1]["role"] == "user"
    assert orjson.loads(response)["choices"][0]["message"]["role"] == "assistant"
