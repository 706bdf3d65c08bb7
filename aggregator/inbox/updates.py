"""Sealed updates between the broker and the sum: pieces in the inbox, the whole read back and opened on demand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from aggregator.inbox.inbox import Inbox
from aggregator.inbox.segments import DamagedInboxError, Position
from aggregator.intake import open_update
from aggregator.ledger.values import Piece
from edge_runtime.protocol.chunks import PieceAssembler
from edge_runtime.protocol.crypto.keys import SealingPrivateKey
from edge_runtime.protocol.crypto.provider import CryptoProvider
from edge_runtime.protocol.envelope import Header
from edge_runtime.protocol.errors import RemoteProtocolError
from edge_runtime.protocol.ids import DeviceId, Digest, FederationId, RoundId
from edge_runtime.protocol.kinds import Kind
from edge_runtime.protocol.messages import Update
from edge_runtime.protocol.rejects import Reject

REFILLS = 4  # a device may send so many times the bytes of an update in a round before it is refused
_Key = tuple[RoundId, DeviceId, Digest]


@dataclass
class _Upload:
    """Where the pieces of one update lie."""

    count: int
    positions: dict[int, Position] = field(default_factory=dict)


@dataclass(kw_only=True)
class UpdateInbox:
    """``max_bytes``: what a sealed update of this model may have. One piece in memory at a time, or one update."""

    federation: FederationId
    provider: CryptoProvider
    inbox: Inbox
    max_bytes: int
    _uploads: dict[_Key, _Upload] = field(default_factory=dict)
    _spent: Counter[tuple[RoundId, DeviceId]] = field(default_factory=Counter)

    def restore(self, pieces: Iterator[Piece]) -> None:
        """After a restart: what the ledger's index knows of the open round."""
        for piece in pieces:
            upload = self._uploads.setdefault(
                (piece.round_id, piece.device, piece.digest), _Upload(piece.count)
            )
            upload.positions[piece.index] = piece.position
            self._spent[piece.round_id, piece.device] += piece.position.length

    def add(self, device: DeviceId, header: Header, body: bytes) -> tuple[Piece | None, bytes | None]:
        """Append one piece: (its index row, None if it was there already; the sealed update once complete).

        Raises RemoteProtocolError: TOO_LARGE, CONFLICTING, BAD_DIGEST (all pieces are forgotten then).
        """
        key = (header.round_id, device, header.payload_digest)
        # The assembler's rules on counts and sizes hold before a byte is written.
        PieceAssembler(header.chunk_count, header.payload_digest, self.max_bytes)
        upload = self._uploads.get(key) or _Upload(header.chunk_count)
        if upload.count != header.chunk_count:
            raise RemoteProtocolError(Reject.CONFLICTING, "the pieces of one update disagree on their number")
        if any(other[:2] == key[:2] and other != key for other in self._uploads):
            raise RemoteProtocolError(Reject.CONFLICTING, f"{device} has begun another update for this round")
        held = sum(position.length for position in upload.positions.values())
        row = None
        if header.chunk_index not in upload.positions:
            spent = self._spent[key[:2]]
            if held + len(body) > self.max_bytes or spent + len(body) > REFILLS * self.max_bytes:
                raise RemoteProtocolError(Reject.TOO_LARGE, f"{device} sent more than an update can have")
            self._uploads[key] = upload
            self._spent[key[:2]] = spent + len(body)
            position = self.inbox.append(header.round_id, body)
            upload.positions[header.chunk_index] = position
            row = Piece(
                round_id=header.round_id,
                device=device,
                digest=header.payload_digest,
                index=header.chunk_index,
                count=header.chunk_count,
                position=position,
            )
        if len(upload.positions) < upload.count:
            return row, None
        try:
            return row, self._join(key, upload)
        except RemoteProtocolError:
            self.forget(*key)
            raise

    def forget(self, round_id: RoundId, device: DeviceId, digest: Digest) -> None:
        """A refused update: its bytes stay until the round's folder goes, nothing points at them."""
        self._uploads.pop((round_id, device, digest), None)

    def forget_round(self, round_id: RoundId) -> None:
        """The round is over."""
        for key in [key for key in self._uploads if key[0] <= round_id]:
            del self._uploads[key]
        for spender in [spender for spender in self._spent if spender[0] <= round_id]:
            del self._spent[spender]

    def updates(
        self,
        round_id: RoundId,
        manifest_digest: Digest,
        accepted: tuple[tuple[DeviceId, Digest], ...],
        round_key: Callable[[], SealingPrivateKey],
    ) -> Iterator[tuple[DeviceId, Update | RemoteProtocolError]]:
        """The accepted updates, opened one at a time; what cannot be read back comes as its error."""
        key = round_key()
        for device, digest in accepted:
            header = Header(
                kind=Kind.UPDATE,
                federation=self.federation,
                round_id=round_id,
                manifest_digest=manifest_digest,
                device=device,
                payload_digest=digest,
            )
            try:
                upload = self._uploads[(round_id, device, digest)]
                yield (
                    device,
                    open_update(self.provider, key, header, self._join((round_id, device, digest), upload)),
                )
            except (KeyError, DamagedInboxError) as error:
                yield device, RemoteProtocolError(Reject.BAD_DIGEST, f"cannot be read back: {error}")
            except RemoteProtocolError as error:
                yield device, error

    def _join(self, key: _Key, upload: _Upload) -> bytes:
        assembler = PieceAssembler(upload.count, key[2], self.max_bytes)
        for index, position in sorted(upload.positions.items()):
            assembler.add(index, upload.count, key[2], self.inbox.read(key[0], position))
        if not assembler.complete():
            raise RemoteProtocolError(Reject.BAD_DIGEST, "pieces are missing")
        return assembler.content()
