"""The workers of one version: started together, started again when they die, given up in a crash loop.

A worker that dies while the fleet starts for the first time is not started again: the fleet does not start.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from deploy.log_file import tail
from deploy.process import Launcher, WorkerProcess, say
from deploy.registry import Version, VersionState

__all__ = ["Fleet", "StartError"]

CRASH_LOOP_DEATHS: Final = 5
"""Fewer happen to a version that works: a request that kills its worker, and is sent again."""
CRASH_LOOP_SECONDS: Final = 60.0
"""Workers that die as often and served less than this together do no good by being started again."""
PAUSES: Final = (0.0, 0.5, 1.0, 2.0)
"""Seconds before a worker is started again, by how many of the last ones died young."""
TAIL_LINES: Final = 20


class StartError(Exception):
    """The workers of a version did not come up; the message says why."""


class Fleet:
    """The workers of one version.

    Args:
        on_change: called when its state has changed, ``failed`` included.
    """

    def __init__(
        self, version: Version, launcher: Launcher, wait_seconds: float, on_change: Callable[[], None]
    ) -> None:
        self.version = version
        self.state = "starting"
        self.error: str | None = None
        self.invocations = False
        self.restarts = 0
        self.workers: list[WorkerProcess] = []
        self._launcher = launcher
        self._wait_seconds = wait_seconds
        self._on_change = on_change
        self._keepers: set[asyncio.Task[None]] = set()
        self._mode: str | None = None
        self._served: deque[float] = deque(maxlen=CRASH_LOOP_DEATHS)
        """Seconds that each of the last dead workers served."""
        self._turn = 0

    @property
    def live(self) -> list[WorkerProcess]:
        """The workers that take requests."""
        return [worker for worker in self.workers if worker.is_live]

    @property
    def is_over(self) -> bool:
        """Whether none of its processes is left."""
        return not any(worker in self._launcher.alive for worker in self.workers)

    def report(self) -> VersionState:
        return VersionState(
            state=self.state,
            workers=[
                worker.pid for worker in self.workers if worker.ready.done() and not worker.ended.done()
            ],
            restarts=self.restarts,
            invocations=self.invocations,
            error=self.error,
        )

    async def start(self) -> None:
        """Start all workers and wait until they are ready. They take no requests yet.

        Raises:
            StartError: one of them is not ready in time, or died. The others are still there.
        """
        try:
            for _ in range(self.version.workers):
                self.workers.append(self._launcher.start(self.version))
        except OSError as error:
            raise StartError(f"cannot start a worker: {error}") from error
        starts = [asyncio.create_task(worker.up(self._wait_seconds)) for worker in self.workers]
        try:
            for start in asyncio.as_completed(starts):
                if (reason := await start) is not None:
                    raise StartError(reason)
        finally:
            for task in starts:
                task.cancel()
        self.invocations = any(worker.ready.result() for worker in self.workers)

    def serve(self, mode: str) -> None:
        """Let it take requests, and keep it up from now on.

        Args:
            mode: ``accept``, from the listening socket, or ``release``, those that are handed to it.
        """
        self._mode = mode
        for worker in self.live:
            worker.command(mode)
        if self.state == "starting":
            self.state = "serving"
            for worker in self.workers:
                keeper = asyncio.create_task(self._keep(worker))
                self._keepers.add(keeper)
                keeper.add_done_callback(self._kept)

    async def _keep(self, worker: WorkerProcess | None) -> None:
        """Have a worker in the place of this one whenever it dies."""
        while True:
            why = "could not be started"
            if worker is not None:
                await asyncio.wait({worker.leaving})
                # One that leaves on its own account finishes what it answers beside its successor.
                worker.expect_end(self._launcher.drain_seconds)
                self.workers.remove(worker)
                self._served.append(worker.served_seconds)
                why = (
                    f"worker {worker.pid}{f': {worker.failure}' if worker.failure else f' {worker.end_text}'}"
                )
            else:
                self._served.append(0.0)
            say(f"version {self.version.number}: {why}")
            if len(self._served) == CRASH_LOOP_DEATHS and sum(self._served) < CRASH_LOOP_SECONDS:
                self._fail(why)
                return
            self._on_change()
            young = sum(seconds < CRASH_LOOP_SECONDS for seconds in self._served)
            await asyncio.sleep(PAUSES[min(max(young, 1), len(PAUSES)) - 1])
            worker = await self._restarted()

    async def _restarted(self) -> WorkerProcess | None:
        self.restarts += 1
        try:
            worker = self._launcher.start(self.version)
        except OSError as error:
            say(f"version {self.version.number}: cannot start a worker: {error}")
            return None
        self.workers.append(worker)
        reason = await worker.up(self._wait_seconds)
        if reason is None:
            if self._mode is not None:
                worker.command(self._mode)
            self._on_change()
        else:
            worker.failure = reason
            worker.terminate()
            await asyncio.wait({worker.ended})
        return worker

    def _fail(self, why: str) -> None:
        log = self._launcher.logs / f"{self.version.number}.log"
        self.error = (
            f"crash loop: {CRASH_LOOP_DEATHS} workers died that served {sum(self._served):.0f} s together; "
            f"the last: {why}; the end of '{log}':\n{tail(log, TAIL_LINES)}"
        )
        self.state = "failed"
        self._on_change()

    def _kept(self, keeper: "asyncio.Task[None]") -> None:
        self._keepers.discard(keeper)
        if not keeper.cancelled() and (error := keeper.exception()) is not None and self.state == "serving":
            # A mistake of ours must not end the other version with this one.
            self.error = f"the supervisor failed: {type(error).__name__}: {error}"
            self.state = "failed"
            self._on_change()

    def next_worker(self) -> WorkerProcess | None:
        """The worker whose turn it is, one that keeps up if there is any; None where none takes requests."""
        workers = self.live
        if not workers:
            return None
        self._turn += 1
        behind = [workers[(self._turn + place) % len(workers)] for place in range(len(workers))]
        return min(behind, key=lambda worker: worker.channel.waiting)

    def drain(self, seconds: float, idle_seconds: float) -> None:
        """Let its workers finish what they answer, flush and end."""
        self._stop_keeping()
        for worker in self.workers:
            worker.drain(seconds, idle_seconds)

    def abandon(self) -> None:
        """End workers that have answered nothing yet."""
        self._stop_keeping()
        for worker in self.workers:
            worker.terminate()

    def _stop_keeping(self) -> None:
        if self.state != "failed":
            self.state = "draining"
        for keeper in self._keepers:
            keeper.cancel()
