"""Serving blobs: one wave on a shared topic for all who ask, then pull of what somebody missed. Pure."""

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


@dataclass
class _Offer:
    index: BlobIndex
    chunks: tuple[memoryview, ...]
    wave_at: float | None = None  # when the gathered wave starts
    in_wave: set[int | None] = field(default_factory=set)  # pieces of the running wave still to be published


@dataclass(frozen=True)
class _Piece:
    digest: Digest
    index: int | None
    to: DeviceId | None  # None: the wave


@dataclass
class BlobServer:
    """``gather_s``: a wave waits so long for others to subscribe. ``bytes_per_s``: pace of all pieces together."""

    federation: FederationId
    chunk_bytes: int
    gather_s: float = 0.03
    bytes_per_s: float = 50e6
    _offers: dict[Digest, _Offer] = field(default_factory=dict)
    _queue: deque[_Piece] = field(default_factory=deque)
    _queued: set[_Piece] = field(default_factory=set)
    _free_at: float = 0.0

    def offer(self, content: bytes) -> BlobRef:
        """Serve this content from now on; the same content again is the same blob."""
        index, chunks = split(content, self.chunk_bytes)
        self._offers.setdefault(index.digest, _Offer(index, chunks))
        return BlobRef(digest=index.digest, size=index.size)

    def withdraw_all_but(self, keep: set[Digest]) -> None:
        """Stop serving everything else; what is queued of it is dropped."""
        for digest in self._offers.keys() - keep:
            del self._offers[digest]

    def request(self, now: float, device: DeviceId, fetch: Fetch) -> None:
        """Note what somebody wants. Raises RemoteProtocolError(UNKNOWN_BLOB, MALFORMED)."""
        offer = self._offers.get(fetch.digest)
        if offer is None:
            raise RemoteProtocolError(Reject.UNKNOWN_BLOB, f"{fetch.digest.hex()[:16]} is not offered")
        if fetch.wave and not offer.in_wave:
            if offer.wave_at is None:
                offer.wave_at = now + self.gather_s
            return
        if fetch.wave:  # it runs already: what this device has missed of it goes to it alone
            for index in (None, *range(offer.index.count)):
                if index not in offer.in_wave:
                    self._enqueue(_Piece(fetch.digest, index, device))
            return
        if len(fetch.chunks) > MAX_PULL or any(i >= offer.index.count for i in fetch.chunks):
            raise RemoteProtocolError(Reject.MALFORMED, f"{len(fetch.chunks)} chunks of {offer.index.count}")
        wanted: list[int | None] = [None] if fetch.want_index else []
        for index in (*wanted, *fetch.chunks):
            if index not in offer.in_wave:  # else it is about to be published for all
                self._enqueue(_Piece(fetch.digest, index, device))

    def due(self, now: float) -> list[tuple[str, bytes]]:
        """(topic, payload) to publish now; call again at ``wake_at``."""
        for digest, offer in self._offers.items():
            if offer.wave_at is not None and now >= offer.wave_at:
                offer.wave_at = None
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
            if piece.to is None:
                offer_now.in_wave.discard(piece.index)
            message = self._message(offer_now, piece)
            self._free_at += len(message[1]) / self.bytes_per_s
            out.append(message)
        return out

    def wake_at(self) -> float | None:
        """When ``due`` has something to do; None: when somebody asks."""
        times = [offer.wave_at for offer in self._offers.values() if offer.wave_at is not None]
        if self._queue:
            times.append(self._free_at)
        return min(times, default=None)

    def _enqueue(self, piece: _Piece) -> None:
        if piece not in self._queued:
            self._queued.add(piece)
            self._queue.append(piece)

    def _message(self, offer: _Offer, piece: _Piece) -> tuple[str, bytes]:
        content = offer.index.to_bytes() if piece.index is None else bytes(offer.chunks[piece.index])
        body = Chunk(digest=piece.digest, index=piece.index, content=content).encode()
        header = Header(
            kind=Kind.CHUNK, federation=self.federation, device=piece.to, payload_digest=sha256(body)
        )
        (payload,) = pack(header, body, sign=None)
        if piece.to is not None:
            return topics.down(self.federation, piece.to), payload
        return topics.blob_piece(self.federation, piece.digest, piece.index), payload
