"""The same path with the table on an object store: moto's S3 server, over HTTP."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, QueryBuilder
from deltalake.exceptions import CommitFailedError

from inference_table import cleaning as cleaning_module
from inference_table import metrics
from inference_table.cleaning import clean
from inference_table.commit import Committer, open_or_create_table
from inference_table.compaction import Maintenance
from inference_table.errors import TableError
from inference_table.settings import StorageSettings
from inference_table.spool import Spool, spool_stats
from inference_table.steps import Step
from tests.inference_table.rows import NOON, batch, commit_all
from tests.support import ROOT, Process, free_port, wait_for

pytestmark = pytest.mark.heavy
boto3 = pytest.importorskip("boto3")


SECRET = "a-secret-access-key"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Process]]:
    """A server in a process of its own, as stores are: one in ours would need our GIL to answer."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = Process(command, {}, tmp_path_factory.mktemp("moto") / "log")
    try:
        wait_for(lambda: listens(port), "the object store to listen", 60)
        yield f"http://127.0.0.1:{port}", server
    finally:
        server.kill_group()


@pytest.fixture
def endpoint(store: tuple[str, Process]) -> str:
    return store[0]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def s3(endpoint: str) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="x",
        aws_secret_access_key=SECRET,
    )


@pytest.fixture
def settings(tmp_path: Path, endpoint: str) -> StorageSettings:
    bucket = f"bucket-{uuid.uuid4()}"
    s3(endpoint).create_bucket(Bucket=bucket)
    options = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": SECRET,
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
    """Commits of several days: the rows are there once, the spool is empty."""
    spool, committer = Spool(settings), Committer(settings)
    for number in range(4):
        spool.append(batch([str(number)], at=NOON + timedelta(seconds=number)), sync=True)
        commit_all(committer)
    spool.append(batch(["next day"], at=NOON + timedelta(days=1)), sync=True)
    commit_all(committer)
    assert ids(settings) == ["0", "1", "2", "3", "next day"]
    assert spool_stats(spool.root).segments == 0


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


# --- maintenance, in a child process ---


@pytest.fixture
def maintenance(settings: StorageSettings) -> Iterator[Maintenance]:
    with contextlib.closing(Maintenance(settings)) as found:
        yield found


def fill(settings: StorageSettings, commits: int, prefix: str = "", hour: int = 0) -> list[str]:
    """One file for each commit; returns the ids."""
    spool, committer = Spool(settings), Committer(settings)
    found = [f"{prefix}{number:03d}" for number in range(commits)]
    for number, one in enumerate(found):
        spool.append(batch([one], at=NOON + timedelta(hours=hour, seconds=number)), sync=False)
        commit_all(committer)
    spool.close()
    committer.release()
    return found


def data_files(settings: StorageSettings) -> list[str]:
    found: list[str] = opened(settings).file_uris()
    return found


def objects(settings: StorageSettings, below: str) -> set[str]:
    """Names of all that lies in a folder of the table, in use or not."""
    bucket, _, prefix = settings.uri.removeprefix("s3://").partition("/")
    client = s3(settings.storage_options["AWS_ENDPOINT_URL"])
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/{below}")
    return {one["Key"] for page in pages for one in page.get("Contents", [])}


