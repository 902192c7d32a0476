"""One segment: a file of rows that never changes.

Format: an Arrow IPC stream with the columns of :data:`~inference_table.schema.SCHEMA` (any Arrow reader
takes it), then 12 bytes that such a reader doesn't look at: the mark ``TLSEG1`` and two zeros, and the CRC-32
of all before, little-endian. A segment that was not synced before the power failed has its name but may have
holes; the sum tells, so that a hole never becomes a row.
"""

import errno
import io
import mmap
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow as pa

from inference_table.disk import create_private
from inference_table.errors import SegmentError

__all__ = ["SUFFIX", "Segment", "write_segment"]

SUFFIX: Final = ".arrow"
TRAILER: Final = struct.Struct("<8sI")
MARK: Final = b"TLSEG1\0\0"
READ_BYTES: Final = 1 << 20
"""What is read at a time to check the sum: fits a processor's cache."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One file of a spool folder, as it was listed.

    ``size`` is in bytes, ``mtime`` in seconds since 1970.
    """

    sequence: int
    path: Path
    size: int
    mtime: float

    def read(self) -> pa.Table:
        """The rows, memory-mapped: valid even after the file is deleted.

        Raises:
            SegmentError: the file is damaged, for good.
            FileNotFoundError: it was committed and deleted, or set aside, meanwhile.
            OSError, MemoryError: it can't be read now.
        """
        return read_segment(self.path)


def write_segment(path: Path, batch: pa.RecordBatch) -> None:
    """Write a segment to a new file; neither synced nor renamed."""
    os.close(create_private(path))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    with path.open("r+b") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            trailer = TRAILER.pack(MARK, zlib.crc32(content))
        file.seek(0, os.SEEK_END)
        file.write(trailer)


def read_segment(path: Path) -> pa.Table:
    """The rows of a segment file; raises as :meth:`Segment.read`."""
    with path.open("rb", buffering=0) as file:
        length = os.fstat(file.fileno()).st_size - TRAILER.size
        if length <= 0:
            raise damaged(path, f"it has {length + TRAILER.size} bytes, which is no segment")
        # Read first, map second: a failing disk is an OSError here, but under a mapping a SIGBUS.
        found = checksum(file, length)
        mark, expected = TRAILER.unpack(file.read(TRAILER.size))
        if mark != MARK:
            raise damaged(path, "its end is missing")
        if found != expected:
            raise damaged(path, "its checksum is wrong")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    rows = parse(path, pa.py_buffer(mapped).slice(0, length))
    if hasattr(mmap, "MADV_DONTNEED"):
        # The check has touched all of it. A batch of segments would count as this process's memory, before
        # the first of them is needed.
        mapped.madvise(mmap.MADV_DONTNEED)
    return rows


def checksum(file: io.FileIO, length: int) -> int:
    """CRC-32 of the first ``length`` bytes; leaves the file there."""
    block = memoryview(bytearray(min(length, READ_BYTES)))
    crc = 0
    while length > 0:
        count = file.readinto(block[: min(length, READ_BYTES)])
        if not count:
            break
        crc = zlib.crc32(block[:count], crc)
        length -= count
    return crc


def parse(path: Path, content: pa.Buffer) -> pa.Table:
    try:
        table = pa.ipc.open_stream(content).read_all()
        table.validate(full=True)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        raise damaged(path, str(error)) from error
    except OSError as error:
        # Arrow reports a malformed stream as an OSError without a number; one with a number is the disk's.
        if error.errno is not None and error.errno != errno.EINVAL:
            raise
        raise damaged(path, str(error)) from error
    return table


def damaged(path: Path, why: str) -> SegmentError:
    return SegmentError(
        f"cannot read segment {path}: {why}; it is set aside in the folder 'quarantine', "
        "from where it can be retried once it is readable"
    )
