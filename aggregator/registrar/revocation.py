"""Taking certificates back: the signed list that the aggregator reads, and the CRL that the broker reads.

A revoked key is never certified again, under no name; the name may come back with a new key in the next epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from aggregator.registrar import tls
from aggregator.registrar.store import Published, Transaction
from edge_runtime.protocol.certificates import issue_revocations
from edge_runtime.protocol.crypto.keys import SigningKey
from edge_runtime.protocol.crypto.provider import CRYPTO
from edge_runtime.protocol.identities import (
    DeviceCertificate,
    Revocation,
    RevocationList,
    SignedBytes,
)
from edge_runtime.protocol.ids import DeviceId, FederationId

Sign = Callable[[int, tuple[Revocation, ...]], bytes]
"""(number, entries) -> the signed list."""


class Revoked(NamedTuple):
    """What one revocation voided. ``epoch``: of the device's certificate, None if it had none in force."""

    epoch: int | None
    tls_certificates: int
    tokens: int

    @property
    def nothing(self) -> bool:
        return self.epoch is None and not self.tls_certificates and not self.tokens


def signer(federation: FederationId, root: SigningKey) -> Sign:
    """Lists of this federation under this root."""

    def sign(number: int, entries: tuple[Revocation, ...]) -> bytes:
        listed = RevocationList(federation=federation, number=number, entries=entries)
        return issue_revocations(CRYPTO, root, listed)

    return sign


def void(rows: Transaction, name: str, now: int) -> Revoked:
    """Certificate, TLS certificates and unused tokens of this name, as far as they are in force.

    With the certificate go those of other names for the same key: whoever lost it lost them too.
    """
    device = rows.device(DeviceId(name))
    epoch = None
    if device is not None and device.revoked_at is None:
        epoch = epoch_of(device.certificate)
        for row in rows.devices():
            if row.signing_key == device.signing_key and row.revoked_at is None:
                rows.add_revocation(row.signing_key, row.device, epoch_of(row.certificate), now)
    return Revoked(epoch, rows.revoke_tls(name, now), rows.expire_tokens(DeviceId(name), now))


def next_list(rows: Transaction, sign: Sign, authority: tls.TlsAuthority | None, now: int) -> Published:
    """The list of all that is void, under the next number, and its CRL."""
    before = rows.published()
    number = 1 if before is None else before.number + 1
    entries = tuple(Revocation(device=name, epoch=epoch) for name, epoch in rows.revoked_epochs().items())
    row = Published(number, sign(number, entries), crl(rows, authority, number, now))
    rows.publish(row)
    return row


def crl(rows: Transaction, authority: tls.TlsAuthority | None, number: int, now: int) -> bytes | None:
    """PEM of all TLS certificates that were taken back; None without an authority."""
    if authority is None:
        return None
    revoked = [(row.serial, row.revoked_at) for row in rows.tls_certificates() if row.revoked_at is not None]
    return tls.revocation_list(authority, number, revoked, now)


def epoch_of(certificate: bytes) -> int:
    """The epoch of a certificate out of our own database."""
    return DeviceCertificate.decode(SignedBytes.decode(certificate).body).epoch
