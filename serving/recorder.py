"""Begins an exchange for each captured request, and runs the app inside it."""

import asyncio
import random
from collections.abc import Awaitable, Callable, MutableMapping
from time import perf_counter_ns
from typing import Any, Final

from inference_table import metrics
from inference_table.ids import uuid7
from inference_table.record import wants_trace
from inference_table.settings import Durability, StorageSettings, parse_durability
from inference_table.writer import Writer
from serving import tracing
from serving.border import Border
from serving.encode import RowEncoder
from serving.exchange import DURABILITY_HEADER, Exchange, Receive, Send, header_text
from serving.redaction import Redact
from serving.replies import DurableReply, TraceReply, refuse
from serving.settings import CaptureSettings

__all__ = ["App", "Recorder", "Scope"]

Scope = MutableMapping[str, Any]
App = Callable[[Any, Any, Any], Awaitable[None]]

CAPTURED_KEY: Final = "tracelake.captured"
"""Marks a scope, so that a request passing two of our middlewares makes one row."""
BYTES_ONLY: Final = frozenset({"http.response.pathsend", "http.response.zerocopysend"})
"""ASGI extensions by which a reply's body would pass us unseen."""
CANCELLED_SECONDS: Final = 1.0
"""How long requests of a stopping server are waited for: it has cancelled them, so they are about to end."""
BEGIN: Final = Border("begin")
TRACING: Final = Border("tracing")
FINISH: Final = Border("finish")


class Recorder:
    """Captures requests with one set of options. Its writer runs in the background of this process.

    Args:
        settings: which requests, and what clients may ask for.
        storage: where rows go.
        redact: see :mod:`serving.redaction`.
    """

    def __init__(
        self, settings: CaptureSettings, storage: StorageSettings, redact: Redact | None = None
    ) -> None:
        self.settings = settings
        self.storage = storage
        self.writer = Writer(storage)
        self._encoder = RowEncoder(settings, storage.max_payload_bytes, redact)
        self._running = 0
        self._draw = random.Random()  # not the agent's: random.seed() there must not choose our sample

    def start(self) -> None:
        """Check spool and table, install trace collection and start the writer.

        Raises:
            SpoolError: the spool can't be used.
            TableError: the table can't be reached, created or written to.
        """
        self.writer.check()
        tracing.ensure_installed()
        self.writer.start()

    async def close(self) -> None:
        """Take what is still running, and flush.

        Servers cancel requests that outlast their patience, and tell of the shutdown before those have ended.
        """
        waited = perf_counter_ns() + int(CANCELLED_SECONDS * 1e9)
        while self._running and perf_counter_ns() < waited:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(self.writer.close)

    def captures(self, scope: Scope) -> bool:
        """Whether a request is to be recorded."""
        return CAPTURED_KEY not in scope and self.settings.paths.match(scope["method"], scope["path"])

    async def __call__(self, app: App, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app for one request that is captured."""
        started = perf_counter_ns()
        durability = self._durability(scope)
        if durability is Durability.RELAXED and self._draw.random() >= self.settings.sampling_fraction:
            metrics.SAMPLED_OUT.inc()
            await run_within(tracing.SKIPPED, app, scope, receive, send)
            return
        exchange: Exchange | None = None
        with TRACING:
            tracing.ensure_installed()
        with BEGIN:
            exchange = self._begin(scope, receive, send, durability)
            mark(scope)
            exchange.overhead_ns = perf_counter_ns() - started
        if exchange is not None:
            await self._run(exchange, app, scope)
        elif durability is Durability.RELAXED:
            await app(scope, receive, send)
        else:
            metrics.DURABILITY_FAILURES.labels("error").inc()
            await refuse(send, "the request could not be captured; the server's log says why")

    async def _run(self, exchange: Exchange, app: App, scope: Scope) -> None:
        gate = exchange.gate
        self._running += 1
        try:
            await run_within(exchange.traces, app, scope, exchange.receive, exchange.send)
        except BaseException as error:
            exchange.failed(error)
            if gate is not None and isinstance(error, Exception):
                with FINISH:
                    await gate.fail()
            raise
        else:
            if gate is not None and exchange.is_cut_off:
                with FINISH:
                    await gate.fail()
            if gate is not None:
                await gate.ended()
        finally:
            exchange.app_returned = True
            with FINISH:
                exchange.finish()
            self._running -= 1

    def _begin(self, scope: Scope, receive: Receive, send: Send, durability: Durability) -> Exchange:
        request_id = uuid7()
        parent = header(scope, b"traceparent") if self.settings.trust_traceparent else None
        exchange = Exchange(
            scope,
            receive,
            send,
            request_id=request_id,
            traces=tracing.RequestTraces(request_id, parent=parent),
            durability=durability,
            limit=self.storage.max_payload_bytes,
            grace_seconds=self.settings.trace_grace_seconds,
            budget=self.writer.budget,
            hand_over=self.writer.put,
            encode=self._encoder.encode,
        )
        if durability is not Durability.RELAXED:
            put, timeout = self.writer.put_durable, self.storage.strict_timeout_seconds
            exchange.gate = exchange.reply = DurableReply(exchange, exchange.transmit, put, timeout)
        if self.settings.allow_return_trace:
            exchange.reply = TraceReply(
                exchange,
                exchange.reply,
                wanted=lambda: wants_trace(b"".join(exchange.request.chunks)),
                output=lambda: self._encoder.output(exchange),
            )
        return exchange

    def _durability(self, scope: Scope) -> Durability:
        if self.settings.allow_durability_header and (asked := header(scope, DURABILITY_HEADER)):
            try:
                return parse_durability(asked)
            except ValueError:
                return self.storage.durability  # the reply's header tells the client what it got
        return self.storage.durability


def header(scope: Scope, name: bytes) -> str | None:
    for key, value in scope["headers"]:
        if key == name:
            return header_text(value)
    return None


def mark(scope: Scope) -> None:
    """Mark a scope as captured, and take out the extensions that would hide a body.

    In place, as routing does it: outer middlewares read there what inner ones found out.
    """
    scope[CAPTURED_KEY] = True
    if extensions := scope.get("extensions"):
        scope["extensions"] = {name: value for name, value in extensions.items() if name not in BYTES_ONLY}


async def run_within(
    traces: tracing.RequestTraces, app: App, scope: Scope, receive: Receive, send: Send
) -> None:
    """Run the app with its spans going to ``traces``."""
    token = tracing.CURRENT.set(traces)
    try:
        await app(scope, receive, send)
    finally:
        tracing.CURRENT.reset(token)
