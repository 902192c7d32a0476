"""Recorded requests, sent again to another version of an agent, and its answers beside the recorded ones.

What holds:

- A request is sent as it was recorded, byte for byte, at its time: what is slow to answer holds up no other
  (an open loop), until ``concurrency`` are under way. How late each was is measured.
- A row that can't be sent again is counted by its reason, never guessed at.
- Memory is bounded: rows are read some at a time, and of an answer only what the comparison found is kept.
- An answer that fails is an outcome as any other; the first of Ctrl-C leaves the outcomes so far.
"""

import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING, Any, Final, Protocol

import anyio
import anyio.to_thread
import pyarrow as pa

from deploy.replay_compare import Answer, Outcome, Side, differences, sent_answer
from deploy.replay_rows import REPLAY_OF, REPLAY_RUN, Job, read_jobs
from inference_table.errors import TracelakeError
from inference_table.pending import View, open_view
from inference_table.settings import StorageSettings

if TYPE_CHECKING:
    import httpx

__all__ = ["Plan", "Recorder", "Replay", "Sent", "run"]

RECEIPT: Final = "x-inference-table-durability"
"""A reply with this header was recorded by its server."""
REQUEST_ID: Final = "x-databricks-request-id"
MAX_ANSWER_BYTES: Final = 64 * 1024 * 1024
"""What the table keeps of an answer by default; of a longer one no comparison would be whole."""
MAX_DETAILED: Final = 1000
"""Changed answers of which the differences are kept."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How requests are sent.

    Attributes:
        url: where to.
        run: names this replay, in each row of its answers.
        speed: 1 keeps the recorded spacing, 2 halves it; None sends as fast as ``concurrency`` allows.
        concurrency: requests under way at a time.
        timeout_seconds: for a whole answer.
        headers: sent beside the recorded content type.
        ignored: keys of answers that are not compared.
    """

    url: str
    run: str
    speed: float | None = 1.0
    concurrency: int = 100
    timeout_seconds: float = 120.0
    headers: Mapping[str, str] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Sent:
    """An answer that its server did not record: what a row of it is made of."""

    original_id: str
    run: str
    path: str
    request: bytes
    request_type: str
    status: int
    response: bytes
    response_type: str
    started_unix_ns: int
    ms: float
    first_byte_ms: float


class Recorder(Protocol):
    """Where answers go that their server did not record."""

    def put(self, sent: Sent) -> str:
        """Take an answer over; returns the id of its row."""


@dataclass(slots=True)
class Replay:
    """A replay, while it runs and after.

    Attributes:
        chosen: rows that the query chose; those that can't be sent are counted in ``skipped``, by reason.
        outcomes: in the order in which the answers came.
        under_way: sent, and not answered yet.
        seconds: from the first request to the last answer.
    """

    plan: Plan
    chosen: pa.Table
    skipped: Counter[str] = field(default_factory=Counter)
    outcomes: list[Outcome] = field(default_factory=list)
    under_way: int = 0
    seconds: float = 0.0
    is_interrupted: bool = False
    detailed: int = 0

    @property
    def sendable(self) -> int:
        """How many requests there are to send, as far as is known."""
        return int(self.chosen.num_rows) - sum(self.skipped.values())

    @property
    def recorded_seconds(self) -> float:
        """From the first of the recorded requests to the last."""
        times = self.chosen["request_time"]
        return (times[-1].as_py() - times[0].as_py()).total_seconds() if len(times) else 0.0


def run(
    replay: Replay,
    settings: StorageSettings,
    *,
    pending: bool,
    recorder: Recorder | None = None,
    advance: Callable[[int], object] = lambda _: None,
) -> None:
    """Send the requests and compare the answers; fills ``replay``, also where it is interrupted.

    Args:
        settings: of the table that has the requests.
        recorder: takes answers that the target did not record; None records none.
        advance: called with 1 after each answer.

    Raises:
        TracelakeError: httpx is not installed; the table can't be read.
        KeyboardInterrupt: Ctrl-C.
    """
    view = open_view(settings, pending)
    try:
        anyio.run(Sender(replay, view, recorder, advance).run)
    except KeyboardInterrupt:
        replay.is_interrupted = True
        raise
    except BaseExceptionGroup as group:
        raise first_of(group) from group


