"""The protocol as a state machine: writers, committers, crashes, damage and tables that come and go.

Real files and a real Delta table; a crash is an exception that no code catches, after which the objects are
left as they are and their locks released, as the kernel does for a killed process.
"""

import contextlib
import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from inference_table import folder as folder_module
from inference_table.commit import Committer, open_or_create_table
from inference_table.errors import SegmentError, SpoolError, TableError, TableReplacedError
from inference_table.spool import Folder, Segment, Spool, folders, retry_quarantined, spool_root, spool_stats
from inference_table.steps import Step
from tests.inference_table.rows import batch, ids_in_table, storage

SPOOL_STEPS = [
    Step.FOLDER_CREATED,
    Step.FOLDER_RENAMED,
    Step.SEGMENT_WRITTEN,
    Step.SEGMENT_SYNCED,
    Step.SEGMENT_RENAMED,
    Step.SEGMENT_DURABLE,
]
COMMIT_STEPS = [
    step
    for step in Step
    if step not in SPOOL_STEPS and step not in (Step.COMPACTION_WRITTEN, Step.COMPACTION_COMMITTED)
]


SLOTS = st.integers(0, 2)


class SimulatedCrash(BaseException):
    """The process is gone."""


class Crash:
    """Raises at the nth pass of a step; remembers whether a segment was renamed."""

    def __init__(self) -> None:
        self.step: Step | None = None
        self.passes = 0
        self.renamed = False

    def arm(self, step: Step | None, passes: int = 1) -> None:
        self.step, self.passes, self.renamed = step, passes, False

    def __call__(self, step: Step) -> None:
        self.renamed = self.renamed or step is Step.SEGMENT_RENAMED
        if step is self.step:
            self.passes -= 1
            if self.passes == 0:
                raise SimulatedCrash


