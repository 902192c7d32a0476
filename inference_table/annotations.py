"""Annotations of requests and traces: feedback, expectations, tags, links to runs.

They lie in a Delta table of their own beside the payload table, ``<payload uri>_annotations``, which is
created at the first write. It is append-only: to change or to delete is to append. Of all rows with the same
kind, subject and key the last counts, by ``annotation_time``, then ``annotation_id``. The subject is a
request: ``databricks_request_id`` names it before it is a row, ``trace_id`` in MLflow; where any annotation
has both, they are one subject.

What holds:

- When :meth:`AnnotationLog.append` returns, its rows are committed, and on a local disk fsynced in the order
  data file, commit. So whoever reads after that has them.
- They are committed once. Each commit carries a transaction (id of the writing process, number), read from
  and committed with one table object that nobody else has: a first attempt whose reply was lost, or is still
  on its way, and a second one can't both succeed. An exception of delta-rs doesn't mean "not committed":
  after one the table is opened anew and asked for the transaction.
- What earlier commits of others have not synced is synced before ours is said to be durable.
"""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Final

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
from deltalake.exceptions import DeltaError

from inference_table.annotation_commit import ANNOTATION_SCHEMA, AnnotationCommitter, check_annotations
from inference_table.errors import TableError, TableNotFoundError
from inference_table.group_commit import GroupCommit
from inference_table.ids import uuid7
from inference_table.scan import Snapshot, one_line, open_snapshot
from inference_table.settings import StorageSettings
from inference_table.steps import Step, ignore_step

__all__ = ["ANNOTATION_SCHEMA", "KINDS", "Annotation", "AnnotationLog"]

KINDS: Final = frozenset({"assessment", "run", "tag"})
SUFFIX: Final = "_annotations"
CACHED_BYTES: Final = 16 * 1024 * 1024
"""Compressed size of a table whose whole state is kept in memory, where it takes some five times that."""
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

STATE_SQL: Final = """
with links as (
    select trace_id as link_trace, max(databricks_request_id) as link_request from source
    where trace_id is not null and databricks_request_id is not null group by 1
), requests as (
    select link_request as of_request, max(link_trace) as of_trace from links group by 1
), named as (
    select source.* replace (
        coalesce(databricks_request_id, link_request) as databricks_request_id,
        coalesce(trace_id, of_trace) as trace_id
    )
    from source
    left join links on trace_id = link_trace
    left join requests on databricks_request_id = of_request
), latest as (
    select * from named qualify row_number() over (
        partition by kind, coalesce(databricks_request_id, trace_id), key
        order by annotation_time desc, annotation_id desc
    ) = 1
)
select * from latest where not is_deleted order by annotation_time, annotation_id
"""

SOME_SQL: Final = """
with found as (
    select databricks_request_id, trace_id from everything
    where databricks_request_id in (from wanted_requests) or trace_id in (from wanted_traces)
)
select * from everything
where databricks_request_id in (select databricks_request_id from found)
or trace_id in (select trace_id from found)
"""
"""What was said of a request by its one id, and by its other."""


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """One thing said of a request, or a change of it.

    Raises:
        ValueError: the kind is unknown, neither id is given, or a text is not valid Unicode.
    """

    kind: str
    """``assessment``, ``tag`` or ``run``."""
    key: str
    """Id of the assessment, key of the tag, or id of the run."""
    databricks_request_id: str | None = None
    trace_id: str | None = None
    """At least one of both ids; with both, whoever knows one of them finds it."""
    name: str | None = None
    """Name of the assessment."""
    value: str | None = None
    """JSON."""
    type: str | None = None
    """``feedback`` or ``expectation``."""
    source_type: str | None = None
    source_id: str | None = None
    rationale: str | None = None
    document: str | None = None
    """MLflow's ``Assessment.to_dictionary()`` as JSON."""
    is_deleted: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"the kind {self.kind!r} of an annotation is none of {', '.join(sorted(KINDS))}")
        if not self.databricks_request_id and not self.trace_id:
            raise ValueError("an annotation needs a databricks_request_id or a trace_id")
        for name, value in asdict(self).items():
            try:
                str(value).encode()
            except UnicodeEncodeError:
                raise ValueError(f"the {name} of an annotation is not valid Unicode") from None


