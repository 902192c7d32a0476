"""The rows that a replay reads: of the requests that are to be sent again, and of the new answers.

What is chosen is read without payloads first; payloads follow some at a time, so that memory is bounded.
"""

import time
from base64 import b64decode
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson
import pyarrow as pa

from deploy.replay_compare import Answer, Outcome, Side, recorded_answer
from inference_table.errors import QueryError
from inference_table.pending import View, open_view
from inference_table.schema import ErrorCode
from inference_table.settings import StorageSettings
from inference_table.table import InferenceTable

__all__ = ["REPLAY_OF", "REPLAY_RUN", "Job", "choose", "read_jobs", "read_targets"]

REPLAY_OF: Final = "replay_of"
REPLAY_RUN: Final = "replay_run"
"""Keys of ``request_metadata``; the headers are these with ``x-tracelake-`` before them."""
BATCH_ROWS: Final = 64
BATCH_BYTES: Final = 32 * 1024 * 1024
"""How much is read at a time; rows of one size follow rows of that size."""
ROWS_SECONDS: Final = 10.0
"""How long the target's rows are waited for since the last one came: commits take one."""
FIRST_ROW_SECONDS: Final = 4.0
"""The same before the first, which may never come: the target may record elsewhere."""
CUT: Final = frozenset(
    {
        ErrorCode.MAX_REQUEST_SIZE_EXCEEDED,
        ErrorCode.MEMORY_LIMIT_EXCEEDED,
        ErrorCode.REQUEST_INCOMPLETE,
        ErrorCode.REQUEST_DECODING_FAILED,
    }
)


@dataclass(frozen=True, slots=True)
class Job:
    request_id: str
    offset_seconds: float
    body: bytes
    content_type: str | None
    old: Side
    answer: Answer


def choose(table: InferenceTable, sql: str, limit: int | None, *, pending: bool) -> pa.Table:
    """The rows of the requests that ``sql`` yields the ids of, without payloads, oldest first.

    Args:
        sql: a query with a column ``databricks_request_id``.

    Raises:
        QueryError: it is no such query.
        TableError: the table can't be read.
    """
    query = f"""
        select databricks_request_id, request_time, status_code, execution_duration_ms, input_tokens,
            output_tokens, logging_error_codes, request_metadata['method'] as method,
            request_metadata['request_content_type'] as content_type,
            request_metadata['{REPLAY_OF}'] as {REPLAY_OF}
        from payload
        where request_time is not null and databricks_request_id in (
            select chosen.databricks_request_id from (\n{sql.strip().rstrip(";")}\n) as chosen
        )
        order by request_time, databricks_request_id {"" if limit is None else f"limit {limit}"}"""
    try:
        return table.query(query, pending=pending).to_arrow()
    except QueryError as error:
        raise QueryError(
            f"{error} (what is to be replayed is one query that yields databricks_request_id)"
        ) from error


class Reader:
    """Whole rows by id, as many at a time as the last ones were small."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.size = 8

    def rows(self, ids: list[str]) -> dict[str, dict[str, Any]]:
        rows = {row["databricks_request_id"]: row for row in self.view.rows("databricks_request_id", ids)}
        nbytes = sum(len(row["request"] or "") + len(row["response"] or "") for row in rows.values())
        if rows:
            self.size = max(1, min(BATCH_ROWS, BATCH_BYTES * len(rows) // max(1, nbytes)))
        return rows


def read_jobs(chosen: pa.Table, skipped: Counter[str], view: View) -> Iterator[list[Job]]:
    """What can be sent, some at a time, none of them empty; counts what can't."""
    reader, begin = Reader(view), 0
    while begin < chosen.num_rows:
        batch = chosen.slice(begin, reader.size).to_pylist()
        begin += len(batch)
        wanted = [row for row in batch if is_wanted(row, skipped)]
        rows = reader.rows([row["databricks_request_id"] for row in wanted])
        if jobs := [job for row in wanted if (job := job_of(row, rows, skipped)) is not None]:
            yield jobs


