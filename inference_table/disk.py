"""Files that survive: durable renames, file locks that forks don't inherit, and what a disk must offer.

A rename is durable once the folder that holds it is fsynced; a file's content once the file is.
"""

import fcntl
import os
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, Final, Self

from inference_table.settings import DATA_DIR

__all__ = [
    "FileLock",
    "create_private",
    "free_fraction",
    "make_data_dir_of",
    "make_data_dirs",
    "make_private_dirs",
    "network_file_system",
    "sync_dir",
    "sync_file",
    "write_durably",
]

PRIVATE_DIR: Final = 0o700
PRIVATE_FILE: Final = 0o600
"""Requests and answers of other people: for the owner of the process only."""

NETWORK_FILE_SYSTEMS: Final = frozenset(
    {"afs", "beegfs", "ceph", "cifs", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "ocfs2"}
    | {"smb3", "smbfs", "fuse.blobfuse", "fuse.blobfuse2", "fuse.ceph", "fuse.gcsfuse", "fuse.geesefs"}
    | {"fuse.glusterfs", "fuse.goofys", "fuse.juicefs", "fuse.rclone", "fuse.s3fs", "fuse.sshfs"}
)
"""Where a lock or an fsync may mean nothing, or a rename may be seen late by another machine."""

MOUNTS: Final = Path("/proc/self/mountinfo")


def sync_file(path: Path) -> None:
    """Wait until the content of a file is on disk."""
    _sync(path, os.O_RDONLY)


def sync_dir(path: Path) -> None:
    """Wait until the names in a folder are on disk."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    fd = os.open(path, flags)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def create_private(path: Path) -> int:
    """Create a file for the owner only; returns its file descriptor."""
    return os.open(path, os.O_CREAT | os.O_RDWR | os.O_TRUNC, PRIVATE_FILE)


def write_durably(path: Path, text: str) -> None:
    """Replace a small file by one with this text; a reader, or a crash, sees the old or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(create_private(temporary), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync_dir(path.parent)


def make_private_dirs(path: Path) -> list[Path]:
    """Create a folder and its parents for the owner only, durably; returns those that were missing."""
    missing = [path, *path.parents]
    missing = [folder for folder in reversed(missing) if not folder.is_dir()]
    for folder in missing:
        folder.mkdir(mode=PRIVATE_DIR, exist_ok=True)
        sync_dir(folder.parent)
    return missing


def make_data_dirs(path: Path) -> None:
    """As :func:`make_private_dirs`; a default data folder is kept out of the user's repository."""
    for folder in make_private_dirs(path):
        if folder.name == DATA_DIR.name:
            folder.joinpath(".gitignore").write_text("*\n", encoding="utf-8")


def make_data_dir_of(path: Path) -> None:
    """Create the default data folder that ``path`` is in, if it is in one."""
    for folder in path.parents:
        if folder.name == DATA_DIR.name:
            make_data_dirs(folder)


def free_fraction(path: Path) -> float:
    """Part of the disk that this process may still fill, from 0 to 1."""
    disk = os.statvfs(path)
    return disk.f_bavail / max(1, disk.f_blocks)


def network_file_system(path: Path, mounts: Path = MOUNTS) -> str | None:
    """Name of the network file system that holds ``path``, or None (also where the machine can't tell)."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except FileNotFoundError:
        return None
    kind = _mounted_kind(path.resolve(), lines)
    return kind if kind in NETWORK_FILE_SYSTEMS else None


def _mounted_kind(path: Path, lines: Iterable[str]) -> str:
    """Type of the mount nearest to ``path``; of two on one folder, the later covers the earlier."""
    depth, found = -1, ""
    for line in lines:
        fields, _, rest = line.partition(" - ")
        mount = Path(fields.split(" ")[4].replace("\\040", " "))
        if (path == mount or mount in path.parents) and len(mount.parts) >= depth:
            depth, found = len(mount.parts), rest.split(" ")[0]
    return found


class FileLock:
    """An exclusive lock on a file, held until :meth:`release` or the end of the process.

    A forked child doesn't hold it: the child's copy is closed, or the lock would outlive its owner there.
    """

    _all: ClassVar["weakref.WeakSet[FileLock]"] = weakref.WeakSet()

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None
        self._all.add(self)

    @property
    def is_held(self) -> bool:
        return self._fd is not None

    def acquire(self) -> bool:
        """Take the lock if nobody else holds it. The file is created if need be, its folder is not."""
        if self._fd is None:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT, PRIVATE_FILE)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                return False
            except BaseException:
                os.close(fd)
                raise
            self._fd = fd
        return True

    def release(self) -> None:
        """Give the lock back; without effect where it isn't held."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @classmethod
    def _release_in_child(cls) -> None:
        for lock in list(cls._all):
            lock.release()

    @staticmethod
    def is_free(path: Path) -> bool:
        """Whether nobody holds the lock of this file. A missing file is nobody's."""
        try:
            fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return True
        try:
            # Shared, so that two who ask at the same time don't take each other for the owner.
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(fd)
        return True


os.register_at_fork(after_in_child=FileLock._release_in_child)
