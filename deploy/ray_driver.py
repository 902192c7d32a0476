"""The process that talks to a Ray cluster for engine ``ray``: one task from standard input, one answer.

A process of its own, because a process has one connection to Ray, and what is deployed takes over much of it:
the working folder is uploaded for a whole job, and workers get the driver's current folder and Python path.

What holds:

- It only connects: no cluster and no Serve of its own dies with it.
- Serve is started by a job without a working folder, since its controller would keep that for good.
- Before an application replaces another, the new one's replicas answer; where they don't, both are as before.
"""

import json
import logging
import os
import socket
import sys
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from deploy.ray_replica import Agent, CodeHolder, agent_app
from inference_table.errors import DeploymentError
from inference_table.writer import CLOSE_SECONDS

__all__ = ["DEPLOYMENT", "main", "routes"]

DEPLOYMENT: Final = "tracelake-agent"
"""Name of the deployment in each application of ours: how they are told from others'."""
NAMESPACE: Final = "tracelake"
CONNECT_SECONDS: Final = 5.0
"""For the TCP connection to a cluster that is named: Ray itself would try for a minute."""
PROXY_SECONDS: Final = 20.0
"""How long Serve's proxy may take from its start to its first reply."""
CLOSING_SECONDS: Final = CLOSE_SECONDS + 5
"""What a replica needs beside ``drain_seconds``: the writer's deadline, and time for what surrounds it."""
POLL_SECONDS: Final = 0.2
MAX_ONGOING_REQUESTS: Final = 100
"""Of a replica; Serve's own 5 would make requests to an agent wait that itself only waits for a model."""
TRACEBACK: Final = "Traceback (most recent call last):"
OURS: Final = str(Path(__file__).with_name("ray_replica.py"))
LOG_BYTES: Final = 1024 * 1024
LOG_LINES: Final = 40
"""Of a log, in an error."""


def main() -> None:
    """Carry out one task, a JSON object on standard input; answer with one on standard output."""
    # Ray writes to standard output too.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answer:
        os.dup2(2, 1)
        task = json.load(sys.stdin)
        try:
            result = {"result": TASKS[task["task"]](task)}
        except DeploymentError as error:
            result = {"error": str(error)}
        except Exception as error:  # noqa: BLE001 - whatever Ray raises is the deployer's to read
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"}
        json.dump(result, answer)


def apply(task: Mapping[str, Any]) -> dict[str, Any]:
    """Deploy a version and wait until it has taken over; the application is as before where it doesn't."""
    import ray
    from ray import serve

    name, prefix, url = task["name"], task["route_prefix"], task["url"]
    connect(task["address"])
    serve.start(proxy_location="EveryNode", http_options={"host": task["host"], "port": task["port"]})
    check_name(name)
    # Without any application a proxy answers 503.
    wait_for_proxy(url, task["port"], lambda: is_reached(url))
    ray.shutdown()
    connect(task["address"], runtime_env={"working_dir": task["working_dir"]})
    holder = f"{name}/{task['code_version']}"
    hold_code(holder)
    target = serve.RunTarget(application(task), name=name, route_prefix=prefix)
    serve.run_many([target], wait_for_applications_running=False)
    try:
        wait_until_running(task)
        wait_for_proxy(url, task["port"], lambda: prefix in (routes(url) or {}))
    except DeploymentError as error:
        log = tail(name, task["entity"], LOG_LINES)
        if task["replaces"] is None:
            delete(name, task["drain_seconds"])
        release_code(name, but=task["replaces"])
        raise DeploymentError(f"{error}\nThe end of its log:\n{log}" if log else str(error)) from error
    release_code(name, but=holder)
    return {"invocations": answers_invocations(url + prefix.rstrip("/"))}


def stop(task: Mapping[str, Any]) -> None:
    """Delete the application, drained and flushed. Fine where there is none, and no cluster."""
    try:
        connect(task["address"])
    except DeploymentError:
        return
    if is_ours(task["name"]):
        delete(task["name"], task["drain_seconds"])
    release_code(task["name"], but=None)


def logs(task: Mapping[str, Any]) -> str:
    connect(task["address"])
    return tail(task["name"], task["entity"], task["lines"])


