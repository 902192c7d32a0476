"""Deployments: what is deployed, what it does, and how it is deleted."""

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from deploy.endpoints import endpoint_lock, engine_of, is_up, remembered, remove, reverting
from deploy.listening import netloc
from deploy.registry import Endpoint, EndpointFolder, State, Version, endpoint_names
from deploy.versions import discard
from inference_table.errors import DeploymentError

if TYPE_CHECKING:
    from inference_table.result import QueryResult

__all__ = [
    "Deployment",
    "Status",
    "delete_deployment",
    "deployment_of",
    "get_deployments",
    "list_deployments",
]

POLL_SECONDS: Final = 0.05
END_SECONDS: Final = 60.0
"""What workers may take to end beyond the time to drain: as long as they may flush, and more."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """What a deployment does at the moment it was asked."""

    state: str
    """``starting``, ``serving``, ``draining``, ``stopping``; ``stopped`` (kept, and can be deployed again),
    ``failed`` (it gave up, ``error`` says why) or ``dead`` (it was killed)."""
    traffic: int
    """Percent of the endpoint's requests."""
    workers: tuple[int, ...] = ()
    """Process ids."""
    restarts: int = 0
    """How often one of its workers died and was started again."""
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A version of an agent at an endpoint. Equal fields, equal deployment: it holds nothing open.

    The first seven fields are those of Databricks' ``agents.deploy``.
    """

    model_name: str
    """The registered model's name, or the import string."""
    model_version: str
    endpoint_name: str
    served_entity_name: str
    """``<endpoint>/<version>``: the column ``served_entity_id`` of its rows."""
    query_endpoint: str
    """URL to send requests to; that of ``/invocations`` where the agent answers there."""
    endpoint_url: str
    review_app_url: str | None
    """None: there is no review app beside a deployment; MLflow's own UI reads the traces of its table."""
    table: str
    """URI of the Delta table."""
    version: str
    """Number of the version at this endpoint."""
    admin_url: str | None
    """Where ``/metrics`` and ``/health`` are, if they have a port of their own."""

    def status(self) -> Status:
        """What it does now; never raises because it is dead."""
        folder, endpoint = remembered(self.endpoint_name)
        return status_of(engine_of(endpoint).state(folder, endpoint), self.version)

    def logs(self, lines: int = 100) -> str:
        """The last lines that its workers wrote to standard output and error."""
        folder, endpoint = remembered(self.endpoint_name)
        return engine_of(endpoint).logs(folder, endpoint, self.version, lines)

    def query(self, sql: str, *, pending: bool | None = None) -> "QueryResult":
        """Ask the endpoint's table, called ``payload``, in DuckDB's SQL.

        Args:
            sql: what to ask; rows of this version are those of ``served_entity_id``.
            pending: also read what this machine has not committed yet. By default, where the workers are on
                this machine.

        Raises:
            TableError: the table can't be read.
            QueryError: the SQL is not valid, or failed.
        """
        from inference_table.table import InferenceTable

        _, endpoint = remembered(self.endpoint_name)
        is_here = endpoint.engine == "local"
        source = InferenceTable(self.table, spool_dir=endpoint.spool_dir or None)
        return source.query(sql, pending=is_here if pending is None else pending)

    def stop(self) -> None:
        """Stop the endpoint, all versions of it: what it was asked is answered, its rows are in the table.

        It stays remembered: ``deploy(..., version=...)`` starts it again.
        """
        with endpoint_lock(self.endpoint_name):
            folder, endpoint = remembered(self.endpoint_name)
            engine_of(endpoint).stop(folder, endpoint)


def get_deployments(model_name: str, model_version: int | str | None = None) -> list[Deployment]:
    """The deployments of a model or an endpoint, newest version first.

    Args:
        model_name: of a model as in :attr:`Deployment.model_name`, or of an endpoint.
        model_version: only this one, as in :attr:`Deployment.model_version`.
    """
    wanted = None if model_version is None else str(model_version)
    return [
        one
        for one in list_deployments()
        if model_name in (one.model_name, one.endpoint_name) and wanted in (None, one.model_version)
    ]


def list_deployments() -> list[Deployment]:
    """All versions of all endpoints that are remembered, running or not; newest version first."""
    found = []
    for name in endpoint_names():
        folder = EndpointFolder(name)
        endpoint = folder.endpoint()
        if endpoint is None:  # deleted meanwhile
            continue
        state = engine_of(endpoint).state(folder, endpoint)
        versions = [folder.version(number) for number in reversed(folder.version_numbers())]
        found += [deployment_of(endpoint, one, state) for one in versions if one is not None]
    return found


