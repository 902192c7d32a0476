"""The committer: from segments to rows, and what it does when the table is not as it should be."""

import os
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, Field, Schema, write_deltalake
from deltalake.exceptions import CommitFailedError
from deltalake.schema import PrimitiveType
from prometheus_client import REGISTRY

from inference_table import commit as commit_module
from inference_table.commit import Committer, open_or_create_table
from inference_table.errors import (
    SegmentError,
    SpoolError,
    TableError,
    TableNotFoundError,
    TableReplacedError,
    TableSchemaError,
)
from inference_table.schema import SCHEMA, SKIPPING_COLUMNS
from inference_table.settings import StorageSettings
from inference_table.spool import Spool, folders, retry_quarantined, spool_root, spool_stats
from inference_table.steps import Step
from tests.inference_table.rows import NOON, batch, commit_all, ids_in_table, query, storage


@pytest.fixture
def settings(tmp_path: Path) -> StorageSettings:
    found = storage(tmp_path)
    open_or_create_table(found)
    return found


def counter(name: str) -> float:
    return REGISTRY.get_sample_value(name) or 0.0


def data_files(settings: StorageSettings) -> set[str]:
    return {str(path.relative_to(settings.uri)) for path in Path(settings.uri).rglob("*.parquet")} - {
        str(path.relative_to(settings.uri)) for path in Path(settings.uri, "_delta_log").rglob("*.parquet")
    }


def test_rows_arrive_unchanged(settings: StorageSettings) -> None:
    """What was spooled is what the table holds, and nothing is left in the spool."""
    spool, committer = Spool(settings), Committer(settings)
    rows = batch(["a", "b"], text='quotes "and" ünïcode 🙂')
    spool.append(rows, sync=True)
    assert commit_all(committer) == 1
    names = ", ".join(SCHEMA.names)
    found = query(settings, f"select {names} from t order by databricks_request_id")
    assert pa.RecordBatch.from_pylist(found, schema=SCHEMA).equals(rows)
    assert not spool.is_pending(1)
    assert spool_stats(spool.root).segments == 0
    assert committer.commit_once() is None


def test_one_commit_for_all_folders(settings: StorageSettings) -> None:
    """What several processes have spooled becomes one commit with one file, and a transaction for each."""
    spools = [Spool(settings) for _ in range(3)]
    for number, spool in enumerate(spools):
        for part in range(3):
            spool.append(batch([f"{number}-{part}"]), sync=False)
    committer = Committer(settings)
    assert committer.acquire()
    result = committer.commit_once()
    assert result is not None
    assert (result.rows, result.segments, result.version) == (9, 9, 1)
    table = DeltaTable(settings.uri)
    assert len(table.file_uris()) == 1
    assert [table.transaction_version(str(spool.spool_id)) for spool in spools] == [3, 3, 3]


def test_a_file_for_each_day(settings: StorageSettings) -> None:
    """Rows of two days in one segment go to two partitions, so that a query reads one day's file."""
    days = [NOON, NOON + timedelta(days=1)]
    both = pa.Table.from_batches([batch(["a"], at=days[0]), batch(["b"], at=days[1])]).combine_chunks()
    Spool(settings).append(both.to_batches()[0], sync=False)
    commit_all(Committer(settings))
    table = DeltaTable(settings.uri)
    assert len(table.file_uris()) == 2
    assert len(table.file_uris(file_pruning_predicate=[("request_date", "=", "2025-03-02")])) == 1
    found = query(settings, "select databricks_request_id from t where request_date = date '2025-03-02'")
    assert found == [{"databricks_request_id": "b"}]


def test_every_reader_reads_it(settings: StorageSettings) -> None:
    """DuckDB, Polars and DataFusion see the same rows, times and dates included."""
    Spool(settings).append(batch(["a"]), sync=False)
    commit_all(Committer(settings))
    files = DeltaTable(settings.uri).file_uris()
    columns = "databricks_request_id, request_time, request_date, request_metadata"
    connection = duckdb.connect()
    connection.execute("set timezone = 'UTC'")
    relation = connection.sql(f"select {columns} from read_parquet({files!r}, hive_partitioning = true)")
    from_duckdb = relation.to_arrow_table().to_pylist()
    from_polars = pl.read_delta(settings.uri).select("databricks_request_id", "request_time", "request_date")
    expected = {"databricks_request_id": "a", "request_time": NOON, "request_date": NOON.date()}
    assert from_polars.to_dicts() == [expected]
    assert [row["databricks_request_id"] for row in from_duckdb] == ["a"]
    assert from_duckdb[0]["request_time"] == NOON
    assert from_duckdb[0]["request_date"] == NOON.date()
    assert query(settings, f"select {columns} from t") == [{**expected, "request_metadata": [("path", "/")]}]