def children(pid: int) -> list[int]:
    """Processes that maintenance in that process has started."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    found = [int(child) for task in tasks for child in task.read_text().split()]
    return [child for child in found if "inference_table.maintenance_process" in command_line(child)]


def command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def wait_for_child(maintenance: Maintenance) -> None:
    """Go on taking steps, as the commit loop does, until no process is left."""

    def has_ended() -> bool:
        maintenance.step()
        return maintenance._child is None

    wait_for(has_ended, "the child to end", 120)


def test_an_hour_becomes_one_file(settings: StorageSettings, maintenance: Maintenance) -> None:
    """A step starts a process that merges the files of an hour that is over, and does not wait for it."""
    expected = fill(settings, 30)
    before = metrics.COMPACTIONS._value.get()
    assert maintenance.step()
    (child,) = wait_for(lambda: children(os.getpid()), "the child to start")
    assert SECRET not in command_line(child)
    assert not maintenance.step(), "there is one at a time"
    assert children(os.getpid()) == [child]
    wait_for_child(maintenance)
    assert len(data_files(settings)) == 1
    assert ids(settings) == expected
    assert metrics.COMPACTIONS._value.get() == before + 1
    table = opened(settings)
    assert table.history(1)[0]["operation"] == "WRITE"
    spooled = Spool(settings)
    assert spool_stats(spooled.root).segments == 0


def test_exactly_once_survives(settings: StorageSettings, maintenance: Maintenance) -> None:
    """Transactions are still there after a merge: what was committed is not committed again."""
    spool, committer = Spool(settings), Committer(settings)
    for one in "abc":
        spool.append(batch([one]), sync=False)
        path = next(spool.root.glob("*/*.arrow"))
        content = path.read_bytes()
        commit_all(committer)
    assert maintenance.step()
    wait_for_child(maintenance)
    assert len(data_files(settings)) == 1
    assert opened(settings).transaction_version(str(spool.spool_id)) == 3
    path.write_bytes(content)
    commit_all(committer)
    assert ids(settings) == ["a", "b", "c"]
    spool.close()


def test_no_process_without_work(settings: StorageSettings, maintenance: Maintenance) -> None:
    """The hour that is not over starts nothing."""
    fill(settings, 3)
    assert not maintenance.compact(NOON + timedelta(minutes=59))
    assert not children(os.getpid())


def test_two_machines_beside_a_writer(settings: StorageSettings, tmp_path: Path) -> None:
    """Two machines that merge the same files while a third one commits double no row and lose none."""
    expected = fill(settings, 12) + fill(settings, 12, "next-", 1) + fill(settings, 12, "later-", 2)
    command = [sys.executable, "-m", "inference_table.maintenance_process"]
    work = {"uri": settings.uri, "storage_options": dict(settings.storage_options), "job": "merge"}
    machines = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for machine in machines:
        assert machine.stdin is not None
        machine.stdin.write(json.dumps(work) + "\n")
        machine.stdin.flush()
    third = dataclasses.replace(settings, spool_dir=tmp_path / "third")
    written: list[str] = []
    while any(machine.poll() is None for machine in machines):
        hour = int((datetime.now(UTC) - NOON).total_seconds() // 3600)
        written += fill(third, 1, f"written-{len(written)}-", hour)
        time.sleep(0.3)
    merges = 0
    for machine in machines:
        assert machine.stdin is not None
        assert machine.stdout is not None
        with machine:
            merges += len(machine.stdout.read())
        assert machine.returncode == 0
    assert ids(settings) == sorted(expected + written)
    assert len(data_files(settings)) == 3 + len(written)
    assert merges == 3


def test_failure_of_the_child_is_told(
    settings: StorageSettings, maintenance: Maintenance, endpoint: str
) -> None:
    """What the process failed of is raised by the next step, for the loop to count and log."""
    expected = fill(settings, 3)
    bucket, _, key = data_files(settings)[0].removeprefix("s3://").partition("/")
    content = s3(endpoint).get_object(Bucket=bucket, Key=key)["Body"].read()
    s3(endpoint).delete_object(Bucket=bucket, Key=key)
    assert maintenance.step()
    with pytest.raises(TableError, match=f"merge of {settings.uri} ended with 1: FileNotFoundError: .*part-"):
        wait_for_child(maintenance)
    assert not maintenance.step(), "it is tried again a minute later"
    s3(endpoint).put_object(Bucket=bucket, Key=key, Body=content)
    assert ids(settings) == expected


def test_killed_parent(settings: StorageSettings, store: tuple[str, Process], tmp_path: Path) -> None:
    """The process ends with its parent, even while it waits for a store that does not answer."""
    fill(settings, 3)
    code = (
        "import json, sys, time; from pathlib import Path\n"
        "from inference_table.compaction import Maintenance\n"
        "from inference_table.settings import StorageSettings\n"
        "uri, folder, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])\n"
        "settings = StorageSettings(uri=uri, spool_dir=folder, storage_options=options)\n"
        "maintenance = Maintenance(settings); maintenance.step(); time.sleep(60)"
    )
    options = json.dumps(dict(settings.storage_options))
    parent = Process([sys.executable, "-c", code, settings.uri, str(tmp_path), options], {}, tmp_path / "log")
    (child,) = wait_for(lambda: children(parent.popen.pid), "the child to start")
    os.kill(store[1].popen.pid, signal.SIGSTOP)
    try:
        time.sleep(3)
        assert command_line(child), "it waits for the store"
        parent.popen.kill()
        parent.popen.wait()
        wait_for(lambda: not command_line(child), "the child to end", 10)
    finally:
        os.kill(store[1].popen.pid, signal.SIGCONT)
    assert len(data_files(settings)) == 3


def test_checkpoints_and_an_end_to_the_log(settings: StorageSettings) -> None:
    """Commits and merges leave checkpoints, and what comes before one is deleted once it is old."""
    expected = fill(settings, 25)
    assert any("checkpoint.parquet" in key for key in objects(settings, "_delta_log"))
    before = objects(settings, "_delta_log")
    clean(settings, "log")
    assert objects(settings, "_delta_log") == before, "nothing is old enough"
    opened(settings).alter.set_table_properties({"delta.logRetentionDuration": "interval 0 seconds"})
    time.sleep(1.1)  # the store knows the age of an object in seconds
    clean(settings, "log")
    assert len(objects(settings, "_delta_log")) < len(before) - 10
    assert ids(settings) == expected


def test_vacuum(
    settings: StorageSettings, maintenance: Maintenance, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged files and left-overs go once they are old enough, and no sooner; those in use stay."""
    expected = fill(settings, 3)
    assert maintenance.step()
    wait_for_child(maintenance)
    (used,) = data_files(settings)
    bucket, _, key = used.removeprefix("s3://").partition("/")
    orphan = key.rpartition("/")[0] + "/part-orphan.parquet"
    s3(endpoint).put_object(Bucket=bucket, Key=orphan, Body=b"left by a crash")
    before = objects(settings, "request_date=")
    assert len(before) == 5
    clean(settings, "vacuum")
    assert objects(settings, "request_date=") == before
    opened(settings).alter.set_table_properties({"delta.deletedFileRetentionDuration": "interval 0 seconds"})
    monkeypatch.setattr(cleaning_module, "RETENTION_HOURS", 0)
    time.sleep(1.1)
    clean(settings, "vacuum")
    assert objects(settings, "request_date=") == {key}
    assert ids(settings) == expected


def test_cleaning_is_done_by_the_child_too(settings: StorageSettings, maintenance: Maintenance) -> None:
    """With nothing to merge, the log and then the files are cleaned, each at its time."""
    expected = fill(settings, 1)
    root = Spool(settings).root
    for stamp in ("log.stamp", "vacuum.stamp"):
        maintenance = Maintenance(settings)  # its first look is now
        assert maintenance.step()
        assert root.joinpath(stamp).exists()
        wait_for_child(maintenance)
    assert not Maintenance(settings).step()
    assert ids(settings) == expected
