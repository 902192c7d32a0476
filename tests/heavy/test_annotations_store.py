"""Annotations of a table on an object store: moto's S3 server, over HTTP."""

import json
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Iterator

import pyarrow as pa
import pytest
from deltalake import DeltaTable, QueryBuilder

from inference_table.annotation_upkeep import merge_in_child
from inference_table.annotations import Annotation, AnnotationLog
from inference_table.settings import StorageSettings
from inference_table.steps import Step
from tests.inference_table.test_annotations import failing
from tests.support import ROOT, Process, free_port, wait_for

pytestmark = pytest.mark.heavy
boto3 = pytest.importorskip("boto3")

WRITER = """
import json, os, sys, threading
from inference_table.annotations import Annotation, AnnotationLog
from inference_table.settings import StorageSettings

uri, options, name = sys.argv[1:]
log = AnnotationLog(StorageSettings(uri=uri, storage_options=json.loads(options)))
def write(thread):
    for call in range(5):
        key = f"{name}-{thread}-{call}"
        log.append([Annotation(kind="assessment", key=key, databricks_request_id="r", value="1")])
        os.write(1, f"{key} ".encode())
running = [threading.Thread(target=write, args=(one,)) for one in range(4)]
[one.start() for one in running]
[one.join() for one in running]
"""


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    log = tmp_path_factory.mktemp("moto") / "log"
    server = Process(command, {}, log)
    try:
        wait_for(lambda: "Running on" in log.read_text(encoding="utf-8"), "the object store to listen", 60)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill_group()


@pytest.fixture
def settings(endpoint: str) -> StorageSettings:
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "us-east-1"}
    options = {"AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": "true", **keys}
    bucket = f"bucket-{uuid.uuid4()}"
    boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="x",
        aws_secret_access_key="x",
    ).create_bucket(Bucket=bucket)
    return StorageSettings(uri=f"s3://{bucket}/agents/payload", storage_options=options)


def opened(log: AnnotationLog, settings: StorageSettings) -> DeltaTable:
    return DeltaTable(log.uri, storage_options=dict(settings.storage_options))


def written(log: AnnotationLog, settings: StorageSettings) -> Counter[str]:
    rows = QueryBuilder().register("t", opened(log, settings)).execute("select key from t")
    return Counter(pa.table(rows)["key"].to_pylist())


def feedback(key: str, value: str = "1") -> Annotation:
    return Annotation(kind="assessment", key=key, databricks_request_id="r", value=value)


def test_written_and_read(settings: StorageSettings) -> None:
    """As on a disk: the last of a key counts, and a commit that only seemed to fail is there once."""
    log = AnnotationLog(settings, failing(Step.COMMITTED, 2))
    assert log.read().num_rows == 0
    log.append([feedback("a"), feedback("b")])
    log.append([feedback("a", "2")])
    assert log.read(request_ids=["r"]).select(["key", "value"]).to_pylist() == [
        {"key": "b", "value": "1"},
        {"key": "a", "value": "2"},
    ]
    assert written(log, settings) == {"a": 2, "b": 1}


def test_threads_and_processes_at_once(settings: StorageSettings) -> None:
    """Two processes of four threads each: the store decides, and each annotation is there once."""
    log = AnnotationLog(settings)
    command = [sys.executable, "-c", WRITER, settings.uri, json.dumps(dict(settings.storage_options))]
    writers = [
        subprocess.Popen([*command, name], stdout=subprocess.PIPE, cwd=ROOT, text=True) for name in "xy"
    ]
    try:
        said = [key for writer in writers for key in writer.communicate(timeout=240)[0].split()]
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    assert len(said) == 2 * 4 * 5
    assert written(log, settings) == Counter(said)


def test_small_files_are_merged(settings: StorageSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a process of its own, started by the commits themselves; nothing is lost."""
    monkeypatch.setattr("inference_table.annotation_upkeep.MERGE_VERSIONS", 20)
    log = AnnotationLog(settings)
    for number in range(22):
        log.append([feedback(f"a-{number % 3}", str(number))])
    wait_for(lambda: len(opened(log, settings).file_uris()) < 16, "the merge", 120)
    assert written(log, settings) == {"a-0": 8, "a-1": 7, "a-2": 7}
    assert sorted(log.read()["value"].to_pylist()) == ["19", "20", "21"]


def test_a_merge_that_is_not_worth_it(settings: StorageSettings) -> None:
    """A few files stay as they are."""
    log = AnnotationLog(settings)
    log.append([feedback("a")])
    before = opened(log, settings).version()
    merge_in_child(StorageSettings(uri=log.uri, storage_options=settings.storage_options))
    assert opened(log, settings).version() == before