class AnnotationLog:
    """The annotations of one payload table. Calls may come from many threads, and many processes at once.

    Args:
        settings: of the payload table.
        on_step: called with each point that a commit passes.
    """

    def __init__(self, settings: StorageSettings, on_step: Callable[[Step], None] = ignore_step) -> None:
        self._settings = replace(settings, uri=settings.uri + SUFFIX)
        self._group = GroupCommit(AnnotationCommitter(self._settings, on_step).commit)
        self._clock = Clock()
        self._state: tuple[object, pa.Table] | None = None
        """A version of the table, and all that is true in it."""

    @property
    def uri(self) -> str:
        """The Delta table of the annotations."""
        return self._settings.uri

    @property
    def version(self) -> int | None:
        """The newest version of that table, None where there is none yet.

        Raises:
            TableError: it can't be reached.
        """
        try:
            return open_snapshot(self._settings).version
        except TableNotFoundError:
            return None

    def append(self, rows: Sequence[Annotation]) -> None:
        """Return once the annotations are committed and durable. Calls at the same time share a commit.

        Raises:
            TableSchemaError: the table is none of ours.
            TableError: they could not be committed, after many attempts. Where the connection to an object
                store broke they may be all the same; to say the same again, with the same keys, is no harm.
        """
        if not rows:
            return
        at = self._clock.tick()
        found = [{"annotation_id": uuid7(), "annotation_time": at, **asdict(row)} for row in rows]
        self._group.submit([pa.RecordBatch.from_pylist(found, schema=ANNOTATION_SCHEMA)])

    def read(
        self,
        *,
        trace_ids: Iterable[str] | None = None,
        request_ids: Iterable[str] | None = None,
        kind: str | None = None,
    ) -> pa.Table:
        """What is true now, in order of time: the last row of each key, without what was deleted.

        The columns are those of :data:`ANNOTATION_SCHEMA`. An id that a row lacks, and another annotation of
        the same request tells, is filled in.

        Args:
            trace_ids, request_ids: rows that have one of either are wanted; all, if neither is given.
            kind: only rows of that kind.

        Raises:
            TableSchemaError: the table is none of ours.
            TableError: it can't be read.
        """
        wanted = None
        if trace_ids is not None or request_ids is not None:
            wanted = [pa.array(dict.fromkeys(ids or ()), pa.string()) for ids in (trace_ids, request_ids)]
        try:
            snapshot = open_snapshot(self._settings)
        except TableNotFoundError:
            return ANNOTATION_SCHEMA.empty_table()
        rows = self._known(snapshot, wanted)
        return rows if kind is None else rows.filter(pc.equal(rows["kind"], kind))

    def _known(self, snapshot: Snapshot, wanted: list[pa.Array] | None) -> pa.Table:
        version = (str(snapshot.table.metadata().id), snapshot.version)
        state = self._state
        if state is None or state[0] != version:
            check_annotations(self._settings, snapshot.table)
            sizes = pa.table(snapshot.table.get_add_actions())["size_bytes"]
            if wanted is not None and (pc.sum(sizes).as_py() or 0) > CACHED_BYTES:
                return read_state(snapshot, wanted)
            state = self._state = version, read_state(snapshot, None)
        if wanted is None:
            return state[1]
        traces, requests = wanted
        of_trace = pc.is_in(state[1]["trace_id"], value_set=traces)
        return state[1].filter(
            pc.or_(of_trace, pc.is_in(state[1]["databricks_request_id"], value_set=requests))
        )


class Clock:
    """Times that grow with each call: of what one process says in turn, the last counts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def tick(self) -> datetime:
        with self._lock:
            self._last = max(time.time_ns() // 1000, self._last + 1)
            return EPOCH + timedelta(microseconds=self._last)


def read_state(snapshot: Snapshot, wanted: list[pa.Array] | None) -> pa.Table:
    """All that is true in a version of the table, or what has one of the ``wanted`` ids."""
    try:
        with duckdb.connect(config={"python_enable_replacements": False}) as connection:
            connection.execute("set global TimeZone = 'UTC'")
            with snapshot.source(connection) as everything:
                if wanted is None:
                    source = everything
                else:
                    for name, ids in zip(("wanted_traces", "wanted_requests"), wanted, strict=True):
                        connection.register(name, pa.table({"id": ids}))
                    connection.execute(f"create temp view everything as {everything}")
                    source = SOME_SQL
                connection.execute(f"create temp table source as {source}")
                found = connection.sql(STATE_SQL).to_arrow_table()
        return found.select(ANNOTATION_SCHEMA.names).cast(ANNOTATION_SCHEMA)
    except (duckdb.Error, DeltaError, pa.ArrowException, OSError) as error:
        raise TableError(
            f"cannot read the annotations '{snapshot.settings.uri}': {one_line(error)}; try again"
        ) from error
