"""Annotations: what is true of a request, who may write at once, and what a commit survives."""

import contextlib
import json
import random
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, QueryBuilder
from deltalake.exceptions import CommitFailedError

from inference_table import annotations
from inference_table.annotation_upkeep import merge_small_files
from inference_table.annotations import Annotation, AnnotationLog
from inference_table.commit import open_or_create_table
from inference_table.errors import TableError, TableSchemaError
from inference_table.group_commit import GroupCommit
from inference_table.settings import StorageSettings
from inference_table.steps import Step
from tests.support import ROOT, wait_for

WRITER = """
import os, sys, threading
from inference_table.annotations import Annotation, AnnotationLog
from inference_table.settings import StorageSettings

uri, name, threads, calls = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
log = AnnotationLog(StorageSettings(uri=uri))
def write(thread):
    for call in range(calls):
        key = f"{name}-{thread}-{call}"
        log.append([Annotation(kind="assessment", key=key, databricks_request_id="r", value="1")])
        os.write(1, f"{key} ".encode())
running = [threading.Thread(target=write, args=(one,)) for one in range(threads)]
[one.start() for one in running]
[one.join() for one in running]
"""


@pytest.fixture
def settings(tmp_path: Path) -> StorageSettings:
    return StorageSettings(uri=str(tmp_path / "payload"), spool_dir=tmp_path / "spool")


@pytest.fixture
def log(settings: StorageSettings) -> AnnotationLog:
    return AnnotationLog(settings)


def feedback(key: str, request: str | None = "r", **fields: Any) -> Annotation:
    return Annotation(kind="assessment", key=key, databricks_request_id=request, **fields)


def values(log: AnnotationLog, **wanted: Any) -> dict[str, str]:
    found = log.read(**wanted)
    return dict(zip(found["key"].to_pylist(), found["value"].to_pylist(), strict=True))


def written(log: AnnotationLog) -> Counter[str]:
    """How often each key is in the Delta table, whatever counts."""
    rows = pa.table(QueryBuilder().register("t", DeltaTable(log.uri)).execute("select key from t"))
    return Counter(rows["key"].to_pylist())


# --- what is true ---


def test_before_the_first_there_are_none(log: AnnotationLog) -> None:
    """To look creates nothing."""
    assert log.read().num_rows == 0
    assert log.read(request_ids=["r"]).schema == annotations.ANNOTATION_SCHEMA
    assert not Path(log.uri).exists()


def test_the_last_write_of_a_key_counts(log: AnnotationLog) -> None:
    """Changed and deleted by writing again, in one call or in several."""
    log.append([feedback("a", value="1"), feedback("b", value="1"), feedback("a", value="2")])
    assert values(log) == {"a": "2", "b": "1"}
    log.append([feedback("a", value="3"), feedback("b", is_deleted=True)])
    assert values(log) == {"a": "3"}
    log.append([feedback("b", value="4")])
    assert values(log) == {"a": "3", "b": "4"}


def test_kinds_and_requests_are_apart(log: AnnotationLog) -> None:
    """The same key of another kind, or of another request, is another annotation."""
    tag = Annotation(kind="tag", key="a", databricks_request_id="r", value='"x"')
    log.append([feedback("a", value="1"), feedback("a", "other", value="2"), tag])
    assert log.read().num_rows == 3
    assert values(log, request_ids=["r"], kind="assessment") == {"a": "1"}
    assert values(log, request_ids=["other"]) == {"a": "2"}
    assert values(log, kind="tag") == {"a": '"x"'}
    assert values(log, request_ids=[]) == values(log, trace_ids=["r"]) == {}


def test_tables_are_apart(tmp_path: Path) -> None:
    """What is said of one payload table is not said of its neighbour, whatever their names."""
    one, other = (
        AnnotationLog(StorageSettings(uri=str(tmp_path / name))) for name in ("payload", "payload_2")
    )
    one.append([feedback("a", value="1")])
    other.append([feedback("a", value="2")])
    assert values(one) == {"a": "1"}
    assert values(other) == {"a": "2"}


