"""Fetching one blob: first ask for the wave that serves everybody, then pull what is missing. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edge_runtime.protocol.chunks import Assembler
from edge_runtime.protocol.ids import Digest
from edge_runtime.protocol.manifest import BlobRef
from edge_runtime.protocol.messages import Chunk, Fetch

PULL_AT_ONCE = 64
RETRY_S = 2.0
RETRY_CAP_S = 60.0
GAPS = 3.0  # on a slow link, as many of its pauses between two pieces are no reason to ask again
_FORGET = 7 / 8  # of the longest pause, with each piece

Random = Callable[[], float]
"""Uniform in [0, 1)."""


@dataclass
class BlobFetch:
    """Progress on one blob. ``ask`` says what to send at ``next_ask_at``; ``take`` consumes pieces of either path.

    What was asked for may be on its way behind a slow link or in a broker's queue, and asking for it twice makes it
    slower. So it asks again only after silence, later each time, and first for the last of the chunks it expects:
    couriers keep the order, so once that is there, whatever is still missing was lost.

    ``wave`` False: pull from the first piece on. ``assembler``: where pieces go, None for one in memory.
    """

    ref: BlobRef
    next_ask_at: float = 0.0
    wave: bool = True
    assembler: Assembler | None = None
    asked: int = 0

    def __post_init__(self) -> None:
        self._assembler = self.assembler or Assembler(self.ref.digest, self.ref.size)
        self._expected: set[int] = set()  # chunks that are on their way, as far as is known
        self._batch_done = False
        self._in_vain = 0  # asks since the last piece
        self._heard_at: float | None = None
        self._gap_s = 0.0

    @property
    def digest(self) -> Digest:
        return self.ref.digest

    def take(self, chunk: Chunk, now: float, random: Random) -> bool:
        """True if this piece was new. Raises RemoteProtocolError(BAD_DIGEST, ...) for one that does not belong."""
        if chunk.digest != self.ref.digest:
            return False
        if chunk.index is not None:
            news = self._assembler.add_chunk(chunk.index, chunk.content)
            self._expected.discard(chunk.index)
        else:
            news = self._assembler.index is None
            self._assembler.add_index(chunk.content)
            if news and self.wave and self.asked <= 1:
                self._expected.update(self._assembler.missing())  # the wave brings them
        if self._heard_at is not None:
            self._gap_s = max(now - self._heard_at, self._gap_s * _FORGET)
        self._heard_at, self._in_vain = now, 0
        self._wait(now, random)
        if news and self._assembler.index is not None and not self._expected:
            self._batch_done = True
            self.next_ask_at = now
        return news

    def complete(self) -> bool:
        return self._assembler.complete()

    def content(self) -> bytes | None:
        """The whole blob once every piece is there."""
        return bytes(self._assembler.content()) if self._assembler.complete() else None

    def ask(self, now: float, random: Random) -> Fetch:
        """First the wave; from then on, what is missing."""
        self.asked += 1
        self._wait(now, random)
        self._in_vain += 1
        if self.wave and self.asked == 1:
            return Fetch(digest=self.ref.digest, wave=True)
        if self._assembler.index is None:
            return Fetch(digest=self.ref.digest, wave=False, want_index=True)
        missing = self._assembler.missing()
        last = (max(self._expected),) if self._expected else missing[-1:]
        wanted = missing[:PULL_AT_ONCE] if self._batch_done else last
        self._expected = set(wanted)
        self._batch_done = False
        return Fetch(digest=self.ref.digest, wave=False, chunks=wanted)

    def _wait(self, now: float, random: Random) -> None:
        """Twice as long after each ask that nothing followed; jitter, since a fleet falls silent all at once."""
        patience_s = max(RETRY_S, GAPS * self._gap_s) * 2.0 ** min(self._in_vain, 16)
        self.next_ask_at = now + min(patience_s, RETRY_CAP_S) * (1 + random())
