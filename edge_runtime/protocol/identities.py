"""Who is who: root-signed certificates, and the two messages by which a device gets one."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise

from edge_runtime.protocol import wire_pb2 as wire
from edge_runtime.protocol.ids import DeviceId, Digest, FederationId, device_id, digest, federation_id
from edge_runtime.protocol.parsing import key_bytes, malformed, parse, within
from edge_runtime.protocol.rejects import Reject

MAX_REVOCATIONS = 100_000
_MAX_UINT32 = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class SignedBytes:
    """A body and the root's signature over it: a certificate as it travels."""

    body: bytes
    signature: bytes

    def encode(self) -> bytes:
        return wire.Signed(body=self.body, signature=self.signature).SerializeToString(deterministic=True)

    @classmethod
    def decode(cls, raw: bytes) -> SignedBytes:
        message = parse(wire.Signed, raw)
        return cls(body=message.body, signature=message.signature)


@dataclass(frozen=True, kw_only=True)
class DeviceCertificate:
    """Root-signed: ``signing_key`` (Ed25519, 32 bytes) is this device. ``role``: 1 device, 2 committee."""

    federation: FederationId
    device: DeviceId
    signing_key: bytes
    role: int = 1
    epoch: int = 1

    def encode(self) -> bytes:
        return wire.DeviceCertificate(
            federation=self.federation,
            device=self.device,
            signing_key=self.signing_key,
            role=self.role,
            epoch=self.epoch,
        ).SerializeToString(deterministic=True)

    @classmethod
    def decode(cls, raw: bytes) -> DeviceCertificate:
        m = parse(wire.DeviceCertificate, raw)
        return cls(
            federation=federation_id(m.federation),
            device=device_id(m.device),
            signing_key=key_bytes("signing_key", m.signing_key),
            role=within("role", m.role, 1, 2),
            epoch=m.epoch,
        )


@dataclass(frozen=True, kw_only=True)
class AggregatorCertificate:
    """Root-signed: these keys speak for the aggregator in ``generation``, rounds ``first_round..last_round``."""

    federation: FederationId
    signing_key: bytes
    sealing_key: bytes
    generation: int
    first_round: int
    last_round: int

    def encode(self) -> bytes:
        return wire.AggregatorCertificate(
            federation=self.federation,
            signing_key=self.signing_key,
            sealing_key=self.sealing_key,
            generation=self.generation,
            first_round=self.first_round,
            last_round=self.last_round,
        ).SerializeToString(deterministic=True)

    @classmethod
    def decode(cls, raw: bytes) -> AggregatorCertificate:
        m = parse(wire.AggregatorCertificate, raw)
        if m.first_round > m.last_round:
            raise malformed("first_round is after last_round")
        return cls(
            federation=federation_id(m.federation),
            signing_key=key_bytes("signing_key", m.signing_key),
            sealing_key=key_bytes("sealing_key", m.sealing_key),
            generation=m.generation,
            first_round=m.first_round,
            last_round=m.last_round,
        )


@dataclass(frozen=True, kw_only=True)
class Revocation:
    """Certificates of ``device`` up to and including ``epoch`` (at least 1) are void; later ones are not."""

    device: DeviceId
    epoch: int


@dataclass(frozen=True, kw_only=True)
class RevocationList:
    """Root-signed. ``number``, from 1, grows with every list; ``entries``: sorted by name, each name once."""

    federation: FederationId
    number: int
    entries: tuple[Revocation, ...]

    def voids(self, device: DeviceId, epoch: int) -> bool:
        """Whether a certificate of this device and epoch is void."""
        at = bisect_left(self.entries, device, key=lambda entry: entry.device)
        return (
            at < len(self.entries) and self.entries[at].device == device and epoch <= self.entries[at].epoch
        )

    def encode(self) -> bytes:
        return wire.RevocationList(
            federation=self.federation,
            number=self.number,
            entries=[wire.Revocation(device=entry.device, epoch=entry.epoch) for entry in self.entries],
        ).SerializeToString(deterministic=True)

    @classmethod
    def decode(cls, raw: bytes) -> RevocationList:
        m = parse(wire.RevocationList, raw)
        if m.number == 0:
            raise malformed("a revocation list has a number from 1")
        within("entries of a revocation list", len(m.entries), 0, MAX_REVOCATIONS)
        entries = tuple(
            Revocation(device=device_id(e.device), epoch=within("epoch", e.epoch, 1, _MAX_UINT32))
            for e in m.entries
        )
        if any(one.device >= other.device for one, other in pairwise(entries)):
            raise malformed("a revocation list is sorted by device, each once")
        return cls(federation=federation_id(m.federation), number=m.number, entries=entries)


@dataclass(frozen=True, kw_only=True)
class EnrolRequest:
    token_id: str
    token_secret: bytes
    signing_key: bytes

    def __repr__(self) -> str:
        return f"EnrolRequest(token_id={self.token_id!r})"  # never the secret

    def encode(self) -> bytes:
        return wire.EnrolRequest(
            token_id=self.token_id, token_secret=self.token_secret, signing_key=self.signing_key
        ).SerializeToString(deterministic=True)

    @classmethod
    def decode(cls, raw: bytes) -> EnrolRequest:
        m = parse(wire.EnrolRequest, raw)
        return cls(
            token_id=device_id(m.token_id),
            token_secret=key_bytes("token_secret", m.token_secret),
            signing_key=key_bytes("signing_key", m.signing_key),
        )


@dataclass(frozen=True, kw_only=True)
class EnrolAnswer:
    """``reject`` is None when enrolled; ``certificate`` then is an encoded SignedBytes."""

    reject: Reject | None
    certificate: bytes
    request_digest: Digest

    def encode(self) -> bytes:
        return wire.EnrolAnswer(
            reject=self.reject.code if self.reject else 0,
            certificate=self.certificate,
            request_digest=self.request_digest,
        ).SerializeToString(deterministic=True)

    @classmethod
    def decode(cls, raw: bytes) -> EnrolAnswer:
        m = parse(wire.EnrolAnswer, raw)
        return cls(
            reject=Reject.from_code(m.reject) if m.reject else None,
            certificate=m.certificate,
            request_digest=digest(m.request_digest),
        )
