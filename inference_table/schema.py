"""Schema of the inference table: the only home of its column names and error codes.

The first twelve columns are those of Databricks' AI Gateway inference table
(https://docs.databricks.com/aws/en/ai-gateway/inference-tables), so queries written for it run
unchanged; the rest are ours. The table is partitioned by ``request_date``.
"""

from enum import StrEnum
from typing import Final

import pyarrow as pa

__all__ = ["PARTITION_COLUMN", "PAYLOAD_COLUMNS", "SCHEMA", "SKIPPING_COLUMNS", "ErrorCode"]

SCHEMA: Final = pa.schema(
    [
        pa.field("databricks_request_id", pa.string()),
        pa.field("request_date", pa.date32()),
        pa.field("client_request_id", pa.string()),
        pa.field("request_time", pa.timestamp("us", tz="UTC")),
        pa.field("status_code", pa.int32()),
        pa.field("sampling_fraction", pa.float64()),
        pa.field("execution_duration_ms", pa.int64()),
        pa.field("request", pa.string()),
        pa.field("response", pa.string()),
        pa.field("logging_error_codes", pa.list_(pa.string())),
        pa.field("served_entity_id", pa.string()),
        pa.field("requester", pa.string()),
        pa.field("request_metadata", pa.map_(pa.string(), pa.string())),
        pa.field("trace_id", pa.string()),
        pa.field("trace_state", pa.string()),
        pa.field("trace_info", pa.string()),
        pa.field("span_count", pa.int32()),
        pa.field("input_tokens", pa.int64()),
        pa.field("output_tokens", pa.int64()),
        pa.field("total_cost_usd", pa.float64()),
        pa.field("time_to_first_byte_ms", pa.int64()),
        pa.field("capture_overhead_us", pa.int64()),
    ]
)

PARTITION_COLUMN: Final = "request_date"

PAYLOAD_COLUMNS: Final = ("request", "response")
"""Columns that hold megabytes: no dictionary, no statistics, never read by a listing."""

SKIPPING_COLUMNS: Final = (
    "databricks_request_id",
    "request_time",
    "status_code",
    "execution_duration_ms",
    "served_entity_id",
    "trace_id",
    "trace_state",
)
"""Columns with min/max in the Delta log (``delta.dataSkippingStatsColumns``): small, free of user text."""


class ErrorCode(StrEnum):
    """Values of ``logging_error_codes``. The first two are Databricks', the rest ours."""

    MAX_REQUEST_SIZE_EXCEEDED = "MAX_REQUEST_SIZE_EXCEEDED"
    """The request is longer than the payload limit: its head is kept."""
    MAX_RESPONSE_SIZE_EXCEEDED = "MAX_RESPONSE_SIZE_EXCEEDED"
    """The response is longer than the payload limit: its head is kept."""
    MAX_TRACE_SIZE_EXCEEDED = "MAX_TRACE_SIZE_EXCEEDED"
    """The trace is longer than the payload limit: only its ``info`` is kept."""
    MEMORY_LIMIT_EXCEEDED = "MEMORY_LIMIT_EXCEEDED"
    """The process had no memory left for this body under its limit: its head is kept."""
    REQUEST_DECODING_FAILED = "REQUEST_DECODING_FAILED"
    """The request's ``content-encoding`` could not be undone: the bytes are kept as base64."""
    RESPONSE_DECODING_FAILED = "RESPONSE_DECODING_FAILED"
    """The response's ``content-encoding`` could not be undone: the bytes are kept as base64."""
    TRACE_ENCODING_FAILED = "TRACE_ENCODING_FAILED"
    """The trace could not be turned into JSON: the row has none."""
    REQUEST_INCOMPLETE = "REQUEST_INCOMPLETE"
    """The app did not read the request to its end, or the client left while it sent: what passed is kept."""
    RESPONSE_INCOMPLETE = "RESPONSE_INCOMPLETE"
    """The reply ended before its last byte; a stream says so in ``databricks_output.stream`` instead."""
    REDACTION_FAILED = "REDACTION_FAILED"
    """The ``redact`` callable raised: request, response and trace are withheld."""
