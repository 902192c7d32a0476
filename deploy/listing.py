"""What belongs into a frozen copy: found first, as a folder that is too large shall fail within seconds."""

import contextlib
import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deploy.ignore import Rules, rules_above, tracked_files
from deploy.registry import home
from inference_table.errors import DeploymentError

__all__ = ["LEFT_OUT", "LEFT_OUT_SUFFIX", "MAX_BYTES", "MAX_FILES", "Listing", "unreadable"]

MAX_BYTES: Final = 500 * 1024 * 1024
"""What Ray takes as a working_dir, too: what is frozen here can be deployed there."""
MAX_FILES: Final = 50_000
"""Files and folders of a copy: ten seconds of copying, and far more than an agent has."""
MAX_VISITED: Final = 1_000_000
"""Entries that are looked at, left out or not: about ten seconds."""
LEFT_OUT: Final = frozenset(
    {".git", ".hg", "__pycache__", "node_modules", "tracelake-data"}
    | {".mypy_cache", ".ruff_cache", ".pytest_cache", ".tox", ".ipynb_checkpoints"}
)
"""Names that are never part of an agent: history, caches, and what recording it has written."""
LEFT_OUT_SUFFIX: Final = ".pyc"
LARGEST: Final = 5
"""How many files or folders the error names."""
MIB: Final = 1 << 20
GONE: Final = (FileNotFoundError, NotADirectoryError)
"""What a folder in use says of what has vanished since it was listed."""


@dataclass(frozen=True, slots=True)
class Visit:
    """A folder to be looked into."""

    source: str
    relative: str
    """In the copy: ``""``, or ending in a slash."""
    rules: Rules
    tracked_only: bool
    above: frozenset[tuple[int, int]]
    """Device and inode of the folders on the way here, so that no link leads round in circles."""