@pytest.mark.parametrize(("cached_bytes", "requests"), [(annotations.CACHED_BYTES, 40), (0, 4)])
def test_any_order_of_ids_and_writes(
    log: AnnotationLog, monkeypatch: pytest.MonkeyPatch, cached_bytes: int, requests: int
) -> None:
    """A request has two names. Whoever used which, by either name all and only what counts is found."""
    monkeypatch.setattr(annotations, "CACHED_BYTES", cached_bytes)
    generator = random.Random(7)
    rows, expected = [], dict[str, dict[str, str]]()
    for request in map(str, range(requests)):
        both = {"databricks_request_id": f"r-{request}", "trace_id": f"tr-{request}"}
        named = [dict([pair]) for pair in both.items()]
        # At least one has both names, at any place.
        ids = [*generator.choices([*named, both], k=6), both]
        generator.shuffle(ids)
        state = expected[request] = {}
        for number, names in enumerate(ids):
            key, deleted = generator.choice("ab"), generator.random() < 0.3
            rows.append(
                Annotation(kind="tag", key=key, value=str(number), is_deleted=deleted, **names)  # type: ignore[arg-type]
            )
            state.pop(key, None)
            if not deleted:
                state[key] = str(number)
    log.append(rows[:9])
    log.append(rows[9:])
    for request, state in expected.items():
        assert values(log, request_ids=[f"r-{request}"]) == state
        assert values(log, trace_ids=[f"tr-{request}"]) == state
        assert values(log, trace_ids=[f"tr-{request}", "tr-none"], request_ids=["r-none"]) == state
    assert log.read().num_rows == sum(map(len, expected.values()))


def test_what_another_writes_is_seen(settings: StorageSettings, log: AnnotationLog) -> None:
    """A reader that has read before sees what somebody else wrote since."""
    log.append([feedback("a", value="1")])
    assert values(log) == {"a": "1"}
    AnnotationLog(settings).append([feedback("a", value="2")])
    assert values(log) == {"a": "2"}


def test_all_columns_come_back(log: AnnotationLog) -> None:
    """What goes in comes out, with an id and a time of ours."""
    given = {
        "kind": "assessment",
        "key": "k",
        "databricks_request_id": "r",
        "trace_id": "tr-1",
        "name": "quality",
        "value": json.dumps({"π": [1, None]}),
        "type": "expectation",
        "source_type": "HUMAN",
        "source_id": "ann@example.org",
        "rationale": "because\n“so”",
        "document": "{}",
        "is_deleted": False,
    }
    log.append([Annotation(**given)])
    [row] = log.read().to_pylist()
    assert len(row.pop("annotation_id")) == 36
    assert row.pop("annotation_time").utcoffset().total_seconds() == 0
    assert row == given


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "note", "key": "k", "trace_id": "tr-1"},
        {"kind": "tag", "key": "k"},
        {"kind": "tag", "key": "k", "trace_id": ""},
        {"kind": "tag", "key": "\ud800", "trace_id": "tr-1"},
    ],
)
def test_what_is_no_annotation(fields: dict[str, Any]) -> None:
    """It is refused before anything is written."""
    with pytest.raises(ValueError, match="annotation"):
        Annotation(**fields)


def test_a_table_of_others_is_refused(settings: StorageSettings, log: AnnotationLog) -> None:
    """A payload table where the annotations should be is neither read nor written to."""
    other = StorageSettings(uri=log.uri)
    open_or_create_table(other)
    with pytest.raises(TableSchemaError, match="for annotations"):
        log.append([feedback("a")])
    with pytest.raises(TableSchemaError, match="for annotations"):
        log.read()


# --- many at once ---


def test_calls_at_the_same_time_share_a_commit() -> None:
    """What comes while a commit runs is in the next one, all of it."""
    started, go_on, groups = threading.Event(), threading.Event(), list[list[int]]()

    def commit(items: list[int]) -> None:
        groups.append(items)
        started.set()
        go_on.wait(30)

    group = GroupCommit(commit)
    with ThreadPoolExecutor(9) as pool:
        first = pool.submit(group.submit, [0])
        started.wait(30)
        others = [pool.submit(group.submit, [number, -number]) for number in range(1, 9)]
        wait_for(lambda: len(group._waiting) == 8, "all to wait")
        go_on.set()
        for call in (first, *others):
            call.result()
    assert groups[0] == [0]
    assert sorted(groups[1]) == sorted([*range(1, 9), *range(-8, 0)])


def test_a_failed_commit_fails_its_callers_alone() -> None:
    """Each caller whose items were in it gets the error; the next commit is another."""
    committed = []

    def commit(items: list[str]) -> None:
        committed.extend(items)
        if "bad" in items:
            raise TableError("cannot")

    group = GroupCommit(commit)
    with pytest.raises(TableError, match="cannot"):
        group.submit(["bad"])
    group.submit(["good"])
    assert committed == ["bad", "good"]


def test_a_leader_that_is_interrupted() -> None:
    """The interrupt is its own; those that shared its commit get an error, and those that wait go on."""
    committing, go_on, groups = threading.Event(), threading.Event(), list[list[int]]()

    def commit(items: list[int]) -> None:
        groups.append(items)
        if len(groups) == 1:
            committing.set()
            go_on.wait(30)
        if len(groups) == 2:
            raise KeyboardInterrupt

    group = GroupCommit(commit)
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(group.submit, [0])]
        committing.wait(30)
        calls += [pool.submit(group.submit, [1])]
        wait_for(lambda: len(group._waiting) == 1, "the next leader to wait")
        calls += [pool.submit(group.submit, [2])]
        wait_for(lambda: len(group._waiting) == 2, "both to wait")
        go_on.set()
        errors = [call.exception() for call in calls]
    assert [type(error) for error in errors] == [type(None), KeyboardInterrupt, TableError]
    group.submit([3])
    assert groups == [[0], [1, 2], [3]]


