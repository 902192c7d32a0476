"""Annotations as MLflow knows them: what was added to a trace after it was recorded, or changed of it.

An assessment is kept as MLflow's own document. One that came without it is put together from its columns. An
empty value stands for what was recorded with the trace and deleted later: a tag without value, an assessment
without type.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import pyarrow as pa
from mlflow.entities import Assessment

from inference_table.annotations import Annotation

__all__ = ["Notes", "as_assessment", "assessment_note", "document_of", "gather", "merged", "notes_table"]

Document = dict[str, Any]

NOTES_SCHEMA: Final = pa.schema(
    [
        pa.field("subject", pa.string()),
        pa.field("tags", pa.map_(pa.string(), pa.string())),
        pa.field("runs", pa.list_(pa.string())),
        pa.field("replaced", pa.list_(pa.string())),
        pa.field("added", pa.list_(pa.string())),
    ]
)
"""``replaced``: ids of assessments that don't count as they were recorded; ``added``: documents that do."""


@dataclass
class Notes:
    """What was said of one request."""

    tags: dict[str, str | None] = field(default_factory=dict)
    run_ids: list[str] = field(default_factory=list)
    assessments: dict[str, Document | None] = field(default_factory=dict)

    def update(self, other: "Notes") -> None:
        self.tags |= other.tags
        self.run_ids += other.run_ids
        self.assessments |= other.assessments


def gather(rows: pa.Table) -> dict[str, Notes]:
    """Notes by subject: the request's id, or the trace's where that alone is known."""
    found: dict[str, Notes] = {}
    for row in rows.to_pylist():
        subject = row["databricks_request_id"] or row["trace_id"]
        notes = found.setdefault(subject, Notes())
        if row["kind"] == "tag":
            value = row["value"]
            notes.tags[row["key"]] = None if value is None else text_of(value)
        elif row["kind"] == "run":
            notes.run_ids.append(row["key"])
        else:
            notes.assessments[row["key"]] = document_of(row)
    return found


def text_of(value: str) -> str:
    try:
        found = json.loads(value)
    except ValueError:
        return value
    return found if isinstance(found, str) else value


def document_of(row: Mapping[str, Any]) -> Document | None:
    if row["type"] is None and row["document"] is None:
        return None
    document = json.loads(row["document"] or "{}")
    if not isinstance(document, dict) or not {"feedback", "expectation", "issue"} & document.keys():
        document = from_columns(row)
    return {**document, "assessment_id": row["key"]}


def from_columns(row: Mapping[str, Any]) -> Document:
    at: datetime = row["annotation_time"]
    value = json.loads(row["value"]) if row["value"] else None
    if row["type"] == "expectation" and isinstance(value, dict | list):
        content: Document = {
            "serialized_value": {"serialization_format": "JSON_FORMAT", "value": json.dumps(value)}
        }
    else:
        content = {"value": value}
    document: Document = {
        "assessment_name": row["name"] or row["type"],
        "source": {"source_type": row["source_type"] or "HUMAN", "source_id": row["source_id"] or "default"},
        "create_time": at.isoformat(),
        "last_update_time": at.isoformat(),
        row["type"]: content,
    }
    return document | ({"rationale": row["rationale"]} if row["rationale"] else {})


def merged(recorded: Iterable[Document], notes: Notes, trace_id: str) -> list[Document]:
    """All assessments of a trace; those that others override are not valid."""
    documents = {one.get("assessment_id"): one for one in recorded} | notes.assessments
    overridden = {one.get("overrides") for one in documents.values() if one}
    return [
        {
            **one,
            "trace_id": trace_id,
            "valid": bool(one.get("valid", True)) and one.get("assessment_id") not in overridden,
        }
        for one in documents.values()
        if one
    ]


def as_assessment(document: Document) -> Assessment:
    """MLflow's object of one of :func:`merged`."""
    found: Assessment = Assessment.from_dictionary(document)
    found.valid, found.overrides = document["valid"], document.get("overrides")
    # Which that of an expectation forgets.
    found.rationale = document.get("rationale")
    return found


def notes_table(found: Mapping[str, Notes]) -> pa.Table:
    """The same for SQL, one row for each subject."""
    rows = []
    for subject, notes in found.items():
        documents = merged([], notes, subject)
        overridden = {one["overrides"] for one in documents if one.get("overrides")}
        rows.append(
            {
                "subject": subject,
                "tags": list(notes.tags.items()),
                "runs": notes.run_ids,
                "replaced": [*notes.assessments, *overridden],
                "added": [json.dumps(one) for one in documents],
            }
        )
    return pa.Table.from_pylist(rows, schema=NOTES_SCHEMA)


def assessment_note(request_id: str | None, assessment: Any) -> Annotation:
    """An assessment of MLflow's as it is kept."""
    document = assessment.to_dictionary()
    kind = next(kind for kind in ("feedback", "expectation", "issue") if kind in document)
    if "value" in document[kind]:
        # Protocol buffers make a double of every number.
        document[kind]["value"] = assessment.value
    return Annotation(
        kind="assessment",
        key=str(assessment.assessment_id),
        databricks_request_id=request_id,
        trace_id=assessment.trace_id,
        name=assessment.name,
        value=json.dumps(getattr(assessment, "value", None), ensure_ascii=False),
        type=kind,
        source_type=assessment.source.source_type if assessment.source else None,
        source_id=assessment.source.source_id if assessment.source else None,
        rationale=assessment.rationale,
        document=json.dumps(document, ensure_ascii=False),
    )
