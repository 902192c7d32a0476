"""Files for systemd, Kubernetes and Docker, read back by the parsers of those, or of their formats."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import render as rendering
from deploy.listing import LEFT_OUT
from deploy.render import KINDS, RenderPlan, render
from deploy.render_plan import CLOSE_SECONDS, DRAIN_SECONDS, health
from inference_table.errors import DeploymentError
from inference_table.writer import CLOSE_SECONDS as WRITER_CLOSE_SECONDS
from tests.support import free_port, served

NASTY = {
    "QUOTES": """it's "quoted" \\ and \\" more""",
    "PERCENT": "100%h %n %%",
    "DOLLARS": "$HOME ${HOME} $(HOME) $$ $",
    "LINES": "one\ntwo\r\n\tthree\x1b\x7f\x85\u2028end",
    "YAML": "- &a *b: {c}, [d] # e | > ! @ `",
    "NUMBER": "1e3",
    "YES": "no",
    "TEMPLATE": "@{name} @{environment}",
    "UNICODE": "é ✓ 😀 ",
    "EMPTY": "",
    "BACKSLASH": "\\",
}
DESCRIPTION = 'the "best" bot: 5% # of $HOME\n[Install]\\'


def plan(**given: Any) -> RenderPlan:
    return RenderPlan(
        **{
            "endpoint_name": "support",
            "agent": "my_agent:app",
            "table": "s3://bucket/payload",
            "secrets": ("OPENAI_API_KEY",),
            "environment": NASTY,
            "api_key_file": "keys.txt",
            "description": DESCRIPTION,
            **given,
        }
    )


def documents(text: str) -> list[Any]:
    return list(yaml.safe_load_all(text))


def stateful_set(**given: Any) -> dict[str, Any]:
    found: dict[str, Any] = documents(render("kubernetes", plan(**given))["support.yaml"])[-1]
    return found


def pod_of(document: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = document["spec"]["template"]["spec"]
    return spec


def expanded(text: str) -> str:
    """What Kubernetes and Compose make of text without variables: ``$$`` is ``$``."""
    return text.replace("$$", "$")


def unit_lines(unit: str, key: str) -> list[str]:
    return [line.partition("=")[2] for line in unit.split("\n") if line.startswith(f"{key}=")]


def unquoted(text: str) -> str:
    """A quoted string of a unit; its escapes are those of C, as Python's are."""
    value = ast.literal_eval(text)
    assert isinstance(value, str)
    return re.sub("%(.)", lambda found: {"%": "%", "d": "/credentials"}[found[1]], value)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_no_secret_and_no_placeholder_is_left(kind: str) -> None:
    """Secrets are names without values, and every blank of a template is filled in."""
    os.environ["OPENAI_API_KEY"] = "sk-very-secret"
    try:
        texts = render(kind, plan(environment={}))
    finally:
        del os.environ["OPENAI_API_KEY"]
    assert not [name for name, text in texts.items() if "sk-very-secret" in text or "@{" in text]
    assert any("OPENAI_API_KEY" in text for text in texts.values())


def test_the_deadlines_are_those_of_the_writer() -> None:
    """What a grace period must exceed is what the server does at a stop."""
    assert CLOSE_SECONDS == WRITER_CLOSE_SECONDS


# --- systemd ---


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("given", [{}, {"port": 80, "api_key_file": None}, {"agent": 'models:/a b/1$%"'}])
def test_systemd_takes_the_unit(tmp_path: Path, given: dict[str, Any]) -> None:
    """``systemd-analyze verify`` finds nothing to complain of, with nasty values too."""
    program = tmp_path / "venv" / "bin" / "tracelake"
    program.parent.mkdir(parents=True)
    program.symlink_to(Path(sys.executable).with_name("tracelake"))
    unit = tmp_path / "support.service"
    unit.write_text(render("systemd", plan(install_dir=str(tmp_path), **given))["support.service"])
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False
    )
    complaints = [line for line in checked.stderr.splitlines() if "support.service" in line]
    assert (checked.returncode, complaints) == (0, [])


