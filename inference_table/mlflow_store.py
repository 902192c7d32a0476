"""MLflow's tracking store on an inference table: its UI, search, feedback and evaluation on the rows.

The table is one MLflow experiment, named after it. Its traces are read from the Delta table; what is said of
them goes to the table's annotations, where SQL and other readers find it. Everything else (runs, datasets,
prompts, other experiments and their traces) is in an SQLite file: :mod:`inference_table.mlflow_location`.

The table's traces are recorded by the endpoint and by nobody else: writing or deleting one here is refused.
Traces that an evaluation makes go to another experiment.

Names of MLflow that are not for users: ``SqlAlchemyStore`` and its trace methods, ``ManagedSessionMaker``,
``_get_artifact_location``, ``_delete_traces``, ``_validate_max_results_param``, ``_validate_trace_tag``,
``SqlExperiment``, ``SqlTraceInfo``, ``trace_correlation.calculate_npmi_from_counts``,
``_artifact_repository_registry``, ``LocalArtifactRepository`` and ``MlflowArtifactsRepository``. Tested with
3.17.2.
"""

# mypy: disable-error-code="no-untyped-call,no-any-unimported"
# MLflow is typed in part only.

import json
import sqlite3
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import fields, replace
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from mlflow import get_tracking_uri
from mlflow.entities import (
    Assessment,
    Expectation,
    ExperimentTag,
    Feedback,
    LifecycleStage,
    Trace,
    TraceInfo,
)
from mlflow.entities.assessment import ExpectationValue, FeedbackValue
from mlflow.entities.trace_metrics import MetricDataPoint
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST
from mlflow.store.analytics.trace_correlation import calculate_npmi_from_counts
from mlflow.store.artifact.artifact_repository_registry import _artifact_repository_registry
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository
from mlflow.store.entities.paged_list import PagedList
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as SqlRegistryStore
from mlflow.store.tracking.dbmodels.models import SqlExperiment, SqlExperimentTag, SqlTraceInfo
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.tracing.analysis import TraceFilterCorrelationResult
from mlflow.tracing.constant import TraceMetadataKey, TraceTagKey
from mlflow.utils.validation import _validate_trace_tag
from sqlalchemy.exc import DatabaseError  # type: ignore[import-not-found,unused-ignore]  # of full MLflow

from inference_table.annotations import Annotation
from inference_table.errors import SettingsError
from inference_table.mlflow_location import SCHEME, StoreLocation, store_location
from inference_table.mlflow_metrics import MetricQuery, TraceMetrics
from inference_table.mlflow_notes import assessment_note
from inference_table.mlflow_rows import TraceRows, internal_errors
from inference_table.mlflow_search import metadata_sql, trace_filter, trace_order

__all__ = ["InferenceTableStore", "registry_store", "tracking_store"]

MAX_LINKS: Final = 100
"""Traces that a call may link to a run, as MLflow limits it."""
SERVER_ARTIFACTS: Final = "mlflow-artifacts"
"""Scheme of the artifacts of runs that a server made; MLflow's own client asks a server for them."""
METRIC_ARGUMENTS: Final = (*(one.name for one in fields(MetricQuery)), "page_token")
KIND_TAG: Final = "mlflow.experimentKind"
KIND: Final = "genai_development"
"""Makes the UI open the experiment with its traces, not its runs."""


def tracking_store(store_uri: str, artifact_uri: str | None = None) -> "InferenceTableStore":
    """MLflow's tracking store on the table of an ``inference-table:`` URI."""
    return InferenceTableStore(store_uri, artifact_uri)


def registry_store(store_uri: str) -> SqlRegistryStore:
    """MLflow's model registry, which holds prompts too, in the same SQLite file."""
    location = store_location(store_uri)
    _artifact_repository_registry.register(SERVER_ARTIFACTS, server_artifacts)
    with making_state(location):
        return SqlRegistryStore(location.database_uri)


def server_artifacts(uri: str, tracking_uri: str | None = None, registry_uri: str | None = None) -> Any:
    """The folder of artifacts that a server calls ``mlflow-artifacts:/...``, for who opens the table itself.

    Raises:
        MlflowException: the URI leads out of it.
    """
    store = tracking_uri or get_tracking_uri()
    if not store.startswith(f"{SCHEME}:"):
        return MlflowArtifactsRepository(uri, tracking_uri, registry_uri)
    root = store_location(store).artifacts
    folder = root / unquote(urlsplit(uri).path).lstrip("/")
    if not folder.resolve().is_relative_to(root.resolve()):
        raise MlflowException.invalid_parameter_value(f"Cannot use the artifacts {uri!r}: not in '{root}'")
    return LocalArtifactRepository(str(folder))


