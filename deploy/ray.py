"""Engine ``ray``: endpoints as applications of Ray Serve, on a cluster that runs already.

What holds:

- The caller's own connection to Ray and its current folder play no part, and are left alone: each task is a
  child process (``ray_driver.py``). Only where the caller is connected and no address is given, the cluster
  is the caller's.
- ``state.json`` says which version took over last. What runs is asked of Serve's proxy, over HTTP.
- A version that does not come up is taken back: the one before is deployed again, whose replicas still run.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from deploy.listening import netloc
from deploy.ray_driver import routes
from deploy.registry import Endpoint, EndpointFolder, State, Version, VersionState
from inference_table.errors import DeploymentError

__all__ = ["apply", "logs", "state", "stop"]

DRIVER: Final = "from deploy.ray_driver import main; main()"
USUAL_PORT: Final = 8000
ENDPOINT_OPTIONS: Final = frozenset({"address", "route_prefix"})
VERSION_OPTIONS: Final = frozenset(
    {"autoscaling", "max_ongoing_requests", "num_replicas", "ray_actor_options"}
)
OUR_PACKAGES: Final = ("deploy", "inference_table", "serving")


def apply(folder: EndpointFolder, endpoint: Endpoint) -> State:
    """Have the one version that takes traffic replace what runs, without a failed request.

    Raises:
        DeploymentError: it did not come up, with the replica's own error and the end of its log; or there is
            no cluster, or an option is not accepted. What ran before runs on.
    """
    if not endpoint.traffic:
        stop(folder, endpoint)
        return state(folder, endpoint)
    version = only_version(folder, endpoint)
    task = apply_task(endpoint, version)
    before = serving_version(folder)
    replaces = None if before is None else f"{endpoint.name}/{code_version(before)}"
    try:
        answer = run(endpoint, {**task, "task": "apply", "replaces": replaces})
    except DeploymentError as error:
        if before is None or before == version:
            raise
        raise DeploymentError(f"{error}\n{put_back(endpoint, before)}") from error
    done = State(
        state="serving",
        generation=endpoint.generation,
        host=endpoint.host,
        port=task["port"],
        traffic={version.number: 100},
        versions={version.number: VersionState(state="serving", invocations=answer["invocations"])},
    )
    folder.write_state(done)
    return done


def state(folder: EndpointFolder, endpoint: Endpoint) -> State:
    """What Serve's proxy says, within two seconds; whether replicas answer, ``serve status`` tells."""
    known = folder.state() or State(state="stopped")
    found = routes(base_url(endpoint))
    if found is not None and found.get(route_prefix(endpoint)) == endpoint.name:
        return replace(known, state="serving") if known.versions else known
    if known.state != "serving":
        return known
    why = "its cluster does not answer" if found is None else "Ray Serve no longer has it"
    return State(state="dead", generation=known.generation, error=f"{why} at {base_url(endpoint)}")


def stop(folder: EndpointFolder, endpoint: Endpoint) -> None:
    """Delete the application: requests are answered, rows flushed. Fine where there is none, or no cluster.

    Raises:
        DeploymentError: Serve does not delete it in time.
    """
    run(endpoint, {"task": "stop"})
    if folder.path.is_dir():
        folder.write_state(State(state="stopped", generation=endpoint.generation))


def logs(folder: EndpointFolder, endpoint: Endpoint, number: str | None, lines: int) -> str:
    """The ends of the logs of a version's newest replicas.

    Of all nodes if Ray's dashboard runs, else of this one.

    Raises:
        DeploymentError: there is no cluster to ask.
    """
    known = folder.version_numbers()
    number = number or (known[-1] if known else None)
    entity = None if number is None else f"{endpoint.name}/{number}"
    text: str = run(endpoint, {"task": "logs", "entity": entity, "lines": lines})
    return text


def only_version(folder: EndpointFolder, endpoint: Endpoint) -> Version:
    numbers = [number for number, share in endpoint.traffic.items() if share]
    if len(numbers) != 1:
        raise DeploymentError(
            f"cannot split the traffic of {endpoint.name!r} between versions {', '.join(numbers)}: an "
            "application of Ray Serve runs one; give it all, or deploy the other with another endpoint_name"
        )
    version = folder.version(numbers[0])
    if version is None:
        raise DeploymentError(f"cannot deploy version {numbers[0]} of {endpoint.name!r}: it is not there")
    return version


def serving_version(folder: EndpointFolder) -> Version | None:
    """The version that took over last, and was not stopped."""
    known = folder.state()
    if known is None or known.state != "serving":
        return None
    return next((folder.version(number) for number in known.traffic), None)


def put_back(endpoint: Endpoint, before: Version) -> str:
    """Deploy the version before again; what came of it."""
    try:
        run(endpoint, {**apply_task(endpoint, before), "task": "apply", "replaces": None})
    except DeploymentError as error:
        return f"Nor could version {before.number} be put back: {error}"
    return f"Version {before.number} serves on."


