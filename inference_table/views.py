"""Views that a query finds beside ``payload``: ``requests``, ``spans``, ``model_usage`` and ``feedback``.

They are SQL over ``payload``, so a condition on its columns still leaves files and days unread, and a column
that a query doesn't name is neither read nor worked out: ``select duration_ms from requests`` never touches a
payload. Making one costs some milliseconds of binding, so a query gets those it may name, and no other.

Payloads are strangers' text. What is no JSON, or JSON of another form, is null in a view and fails no query.
"""

import re
from typing import Final

from inference_table.request_view import REQUESTS
from inference_table.span_view import MODEL_USAGE, SPANS

__all__ = ["FEEDBACK", "FEEDBACK_SQL", "VIEWS", "named_views"]

VIEWS: Final = {"requests": REQUESTS, "spans": SPANS, "model_usage": MODEL_USAGE}
"""The queries behind the views over ``payload``."""
FEEDBACK: Final = "feedback"
"""The view over the annotations, which are a table of their own and opened for this view alone."""
FEEDBACK_SQL: Final = """
select databricks_request_id, trace_id, name, type, value, rationale, source_type, source_id,
    annotation_time as feedback_time
from {0} as said
where type is not null and not exists (
    from {0} as later
    where try(later.document->>'$.overrides') = said.key
    and coalesce(later.databricks_request_id, later.trace_id)
        = coalesce(said.databricks_request_id, said.trace_id)
)"""
"""The query behind it, over the assessments that hold now: no other overrides them. One without a type says
that the one which was recorded with the trace is deleted."""

LISTINGS: Final = re.compile(
    r"\b(show|information_schema|duckdb_\w+|pg_catalog|sqlite_master)\b|\bquery(_table)?\s*\(", re.IGNORECASE
)
"""What lists views, or names them by an expression."""


def named_views(sql: str) -> list[str]:
    """The views that a query may name. One that it doesn't, after all, is made in vain."""
    names = [*VIEWS, FEEDBACK]
    if LISTINGS.search(sql):
        return names
    return [name for name in names if re.search(rf"(?<!\bas\s)\b{name}\b", sql, re.IGNORECASE)]
