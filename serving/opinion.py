"""What a request to the feedback route says, and whether it is valid."""

import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from mlflow.entities import AssessmentSource, Expectation, Feedback
from mlflow.exceptions import MlflowException

from inference_table.annotations import Annotation
from serving.endpoint import json_object
from serving.function import RequestError

__all__ = ["Opinion", "read_opinion"]

KIND: Final = "assessment"
HUMAN: Final = "HUMAN"
DEFAULT_NAME: Final = "user_feedback"
DEFAULT_SOURCE: Final = "default"
FEEDBACK, EXPECTATION = "feedback", "expectation"

MAX_VALUE_BYTES: Final = 64 * 1024
"""A page or two of text, and room; a list of feedback reads all of it."""
MAX_RATIONALE_BYTES: Final = 64 * 1024
MAX_NAME_CHARS: Final = 250
"""MLflow's limit too."""
MAX_DEPTH: Final = 20
"""Levels of a value. MLflow keeps it as a protobuf message, which ends at some hundred."""
TRACE_ID: Final = re.compile(r"tr-[A-Za-z0-9_-]{1,100}")
FEEDBACK_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
TEXTS: Final[Mapping[str, int]] = {
    "name": MAX_NAME_CHARS,
    "rationale": MAX_RATIONALE_BYTES,
    "source_id": MAX_NAME_CHARS,
    "type": MAX_NAME_CHARS,
    "feedback_id": MAX_NAME_CHARS,
    "databricks_request_id": MAX_NAME_CHARS,
    "trace_id": MAX_NAME_CHARS,
}
"""Fields that are texts, and the most bytes of each."""


@dataclass(frozen=True, kw_only=True)
class Opinion:
    """A request that is valid."""

    feedback_id: str
    request_id: str | None
    trace_id: str | None
    name: str
    value: Any
    type: str
    rationale: str | None
    source_id: str
    said_by: str | None
    """The request's ``source_id`` where it isn't the source: a key's name wins."""

    def annotation(self) -> Annotation:
        """As the table of annotations takes it, with MLflow's own form of it in ``document``.

        Raises:
            ValueError: a text is not valid Unicode, or MLflow does not take the value.
        """
        return Annotation(
            kind=KIND,
            key=self.feedback_id,
            databricks_request_id=self.request_id,
            trace_id=self.trace_id,
            name=self.name,
            value=json.dumps(self.value, ensure_ascii=False),
            type=self.type,
            source_type=HUMAN,
            source_id=self.source_id,
            rationale=self.rationale,
            document=None if self.value is None else json.dumps(self.document(), ensure_ascii=False),
            is_deleted=self.value is None,
        )

    def document(self) -> dict[str, Any]:
        kind = Feedback if self.type == FEEDBACK else Expectation
        assessment = kind(
            name=self.name,
            value=self.value,
            source=AssessmentSource(source_type=HUMAN, source_id=self.source_id),
            trace_id=self.trace_id,
            metadata=None if self.said_by is None else {"source_id": self.said_by},
        )
        assessment.rationale = self.rationale  # which the constructor of an expectation doesn't take
        assessment.assessment_id = self.feedback_id
        try:
            found: dict[str, Any] = assessment.to_dictionary()  # type: ignore[no-untyped-call]  # MLflow's
        except (MlflowException, OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"MLflow doesn't take the value: {error}") from error
        if "value" in found[self.type]:
            # Protocol buffers make a double of every number.
            found[self.type]["value"] = self.value
        return {name: value for name, value in found.items() if value != ""}


def read_opinion(body: bytes, requester: str | None) -> Opinion:
    """What a request says.

    Args:
        requester: name of the API key that came with it.

    Raises:
        RequestError: it is not valid; says what is.
    """
    fields = json_object(body)
    if unknown := sorted(fields.keys() - {*TEXTS, "value"}):
        raise RequestError(
            f"unknown fields: {', '.join(unknown)[:MAX_NAME_CHARS]}; known are "
            f"{', '.join(sorted([*TEXTS, 'value']))}"
        )
    texts = {name: read_text(fields.get(name), name) for name in TEXTS}
    kind = texts["type"] or FEEDBACK
    if kind not in (FEEDBACK, EXPECTATION):
        raise RequestError(f"'type' is {FEEDBACK!r} or {EXPECTATION!r}")
    value = read_value(fields, texts["feedback_id"])
    given = texts["source_id"]
    return Opinion(
        feedback_id=matching(texts["feedback_id"], FEEDBACK_ID, "feedback_id") or f"a-{uuid.uuid4().hex}",
        **read_subject(texts["databricks_request_id"], texts["trace_id"]),
        name=texts["name"] or DEFAULT_NAME,
        value=value,
        type=kind,
        rationale=texts["rationale"],
        source_id=requester or given or DEFAULT_SOURCE,
        said_by=given if requester and given != requester else None,
    )


def read_text(value: Any, name: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value.strip():
        raise RequestError(f"'{name}' is a text that is not empty")
    if len(value.encode("utf-8", "surrogatepass")) > TEXTS[name]:
        raise RequestError(f"'{name}' has at most {TEXTS[name]:,} bytes")
    return value


def read_subject(request_id: str | None, trace_id: str | None) -> dict[str, str | None]:
    """Which request is meant, as fields of :class:`Opinion`."""
    if request_id is None and trace_id is None:
        raise RequestError(
            "'databricks_request_id', the reply's header x-databricks-request-id, or 'trace_id' is needed"
        )
    try:
        request_id = None if request_id is None else str(uuid.UUID(request_id))
    except ValueError:
        raise RequestError("'databricks_request_id' is a UUID, as the reply's header has it") from None
    return {"request_id": request_id, "trace_id": matching(trace_id, TRACE_ID, "trace_id")}


def matching(text: str | None, pattern: re.Pattern[str], name: str) -> str | None:
    if text is not None and pattern.fullmatch(text) is None:
        raise RequestError(f"'{name}' is not of the form {pattern.pattern}")
    return text


def read_value(fields: Mapping[str, Any], feedback_id: str | None) -> Any:
    value = fields.get("value")
    if value is None and (feedback_id is None or "value" not in fields):
        raise RequestError("'value' is needed; null, with a 'feedback_id', withdraws that one")
    if depth(value) > MAX_DEPTH:
        raise RequestError(f"'value' has at most {MAX_DEPTH} levels")
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise RequestError("'value' is JSON, which has no NaN and no infinity") from error
    if len(text.encode("utf-8", "surrogatepass")) > MAX_VALUE_BYTES:
        raise RequestError(f"'value' has at most {MAX_VALUE_BYTES:,} bytes")
    return value


def depth(value: Any) -> int:
    """Levels of lists and objects; stops where there are too many."""
    level, values = 0, [value]
    while level <= MAX_DEPTH and (values := [one for one in values if isinstance(one, dict | list)]):
        values = [child for one in values for child in (one.values() if isinstance(one, dict) else one)]
        level += 1
    return level
