"""``deploy()``: from an agent to a traced endpoint.

What holds:

- An endpoint changes under its lock: of two deployers one waits.
- A version is complete on disk before it is named anywhere, and never changes after that.
- Where a change fails, or its deployer gives up, the endpoint goes on as it was.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from deploy.agents import Agent, agent_of
from deploy.arguments import COUNT, PORT, SECONDS, check_arguments, check_engine, check_traffic, storage_of
from deploy.deployments import Deployment, deployment_of
from deploy.endpoints import endpoint_lock, engine_of, is_up, reverting
from deploy.registry import Endpoint, EndpointFolder
from deploy.versions import VersionPlan, discard, version_for
from inference_table.errors import DeploymentError
from serving.server_settings import ServerSettings

__all__ = ["deploy"]

KEPT_VERSIONS: Final = 10
"""Newest versions whose frozen copies are kept for a rollback; older ones go with the next deployment."""
OF_VERSIONS: Final = frozenset({"engine", "table", "spool_dir"})
"""What all versions of an endpoint have in common: a rollback must not change it."""
SERVED: Final = "TRACELAKE_APP"
"""Set in the environment of what serves an agent."""


def deploy(
    agent: Any,
    version: int | str | None = None,
    *,
    endpoint_name: str | None = None,
    table: str | os.PathLike[str] | None = None,
    engine: str = "local",
    workers: int = 1,
    host: str | None = None,
    port: int | None = None,
    environment_vars: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
    description: str | None = None,
    wait_seconds: float = 60.0,
    drain_seconds: float = 60.0,
    working_dir: str | os.PathLike[str] | None = None,
    traffic: Mapping[str, int] | None = None,
    spool_dir: str | os.PathLike[str] | None = None,
    durability: str | None = None,
    api_key_file: str | os.PathLike[str] | None = None,
    admin_port: int | None = None,
    max_request_bytes: int | None = None,
    max_concurrency: int | None = None,
    num_replicas: int | str | None = None,
    autoscaling: Mapping[str, Any] | None = None,
    ray_actor_options: Mapping[str, Any] | None = None,
    max_ongoing_requests: int | None = None,
    ray_address: str | None = None,
    route_prefix: str | None = None,
) -> Deployment:
    """Serve an agent and record every request it answers, with its MLflow trace, in a Delta table.

    Tracing is on by itself. The endpoint goes on when this process ends. A further version of the same
    endpoint takes over without a failed request; where it does not come up, the version before goes on.

    Args:
        agent: what to serve: an import string (``"my_agent:app"``: an ASGI app, a function, an object with
            ``predict``), such an object of a module, or an MLflow model (``"models:/name/3"``,
            ``"runs:/..."``, a folder; needs the extra ``mlflow``). The name of a registered model goes with
            ``version``.
        version: of a registered model; or the number of a version that was deployed before, which is served
            again from its frozen copy (a rollback). None: the agent as it is now, as a new version.
        endpoint_name: by default the module's or the model's name.
        table: URI of the Delta table. Default: the endpoint's, else ``INFERENCE_TABLE_URI``, else
            ``./tracelake-data/payload``.
        engine: ``"local"``, processes on this machine, or ``"ray"``, a Ray cluster (extra ``ray``).
        workers: server processes (engine ``local``).
        host: address to listen on; 127.0.0.1 by default.
        port: None: the endpoint's, else 8000 where it is free, else any.
        environment_vars: for the agent, on top of this process's environment. Upper-case names, texts as
            values.
        tags: kept with the version, for people.
        description: kept with the version, for people.
        wait_seconds: how long the new version may take until it answers.
        drain_seconds: how long the old one may take to finish what it is answering.
        working_dir: the folder that is copied and served from, the current one by default. Left out are
            git-ignored files, virtual environments, caches and ``.git``.
        traffic: percent per version, ``{"1": 90, "2": 10}``, of two at most; all to this one by default.
        spool_dir: local disk where rows wait; ``INFERENCE_TABLE_SPOOL_DIR``, else ``./tracelake-data/spool``.
        durability: ``"relaxed"``, ``"strict"`` or ``"committed"``.
        api_key_file: requests need one of these keys; see ``docs/security.md``.
        admin_port: port of 127.0.0.1 for ``/metrics`` and ``/health``, 0 for any free one. None: with an
            ``api_key_file`` any free one, else ``/metrics`` is on ``port``.
        max_request_bytes: larger requests are answered 413; 128 MiB by default.
        max_concurrency: further requests to a worker are answered 429; 1,000 by default.
        num_replicas: replicas, or ``"auto"`` (engine ``ray``).
        autoscaling: Ray Serve's ``autoscaling_config`` in place of ``num_replicas`` (engine ``ray``).
        ray_actor_options: what a replica needs of its node, ``{"num_gpus": 1}`` (engine ``ray``).
        max_ongoing_requests: that a replica is given at a time, 100 by default (engine ``ray``).
        ray_address: the cluster; ``RAY_ADDRESS``, else the one on this machine (engine ``ray``).
        route_prefix: path of the endpoint on the cluster, ``/<endpoint_name>`` by default (engine ``ray``).

    Raises:
        DeploymentError: an argument can't be carried out, or the endpoint did not come up; with its own error
            and the end of its log.
        SettingsError: a setting in the environment is not accepted, or a model can't be had.
    """
    if SERVED in os.environ:
        raise DeploymentError(
            "deploy() was called by the agent itself while it was served: put the call into another file, or "
            "under `if __name__ == '__main__':`"
        )
    replicas = given(
        num_replicas=num_replicas,
        autoscaling=autoscaling and dict(autoscaling),
        ray_actor_options=ray_actor_options and dict(ray_actor_options),
        max_ongoing_requests=max_ongoing_requests,
    )
    cluster = given(address=ray_address, route_prefix=route_prefix)
    check_arguments(
        environment_vars,
        tags,
        {
            "workers": (workers, COUNT),
            "port": (port, PORT),
            "admin_port": (admin_port, PORT),
            "wait_seconds": (wait_seconds, SECONDS),
            "drain_seconds": (drain_seconds, SECONDS),
            "max_request_bytes": (max_request_bytes, COUNT),
            "max_concurrency": (max_concurrency, COUNT),
            "num_replicas": (None if num_replicas == "auto" else num_replicas, COUNT),
            "max_ongoing_requests": (max_ongoing_requests, COUNT),
        },
    )
    check_engine(
        engine, {"workers": workers != 1, "admin_port": admin_port is not None}, {**replicas, **cluster}
    )
    source = Path.cwd() if working_dir is None else Path(working_dir).absolute()
    if not source.is_dir():
        raise DeploymentError(
            f"cannot deploy from '{source}': there is no such folder; give another working_dir"
        )
    asked_version = None if version is None else str(version)
    found = agent_of(agent, asked_version, source)
    server = texts(
        INFERENCE_TABLE_DURABILITY=durability,
        TRACELAKE_API_KEY_FILE=api_key_file and Path(api_key_file).absolute(),
        TRACELAKE_MAX_REQUEST_BYTES=max_request_bytes,
        TRACELAKE_MAX_CONCURRENCY=max_concurrency,
    )
    has_keys = engine == "local" and check_server({**os.environ, **(environment_vars or {}), **server})
    plan = VersionPlan(
        agent=found,
        version=asked_version,
        working_dir=source,
        workers=workers,
        tags=dict(tags or {}),
        description=description,
        environment_vars=dict(environment_vars or {}),
        server=server,
        options=replicas,
    )
    name = endpoint_name or found.endpoint_name
    with endpoint_lock(name):
        folder = EndpointFolder(name)
        before = folder.endpoint()
        if before is not None and endpoint_name is None:
            check_same_agent(folder, found)
        blank = Endpoint(name=name, engine=engine, host="127.0.0.1", port=None, table="", spool_dir="")
        asked = given(host=host, port=port, admin_port=admin_port) | place(
            before, table, spool_dir, plan, engine
        )
        if has_keys and (before is None or (before.admin_port is None and not is_up(folder, before))):
            asked.setdefault("admin_port", 0)
        endpoint = changed(folder, before or blank, {"engine": engine, **asked}, cluster)
        endpoint = replace(endpoint, wait_seconds=wait_seconds, drain_seconds=drain_seconds)
        return roll_out(folder, before, endpoint, plan, traffic)


def given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def texts(**values: Any) -> dict[str, str]:
    return {name: str(value) for name, value in given(**values).items()}


def check_server(environment: Mapping[str, str]) -> bool:
    """Check the settings of the workers' servers; whether they ask for API keys.

    Raises:
        SettingsError: one is not accepted, or the file of keys can't be used.
    """
    from serving.api_keys import read_keys

    settings = ServerSettings.from_environ(environment)
    if settings.api_key_file is not None:
        read_keys(settings.api_key_file)
    return settings.api_key_file is not None


def check_same_agent(folder: EndpointFolder, found: Agent) -> None:
    """Refuse to replace one agent by another only because their modules have the same name."""
    numbers = folder.version_numbers()
    newest = folder.version(numbers[-1]) if numbers else None
    if newest is not None and newest.model_name != found.model_name:
        raise DeploymentError(
            f"cannot deploy {found.given!r} as {folder.name!r}, which serves {newest.agent!r}: give "
            f"endpoint_name={folder.name!r} to replace that, or another one"
        )


def place(
    before: Endpoint | None,
    table: str | os.PathLike[str] | None,
    spool_dir: str | os.PathLike[str] | None,
    plan: VersionPlan,
    engine: str,
) -> dict[str, str]:
    """Where rows go: as asked, else as the endpoint has it, else as the environment says."""
    uri = os.fspath(table) if table is not None else before.table if before is not None else None
    spool = (
        os.fspath(spool_dir) if spool_dir is not None else before.spool_dir if before is not None else None
    )
    storage = storage_of({**plan.environment_vars, **plan.server}, uri, spool or None)
    if engine == "local":
        return {"table": storage.uri, "spool_dir": str(storage.spool_dir)}
    # On a cluster each node has a spool of its own, at the same path unless it is told.
    return {"table": storage.uri, "spool_dir": "" if spool is None else spool}


def changed(
    folder: EndpointFolder, endpoint: Endpoint, asked: dict[str, Any], cluster: dict[str, Any]
) -> Endpoint:
    """The endpoint as asked.

    Raises:
        DeploymentError: its versions are made for something else, or it runs and can't be moved meanwhile.
    """
    result = replace(endpoint, **asked, options={**endpoint.options, **cluster})
    names = (*asked, "options")
    now = {name: getattr(endpoint, name) for name in names}
    different = {
        name: value
        for name in names
        if (value := getattr(result, name)) != now[name]
        and not (name in ("port", "admin_port") and value == 0 and now[name])
    }
    made_for = OF_VERSIONS & different.keys() if folder.version_numbers() else set()
    if made_for or (different and endpoint.traffic and is_up(folder, endpoint)):
        changes = "; ".join(f"{name} is {now[name]!r}, not {value!r}" for name, value in different.items())
        advice = "delete it first" if made_for else "stop or delete it first"
        raise DeploymentError(
            f"cannot deploy to {endpoint.name!r}: {changes}; {advice}, or give another endpoint_name"
        )
    return replace(endpoint, **{name: getattr(result, name) for name in different})


def roll_out(
    folder: EndpointFolder,
    before: Endpoint | None,
    endpoint: Endpoint,
    plan: VersionPlan,
    traffic: Mapping[str, int] | None,
) -> Deployment:
    """Freeze the version, and let it take over."""
    folder.create()
    there = folder.version_numbers()
    try:
        version = version_for(folder, endpoint, plan)
        versions = folder.version_numbers()
        shares = check_traffic(traffic or {version.number: 100}, versions, version.number)
        wanted = replace(
            endpoint,
            traffic=shares,
            generation=endpoint.generation + 1,
            last_number=max(endpoint.last_number, int(version.number)),
        )
        with reverting(folder, before):
            folder.write_endpoint(wanted)
            state = engine_of(wanted).apply(folder, wanted)
    except BaseException:  # also of a deployer who presses Ctrl-C; raised again
        for number in set(folder.version_numbers()) - set(there):
            discard(folder, number)
        if before is None:
            folder.remove()
        raise
    # The endpoint is found there again, also when it is started anew.
    kept = replace(wanted, port=state.port or wanted.port, admin_port=state.admin_port or wanted.admin_port)
    folder.write_endpoint(kept)
    for number in versions[:-KEPT_VERSIONS]:
        if number not in shares and number not in state.versions:
            discard(folder, number)
    return deployment_of(kept, version, state)
