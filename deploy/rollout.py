"""Carrying out a change of an endpoint, so that no client sees a failed request.

What holds:

- New workers are ready before the first connection goes to them, and only then old ones are drained.
- From that moment on a change is carried out without a pause: it is whole, or it has not begun.
- A change that fails, or is overtaken by a newer one, ends its own workers and touches no other.
- Workers of a version that stays are never started again for a change.
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from deploy.fleet import Fleet, StartError
from deploy.process import Launcher, say
from deploy.registry import Endpoint, EndpointFolder, State, VersionState
from deploy.splitter import Splitter
from inference_table.errors import DeploymentError

__all__ = ["Rollout"]

IDLE_SECONDS: Final = 10.0
"""When a replaced worker closes connections that rest: later than uvicorn does after a reply, as a client may
have connected ahead of its first request."""
LAST_IDLE_SECONDS: Final = 1.0
"""The same where the endpoint stops: nobody will answer what comes later."""


class Rollout:
    """What runs, and the change that is being carried out.

    Args:
        bound: host, port and admin port that are listened on.
        on_change: called, once per turn of the event loop, when there is something new to report.
    """

    def __init__(
        self,
        folder: EndpointFolder,
        launcher: Launcher,
        splitter: Splitter,
        bound: tuple[str, int, int | None],
        on_change: Callable[[], None],
    ) -> None:
        self.is_over = False
        """Whether nothing runs any more, nor will."""
        self._folder = folder
        self._launcher = launcher
        self._splitter = splitter
        self._bound = bound
        self._on_change = on_change
        self._fleets: dict[str, Fleet] = {}
        self._starting: dict[str, Fleet] = {}
        self._leaving: list[Fleet] = []
        self._failures: dict[str, VersionState] = {}
        self._traffic: dict[str, int] = {}
        self._generation = self._asked = 0
        self._error: str | None = None
        self._change: asyncio.Task[None] | None = None
        self._settling = False
        launcher.on_end = self._touch

    def report(self, state: State) -> State:
        """The state, with what runs filled in."""
        fleets = [*self._leaving, *self._starting.values(), *self._fleets.values()]
        versions = {
            fleet.version.number: fleet.report()
            for fleet in fleets
            if fleet.state in {"starting", "serving"} or not fleet.is_over
        }
        return replace(
            state,
            generation=self._generation,
            traffic=self._traffic,
            versions=dict(sorted({**versions, **self._failures}.items())),
            error=self._error,
        )

    @property
    def is_serving(self) -> bool:
        return bool(self._fleets)

    def begin(self, endpoint: Endpoint) -> None:
        """Carry out what is wanted from now on; what was wanted before is given up."""
        if self._change is not None:
            self._change.cancel()
        self._asked = endpoint.generation
        self._change = asyncio.create_task(self._carry_out(endpoint))
        self._change.add_done_callback(self._carried_out)

    async def _carry_out(self, endpoint: Endpoint) -> None:
        wanted = {number: percent for number, percent in endpoint.traffic.items() if percent > 0}
        self._launcher.drain_seconds = endpoint.drain_seconds
        new: dict[str, Fleet] = {}
        try:
            self._check_address(endpoint)
            new = self._starting = {
                number: self._fleet(number, endpoint) for number in wanted if number not in self._fleets
            }
            self._touch()
            await start_all(list(new.values()))
            if gone := wanted.keys() - new.keys() - self._fleets.keys():
                raise StartError(f"version {min(gone)} failed meanwhile")
        except (StartError, DeploymentError) as error:
            self._give_up(endpoint.generation, wanted, new, str(error))
        except BaseException:  # overtaken by a newer change; or a mistake of ours
            for fleet in new.values():
                fleet.abandon()
            raise
        else:
            self._commit(endpoint, wanted, new)

    def _commit(self, endpoint: Endpoint, wanted: dict[str, int], new: dict[str, Fleet]) -> None:
        before, self._starting = self._fleets, {}
        self._fleets = {number: before.get(number) or new[number] for number in wanted}
        self._route(wanted)
        for number in before.keys() - wanted.keys():
            before[number].drain(endpoint.drain_seconds, IDLE_SECONDS)
            self._leaving.append(before[number])
        self._failures, self._error, self._generation = {}, None, endpoint.generation
        self._touch()

    def _give_up(self, generation: int, wanted: dict[str, int], new: dict[str, Fleet], why: str) -> None:
        self._failures = {number: fleet.report() for number, fleet in new.items() if fleet.error}
        self._starting, self._error, self._generation = {}, why, generation
        say(f"generation {generation} is given up: {why}")
        for fleet in new.values():
            fleet.abandon()
        if not self._fleets:
            self._traffic, self.is_over = wanted, True
        self._touch()

    def _carried_out(self, change: "asyncio.Task[None]") -> None:
        if not change.cancelled() and (error := change.exception()) is not None:
            # A mistake of ours: what serves goes on, and the deployer hears of it.
            self._starting, self._generation = {}, self._asked
            self._error = f"the supervisor failed: {type(error).__name__}: {error}"
            self.is_over = not self._fleets
            self._touch()

    def _check_address(self, endpoint: Endpoint) -> None:
        host, port, admin_port = self._bound
        asked = (endpoint.host, endpoint.port or port, endpoint.admin_port or admin_port)
        if asked != self._bound or (endpoint.admin_port is None) != (admin_port is None):
            raise DeploymentError(
                f"cannot move endpoint {endpoint.name!r} from {host} port {port}, admin port {admin_port}, "
                f"to {asked[0]} port {asked[1]}, admin port {endpoint.admin_port}, while it runs; stop it, "
                "and deploy it again"
            )

    def _fleet(self, number: str, endpoint: Endpoint) -> Fleet:
        version = self._folder.version(number)
        if version is None:
            raise StartError(f"there is no version {number} in '{self._folder.versions}'")
        return Fleet(version, self._launcher, endpoint.wait_seconds, self._touch)

    def _route(self, percents: dict[str, int]) -> None:
        self._traffic = percents
        if len(self._fleets) == 1:
            (only,) = self._fleets.values()
            only.serve("accept")
            self._splitter.stop(only)
            return
        for fleet in self._fleets.values():
            fleet.serve("release")
        self._splitter.start(self._fleets, percents)

    def _touch(self) -> None:
        if not self._settling:
            self._settling = True
            asyncio.get_running_loop().call_soon(self._settle)

    def _settle(self) -> None:
        self._settling = False
        for number in [number for number, fleet in self._fleets.items() if fleet.state == "failed"]:
            self._drop(number)
        self._leaving = [fleet for fleet in self._leaving if not fleet.is_over]
        self._on_change()

    def _drop(self, number: str) -> None:
        """A version is in a crash loop: the other one takes all, where there is one."""
        fleet = self._fleets.pop(number)
        self._failures[number] = fleet.report()
        self._error = f"version {number}: {fleet.error}"
        say(self._error)
        fleet.drain(self._launcher.drain_seconds, IDLE_SECONDS)
        left = {other: percent for other, percent in self._traffic.items() if other in self._fleets}
        if left:
            self._route(left if len(left) > 1 else dict.fromkeys(left, 100))
        elif self._change is None or self._change.done():
            self.is_over = True

    def drain(self, endpoint: Endpoint) -> None:
        """Take nothing more; let all workers finish what they answer, flush and end."""
        if self._change is not None:
            self._change.cancel()
        for fleet in self._fleets.values():
            fleet.drain(endpoint.drain_seconds, LAST_IDLE_SECONDS)
        self._splitter.close()
        self._generation = endpoint.generation

    async def ended(self) -> None:
        """Wait until no worker is left."""
        await asyncio.sleep(0)  # a change that was given up just now ends its workers first
        while ends := {worker.ended for worker in self._launcher.alive}:
            await asyncio.wait(ends)


async def start_all(fleets: list[Fleet]) -> None:
    """Start fleets side by side.

    Raises:
        StartError: one of them doesn't come up; the message names it.
    """
    starts = {asyncio.create_task(fleet.start()): fleet for fleet in fleets}
    try:
        for start, fleet in starts.items():
            try:
                await start
            except StartError as error:
                fleet.error, fleet.state = str(error), "failed"
                raise StartError(f"version {fleet.version.number} did not start: {error}") from error
    finally:
        for start in starts:
            start.cancel()