def test_statistics_prune_and_hold_no_user_text(settings: StorageSettings) -> None:
    """The log says where ids and times are, to the microsecond, and nothing of what users wrote."""
    spool, committer = Spool(settings), Committer(settings)
    times = [NOON + timedelta(microseconds=1), NOON + timedelta(hours=1)]
    for number, at in enumerate(times):
        spool.append(batch([f"id-{number}"], at=at, text="secret"), sync=False)
        commit_all(committer)
    actions = pa.table(DeltaTable(settings.uri).get_add_actions(flatten=True)).to_pylist()
    low = {row["min.databricks_request_id"]: row["min.request_time"] for row in actions}
    assert {name: time.replace(tzinfo=UTC) for name, time in low.items()} == {
        "id-0": times[0],
        "id-1": times[1],
    }
    assert {row["num_records"] for row in actions} == {1}
    log = "".join(path.read_text() for path in Path(settings.uri, "_delta_log").glob("*.json"))
    assert "secret" not in log
    assert "request_time" in log
    later = query(
        settings, f"select databricks_request_id from t where request_time > '{times[0].isoformat()}'"
    )
    assert later == [{"databricks_request_id": "id-1"}]


def test_layout_of_a_data_file(settings: StorageSettings) -> None:
    """Payloads have no statistics and no dictionary, small columns have statistics, all is zstd."""
    Spool(settings).append(batch(["a", "b"]), sync=False)
    commit_all(Committer(settings))
    file = pq.ParquetFile(DeltaTable(settings.uri).file_uris()[0])
    assert "request_date" not in file.schema_arrow.names
    group = file.metadata.row_group(0)
    columns = {
        group.column(number).path_in_schema: group.column(number) for number in range(group.num_columns)
    }
    assert {column.compression for column in columns.values()} == {"ZSTD"}
    for payload in ("request", "response", "trace_info"):
        assert columns[payload].statistics is None
        assert not columns[payload].has_dictionary_page
    for small in set(SKIPPING_COLUMNS):
        assert columns[small].statistics is not None, small


def test_large_segments_become_bounded_row_groups(settings: StorageSettings) -> None:
    """Row groups are cut by bytes, so that a reader never has to hold a whole batch."""
    spool = Spool(settings)
    for part in range(3):
        spool.append(batch([f"{part}-{row}" for row in range(40)], text="x" * 600_000), sync=False)
    commit_all(Committer(settings))
    metadata = pq.ParquetFile(DeltaTable(settings.uri).file_uris()[0]).metadata
    sizes = [metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups)]
    assert len(sizes) > 2
    assert max(sizes) < 64 * 1024 * 1024
    assert len(ids_in_table(settings)) == 120


