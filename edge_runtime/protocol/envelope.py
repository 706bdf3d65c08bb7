"""The envelope around every message: a signed header, one piece of the payload, a signature over both."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from edge_runtime.protocol import wire_pb2 as wire
from edge_runtime.protocol.crypto.keys import SIGNATURE_BYTES
from edge_runtime.protocol.crypto.signatures import signed_bytes
from edge_runtime.protocol.errors import LocalProtocolError, RemoteProtocolError
from edge_runtime.protocol.ids import (
    DeviceId,
    Digest,
    FederationId,
    RoundId,
    device_id,
    digest,
    federation_id,
    sha256,
)
from edge_runtime.protocol.kinds import Kind, Signer
from edge_runtime.protocol.parsing import malformed, parse
from edge_runtime.protocol.rejects import Reject

MAX_PIECES = 1 << 16
OVERHEAD_BYTES = (
    512  # header, signature, framing and topic: an MQTT packet is at most this much more than its body
)
_NO_ROUND = RoundId(0, 0)

Sign = Callable[[bytes], bytes]
"""Ed25519 over the bytes given: 64 bytes."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """``manifest_digest``, ``device``: None where the message has none. Pieces are numbered from 0."""

    kind: Kind
    federation: FederationId
    round_id: RoundId = _NO_ROUND
    manifest_digest: Digest | None = None
    device: DeviceId | None = None
    sequence: int = 0
    chunk_index: int = 0
    chunk_count: int = 1
    payload_digest: Digest

    def encode(self) -> bytes:
        return wire.Header(
            kind=self.kind.number,
            federation=self.federation,
            generation=self.round_id.generation,
            round=self.round_id.number,
            manifest_digest=self.manifest_digest or b"",
            device=self.device or "",
            sequence=self.sequence,
            chunk_index=self.chunk_index,
            chunk_count=self.chunk_count,
            payload_digest=self.payload_digest,
        ).SerializeToString(deterministic=True)

    @classmethod
    def decode(cls, raw: bytes) -> Header:
        m = parse(wire.Header, raw)
        if not 1 <= m.chunk_count <= MAX_PIECES or m.chunk_index >= m.chunk_count:
            raise malformed(f"piece {m.chunk_index} of {m.chunk_count}")
        return cls(
            kind=Kind.from_number(m.kind),
            federation=federation_id(m.federation),
            round_id=RoundId(m.generation, m.round),
            manifest_digest=digest(m.manifest_digest) if m.manifest_digest else None,
            device=device_id(m.device) if m.device else None,
            sequence=m.sequence,
            chunk_index=m.chunk_index,
            chunk_count=m.chunk_count,
            payload_digest=digest(m.payload_digest),
        )


@dataclass(frozen=True)
class Envelope:
    """One received payload. ``header_bytes`` and ``body`` are the bytes the signature is over."""

    header: Header
    header_bytes: bytes
    body: bytes
    signature: bytes

    def signed_bytes(self) -> bytes:
        return signed_bytes(self.header.kind.label, self.header_bytes, self.body)


def seal_context(header: Header) -> bytes:
    """What a sealed payload is bound to (HPKE ``info``): the ciphertext is useless under another header."""
    parts = (
        header.kind.label.encode(),
        header.federation.encode(),
        struct.pack("<II", *header.round_id),
        header.manifest_digest or b"",
        (header.device or "").encode(),
    )
    return b"fleetgrad/1/seal\0" + b"".join(struct.pack("<H", len(part)) + part for part in parts)


def pack(
    header: Header, payload: bytes, sign: Sign | None, piece_bytes: int | None = None
) -> Iterator[bytes]:
    """The MQTT payloads that carry ``payload``, each at most ``piece_bytes`` plus OVERHEAD_BYTES.

    ``header``: its piece fields and payload digest are filled in here. ``sign``: None only for kinds that prove
    themselves by content. Raises LocalProtocolError for a payload above the bound of its kind or of too many
    pieces.
    """
    if len(payload) > header.kind.max_payload_bytes:
        raise LocalProtocolError(
            f"a {header.kind.label} of {len(payload)} bytes is above {header.kind.max_payload_bytes}"
        )
    if (sign is None) != (header.kind.signer is Signer.CONTENT):
        raise LocalProtocolError(f"a {header.kind.label} is signed by {header.kind.signer.value}")
    size = piece_bytes or max(len(payload), 1)
    count = max(1, -(-len(payload) // size))
    if count > MAX_PIECES:
        raise LocalProtocolError(
            f"{len(payload)} bytes would be {count} pieces, at most {MAX_PIECES} are allowed"
        )
    whole = sha256(payload)
    for index in range(count):
        body = payload[index * size : (index + 1) * size]
        raw = replace(header, chunk_index=index, chunk_count=count, payload_digest=whole).encode()
        signature = sign(signed_bytes(header.kind.label, raw, body)) if sign else b""
        yield wire.Envelope(header=raw, body=body, signature=signature).SerializeToString(deterministic=True)


def unpack(raw: bytes, federation: FederationId, *expected: Kind) -> Envelope:
    """A received payload as an envelope of one of the expected kinds; its signature is not verified yet.

    Raises RemoteProtocolError: MALFORMED, TOO_LARGE, WRONG_FEDERATION, UNEXPECTED_KIND, or BAD_DIGEST for a
    payload in one piece that does not match its digest.
    """
    message = parse(wire.Envelope, raw)
    header = Header.decode(message.header)
    if header.kind not in expected:
        raise RemoteProtocolError(Reject.UNEXPECTED_KIND, f"{header.kind.label} is not expected here")
    if header.federation != federation:
        raise RemoteProtocolError(Reject.WRONG_FEDERATION, f"{header.federation!r}, not {federation!r}")
    if header.chunk_count != 1 and header.kind is not Kind.UPDATE:
        raise malformed(f"a {header.kind.label} travels in one piece")
    if header.kind.signer is not Signer.CONTENT and len(message.signature) != SIGNATURE_BYTES:
        raise malformed(f"a signature has {SIGNATURE_BYTES} bytes, not {len(message.signature)}")
    if len(message.body) > header.kind.max_payload_bytes:
        raise RemoteProtocolError(Reject.TOO_LARGE, f"{header.kind.label} of {len(message.body)} bytes")
    if header.chunk_count == 1 and sha256(message.body) != header.payload_digest:
        raise RemoteProtocolError(
            Reject.BAD_DIGEST, f"the body of a {header.kind.label} is not what its header says"
        )
    return Envelope(header, message.header, message.body, message.signature)
