"""Files by which systemd, Kubernetes or Docker run an agent: complete, commented, with no secret in them.

What holds, in all of them:

- SIGKILL comes later than all that a clean stop does: what is being answered, then the last rows.
- The spool is on a disk that outlives the process, and what is left there can be drained.
- Secrets are names here; their values come from a file or an object that the operator makes.
- Text of a user's comes out of the other program's parser as it went in.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from deploy.listing import LEFT_OUT, LEFT_OUT_SUFFIX
from deploy.quoting import (
    compose_text,
    exec_form,
    fill,
    kubernetes_text,
    one_line,
    systemd_argument,
    systemd_text,
    yaml_text,
)
from deploy.render_plan import (
    CLOSE_SECONDS,
    DRAIN_SECONDS,
    GIB,
    KEYS,
    LOCAL,
    MARGIN_SECONDS,
    STATE,
    USER_ID,
    RenderPlan,
    common,
    health,
    secret_lines,
    template,
    tracelake_version,
)
from inference_table.errors import DeploymentError
from inference_table.settings import StorageSettings

__all__ = ["KINDS", "RenderPlan", "render"]

PRE_STOP_SECONDS: Final = 10
"""Until every proxy of a cluster has heard that a pod takes no more requests."""
FREE_SHARE: Final = 0.9
"""Of a volume that the spool may fill: it leaves 5 % free, and file systems need some for themselves."""
MEMORY_REQUEST_MIB: Final = 512
MEMORY_LIMIT_MIB: Final = 1536
"""Per worker: a small agent, 256 MiB of records at most, and a commit."""
CODE: Final = "/app"
DNS_NAME: Final = re.compile(r"[a-z]([a-z0-9-]{0,50}[a-z0-9])?")
"""A StatefulSet's name, short enough for the labels that are made of it."""


def render(kind: str, plan: RenderPlan) -> dict[str, str]:
    """Files by which another program runs the agent.

    Args:
        kind: ``systemd``, ``kubernetes`` or ``docker``. Docker's files are to lie beside a folder ``code``,
            with a frozen copy of the agent's; unless it is a model.

    Returns:
        Texts by file name. A file that ends in ``.env`` is to be readable by its owner alone.

    Raises:
        DeploymentError: there is no such kind, or it can't run what is planned.
    """
    if kind not in KINDS:
        raise DeploymentError(f"cannot render for {kind!r}: give {', '.join(KINDS)}")
    return KINDS[kind](plan)


# --- systemd ---


def systemd(plan: RenderPlan) -> dict[str, str]:
    name, home = plan.endpoint_name, plan.install_dir or f"/opt/{plan.endpoint_name}"
    state = f"/var/lib/{name}"
    program = systemd_argument(f"{home}/venv/bin/tracelake")
    environment = {"HOME": state} | plan.settings(state)
    drain = ["spool", "drain", f"{state}/spool", "--table", plan.table_in(state)]
    has_keys = plan.api_key_file is not None
    lines = [f"Environment={systemd_text(f'{key}={value}')}" for key, value in environment.items()]
    lines += [f'Environment="TRACELAKE_API_KEY_FILE=%d/{KEYS}"'] if has_keys else []
    bind = "CAP_NET_BIND_SERVICE" if plan.port < 1024 else ""
    values = common(plan) | {
        "unit": f"{name}.service",
        "home": one_line(home),
        "work": one_line(f"{home}/code" if not plan.is_model else state).replace("%", "%%"),
        "description": common(plan)["description"].replace("%", "%%"),
        "requirements": f" -r {one_line(home)}/code/requirements.txt" if plan.requirements else "",
        "command": " ".join([program, *map(systemd_argument, plan.serve(plan.host))]),
        "drain_command": " ".join([program, *map(systemd_argument, drain)]),
        "environment": "\n".join(lines),
        "capabilities": f"CapabilityBoundingSet={bind}" + (f"\nAmbientCapabilities={bind}" if bind else ""),
        "api_key_step": f"#   install -m 0600 {one_line(plan.api_key_file or '')} /etc/{name}/{KEYS}"
        if has_keys
        else "",
        "credential": "# Copied by systemd for this service alone: other keys count from the next restart.\n"
        f"LoadCredential={KEYS}:/etc/{name}/{KEYS}"
        if has_keys
        else "",
    }
    how = 'A value with blanks, quotes or # is written "...", with \\ before " and \\.'
    return {
        f"{name}.service": fill(template("systemd.service"), values),
        f"{name}.env": secret_lines(plan, how),
    }


