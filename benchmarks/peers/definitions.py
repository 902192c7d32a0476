"""The peers: how each is served, set up, and read.

Each has the setting that its documentation recommends for production, which is mostly its default: spans in
batches, sent in the background.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.peers.environments import (
    BENTOML,
    MLFLOW,
    MLFLOW_TRACING,
    OPENTELEMETRY,
    OWN,
    PHOENIX,
    PHOENIX_OTEL,
    Environment,
)
from benchmarks.peers.probes import BentomlLog, DeltaTable, MlflowServer, PhoenixServer, SpanLines, Store
from benchmarks.report import quick

__all__ = ["FLOOR", "PEERS", "Peer", "Server", "Site"]

OFFLINE: Final = {
    "BENTOML_DO_NOT_TRACK": "True",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PHOENIX_ALLOW_EXTERNAL_RESOURCES": "false",
    "PHOENIX_TELEMETRY_ENABLED": "false",
}
"""Nobody calls home."""
WORKERS: Final = 1 if quick() else 4
"""Of MLflow's server: its default, unless there isn't the time to start four."""


@dataclass(frozen=True)
class Site:
    """Where one peer runs.

    Attributes:
        folder: what it writes is in here.
        server_port, second_port: of its server, where it has one.
    """

    folder: Path
    server_port: int
    second_port: int

    @property
    def server_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@dataclass(frozen=True)
class Server:
    """A server that a peer sends its records to.

    Attributes:
        command: the first word is a command of its environment.
        variables: of its environment.
        health: the path that answers 200 once it is up.
    """

    command: tuple[str, ...]
    variables: Mapping[str, str]
    health: str


@dataclass(frozen=True)
class Peer:
    """One line of the comparison.

    Attributes:
        app: module of the app, in ``benchmarks.peers.apps``.
        setting: what a reader should know of how it was set up.
        variables: of the endpoint's environment.
        environment: of the endpoint.
        store: what reads its records; None where there is nothing to read.
        server, server_environment: what it sends its records to, if anything.
        batch_seconds: the longest that it holds records back before it writes them, by its setting.
    """

    name: str
    environment: Environment
    app: str
    setting: str
    variables: Callable[[Site], Mapping[str, str]] = lambda _: {}
    store: Callable[[Site], Store] | None = None
    server: Callable[[Site], Server] | None = None
    server_environment: Environment | None = None
    batch_seconds: float = 0.0

    @property
    def environments(self) -> list[Environment]:
        """All that it needs."""
        return [found for found in (self.environment, self.server_environment) if found]


def captured(site: Site) -> dict[str, str]:
    return {
        "ENABLE_MLFLOW_TRACING": "true",
        "INFERENCE_TABLE_URI": str(site.folder / "payload"),
        "INFERENCE_TABLE_SPOOL_DIR": str(site.folder / "spool"),
    }


def captured_strictly(site: Site) -> dict[str, str]:
    return {**captured(site), "INFERENCE_TABLE_DURABILITY": "strict"}


def delta_table(site: Site) -> Store:
    return DeltaTable(site.folder / "payload")


def as_databricks_serves(_: Site) -> dict[str, str]:
    return {
        "ENABLE_MLFLOW_TRACING": "true",
        "IS_IN_DB_MODEL_SERVING_ENV": "true",
        # MLflow asks for it at each span, and never calls it here.
        "MLFLOW_TRACKING_URI": "databricks",
    }


def mlflow_server(site: Site) -> Server:
    return Server(
        (
            "mlflow",
            "server",
            "--backend-store-uri",
            f"sqlite:///{site.folder}/mlflow.db",
            "--artifacts-destination",
            f"{site.folder}/artifacts",
            "--port",
            str(site.server_port),
            "--workers",
            str(WORKERS),
        ),
        # Its jobs score traces and the like; a kill would leave their files behind in /dev/shm.
        {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        "/health",
    )


def phoenix_server(site: Site) -> Server:
    return Server(
        ("phoenix", "serve"),
        {
            "PHOENIX_HOST": "127.0.0.1",
            "PHOENIX_PORT": str(site.server_port),
            "PHOENIX_GRPC_PORT": str(site.second_port),
            "PHOENIX_WORKING_DIR": str(site.folder),
        },
        "/healthz",
    )


FLOOR: Final = Peer("floor", OWN, "floor", "the agent alone: nothing makes spans, nothing is recorded")
# Those with a server come last: they take longest, and time may run out.
PEERS: Final = (
    Peer(
        "tracelake",
        OWN,
        "tracelake",
        "defaults: relaxed, a commit per second",
        captured,
        delta_table,
        batch_seconds=1.0,
    ),
    Peer(
        "tracelake strict",
        OWN,
        "tracelake",
        "INFERENCE_TABLE_DURABILITY=strict: the reply leaves once its record is fsynced",
        captured_strictly,
        delta_table,
        batch_seconds=1.0,
    ),
    Peer(
        "mlflow inference table",
        MLFLOW,
        "mlflow_inference_table",
        "MLflow's InferenceTableSpanExporter as Databricks' servers use it, pop_trace before each reply; "
        "what writes the table there is not open, so the trace is dropped and there is nothing to read",
        as_databricks_serves,
    ),
    Peer(
        "bentoml monitor",
        BENTOML,
        "bentoml_monitor",
        "`bentoml.monitor` with its default monitor, a file: request, response, and the trace of "
        "OpenTelemetry spans as JSON",
        lambda site: {"PEER_FOLDER": str(site.folder)},
        lambda site: BentomlLog(site.folder / "payload" / "data" / "data.0.log"),
    ),
    Peer(
        "opentelemetry",
        OPENTELEMETRY,
        "opentelemetry_batch",
        "BatchSpanProcessor at its defaults (a batch every 5 s or 512 spans) and, in the process, the SDK's "
        "ConsoleSpanExporter into a file: a line of JSON per span",
        lambda site: {"PEER_FOLDER": str(site.folder)},
        lambda site: SpanLines(site.folder / "spans.jsonl"),
        batch_seconds=5.0,
    ),
    Peer(
        "phoenix",
        PHOENIX_OTEL,
        "phoenix",
        "`phoenix serve` on SQLite; in the endpoint arize-phoenix-otel with `register(batch=True)`, which is "
        "OTLP over HTTP with a batch every 5 s or 512 spans",
        lambda site: {"PHOENIX_COLLECTOR_ENDPOINT": site.server_url},
        lambda site: PhoenixServer(site.server_url),
        phoenix_server,
        PHOENIX,
        batch_seconds=5.0,
    ),
    Peer(
        "mlflow server",
        MLFLOW_TRACING,
        "mlflow_server",
        f"`mlflow server` on SQLite with {WORKERS} workers and no job runner; in the endpoint the light SDK, "
        "its batch span processor and asynchronous logging at their defaults",
        lambda site: {"MLFLOW_TRACKING_URI": site.server_url},
        lambda site: MlflowServer(site.server_url),
        mlflow_server,
        MLFLOW,
        batch_seconds=5.0,
    ),
)
