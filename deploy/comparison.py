"""One agent with and without capture, sent the same requests in turn, and what came of it."""

import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter_ns
from typing import Final

from deploy.bench import Endpoint, endpoint, interleaved
from inference_table.errors import SettingsError, TableNotFoundError, TracelakeError
from inference_table.settings import ENV_PREFIX
from inference_table.table import InferenceTable
from serving.settings import settings_from

__all__ = ["Body", "Comparison", "Plan", "Recorded", "Reply", "compare", "read_bodies"]

ID_HEADER: Final = "x-databricks-request-id"
OWN_SETTINGS: Final = ("spool_dir", "storage_options", "uri")
PROBLEM_CHARACTERS: Final = 500
"""Of a reply that is an error: enough to say why, and no page of HTML."""
SETTLE_SECONDS: Final = 10.0
"""Beyond the pause between commits: rows wait a second for open spans, and a commit may take one."""
POLL_SECONDS: Final = 0.2


@dataclass(frozen=True)
class Body:
    """The body of a request, sent byte for byte, and where it was read."""

    content: bytes
    source: str


def read_bodies(paths: Sequence[Path]) -> list[Body]:
    """The bodies in files: one in a file, or one in each line of a ``.jsonl`` file.

    Raises:
        SettingsError: a file can't be read, or what it holds is not JSON.
    """
    bodies = [body for path in paths for body in bodies_of(path)]
    for body in bodies:
        try:
            json.loads(body.content)
        except ValueError as error:
            raise SettingsError(
                f"the request in {body.source} is not JSON: {error}; give a file with one JSON value, or a "
                ".jsonl file with one in each line"
            ) from error
    return bodies


def bodies_of(path: Path) -> list[Body]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SettingsError(f"cannot read the request '{path}': {error.strerror}") from error
    if path.suffix != ".jsonl":
        return [Body(content, f"'{path}'")]
    lines = enumerate(content.split(b"\n"), 1)
    bodies = [Body(line.strip(), f"line {number} of '{path}'") for number, line in lines if line.strip()]
    if not bodies:
        raise SettingsError(f"there is no request in '{path}': write one JSON value in each line")
    return bodies


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be sent.

    Attributes:
        bodies: sent one after the other, over and over, to both servers.
        requests: to each server, beside those that warm it up; rounded up to whole rounds.
        concurrency: requests of a round, sent at once to one server, while the other one rests.
        pause_seconds: between two rounds.
        headers: names in lower case; beside ``content-type: application/json``, unless they have one.
        settings: of capture and storage, by their field names.
    """

    target: str
    bodies: Sequence[Body]
    path: str = "/invocations"
    headers: Mapping[str, str] = field(default_factory=dict)
    requests: int = 200
    warm_up: int = 20
    concurrency: int = 1
    pause_seconds: float = 0.05
    settings: Mapping[str, str] = field(default_factory=dict)
    app_dir: str = "."

    def __post_init__(self) -> None:
        if not self.path.startswith("/") or self.path.startswith("//"):
            raise SettingsError(
                f"the path is {self.path!r}: give one that begins with /, such as /invocations"
            )
        for name in OWN_SETTINGS:
            if name in self.settings:
                raise SettingsError(
                    f"cannot set {name}: a measuring run has a table and a spool of its own, in the folder "
                    "for temporary files, which TMPDIR names"
                )
        settings_from(self.settings)

    @property
    def rounds(self) -> int:
        return -(-self.requests // self.concurrency)

    @property
    def warm_up_rounds(self) -> int:
        return -(-self.warm_up // self.concurrency)

    @property
    def measured(self) -> int:
        """Requests to each server of which the time is taken."""
        return self.rounds * self.concurrency

    @property
    def sent(self) -> int:
        """Requests to each server."""
        return self.measured + self.warm_up_rounds * self.concurrency

    @property
    def environment(self) -> dict[str, str]:
        return {f"{ENV_PREFIX}{name.upper()}": value for name, value in self.settings.items()}


@dataclass(frozen=True)
class Reply:
    """What came back for one request; times are milliseconds from before it was sent."""

    body: int
    """Index of the plan's body."""
    status: int | None
    """None where the connection broke."""
    first_byte_ms: float
    total_ms: float
    is_stream: bool
    """Whether its length was not known when it began."""
    request_id: str | None
    """Key of its row, if it was captured."""
    problem: str
    """The beginning of a reply that is not 2xx, or why there is none."""

    @property
    def is_success(self) -> bool:
        return self.status is not None and 200 <= self.status < 300

    @property
    def is_servers_fault(self) -> bool:
        """Whether the server's log may say why."""
        return self.status is None or self.status >= 500

    def __str__(self) -> str:
        return f"{'no reply' if self.status is None else self.status} {self.problem!r}"


