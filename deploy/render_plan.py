"""What is to run elsewhere, and what the files of all kinds say of it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Final

from deploy.quoting import one_line
from inference_table.errors import DeploymentError
from inference_table.settings import StorageSettings

__all__ = ["RenderPlan", "common", "health", "secret_lines", "template", "tracelake_version"]

CLOSE_SECONDS: Final = 15
"""Deadline of the writer's clean stop: inference_table/writer.py."""
DRAIN_SECONDS: Final = 60
"""For what is being answered at SIGTERM: as much as ``deploy()`` gives by default."""
MARGIN_SECONDS: Final = 15
"""For all else: Python's end, a slow disk."""
GIB: Final = 1 << 30
USER_ID: Final = 10001
"""None of the system's users."""
STATE: Final = "/var/lib/tracelake"
"""Of a container: spool, and a local table."""
KEYS: Final = "api-keys"
LOCAL: Final = frozenset({"127.0.0.1", "::1", "localhost"})
VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
HEALTH: Final = (
    "import http.client as h, sys; c = h.HTTPConnection('127.0.0.1', {port}, timeout=4);"
    " c.request('GET', '/health'); s = c.getresponse().status; sys.exit({failed})"
)


@dataclass(frozen=True, kw_only=True)
class RenderPlan:
    """What is to run elsewhere.

    Raises:
        DeploymentError: a name or a value can't be passed to a process.
    """

    endpoint_name: str
    agent: str
    """An import string within ``working_dir``, or the URI of an MLflow model."""
    table: str
    """A local one is put beside the spool there; Kubernetes needs one on an object store."""
    workers: int = 1
    host: str = "127.0.0.1"
    """Where the machine listens. In a container the server listens on all addresses, this is what is
    published; a pod has its Service."""
    port: int = 8000
    admin_port: int = 8001
    admin_host: str = "127.0.0.1"
    """Another than the default is passed as ``--admin-host``, and makes Prometheus' annotations true."""
    durability: str = "relaxed"
    secrets: tuple[str, ...] = ()
    """Names of environment variables; their values are filled in by the operator."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Names and values of those that are no secrets."""
    api_key_file: str | None = None
    """Where it is here, for the comment that says how to take it there; None without API keys."""
    replicas: int = 1
    image: str | None = None
    """By default the endpoint's name, with the tag ``1``."""
    working_dir: Path | None = None
    """The agent's folder; its ``requirements.txt`` is installed if it has one. None for a model."""
    install_dir: str | None = None
    """Of systemd: code and virtual environment. By default ``/opt/<endpoint name>``."""
    spool_bytes: int = 8 * GIB
    python_version: str = "3.12"
    storage_class: str | None = None
    description: str | None = None

    def __post_init__(self) -> None:
        names = [*self.secrets, *self.environment]
        bad = sorted({name for name in names if VARIABLE.fullmatch(name) is None or names.count(name) > 1})
        if bad:
            raise DeploymentError(
                f"cannot render the environment variables {', '.join(map(repr, bad))}: give each once, as a "
                "secret or with a value, with letters, digits and _"
            )
        texts = [self.agent, self.table, self.description or "", self.image or "", *self.environment.values()]
        for text in texts:
            if "\0" in text or text != text.encode("utf-8", "replace").decode():
                raise DeploymentError(f"cannot render {text!r}: it has a NUL or is no UTF-8; give other text")

    @property
    def is_model(self) -> bool:
        """Whether the agent is an MLflow model."""
        return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:/", self.agent) is not None

    @property
    def extra(self) -> str:
        """What tracelake is installed with."""
        return "[mlflow]" if self.is_model else ""

    @property
    def image_name(self) -> str:
        return self.image or f"{self.endpoint_name.lower()}:1"

    @property
    def requirements(self) -> bool:
        return self.working_dir is not None and (self.working_dir / "requirements.txt").is_file()

    def table_in(self, state: str) -> str:
        """The table, where a local one is in the folder ``state``."""
        settings = StorageSettings(uri=self.table)
        return str(PurePosixPath(state) / "payload") if settings.is_local else settings.uri

    def serve(self, host: str) -> list[str]:
        """The arguments of ``tracelake`` that serve the agent."""
        arguments = ["serve", "--host", host, "--port", str(self.port), "--workers", str(self.workers)]
        arguments += ["--admin-port", str(self.admin_port)]
        if self.admin_host not in LOCAL:
            arguments += ["--admin-host", self.admin_host]
        return [*arguments, "--", self.agent]

    def settings(self, state: str) -> dict[str, str]:
        """Environment variables of the server and of a drain."""
        return {
            "ENABLE_MLFLOW_TRACING": "true",
            "INFERENCE_TABLE_URI": self.table_in(state),
            "INFERENCE_TABLE_SPOOL_DIR": f"{state}/spool",
            "INFERENCE_TABLE_MAX_SPOOL_BYTES": str(self.spool_bytes),
            "INFERENCE_TABLE_DURABILITY": self.durability,
            "INFERENCE_TABLE_SERVED_ENTITY": f"{self.endpoint_name}/1",
            **self.environment,
        }


def template(name: str) -> str:
    return files("deploy").joinpath("templates", name).read_text(encoding="utf-8")


def common(plan: RenderPlan) -> dict[str, str]:
    return {
        "agent": one_line(plan.agent),
        "name": plan.endpoint_name,
        "port": str(plan.port),
        "admin_port": str(plan.admin_port),
        "close_seconds": str(CLOSE_SECONDS),
        "drain_seconds": str(DRAIN_SECONDS),
        "grace_seconds": str(DRAIN_SECONDS + CLOSE_SECONDS + MARGIN_SECONDS),
        "state": STATE,
        "user_id": str(USER_ID),
        "version": tracelake_version(),
        "extra": plan.extra,
        "description": one_line(plan.description or f"{plan.agent} behind tracelake"),
    }


def tracelake_version() -> str:
    try:
        return version("tracelake")
    except PackageNotFoundError as error:
        raise DeploymentError(
            "cannot tell the version of tracelake that is to be installed: it isn't installed here; run "
            "`pip install` on its folder"
        ) from error


def secret_lines(plan: RenderPlan, how: str) -> str:
    lines = [f"# Secrets of the endpoint {plan.endpoint_name}; for their owner alone.", f"# {how}"]
    return "\n".join([*lines, *(f"{name}=" for name in plan.secrets)]) + "\n"


def health(plan: RenderPlan, failed: str) -> list[str]:
    """A command that asks the admin port; exits as ``failed`` of the status ``s`` says."""
    return ["python", "-I", "-S", "-c", HEALTH.format(port=plan.admin_port, failed=failed)]