def test_a_unit_gives_the_process_what_was_meant() -> None:
    """Values and arguments come out of systemd's quoting as they went in; nothing adds a line."""
    unit = render("systemd", plan(agent='a b:"$x" %i'))["support.service"]
    assignments = [unquoted(line).partition("=") for line in unit_lines(unit, "Environment")]
    environment = {name: value for name, _, value in assignments}
    assert environment.items() >= NASTY.items()
    assert environment["TRACELAKE_API_KEY_FILE"] == "/credentials/api-keys"
    [command] = unit_lines(unit, "ExecStart")
    assert unquoted(command[command.index('"') :]).replace("$$", "$") == 'a b:"$x" %i'
    assert unit_lines(unit, "Description") == ['the "best" bot: 5%% # of $HOME [Install]']
    assert [line for line in unit.splitlines() if line.startswith("[")] == [
        "[Unit]",
        "[Service]",
        "[Install]",
    ]


def test_a_unit_stops_slowly_enough_and_drains() -> None:
    """SIGKILL comes after requests and rows had their time; a local table and the spool are in its state."""
    unit = render("systemd", plan(table="./tracelake-data/payload", environment={}))["support.service"]
    [seconds] = unit_lines(unit, "TimeoutStopSec")
    assert int(seconds) > DRAIN_SECONDS + WRITER_CLOSE_SECONDS
    assert unit_lines(unit, "KillMode") == ["mixed"]
    [drain] = unit_lines(unit, "ExecStopPost")
    assert drain.endswith("spool drain /var/lib/support/spool --table /var/lib/support/payload")
    assert unit_lines(unit, "StateDirectory") == ["support"]
    assert '"INFERENCE_TABLE_SPOOL_DIR=/var/lib/support/spool"' in unit_lines(unit, "Environment")


# --- Kubernetes ---


@pytest.mark.heavy
@pytest.mark.parametrize(
    "given", [{}, {"admin_host": "0.0.0.0", "api_key_file": None, "storage_class": "ssd"}]
)
def test_the_manifests_fit_the_published_schemas(given: dict[str, Any]) -> None:
    """Each object is what its schema says, with no property that it doesn't know."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for text in render("kubernetes", plan(**given)).values():
        for document in documents(text):
            kubernetes_validate.validate(document, "1.30", strict=True)


def test_a_pod_gets_what_was_meant() -> None:
    """Values come out of YAML and of Kubernetes' variables as they went in; secrets are references."""
    pod = pod_of(stateful_set())
    [agent] = pod["containers"]
    values = {one["name"]: one.get("value") for one in agent["env"]}
    assert {name: expanded(values[name]) for name in NASTY} == NASTY
    [secret] = [one for one in agent["env"] if one["name"] == "OPENAI_API_KEY"]
    assert secret["valueFrom"]["secretKeyRef"] == {"name": "support-env", "key": "OPENAI_API_KEY"}
    assert stateful_set()["metadata"]["annotations"]["tracelake/description"] == DESCRIPTION
    assert agent["args"][-1] == "my_agent:app"


