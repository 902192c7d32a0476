"""Deploying agents: from an import string or an MLflow model to a traced, scalable endpoint."""

from deploy.deployments import (
    Deployment,
    Status,
    delete_deployment,
    get_deployments,
    list_deployments,
)
from deploy.launch import deploy
from inference_table.errors import DeploymentError

__all__ = [
    "Deployment",
    "DeploymentError",
    "Status",
    "delete_deployment",
    "deploy",
    "get_deployments",
    "list_deployments",
]
