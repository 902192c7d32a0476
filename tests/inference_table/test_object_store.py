"""The same path with the table on an object store: moto's S3 server, over HTTP."""

import socket
import sys
import threading
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable, QueryBuilder
from deltalake.exceptions import CommitFailedError

from inference_table.commit import Committer, open_or_create_table
from inference_table.compaction import Maintenance
from inference_table.errors import TableError
from inference_table.settings import StorageSettings
from inference_table.spool import Spool, spool_stats
from inference_table.steps import Step
from tests.inference_table.rows import NOON, batch, commit_all
from tests.support import Process, free_port, wait_for

pytestmark = pytest.mark.heavy
boto3 = pytest.importorskip("boto3")


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
    bucket = f"bucket-{uuid.uuid4()}"
    client = boto3.client(
        "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x"
    )
    client.create_bucket(Bucket=bucket)
    options = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_REGION": "us-east-1",
    }
    found = StorageSettings(uri=f"s3://{bucket}/payload", spool_dir=tmp_path, storage_options=options)
    open_or_create_table(found)
    return found


def opened(settings: StorageSettings) -> DeltaTable:
    return DeltaTable(settings.uri, storage_options=dict(settings.storage_options))


def ids(settings: StorageSettings) -> list[str]:
    reader = (
        QueryBuilder().register("t", opened(settings)).execute("select databricks_request_id as id from t")
    )
    return sorted(row["id"] for row in pa.table(reader).to_pylist())


def test_rows_arrive(settings: StorageSettings) -> None:
    """Commits of several days and clean-ups: the rows are there once, the spool is empty."""
    spool, committer = Spool(settings), Committer(settings)
    for number in range(4):
        spool.append(batch([str(number)], at=NOON + timedelta(seconds=number)), sync=True)
        commit_all(committer)
    spool.append(batch(["next day"], at=NOON + timedelta(days=1)), sync=True)
    commit_all(committer)
    assert ids(settings) == ["0", "1", "2", "3", "next day"]
    assert spool_stats(spool.root).segments == 0
    maintenance = Maintenance(settings)
    while maintenance.step():
        pass
    assert ids(settings) == ["0", "1", "2", "3", "next day"]


def test_megabytes_arrive(settings: StorageSettings) -> None:
    """A commit of several row groups goes through a multipart upload, whole."""
    spool = Spool(settings)
    spool.append(batch([str(number) for number in range(60)], text="0123456789abcdef" * 40_000), sync=False)
    commit_all(Committer(settings))
    assert len(ids(settings)) == 60


def test_a_commit_that_only_seemed_to_fail(settings: StorageSettings) -> None:
    """A lost reply after the commit does not bring the rows twice."""

    def fail(step: Step) -> None:
        if step is Step.COMMITTED:
            raise OSError("the reply was lost")

    Spool(settings).append(batch(["a"]), sync=True)
    committer = Committer(settings, fail)
    assert committer.acquire()
    with pytest.raises(OSError, match="reply"):
        committer.commit_once()
    assert committer.commit_once() is None
    assert ids(settings) == ["a"]


def test_two_machines_with_one_spool(settings: StorageSettings, tmp_path: Path) -> None:
    """The store decides between two committers of the same segments."""
    spool = Spool(settings)
    spool.append(batch(["a"]), sync=True)
    copied = StorageSettings(
        uri=settings.uri, spool_dir=tmp_path / "copy", storage_options=settings.storage_options
    )
    copied.spool_dir.mkdir()
    copy = copied.spool_dir / spool.root.name / str(spool.spool_id)
    copy.mkdir(parents=True)
    for path in spool.root.joinpath(str(spool.spool_id)).iterdir():
        copy.joinpath(path.name).write_bytes(path.read_bytes())

    def other_commits(step: Step) -> None:
        if step is Step.BATCH_READ:
            assert commit_all(Committer(copied)) == 1

    committer = Committer(settings, other_commits)
    assert committer.acquire()
    with pytest.raises(CommitFailedError):
        committer.commit_once()
    assert committer.commit_once() is None
    assert ids(settings) == ["a"]


def test_store_that_goes_away(settings: StorageSettings) -> None:
    """While the store can't be reached the rows wait in the spool; the error says where it looked."""
    spool = Spool(settings)
    spool.append(batch(["a"]), sync=True)
    options = {**settings.storage_options, "AWS_ENDPOINT_URL": "http://127.0.0.1:9", "max_retries": "0"}
    away = StorageSettings(uri=settings.uri, spool_dir=settings.spool_dir, storage_options=options)
    committer = Committer(away)
    assert committer.acquire()
    with pytest.raises(TableError, match="s3://"):
        committer.commit_once()
    committer.release()
    assert spool_stats(spool.root).segments == 1
    commit_all(Committer(settings))
    assert ids(settings) == ["a"]


def test_requests_do_not_wait_for_the_store(settings: StorageSettings) -> None:
    """While a commit waits for the network, other threads of the process go on."""
    Spool(settings).append(batch([str(number) for number in range(50)], text="x" * 20_000), sync=False)
    committer = Committer(settings)
    assert committer.acquire()
    ticks, done = [0], threading.Event()

    def tick() -> None:
        while not done.wait(0.001):
            ticks[0] += 1

    thread = threading.Thread(target=tick)
    thread.start()
    before = ticks[0]
    committer.commit_once()
    during = ticks[0] - before
    done.set()
    thread.join()
    assert during > 10, "a commit of some 100 ms over HTTP held the GIL throughout"