def delete_deployment(model_name: str, model_version: int | str | None = None) -> None:
    """Delete an endpoint, or one version of it, with its frozen copy and its log. The table stays.

    What it was asked is answered and recorded first. Where the version takes traffic, that goes to the other
    one that does, else to the newest before it; the last version to go takes the endpoint with it.

    Args:
        model_name: of a model as in :attr:`Deployment.model_name`, or of an endpoint.
        model_version: only this one, as in :attr:`Deployment.model_version`.

    Raises:
        DeploymentError: there is no such deployment, or more than one endpoint has it.
    """
    found = get_deployments(model_name, model_version)
    names = sorted({one.endpoint_name for one in found})
    what = model_name if model_version is None else f"version {model_version} of {model_name}"
    if not names:
        raise DeploymentError(
            f"cannot delete {what}: it is not deployed; endpoints are {', '.join(endpoint_names()) or 'none'}"
        )
    if len(names) > 1:
        raise DeploymentError(f"cannot delete {what}: give one of its endpoints, {', '.join(names)}")
    with endpoint_lock(names[0]):
        folder, endpoint = remembered(names[0])
        if model_version is None:
            remove(folder, endpoint)
            return
        for one in found:
            delete_version(folder, endpoint, one.version)
            endpoint = folder.endpoint() or endpoint


def delete_version(folder: EndpointFolder, endpoint: Endpoint, number: str) -> None:
    left = [one for one in folder.version_numbers() if one != number]
    if not left:
        remove(folder, endpoint)
        return
    if number in endpoint.traffic:
        others = [one for one in endpoint.traffic if one != number]
        before = [one for one in left if int(one) < int(number)]
        heir = (others or before or left)[-1]
        changed = replace(endpoint, traffic={heir: 100}, generation=endpoint.generation + 1)
        with reverting(folder, endpoint):
            folder.write_endpoint(changed)
            if is_up(folder, endpoint):
                engine_of(changed).apply(folder, changed)
    wait_for_end(folder, endpoint, number)
    discard(folder, number)


def wait_for_end(folder: EndpointFolder, endpoint: Endpoint, number: str) -> None:
    """Wait until no worker of a version is left: what they still answer may read the frozen copy.

    Raises:
        DeploymentError: it takes too long.
    """
    engine = engine_of(endpoint)
    deadline = time.monotonic() + endpoint.drain_seconds + END_SECONDS
    while (one := engine.state(folder, endpoint).versions.get(number)) is not None and one.state != "failed":
        if time.monotonic() > deadline:
            raise DeploymentError(
                f"cannot delete version {number} of {endpoint.name!r}: its workers have not ended yet; try "
                "again when they have"
            )
        time.sleep(POLL_SECONDS)


def status_of(state: State, number: str) -> Status:
    traffic = state.traffic.get(number, 0)
    one = state.versions.get(number)
    if state.state in {"dead", "failed", "stopped"} and traffic:
        return Status(state=state.state, traffic=0, error=state.error)
    if one is None:
        return Status(state="stopped", traffic=0)
    return Status(
        state=one.state,
        traffic=traffic,
        workers=tuple(one.workers),
        restarts=one.restarts,
        error=one.error,
    )


def deployment_of(endpoint: Endpoint, version: Version, state: State) -> Deployment:
    port = state.port or endpoint.port
    admin_port = state.admin_port or endpoint.admin_port
    url = f"http://{netloc(state.host or endpoint.host, port)}{path_of(endpoint)}"
    one = state.versions.get(version.number)
    return Deployment(
        model_name=version.model_name,
        model_version=version.model_version,
        endpoint_name=endpoint.name,
        served_entity_name=f"{endpoint.name}/{version.number}",
        query_endpoint=f"{url}/invocations" if one is not None and one.invocations else url,
        endpoint_url=url,
        review_app_url=None,
        table=endpoint.table,
        version=version.number,
        admin_url=f"http://{netloc('127.0.0.1', admin_port)}" if admin_port else None,
    )


def path_of(endpoint: Endpoint) -> str:
    """Where an endpoint is on a cluster, which may have others."""
    if endpoint.engine == "local":
        return ""
    prefix: str = endpoint.options.get("route_prefix", f"/{endpoint.name}")
    return prefix.rstrip("/")
