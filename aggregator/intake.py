"""From the broker's bytes to verified requests: topic, envelope, identity, signature, seal, bounds, in that order.

Everything here either returns a stronger type or raises RemoteProtocolError; nothing is stored or answered here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edge_runtime.protocol import certificates, topics
from edge_runtime.protocol.codecs import codec_named
from edge_runtime.protocol.crypto.keys import SealingPrivateKey, VerifyKey
from edge_runtime.protocol.crypto.provider import CryptoProvider
from edge_runtime.protocol.envelope import Envelope, Header, seal_context, unpack
from edge_runtime.protocol.errors import RemoteProtocolError
from edge_runtime.protocol.identities import DeviceCertificate
from edge_runtime.protocol.ids import DeviceId, FederationId
from edge_runtime.protocol.kinds import Kind
from edge_runtime.protocol.messages import CheckIn, Fetch, Telemetry, Update
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.rejects import Reject

ROLE = 1  # of certificates: a committee's members check in nowhere
_UPDATE_OVERHEAD = 1024  # the seal and the fields beside the vector
ACCEPTED = (Kind.CHECKIN, Kind.FETCH, Kind.UPDATE, Kind.TELEMETRY)


@dataclass(frozen=True, kw_only=True)
class KnownDevice:
    """What is on file of a device. ``last_sequence``: of its last check-in or telemetry."""

    signing_key: bytes
    epoch: int
    last_sequence: int


@dataclass(frozen=True)
class CheckInRequest:
    header: Header
    device: DeviceId
    checkin: CheckIn
    certificate: DeviceCertificate


@dataclass(frozen=True)
class FetchRequest:
    device: DeviceId
    fetch: Fetch


@dataclass(frozen=True)
class TelemetryReport:
    header: Header
    device: DeviceId
    telemetry: Telemetry


@dataclass(frozen=True)
class UpdatePiece:
    """A signed piece of a sealed update; not opened."""

    device: DeviceId
    envelope: Envelope


Request = CheckInRequest | FetchRequest | TelemetryReport | UpdatePiece


@dataclass(frozen=True, kw_only=True)
class Intake:
    """``lookup``: what is on file of a device; ``sealing_key``: opens check-ins and telemetry."""

    federation: FederationId
    provider: CryptoProvider
    root: VerifyKey
    sealing_key: SealingPrivateKey
    lookup: Callable[[DeviceId], KnownDevice | None]

    def accept(self, topic: str, payload: bytes) -> Request:
        """Verify one message. Raises RemoteProtocolError; its ``detail`` holds no content."""
        sender = topics.sender_of(topic)
        envelope = unpack(payload, self.federation, *ACCEPTED)
        at = topics.up(sender.federation, sender.device)
        if (envelope.header.federation, envelope.header.device) != sender or topic != at:
            raise RemoteProtocolError(
                Reject.WRONG_TOPIC, f"{envelope.header.device} spoke on {topic[:120]!r}"
            )
        if envelope.header.kind is Kind.CHECKIN:
            return self._checkin(envelope, sender.device)
        known = self.lookup(sender.device)
        if known is None:
            raise RemoteProtocolError(Reject.UNKNOWN_DEVICE, f"{sender.device} has not checked in")
        self.provider.verify(VerifyKey(known.signing_key), envelope.signed_bytes(), envelope.signature)
        match envelope.header.kind:
            case Kind.UPDATE:
                return UpdatePiece(sender.device, envelope)
            case Kind.FETCH:
                return FetchRequest(sender.device, Fetch.decode(envelope.body))
            case _:
                _fresh(envelope.header, known)
                plain = self._open(envelope)
                return TelemetryReport(envelope.header, sender.device, Telemetry.decode(plain))

    def _checkin(self, envelope: Envelope, device: DeviceId) -> CheckInRequest:
        checkin = CheckIn.decode(self._open(envelope))
        certificate = certificates.check_device(
            self.provider, self.root, checkin.certificate, self.federation, device
        )
        if certificate.role != ROLE:
            raise RemoteProtocolError(
                Reject.BAD_CERTIFICATE,
                f"{device}'s certificate has role {certificate.role}, only {ROLE} takes part in rounds",
            )
        self.provider.verify(VerifyKey(certificate.signing_key), envelope.signed_bytes(), envelope.signature)
        known = self.lookup(device)
        if known is not None:
            same_key = known.signing_key == certificate.signing_key
            if certificate.epoch < known.epoch or (not same_key and certificate.epoch == known.epoch):
                raise RemoteProtocolError(
                    Reject.BAD_CERTIFICATE, f"{device} is known under a later certificate"
                )
            if same_key:
                _fresh(envelope.header, known)
        return CheckInRequest(envelope.header, device, checkin, certificate)

    def _open(self, envelope: Envelope) -> bytes:
        return self.provider.open(self.sealing_key, seal_context(envelope.header), b"", envelope.body)


def max_update_bytes(plan: Plan, parameter_count: int) -> int:
    """What a sealed update in the largest codec of the plan may have. Raises RemoteProtocolError(UNKNOWN_CODEC)."""
    largest = max(codec_named(name).max_bytes(parameter_count) for name in plan.codecs)
    return largest + _UPDATE_OVERHEAD


def open_update(
    provider: CryptoProvider, round_key: SealingPrivateKey, header: Header, sealed: bytes
) -> Update:
    """The content of a complete update. Raises RemoteProtocolError(BAD_SEAL, MALFORMED)."""
    return Update.decode(provider.open(round_key, seal_context(header), b"", sealed))


def _fresh(header: Header, known: KnownDevice) -> None:
    if header.sequence <= known.last_sequence:
        raise RemoteProtocolError(
            Reject.REPLAYED, f"sequence {header.sequence} is not after {known.last_sequence}"
        )