def first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What went wrong, without the task groups that it went through."""
    first = group.exceptions[0]
    return first_of(first) if isinstance(first, BaseExceptionGroup) else first


class Sender:
    """One run: a reader in a thread, and a task per request."""

    def __init__(
        self, replay: Replay, view: View, recorder: Recorder | None, advance: Callable[[int], object]
    ) -> None:
        self.replay = replay
        self.plan = replay.plan
        self.view = view
        self.recorder = recorder
        self.advance = advance
        self.slots = anyio.Semaphore(self.plan.concurrency)
        self.began = 0.0

    async def run(self) -> None:
        async with new_client(self.plan) as client, anyio.create_task_group() as group:
            first: float | None = None
            async with self.read_ahead() as jobs:
                async for job in jobs:
                    if first is None:
                        first, self.began = job.offset_seconds, time.perf_counter()
                    await self.start(group, client, job, job.offset_seconds - first)

    @asynccontextmanager
    async def read_ahead(self) -> AsyncIterator[AsyncIterator[Job]]:
        """Jobs in order of time; the next are read while these are sent."""
        batches = read_jobs(self.replay.chosen, self.replay.skipped, self.view)
        send, receive = anyio.create_memory_object_stream[list[Job]](1)

        async def read() -> None:
            async with send:
                while batch := await anyio.to_thread.run_sync(next, batches, None):
                    await send.send(batch)

        async def one_by_one() -> AsyncIterator[Job]:
            async with receive:
                async for batch in receive:
                    for job in batch:
                        yield job

        async with anyio.create_task_group() as group:
            group.start_soon(read)
            yield one_by_one()

    async def start(self, group: Any, client: "httpx.AsyncClient", job: Job, offset: float) -> None:
        late = 0.0
        if self.plan.speed is not None:
            due = self.began + offset / self.plan.speed
            await anyio.sleep(max(0.0, due - time.perf_counter()))
            await self.slots.acquire()
            late = time.perf_counter() - due
        else:
            await self.slots.acquire()
        self.replay.under_way += 1
        group.start_soon(self.send, client, job, late)

    async def send(self, client: "httpx.AsyncClient", job: Job, late: float) -> None:
        outcome = Outcome(job.request_id, job.old, late_seconds=late)
        try:
            await self.ask(client, job, outcome)
        finally:
            self.slots.release()
        self.replay.under_way -= 1
        self.replay.outcomes.append(outcome)
        self.replay.seconds = time.perf_counter() - self.began
        self.advance(1)

    async def ask(self, client: "httpx.AsyncClient", job: Job, outcome: Outcome) -> None:
        import httpx

        # What is no ASCII no server would read alike.
        content_type = (job.content_type or "").encode("ascii", "replace").decode()
        headers = {
            **({"content-type": content_type} if content_type else {}),
            **self.plan.headers,
            f"x-tracelake-{REPLAY_OF.replace('_', '-')}": job.request_id,
            f"x-tracelake-{REPLAY_RUN.replace('_', '-')}": self.plan.run,
        }
        started, started_unix_ns = time.perf_counter(), time.time_ns()
        body = bytearray()
        try:
            with anyio.fail_after(self.plan.timeout_seconds):
                async with client.stream("POST", self.plan.url, content=job.body, headers=headers) as reply:
                    first_byte_ms = 1000 * (time.perf_counter() - started)
                    async for chunk in reply.aiter_bytes():
                        body += chunk
                        if len(body) > MAX_ANSWER_BYTES:
                            outcome.error = f"the answer is longer than {MAX_ANSWER_BYTES >> 20} MiB"
                            return
        except TimeoutError:
            outcome.error = f"no whole answer within {self.plan.timeout_seconds:g} s"
            return
        except httpx.HTTPError as error:
            outcome.error = f"{type(error).__name__}: {error}".removesuffix(": ")
            return
        ms = 1000 * (time.perf_counter() - started)
        response_type = reply.headers.get("content-type", "")
        compare(self.replay, job, outcome, reply.status_code, sent_answer(bytes(body), response_type), ms)
        if RECEIPT in reply.headers:
            outcome.new_id = reply.headers.get(REQUEST_ID)
        elif self.recorder is not None:
            outcome.is_recorded_here = True
            outcome.new_id = self.recorder.put(
                Sent(
                    original_id=job.request_id,
                    run=self.plan.run,
                    path=reply.request.url.path,
                    request=job.body,
                    request_type=job.content_type or "",
                    status=reply.status_code,
                    response=bytes(body),
                    response_type=response_type,
                    started_unix_ns=started_unix_ns,
                    ms=ms,
                    first_byte_ms=first_byte_ms,
                )
            )


def compare(replay: Replay, job: Job, outcome: Outcome, status: int, answer: Answer, ms: float) -> None:
    outcome.new = Side(status, ms, *answer.tokens, calls=answer.calls)
    found = differences(job.answer.value, answer.value, replay.plan.ignored)
    outcome.is_answer_changed = bool(found)
    if found and replay.detailed < MAX_DETAILED:
        replay.detailed += 1
        outcome.differences = found


def new_client(plan: Plan) -> "httpx.AsyncClient":
    try:
        import httpx
    except ModuleNotFoundError as error:
        raise TracelakeError(
            "sending requests needs httpx, which is not installed: pip install 'tracelake[replay]'"
        ) from error

    # A cookie from one reply would tie the next request to it, which nothing tied when it was recorded.
    cookies = CookieJar(DefaultCookiePolicy(allowed_domains=[]))
    # Each has a connection of its own, as users have: one that the server closes, as uvicorn does after an
    # error, would fail the request that was sent on it meanwhile, and keep all requests at one worker.
    limits = httpx.Limits(max_connections=plan.concurrency, max_keepalive_connections=0)
    return httpx.AsyncClient(limits=limits, timeout=plan.timeout_seconds, cookies=cookies)
