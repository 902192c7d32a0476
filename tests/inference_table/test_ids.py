"""Ids that sort by time."""

import os
import time
import uuid

from inference_table.ids import uuid7


def test_ids_are_uuid_version_7_and_sort_as_they_were_made() -> None:
    """Ten thousand in a row: valid, distinct, in order, and with the time of their making."""
    made = [uuid7() for _ in range(10_000)]
    assert made == sorted(set(made))
    parsed = [uuid.UUID(one) for one in made]
    assert {one.version for one in parsed} == {7}
    assert {one.variant for one in parsed} == {uuid.RFC_4122}
    assert abs((parsed[-1].int >> 80) - time.time() * 1000) < 60_000


def test_forked_children_make_ids_of_their_own() -> None:
    """Children of one parent, at the same moment, never make the same id."""
    uuid7()
    seen: list[str] = []
    for _ in range(4):
        reading, writing = os.pipe()
        if (pid := os.fork()) == 0:
            os.write(writing, " ".join(uuid7() for _ in range(20)).encode())
            os._exit(0)
        os.close(writing)
        os.waitpid(pid, 0)
        with os.fdopen(reading) as output:
            seen += output.read().split()
    assert len(set(seen)) == len(seen) == 80
