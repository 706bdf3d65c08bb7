"""The root's word: issuing certificates (registrar) and checking them (everybody else)."""

from __future__ import annotations

from edge_runtime.protocol.crypto import signatures
from edge_runtime.protocol.crypto.keys import SigningKey, VerifyKey
from edge_runtime.protocol.crypto.provider import CryptoProvider
from edge_runtime.protocol.errors import RemoteProtocolError
from edge_runtime.protocol.identities import (
    AggregatorCertificate,
    DeviceCertificate,
    RevocationList,
    SignedBytes,
)
from edge_runtime.protocol.ids import DeviceId, FederationId, RoundId
from edge_runtime.protocol.rejects import Reject

_DEVICE = "device-certificate"
_AGGREGATOR = "aggregator-certificate"
_REVOCATIONS = "revocation-list"


def issue_device(provider: CryptoProvider, root: SigningKey, certificate: DeviceCertificate) -> bytes:
    """The certificate as it travels, signed by the root."""
    return _issue(provider, root, _DEVICE, certificate.encode())


def issue_aggregator(provider: CryptoProvider, root: SigningKey, certificate: AggregatorCertificate) -> bytes:
    """The certificate as it travels, signed by the root."""
    return _issue(provider, root, _AGGREGATOR, certificate.encode())


def issue_revocations(provider: CryptoProvider, root: SigningKey, revocations: RevocationList) -> bytes:
    """The list as it travels, signed by the root."""
    return _issue(provider, root, _REVOCATIONS, revocations.encode())


def check_device(
    provider: CryptoProvider, root: VerifyKey, raw: bytes, federation: FederationId, device: DeviceId
) -> DeviceCertificate:
    """The certificate of exactly this device. Raises RemoteProtocolError(BAD_CERTIFICATE or MALFORMED)."""
    certificate = DeviceCertificate.decode(_check(provider, root, _DEVICE, raw))
    if (certificate.federation, certificate.device) != (federation, device):
        raise RemoteProtocolError(
            Reject.BAD_CERTIFICATE,
            f"it is for {certificate.device} of {certificate.federation}, not {device} of {federation}",
        )
    return certificate


def check_aggregator(
    provider: CryptoProvider, root: VerifyKey, raw: bytes, federation: FederationId, round_id: RoundId
) -> AggregatorCertificate:
    """A certificate that covers this round. Raises RemoteProtocolError(BAD_CERTIFICATE or MALFORMED)."""
    certificate = AggregatorCertificate.decode(_check(provider, root, _AGGREGATOR, raw))
    if certificate.federation != federation or certificate.generation != round_id.generation:
        raise RemoteProtocolError(Reject.BAD_CERTIFICATE, "it is for another federation or generation")
    if not certificate.first_round <= round_id.number <= certificate.last_round:
        raise RemoteProtocolError(
            Reject.BAD_CERTIFICATE,
            f"it covers rounds {certificate.first_round}..{certificate.last_round}, not {round_id.number}",
        )
    return certificate


def check_revocations(
    provider: CryptoProvider, root: VerifyKey, raw: bytes, federation: FederationId
) -> RevocationList:
    """The list of this federation; whether its number is new enough, the caller knows.

    Raises RemoteProtocolError(BAD_CERTIFICATE or MALFORMED).
    """
    revocations = RevocationList.decode(_check(provider, root, _REVOCATIONS, raw))
    if revocations.federation != federation:
        raise RemoteProtocolError(
            Reject.BAD_CERTIFICATE, f"it is a list of {revocations.federation}, not of {federation}"
        )
    return revocations


def _issue(provider: CryptoProvider, root: SigningKey, kind: str, body: bytes) -> bytes:
    return SignedBytes(body=body, signature=signatures.sign(provider, root, kind, b"", body)).encode()


def _check(provider: CryptoProvider, root: VerifyKey, kind: str, raw: bytes) -> bytes:
    signed = SignedBytes.decode(raw)
    try:
        signatures.verify(provider, root, kind, b"", signed.body, signed.signature)
    except RemoteProtocolError:
        raise RemoteProtocolError(Reject.BAD_CERTIFICATE, "it is not signed by the root") from None
    return signed.body