def is_wanted(row: Mapping[str, Any], skipped: Counter[str]) -> bool:
    if row["method"] not in (None, "POST"):
        skipped[f"{row['method']} request"] += 1
    elif row[REPLAY_OF] is not None:
        skipped["is a replay itself"] += 1
    else:
        return True
    return False


def job_of(
    row: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]], skipped: Counter[str]
) -> Job | None:
    full = rows.get(row["databricks_request_id"])
    if full is None:
        skipped["is no longer in the table"] += 1
        return None
    if full["request"] is None:
        withheld = ErrorCode.REDACTION_FAILED in (row["logging_error_codes"] or [])
        skipped["body was withheld" if withheld else "body was not read by the agent"] += 1
        return None
    if (why := unsendable(full["request"], row)) is not None:
        skipped[why] += 1
        return None
    answer = recorded_answer(full["response"])
    tokens = answer.tokens
    old = Side(
        status=row["status_code"],
        ms=row["execution_duration_ms"],
        input_tokens=tokens[0] if row["input_tokens"] is None else row["input_tokens"],
        output_tokens=tokens[1] if row["output_tokens"] is None else row["output_tokens"],
        calls=answer.calls,
        tools=answer.tools,
    )
    return Job(
        request_id=row["databricks_request_id"],
        offset_seconds=row["request_time"].timestamp(),
        body=full["request"].encode(),
        content_type=row["content_type"],
        old=old,
        answer=answer,
    )


def unsendable(request: str, row: Mapping[str, Any]) -> str | None:
    """Why a recorded body is not what was sent; None where it is."""
    if not request.startswith(('{"truncated_bytes":', '{"body":')):
        return None
    try:
        body = orjson.loads(request)
    except ValueError:
        return None
    if "head" in body and CUT & set(row["logging_error_codes"] or []):
        return "body was cut"
    if body.keys() == {"body", "encoding"} and body["encoding"] == "base64":
        is_json = "json" in (row["content_type"] or "")
        return "body is binary" if not is_json or is_binary(body["body"]) else None
    return None


def is_binary(encoded: Any) -> bool:
    """Whether base64 holds what is no UTF-8: what is, was recorded as it came."""
    try:
        b64decode(encoded, validate=True).decode()
    except UnicodeDecodeError:
        return True
    except (TypeError, ValueError):
        return False
    return False


def read_targets(outcomes: Iterable[Outcome], settings: StorageSettings) -> None:
    """Complete the outcomes by the rows that the target recorded: duration, tokens, tools.

    Waits for rows on their way to the table; gives up on those of a table elsewhere. What is not found stays
    as it was seen from here.
    """
    missing = {one.new_id: one for one in outcomes if one.new_id is not None and not one.is_recorded_here}
    patience = time.monotonic() + FIRST_ROW_SECONDS
    while missing and time.monotonic() < patience:
        for row in rows_of(open_view(settings, pending=True), list(missing)):
            complete(missing.pop(row["databricks_request_id"]), row)
            patience = time.monotonic() + ROWS_SECONDS
        if missing:
            time.sleep(0.2)


def rows_of(view: View, ids: list[str]) -> Iterator[dict[str, Any]]:
    reader, begin = Reader(view), 0
    while begin < len(ids):
        batch = ids[begin : begin + reader.size]
        begin += len(batch)
        yield from reader.rows(batch).values()


def complete(outcome: Outcome, row: Mapping[str, Any]) -> None:
    outcome.is_row_read = True
    new = outcome.new
    new.tools = recorded_answer(row["response"]).tools
    new.ms = row["execution_duration_ms"]
    new.input_tokens = new.input_tokens if row["input_tokens"] is None else row["input_tokens"]
    new.output_tokens = new.output_tokens if row["output_tokens"] is None else row["output_tokens"]
