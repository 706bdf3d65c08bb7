"""Serving blobs: one wave on a shared topic for all who ask, then pull of what somebody missed. Pure.

Why so, with the figures: docs/decisions/0010-blob-delivery.md.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from edge_runtime.protocol import topics
from edge_runtime.protocol.chunks import BlobIndex, split
from edge_runtime.protocol.envelope import Header, pack
from edge_runtime.protocol.errors import RemoteProtocolError
from edge_runtime.protocol.ids import DeviceId, Digest, FederationId, sha256
from edge_runtime.protocol.kinds import Kind
from edge_runtime.protocol.manifest import BlobRef
from edge_runtime.protocol.messages import Chunk, Fetch
from edge_runtime.protocol.rejects import Reject

MAX_PULL = 64  # pieces of one request; the device asks again for the rest
MAX_GATHERS = 20  # a wave waits at most so many times ``gather_s``, or as long as it will take
MISSED_SHARE = 0.05  # of its delivery a wave waits for those who are expected and have not asked yet
SETTLE_S = 5.0  # after a wave, or as long as it took: its pieces are still on their way to some
LATE_S = 1.0  # of the pace goes to those who asked too late for a wave; the others pull once it is silent


@dataclass
class _Offer:
    index: BlobIndex
    bodies: dict[int | None, bytes]  # the encoded Chunk of each piece; None: of the index
    expected: int  # who will ask for the first wave, as far as is known; 0 afterwards
    listeners: set[DeviceId] = field(default_factory=set)  # who asked for the gathered or running wave
    wave_at: float | None = None  # when the gathered wave starts
    first_asked_at: float = 0.0  # for that wave
    in_wave: set[int | None] = field(default_factory=set)  # pieces of the running wave still to be published
    wave_began_at: float = 0.0
    settles_at: float = 0.0  # until then there is no other wave
    late_bytes: int = 0  # sent alone to those who asked too late for it


@dataclass(frozen=True)
class _Piece:
    digest: Digest
    index: int | None
    to: DeviceId | None  # None: the wave


@dataclass
class BlobServer:
    """``gather_s``: a wave starts when nobody has asked for so long, or when it has waited long enough.

    Long enough: MAX_GATHERS times that or, if longer, as long as its own delivery to all who have asked will take:
    nobody gets it later than twice the time it takes at best. Who asks while it runs or settles gets what it has
    missed alone, as long as that is little (LATE_S). Most of those subscribed in time and are merely slow to be
    heard; another wave, or many copies, would bring a second load to everybody who is still receiving.

    ``bytes_per_s``: pace of what the broker sends on: a piece of a wave counts once for each device that asked for
    the wave, or is expected to. Faster than devices read, and a broker keeps copies of each piece for each device.
    """

    federation: FederationId
    chunk_bytes: int
    gather_s: float = 0.03
    bytes_per_s: float = 100e6
    _offers: dict[Digest, _Offer] = field(default_factory=dict)
    _queue: deque[_Piece] = field(default_factory=deque)
    _queued: set[_Piece] = field(default_factory=set)
    _free_at: float = 0.0
    _now: float = 0.0

    def offer(self, content: bytes, expected: int = 0) -> BlobRef:
        """Serve this content from now on; the same content again is the same blob.

        expected: devices that are about to ask for it. Most have subscribed long before a busy broker passes their
        requests on, so the wave is paced for them all; and it need not wait once they all have asked.
        """
        index, chunks = split(content, self.chunk_bytes)
        if index.digest not in self._offers:
            pieces: dict[int | None, bytes | memoryview] = {None: index.to_bytes(), **dict(enumerate(chunks))}
            bodies = {
                i: Chunk(digest=index.digest, index=i, content=bytes(piece)).encode()
                for i, piece in pieces.items()
            }
            self._offers[index.digest] = _Offer(index, bodies, expected)
        self._offers[index.digest].expected = expected
        return BlobRef(digest=index.digest, size=index.size)

    def withdraw_all_but(self, keep: set[Digest]) -> None:
        """Stop serving everything else; what is queued of it is dropped."""
        for digest in self._offers.keys() - keep:
            del self._offers[digest]

    def request(self, now: float, device: DeviceId, fetch: Fetch) -> None:
        """Note what somebody wants. Raises RemoteProtocolError(UNKNOWN_BLOB, MALFORMED)."""
        self._follow(now)
        offer = self._offers.get(fetch.digest)
        if offer is None:
            raise RemoteProtocolError(Reject.UNKNOWN_BLOB, f"{fetch.digest.hex()[:16]} is not offered")
        if fetch.wave:
            if offer.in_wave or now < offer.settles_at:
                self._serve_late(offer, device)
            else:
                self._gather(now, offer, device)
            return
        if len(fetch.chunks) > MAX_PULL or any(i >= offer.index.count for i in fetch.chunks):
            raise RemoteProtocolError(Reject.MALFORMED, f"{len(fetch.chunks)} chunks of {offer.index.count}")
        wanted: list[int | None] = [None] if fetch.want_index else []
        for index in (*wanted, *fetch.chunks):
            if index not in offer.in_wave:  # else it is about to be published for all
                self._enqueue(_Piece(fetch.digest, index, device))

    def due(self, now: float) -> list[tuple[str, bytes]]:
        """(topic, payload) to publish now; call again at ``wake_at``."""
        self._follow(now)
        for digest, offer in self._offers.items():
            if offer.wave_at is not None and now >= offer.wave_at:
                offer.wave_at = None
                offer.wave_began_at, offer.late_bytes = now, 0
                pieces: list[int | None] = [None, *range(offer.index.count)]
                offer.in_wave.update(pieces)
                for index in pieces:
                    self._enqueue(_Piece(digest, index, None))
        out: list[tuple[str, bytes]] = []
        self._free_at = max(self._free_at, now - 0.1)  # an idle sender saves up a tenth of a second, not more
        while self._queue and self._free_at <= now:
            piece = self._queue.popleft()
            self._queued.discard(piece)
            offer_now = self._offers.get(piece.digest)
            if offer_now is None:
                continue
            message = self._message(offer_now, piece)
            receivers = 1
            if piece.to is None:
                receivers = max(len(offer_now.listeners), offer_now.expected)
                offer_now.in_wave.discard(piece.index)
                if not offer_now.in_wave:
                    offer_now.listeners.clear()
                    offer_now.expected = 0
                    offer_now.settles_at = now + max(SETTLE_S, now - offer_now.wave_began_at)
            self._free_at += len(message[1]) * receivers / self.bytes_per_s
            out.append(message)
        return out

    def wake_at(self) -> float | None:
        """When ``due`` has something to do; None: when somebody asks."""
        times = [offer.wave_at for offer in self._offers.values() if offer.wave_at is not None]
        if self._queue:
            times.append(self._free_at)
        return min(times, default=None)

    @property
    def queued(self) -> int:
        """Pieces that wait for their time."""
        return len(self._queue)

    def _follow(self, now: float) -> None:
        """If the clock was set back, what is to come stays as far away as it was."""
        if (back := self._now - now) > 0:
            self._free_at -= back
            for offer in self._offers.values():
                offer.first_asked_at -= back
                offer.wave_began_at -= back
                offer.settles_at -= back
                if offer.wave_at is not None:
                    offer.wave_at -= back
        self._now = now

    def _gather(self, now: float, offer: _Offer, device: DeviceId) -> None:
        if offer.wave_at is None:
            offer.first_asked_at = now
        offer.listeners.add(device)
        if len(offer.listeners) == offer.expected:
            offer.wave_at = now
            return
        delivery_s = max(len(offer.listeners), offer.expected) * offer.index.size / self.bytes_per_s
        patience_s = max(MAX_GATHERS * self.gather_s, delivery_s)
        # While some are missing a short silence says only that the broker is busy, or that they are gone.
        missed_until = offer.first_asked_at + MISSED_SHARE * delivery_s if offer.expected else 0.0
        offer.wave_at = min(max(now + self.gather_s, missed_until), offer.first_asked_at + patience_s)

    def _serve_late(self, offer: _Offer, device: DeviceId) -> None:
        if offer.in_wave:
            offer.listeners.add(device)
        if offer.late_bytes > LATE_S * self.bytes_per_s:
            return
        offer.late_bytes += offer.index.size
        for index in (None, *range(offer.index.count)):
            if index not in offer.in_wave:
                self._enqueue(_Piece(offer.index.digest, index, device))

    def _enqueue(self, piece: _Piece) -> None:
        if piece not in self._queued:
            self._queued.add(piece)
            self._queue.append(piece)

    def _message(self, offer: _Offer, piece: _Piece) -> tuple[str, bytes]:
        header = Header(kind=Kind.CHUNK, federation=self.federation, device=piece.to, payload_digest=sha256())
        (payload,) = pack(header, offer.bodies[piece.index], sign=None)
        if piece.to is not None:
            return topics.down(self.federation, piece.to), payload
        return topics.blob_piece(self.federation, piece.digest, piece.index), payload
