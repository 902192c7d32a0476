"""``make demo`` from beginning to end."""

import os
import re
import subprocess
import sys
from pathlib import Path

from examples.demo import LONG_QUESTION, QUESTIONS
from examples.docs_agent import library, named
from inference_table.table import InferenceTable

ROOT = Path(__file__).parents[2]


def run_demo(folder: Path) -> str:
    environ = os.environ | {
        "INFERENCE_TABLE_URI": str(folder / "payload"),
        "INFERENCE_TABLE_SPOOL_DIR": str(folder / "spool"),
        "COLUMNS": "160",
    }
    command = [sys.executable, "-m", "examples.demo"]
    result = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    return result.stdout


def test_what_was_sent_has_landed_each_time(tmp_path: Path) -> None:
    """Two runs on one table agree each, show a trace and a query, and leave all their rows."""
    sent = 0
    for _ in range(2):
        output = run_demo(tmp_path)
        told = re.search(r"(\d+) requests sent, (\d+) rows: one each, and they agree", output)
        assert told is not None
        assert told[1] == told[2]
        sent += int(told[1])
        for name in ("docs_agent", "retrieve", "signature", "write_answer", "json_array_length", "499"):
            assert name in output
    table = InferenceTable(tmp_path / "payload")
    assert sent >= 100
    assert table.query("select count(distinct databricks_request_id) as n from payload").to_dicts() == [
        {"n": sent}
    ]


def test_its_questions_name_what_the_agent_knows() -> None:
    """Only the questions that are meant to fail do."""
    names = [name for question in (*QUESTIONS, LONG_QUESTION) for name in named(question)]
    assert len(names) > 10
    assert [name for name in names if name not in library().by_name] == []
