"""Prometheus metrics of tracelake, on the default registry.

Counters and histograms count this process, and all workers together where ``PROMETHEUS_MULTIPROC_DIR`` is
set before start-up (`prometheus_client's multiprocess mode
<https://prometheus.github.io/client_python/multiprocess/>`_; ``tracelake serve`` sets it). What the spool
holds is a fact about the machine, not about a process, and is read from disk when scraped.
"""

from typing import Final

from prometheus_client import Counter, Gauge, Histogram

CAPTURED: Final = Counter("tracelake_captured_total", "Requests captured and handed to the writer.")
SAMPLED_OUT: Final = Counter("tracelake_sampled_out_total", "Requests not recorded by the sampling fraction.")
DROPPED: Final = Counter(
    "tracelake_dropped_total",
    "Records lost before they reached the spool or the table, by reason.",
    ["reason"],
)
TRUNCATED: Final = Counter(
    "tracelake_truncated_total", "Payloads cut because of a limit, by part and reason.", ["part", "reason"]
)
CAPTURE_ERRORS: Final = Counter(
    "tracelake_capture_errors_total", "Failures of tracelake on the request path, by stage.", ["stage"]
)
SPOOLED: Final = Counter("tracelake_spooled_total", "Records written to the spool.")
SPOOLED_BYTES: Final = Counter("tracelake_spooled_bytes_total", "Bytes written to the spool.")
COMMITTED: Final = Counter("tracelake_committed_total", "Records committed to the Delta table.")
COMMITTED_BYTES: Final = Counter(
    "tracelake_committed_bytes_total", "Bytes of the records committed, in memory and uncompressed."
)
COMMIT_ERRORS: Final = Counter(
    "tracelake_commit_errors_total", "Commit attempts that failed, by kind.", ["kind"]
)
COMMIT_SECONDS: Final = Histogram(
    "tracelake_commit_seconds",
    "Seconds one commit took, from reading segments to their deletion.",
    buckets=(0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
QUARANTINED: Final = Counter(
    "tracelake_quarantined_segments_total", "Segments set aside because they can't be read."
)
SPOOL_GAPS: Final = Counter(
    "tracelake_spool_lost_segments_total", "Segment numbers missing in a folder whose owner is dead."
)
ENCODE_SECONDS: Final = Histogram(
    "tracelake_encode_seconds",
    "Seconds one record took to encode in the background, with the pauses in which it lets requests run.",
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1),
)
QUEUE_BYTES: Final = Gauge(
    "tracelake_queue_bytes",
    "Bytes held in memory: in flight, queued and being encoded.",
    multiprocess_mode="livesum",
)
QUEUE_RECORDS: Final = Gauge(
    "tracelake_queue_records", "Records queued in memory, not yet spooled.", multiprocess_mode="livesum"
)
CAN_COMMIT: Final = Gauge(
    "tracelake_writer_up",
    "1 while the writer's threads run, 0 once one has ended unexpectedly.",
    multiprocess_mode="livemin",
)
CAPTURE_OVERHEAD: Final = Histogram(
    "tracelake_capture_overhead_seconds",
    "Seconds of tracelake's own code on the request path, per request.",
    buckets=(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05),
)
DURABILITY_FAILURES: Final = Counter(
    "tracelake_durability_failures_total",
    "Replies of strict or committed requests that could not be confirmed, by reason.",
    ["reason"],
)
ORPHAN_TRACES: Final = Counter(
    "tracelake_traces_without_request_total", "Traces started outside any captured request."
)
LATE_SPANS: Final = Counter("tracelake_late_spans_total", "Spans that came after their row was sealed.")
COMPACTIONS: Final = Counter("tracelake_compactions_total", "Closed partitions compacted.")
UNAUTHENTICATED: Final = Counter(
    "tracelake_unauthenticated_total", "Requests without an API key that is accepted, by reason.", ["reason"]
)
API_KEY_FILE_ERRORS: Final = Counter(
    "tracelake_api_key_file_errors_total",
    "Times that the API key file had changed and could not be used; the keys of before were.",
)
REFUSED: Final = Counter("tracelake_refused_total", "Requests refused by a limit, by reason.", ["reason"])
