"""Frozen copies of real folders, as git and the file system have them."""

import contextlib
import os
import random
import shutil
import socket
import stat
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy import listing
from deploy.freeze import FrozenCopy, freeze
from inference_table.errors import DeploymentError
from tests.support import wait_for

needs_git = pytest.mark.skipif(
    shutil.which("git") is None, reason="compares with git, which is not installed"
)
NOBODY = 65534
PIECES = ["a", "b", "foo", "*", "**", "*.py", "*.log", "f*", "?", "[ab]"]
NAMES = ["a", "b", "foo", "x.py", "y.log"]


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACELAKE_HOME", str(tmp_path / "home"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


def write(folder: Path, *names: str) -> None:
    """Files that hold their own names."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.fsencode(name))


def frozen(source: Path) -> Path:
    to = source.parent / "versions" / "1" / "code"
    freeze(source, to)
    return to


def names(folder: Path) -> set[str]:
    """Files and links below a folder."""
    return {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or path.is_file()
    }


def git(folder: Path, *arguments: str) -> str:
    return os.fsdecode(
        subprocess.run(["git", "-C", folder, *arguments], check=True, capture_output=True).stdout
    )


@contextlib.contextmanager
def meanwhile(act: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run ``act`` in a thread while the block runs; its event says when that is over."""
    over = threading.Event()
    thread = threading.Thread(target=act, args=(over,))
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_content_modes_and_empty_folders_are_kept(source: Path) -> None:
    """A copy runs as the original does: same bytes, executable files, folders that are empty."""
    write(source, "my_agent.py", "lib/tool.sh")
    (source / "lib/tool.sh").chmod(0o755)
    (source / "lib/tool.sh").with_name("read_only").write_text("x")
    (source / "lib/read_only").chmod(0o444)
    (source / "static").mkdir()
    to = source.parent / "copy"
    assert freeze(source, to) == FrozenCopy(files=3, bytes=len("my_agent.py") + len("lib/tool.sh") + 1)
    assert (to / "my_agent.py").read_text() == "my_agent.py"
    assert stat.S_IMODE((to / "lib/tool.sh").stat().st_mode) == 0o755
    assert stat.S_IMODE((to / "lib/read_only").stat().st_mode) == 0o444
    assert (to / "static").is_dir()
    assert stat.S_IMODE(to.stat().st_mode) == 0o700


def test_what_is_no_code_is_left_out(source: Path) -> None:
    """Environments by what is in them, whatever their name; caches and version control by theirs."""
    write(source, "keep.py", "my env/pyvenv.cfg", "my env/bin/x", "conda/conda-meta/history", "conda/lib/x")
    left_out = [".git", ".hg", "__pycache__", "node_modules", "tracelake-data", ".mypy_cache", ".ruff_cache"]
    left_out += [".pytest_cache", ".tox", ".ipynb_checkpoints"]
    write(source, *(f"{where}{name}/x" for name in left_out for where in ("", "sub/")), "sub/old.pyc")
    assert names(frozen(source)) == {"keep.py"}


def test_nested_ignore_files_and_negations(source: Path) -> None:
    """The nearest ``.gitignore`` wins, the last pattern in it first; no git is needed for that."""
    write(source, "a.log", "keep.log", "data/x.csv", "data/keep.csv", "sub/b.log", "sub/c.txt", "build/x")
    (source / ".gitignore").write_text(
        "\ufeff*.log\n!keep.log\n/data/**\n!/data/keep.csv\nbuild/\r\n# build\n"
    )
    (source / "sub/.gitignore").write_text("!b.log\n*.txt\n")
    kept = {"keep.log", "data/keep.csv", "sub/b.log", ".gitignore", "sub/.gitignore"}
    assert names(frozen(source)) == kept


@needs_git
@pytest.mark.parametrize("seed", range(12))
def test_the_copy_is_what_git_would_add(source: Path, seed: int) -> None:
    """For trees and patterns at random, what is left out is what git leaves out."""
    draw = random.Random(seed)

    def grow(folder: Path, depth: int) -> None:
        for name in draw.sample(NAMES, draw.randint(2, 4)):
            if depth < 3 and "." not in name:
                (folder / name).mkdir()
                grow(folder / name, depth + 1)
            else:
                (folder / name).touch()

    def patterns() -> str:
        lines = [
            ("!" if draw.random() < 0.35 else "")
            + ("/" if draw.random() < 0.3 else "")
            + "/".join(draw.choices(PIECES, k=draw.randint(1, 3)))
            + ("/" if draw.random() < 0.3 else "")
            for _ in range(draw.randint(1, 5))
        ]
        return "\n".join(lines)

    grow(source, 0)
    (source / ".gitignore").write_text(patterns())
    (draw.choice([path for path in source.rglob("*") if path.is_dir()]) / ".gitignore").write_text(patterns())
    git(source, "init", "-q")
    (source / ".git/info/exclude").write_text("[xy].log\n")
    would_add = git(source, "ls-files", "-oz", "--exclude-standard").split("\0")
    assert names(frozen(source)) == set(would_add) - {""}