TASKS: Final[dict[str, Callable[[Mapping[str, Any]], Any]]] = {"apply": apply, "stop": stop, "logs": logs}


def connect(address: str | None, **options: Any) -> None:
    """Connect to a cluster that runs.

    Raises:
        DeploymentError: there is none.
    """
    import ray

    given = address or os.environ.get("RAY_ADDRESS")
    advice = "start one with `ray start --head`, or give its address with ray_address or RAY_ADDRESS"
    if given and "://" not in given and ":" in given:
        host, _, port = given.rpartition(":")
        try:
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        except (OSError, ValueError) as error:
            raise DeploymentError(
                f"cannot connect to the Ray cluster {given!r}: {error}; is it running? Else {advice}"
            ) from error
    try:
        ray.init(address or "auto", log_to_driver=False, logging_level=logging.ERROR, **options)
    except ConnectionError as error:
        raise DeploymentError(f"no Ray cluster is running here: {advice}") from error
    except (RuntimeError, ValueError) as error:
        raise DeploymentError(f"cannot connect to the Ray cluster {given or 'auto'!r}: {error}") from error


def check_name(name: str) -> None:
    """Refuse to replace an application that somebody else has deployed."""
    from ray import serve

    if name in serve.status().applications and not is_ours(name):
        raise DeploymentError(
            f"cannot deploy {name!r}: the cluster has an application of that name that is not tracelake's; "
            "give another endpoint_name"
        )


def is_ours(name: str) -> bool:
    from ray import serve

    found = serve.status().applications.get(name)
    return found is not None and set(found.deployments) <= {DEPLOYMENT}


def application(task: Mapping[str, Any]) -> Any:
    """The Serve application of a version."""
    from ray import serve

    options = dict(task["options"])
    actor = dict(options.pop("ray_actor_options", {}))
    given = dict(actor.pop("runtime_env", {}))
    runtime_env = {**given, "env_vars": {**given.get("env_vars", {}), **task["environment"]}}
    if "autoscaling" in options:
        options["autoscaling_config"] = options.pop("autoscaling")
    try:
        deployment = serve.deployment(
            name=DEPLOYMENT,
            ray_actor_options={**actor, "runtime_env": runtime_env},
            graceful_shutdown_timeout_s=task["drain_seconds"] + CLOSING_SECONDS,
            # A replica that can't start won't at the second try; later, others are started without a limit.
            max_constructor_retry_count=1,
            # New replicas first, as many as there is room for; old ones leave as new ones answer.
            max_surge_percent=100,
            rolling_update_percentage=1.0,
            **{"max_ongoing_requests": MAX_ONGOING_REQUESTS, **options},
        )(serve.ingress(agent_app)(Agent))
    except (TypeError, ValueError) as error:
        raise DeploymentError(f"Ray Serve does not accept the options of this version: {error}") from error
    # No public argument sets it. The same version deployed again, as after a failed update, then keeps its
    # replicas; where Serve ignores it, they are replaced one by one.
    deployment._version = task["code_version"]
    return deployment.bind()


def hold_code(name: str) -> None:
    """Keep the working folder of this job on the cluster: see :class:`deploy.ray_replica.CodeHolder`."""
    import ray

    ray.remote(CodeHolder).options(
        name=name,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
    ).remote()


def release_code(name: str, but: str | None) -> None:
    """Let go of the working folders of an endpoint's other versions."""
    import ray

    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == NAMESPACE and actor["name"].startswith(f"{name}/") and actor["name"] != but:
            try:
                ray.kill(ray.get_actor(actor["name"], NAMESPACE))
            except ValueError:
                continue  # gone meanwhile


