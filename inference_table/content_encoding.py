"""Undo the ``content-encoding`` of a body, within a limit on what comes out of it.

gzip and deflate need nothing; ``br`` and ``zstd`` need the extra ``tracelake[compression]``.
"""

import gzip
import io
import zlib
from collections.abc import Callable
from typing import Final, NamedTuple

__all__ = ["Decoded", "decode_body"]

MAX_ENCODINGS: Final = 5
"""Longest chain that is undone (curl's limit too): a client asks for each link's work with one word."""

ZSTD_WINDOW: Final = 8 * 1024 * 1024
"""Largest window of a zstd body, by RFC 9659; without it a frame's header alone can claim gigabytes."""

ZSTD_STEP: Final = 1024
"""Bytes fed to zstd at a time: at most 256 blocks of 128 KiB, so the limit is overshot by 32 MiB at most."""

GZIP_STEP: Final = 256 * 1024


class Decoded(NamedTuple):
    """What a body was before its encoding, or the head of it."""

    body: bytes
    complete: bool
    """False where the limit was reached, or the encoded body ended early (a client left)."""


def decode_body(body: bytes, content_encoding: str, limit: int) -> Decoded:
    """Undo ``content_encoding``, a header's value such as ``gzip`` or ``gzip, br``.

    At most ``limit`` bytes are returned, and not many more are ever held. A body that ends early gives what
    can be had of it.

    Raises:
        ValueError: an encoding is unknown, its package is missing, or the body is not encoded so.
    """
    encodings = [name for part in content_encoding.lower().split(",") if (name := part.strip())]
    if len(encodings) > MAX_ENCODINGS:
        raise ValueError(
            f"cannot undo {len(encodings)} content-encodings: at most {MAX_ENCODINGS} are undone"
        )
    complete = True
    for name in reversed(encodings):
        if (decoder := DECODERS.get(name)) is None:
            raise ValueError(f"cannot undo the content-encoding {name!r}: known are {', '.join(DECODERS)}")
        body, whole = decoder(body, limit)
        complete = complete and whole and len(body) <= limit
        body = body[:limit]
    return Decoded(body[:limit], complete and len(body) <= limit)


def _identity(body: bytes, limit: int) -> Decoded:  # noqa: ARG001 - same signature as the others
    return Decoded(body, True)


def _gzip(body: bytes, limit: int) -> Decoded:
    parts, size = [], 0
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(body)) as file:
            while size <= limit and (part := file.read1(GZIP_STEP)):
                parts.append(part)
                size += len(part)
    except EOFError:
        return Decoded(b"".join(parts), False)
    except gzip.BadGzipFile as error:
        # After a whole member, checksum and all, comes what is none: some servers end with a line break.
        if not (parts and str(error).startswith("Not a gzipped file")):
            raise ValueError(f"cannot undo the content-encoding 'gzip': {error}") from error
    except (OSError, zlib.error) as error:
        raise ValueError(f"cannot undo the content-encoding 'gzip': {error}") from error
    return Decoded(b"".join(parts), True)


def _deflate(body: bytes, limit: int) -> Decoded:
    # "deflate" means the zlib format, but some senders leave its header and checksum out.
    try:
        return _inflate(body, limit, zlib.MAX_WBITS)
    except zlib.error:
        try:
            return _inflate(body, limit, -zlib.MAX_WBITS)
        except zlib.error as error:
            raise ValueError(f"cannot undo the content-encoding 'deflate': {error}") from error


def _inflate(body: bytes, limit: int, window_bits: int) -> Decoded:
    decoder = zlib.decompressobj(window_bits)
    decoded = decoder.decompress(body, limit + 1)
    return Decoded(decoded, decoder.eof)


def _brotli(body: bytes, limit: int) -> Decoded:
    try:
        import brotli  # type: ignore[import-not-found,import-untyped,unused-ignore]  # optional, untyped
    except ImportError:
        raise ValueError(
            "cannot undo the content-encoding 'br': pip install 'tracelake[compression]'"
        ) from None
    decoder = brotli.Decompressor()
    parts, size, rest = [], 0, body
    try:
        while size <= limit:
            part = decoder.process(rest, output_buffer_limit=limit + 1 - size)
            rest = b""
            if not part and decoder.can_accept_more_data():
                break
            parts.append(part)
            size += len(part)
    except brotli.error as error:
        raise ValueError(f"cannot undo the content-encoding 'br': {error}") from error
    return Decoded(b"".join(parts), bool(decoder.is_finished()))


def _zstd(body: bytes, limit: int) -> Decoded:
    try:
        import zstandard
    except ImportError:
        raise ValueError(
            "cannot undo the content-encoding 'zstd': pip install 'tracelake[compression]'"
        ) from None
    parts, size, frame = [], 0, None
    try:
        for start in range(0, len(body), ZSTD_STEP):
            chunk = body[start : start + ZSTD_STEP]
            while chunk and size <= limit:
                frame = frame or zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()
                parts.append(frame.decompress(chunk))
                size += len(parts[-1])
                chunk, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except zstandard.ZstdError as error:
        raise ValueError(f"cannot undo the content-encoding 'zstd': {error}") from error
    return Decoded(b"".join(parts), frame is None)


DECODERS: Final[dict[str, Callable[[bytes, int], Decoded]]] = {
    "gzip": _gzip,
    "x-gzip": _gzip,
    "deflate": _deflate,
    "br": _brotli,
    "zstd": _zstd,
    "identity": _identity,
}