def apply_task(endpoint: Endpoint, version: Version) -> dict[str, Any]:
    """What the driver is told about a version.

    Raises:
        DeploymentError: an option is not accepted.
    """
    check_options(endpoint, version)
    folder = Path(version.working_dir)
    for name in OUR_PACKAGES:
        if (folder / name / "__init__.py").exists() or (folder / f"{name}.py").exists():
            raise DeploymentError(
                f"cannot deploy {version.agent!r} to Ray: its folder has a module {name!r} of its own, which "
                "would hide tracelake's on the nodes; rename it"
            )
    return {
        "host": endpoint.host,
        "port": endpoint.port or USUAL_PORT,
        "url": base_url(endpoint),
        "route_prefix": route_prefix(endpoint),
        "code_version": code_version(version),
        "entity": f"{endpoint.name}/{version.number}",
        "working_dir": version.working_dir,
        "environment": environment(endpoint, version),
        "options": {"num_replicas": version.workers, **version.options}
        if "autoscaling" not in version.options
        else version.options,
        "wait_seconds": endpoint.wait_seconds,
    }


def environment(endpoint: Endpoint, version: Version) -> dict[str, str]:
    """What is added to a node's environment for a replica."""
    ours = {
        "ENABLE_MLFLOW_TRACING": "true",
        "INFERENCE_TABLE_URI": endpoint.table,
        "INFERENCE_TABLE_SERVED_ENTITY": f"{endpoint.name}/{version.number}",
    }
    if endpoint.spool_dir:
        ours["INFERENCE_TABLE_SPOOL_DIR"] = endpoint.spool_dir
    target = version.target
    if Path(target).is_absolute():  # a model within the copy, which lies elsewhere on a node
        target = os.path.relpath(target, version.working_dir)
    return {**ours, **version.environment, "TRACELAKE_APP": target}


def code_version(version: Version) -> str:
    return f"{version.number}-{version.created_at}"


def check_options(endpoint: Endpoint, version: Version) -> None:
    problems = [
        f"{name} is none of {', '.join(sorted(known))}"
        for options, known in ((endpoint.options, ENDPOINT_OPTIONS), (version.options, VERSION_OPTIONS))
        for name in options.keys() - known
    ]
    options = version.options
    replicas = options.get("num_replicas", 1)
    if replicas != "auto" and not is_count(replicas):
        problems.append(f"num_replicas is {replicas!r}: give a whole number of at least 1, or 'auto'")
    if "num_replicas" in options and "autoscaling" in options:
        problems.append("num_replicas and autoscaling are given: give one of them")
    if not is_count(ongoing := options.get("max_ongoing_requests", 1)):
        problems.append(f"max_ongoing_requests is {ongoing!r}: give a whole number of at least 1")
    for name in ("autoscaling", "ray_actor_options"):
        if not isinstance(value := options.get(name, {}), Mapping):
            problems.append(f"{name} is {value!r}: give a mapping")
        elif name == "ray_actor_options" and "working_dir" in value.get("runtime_env", {}):
            problems.append("ray_actor_options has a working_dir: give working_dir to deploy()")
    prefix = route_prefix(endpoint)
    if not prefix.startswith("/") or (prefix != "/" and prefix.endswith("/")):
        problems.append(f"route_prefix is {prefix!r}: give a path such as '/{endpoint.name}', or '/'")
    if problems:
        raise DeploymentError(f"cannot deploy {endpoint.name!r} to Ray: {'; '.join(problems)}")


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def route_prefix(endpoint: Endpoint) -> str:
    return str(endpoint.options.get("route_prefix", f"/{endpoint.name}"))


def base_url(endpoint: Endpoint) -> str:
    """Where Serve's proxy is reached."""
    return f"http://{netloc(endpoint.host, endpoint.port or USUAL_PORT)}"


def run(endpoint: Endpoint, task: Mapping[str, Any]) -> Any:
    """Carry out a task in a child process.

    Raises:
        DeploymentError: it says why it can't, or it died.
    """
    if importlib.util.find_spec("ray") is None:
        raise DeploymentError("the engine 'ray' needs Ray Serve: pip install 'tracelake[ray]'")
    common = {
        "name": endpoint.name,
        "address": endpoint.options.get("address") or callers_cluster(),
        "drain_seconds": endpoint.drain_seconds,
    }
    # Ray hands its driver's current folder on to workers, so that must be nobody's.
    with tempfile.TemporaryDirectory(prefix="tracelake-ray-") as nowhere:
        child = subprocess.run(
            [sys.executable, "-P", "-W", "ignore", "-c", DRIVER],
            cwd=nowhere,
            input=json.dumps({**common, **task}).encode(),
            # The copy is of what was to be copied: no further file is to be left out.
            env={**os.environ, "RAY_RUNTIME_ENV_IGNORE_GITIGNORE": "1"},
            capture_output=True,
            check=False,
        )
    try:
        answer = json.loads(child.stdout)
    except ValueError:
        last = "\n".join(child.stderr.decode(errors="replace").splitlines()[-20:])
        raise DeploymentError(
            f"the process that talks to Ray for {endpoint.name!r} ended with {child.returncode}:\n{last}"
        ) from None
    if "error" in answer:
        raise DeploymentError(answer["error"])
    return answer["result"]


def callers_cluster() -> str | None:
    """The cluster that the caller is connected to, if it is."""
    if "ray" not in sys.modules:
        return None
    import ray

    return str(ray.get_runtime_context().gcs_address) if ray.is_initialized() else None
