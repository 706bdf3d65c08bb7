"""The entropy stage: bytes to fewer bytes. Decoders know the size they expect and never allocate more."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

from edge_runtime.protocol.errors import LocalProtocolError, RemoteProtocolError
from edge_runtime.protocol.rejects import Reject

try:
    import zstandard
except ImportError:  # no wheel for this machine: zlib is in the standard library everywhere
    HAS_ZSTD = False
else:
    HAS_ZSTD = True

_ZSTD_LEVEL = 3
_ZLIB_LEVEL = 6


@dataclass(frozen=True)
class Entropy:
    """``compress(content)``; ``decompress(encoded, size)``: exactly ``size`` bytes, or
    RemoteProtocolError(BAD_ENCODING); ``bound(size)``: no longer encoding of ``size`` bytes is made."""

    name: str
    compress: Callable[[bytes], bytes]
    decompress: Callable[[bytes, int], bytes]
    bound: Callable[[int], int]


def _zlib_decompress(encoded: bytes, size: int) -> bytes:
    inflate = zlib.decompressobj()
    try:
        content = inflate.decompress(encoded, size + 1)  # one more than wanted tells a longer content
    except zlib.error as error:
        raise RemoteProtocolError(Reject.BAD_ENCODING, f"zlib: {error}") from None
    if len(content) != size or not inflate.eof or inflate.unused_data:
        raise RemoteProtocolError(Reject.BAD_ENCODING, f"zlib: not one stream of {size} bytes")
    return content


ZLIB = Entropy(
    name="zlib",
    compress=lambda content: zlib.compress(content, _ZLIB_LEVEL),
    decompress=_zlib_decompress,
    bound=lambda size: size + (size >> 10) + 64,  # zlib.h compressBound is lower; refuses nothing made here
)


def _zstd_compress(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(content)


def _zstd_decompress(encoded: bytes, size: int) -> bytes:
    try:
        # The library allocates what the frame header declares, so the header is read and judged first.
        declared = zstandard.get_frame_parameters(encoded).content_size
        if declared != size:
            raise RemoteProtocolError(Reject.BAD_ENCODING, f"zstd: not one frame declared as {size} bytes")
        content = zstandard.ZstdDecompressor().decompress(
            encoded, max_output_size=size, read_across_frames=False, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise RemoteProtocolError(Reject.BAD_ENCODING, f"zstd: {error}") from None
    if len(content) != size:
        raise RemoteProtocolError(Reject.BAD_ENCODING, f"zstd: {len(content)} bytes, not {size}")
    return content


def zstd() -> Entropy:
    """Zstandard (RFC 8878), one frame with its content size. Raises LocalProtocolError where it is absent."""
    if not HAS_ZSTD:
        raise LocalProtocolError("zstandard is not installed here: see codecs.available()")
    return Entropy(
        name="zstd",
        compress=_zstd_compress,
        decompress=_zstd_decompress,
        bound=lambda size: size + (size >> 8) + 64 + 1024,  # zstd.h ZSTD_COMPRESSBOUND and the frame header
    )