def test_threads_and_processes_at_once(settings: StorageSettings, log: AnnotationLog) -> None:
    """Three processes of four threads each, while files are merged: each annotation is there, and once."""
    command = [sys.executable, "-c", WRITER, settings.uri]
    writers = [
        subprocess.Popen([*command, name, "4", "8"], stdout=subprocess.PIPE, cwd=ROOT, text=True)
        for name in "xyz"
    ]
    try:
        wait_for(lambda: log.version is not None and len(written(log)) > 20, "some annotations", 120)
        merge_small_files(StorageSettings(uri=log.uri))
        said = [line for writer in writers for line in writer.communicate(timeout=120)[0].split()]
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    assert len(said) == 3 * 4 * 8
    assert written(log) == Counter(said)
    assert values(log).keys() == set(said)


def test_a_writer_that_is_killed(settings: StorageSettings, log: AnnotationLog) -> None:
    """What a killed process was told is written, is written, once; and others go on."""
    log.append([feedback("before")])
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, settings.uri, "w", "3", "1000"],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    )
    assert writer.stdout is not None
    with writer:
        said = writer.stdout.read(60)
        writer.kill()
        said = (said + writer.stdout.read()).split()
    log.append([feedback("after")])
    found = written(log)
    assert {*said, "before", "after"} <= found.keys()
    assert set(found.values()) == {1}


# --- what a commit survives ---


def failing(step: Step, times: int) -> Callable[[Step], None]:
    left = [times]

    def fail(passed: Step) -> None:
        if passed is step and left[0]:
            left[0] -= 1
            raise OSError("the reply was lost")

    return fail


@pytest.mark.parametrize("step", [Step.DATA_WRITTEN, Step.DATA_SYNCED, Step.COMMITTED, Step.COMMIT_SYNCED])
def test_a_failure_on_the_way(settings: StorageSettings, step: Step) -> None:
    """Wherever it fails, before the commit or after, it is tried again and the annotation is there once."""
    log = AnnotationLog(settings, failing(step, 2))
    log.append([feedback("a", value="1")])
    log.append([feedback("b", value="1")])
    assert written(log) == {"a": 1, "b": 1}


def test_a_failure_for_good(settings: StorageSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an error that says what and where, and the next call works."""
    monkeypatch.setattr("inference_table.annotation_commit.ATTEMPTS", 2)
    log = AnnotationLog(settings, failing(Step.DATA_SYNCED, 2))
    with pytest.raises(TableError, match=r"cannot append annotations to .*payload_annotations.*lost"):
        log.append([feedback("a", value="1")])
    log.append([feedback("b", value="1")])
    assert written(log) == {"b": 1}


def test_a_table_that_was_replaced(settings: StorageSettings, log: AnnotationLog) -> None:
    """After the table was deleted and made anew by somebody, what is written goes to the new one."""
    for number in range(3):
        log.append([feedback(f"old-{number}")])
    shutil.rmtree(log.uri)
    AnnotationLog(settings).append([feedback("new")])
    log.append([feedback("a")])
    assert written(log) == {"new": 1, "a": 1}
    assert log.read().num_rows == 2


# --- upkeep ---


def test_many_commits_stay_few_files(log: AnnotationLog) -> None:
    """Small files are merged as commits go on; nothing is lost, and what is true stays true."""
    for number in range(70):
        log.append([feedback(f"a-{number % 7}", value=str(number))])
    wait_for(lambda: len(DeltaTable(log.uri).file_uris()) < 30, "the merge")
    assert written(log) == {f"a-{number}": 10 for number in range(7)}
    assert values(log) == {f"a-{number}": str(63 + number) for number in range(7)}
    assert list(Path(log.uri, "_delta_log").glob("*.checkpoint.parquet"))


def test_two_merges_at_once(log: AnnotationLog) -> None:
    """Whichever wins, no row is doubled."""
    for number in range(20):
        log.append([feedback(f"a-{number}")])
    own = StorageSettings(uri=log.uri)

    def merge(_: int) -> None:
        with contextlib.suppress(CommitFailedError):
            merge_small_files(own)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(merge, range(2)))
    assert len(DeltaTable(log.uri).file_uris()) == 1
    assert written(log) == {f"a-{number}": 1 for number in range(20)}