@dataclass(frozen=True)
class Recorded:
    """What the table has of one request."""

    capture_overhead_us: int
    trace_bytes: int
    """Of ``databricks_output``: the trace as JSON, with further ones if there are."""
    span_count: int


@dataclass(frozen=True)
class Comparison:
    """What came of a plan. Pairs of figures are without capture, with capture.

    Attributes:
        pairs: replies to the same body, sent one shortly after the other.
        captured: ids of all requests that capture took, those that warmed up among them.
        recorded: by request id, the rows of the table in the end.
        cpu_seconds: of the requests that were measured, until their rows were in the table.
        rss_bytes: after that.
        last_words: the last line that each server wrote.
    """

    plan: Plan
    pairs: list[tuple[Reply, Reply]]
    captured: list[str]
    recorded: dict[str, Recorded]
    cpu_seconds: tuple[float, float]
    rss_bytes: tuple[float, float]
    last_words: tuple[str, str]

    @property
    def good(self) -> list[tuple[Reply, Reply]]:
        """Pairs of which both replies are 2xx: those that figures are made of."""
        return [(one, other) for one, other in self.pairs if one.is_success and other.is_success]


def compare(plan: Plan, folder: Path, progress: Callable[[int], None] = lambda _: None) -> Comparison:
    """Serve the agent twice, send the requests, and read what was recorded.

    Args:
        folder: for the tables and spools; must be there.
        progress: called when requests have been answered, with their number.

    Raises:
        TracelakeError: the agent doesn't start, or gives no 2xx while it is warmed up.
    """
    try:
        plain, captured = run(plan, folder, progress)
    except NoSuccessError as error:
        # Not before the servers have ended: the reply to a request may come before the line that says why.
        words = error.caller.served.last_words() if error.reply.is_servers_fault else ""
        raise TracelakeError(f"{error}; its last words: {words}" if words else str(error)) from error
    return Comparison(
        plan=plan,
        pairs=list(zip(plain.measured, captured.measured, strict=True)),
        captured=captured.ids,
        recorded=recorded(captured.served.table),
        cpu_seconds=(plain.cpu_seconds, captured.cpu_seconds),
        rss_bytes=(plain.rss_bytes, captured.rss_bytes),
        last_words=(plain.served.last_words(), captured.served.last_words()),
    )


def run(plan: Plan, folder: Path, progress: Callable[[int], None]) -> "tuple[Caller, Caller]":
    """Send all requests, without and with capture.

    Raises:
        NoSuccessError: a request that warms up gets no 2xx.
    """
    with ExitStack() as stack:
        # Left last, when the servers are gone: threads may wait for a reply until then.
        pool = stack.enter_context(ThreadPoolExecutor(plan.concurrency))
        plain, captured = (
            Caller(plan, stack.enter_context(serve(plan, folder, capture=capture)), pool, progress, capture)
            for capture in (False, True)
        )
        interleaved(plain, captured, count=plan.warm_up_rounds, warm_up=0, pause_seconds=plan.pause_seconds)
        settle(captured)
        for caller in (plain, captured):
            caller.begin()
        interleaved(plain, captured, count=plan.rounds, warm_up=0, pause_seconds=plan.pause_seconds)
        settle(captured)
        for caller in (plain, captured):
            caller.end()
    return plain, captured


