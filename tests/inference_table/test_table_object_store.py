"""Reading a table on an object store: moto's S3 server, over HTTP."""

import socket
import sys
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from inference_table.commit import Committer, open_or_create_table
from inference_table.errors import QueryError, TableError, TableNotFoundError
from inference_table.settings import StorageSettings
from inference_table.spool import Spool
from inference_table.table import InferenceTable
from tests.inference_table.rows import NOON, batch, commit_all
from tests.support import Process, free_port, wait_for

pytestmark = pytest.mark.heavy
boto3 = pytest.importorskip("boto3")

IDS = [f"0195-{number}" for number in range(4)]


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server in a process of its own, as stores are: one in ours would need our GIL to answer."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = Process(command, {}, tmp_path_factory.mktemp("moto") / "log")
    try:
        wait_for(lambda: listens(port), "the object store to listen", 60)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill_group()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def settings(tmp_path: Path, endpoint: str) -> StorageSettings:
    """An empty table in a bucket of its own."""
    options = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_REGION": "us-east-1",
    }
    bucket = f"bucket-{uuid.uuid4()}"
    store(endpoint).create_bucket(Bucket=bucket)
    found = StorageSettings(uri=f"s3://{bucket}/agents/payload", spool_dir=tmp_path, storage_options=options)
    open_or_create_table(found)
    return found


def store(endpoint: str) -> "boto3.client":
    return boto3.client(
        "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x"
    )


@pytest.fixture
def table(settings: StorageSettings) -> InferenceTable:
    """Three committed rows of two days in two commits, and one that waits in the spool."""
    spool, committer = Spool(settings), Committer(settings)
    spool.append(batch(IDS[:2]), sync=False)
    commit_all(committer)
    spool.append(batch(IDS[2:3], at=NOON + timedelta(days=1)), sync=False)
    commit_all(committer)
    spool.append(batch(IDS[3:], at=NOON + timedelta(days=2)), sync=False)
    spool.close()
    return InferenceTable(
        settings.uri, storage_options=settings.storage_options, spool_dir=settings.spool_dir
    )


def test_rows_are_read_in_every_way(table: InferenceTable) -> None:
    """SQL, a lookup by either id, the newest rows and a frame give what is in the bucket."""
    result = table.query(
        "select request_date::text as day, count(*) as n, max(response->>'$.output') as said"
        " from payload group by all order by all"
    )
    assert result.to_dicts() == [
        {"day": "2025-03-01", "n": 2, "said": "hello"},
        {"day": "2025-03-02", "n": 1, "said": "hello"},
    ]
    row = table.get(IDS[2])
    assert row is not None and row["request_metadata"] == {"path": "/"}
    assert row == table.get(f"tr-{IDS[2]}") == table.newest(1)[0]
    assert table.get("absent") is None
    assert table.newest(5, where="request_date = '2025-03-01'")[0]["databricks_request_id"] in IDS[:2]
    frame = table.to_polars(["databricks_request_id"], where="status_code = 200")
    assert sorted(frame["databricks_request_id"]) == IDS[:3]


def test_pending_rows_are_read_beside_them(table: InferenceTable) -> None:
    """What this machine has spooled joins what is in the bucket."""
    result = table.query("select databricks_request_id as id from payload order by id", pending=True)
    assert [row["id"] for row in result] == IDS
    assert result.pending_rows == 1
    assert table.newest(1, pending=True)[0]["databricks_request_id"] == IDS[3]


def test_what_is_missing_is_a_clear_error(table: InferenceTable, endpoint: str) -> None:
    """A deleted object, and a table that isn't there, are one line of our own."""
    bucket = table.uri.split("/")[2]
    client = store(endpoint)
    for entry in client.list_objects_v2(Bucket=bucket)["Contents"]:
        if entry["Key"].endswith(".parquet"):
            client.delete_object(Bucket=bucket, Key=entry["Key"])
    for read in (table.to_arrow, table.newest, lambda: table.get(IDS[0])):
        with pytest.raises((TableError, QueryError)) as caught:
            read()
        assert "\n" not in str(caught.value)
    for entry in client.list_objects_v2(Bucket=bucket)["Contents"]:
        client.delete_object(Bucket=bucket, Key=entry["Key"])
    with pytest.raises(TableNotFoundError, match=bucket):
        table.count()