@contextmanager
def making_state(location: StoreLocation) -> Iterator[None]:
    """Within it the SQLite file is made or opened.

    Raises:
        SettingsError: it can't be made, or is none.
    """
    with location.making():
        try:
            yield
        except DatabaseError as error:
            # Those below it, such as that it is locked, are another matter.
            if type(error.orig) is not sqlite3.DatabaseError:
                raise
            raise SettingsError(
                f"cannot read MLflow's experiments and runs in '{location.state}': {error.orig}; put a copy "
                "in its place, or move it away to begin with none (traces and feedback are elsewhere)"
            ) from error


class InferenceTableStore(SqlAlchemyStore):  # type: ignore[misc,unused-ignore]  # untyped, where it is
    """MLflow's tracking store on an inference table. Calls may come from many threads and processes.

    Args:
        store_uri: ``inference-table:///path`` or ``inference-table:s3://...``.
        artifact_uri: where artifacts of runs go; by default a folder beside the SQLite file.

    Raises:
        SettingsError: the URI names no table, or the SQLite file can't be made, or is none.
    """

    def __init__(self, store_uri: str, artifact_uri: str | None = None) -> None:
        location = store_location(store_uri)
        _artifact_repository_registry.register(SERVER_ARTIFACTS, server_artifacts)
        with making_state(location):
            super().__init__(location.database_uri, artifact_uri or str(location.artifacts))
            self.experiment_id = self._own_experiment(location)
        self.rows = TraceRows(location.settings, self.experiment_id)
        self.metrics = TraceMetrics(self.rows)

    @property
    def supports_trace_archival(self) -> bool:
        """The table is the archive."""
        return False

    def _own_experiment(self, location: StoreLocation) -> str:
        number = location.experiment_id
        with self.ManagedSessionMaker(read_only=False) as session:
            if session.get(SqlExperiment, number) is None:
                now = int(time.time() * 1000)
                experiment = SqlExperiment(
                    experiment_id=number,
                    name=location.experiment_name,
                    artifact_location=self._get_artifact_location(number),
                    lifecycle_stage=LifecycleStage.ACTIVE,
                    creation_time=now,
                    last_update_time=now,
                )
                tags = [
                    ExperimentTag(KIND_TAG, KIND),
                    ExperimentTag("tracelake.table", location.settings.uri),
                ]
                experiment.tags = [SqlExperimentTag(key=one.key, value=one.value) for one in tags]
                session.add(self._with_workspace_field(experiment))
        return str(number)

    # What is read of traces.

    def search_traces(
        self,
        experiment_ids: list[str] | None = None,
        filter_string: str | None = None,
        max_results: int = 100,
        order_by: list[str] | None = None,
        page_token: str | None = None,
        model_id: str | None = None,
        locations: list[str] | None = None,
    ) -> tuple[list[TraceInfo], str | None]:
        """A page of traces, and the token of the next. Without a location those of the table.

        Raises:
            MlflowException: the filter, order or token is not valid.
        """
        places = list(locations or experiment_ids or [self.experiment_id])
        if not self._is_own(places):
            found: tuple[list[TraceInfo], str | None] = super().search_traces(
                filter_string=filter_string,
                max_results=max_results,
                order_by=order_by,
                page_token=page_token,
                model_id=model_id,
                locations=places,
            )
            return found
        self._validate_max_results_param(max_results)
        wanted = trace_filter(filter_string)
        if model_id is not None:
            wanted.conditions.append(metadata_sql(TraceMetadataKey.MODEL_ID, "=", model_id))
        return self.rows.search(wanted, trace_order(order_by), max_results, page_token)

    def _is_own(self, experiment_ids: Sequence[str]) -> bool:
        """Whether these are the table's experiment; False where they are others.

        Raises:
            MlflowException: they are both.
        """
        places = {str(one) for one in experiment_ids}
        if self.experiment_id not in places:
            return False
        if len(places) > 1 and self._have_traces(places - {self.experiment_id}):
            raise MlflowException.invalid_parameter_value(
                f"Cannot search the inference table's experiment {self.experiment_id} together with others: "
                "search it alone"
            )
        return True

    def _have_traces(self, experiment_ids: set[str]) -> bool:
        with self.ManagedSessionMaker() as session:
            numbers = [int(one) for one in experiment_ids if one.isdecimal()]
            query = session.query(SqlTraceInfo.request_id).filter(SqlTraceInfo.experiment_id.in_(numbers))
            return query.first() is not None

    def _other_ids(self, trace_ids: Sequence[str]) -> set[str]:
        """Those of the traces that are in the SQLite file."""
        with self.ManagedSessionMaker() as session:
            return set(self._get_existing_trace_ids(session, trace_ids))

    def get_trace_info(self, trace_id: str) -> TraceInfo:
        """
        Raises:
            MlflowException: there is no such trace.
        """
        if self._other_ids([trace_id]) or (info := self.rows.info(trace_id)) is None:
            return super().get_trace_info(trace_id)
        return info

    def get_trace(self, trace_id: str, *, allow_partial: bool = False) -> Trace:
        """
        Raises:
            MlflowException: there is no such trace.
        """
        if self._other_ids([trace_id]) or not (found := self.rows.traces([trace_id])):
            return super().get_trace(trace_id, allow_partial=allow_partial)
        return found[0]

    def batch_get_traces(
        self, trace_ids: list[str], location: str | None = None, experiment_ids: list[str] | None = None
    ) -> list[Trace]:
        """Those of the traces that there are, in the order asked for."""
        others = self._other_ids(trace_ids)
        found = super().batch_get_traces([*others], location, experiment_ids) if others else []
        if experiment_ids is None or self.experiment_id in experiment_ids:
            found += self.rows.traces([one for one in trace_ids if one not in others])
        places = {one: place for place, one in enumerate(trace_ids)}
        return sorted(found, key=lambda trace: places[trace.info.trace_id])

    def batch_get_trace_infos(
        self, trace_ids: list[str], location: str | None = None, experiment_ids: list[str] | None = None
    ) -> list[TraceInfo]:
        """The same without their spans."""
        others = self._other_ids(trace_ids)
        found = super().batch_get_trace_infos([*others], location, experiment_ids) if others else []
        if experiment_ids is None or self.experiment_id in experiment_ids:
            found += self.rows.infos([one for one in trace_ids if one not in others])
        places = {one: place for place, one in enumerate(trace_ids)}
        return sorted(found, key=lambda info: places[info.trace_id])

    def query_trace_metrics(self, experiment_ids: list[str], *args: Any, **kwargs: Any) -> Any:
        """The points of a chart, as MLflow's abstract store describes them."""
        if not self._is_own(experiment_ids):
            return super().query_trace_metrics(experiment_ids, *args, **kwargs)
        given = dict(zip(METRIC_ARGUMENTS, args, strict=False)) | kwargs
        given.pop("page_token", None)
        points: list[MetricDataPoint] = self.metrics.query(MetricQuery(**given))
        return PagedList(points, None)

    def find_completed_sessions(
        self,
        experiment_id: str,
        min_last_trace_timestamp_ms: int,
        max_last_trace_timestamp_ms: int,
        max_results: int | None = None,
        filter_string: str | None = None,
    ) -> Any:
        """Sessions whose last trace came between these times."""
        if not self._is_own([experiment_id]):
            return super().find_completed_sessions(
                experiment_id,
                min_last_trace_timestamp_ms,
                max_last_trace_timestamp_ms,
                max_results,
                filter_string,
            )
        return self.metrics.completed_sessions(
            min_last_trace_timestamp_ms, max_last_trace_timestamp_ms, max_results, filter_string
        )

    def calculate_trace_filter_correlation(
        self,
        experiment_ids: list[str],
        filter_string1: str,
        filter_string2: str,
        base_filter: str | None = None,
    ) -> TraceFilterCorrelationResult:
        """How far meeting one filter goes with meeting another."""
        if not self._is_own(experiment_ids):
            return super().calculate_trace_filter_correlation(
                experiment_ids, filter_string1, filter_string2, base_filter
            )
        counts = self.metrics.counts((filter_string1, filter_string2), base_filter)
        found = calculate_npmi_from_counts(counts["both"], counts["first"], counts["second"], counts["total"])
        return TraceFilterCorrelationResult(
            npmi=found.npmi,
            npmi_smoothed=found.npmi_smoothed,
            filter1_count=counts["first"],
            filter2_count=counts["second"],
            joint_count=counts["both"],
            total_count=counts["total"],
        )

    # What is said of traces.

    def _request_id(self, trace_id: str) -> str | None:
        """The table's request whose trace this is; None where the trace is in the SQLite file, or nowhere."""
        return None if self._other_ids([trace_id]) else self.rows.request_id(trace_id)

    def _note(self, *notes: Annotation) -> None:
        with internal_errors():
            self.rows.annotations.append(notes)

    def set_trace_tag(self, trace_id: str, key: str, value: str) -> None:
        """
        Raises:
            MlflowException: there is no such trace, or the tag is not valid.
        """
        if (request_id := self._request_id(trace_id)) is None:
            super().get_trace_info(trace_id)  # else what SQLite says of a foreign key
            super().set_trace_tag(trace_id, key, value)
            return
        key, value = _validate_trace_tag(key, str(value))
        self._note(tag_note(request_id, trace_id, key, value))

    def delete_trace_tag(self, trace_id: str, key: str) -> None:
        """
        Raises:
            MlflowException: there is no such trace or tag.
        """
        if (request_id := self._request_id(trace_id)) is None:
            super().delete_trace_tag(trace_id, key)
            return
        if key not in self.get_trace_info(trace_id).tags:
            raise MlflowException(
                f"No trace tag with key '{key}' for trace with ID '{trace_id}'", RESOURCE_DOES_NOT_EXIST
            )
        is_recorded = key in self.rows.recorded(trace_id).get("tags", {})
        self._note(replace(tag_note(request_id, trace_id, key, None), is_deleted=not is_recorded))

    def create_assessment(self, assessment: Assessment) -> Assessment:
        """
        Raises:
            MlflowException: there is no such trace, or no assessment that this one overrides.
        """
        trace_id = str(assessment.trace_id)
        if (request_id := self._request_id(trace_id)) is None:
            created: Assessment = super().create_assessment(assessment)
            return created
        if assessment.overrides:
            self.get_assessment(trace_id, assessment.overrides)
        created = copy(assessment)
        created.assessment_id = assessment.assessment_id or f"a-{uuid.uuid4().hex}"
        created.valid = True
        # The UI leaves the times to the server.
        now = int(time.time() * 1000)
        created.create_time_ms = assessment.create_time_ms or now
        created.last_update_time_ms = assessment.last_update_time_ms or now
        self._note(assessment_note(request_id, created))
        return created

    def get_assessment(self, trace_id: str, assessment_id: str) -> Assessment:
        """
        Raises:
            MlflowException: there is no such trace or assessment.
        """
        if self._request_id(trace_id) is None:
            return super().get_assessment(trace_id, assessment_id)
        for one in self.get_trace_info(trace_id).assessments:
            if one.assessment_id == assessment_id:
                return one
        raise MlflowException(
            f"Assessment with ID '{assessment_id}' not found for trace '{trace_id}'", RESOURCE_DOES_NOT_EXIST
        )

    def update_assessment(
        self,
        trace_id: str,
        assessment_id: str,
        name: str | None = None,
        expectation: Any = None,
        feedback: Any = None,
        rationale: str | None = None,
        metadata: dict[str, str] | None = None,
    ) -> Assessment:
        """The assessment with what is given changed; its source and span stay.

        Raises:
            MlflowException: there is no such trace or assessment, or it is of the other kind.
        """
        if (request_id := self._request_id(trace_id)) is None:
            updated: Assessment = super().update_assessment(
                trace_id, assessment_id, name, expectation, feedback, rationale, metadata
            )
            return updated
        found = self.get_assessment(trace_id, assessment_id)
        check_kind(found, expectation, feedback)
        found.name = found.name if name is None else name
        found.rationale = found.rationale if rationale is None else rationale
        # The server gives whole assessments, the client their values; both have these.
        if expectation is not None:
            found.expectation = ExpectationValue(expectation.value)
        if feedback is not None:
            found.feedback = FeedbackValue(feedback.value, feedback.error)
        found.metadata = {**(found.metadata or {}), **(metadata or {})} or None
        found.last_update_time_ms = int(time.time() * 1000)
        self._note(assessment_note(request_id, found))
        return found

    def delete_assessment(self, trace_id: str, assessment_id: str) -> None:
        """Delete an assessment; one that it overrides is valid again. Nothing happens if there is none."""
        if (request_id := self._request_id(trace_id)) is None:
            super().delete_assessment(trace_id, assessment_id)
            return
        recorded = self.rows.recorded(trace_id).get("assessments") or []
        self._note(
            Annotation(
                kind="assessment",
                key=assessment_id,
                databricks_request_id=request_id,
                trace_id=trace_id,
                # What was recorded with the trace would be there again.
                is_deleted=all(one.get("assessment_id") != assessment_id for one in recorded),
            )
        )

    def link_traces_to_run(self, trace_ids: list[str], run_id: str) -> None:
        """
        Raises:
            MlflowException: they are more than 100.
        """
        if len(trace_ids) > MAX_LINKS:
            raise MlflowException.invalid_parameter_value(
                f"Cannot link more than {MAX_LINKS} traces to a run in a single request, not {len(trace_ids)}"
            )
        if others := self._note_run(trace_ids, run_id, is_deleted=False):
            super().link_traces_to_run(others, run_id)

    def unlink_traces_from_run(self, trace_ids: list[str], run_id: str) -> None:
        """Undo :meth:`link_traces_to_run`."""
        if others := self._note_run(trace_ids, run_id, is_deleted=True):
            super().unlink_traces_from_run(others, run_id)

    def _note_run(self, trace_ids: Sequence[str], run_id: str, *, is_deleted: bool) -> list[str]:
        """Note it of the table's traces; returns the others."""
        found = {one: self._request_id(one) for one in trace_ids}
        self._note(
            *(
                Annotation(
                    kind="run",
                    key=run_id,
                    databricks_request_id=request_id,
                    trace_id=one,
                    is_deleted=is_deleted,
                )
                for one, request_id in found.items()
                if request_id is not None
            )
        )
        return [one for one, request_id in found.items() if request_id is None]

    def link_prompts_to_trace(self, trace_id: str, prompt_versions: list[Any]) -> None:
        """
        Raises:
            MlflowException: there is no such trace.
        """
        if (request_id := self._request_id(trace_id)) is None:
            super().link_prompts_to_trace(trace_id, prompt_versions)
            return
        linked = json.loads(self.get_trace_info(trace_id).tags.get(TraceTagKey.LINKED_PROMPTS) or "[]")
        new = [{"name": one.name, "version": str(one.version)} for one in prompt_versions]
        value = json.dumps([*linked, *(one for one in new if one not in linked)])
        self._note(tag_note(request_id, trace_id, TraceTagKey.LINKED_PROMPTS, value))

    # What the endpoint alone does.

    def start_trace(self, trace_info: TraceInfo) -> TraceInfo:
        """
        Raises:
            MlflowException: the trace is meant for the table.
        """
        self._refuse(trace_info.experiment_id, "log a trace to")
        return super().start_trace(trace_info)

    def log_spans(self, location: str, spans: list[Any], tracking_uri: str | None = None) -> Any:
        """
        Raises:
            MlflowException: they are meant for the table.
        """
        self._refuse(location, "log spans to")
        return super().log_spans(location, spans, tracking_uri)

    def _delete_traces(self, experiment_id: str, *args: Any, **kwargs: Any) -> int:
        self._refuse(experiment_id, "delete traces of")
        deleted: int = super()._delete_traces(experiment_id, *args, **kwargs)
        return deleted

    def delete_experiment(self, experiment_id: str) -> None:
        """
        Raises:
            MlflowException: it is the table's.
        """
        self._refuse(experiment_id, "delete")
        super().delete_experiment(experiment_id)

    def _refuse(self, experiment_id: Any, action: str) -> None:
        if str(experiment_id) != self.experiment_id:
            return
        raise MlflowException.invalid_parameter_value(
            f"Cannot {action} the experiment {experiment_id}: it is the inference table "
            f"'{self.rows.settings.uri}', whose rows are recorded by the endpoint alone; "
            "choose another experiment with mlflow.set_experiment()"
        )


def tag_note(request_id: str, trace_id: str, key: str, value: str | None) -> Annotation:
    """A tag as it is kept; one without value is deleted, also where it was recorded with the trace."""
    text = None if value is None else json.dumps(value)
    return Annotation(kind="tag", key=key, databricks_request_id=request_id, trace_id=trace_id, value=text)


def check_kind(found: Assessment, expectation: Any, feedback: Any) -> None:
    if expectation is not None and feedback is not None:
        raise MlflowException.invalid_parameter_value(
            "Cannot specify both `expectation` and `feedback` parameters."
        )
    if expectation is not None and not isinstance(found, Expectation):
        raise MlflowException.invalid_parameter_value(
            "Cannot update expectation value on a Feedback assessment."
        )
    if feedback is not None and not isinstance(found, Feedback):
        raise MlflowException.invalid_parameter_value(
            "Cannot update feedback value on an Expectation assessment."
        )
