"""A table that an agent really filled, and ``tracelake ui`` on it, for the tests of MLflow's UI and API."""

import re
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.support import Process, free_port, served, wait_for

AGENT = "tests.heavy.ui_agent:app"
QUESTIONS = (
    "Where is my refund?",
    "How long does delivery take?",
    "I need an invoice, please",
    'Is "express" delivery possible?',
)
SESSIONS = 21
TURNS = 3
ROWS = SESSIONS * TURNS
UNKNOWN_ORDER = 13
"""Asking for it fails."""
COMMAND = [sys.executable, "-m", "deploy.cli", "ui"]


def fill(folder: Path, **environment: str) -> None:
    """Conversations of three turns, one of which fails once, recorded by a real endpoint."""
    env = {
        "INFERENCE_TABLE_URI": str(folder / "payload"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "INFERENCE_TABLE_SPOOL_DIR": str(folder / "spool"),
        **environment,
    }
    with served(AGENT, env=env, log=folder / "serve.log") as (url, _):
        for number in range(SESSIONS):
            messages: list[dict[str, str]] = []
            for turn in range(TURNS):
                messages.append({"role": "user", "content": QUESTIONS[(number + turn) % len(QUESTIONS)]})
                order = UNKNOWN_ORDER if (number, turn) == (7, 1) else 100 + number * TURNS + turn
                asked = {
                    "messages": messages,
                    "session": f"session-{number:02}",
                    "user": f"user-{number % 5}",
                    "order": order,
                }
                reply = httpx.post(f"{url}/invocations", json=asked, timeout=60)
                if reply.status_code == 200:
                    messages.append(reply.json()["choices"][0]["message"])


@contextmanager
def running_ui(
    table: str | Path, *arguments: str, env: Mapping[str, str], log: Path
) -> Iterator[tuple[str, Process]]:
    """``tracelake ui`` as a real process; yields the address of the table's page and the process."""
    process = Process([*COMMAND, "--table", str(table), *arguments], env, log)
    try:
        wait_for(lambda: page_in(log) or process.popen.poll() is not None, "the UI to start", 240)
        if process.popen.poll() is not None:
            raise RuntimeError(log.read_text())
        yield page_in(log), process
        process.stop()
    finally:
        process.kill_group()


@contextmanager
def object_store(folder: Path) -> Iterator[dict[str, str]]:
    """moto's S3 server, with a bucket named ``bucket``; yields the environment that leads there."""
    import boto3

    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = Process(command, {}, folder / "moto.log")
    url = f"http://127.0.0.1:{port}"
    env = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_REGION": "us-east-1",
    }
    try:
        wait_for(lambda: listens(port), "the object store to listen", 60)
        keys = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=url, **keys).create_bucket(Bucket="bucket")
        yield env
    finally:
        server.kill_group()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def page_in(log: Path) -> str:
    found = re.search(r"^http://\S+/traces$", log.read_text(), re.MULTILINE)
    return found.group() if found else ""