class Listing:
    """What belongs into the copy of a folder; paths are relative to it.

    Attributes:
        files: where the content of each is.
        folders: where the mode of each is from; a folder comes before what is in it.
        links: what they say.
    """

    def __init__(self, root: Path) -> None:
        self.files: dict[str, str] = {}
        self.folders: dict[str, str] = {}
        self.links: dict[str, str] = {}
        self._root = str(root)
        self._rules = rules_above(root)
        self._prefix = prefix_of(root, self._rules.top)
        self._tracked = tracked_files(root)
        self._tracked_folders = {str(one) + "/" for path in self._tracked for one in Path(path).parents}
        self._home = os.path.realpath(home())
        self._sizes: dict[str, int] = {}
        self._bytes = 0
        self._visited = 0
        self._to_visit: list[Visit] = []
        self._to_follow: list[tuple[str, str, Visit]] = []

    def walk(self) -> None:
        """Find everything.

        Raises:
            DeploymentError: it is too much, or a folder can't be read.
        """
        root = self._root
        self._to_visit.append(Visit(root, "", self._rules, False, frozenset({identity(Path(root).stat())})))
        # Where links lead is decided when it is known what else is copied; then there may be more to walk.
        while self._to_visit or self._to_follow:
            while self._to_visit:
                self._visit(self._to_visit.pop())
            pending, self._to_follow = self._to_follow, []
            for link in pending:
                with contextlib.suppress(*GONE):
                    self._resolve(*link)

    def _visit(self, visit: Visit) -> None:
        try:
            rules = visit.rules.within(self._prefix + visit.relative, Path(visit.source))
            with os.scandir(visit.source) as entries:
                for entry in entries:
                    self._visited += 1
                    if self._visited > MAX_VISITED:
                        raise self._too_large()
                    with contextlib.suppress(*GONE):
                        self._take(entry, visit, rules)
        except GONE:
            return
        except PermissionError as error:
            raise unreadable(error.filename or visit.source) from error

    def _take(self, entry: "os.DirEntry[str]", visit: Visit, rules: Rules) -> None:
        relative = visit.relative + entry.name
        if is_left_out(entry.name):
            return
        if entry.is_symlink():
            # git takes a link for a file; a pattern like `data/` means one to a folder just as well.
            if self._is_wanted(relative, visit, rules) and (
                relative in self._tracked or not rules.ignores(f"{self._prefix}{relative}/")
            ):
                self._to_follow.append((entry.path, relative, visit))
        elif entry.is_dir():
            wanted = self._is_wanted(relative + "/", visit, rules)
            if wanted or relative + "/" in self._tracked_folders:
                self._add_folder(entry.path, relative, visit, rules, tracked_only=not wanted)
        elif entry.is_file() and self._is_wanted(relative, visit, rules):
            self._add_file(entry.path, relative, entry.stat().st_size)

    def _is_wanted(self, relative: str, visit: Visit, rules: Rules) -> bool:
        if relative in self._tracked:
            return True
        return not visit.tracked_only and not rules.ignores(self._prefix + relative)

    def _add_folder(
        self, source: str, relative: str, visit: Visit, rules: Rules, tracked_only: bool = False
    ) -> None:
        here = identity(Path(source).stat())
        if here in visit.above or is_environment(source) or os.path.realpath(source) == self._home:
            return
        self.folders[relative] = source
        self._to_visit.append(Visit(source, relative + "/", rules, tracked_only, visit.above | {here}))
        self._check_limits()

    def _add_file(self, source: str, relative: str, size: int) -> None:
        self.files[relative] = source
        self._sizes[relative] = size
        self._bytes += size
        self._check_limits()

    def _resolve(self, path: str, relative: str, visit: Visit) -> None:
        """A link stays one if it leads to what is copied; else that is copied in its place, if anything."""
        target = os.path.realpath(path)
        try:
            found = Path(target).stat()
        except PermissionError as error:
            raise unreadable(path) from error
        except OSError as error:
            if error.errno == errno.ELOOP:
                return
            raise
        inner = prefix_of(Path(target), Path(self._root)).removesuffix("/")
        if target == self._root or inner in self.files or inner in self.folders:
            self.links[relative] = os.path.relpath(inner or ".", os.path.dirname(relative) or ".")  # noqa: PTH120
        elif is_left_out(Path(target).name):
            return
        elif stat.S_ISDIR(found.st_mode):
            self._add_folder(target, relative, visit, Rules(self._rules.top))
        elif stat.S_ISREG(found.st_mode):
            self._add_file(target, relative, found.st_size)

    def _check_limits(self) -> None:
        if self._bytes > MAX_BYTES or len(self.files) + len(self.folders) > MAX_FILES:
            raise self._too_large()

    def _too_large(self) -> DeploymentError:
        if self._bytes > MAX_BYTES:
            largest = [f"{name!r} {size / MIB:,.1f} MiB" for name, size in heaviest(self._sizes)]
        else:
            largest = [f"{name!r} {count:,} files" for name, count in heaviest(dict.fromkeys(self.files, 1))]
        return DeploymentError(
            f"cannot copy {self._root!r}: {self._bytes / MIB:,.1f} MiB in {len(self.files):,} files by now, "
            f"of {self._visited:,} entries looked at, and the limits are {MAX_BYTES // MIB} MiB, "
            f"{MAX_FILES:,} files and {MAX_VISITED:,} entries; largest so far: {', '.join(largest)}; add "
            "what the agent doesn't need to .gitignore, or give a smaller working_dir"
        )


def is_left_out(name: str) -> bool:
    return name in LEFT_OUT or name.endswith(LEFT_OUT_SUFFIX)


def is_environment(folder: str) -> bool:
    """Whether a folder is a virtual environment, or one of conda's."""
    return os.path.lexists(f"{folder}/pyvenv.cfg") or os.path.lexists(f"{folder}/conda-meta")


def identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def prefix_of(path: Path, top: Path) -> str:
    """A folder below another as ``""`` or ``a/b/``; also ``""`` where it isn't below."""
    parts = path.relative_to(top).parts if path.is_relative_to(top) else ()
    return "".join(f"{part}/" for part in parts)


def heaviest(sizes: dict[str, int]) -> list[tuple[str, int]]:
    """The largest files and folders: as deep as one entry makes up most of its folder."""
    totals: dict[str, dict[str, int]] = {}
    for path, size in sizes.items():
        parts = path.split("/")
        for depth in range(len(parts)):
            inner = totals.setdefault("/".join(parts[:depth]), {})
            name = "/".join(parts[: depth + 1])
            inner[name] = inner.get(name, 0) + size
    found = []
    for name, size in largest_of(totals.get("", {})):
        while name in totals:
            [(deeper, part)] = largest_of(totals[name])[:1]
            if part < size / 2:
                break
            name, size = deeper, part
        found.append((name + "/" if name in totals else name, size))
    return sorted(found, key=lambda one: -one[1])


def largest_of(sizes: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(sizes.items(), key=lambda one: -one[1])[:LARGEST]


def unreadable(path: str) -> DeploymentError:
    return DeploymentError(
        f"cannot read {path!r}: permission denied; make it readable, or add it to .gitignore"
    )
