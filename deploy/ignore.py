"""What git ignores in a folder, told with git and without.

The rules are those of `gitignore(5) <https://git-scm.com/docs/gitignore>`_: the last pattern that matches
decides, a ``.gitignore`` further down wins over one further up, and below a folder that is left out nothing
comes back. The last is the caller's part, who asks from the top down and doesn't enter such a folder. So a
pattern must match the very path that is asked for, which is why pathspec's regular expressions are matched
whole here: its own answer counts what matches a folder for all that is below.
"""

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from pathspec import GitIgnoreSpec

__all__ = ["Rules", "rules_above", "tracked_files"]

GIT_SECONDS: Final = 30
"""git answers from its index, in well under a second."""
IGNORE_FILE: Final = ".gitignore"
ANYTHING: Final = re.compile(r"(!?)/?(?:\*\*/)*\*\*?(/?)")
"""Patterns that match whatever is there: pathspec's expressions of these don't match a path whole."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The patterns that hold in one folder.

    Attributes:
        top: the folder that paths are relative to.
        sources: the folder that patterns are relative to (below ``top``: ``""``, or ending in a slash), and
            expressions with whether they ignore; by falling weight.
    """

    top: Path
    sources: tuple[tuple[str, tuple[tuple[re.Pattern[str], bool], ...]], ...] = ()

    def ignores(self, path: str) -> bool:
        """Whether to leave out a path relative to ``top``; that of a folder ends in a slash."""
        for prefix, expressions in self.sources:
            inner = path.removeprefix(prefix)
            for expression, ignored in expressions:
                if expression.fullmatch(inner):
                    return ignored
        return False

    def within(self, prefix: str, folder: Path) -> Self:
        """The rules in a folder at ``prefix``: these, and those of its ``.gitignore``."""
        return self._with(prefix, folder / IGNORE_FILE)

    def _with(self, prefix: str, file: Path) -> Self:
        try:
            text = os.fsdecode(file.read_bytes()).removeprefix("\ufeff")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return self
        patterns = GitIgnoreSpec.from_lines([equivalent(line) for line in text.split("\n")]).patterns
        expressions = [
            (pattern.regex, pattern.include)
            for pattern in patterns
            if pattern.regex is not None and pattern.include is not None
        ]
        return type(self)(self.top, ((prefix, tuple(reversed(expressions))), *self.sources))


def equivalent(line: str) -> str:
    """A pattern that means the same to git, and to pathspec when it is matched whole."""
    line = line.removesuffix("\r")
    if line.lstrip("!") not in {"/*", "/*/"}:
        line = ANYTHING.sub(r"\1?*\2", line) if ANYTHING.fullmatch(line) else line
    if line.endswith("/**/"):
        return line[:-1] + "/*/"
    return line + "/*" if line.endswith("/**") else line


def rules_above(folder: Path) -> Rules:
    """The rules that a folder gets from the git work tree around it, not those of its own ``.gitignore``.

    A folder that is ignored itself is taken as one without a work tree: who names it wants it.
    """
    top = next((one for one in [folder, *folder.parents] if (one / ".git").exists()), None)
    if top is None:
        return Rules(folder)
    rules = Rules(top)._with("", common_git_folder(top / ".git") / "info" / "exclude")
    prefix, above = "", top
    for name in folder.relative_to(top).parts:
        rules = rules.within(prefix, above)
        prefix, above = f"{prefix}{name}/", above / name
        if rules.ignores(prefix):
            return Rules(folder)
    return rules


def common_git_folder(git: Path) -> Path:
    """Where ``info`` is: ``.git`` itself, or what it points to where it is a file (worktrees, submodules)."""
    if git.is_dir():
        return git
    pointed = git.parent / git.read_text(encoding="utf-8", errors="surrogateescape").partition(":")[2].strip()
    common = pointed / "commondir"
    return pointed / common.read_text(encoding="utf-8").strip() if common.is_file() else pointed


def tracked_files(folder: Path) -> set[str]:
    """What git tracks below a folder, relative to it; nothing where git or the work tree is missing."""
    command = ["git", "-C", str(folder), "-c", "core.fsmonitor=false", "ls-files", "-z"]
    try:
        listed = subprocess.run(
            command, env=dict(environment()), capture_output=True, timeout=GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return set()
    return set(os.fsdecode(listed.stdout).split("\0")) - {""}


def environment() -> Iterator[tuple[str, str]]:
    """The environment without git's own variables: in a hook they name another work tree."""
    return ((name, value) for name, value in os.environ.items() if not name.startswith("GIT_"))