# --- Kubernetes ---


def kubernetes(plan: RenderPlan) -> dict[str, str]:
    name = plan.endpoint_name.lower().replace("_", "-")
    if DNS_NAME.fullmatch(name) is None:
        raise DeploymentError(
            f"cannot name a StatefulSet {name!r}: give up to 52 letters, digits and -, from a letter to a "
            "letter or digit, with endpoint_name"
        )
    if StorageSettings(uri=plan.table).is_local:
        raise DeploymentError(
            f"cannot render for Kubernetes with the table {plan.table!r}: pods share no disk; give one on an "
            "object store (s3://, az://, gs://) with table"
        )
    memory = {"memory_request": MEMORY_REQUEST_MIB, "memory_limit": MEMORY_LIMIT_MIB}
    values = common(plan) | {
        "name": name,
        "label": yaml_text(name),
        "image": yaml_text(plan.image_name),
        "description": yaml_text(plan.description or plan.agent),
        "replicas": str(plan.replicas),
        "workers": str(plan.workers),
        "pre_stop_seconds": str(PRE_STOP_SECONDS),
        "grace_seconds": str(PRE_STOP_SECONDS + DRAIN_SECONDS + CLOSE_SECONDS + MARGIN_SECONDS),
        "is_ready": command_of(health(plan, "s != 200")),
        "is_alive": command_of(health(plan, "0")),
        "volume_gib": str(math.ceil(plan.spool_bytes / FREE_SHARE / GIB)),
        "storage_class": f"storageClassName: {yaml_text(plan.storage_class)}" if plan.storage_class else "",
        **{key: str(mib * plan.workers) for key, mib in memory.items()},
        **metrics_values(plan, name),
        **secret_values(plan, name),
    }
    without_keys = secret_values(replace(plan, api_key_file=None), name)
    serving = values | {"arguments": items(plan.serve("0.0.0.0"))}
    drain = ["spool", "drain", f"{STATE}/spool", "--table", plan.table_in(STATE)]
    draining = values | without_keys | {"arguments": items(drain)}
    return {
        f"{name}.yaml": fill(template("kubernetes.yaml"), serving),
        f"{name}-drain.yaml": fill(template("kubernetes-drain.yaml"), draining),
    }


def items(arguments: list[str]) -> str:
    return "\n".join(f"- {kubernetes_text(one)}" for one in arguments)


def command_of(arguments: list[str]) -> str:
    return "[" + ", ".join(map(kubernetes_text, arguments)) + "]"


def metrics_values(plan: RenderPlan, name: str) -> dict[str, str]:
    ports = f"- name: http\n  containerPort: {plan.port}"
    if plan.admin_host in LOCAL:
        return {
            "ports": ports,
            "annotations": f"# Metrics are on 127.0.0.1 of the pod: kubectl port-forward {name}-0 "
            f'{plan.admin_port}\nprometheus.io/scrape: "false"',
        }
    return {
        "ports": f"{ports}\n- name: admin\n  containerPort: {plan.admin_port}",
        "annotations": "# No keys protect the admin port: let a NetworkPolicy keep all but Prometheus out."
        f'\nprometheus.io/scrape: "true"\nprometheus.io/port: "{plan.admin_port}"'
        '\nprometheus.io/path: "/metrics"',
    }


