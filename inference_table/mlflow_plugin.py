"""Entry points by which MLflow finds its store on an inference table (``inference-table:`` URIs).

MLflow loads entry points in the middle of its own import: nothing of it is imported here before it calls.
"""

from typing import Any

__all__ = ["registry_store", "tracking_store"]


def tracking_store(store_uri: str, artifact_uri: str | None = None) -> Any:
    """MLflow's tracking store on the inference table at ``store_uri``."""
    from inference_table.mlflow_store import tracking_store as open_store

    return open_store(store_uri, artifact_uri)


def registry_store(store_uri: str) -> Any:
    """MLflow's model registry beside the inference table at ``store_uri``: for prompts and models."""
    from inference_table.mlflow_store import registry_store as open_store

    return open_store(store_uri)
