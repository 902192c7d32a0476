"""The README's example, run as it stands."""

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import httpx

from tests.support import ROOT, Process, free_port, rows, wait_for

README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str, containing: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    return next(text for text in blocks if containing in text)


def tracelake(line: str, folder: Path) -> str:
    arguments = shlex.split(line)[1:]
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", *arguments],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout


def test_the_example_makes_the_row_that_the_readme_shows(tmp_path: Path) -> None:
    """Its agent under uvicorn, its request, its two commands."""
    (tmp_path / "my_agent.py").write_text(block("python", "# my_agent.py"), encoding="utf-8")
    commands = block("sh", "uvicorn my_agent:app").splitlines()
    body = re.search(r"-d '(.*?)'", commands[1])
    assert body is not None
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "my_agent:app", "--port", str(port)]
    environment = {"ENABLE_MLFLOW_TRACING": "true", "PYTHONPATH": str(ROOT)}
    server = Process(command, environment, tmp_path / "log", cwd=tmp_path)
    try:
        url = f"http://127.0.0.1:{port}/invocations"
        wait_for(lambda: posted(url, body[1]), "the agent to answer", 60)
        table = tmp_path / "tracelake-data" / "payload"
        wait_for(lambda: rows(table), "the row")
        assert "You asked: why?" in tracelake(commands[2], tmp_path)
        assert "answer AGENT" in tracelake(commands[3], tmp_path)
        assert server.stop() in (0, -signal.SIGTERM)  # uvicorn raises the signal again once it is done
    finally:
        server.kill_group()
    [row] = rows(table)
    assert row["request"] == body[1]


def posted(url: str, body: str) -> bool:
    try:
        return httpx.post(url, content=body, headers={"content-type": "application/json"}).is_success
    except httpx.TransportError:
        return False


def test_every_setting_is_in_the_readme() -> None:
    """The table of settings names each variable, with nothing that does not exist."""
    from dataclasses import fields

    from inference_table.settings import StorageSettings
    from serving.settings import CaptureSettings

    variables = {
        field.metadata["env"]
        for cls in (StorageSettings, CaptureSettings)
        for field in fields(cls)
        if "env" in field.metadata
    }
    assert set(re.findall(r"^\| `(INFERENCE_TABLE_\w+)`", README, re.MULTILINE)) == variables
