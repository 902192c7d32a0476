"""What ``deploy()`` refuses before anything is made of it, and what an agent argument means."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deploy import deploy
from deploy.agents import agent_of
from deploy.arguments import check_arguments, check_traffic
from inference_table.errors import DeploymentError
from tests.deploy import kill_agent
from tests.serving import function_agents
from tests.support import ROOT


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing here may reach the deployments of the one who runs the tests."""
    monkeypatch.setenv("TRACELAKE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_all_that_is_wrong_is_named_in_one_message(tmp_path: Path, home: Path) -> None:
    """Nobody wants to mend one variable per attempt."""
    variables: dict[str, Any] = {
        "lower_case": "x",
        "2ND": "x",
        "COUNT": 3,
        "ENABLE_MLFLOW_TRACING": "false",
        "TRACELAKE_APP": "x:y",
        "GOOD": "yes",
    }
    with pytest.raises(DeploymentError) as caught:
        deploy("my_agent:app", environment_vars=variables, tags={"team": 7}, workers=0)  # type: ignore[dict-item]
    message = str(caught.value)
    for part in ("'lower_case'", "'2ND'", "COUNT is a int", "ENABLE_MLFLOW_TRACING is 'false'"):
        assert part in message
    for part in ("TRACELAKE_APP is set by deploy()", "the tag 'team'", "workers is 0"):
        assert part in message
    assert "GOOD" not in message
    assert not home.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 70_000}, "port is 70000: give a whole number from 0 to 65,535"),
        ({"port": 8123.5}, "port is 8123.5: give a whole number"),
        ({"admin_port": -1}, "admin_port is -1: give a whole number from 0 to"),
        ({"workers": 1.5}, "workers is 1.5: give a whole number of at least 1"),
        ({"workers": True}, "workers is True"),
        ({"drain_seconds": math.inf}, "drain_seconds is inf: give a number from 0 to 31,536,000"),
        ({"wait_seconds": math.nan}, "wait_seconds is nan"),
    ],
)
def test_numbers_that_no_process_can_use_are_refused(
    home: Path, options: dict[str, Any], message: str
) -> None:
    """Before a supervisor or a worker fails with them; of a port, the system takes the lower bits."""
    with pytest.raises(DeploymentError, match=message):
        deploy("my_agent:app", **options)
    assert not home.exists()


def test_tracing_may_be_named_if_it_is_on() -> None:
    """Who sets what deploy() sets anyway is right."""
    check_arguments({"ENABLE_MLFLOW_TRACING": "true", "OPENAI_API_KEY": "k"}, None, {})


def test_unknown_arguments_are_refused() -> None:
    """An argument that does nothing is worse than an error."""
    with pytest.raises(TypeError, match="scale_to_zero_enabled"):
        deploy("my_agent:app", scale_to_zero_enabled=True)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "kubernetes"}, "'local' or 'ray'"),
        ({"num_replicas": 2}, "num_replicas.*engine='ray' only"),
        ({"engine": "ray", "workers": 2}, "workers.*engine='local' only"),
        ({"working_dir": "/no/such/folder"}, "no such folder"),
        ({"endpoint_name": "../up"}, "endpoint name"),
        ({"version": 7}, "no such version"),
        ({"traffic": {"1": 50, "2": 50}}, "version 2 is not deployed"),
        ({"table": "a%20b"}, "percent-encoding"),
        ({"durability": "eventual"}, "relaxed, strict or committed"),
    ],
)
def test_what_cannot_be_carried_out_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path, options: dict[str, Any], message: str
) -> None:
    """An error, and nothing is left behind."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("my_agent.py").write_text("app = print\n")
    with pytest.raises((DeploymentError, ValueError), match=message):
        deploy("my_agent:app", **options)
    assert not list(home.glob("endpoints/[!.]*"))


def test_an_agent_that_deploys_itself_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script whose deploy() isn't guarded would deploy itself while it is served."""
    monkeypatch.setenv("TRACELAKE_APP", "script:app")
    with pytest.raises(DeploymentError, match="__main__"):
        deploy("script:app")