def secret_values(plan: RenderPlan, name: str) -> dict[str, str]:
    """Environment, and the mounted file of keys; with how the operator makes the secrets."""
    lines, steps = [], []
    for key, value in plan.settings(STATE).items():
        lines += [f"- name: {yaml_text(key)}", f"  value: {kubernetes_text(value)}"]
    if plan.secrets:
        steps.append(f"#   kubectl create secret generic {name}-env --from-env-file={name}.env")
        steps.append(f"#     with the lines {', '.join(f'{one}=...' for one in plan.secrets)}")
    for key in plan.secrets:
        lines += [f"- name: {yaml_text(key)}", "  valueFrom:", "    secretKeyRef:"]
        lines += [f"      name: {name}-env", f"      key: {yaml_text(key)}"]
    mount = volume = ""
    if plan.api_key_file is not None:
        file = one_line(plan.api_key_file)
        steps.append(f"#   kubectl create secret generic {name}-{KEYS} --from-file={KEYS}={file}")
        # As a folder: a file of its own (subPath) would never be renewed.
        folder = f"/etc/tracelake/{KEYS}"
        lines += ['- name: "TRACELAKE_API_KEY_FILE"', f"  value: {yaml_text(f'{folder}/{KEYS}')}"]
        mount = f"- name: {KEYS}\n  mountPath: {folder}\n  readOnly: true"
        volume = f"- name: {KEYS}\n  secret:\n    secretName: {name}-{KEYS}\n    defaultMode: 288  # 0440"
    return {
        "environment": "\n".join(lines),
        "secret_steps": "\n".join(steps) or "#   (there are none)",
        "key_mount": mount,
        "key_volume": volume,
    }


# --- Docker ---


def docker(plan: RenderPlan) -> dict[str, str]:
    name = plan.endpoint_name.lower()
    package = f"tracelake{plan.extra}=={tracelake_version()}"
    pip = "RUN --mount=type=bind,target=/context pip install --no-cache-dir --find-links /context/wheels"
    install = [f"{pip} '{package}'"]
    if plan.requirements:
        # Before the code: a layer that stays as long as the requirements do.
        install += ["COPY code/requirements.txt /requirements.txt"]
        install += [f"{pip} -r /requirements.txt '{package}'"]
    published = (
        f"{plan.host}:{plan.port}:{plan.port}"
        if ":" not in plan.host
        else f"[{plan.host}]:{plan.port}:{plan.port}"
    )
    has_keys = plan.api_key_file is not None
    environment = plan.settings(STATE) | (
        {"TRACELAKE_API_KEY_FILE": f"/run/secrets/{KEYS}"} if has_keys else {}
    )
    values = common(plan) | {
        "name": name,
        "python_version": plan.python_version,
        "install": "\n".join(install) + "\n",
        "code": CODE,
        "copy": "" if plan.is_model else f"COPY code/ {CODE}/",
        "serve": exec_form(plan.serve("0.0.0.0")),
        "is_ready": exec_form(health(plan, "s != 200")),
        "image": compose_text(plan.image_name),
        "environment": "\n".join(
            f"{yaml_text(one)}: {compose_text(environment[one])}" for one in environment
        ),
        "published": compose_text(published),
        "host_comment": "This machine alone; a proxy with TLS stands in front."
        if plan.host in LOCAL
        else "Docker opens this port past most firewalls.",
        "table_comment": one_line(plan.table_in(STATE)),
        "secrets": f"secrets: [{KEYS}]" if has_keys else "",
        "secret_files": f"secrets:\n  {KEYS}:\n    file: ./{KEYS}" if has_keys else "",
        "api_key_step": f"#   install -m 0400 -o {USER_ID} {one_line(plan.api_key_file)} {KEYS}"
        if plan.api_key_file is not None
        else "",
    }
    return {
        "Dockerfile": fill(template("Dockerfile"), values),
        ".dockerignore": dockerignore(name),
        "compose.yaml": fill(template("compose.yaml"), values),
        f"{name}.env": secret_lines(plan, "A value with blanks, quotes, $ or # is written '...'."),
    }


def dockerignore(name: str) -> str:
    """What a frozen copy leaves out by name, and the secrets."""
    lines = [
        "# See docs/deploy-elsewhere.md. No secrets in an image,",
        f"{name}.env",
        KEYS,
        "# and nothing that is no code.",
    ]
    return (
        "\n".join([*lines, "**/.venv", f"**/*{LEFT_OUT_SUFFIX}", *(f"**/{one}" for one in sorted(LEFT_OUT))])
        + "\n"
    )


KINDS: Final[Mapping[str, Callable[[RenderPlan], dict[str, str]]]] = {
    "systemd": systemd,
    "kubernetes": kubernetes,
    "docker": docker,
}
