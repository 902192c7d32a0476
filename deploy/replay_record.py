"""Rows of answers whose server did not record them: the replay writes what the middleware would have written.

They have no trace. ``served_entity_id`` is ``replay/<run>``, ``request_metadata`` says which request it was.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from datetime import UTC, datetime
from typing import Final

from deploy.replay import Sent
from deploy.replay_compare import sent_answer
from deploy.replay_rows import REPLAY_OF, REPLAY_RUN
from inference_table.ids import uuid7
from inference_table.record import DatabricksOutput, Row, client_request_id, request_column, response_column
from inference_table.settings import Durability, StorageSettings
from inference_table.writer import Writer
from serving.streams import aggregate, is_stream, stream_facts

__all__ = ["TableRecorder"]

ENDPOINT: Final = "replay"


class TableRecorder:
    """Writes rows of answers into a table. To be closed; then all of them are committed, or in the spool.

    Args:
        settings: of the table.

    Raises:
        SpoolError: the spool can't be used.
        TableError: the table can't be written to.
    """

    def __init__(self, settings: StorageSettings) -> None:
        self._writer = Writer(settings)
        self._writer.check()
        self._lock = threading.Lock()
        self.recorded = 0
        self.dropped = 0

    def put(self, sent: Sent) -> str:
        """Take an answer over; returns the id of its row."""
        record = Record(sent)
        size = len(sent.request) + len(sent.response)
        if self._writer.budget.reserve(size):
            record.reserved_bytes = size
        # Strict, so that each says whether it was recorded; those of a moment share one fsync.
        self._writer.put_durable(record, Durability.STRICT).add_done_callback(self._count)
        return record.request_id

    def close(self) -> None:
        """Wait until all is written."""
        self._writer.close()

    def _count(self, future: "Future[None]") -> None:
        with self._lock:
            if future.exception() is None:
                self.recorded += 1
            else:
                self.dropped += 1


class Record:
    """An answer on its way to the table: the writer's ``Recordable``."""

    trace_bytes = 0

    def __init__(self, sent: Sent) -> None:
        self.sent = sent
        self.request_id = uuid7()
        self.reserved_bytes = 0

    def is_ready(self) -> bool:
        return True

    def drop_traces(self) -> None:
        """There are none."""

    def encode(self, give_way: Callable[[], None]) -> Row:
        sent = self.sent
        body, content_type, stream = sent.response, sent.response_type, None
        if is_stream(content_type):
            added_up = aggregate(body, content_type)
            stream = stream_facts(
                added_up,
                time_to_first_event_ms=int(sent.first_byte_ms),
                largest_gap_ms=None,
                clean_end=True,
                cut_off_by_client=False,
            )
            body, content_type = added_up.body, "application/json"
        give_way()
        tokens = sent_answer(body, content_type).tokens
        metadata = {
            "method": "POST",
            "path": sent.path,
            "endpoint_name": ENDPOINT,
            "model_name": ENDPOINT,
            "model_version": sent.run,
            REPLAY_OF: sent.original_id,
            REPLAY_RUN: sent.run,
        }
        types = {"request_content_type": sent.request_type, "response_content_type": sent.response_type}
        return Row(
            databricks_request_id=self.request_id,
            request_time=datetime.fromtimestamp(sent.started_unix_ns / 1e9, UTC),
            status_code=sent.status,
            sampling_fraction=1.0,
            execution_duration_ms=int(sent.ms),
            request=request_column(sent.request),
            response=response_column(
                body, DatabricksOutput(self.request_id, stream=stream), content_type=content_type
            ),
            client_request_id=client_request_id(sent.request),
            served_entity_id=f"{ENDPOINT}/{sent.run}",
            request_metadata=metadata | {name: value for name, value in types.items() if value},
            input_tokens=tokens[0],
            output_tokens=tokens[1],
            time_to_first_byte_ms=int(sent.first_byte_ms),
        )