@pytest.mark.parametrize(
    ("traffic", "message"),
    [
        ({"1": 50, "2": 60}, "adds up to 110"),
        ({"1": 50.5, "2": 49.5}, "whole percentage"),
        ({"1": 100}, "leaves out version 2"),
        ({"1": 30, "2": 30, "3": 40}, "3 versions take traffic"),
        ({"1": 50, "9": 50}, "version 9 is not deployed"),
        ({"1": 110, "2": -10}, "whole percentage"),
    ],
)
def test_traffic_must_add_up(traffic: dict[str, Any], message: str) -> None:
    """Percentages that make no sense are named."""
    with pytest.raises(DeploymentError, match=message):
        check_traffic(traffic, ["1", "2", "3"], "2")


def test_traffic_of_nothing_is_left_out() -> None:
    """Zero percent is a version that does not run; numbers may be given as such."""
    assert check_traffic({1: 0, 2: 100}, ["1", "2"], "2") == {"2": 100}


# --- agents ---


def test_an_import_string_names_its_endpoint(tmp_path: Path) -> None:
    """By its module; a package's dots are no part of a name."""
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").touch()
    found = agent_of("pkg.support:agent.app", None, tmp_path)
    assert (found.given, found.endpoint_name, found.is_model) == (
        "pkg.support:agent.app",
        "pkg-support",
        False,
    )


def test_a_typo_in_a_module_is_met_with_what_is_there(tmp_path: Path) -> None:
    """The most common mistake gets the most helpful message."""
    (tmp_path / "my_agent.py").touch()
    with pytest.raises(DeploymentError, match=r"no module 'my_agnet' in .* \(did you mean 'my_agent'\?\)"):
        agent_of("my_agnet:app", None, tmp_path)


def test_the_module_is_not_run(tmp_path: Path) -> None:
    """An agent that costs minutes or money to import does so in its own process only."""
    (tmp_path / "costly.py").write_text("raise SystemExit('ran')\n")
    assert agent_of("costly:app", None, tmp_path).given == "costly:app"


def test_an_object_is_found_by_identity() -> None:
    """A function, and an object that knows no name of its own."""
    assert agent_of(function_agents.predict, None, ROOT).given == "tests.serving.function_agents:predict"
    assert agent_of(kill_agent.app, None, ROOT).given == "tests.deploy.kill_agent:app"


def test_an_object_of_no_module_is_refused() -> None:
    """A notebook's function can't be imported by a server."""

    def local() -> None: ...

    with pytest.raises(DeploymentError, match="write it into a module"):
        agent_of(local, None, ROOT)


@pytest.mark.parametrize(
    ("agent", "version", "given", "name"),
    [
        ("support-bot", "3", "models:/support-bot/3", "support-bot"),
        ("models:/main.agents.bot/12", None, "models:/main.agents.bot/12", "main-agents-bot"),
        ("runs:/0123abc/model", None, "runs:/0123abc/model", "model"),
    ],
)
def test_models_are_named_as_on_databricks(agent: str, version: str | None, given: str, name: str) -> None:
    """By a registered model's name and version, or by URI."""
    found = agent_of(agent, version, ROOT)
    assert (found.given, found.endpoint_name, found.is_model) == (given, name, True)


@pytest.mark.parametrize("agent", ["support-bot", "a b:c", "", "https//x", ":app", "app:"])
def test_what_is_no_agent_is_refused(agent: str) -> None:
    """With all that would be one."""
    with pytest.raises(DeploymentError, match="give module:attribute"):
        agent_of(agent, None, ROOT)


def test_a_uri_and_another_version_contradict_each_other() -> None:
    """Which one is meant is not ours to guess."""
    with pytest.raises(DeploymentError, match="names version 3"):
        agent_of("models:/bot/3", "4", ROOT)


def test_deploy_is_light_to_import() -> None:
    """What deploys, and what supervises, needs none of the heavy libraries."""
    heavy = {"mlflow", "pyarrow", "deltalake", "ray", "pandas"}
    code = f"import sys, deploy; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ, capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.returncode) == ("", 0), done.stderr