def wait_until_running(task: Mapping[str, Any]) -> None:
    """Wait until all replicas are the new version's.

    Each step forward has ``wait_seconds``: a cluster with little room replaces one replica after another.

    Raises:
        DeploymentError: why they don't run.
    """
    from ray import serve

    seen: Any = None
    deadline = 0.0
    while True:
        app = serve.status().applications[task["name"]]
        own = app.deployments.get(DEPLOYMENT)
        message = cleaned((own.message if own else "") or app.message)
        if app.status.value == "RUNNING":
            return
        if app.status.value == "DEPLOY_FAILED":
            raise DeploymentError(f"a replica of {task['entity']} failed to start: {message}")
        running = own.replica_states.get("RUNNING", 0) if own else 0
        if running != seen:
            seen, deadline = running, time.monotonic() + task["wait_seconds"]
        if time.monotonic() > deadline:
            raise DeploymentError(
                f"replicas of {task['entity']} did not answer within {task['wait_seconds']:g} s: "
                f"{message or 'they are still starting'}; give more wait_seconds, or the cluster more room"
            )
        time.sleep(POLL_SECONDS)


def cleaned(message: str) -> str:
    """Serve's message; of a replica's error the last line first, and its traceback from our own code on."""
    _, separator, error = message.rpartition(TRACEBACK)
    if not separator:
        return message.strip()
    lines = error.strip().splitlines()
    ours = next((number for number, line in enumerate(lines) if OURS in line), 0)
    return "\n".join([lines[-1].strip(), TRACEBACK, *lines[ours:]])


def delete(name: str, drain_seconds: float) -> None:
    """Delete an application and wait until its replicas have flushed."""
    from ray import serve

    seconds = drain_seconds + CLOSING_SECONDS + 10
    serve.delete(name, _blocking=False)
    if not until(lambda: name not in serve.status().applications, seconds):
        raise DeploymentError(
            f"the application {name!r} was not deleted within {seconds:g} s; `serve status` says more"
        )


def until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def wait_for_proxy(url: str, port: int, condition: Callable[[], bool]) -> None:
    if not until(condition, PROXY_SECONDS):
        raise DeploymentError(
            f"no proxy of this cluster's Ray Serve answers at {url}: something else has port {port} there, "
            "or Serve was started with another host and port; give those with host and port"
        )


def is_reached(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/-/healthz", timeout=2).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def routes(url: str, seconds: float = 2.0) -> dict[str, str] | None:
    """Application by route prefix, of Serve's proxy at a URL; None where none answers."""
    try:
        with urllib.request.urlopen(f"{url}/-/routes", timeout=seconds) as reply:
            found = json.load(reply)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def answers_invocations(url: str) -> bool:
    """Whether ``POST /invocations`` is there: to a GET it answers that this is the wrong method."""
    try:
        urllib.request.urlopen(f"{url}/invocations", timeout=10).close()
    except urllib.error.HTTPError as error:
        return error.code != 404
    except OSError:
        return False
    return True


def tail(name: str, entity: str | None, lines: int) -> str:
    """The ends of replicas' logs: of all nodes if the dashboard runs, else of this machine."""
    found = [text for text in (remote_logs(name) or local_logs(name)) if is_of(text, entity)]
    return "\n".join("\n".join(text.splitlines()[-lines:]) for text in found[-3:])


def is_of(text: str, entity: str | None) -> bool:
    """Whether a log is a version's; the line that says so may have been cut off."""
    return entity is None or f"a replica of {entity} starts" in text or "a replica of " not in text


def pattern(name: str) -> str:
    return f"replica_{name}_{DEPLOYMENT}_*.log"


def local_logs(name: str) -> list[str]:
    import ray

    session = ray.init(ignore_reinit_error=True, logging_level=logging.ERROR).address_info["session_dir"]
    paths = Path(session, "logs", "serve").glob(pattern(name))
    newest = sorted(paths, key=lambda path: path.stat().st_mtime)
    return [read_tail(path) for path in newest]


def read_tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LOG_BYTES))
        return file.read().decode(errors="replace")


def remote_logs(name: str) -> list[str]:
    """Through Ray's state API, which is the dashboard's."""
    import ray
    from ray.util import state

    texts = []
    try:
        for node in ray.nodes():
            if not node["Alive"]:
                continue
            files = state.list_logs(node_id=node["NodeID"], glob_filter=f"serve/{pattern(name)}", timeout=5)
            for file in sorted(path for kind in files.values() for path in kind):
                chunks = state.get_log(node_id=node["NodeID"], filename=file, tail=1000, timeout=5)
                texts.append("".join(chunks))
    except (OSError, RuntimeError, ValueError, state.exception.RayStateApiException):
        return []
    return texts