def test_a_batch_is_bounded(settings: StorageSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backlog becomes several commits of bounded size; a segment beyond the bound goes through."""
    monkeypatch.setattr(commit_module, "BATCH_BYTES", 100_000)
    spool = Spool(settings)
    spool.append(batch(["large"], text="x" * 300_000), sync=False)
    for number in range(6):
        spool.append(batch([str(number)], text="x" * 20_000), sync=False)
    assert commit_all(Committer(settings)) >= 3
    assert sorted(ids_in_table(settings)) == ["0", "1", "2", "3", "4", "5", "large"]


def test_one_committer_per_machine(settings: StorageSettings) -> None:
    """Of two committers one holds the lock; the other takes over when it is released."""
    Spool(settings).append(batch(["a"]), sync=False)
    first, second = Committer(settings), Committer(settings)
    assert first.acquire()
    assert not second.acquire()
    with pytest.raises(SpoolError, match="lock"):
        second.commit_once()
    first.release()
    assert second.acquire()
    assert second.commit_once() is not None


def test_nothing_to_acquire_before_anything_is_spooled(tmp_path: Path) -> None:
    """A committer without a spool does nothing, and makes no file."""
    committer = Committer(storage(tmp_path))
    assert not committer.acquire()
    assert list(tmp_path.iterdir()) == []


def test_two_committers_race_for_the_same_segments(settings: StorageSettings, tmp_path: Path) -> None:
    """Where locks fail (here: a copied spool) Delta decides: one commit wins, the rows come once."""
    Spool(settings).append(batch(["a"]), sync=True)
    copied = StorageSettings(uri=settings.uri, spool_dir=tmp_path / "copy")
    shutil.copytree(settings.spool_dir, copied.spool_dir)

    def other_commits(step: Step) -> None:
        if step is Step.DATA_SYNCED:
            assert commit_all(Committer(copied)) == 1

    first = Committer(settings, other_commits)
    assert first.acquire()
    with pytest.raises(CommitFailedError, match="Concurrent transaction"):
        first.commit_once()
    assert spool_stats(spool_root(settings)).segments == 1, "whose commit it was, the next look finds out"
    assert first.commit_once() is None
    assert ids_in_table(settings) == {"a": 1}
    assert spool_stats(spool_root(settings)).segments == 0


def test_other_writers_do_not_disturb(settings: StorageSettings) -> None:
    """A commit of somebody else during ours fails neither."""
    Spool(settings).append(batch(["ours"]), sync=True)
    theirs = pa.Table.from_batches([batch(["theirs"])])

    def other_commits(step: Step) -> None:
        if step is Step.DATA_SYNCED:
            write_deltalake(settings.uri, theirs, mode="append")

    commit_all(Committer(settings, other_commits))
    assert ids_in_table(settings) == {"ours": 1, "theirs": 1}


def test_failed_commit_leaves_no_data_file(settings: StorageSettings) -> None:
    """Data files of an attempt that did not commit are removed, once that is certain."""

    def fail(step: Step) -> None:
        if step is Step.DATA_WRITTEN:
            raise OSError("the disk has a bad moment")

    spool = Spool(settings)
    spool.append(batch(["a"]), sync=True)
    failing = Committer(settings, fail)
    assert failing.acquire()
    with pytest.raises(OSError, match="bad moment"):
        failing.commit_once()
    assert len(data_files(settings)) == 1
    failing.release()
    commit_all(Committer(settings))
    (uri,) = DeltaTable(settings.uri).file_uris()
    assert data_files(settings) == {os.path.relpath(uri, settings.uri)}
    assert ids_in_table(settings) == {"a": 1}


def test_a_commit_that_only_seemed_to_fail_is_not_repeated(settings: StorageSettings) -> None:
    """An exception after the commit does not bring the rows twice, nor cost them their file."""

    def fail(step: Step) -> None:
        if step is Step.COMMITTED:
            raise OSError("the reply was lost")

    Spool(settings).append(batch(["a"]), sync=True)
    committer = Committer(settings, fail)
    assert committer.acquire()
    with pytest.raises(OSError, match="reply"):
        committer.commit_once()
    assert committer.commit_once() is None
    assert ids_in_table(settings) == {"a": 1}
    assert spool_stats(spool_root(settings)).segments == 0


def test_dead_folders_are_committed_and_removed(settings: StorageSettings) -> None:
    """What a dead process has left is committed, its folder goes; that of a living one stays."""
    dead, alive = Spool(settings), Spool(settings)
    for spool in (dead, alive):
        spool.append(batch(["dead" if spool is dead else "alive"]), sync=False)
    dead.close()
    commit_all(Committer(settings))
    assert [folder.spool_id for folder in folders(spool_root(settings))] == [alive.spool_id]
    assert ids_in_table(settings) == {"alive": 1, "dead": 1}


def test_missing_segment_of_a_living_owner_is_waited_for(settings: StorageSettings) -> None:
    """The run ends at a missing number, says so when nothing else is left, and goes on when it shows up."""
    spool, committer = Spool(settings), Committer(settings)
    for one in ("a", "b", "c"):
        spool.append(batch([one]), sync=False)
    second = folders(spool.root)[0].segments()[1].path
    hidden = second.rename(second.with_suffix(".hidden"))
    assert committer.acquire()
    assert committer.commit_once() is not None
    with pytest.raises(SpoolError, match="segment 2 is missing"):
        committer.commit_once()
    assert ids_in_table(settings) == {"a": 1}
    hidden.rename(second)
    commit_all(committer)
    assert ids_in_table(settings) == {"a": 1, "b": 1, "c": 1}


def test_missing_segment_of_a_dead_owner_is_counted(settings: StorageSettings) -> None:
    """A gap that nobody can fill any more is passed and counted, once for each number."""
    spool = Spool(settings)
    for one in "abcde":
        spool.append(batch([one]), sync=False)
    for segment in folders(spool.root)[0].segments():
        if segment.sequence in (2, 3):
            segment.path.unlink()
    spool.close()
    before = counter("tracelake_spool_lost_segments_total")
    commit_all(Committer(settings))
    assert counter("tracelake_spool_lost_segments_total") - before == 2
    assert sorted(ids_in_table(settings)) == ["a", "d", "e"]
    assert folders(spool.root) == []


def test_damaged_segment_is_not_in_the_way(settings: StorageSettings) -> None:
    """A segment that can't be read is set aside, those around it are committed; repaired, it follows."""
    spool = Spool(settings)
    for one in "abc":
        spool.append(batch([one]), sync=False)
    path = folders(spool.root)[0].segments()[1].path
    good = path.read_bytes()
    path.write_bytes(good[:-30])
    before = counter("tracelake_quarantined_segments_total")
    committer = Committer(settings)
    assert commit_all(committer) == 1
    assert sorted(ids_in_table(settings)) == ["a", "c"]
    assert counter("tracelake_quarantined_segments_total") - before == 1
    with pytest.raises(SegmentError):
        spool.is_pending(2)
    assert [spool.is_pending(number) for number in (1, 3)] == [False, False]
    (quarantined,) = spool.root.joinpath("quarantine").iterdir()
    quarantined.write_bytes(good)
    assert retry_quarantined(spool.root) == 1
    commit_all(committer)
    assert ids_in_table(settings) == {"a": 1, "b": 1, "c": 1}
    spool.append(batch(["d"]), sync=False)
    commit_all(committer)
    assert ids_in_table(settings)["d"] == 1


def test_a_failing_read_is_tried_again(settings: StorageSettings) -> None:
    """A segment that can't be read now ends its folder's run, not that of others, and is never set aside."""
    bad, good = Spool(settings), Spool(settings)
    bad.append(batch(["bad"]), sync=False)
    good.append(batch(["good"]), sync=False)
    path = next(f for f in folders(bad.root) if f.spool_id == bad.spool_id).segments()[0].path
    content = path.read_bytes()
    path.unlink()
    path.mkdir()  # opening it fails with EISDIR, as with EIO or EMFILE: for now
    committer = Committer(settings)
    assert committer.acquire()
    assert committer.commit_once() is not None
    with pytest.raises(IsADirectoryError):
        committer.commit_once()
    path.rmdir()
    path.write_bytes(content)
    commit_all(committer)
    assert ids_in_table(settings) == {"good": 1, "bad": 1}
    assert spool_stats(bad.root).quarantined == 0


def test_unreachable_table_keeps_rows(settings: StorageSettings) -> None:
    """While there is no table rows stay in the spool, the error names the URI; then they arrive."""
    Spool(settings).append(batch(["a"]), sync=False)
    table, away = Path(settings.uri), Path(settings.uri + "-away")
    table.rename(away)
    committer = Committer(settings)
    assert committer.acquire()
    with pytest.raises(TableNotFoundError, match=settings.uri):
        committer.commit_once()
    assert spool_stats(spool_root(settings)).segments == 1
    away.rename(table)
    commit_all(committer)
    assert ids_in_table(settings) == {"a": 1}


def test_replaced_table_is_reported_and_then_filled(settings: StorageSettings) -> None:
    """What was committed to the old table is not repeated, what is still spooled goes to the new one."""
    live, dead, idle = Spool(settings), Spool(settings), Spool(settings)
    committer = Committer(settings)
    for spool in (live, dead, idle):
        spool.append(batch([f"old-{spool.spool_id}"]), sync=False)
    commit_all(committer)
    for spool in (live, dead):
        spool.append(batch([f"new-{spool.spool_id}"]), sync=False)
    dead.close()
    shutil.rmtree(settings.uri)
    open_or_create_table(settings)
    with pytest.raises(TableReplacedError, match="was replaced"):
        committer.commit_once()
    lost = counter("tracelake_spool_lost_segments_total")
    commit_all(committer)
    idle.append(batch([f"new-{idle.spool_id}"]), sync=False)
    live.append(batch(["newer"]), sync=False)
    commit_all(committer)
    expected = {f"new-{spool_id}" for spool_id in (live.spool_id, idle.spool_id)} | {"newer"}
    found = ids_in_table(settings)
    assert set(found.values()) == {1}
    assert expected < set(found)
    assert len(found) == 4
    assert counter("tracelake_spool_lost_segments_total") == lost


def test_table_replaced_during_a_commit(settings: StorageSettings) -> None:
    """Rows whose commit went into a table that is gone a moment later are kept, and go to the new one."""
    spool = Spool(settings)
    spool.append(batch(["a"]), sync=False)

    def replace(step: Step) -> None:
        if step is Step.COMMITTED and not replaced:
            shutil.rmtree(settings.uri)
            open_or_create_table(settings)
            replaced.append(True)

    replaced: list[bool] = []
    committer = Committer(settings, replace)
    assert committer.acquire()
    with pytest.raises(TableReplacedError):
        committer.commit_once()
    assert spool.is_pending(1)
    with pytest.raises(TableReplacedError):
        committer.commit_once()
    commit_all(committer)
    assert ids_in_table(settings) == {"a": 1}


def test_missing_columns_are_added_and_those_of_users_survive(tmp_path: Path) -> None:
    """A table of an older version gains our new columns; a user's own column stays, null in our rows."""
    settings = storage(tmp_path)
    fields = [field for field in SCHEMA if field.name not in ("capture_overhead_us", "trace_info")]
    schema = pa.schema([*fields, pa.field("team", pa.string()), pa.field("score", pa.float32())])
    table = DeltaTable.create(settings.uri, schema, partition_by=["request_date"])
    theirs = pa.Table.from_pylist([{"databricks_request_id": "theirs", "team": "x"}], schema=schema)
    theirs = theirs.set_column(1, "request_date", pa.array([NOON.date()]))
    write_deltalake(table, theirs, mode="append")
    open_or_create_table(settings)
    Spool(settings).append(batch(["ours"]), sync=False)
    commit_all(Committer(settings))
    found = query(settings, "select databricks_request_id, team, trace_info from t order by 1")
    assert [(row["databricks_request_id"], row["team"]) for row in found] == [("ours", None), ("theirs", "x")]
    assert {field.name for field in DeltaTable(settings.uri).schema().fields} == {
        *SCHEMA.names,
        "team",
        "score",
    }


def test_segments_of_an_older_and_a_newer_version(settings: StorageSettings) -> None:
    """Segments with fewer columns and with more go through together; the table gains what is new."""
    spool = Spool(settings)
    old = batch(["old"]).drop_columns(["capture_overhead_us", "client_request_id"])
    new = batch(["new"]).append_column("guardrail", pa.array(["ok"]))
    for one in (old, batch(["now"]), new):
        spool.append(one, sync=False)
    assert commit_all(Committer(settings)) == 1
    found = query(settings, "select databricks_request_id, guardrail from t order by 1")
    assert [tuple(row.values()) for row in found] == [("new", "ok"), ("now", None), ("old", None)]


def foreign(change: Callable[[pa.Schema], pa.Schema]) -> Callable[[StorageSettings], None]:
    def make(settings: StorageSettings) -> None:
        DeltaTable.create(settings.uri, change(SCHEMA), partition_by=["request_date"])

    return make


def other_type(schema: pa.Schema) -> pa.Schema:
    return schema.set(schema.get_field_index("status_code"), pa.field("status_code", pa.string()))


def not_null(schema: pa.Schema) -> pa.Schema:
    return schema.append(pa.field("team", pa.string(), nullable=False))


def not_partitioned(settings: StorageSettings) -> None:
    DeltaTable.create(settings.uri, SCHEMA)


def constrained(settings: StorageSettings) -> None:
    table = DeltaTable.create(settings.uri, SCHEMA, partition_by=["request_date"])
    table.alter.add_constraint({"positive": "status_code > 0"})


def with_invariant(settings: StorageSettings) -> None:
    fields = list(Schema.from_arrow(SCHEMA).fields)
    rule = '{"expression": {"expression": "team <> \'x\'"}}'
    fields.append(Field("team", PrimitiveType("string"), metadata={"delta.invariants": rule}))
    DeltaTable.create(settings.uri, Schema(fields), partition_by=["request_date"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (foreign(other_type), "status_code is string, not integer"),
        (foreign(not_null), "team must not be null"),
        (not_partitioned, "not by request_date"),
        (constrained, "constraint 'status_code > 0'"),
        (with_invariant, "team has delta.invariants"),
    ],
)
def test_foreign_tables_are_refused(
    tmp_path: Path, make: Callable[[StorageSettings], None], message: str
) -> None:
    """A table we can't write to as it asks stops start-up; the error names the reason and the remedy."""
    settings = storage(tmp_path)
    make(settings)
    with pytest.raises(TableSchemaError, match=message) as caught:
        open_or_create_table(settings)
    assert "INFERENCE_TABLE_URI" in str(caught.value)


def test_table_that_becomes_foreign_keeps_rows(settings: StorageSettings) -> None:
    """A constraint added while we run keeps rows in the spool until it is gone."""
    Spool(settings).append(batch(["a"]), sync=False)
    DeltaTable(settings.uri).alter.add_constraint({"positive": "status_code > 0"})
    committer = Committer(settings)
    assert committer.acquire()
    with pytest.raises(TableSchemaError):
        committer.commit_once()
    DeltaTable(settings.uri).alter.drop_constraint("positive")
    commit_all(committer)
    assert ids_in_table(settings) == {"a": 1}


@pytest.mark.parametrize("uri", ["s3://no-such-bucket/table", "nonsense://table"])
def test_unreachable_table_at_start(tmp_path: Path, uri: str) -> None:
    """A table that can't be reached or created stops start-up with its URI and what to check."""
    options = {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_REGION": "us-east-1",
        "max_retries": "0",
    }
    settings = StorageSettings(uri=uri, spool_dir=tmp_path, storage_options=options)
    with pytest.raises(TableError, match=uri) as caught:
        open_or_create_table(settings)
    assert "check" in str(caught.value)


def test_two_processes_create_one_table(tmp_path: Path) -> None:
    """Whoever comes second gets the table that the first one has created."""
    settings = storage(tmp_path)
    assert open_or_create_table(settings).metadata().id == open_or_create_table(settings).metadata().id


def test_opening_stays_fast_with_many_commits(settings: StorageSettings) -> None:
    """Every twentieth version has a checkpoint, so that opening replays few commits."""
    spool, committer = Spool(settings), Committer(settings)
    for number in range(41):
        spool.append(batch([str(number)]), sync=False)
        commit_all(committer)
    checkpoints = sorted(path.name for path in Path(settings.uri, "_delta_log").glob("*.checkpoint.parquet"))
    assert [int(name.partition(".")[0]) for name in checkpoints] == [20, 40]
    assert len(ids_in_table(settings)) == 41


def test_abandoned_new_folder(settings: StorageSettings) -> None:
    """A folder whose maker died before it had its name is removed if empty, and committed if not."""
    spool = Spool(settings)
    spool.append(batch(["a"]), sync=False)
    (folder,) = folders(spool.root)
    spool.close()
    full, empty = (spool.root / f".new-{name}" for name in (folder.spool_id, "empty"))
    folder.path.rename(full)
    empty.mkdir()
    committer = Committer(settings)
    commit_all(committer)
    assert full.exists(), "its maker may be between mkdir and lock"
    long_ago = time.time() - 3600
    for path in (full, empty):
        os.utime(path, (long_ago, long_ago))
    commit_all(committer)
    assert not full.exists()
    assert not empty.exists()
    assert ids_in_table(settings) == {"a": 1}


def test_times_of_rows_survive(settings: StorageSettings) -> None:
    """Microseconds and the time zone are kept, far from now too."""
    at = datetime(1999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)
    Spool(settings).append(batch(["a"], at=at), sync=False)
    commit_all(Committer(settings))
    assert query(settings, "select request_time, request_date from t") == [
        {"request_time": at, "request_date": at.date()}
    ]
