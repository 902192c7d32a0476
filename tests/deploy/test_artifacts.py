"""``tracelake deploy --render``: files in a folder, nothing that runs, and no secret."""

import shutil
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from deploy.cli import main

SECRET = "sk-1234567890"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRACELAKE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("INFERENCE_TABLE_URI", raising=False)
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "my_agent.py").write_text("def predict(request): ...\n")
    monkeypatch.chdir(folder)
    return folder


def rendered(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["deploy", "my_agent:predict", *arguments])


@pytest.mark.parametrize("kind", ["systemd", "kubernetes", "docker"])
def test_files_are_written_and_nothing_runs(project: Path, kind: str) -> None:
    """Each kind, with a variable that is a secret by its name and one that is none."""
    given = ["--env", f"OPENAI_API_KEY={SECRET}", "--env", "MODEL=small", "--max-concurrency", "7"]
    result = rendered(*given, "--table", "s3://bucket/payload", "--render", kind, "--output", "out")
    assert result.exit_code == 0, result.output
    paths = [project / line for line in result.output.splitlines()]
    text = "".join(path.read_text() for path in paths if path.is_file())
    assert SECRET not in text
    for part in ("OPENAI_API_KEY", "MODEL", "small", "TRACELAKE_MAX_CONCURRENCY", "s3://bucket/payload"):
        assert part in text
    assert not (project.parent / "home").exists()
    assert (project / "out" / "code" / "my_agent.py").exists() == (kind == "docker")


def test_secrets_that_are_filled_in_stay(project: Path) -> None:
    """Rendering again renews the rest, and leaves that file, its owner's alone, as it is."""
    given = ["--env", "API_TOKEN=x", "--render", "systemd"]
    assert rendered(*given).exit_code == 0
    file = project / "my_agent.env"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.write_text("API_TOKEN=filled-in\n")
    unit = project / "my_agent.service"
    unit.write_text(unit.read_text().splitlines()[0] + "\nold\n")
    assert rendered(*given).output.split() == ["my_agent.service"]
    assert file.read_text() == "API_TOKEN=filled-in\n"
    assert "ExecStart" in unit.read_text()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PGPASSWORD", SECRET),
        ("OPENAI_APIKEY", SECRET),
        ("MYSQL_PWD", SECRET),
        ("AZURE_STORAGE_CONNECTION_STRING", f"AccountName=a;AccountKey={SECRET}"),
        ("DATABASE_URL", f"postgresql://bot:{SECRET}@db.example.org/bot"),
    ],
)
def test_what_is_a_secret_in_practice_is_in_no_file(project: Path, name: str, value: str) -> None:
    """Whatever others call their variables; the name is there, to be filled in."""
    assert rendered("--env", f"{name}={value}", "--render", "systemd").exit_code == 0
    texts = {path.name: path.read_text() for path in project.iterdir()}
    assert f"{name}=" in texts["my_agent.env"]
    assert not [file for file, text in texts.items() if SECRET in text]


def test_limits_and_addresses_are_no_secrets(project: Path) -> None:
    """What only sounds like one is rendered with its value."""
    given = ["--env", "MAX_TOKENS=100", "--env", "BASE_URL=http://models:8080/v1", "--render", "systemd"]
    assert rendered(*given).exit_code == 0
    text = (project / "my_agent.service").read_text()
    assert "MAX_TOKENS=100" in text
    assert "BASE_URL=http://models:8080/v1" in text


def test_files_of_the_user_stay(project: Path) -> None:
    """The default folder is the agent's, which may have a Dockerfile of its own; nothing is written then."""
    (project / "Dockerfile").write_text("FROM scratch\n")
    result = rendered("--render", "docker")
    assert result.exit_code == 1
    assert "cannot write 'Dockerfile': there is one that tracelake has not made" in result.output
    assert (project / "Dockerfile").read_text() == "FROM scratch\n"
    (project / "Dockerfile").unlink()
    (project / "code").mkdir()
    assert "cannot copy the agent's code to 'code': it is there" in rendered("--render", "docker").output
    assert {path.name for path in project.iterdir()} == {"my_agent.py", "code"}
    (project / "code").rmdir()
    assert rendered("--render", "docker").exit_code == 0
    assert all((project / name).is_file() for name in ("Dockerfile", ".dockerignore", "compose.yaml"))
    shutil.rmtree(project / "code")
    assert rendered("--render", "docker").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--render", "kubernetes"), "give one on an object store"),
        (("--render", "systemd", "--traffic", "1=100"), "with --traffic"),
        (("--render", "systemd", "--env", "lower=1"), "'lower' is not accepted"),
    ],
)
def test_what_cannot_be_rendered_is_named(project: Path, arguments: tuple[str, ...], message: str) -> None:
    """An error, and no file."""
    result = rendered(*arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert {path.name for path in project.iterdir()} == {"my_agent.py"}