class Protocol(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tracelake-protocol-"))
        self.settings = storage(self.folder)
        self.root = spool_root(self.settings)
        open_or_create_table(self.settings)
        self.spools: dict[int, tuple[Spool, Crash]] = {}
        """The living owners, by slot."""
        self.crash = Crash()
        self.committer = Committer(self.settings, self.crash)
        self.spooled: set[str] = set()
        self.appended: list[tuple[Spool, int, set[str]]] = []
        self.archived: set[str] = set()
        """In a table that was replaced."""
        self.good: dict[str, bytes] = {}
        """What damaged segments held, by the name they have in quarantine."""
        self.hidden: list[Path] = []
        self.is_away = False
        self.number = 0
        self.abandoned = folder_module.ABANDONED_SECONDS
        folder_module.ABANDONED_SECONDS = -1.0  # nobody is between mkdir and lock here

    @property
    def log(self) -> Path:
        return self.settings.local_path / "_delta_log"

    def segments(self) -> list[Segment]:
        return [segment for folder in folders(self.root) for segment in folder.segments()]

    # --- writers ---

    @rule(slot=SLOTS, count=st.integers(1, 3), sync=st.booleans())
    def append(self, slot: int, count: int, sync: bool) -> None:
        spool, crash = self.owner(slot)
        crash.arm(None)
        for _ in range(count):
            ids = self.new_ids()
            sequence = spool.append(batch(ids), sync=sync)
            self.spooled |= ids
            self.appended.append((spool, sequence, ids))
            assert spool.is_pending(sequence)

    def owner(self, slot: int) -> tuple[Spool, Crash]:
        if slot not in self.spools:
            crash = Crash()
            self.spools[slot] = (Spool(self.settings, crash), crash)
        return self.spools[slot]

    @rule(slot=SLOTS, step=st.sampled_from(SPOOL_STEPS))
    def append_and_crash(self, slot: int, step: Step) -> None:
        spool, crash = self.owner(slot)
        crash.arm(step)
        ids = self.new_ids()
        with contextlib.suppress(SimulatedCrash):
            spool.append(batch(ids), sync=True)
        if crash.renamed:
            self.spooled |= ids
        self.die(slot)

    def new_ids(self) -> set[str]:
        self.number += 2
        return {f"id-{self.number}", f"id-{self.number + 1}"}

    @precondition(lambda self: self.spools)
    @rule(slot=SLOTS, cleanly=st.booleans())
    def owner_ends(self, slot: int, cleanly: bool) -> None:
        if slot in self.spools and cleanly:
            self.show_hidden()
            self.spools.pop(slot)[0].close()
        elif slot in self.spools:
            self.die(slot)

    def die(self, slot: int) -> None:
        self.show_hidden()  # what a dead owner's folder does not hold is lost, and counted so
        spool, _ = self.spools.pop(slot)
        if spool._lock is not None:
            spool._lock.release()

    # --- committers ---

    @rule()
    def commit(self) -> None:
        self.crash.arm(None)
        while self.commit_once():
            pass

    @rule(slot=SLOTS, step=st.sampled_from(COMMIT_STEPS), passes=st.integers(1, 2), survives=st.booleans())
    def commit_stops(self, slot: int, step: Step, passes: int, survives: bool) -> None:
        """The committer is killed, and another takes over; or it meets an exception, and looks again."""
        self.append(slot, 2, True)
        self.crash.arm(step, passes)
        with contextlib.suppress(SimulatedCrash):
            self.commit_once()
        if not survives:
            self.committer.release()
            self.committer = Committer(self.settings, self.crash)

    def commit_once(self) -> bool:
        """Whether there may be more to commit."""
        if not self.committer.acquire():
            return False
        try:
            return self.committer.commit_once() is not None
        except TableReplacedError:
            return True
        except TableError:
            assert self.is_away
        except SpoolError:
            assert self.hidden
        return False

    # --- what goes wrong ---

    @precondition(lambda self: self.segments())
    @rule(which=st.integers(0, 99), in_two_steps=st.booleans())
    def damage(self, which: int, in_two_steps: bool) -> None:
        segments = self.segments()
        segment = segments[which % len(segments)]
        content = segment.path.read_bytes()
        self.good.setdefault(f"{segment.path.parent.name}-{segment.path.name}", content)
        segment.path.write_bytes(content[: len(content) // 2])
        if in_two_steps:
            self.crash.arm(Step.TOMBSTONE_WRITTEN)
            with contextlib.suppress(SimulatedCrash):
                self.commit_once()

    @rule()
    def repair_and_retry(self) -> None:
        for path in self.root.glob("quarantine/*"):
            path.write_bytes(self.good[path.name])
        if self.root.is_dir():
            retry_quarantined(self.root)

    @precondition(lambda self: self.spools)
    @rule(slot=SLOTS)
    def segment_shows_up_late(self, slot: int) -> None:
        """A listing may show a segment, but not the one before."""
        self.append(slot, 3, False)
        folder = Folder(self.root / str(self.spools[slot][0].spool_id))
        path = folder.segments()[-2].path
        self.hidden.append(path.rename(path.with_suffix(".hidden")))

    @rule()
    def show_hidden(self) -> None:
        for path in self.hidden:
            path.rename(path.with_suffix(".arrow"))
        self.hidden.clear()

    @rule()
    def table_goes_away_or_comes_back(self) -> None:
        source, target = self.log, self.folder / "log-away"
        if self.is_away:
            source, target = target, source
        source.rename(target)
        self.is_away = not self.is_away

    @precondition(lambda self: not self.is_away)
    @rule()
    def table_is_replaced(self) -> None:
        self.show_hidden()
        self.archived |= set(ids_in_table(self.settings))
        shutil.rmtree(self.settings.uri)
        open_or_create_table(self.settings)

    # --- what holds ---

    @invariant()
    def nothing_comes_twice(self) -> None:
        if not self.is_away:
            assert set(ids_in_table(self.settings).values()) <= {1}

    @invariant()
    def what_left_the_spool_is_in_the_table(self) -> None:
        if self.is_away or self.hidden:
            return
        landed = set(ids_in_table(self.settings)) | self.archived
        living = {id(spool) for spool, _ in self.spools.values()}
        for spool, sequence, ids in self.appended:
            if id(spool) not in living:
                continue
            try:
                assert spool.is_pending(sequence) or ids <= landed
            except SegmentError:
                assert self.good, "set aside, but nothing was damaged"

    def teardown(self) -> None:
        if not hasattr(self, "folder"):
            return
        try:
            self.drain()
            found = ids_in_table(self.settings)
            assert set(found.values()) <= {1}
            assert self.spooled <= set(found) | self.archived
            stats = spool_stats(self.root)
            assert (stats.segments, stats.quarantined, folders(self.root)) == (0, 0, [])
        finally:
            folder_module.ABANDONED_SECONDS = self.abandoned
            self.committer.release()
            shutil.rmtree(self.folder)

    def drain(self) -> None:
        if self.is_away:
            self.table_goes_away_or_comes_back()
        for slot in list(self.spools):
            self.die(slot)
        for _ in range(2):
            self.commit()
            self.repair_and_retry()
        self.commit()
        self.commit_once()


TestProtocol = Protocol.TestCase
TestProtocol.settings = settings(
    max_examples=40,
    stateful_step_count=30,
    deadline=None,
    # A failure is shown as it was found: shrinking one takes minutes here.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
