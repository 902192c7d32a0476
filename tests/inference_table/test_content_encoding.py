"""Bodies are decoded whatever they were encoded with, and never beyond the limit."""

import gzip
import os
import zlib
from collections.abc import Callable

import brotli  # type: ignore[import-not-found,import-untyped,unused-ignore]  # optional, untyped
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from inference_table.content_encoding import decode_body

BIG = 1 << 20


def raw_deflate(body: bytes) -> bytes:
    encoder = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return encoder.compress(body) + encoder.flush()


def fast_brotli(body: bytes) -> bytes:
    return bytes(brotli.compress(body, quality=1))


def zstd_streamed(body: bytes) -> bytes:
    """Without the content size in the frame's header, as a server that streams sends it."""
    encoder = zstandard.ZstdCompressor().compressobj()
    return encoder.compress(body) + encoder.flush()


ENCODERS: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("gzip", gzip.compress),
    ("x-gzip", gzip.compress),
    ("deflate", zlib.compress),
    ("deflate", raw_deflate),
    ("br", fast_brotli),
    ("zstd", zstandard.compress),
    ("zstd", zstd_streamed),
]
BODY = b"".join(b'{"line": %d}\n' % i for i in range(50_000)) + os.urandom(1000)


@pytest.mark.parametrize(("name", "encode"), ENCODERS)
@given(body=st.binary())
def test_any_body_comes_back(name: str, encode: Callable[[bytes], bytes], body: bytes) -> None:
    """What was encoded is decoded, whole."""
    assert decode_body(encode(body), name, BIG) == (body, True)


@pytest.mark.parametrize(("name", "encode"), ENCODERS)
def test_the_limit_cuts_exactly(name: str, encode: Callable[[bytes], bytes]) -> None:
    """As many bytes as allowed come back, and whether there were more."""
    encoded = encode(BODY)
    assert decode_body(encoded, name, len(BODY)) == (BODY, True)
    assert decode_body(encoded, name, len(BODY) - 1) == (BODY[:-1], False)
    assert decode_body(encoded, name, 10) == (BODY[:10], False)


@pytest.mark.parametrize(("name", "encode"), ENCODERS)
def test_a_body_that_ends_early_gives_its_head(name: str, encode: Callable[[bytes], bytes]) -> None:
    """A client that left, or a limit on what was captured, leaves a body that can still be read."""
    encoded = encode(BODY)
    head, complete = decode_body(encoded[: len(encoded) // 2], name, BIG)
    assert not complete
    assert len(head) > 1000
    assert BODY.startswith(head)


@pytest.mark.parametrize(("name", "encode"), ENCODERS)
def test_a_bomb_is_stopped_at_the_limit(name: str, encode: Callable[[bytes], bytes]) -> None:
    """Kilobytes that stand for a hundred megabytes give no more than the limit."""
    assert decode_body(encode(bytes(100_000_000)), name, 1000) == (bytes(1000), False)


@pytest.mark.parametrize(("name", "encode"), [(n, e) for n, e in ENCODERS if n in ("gzip", "zstd")])
def test_concatenated_members_are_one_body(name: str, encode: Callable[[bytes], bytes]) -> None:
    """A body may be written in several gzip members or zstd frames."""
    assert decode_body(encode(b"one ") + encode(b"") + encode(b"two"), name, BIG) == (b"one two", True)


@pytest.mark.parametrize("rest", [b"\n", b"garbage", b"\x1f", b"\0\0\0garbage"])
def test_bytes_after_the_last_gzip_member_are_passed_over(rest: bytes) -> None:
    """What came before them was complete, checksum and all."""
    assert decode_body(gzip.compress(b"text") + rest, "gzip", BIG) == (b"text", True)


def test_encodings_are_undone_in_reverse_order() -> None:
    """The header lists them as they were applied; names are case-insensitive, identity means nothing."""
    encoded = fast_brotli(gzip.compress(zlib.compress(b"text")))
    assert decode_body(encoded, "Deflate, GZIP ,identity, br", BIG) == (b"text", True)


@pytest.mark.parametrize("header", ["", " ", "identity", ","])
def test_no_encoding_leaves_the_body(header: str) -> None:
    """The limit holds for it too."""
    assert decode_body(b"text", header, BIG) == (b"text", True)
    assert decode_body(b"text", header, 2) == (b"te", False)


@pytest.mark.parametrize("name", ["gzip", "deflate", "br", "zstd"])
def test_a_body_not_encoded_so_is_an_error_that_names_the_encoding(name: str) -> None:
    """The caller can say what could not be undone."""
    with pytest.raises(ValueError, match=f"cannot undo the content-encoding '{name}'"):
        decode_body(b"this is not encoded at all, but plain text", name, BIG)


def test_a_damaged_checksum_is_an_error() -> None:
    """Bytes that are not what was sent are not passed off as such."""
    encoded = bytearray(gzip.compress(b"text"))
    encoded[-8] ^= 1
    with pytest.raises(ValueError, match="gzip"):
        decode_body(bytes(encoded), "gzip", BIG)


def test_an_unknown_encoding_is_an_error_that_lists_the_known() -> None:
    """So is a chain that only an attacker would send."""
    with pytest.raises(ValueError, match=r"'compress': known are gzip, .*zstd"):
        decode_body(b"x", "gzip, compress", BIG)
    with pytest.raises(ValueError, match="at most 5"):
        decode_body(b"x", "gzip," * 6, BIG)


def test_a_zstd_window_of_gigabytes_is_refused() -> None:
    """A frame's header cannot make us allocate what it claims to need."""
    parameters = zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=False)
    encoder = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    with pytest.raises(ValueError, match="zstd"):
        decode_body(encoder.compress(b"x" * 100) + encoder.flush(), "zstd", BIG)


@given(st.binary(max_size=200), st.sampled_from(["gzip", "deflate", "br", "zstd", "br, gzip"]))
def test_any_bytes_decode_or_raise_a_value_error(body: bytes, header: str) -> None:
    """Hostile bodies raise nothing else."""
    try:
        assert len(decode_body(body, header, 1000).body) <= 1000
    except ValueError as error:
        assert "cannot undo" in str(error)
