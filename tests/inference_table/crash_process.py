"""A process that spools and commits, and kills itself at a named step.

Arguments: a folder, a step, ``strict`` or ``relaxed``. It writes to standard output, unbuffered: ``try ID``
before each append, ``renamed ID`` once it is spooled, ``acknowledged ID`` once a strict append has returned.
"""

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

from inference_table.commit import Committer, open_or_create_table
from inference_table.compaction import Maintenance
from inference_table.spool import Spool, folders
from inference_table.steps import Step
from tests.inference_table.rows import NOON, batch, storage


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def main(folder: Path, deadly: Step, sync: bool) -> None:
    current = ""

    def on_step(step: Step) -> None:
        if step is Step.SEGMENT_RENAMED:
            say(f"renamed {current}")
        if step is deadly:
            os.kill(os.getpid(), signal.SIGKILL)

    settings = storage(folder)
    open_or_create_table(settings)
    committer, maintenance = Committer(settings, on_step), Maintenance(settings, on_step)
    for turn in range(3):
        # A new spool each time, given up before the commit: so there are folders to be removed.
        spool = Spool(settings, on_step)
        for part in range(3):
            current = f"{turn}-{part}"
            say(f"try {current}")
            spool.append(batch([current], at=NOON), sync=sync)
            if sync:
                say(f"acknowledged {current}")
        if turn == 1:
            damage(
                folder,
                next(one for one in folders(spool.root) if one.spool_id == spool.spool_id).segments()[1].path,
            )
        spool.close()
        assert committer.acquire()
        while committer.commit_once() is not None:
            pass
        maintenance.compact(NOON + timedelta(days=1))
    committer.commit_once()


def damage(folder: Path, path: Path) -> None:
    """Cut a segment; its content is kept beside, to be repaired by hand."""
    folder.joinpath(f"good-{path.parent.name}-{path.name}").write_bytes(path.read_bytes())
    os.truncate(path, 100)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Step(sys.argv[2]), sys.argv[3] == "strict")
