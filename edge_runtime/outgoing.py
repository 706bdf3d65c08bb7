"""What a device says, as the bytes for the broker: always signed, sealed where only one may read it. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from edge_runtime import session_values as sv
from edge_runtime.protocol import topics
from edge_runtime.protocol.crypto.keys import SealingPublicKey
from edge_runtime.protocol.crypto.provider import CryptoProvider
from edge_runtime.protocol.envelope import Header, pack, seal_context
from edge_runtime.protocol.ids import Digest, RoundId, sha256
from edge_runtime.protocol.kinds import Kind
from edge_runtime.protocol.manifest import Manifest
from edge_runtime.protocol.messages import Update
from edge_runtime.store.outbox import Message, OutboxEntry


@dataclass(frozen=True, kw_only=True)
class Outgoing:
    """``next_sequence``, ``entropy``: as in ``Session``. ``generation``: of the highest round seen."""

    identity: sv.Identity
    provider: CryptoProvider
    next_sequence: Callable[[], int]
    entropy: Callable[[int], bytes]

    def plain(self, kind: Kind, generation: int, payload: bytes) -> sv.Send:
        """Signed."""
        return self._send(self._header(kind, RoundId(generation, 0)), payload)

    def sealed(self, kind: Kind, generation: int, payload: bytes, recipient: bytes) -> sv.Send:
        """Signed, and readable for the holder of ``recipient``, a sealing key, alone.

        Raises RemoteProtocolError for a key that cannot be sealed to.
        """
        header = self._header(kind, RoundId(generation, 0))
        return self._send(header, self._seal(header, payload, recipient))

    def update(self, manifest: Manifest, manifest_digest: Digest, update: Update) -> OutboxEntry:
        """In pieces of the manifest's size, sealed to the round's key, each piece signed.

        Raises RemoteProtocolError for a key that cannot be sealed to.
        """
        header = self._header(Kind.UPDATE, manifest.round_id, manifest_digest)
        sealed = self._seal(header, update.encode(), manifest.sealing_key)
        pieces = pack(header, sealed, self._sign, manifest.chunk_bytes)
        topic = self._topic(Kind.UPDATE)
        return OutboxEntry(
            round_id=manifest.round_id,
            manifest_digest=manifest_digest,
            update_digest=sha256(sealed),
            messages=tuple(Message(topic, raw) for raw in pieces),
        )

    def _header(self, kind: Kind, round_id: RoundId, manifest_digest: Digest | None = None) -> Header:
        header = Header(
            kind=kind,
            federation=self.identity.federation,
            round_id=round_id,
            device=self.identity.device,
            sequence=self.next_sequence(),
            payload_digest=sha256(),
        )
        return header if manifest_digest is None else replace(header, manifest_digest=manifest_digest)

    def _seal(self, header: Header, payload: bytes, recipient: bytes) -> bytes:
        key = SealingPublicKey(recipient)
        return self.provider.seal(key, seal_context(header), b"", payload, self.entropy(32))

    def _send(self, header: Header, payload: bytes) -> sv.Send:
        (raw,) = pack(header, payload, self._sign)
        return sv.Send(self._topic(header.kind), raw)

    def _topic(self, kind: Kind) -> str:
        return topics.up_topic(kind, self.identity.federation, self.identity.device)

    def _sign(self, message: bytes) -> bytes:
        return self.provider.sign(self.identity.signing_key, message)
