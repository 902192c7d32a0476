"""Nodes of Ray clusters for tests."""

from typing import Any

__all__ = ["add_node"]

ATTEMPTS = 3


def add_node(cluster: Any, **options: Any) -> Any:
    """A further node; tried again, as Ray gives one 30 s to start, whatever else the machine has to do."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return cluster.add_node(**options)
        except Exception as error:  # Ray raises nothing narrower
            if "timed out during startup" not in str(error) or attempt == ATTEMPTS:
                raise
    raise AssertionError
