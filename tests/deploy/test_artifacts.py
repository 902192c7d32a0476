"""``tracelake deploy --render``: files in a folder, nothing that runs, and no secret."""

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
    (project / "my_agent.service").write_text("old")
    assert rendered(*given).output.split() == ["my_agent.service"]
    assert file.read_text() == "API_TOKEN=filled-in\n"
    assert "ExecStart" in (project / "my_agent.service").read_text()


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
