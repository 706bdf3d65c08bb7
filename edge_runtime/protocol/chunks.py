"""Content in numbered pieces: blobs that anyone may fetch by digest, and payloads sent in one go.

A *blob* has an index, ``FLB1`` || size (u64 LE) || chunk size (u32 LE) || SHA-256 of each chunk, and is named
by the SHA-256 of that index: every chunk is checked on arrival, from whom and in which order it may come.
A blob of zero bytes has no chunks; it is complete as soon as its index is there.
A *payload* needs no index: the envelope of each piece says i of n and the digest of the whole.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from edge_runtime.protocol.errors import LocalProtocolError, RemoteProtocolError
from edge_runtime.protocol.ids import DIGEST_BYTES, Digest, sha256
from edge_runtime.protocol.rejects import Reject

MAGIC = b"FLB1"
KIB = 1024
MIN_CHUNK_BYTES = 8 * KIB
MAX_CHUNK_BYTES = 16 * KIB * KIB
DEFAULT_CHUNK_BYTES = 256 * KIB
DEFAULT_WAITING_BYTES = 4 * KIB * KIB
_HEADER = struct.Struct("<4sQI")


@dataclass(frozen=True)
class BlobIndex:
    """What a blob is made of. Build it with ``split`` or ``parse``, which check what this does not.

    ``size``: bytes of content. ``chunk_bytes``: length of each chunk but the last. ``hashes``: SHA-256 of
    each chunk, ceil(size / chunk_bytes) of them.
    """

    size: int
    chunk_bytes: int
    hashes: tuple[Digest, ...]

    @classmethod
    def parse(cls, raw: bytes, size_bound: int) -> BlobIndex:
        """The index in these bytes. Raises RemoteProtocolError(TOO_LARGE) for content above ``size_bound``
        bytes, (MALFORMED) for anything that ``to_bytes`` does not write."""
        if len(raw) < _HEADER.size:
            raise RemoteProtocolError(Reject.MALFORMED, f"a blob index of {len(raw)} bytes")
        magic, size, chunk_bytes = _HEADER.unpack_from(raw)
        if magic != MAGIC or not MIN_CHUNK_BYTES <= chunk_bytes <= MAX_CHUNK_BYTES:
            raise RemoteProtocolError(
                Reject.MALFORMED, f"blob index: {magic!r}, chunks of {chunk_bytes} bytes"
            )
        if size > size_bound:
            raise RemoteProtocolError(Reject.TOO_LARGE, f"a blob of {size} bytes, {size_bound} are allowed")
        if len(raw) != index_bytes(size, chunk_bytes):
            raise RemoteProtocolError(
                Reject.MALFORMED, f"blob index: {len(raw)} bytes for {size} in chunks of {chunk_bytes}"
            )
        hashes = (raw[at : at + DIGEST_BYTES] for at in range(_HEADER.size, len(raw), DIGEST_BYTES))
        return cls(size, chunk_bytes, tuple(Digest(h) for h in hashes))

    def to_bytes(self) -> bytes:
        return _HEADER.pack(MAGIC, self.size, self.chunk_bytes) + b"".join(self.hashes)

    @cached_property
    def digest(self) -> Digest:
        """The name of the blob: SHA-256 of ``to_bytes``."""
        return sha256(self.to_bytes())

    @property
    def count(self) -> int:
        return len(self.hashes)

    def span(self, i: int) -> slice:
        """Where chunk i lies in the content."""
        return slice(i * self.chunk_bytes, min((i + 1) * self.chunk_bytes, self.size))


def index_bytes(size: int, chunk_bytes: int = MIN_CHUNK_BYTES) -> int:
    """Length of the index of ``size`` bytes of content; with the default, of the longest one allowed."""
    return _HEADER.size + DIGEST_BYTES * -(-size // chunk_bytes)


def split(content: bytes, chunk_bytes: int = DEFAULT_CHUNK_BYTES) -> tuple[BlobIndex, tuple[memoryview, ...]]:
    """The index of a content and its chunks, as views that copy nothing.

    Raises LocalProtocolError for a chunk size outside 8 KiB to 16 MiB.
    """
    chunks = tuple(_pieces(content, chunk_bytes))
    return BlobIndex(len(content), chunk_bytes, tuple(_sha256(chunk) for chunk in chunks)), chunks


class Assembler:
    """Collects one blob. Index and chunks come in any order, more than once, or never.

    Chunks that overtake the index wait unchecked, up to ``waiting_bytes`` in all; what does not fit or
    turns out wrong is forgotten and reported missing. Memory: the size of the blob, once.
    """

    def __init__(
        self, digest: Digest, size_bound: int, *, waiting_bytes: int = DEFAULT_WAITING_BYTES
    ) -> None:
        """``digest``: the blob to collect, from a verified message. ``size_bound``: bytes it may have."""
        self.digest = digest
        self.index: BlobIndex | None = None
        self._size_bound = size_bound
        self._room = waiting_bytes
        self._waiting: dict[int, bytes] = {}
        self._content = bytearray()
        self._have: set[int] = set()

    def add_index(self, raw: bytes) -> None:
        """Take the serialized index; a second one is ignored.

        Raises RemoteProtocolError(BAD_DIGEST) when it is another blob's, (TOO_LARGE) or (MALFORMED).
        """
        if self.index is not None:
            return
        if len(raw) > index_bytes(self._size_bound):
            raise RemoteProtocolError(Reject.TOO_LARGE, f"an index of {len(raw)} bytes")
        if sha256(raw) != self.digest:
            raise RemoteProtocolError(Reject.BAD_DIGEST, f"the index is not that of blob {self.digest.hex()}")
        self.index = BlobIndex.parse(raw, self._size_bound)
        self._content = bytearray(self.index.size)
        for i, chunk in self._waiting.items():
            if i < self.index.count and _fits(self.index, i, chunk):
                self._place(self.index, i, chunk)
        self._waiting.clear()

    def add_chunk(self, i: int, chunk: bytes | memoryview) -> bool:
        """Take chunk i; True when it was news (so that the caller may store it).

        Raises RemoteProtocolError(BAD_DIGEST) when it is not the chunk the index names, (MALFORMED) for an
        index outside the blob, (TOO_LARGE) above 16 MiB.
        """
        if i < 0 or len(chunk) > MAX_CHUNK_BYTES:
            raise RemoteProtocolError(Reject.TOO_LARGE, f"chunk {i} of {len(chunk)} bytes")
        if self.index is None:
            return self._keep_waiting(i, chunk)
        if i >= self.index.count:
            raise RemoteProtocolError(Reject.MALFORMED, f"chunk {i} of {self.index.count}")
        if i in self._have:
            return False
        if not _fits(self.index, i, chunk):
            raise RemoteProtocolError(Reject.BAD_DIGEST, f"chunk {i} of blob {self.digest.hex()}")
        self._place(self.index, i, chunk)
        return True

    def missing(self) -> tuple[int, ...]:
        """The chunks still to come, ascending; empty while the index itself is missing."""
        return tuple(i for i in range(self.index.count if self.index else 0) if i not in self._have)

    def complete(self) -> bool:
        return self.index is not None and len(self._have) == self.index.count

    def content(self) -> memoryview:
        """The whole content, read-only, not copied. Raises LocalProtocolError before it is complete."""
        if not self.complete():
            raise LocalProtocolError(f"blob {self.digest.hex()} is not complete")
        return memoryview(self._content).toreadonly()

    def _keep_waiting(self, i: int, chunk: bytes | memoryview) -> bool:
        replaced = len(self._waiting.get(i, b""))
        news = i not in self._waiting and i < -(-self._size_bound // MIN_CHUNK_BYTES)
        # A later chunk replaces an earlier one: neither can be judged yet, and a forger must not block it.
        if (news or i in self._waiting) and 0 < len(chunk) <= self._room + replaced:
            self._waiting[i] = bytes(chunk)
            self._room += replaced - len(chunk)
            return news
        return False

    def _place(self, index: BlobIndex, i: int, chunk: bytes | memoryview) -> None:
        self._content[index.span(i)] = chunk
        self._have.add(i)


class PieceAssembler:
    """Collects one payload whose pieces each say: i of ``count``, and the digest of the whole."""

    def __init__(self, count: int, digest: Digest, size_bound: int) -> None:
        """``size_bound``: bytes the payload may have. Raises RemoteProtocolError(MALFORMED) for a count of
        0, (TOO_LARGE) for more pieces than a payload of that size can have."""
        if count < 1:
            raise RemoteProtocolError(Reject.MALFORMED, "a payload of no pieces")
        if count > max(1, -(-size_bound // MIN_CHUNK_BYTES)):
            raise RemoteProtocolError(Reject.TOO_LARGE, f"{count} pieces for at most {size_bound} bytes")
        self.count = count
        self.digest = digest
        self._room = size_bound
        self._pieces: dict[int, bytes] = {}

    def add(self, i: int, count: int, digest: Digest, piece: bytes) -> bool:
        """Take piece i; True when it was news. The same piece again is ignored.

        Raises RemoteProtocolError(CONFLICTING) for another count or digest, or other bytes for a piece
        that is there; (MALFORMED) for i outside the count or an empty piece of several; (TOO_LARGE) beyond
        the size bound; (BAD_DIGEST) when the last piece does not complete the announced content: all
        pieces are dropped then.
        """
        if count != self.count or digest != self.digest:
            raise RemoteProtocolError(Reject.CONFLICTING, "a piece of another payload")
        if not 0 <= i < count or (not piece and count > 1):
            raise RemoteProtocolError(Reject.MALFORMED, f"piece {i} of {count}, {len(piece)} bytes")
        if i in self._pieces:
            if self._pieces[i] != piece:
                raise RemoteProtocolError(Reject.CONFLICTING, f"piece {i} came before with other bytes")
            return False
        if len(piece) > self._room:
            raise RemoteProtocolError(Reject.TOO_LARGE, f"{len(piece)} bytes, room for {self._room}")
        self._pieces[i] = piece
        self._room -= len(piece)
        if self.complete() and sha256(*self._joinable()) != self.digest:
            self._room += sum(map(len, self._pieces.values()))
            self._pieces.clear()
            raise RemoteProtocolError(Reject.BAD_DIGEST, f"the {count} pieces are not what was announced")
        return True

    def missing(self) -> tuple[int, ...]:
        """The pieces still to come, ascending."""
        return tuple(i for i in range(self.count) if i not in self._pieces)

    def complete(self) -> bool:
        return len(self._pieces) == self.count

    def content(self) -> bytes:
        """The payload. Raises LocalProtocolError before it is complete."""
        if not self.complete():
            raise LocalProtocolError(f"{len(self.missing())} of {self.count} pieces are missing")
        return b"".join(self._joinable())

    def _joinable(self) -> Iterator[bytes]:
        return (self._pieces[i] for i in range(self.count))


def _fits(index: BlobIndex, i: int, chunk: bytes | memoryview) -> bool:
    span = index.span(i)
    return len(chunk) == span.stop - span.start and _sha256(chunk) == index.hashes[i]


def _sha256(content: bytes | memoryview) -> Digest:
    return Digest(hashlib.sha256(content).digest())


def _pieces(content: bytes, piece_bytes: int) -> Iterator[memoryview]:
    if not MIN_CHUNK_BYTES <= piece_bytes <= MAX_CHUNK_BYTES:
        raise LocalProtocolError(
            f"pieces of {piece_bytes} bytes: {MIN_CHUNK_BYTES} to {MAX_CHUNK_BYTES} are allowed"
        )
    view = memoryview(content).toreadonly()
    return (view[at : at + piece_bytes] for at in range(0, len(view), piece_bytes))
