"""Other readers on a table in an S3-compatible store, and distributed engines on a local cluster."""

import contextlib
import fcntl
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from inference_table.settings import StorageSettings
from tests.inference_table.readers_guide import CLUSTER, EXPECTED, SNIPPETS, SQL_FRAME, fill, run
from tests.support import Process, free_port, wait_for

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(1800)]
boto3 = pytest.importorskip("boto3")
pytest.importorskip("daft")
pytest.importorskip("ray.data")

REMOTE = "s3://bucket/agents/payload"


@dataclass(frozen=True)
class Tables:
    """The same rows in a store and in a folder."""

    local: str
    environment: dict[str, str]
    """Where the store is, and its keys."""


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tables]:
    folder = tmp_path_factory.mktemp("readers")
    port = free_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_REGION": "us-east-1",
    }
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = Process(command, {}, folder / "moto.log")
    try:
        wait_for(lambda: listens(port), "the object store to listen", 60)
        keys = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=environment["AWS_ENDPOINT_URL"], **keys).create_bucket(
            Bucket="bucket"
        )
        fill(StorageSettings(uri=REMOTE, spool_dir=folder / "remote", storage_options=environment))
        local = StorageSettings(uri=str(folder / "payload"), spool_dir=folder / "local")
        fill(local)
        yield Tables(local.uri, environment)
    finally:
        server.kill_group()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize(
    ("section", "number", "expected"),
    [
        ("Python: `InferenceTable`", 0, SQL_FRAME),
        ("Polars", 0, EXPECTED),
        ("deltalake's QueryBuilder, and pandas", 0, EXPECTED),
        # Its first takes an extension that DuckDB downloads.
        ("DuckDB", 1, EXPECTED),
    ],
)
def test_a_reader_opens_a_table_in_a_store(
    tables: Tables,
    monkeypatch: pytest.MonkeyPatch,
    section: str,
    number: int,
    expected: list[tuple[str, int]],
) -> None:
    """The snippet of the guide with another URI, the rest by the environment's variables."""
    for name, value in tables.environment.items():
        monkeypatch.setenv(name, value)
    assert run(SNIPPETS[section][number], REMOTE) == expected


def test_distributed_engines_read_on_a_cluster(tables: Tables, tmp_path: Path) -> None:
    """Daft and Ray Data on the nodes of a local Ray cluster find the same rows in a folder and in a store."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.heavy.reader_cluster", tables.local, REMOTE]
    environment = {**tables.environment, "RAY_USAGE_STATS_ENABLED": "0"}
    # One cluster at a time: test_ray.py has another, and both are slow to start side by side.
    with (tmp_path.parent.parent / "ray.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cluster = Process(command, environment, tmp_path / "log")
        try:
            code = cluster.popen.wait(400)
        finally:
            stop(cluster)
    log = (tmp_path / "log").read_text(encoding="utf-8", errors="replace")
    assert code == 0, log[-5000:]
    *found, nodes = [json.loads(line[2:]) for line in log.splitlines() if line.startswith("> ")]
    assert found == [
        {"engine": engine, "uri": uri, "rows": [list(row) for row in EXPECTED]}
        for uri in (tables.local, REMOTE)
        for engine in CLUSTER
    ]
    assert nodes == {"nodes": 2}


def stop(cluster: Process) -> None:
    """Let it stop its nodes, which have process groups of their own."""
    cluster.popen.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        cluster.popen.wait(60)
    cluster.kill_group()