@needs_git
def test_what_git_tracks_is_copied_though_it_is_ignored(source: Path) -> None:
    """A file that was added by force is part of the agent; its ignored neighbours are not."""
    write(source, "models/big.bin", "models/deep/small.bin", "models/deep/other.bin", "agent.py")
    (source / ".gitignore").write_text("models/\n")
    git(source, "init", "-q")
    git(source, "add", "-f", "models/deep/small.bin")
    assert names(frozen(source)) == {"models/deep/small.bin", "agent.py", ".gitignore"}


@needs_git
def test_a_folder_within_a_work_tree_gets_the_rules_above_it(source: Path) -> None:
    """Those of the work tree hold in its folders too, unless the folder itself is what they ignore."""
    write(source, "apps/bot/agent.py", "apps/bot/x.log", "apps/bot/secret", "built/agent.py", "built/x.log")
    (source / ".gitignore").write_text("*.log\n/apps/bot/secret\nbuilt/\n")
    git(source, "init", "-q")
    freeze(source / "apps/bot", source.parent / "bot")
    assert names(source.parent / "bot") == {"agent.py"}
    freeze(source / "built", source.parent / "built")
    assert names(source.parent / "built") == {"agent.py", "x.log"}


@needs_git
def test_a_linked_work_tree_has_the_excludes_of_its_repository(source: Path) -> None:
    """Where ``.git`` is a file, ``info/exclude`` is in the folder that it leads to."""
    git(source, "init", "-q")
    git(source, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "start")
    (source / ".git/info/exclude").write_text("*.log\n")
    linked = source.parent / "linked"
    git(source, "worktree", "add", "-q", str(linked))
    write(linked, "agent.py", "x.log")
    assert names(frozen(linked)) == {"agent.py"}


def test_links_within_stay_links_and_others_become_what_they_lead_to(source: Path) -> None:
    """The copy needs nothing outside itself, and no link in it leads out or into nothing."""
    write(source, "lib/real.py", "ignored/data.bin", "sub/x")
    write(source.parent / "outside", "shared/tool.py", "one.txt")
    (source / ".gitignore").write_text("ignored/\nhidden/\n")
    links = {
        "lib/alias.py": "real.py",
        "absolute.py": str(source / "lib/real.py"),
        "sub/chain.py": "../absolute.py",
        "folder": "lib",
        "shared": "../outside/shared",
        "one.txt": "../outside/one.txt",
        "data.bin": "ignored/data.bin",
        "hidden": "../outside/shared",
        "dangling": "nowhere",
        "loop": "loop",
        "sub/up": "..",
    }
    for name, target in links.items():
        (source / name).symlink_to(target)
    (source.parent / "outside/shared/round").symlink_to(source.parent / "outside/shared")
    to = frozen(source)
    shutil.rmtree(source.parent / "outside")
    shutil.rmtree(source)
    texts = {name: str((to / name).readlink()) for name in links if (to / name).is_symlink()}
    assert texts == {
        "lib/alias.py": "real.py",
        "absolute.py": "lib/real.py",
        "sub/chain.py": "../lib/real.py",
        "folder": "lib",
        "sub/up": "..",
    }
    assert names(to / "shared") == {"tool.py"}
    assert (to / "one.txt").read_text() == "one.txt"
    assert (to / "data.bin").read_text() == "ignored/data.bin"
    assert not {"hidden", "dangling", "loop", "ignored"} & {path.name for path in to.iterdir()}


def test_odd_names_and_odd_files(source: Path) -> None:
    """Any name a disk takes is copied; sockets and pipes are not."""
    odd = ["a b.py", "é ✓.py", "line\nbreak", " ", "-rf", os.fsdecode(b"\xff\xfe"), "x" * 255, "[a]*?!#"]
    write(source, *odd)
    os.mkfifo(source / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(source / "socket"))  # absolute, it may be too long
        to = frozen(source)
    assert names(to) == set(odd)
    assert {(to / name).read_bytes() for name in odd} == {os.fsencode(name) for name in odd}


