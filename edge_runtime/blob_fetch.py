"""Fetching one blob: first ask for the wave that serves everybody, then pull what is missing. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from edge_runtime.protocol.chunks import Assembler
from edge_runtime.protocol.ids import Digest
from edge_runtime.protocol.manifest import BlobRef
from edge_runtime.protocol.messages import Chunk, Fetch

PULL_AT_ONCE = 64


@dataclass
class BlobFetch:
    """Progress on one blob. ``ask`` says what to send now; ``take`` consumes pieces from either path."""

    ref: BlobRef
    next_ask_at: float = 0.0
    asked: int = 0

    def __post_init__(self) -> None:
        self._assembler = Assembler(self.ref.digest, self.ref.size)
        self._pulling: set[int] = set()

    @property
    def digest(self) -> Digest:
        return self.ref.digest

    def take(self, chunk: Chunk) -> bool:
        """True if this piece was new. Raises RemoteProtocolError(BAD_DIGEST, ...) for one that does not belong."""
        if chunk.digest != self.ref.digest:
            return False
        if chunk.index is not None:
            news = self._assembler.add_chunk(chunk.index, chunk.content)
            self._pulling.discard(chunk.index)
            return news
        news = self._assembler.index is None
        self._assembler.add_index(chunk.content)
        return news

    def batch_done(self) -> bool:
        """Whether this piece was the last that a pull asked for, so that the next may be asked for at once."""
        waits_for_wave = self.asked <= 1
        return not waits_for_wave and self._assembler.index is not None and not self._pulling

    def content(self) -> bytes | None:
        """The whole blob once every piece is there."""
        return bytes(self._assembler.content()) if self._assembler.complete() else None

    def ask(self) -> Fetch:
        """First the wave; from then on, exactly what is missing."""
        self.asked += 1
        if self.asked == 1:
            return Fetch(digest=self.ref.digest, wave=True)
        if self._assembler.index is None:
            return Fetch(digest=self.ref.digest, wave=False, want_index=True)
        wanted = self._assembler.missing()[:PULL_AT_ONCE]
        self._pulling = set(wanted)
        return Fetch(digest=self.ref.digest, wave=False, chunks=wanted)
