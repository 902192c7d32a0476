"""A Ray cluster of several node processes on this machine, in a process of its own.

``python -m tests.heavy.ray_cluster FOLDER PORT`` starts a head without CPUs, which holds Serve's controller
and its only proxy, on PORT. Then it reads lines: ``add NAME CPUS`` starts a node with ``FOLDER/NAME`` as its
``TRACELAKE_HOME``, and answers with the id of its raylet's process. At the end of its input it stops them.
"""

import os
import sys
from pathlib import Path
from typing import Any

from tests.heavy.ray_nodes import add_node

STORE_BYTES = 80_000_000
PATIENCE = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
}
"""Serve kills a proxy that takes 5 s to start, as it may beside other tests."""


def main(folder: Path, port: int) -> None:
    os.environ.update(PATIENCE)
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    common: dict[str, Any] = {"include_dashboard": False, "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **common})
    try:
        ray.init(cluster.address, log_to_driver=False)
        try:
            serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        finally:
            ray.shutdown()
        say(cluster.address)
        for line in sys.stdin:
            _, name, cpus = line.split()
            environment = {"TRACELAKE_HOME": str(folder / name)}
            node = add_node(cluster, num_cpus=int(cpus), env_vars=environment, **common)
            say(str(node.all_processes["raylet"][0].process.pid))
    finally:
        cluster.shutdown()


def say(text: str) -> None:
    # Ray prints to standard output too.
    print(f"> {text}", flush=True)  # noqa: T201 - what it is for


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
