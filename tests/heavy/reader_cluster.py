"""Snippets of the guide for other readers on a Ray cluster of two nodes, in a process of its own.

``python -m tests.heavy.reader_cluster URI...`` runs the snippet of each distributed engine on each table, and
prints a line of JSON for each: engine, table, rows, and the nodes that worked for it.
"""

import json
import sys
from typing import Any

from tests.heavy.ray_nodes import add_node
from tests.inference_table.readers_guide import CLUSTER, SNIPPETS, run

STORE_BYTES = 80_000_000


def main(uris: list[str]) -> None:
    import daft
    import ray
    from ray.cluster_utils import Cluster

    # The head has no processors, so that all work goes to the nodes.
    common: dict[str, Any] = {"include_dashboard": False, "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **common})
    try:
        for _ in range(2):
            add_node(cluster, num_cpus=1, **common)
        ray.init(cluster.address, log_to_driver=False)
        daft.set_runner_ray(cluster.address)
        for uri in uris:
            for section in CLUSTER:
                [snippet] = SNIPPETS[section]
                say({"engine": section, "uri": uri, "rows": run(snippet, uri)})
        say({"nodes": sum(node["Alive"] and "CPU" in node["Resources"] for node in ray.nodes())})
    finally:
        ray.shutdown()
        cluster.shutdown()


def say(line: dict[str, Any]) -> None:
    # Ray prints to standard output too.
    print("> " + json.dumps(line), flush=True)  # noqa: T201 - what it is for


if __name__ == "__main__":
    main(sys.argv[1:])