def test_a_pod_keeps_its_spool_and_ends_slowly_enough() -> None:
    """The spool lies in the pod's own volume, which fits its limit; the grace period covers all of a stop."""
    found = stateful_set()
    pod = pod_of(found)
    [agent] = pod["containers"]
    values = {one["name"]: one.get("value") for one in agent["env"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in agent["volumeMounts"]}
    [claim] = found["spec"]["volumeClaimTemplates"]
    assert mounts[str(Path(values["INFERENCE_TABLE_SPOOL_DIR"]).parent)] == claim["metadata"]["name"]
    size = int(claim["spec"]["resources"]["requests"]["storage"].removesuffix("Gi")) << 30
    assert size * 0.95 > int(values["INFERENCE_TABLE_MAX_SPOOL_BYTES"])
    pause = int(agent["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > pause + DRAIN_SECONDS + WRITER_CLOSE_SECONDS


def test_keys_are_mounted_where_the_server_looks() -> None:
    """As a folder, so that they can be renewed; without keys there is neither mount nor variable."""
    pod = pod_of(stateful_set())
    [agent] = pod["containers"]
    values = {one["name"]: one.get("value") for one in agent["env"]}
    [mount] = [one for one in agent["volumeMounts"] if one["name"] == "api-keys"]
    assert "subPath" not in mount
    assert Path(values["TRACELAKE_API_KEY_FILE"]).parent == Path(mount["mountPath"])
    [volume] = [one for one in pod["volumes"] if one["name"] == "api-keys"]
    assert volume["secret"] == {"secretName": "support-api-keys", "defaultMode": 0o440}
    assert "api-keys" not in json.dumps(stateful_set(api_key_file=None))


def test_prometheus_is_told_of_what_it_can_reach() -> None:
    """An admin port on 127.0.0.1 is no target; one on all addresses is."""
    annotations = stateful_set()["spec"]["template"]["metadata"]["annotations"]
    assert annotations == {"prometheus.io/scrape": "false"}
    found = stateful_set(admin_host="0.0.0.0", admin_port=9000)
    annotations = found["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == "9000"
    [agent] = pod_of(found)["containers"]
    assert {port["containerPort"] for port in agent["ports"]} == {8000, 9000}
    assert "--admin-host" in agent["args"]


def test_the_job_drains_the_volume_of_the_pod_that_went_first() -> None:
    """It mounts a claim of the set where the spool is, waits to be started, and gets the same settings."""
    texts = render("kubernetes", plan(replicas=3))
    [job] = documents(texts["support-drain.yaml"])
    pod = pod_of(job)
    [container] = pod["containers"]
    assert job["spec"]["suspend"] is True
    claims = [
        volume["persistentVolumeClaim"]["claimName"]
        for volume in pod["volumes"]
        if "persistentVolumeClaim" in volume
    ]
    assert claims == ["spool-support-3"]
    command = [*container["command"], *container["args"]]
    assert command[:3] == ["tracelake", "spool", "drain"]
    mounts = [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "spool"]
    assert mounts == [str(Path(command[3]).parent)]
    served_env = pod_of(documents(texts["support.yaml"])[-1])["containers"][0]["env"]
    assert container["env"] == [one for one in served_env if one["name"] != "TRACELAKE_API_KEY_FILE"]


def test_kubernetes_needs_a_table_that_pods_share() -> None:
    """A local table, or a name that no StatefulSet can have, is refused with the remedy."""
    with pytest.raises(DeploymentError, match="object store"):
        render("kubernetes", plan(table="./tracelake-data/payload"))
    with pytest.raises(DeploymentError, match="endpoint_name"):
        render("kubernetes", plan(endpoint_name="1" * 10))
    assert set(render("kubernetes", plan(endpoint_name="My_Bot"))) == {"my-bot.yaml", "my-bot-drain.yaml"}


def test_the_probe_asks_a_real_server(tmp_path: Path) -> None:
    """Its command succeeds at a server that is ready, and fails where nobody listens."""
    admin_port = free_port()
    here = plan(admin_port=admin_port, environment={})
    probe = [sys.executable, *health(here, "s != 200")[1:]]
    assert subprocess.run(probe, capture_output=True, check=False).returncode != 0
    env = {"INFERENCE_TABLE_URI": str(tmp_path / "t"), "INFERENCE_TABLE_SPOOL_DIR": str(tmp_path / "s")}
    target = ["--admin-port", str(admin_port), "--", "tests.deploy.kill_agent:app"]
    with served(*target[:2], target[3], env=env, log=tmp_path / "log"):
        assert subprocess.run(probe, capture_output=True, check=False).returncode == 0


# --- Docker ---


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """Instructions and their arguments, without comments, continued lines joined."""
    text = re.sub(r"^#.*\n", "", dockerfile, flags=re.MULTILINE).replace("\\\n", "")
    found = [line.partition(" ") for line in text.splitlines() if line.strip()]
    return [(name, rest.strip()) for name, _, rest in found]


def test_the_image_runs_as_nobody_in_particular_and_gets_signals(tmp_path: Path) -> None:
    """No root, no shell around the server, the spool in a volume, the version pinned."""
    (tmp_path / "requirements.txt").write_text("openai\n")
    text = render("docker", plan(agent='my "agent":$app', working_dir=tmp_path, workers=2))["Dockerfile"]
    found = dict(instructions(text))
    assert json.loads(found["CMD"])[-1] == 'my "agent":$app'
    assert json.loads(found["ENTRYPOINT"]) == ["tracelake"]
    assert json.loads(found["HEALTHCHECK"].partition("CMD ")[2])[0] == "python"
    assert found["STOPSIGNAL"] == "SIGTERM"
    assert int(found["USER"].split(":")[0]) > 0
    assert f"INFERENCE_TABLE_SPOOL_DIR={found['VOLUME']}/spool" in found["ENV"].split()
    names = [name for name, _ in instructions(text)]
    assert names.index("USER") > max(index for index, name in enumerate(names) if name in {"COPY", "RUN"})
    assert re.search(r"'tracelake==\d", found["RUN"])
    assert "-r /requirements.txt" in found["RUN"]
    assert "requirements" not in render("docker", plan())["Dockerfile"]


def test_compose_gives_the_container_what_was_meant() -> None:
    """Values come out of YAML and of Compose's variables as they went in; the port is local."""
    texts = render("docker", plan())
    [compose] = documents(texts["compose.yaml"])
    service = compose["services"]["support"]
    values = {name: expanded(value) for name, value in service["environment"].items()}
    assert values.items() >= NASTY.items()
    assert service["ports"] == ["127.0.0.1:8000:8000"]
    assert int(service["stop_grace_period"].removesuffix("s")) > DRAIN_SECONDS + WRITER_CLOSE_SECONDS
    [volume] = service["volumes"]
    name, _, path = volume.partition(":")
    assert name in compose["volumes"]
    assert values["INFERENCE_TABLE_SPOOL_DIR"] == f"{path}/spool"
    assert service["env_file"] == ["support.env"]
    assert "OPENAI_API_KEY=\n" in texts["support.env"]
    assert values["TRACELAKE_API_KEY_FILE"] == f"/run/secrets/{service['secrets'][0]}"


def test_an_image_gets_neither_secrets_nor_what_is_no_code() -> None:
    """What a frozen copy leaves out stays out of the build, and so do the files with secrets."""
    ignored = render("docker", plan())[".dockerignore"].splitlines()
    assert {f"**/{name}" for name in LEFT_OUT} | {"support.env", "api-keys"} <= set(ignored)


def test_a_model_needs_no_code() -> None:
    """It comes from its registry: nothing is copied, and all of MLflow is installed."""
    text = render("docker", plan(agent="models:/support-bot/3"))["Dockerfile"]
    assert "COPY" not in text
    assert "tracelake[mlflow]==" in text


# --- what can't be rendered ---


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"environment": {"a-b": "1"}}, "'a-b'"),
        ({"secrets": ("A",), "environment": {"A": "1"}}, "'A'"),
        ({"secrets": ("A\nB",)}, r"'A\\nB'"),
        ({"environment": {"A": "\0"}}, r"'\\x00'"),
        ({"description": "\udcff"}, r"'\\udcff'"),
    ],
)
def test_what_no_process_can_be_given_is_refused(given: dict[str, Any], named: str) -> None:
    """Names that are none, and text that no file can carry, are named in the error."""
    with pytest.raises(DeploymentError, match=named):
        plan(**given)


def test_an_unknown_kind_is_refused() -> None:
    """The error says which there are."""
    with pytest.raises(DeploymentError, match="systemd, kubernetes, docker"):
        rendering.render("nomad", plan())
