"""Frozen copies: a folder as it is now, for as long as a deployment needs it.

What holds:

- The copy has its name only when it is complete; until then it is a ``.new-`` folder beside it, and after a
  failure there is none. It is on disk before it has its name.
- At the end of copying, every file in it was what the source had at that moment: what changed after it was
  copied is copied again, and what vanished is not in it.
- No link in it leads out of it, and none into nothing.
- It is its owner's alone.
"""

import os
import shutil
import stat
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deploy.listing import MAX_BYTES, MAX_FILES, Listing, unreadable
from inference_table.disk import make_private_dirs, sync_dir
from inference_table.errors import DeploymentError

__all__ = ["MAX_BYTES", "MAX_FILES", "FrozenCopy", "freeze"]

ROUNDS: Final = 5
"""How often what changes under the copy is copied again, after a pause that doubles."""
FIRST_PAUSE_SECONDS: Final = 0.05
BLOCK_BYTES: Final = 1 << 20

Stamp = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FrozenCopy:
    """What a copy holds: its ``files``, and the ``bytes`` in them."""

    files: int
    bytes: int


def freeze(working_dir: Path, to: Path) -> FrozenCopy:
    """Copy a folder, without what git ignores, virtual environments, caches and version control.

    What git tracks is copied though it may be ignored. Links within the folder stay links; of what others
    lead to, the content is copied. Sockets, pipes and devices are left out.

    Args:
        working_dir: the folder; may change meanwhile.
        to: the copy; must not exist.

    Raises:
        DeploymentError: it is above :data:`MAX_BYTES` or :data:`MAX_FILES`, a file can't be read or changes
            all the time, or the copy can't be written.
    """
    root = Path(os.path.realpath(working_dir))
    if not root.is_dir():
        raise DeploymentError(f"cannot copy '{working_dir}': it is no folder; give another working_dir")
    if os.path.lexists(to):
        raise DeploymentError(f"cannot copy '{working_dir}' to '{to}': it exists; remove it")
    try:
        listing = Listing(root)
        listing.walk()
        make_private_dirs(to.parent)
        new = Path(tempfile.mkdtemp(prefix=f".new-{to.name}-", dir=to.parent))
        try:
            frozen = copy(listing, new)
            os.sync()  # once: syncing each file takes far longer
            new.rename(to)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        sync_dir(to.parent)
    except OSError as error:
        raise DeploymentError(
            f"cannot copy '{working_dir}' to '{to}': {error}; see to it, and try again"
        ) from error
    return frozen


def copy(listing: Listing, new: Path) -> FrozenCopy:
    """Copy what was found into an empty folder, again where it changes meanwhile."""
    for relative, source in listing.folders.items():
        new.joinpath(relative).mkdir(mode=0o700)
        new.joinpath(relative).chmod(stat.S_IMODE(mode_of(source)) & 0o777 | 0o700)
    for relative, text in listing.links.items():
        new.joinpath(relative).symlink_to(text)
    stamps: dict[str, Stamp | None] = {}
    changed = list(listing.files)
    for turn in range(ROUNDS):
        if turn > 1:
            time.sleep(FIRST_PAUSE_SECONDS * 2**turn)
        stamps |= {relative: copy_file(listing.files[relative], new / relative) for relative in changed}
        changed = [one for one, stamp in stamps.items() if stamp_at(listing.files[one]) != stamp]
        if not changed:
            break
    else:
        raise DeploymentError(
            f"cannot copy {listing.files[changed[0]]!r}: it changes all the time; add it to .gitignore, or "
            "stop what writes to it"
        )
    for relative in listing.links:
        if not new.joinpath(relative).exists():
            new.joinpath(relative).unlink()  # what it led to has vanished
    sizes = [stamp[2] for stamp in stamps.values() if stamp is not None]
    return FrozenCopy(files=len(sizes), bytes=sum(sizes))


def copy_file(source: str, target: Path) -> Stamp | None:
    """Copy one file, which replaces what is there; None, and no file, where it has vanished."""
    target.unlink(missing_ok=True)
    try:
        # Not to wait for a writer, should a pipe have taken its place.
        reading = os.open(source, os.O_RDONLY | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        raise unreadable(source) from error
    with open(reading, "rb", buffering=0) as file:  # noqa: PTH123 - of a file descriptor
        found = os.fstat(reading)
        if not stat.S_ISREG(found.st_mode):
            return None
        with target.open("xb") as out:
            left = found.st_size  # a file that grows as fast as it is read would have no end
            while left > 0 and (block := file.read(min(left, BLOCK_BYTES))):
                out.write(block)
                left -= len(block)
            os.fchmod(out.fileno(), stat.S_IMODE(found.st_mode) & 0o777)
    os.utime(target, ns=(found.st_mtime_ns, found.st_mtime_ns))
    return stamp_of(found)


def mode_of(folder: str) -> int:
    try:
        return os.stat(folder).st_mode  # noqa: PTH116
    except FileNotFoundError:
        return 0o700


def stamp_at(path: str) -> Stamp | None:
    try:
        found = os.stat(path)  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        return None
    return stamp_of(found) if stat.S_ISREG(found.st_mode) else None


def stamp_of(found: os.stat_result) -> Stamp:
    """What tells a file from the same one with other content."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
