"""Prometheus exposition: an ASGI app that answers with all of tracelake's metrics.

Counters come from this process, or from all workers where ``PROMETHEUS_MULTIPROC_DIR`` is set; what the spool
holds is read from disk at each scrape, so it is the machine's and right whichever worker answers.
"""

import asyncio
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from inference_table.settings import StorageSettings
from inference_table.spool import spool_root, spool_stats

__all__ = ["MetricsApp"]

MULTIPROC_VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"
LIVE_GAUGE_FILE: Final = re.compile(r"gauge_live\w+_(\d+)\.db")


class SpoolCollector(Collector):
    """What the spool of one table holds on this machine."""

    def __init__(self, settings: StorageSettings) -> None:
        self._settings = settings

    def collect(self) -> Iterator[GaugeMetricFamily]:
        stats = spool_stats(spool_root(self._settings))
        age = 0.0 if stats.oldest_unix_seconds is None else max(0.0, time.time() - stats.oldest_unix_seconds)
        for name, text, value in (
            ("tracelake_spool_bytes", "Bytes spooled on this machine, not committed yet.", stats.bytes),
            (
                "tracelake_spool_segments",
                "Segments spooled on this machine, not committed yet.",
                stats.segments,
            ),
            ("tracelake_oldest_uncommitted_seconds", "Age of the oldest row that is not committed yet.", age),
            (
                "tracelake_spool_quarantined",
                "Segments set aside because they can't be read.",
                stats.quarantined,
            ),
        ):
            yield GaugeMetricFamily(name, text, value=value)


class MetricsApp:
    """An ASGI app that serves the metrics, for ``/metrics`` of ``tracelake serve`` or to mount anywhere.

    ``app.mount("/metrics", MetricsApp())`` in FastAPI or Starlette. It needs no capture to be on.

    Args:
        settings: whose spool is reported; from the environment by default.
    """

    def __init__(self, settings: StorageSettings | None = None) -> None:
        self._spool = SpoolCollector(settings or StorageSettings.from_environ())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"MetricsApp answers http only, not {scope['type']!r}")
        body = await asyncio.to_thread(self.render)
        headers = [
            (b"content-type", CONTENT_TYPE_LATEST.encode()),
            (b"content-length", str(len(body)).encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body if scope["method"] != "HEAD" else b""})

    def render(self) -> bytes:
        """The metrics in Prometheus' text format."""
        own = CollectorRegistry()
        own.register(self._spool)
        shared = REGISTRY
        if folder := os.environ.get(MULTIPROC_VARIABLE):
            forget_dead_workers(Path(folder))
            shared = CollectorRegistry()
            MultiProcessCollector(shared, folder)  # type: ignore[no-untyped-call]
        return generate_latest(shared) + generate_latest(own)


def forget_dead_workers(folder: Path) -> None:
    """Drop the live gauges of workers that were killed: they could not do it themselves."""
    for path in folder.glob("gauge_live*.db"):
        if (match := LIVE_GAUGE_FILE.fullmatch(path.name)) and not is_alive(int(match[1])):
            mark_process_dead(int(match[1]), str(folder))  # type: ignore[no-untyped-call]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
