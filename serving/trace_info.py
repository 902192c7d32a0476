"""What MLflow records about a trace when it starts: location, environment, tags.

As ``BaseMlflowSpanProcessor`` and ``MlflowV3SpanProcessor`` fill it in, but for what they look up per trace
in tracking stores or by imports that fail.
"""

# mypy: disable-error-code="no-untyped-call"
# MLflow is typed in part only.

import json
import sys
from typing import Any, Final

from mlflow.entities.trace_info import TraceInfo
from mlflow.entities.trace_location import TraceLocation
from mlflow.entities.trace_state import TraceState
from mlflow.environment_variables import MLFLOW_EXPERIMENT_ID
from mlflow.tracing.constant import (
    TRACE_SCHEMA_VERSION,
    TRACE_SCHEMA_VERSION_KEY,
    SpanAttributeKey,
    TraceMetadataKey,
    TraceTagKey,
)
from mlflow.tracing.context import get_configured_trace_metadata, get_configured_trace_tags
from mlflow.tracing.provider import _MLFLOW_TRACE_USER_DESTINATION
from mlflow.tracing.utils import generate_trace_id_v3
from mlflow.tracing.utils.environment import resolve_env_metadata
from mlflow.tracking import fluent
from opentelemetry.sdk.trace import Span as OTelSpan

__all__ = ["new_trace_info"]

DEFAULT_EXPERIMENT_ID: Final = "0"
"""MLflow's default experiment."""


def new_trace_info(root: OTelSpan, request_id: str) -> TraceInfo:
    """The info of a trace that begins with the span ``root``."""
    run = fluent._get_latest_active_run()
    context = prediction_context()
    return TraceInfo(
        trace_id=generate_trace_id_v3(root),
        trace_location=TraceLocation.from_experiment_id(experiment_id(root, run)),
        request_time=(root.start_time or 0) // 1_000_000,
        state=TraceState.IN_PROGRESS,
        client_request_id=request_id,
        trace_metadata=trace_metadata(run, context),
        tags=trace_tags(root, context),
    )


def trace_metadata(run: Any, context: Any) -> dict[str, str]:
    metadata: dict[str, str] = {**resolve_env_metadata(), TRACE_SCHEMA_VERSION_KEY: str(TRACE_SCHEMA_VERSION)}
    if run is not None:
        metadata[TraceMetadataKey.SOURCE_RUN] = run.info.run_id
    if model_id := fluent._get_active_model_id_global() or (context and context.model_id):
        metadata[TraceMetadataKey.MODEL_ID] = model_id
    return {**metadata, **(get_configured_trace_metadata() or {})}


def trace_tags(root: OTelSpan, context: Any) -> dict[str, str]:
    tags: dict[str, str] = {}
    if context is not None:
        if context.is_evaluate and context.request_id:
            tags[TraceTagKey.EVAL_REQUEST_ID] = context.request_id
        tags.update(context.dependencies_schemas or {})
    tags.update(get_configured_trace_tags() or {})
    tags[TraceTagKey.TRACE_NAME] = root.name
    return tags


def prediction_context() -> Any:
    """The context that full MLflow's pyfunc sets around a prediction; can only be set where it is loaded."""
    module = sys.modules.get("mlflow.pyfunc.context")
    return module.get_prediction_context() if module is not None else None


def experiment_id(root: OTelSpan, run: Any) -> str:
    """The experiment that MLflow would record, as far as it is known without asking a tracking server."""
    asked_for = (root.attributes or {}).get(SpanAttributeKey.EXPERIMENT_ID)
    if isinstance(asked_for, str):
        return str(json.loads(asked_for))
    destination = _MLFLOW_TRACE_USER_DESTINATION.get()
    return (
        getattr(destination, "experiment_id", None)
        or (run.info.experiment_id if run is not None else None)
        or fluent._active_experiment_id
        or MLFLOW_EXPERIMENT_ID.get()
        or DEFAULT_EXPERIMENT_ID
    )