def test_too_large_says_what_is_large(source: Path) -> None:
    """The error names limit, size so far, the largest entries and the remedy; nothing is left behind."""
    write(source, "agent.py", "small/x")
    for name, size in {"data/raw/big.bin": 400, "model.bin": 90, "more.bin": 30}.items():
        write(source, name)
        os.truncate(source / name, size * 2**20)
    with pytest.raises(DeploymentError) as caught:
        frozen(source)
    message = str(caught.value)
    assert "520.0 MiB" in message
    assert "500 MiB" in message
    assert message.index("'data/raw/big.bin' 400.0 MiB") < message.index("'model.bin' 90.0 MiB")
    assert "add what the agent doesn't need to .gitignore, or give a smaller working_dir" in message
    assert names(source.parent) == {f"source/{name}" for name in names(source)}


def test_too_many_files_are_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files are too much as well, if there are enough of them."""
    monkeypatch.setattr(listing, "MAX_FILES", 20)
    write(source, *(f"folder {number % 3}/{number}" for number in range(16)))
    frozen(source)
    write(source, "one", "two", "three")
    with pytest.raises(DeploymentError, match=r"20 files and .*: 'folder \d/' \d files"):
        freeze(source, source.parent / "other")


@pytest.mark.timeout(60)
def test_the_root_of_the_disk_is_refused_soon(tmp_path: Path) -> None:
    """A working_dir by mistake fails while it is counted, long before all of it is seen."""
    with pytest.raises(DeploymentError):
        freeze(Path("/"), tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_an_unreadable_file_is_named() -> None:
    """A user who can't read a file of theirs hears which one; nothing is left behind."""
    # Not pytest's folder: nobody else may look into that of root.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        write(folder / "source", "agent.py", "secret.py")
        (folder / "source/secret.py").chmod(0)
        is_root = os.geteuid() == 0
        try:
            if is_root:
                os.seteuid(NOBODY)
            with pytest.raises(DeploymentError, match=r"cannot read '.*/secret.py': permission denied"):
                freeze(folder / "source", folder / "copy")
        finally:
            if is_root:
                os.seteuid(0)
        assert [path.name for path in folder.iterdir()] == ["source"]


def test_an_existing_copy_and_a_missing_folder_are_refused(source: Path) -> None:
    """A copy is never written over, and nothing is copied from nowhere."""
    write(source, "agent.py")
    to = frozen(source)
    with pytest.raises(DeploymentError, match="it exists"):
        freeze(source, to)
    with pytest.raises(DeploymentError, match="it is no folder"):
        freeze(source / "agent.py", source.parent / "other")


def test_deployments_remembered_in_the_folder_are_not_part_of_it(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``TRACELAKE_HOME`` inside it, the second copy doesn't hold the first."""
    monkeypatch.setenv("TRACELAKE_HOME", str(source / "state"))
    write(source, "agent.py")
    for number in ("1", "2"):
        to = source / "state/endpoints/bot/versions" / number / "code"
        assert freeze(source, to).files == 1


def test_a_change_while_it_is_copied_is_in_the_copy(source: Path) -> None:
    """What is rewritten, or removed, after it was copied is copied again, or removed from the copy."""
    write(source, "agent.py", "gone.py", *(f"later/{number}" for number in range(1500)))
    to = source.parent / "copy"

    def edit(_: threading.Event) -> None:
        wait_for(
            lambda: all([*source.parent.glob(f".new-*/{name}")] for name in ("agent.py", "gone.py")), "both"
        )
        (source / "gone.py").unlink()
        (source / "new").write_text("edited")
        (source / "new").replace(source / "agent.py")

    with meanwhile(edit):
        freeze(source, to)
    assert (to / "agent.py").read_text() == "edited"
    assert not (to / "gone.py").exists()
    assert len(list((to / "later").iterdir())) == 1500


def test_a_file_that_changes_all_the_time_is_named(source: Path) -> None:
    """There is no copy of what never stands still; the error says which file, and nothing is left."""
    write(source, "agent.py", "busy.log")
    os.truncate(source / "busy.log", 64 * 2**20)

    def grow(over: threading.Event) -> None:
        with (source / "busy.log").open("ab", buffering=0) as file:
            while not over.is_set():
                file.write(b"x")

    with meanwhile(grow), pytest.raises(DeploymentError, match=r"busy.log': it changes all the time"):
        frozen(source)
    assert not list(source.parent.glob("versions/1/*"))
    assert not list(source.parent.glob("versions/1/.new-*"))