class Caller:
    """Sends the rounds of a plan to one of the servers."""

    def __init__(
        self,
        plan: Plan,
        served: Endpoint,
        pool: ThreadPoolExecutor,
        progress: Callable[[int], None],
        capture: bool,
    ) -> None:
        self.plan = plan
        self.served = served
        self.replies: list[Reply] = []
        self.cpu_seconds = 0.0
        """Of the server, for what is measured."""
        self.rss_bytes = 0.0
        self._is_warming_up = True
        self._pool = pool
        self._progress = progress
        self.where = f"{'with' if capture else 'without'} capture"
        self._headers = {"content-type": "application/json", **plan.headers}
        self._bodies = itertools.cycle(range(len(plan.bodies)))

    @property
    def ids(self) -> list[str]:
        return [reply.request_id for reply in self.replies if reply.request_id is not None]

    @property
    def measured(self) -> list[Reply]:
        return self.replies[-self.plan.measured :]

    def begin(self) -> None:
        """What comes now is measured."""
        self._is_warming_up = False
        self.cpu_seconds = -self.served.cpu_seconds()

    def end(self) -> None:
        self.cpu_seconds += self.served.cpu_seconds()
        self.rss_bytes = self.served.rss_bytes()

    def __call__(self) -> None:
        """One round."""
        bodies = list(itertools.islice(self._bodies, self.plan.concurrency))
        replies = list(self._pool.map(self._send, bodies))
        self.replies += replies
        self._progress(len(replies))
        failed = next((reply for reply in replies if not reply.is_success), None)
        if failed is not None and self._is_warming_up:
            raise NoSuccessError(self, failed)

    def _send(self, body: int) -> Reply:
        import httpx

        first, stream, status, request_id, problem = 0, False, None, None, b""
        content = self.plan.bodies[body].content
        started = perf_counter_ns()
        try:
            with self.served.client.stream(
                "POST", self.plan.path, content=content, headers=self._headers
            ) as reply:
                for chunk in reply.iter_raw():
                    first = first or perf_counter_ns()
                    if not reply.is_success and len(problem) < PROBLEM_CHARACTERS:
                        problem += chunk
                ended = perf_counter_ns()
                if reply.is_server_error:
                    # uvicorn leaves a connection without a word once an app has raised.
                    reply.extensions["network_stream"].close()
            status, request_id = reply.status_code, reply.headers.get(ID_HEADER)
            stream = "content-length" not in reply.headers
        except httpx.TransportError as error:
            ended = perf_counter_ns()
            problem = f"{type(error).__name__}: {error}".encode()
        return Reply(
            body=body,
            status=status,
            first_byte_ms=((first or ended) - started) / 1e6,
            total_ms=(ended - started) / 1e6,
            is_stream=stream,
            request_id=request_id,
            problem=problem.decode(errors="replace")[:PROBLEM_CHARACTERS],
        )


class NoSuccessError(Exception):
    """A request that warms up gets no 2xx."""

    def __init__(self, caller: Caller, reply: Reply) -> None:
        self.caller = caller
        self.reply = reply
        source = caller.plan.bodies[reply.body].source
        super().__init__(
            f"{caller.where}, the agent's answer to the request in {source} is {reply}; see whether "
            "--request, --path and --header are what it takes"
        )


def serve(plan: Plan, folder: Path, *, capture: bool) -> AbstractContextManager[Endpoint]:
    return endpoint(plan.target, folder, capture=capture, environment=plan.environment, app_dir=plan.app_dir)


def settle(caller: Caller) -> None:
    """Wait until what was captured so far is in the table: that work belongs to the requests before it."""
    _, storage = settings_from(caller.plan.settings)
    table = InferenceTable(caller.served.table, spool_dir=caller.served.spool)
    deadline = time.monotonic() + storage.flush_seconds + SETTLE_SECONDS
    while count_rows(table) < len(caller.ids) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def count_rows(table: InferenceTable) -> int:
    try:
        return table.count()
    except TableNotFoundError:
        return 0


def recorded(table: Path) -> dict[str, Recorded]:
    """The rows of a table, by request id."""
    try:
        found = InferenceTable(table).query(
            "select databricks_request_id, capture_overhead_us, span_count,"
            " strlen(response->'$.databricks_output') as trace_bytes from payload"
        )
    except TableNotFoundError:
        return {}
    return {
        row["databricks_request_id"]: Recorded(
            capture_overhead_us=row["capture_overhead_us"] or 0,
            trace_bytes=row["trace_bytes"] or 0,
            span_count=row["span_count"] or 0,
        )
        for row in found
    }
