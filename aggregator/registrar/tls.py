"""The registrar's TLS authority: X.509 certificates for the broker and for those who may connect to it (RFC 5280).

Keys are ECDSA on P-256: OpenSSL, mosquitto, Python and Android all take it. They are made here and handed over, as
they protect the access to the broker only; a device's signing key is made on the device. Keys and serial numbers
come from OpenSSL's generator; times are arguments, in Unix seconds. Nothing here touches a file or the database.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from aggregator.registrar.folder import RegistrarError

AUTHORITY_DAYS = 20 * 365
DEFAULT_DAYS = 730
_BACKDATED = timedelta(days=1)  # a board without a clock battery starts in the past
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_HOST_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*")


@dataclass(frozen=True, kw_only=True)
class Issued:
    """``certificate`` and ``key`` (PKCS #8, not encrypted) are PEM; ``not_after``: Unix seconds."""

    certificate: bytes
    key: bytes = field(repr=False)
    serial: int
    not_after: int


@dataclass(frozen=True)
class TlsAuthority:
    """Signs certificates and the list of revoked ones. Made by ``load_authority``."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)


def new_authority(federation: str, now: float) -> Issued:
    """A self-signed authority for ``AUTHORITY_DAYS``, which signs end certificates only."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(f"fleetgrad {federation}")
    usage = _key_usage(key_cert_sign=True, crl_sign=True)
    builder = (
        _builder(name, name, key, _time(now), _time(now) + timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
    )
    return _issued(builder.sign(key, hashes.SHA256()), key)


def load_authority(certificate: bytes, key: bytes) -> TlsAuthority:
    """From the PEM of ``new_authority``. Raises RegistrarError: damaged, or the two do not belong together."""
    try:
        loaded = x509.load_pem_x509_certificate(certificate)
        secret = serialization.load_pem_private_key(key, password=None)
    except (ValueError, TypeError):
        raise RegistrarError("the files of the TLS authority are damaged: restore the folder") from None
    if not isinstance(secret, ec.EllipticCurvePrivateKey) or secret.public_key() != loaded.public_key():
        raise RegistrarError("key and certificate of the TLS authority do not belong together")
    return TlsAuthority(loaded, secret)


def issue_client(authority: TlsAuthority, name: str, now: float, days: int) -> Issued:
    """For the TLS client ``name``, which the broker takes as its user name. Raises RegistrarError for the days."""
    return _issue(authority, name, now, days, ExtendedKeyUsageOID.CLIENT_AUTH, ())


def issue_server(
    authority: TlsAuthority, federation: str, hosts: Sequence[str], now: float, days: int
) -> Issued:
    """For a broker reached as any of ``hosts``: names or IP addresses. Raises RegistrarError."""
    if not hosts:
        raise RegistrarError("a broker's certificate names at least one host")
    names = [_general_name(host) for host in hosts]
    return _issue(authority, f"broker of {federation}", now, days, ExtendedKeyUsageOID.SERVER_AUTH, names)


def revocation_list(
    authority: TlsAuthority, number: int, revoked: Iterable[tuple[int, int]], now: float
) -> bytes:
    """A CRL in PEM of (serial, Unix seconds). It holds as long as the authority.

    With an earlier end OpenSSL would refuse every client from that day on, until a new one is brought.
    """
    certificate = authority.certificate
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(certificate.subject)
        .last_update(_time(now) - _BACKDATED)
        .next_update(certificate.not_valid_after_utc)
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(_authority_key(authority.key), critical=False)
    )
    for serial, at in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(_time(at))
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign(authority.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def is_crl_of(authority: TlsAuthority, crl: bytes) -> bool:
    """Whether a list of ``revocation_list`` is this authority's, or that of an older one."""
    return x509.load_pem_x509_crl(crl).is_signature_valid(authority.key.public_key())


def _issue(
    authority: TlsAuthority,
    name: str,
    now: float,
    days: int,
    purpose: x509.ObjectIdentifier,
    hosts: Sequence[x509.GeneralName],
) -> Issued:
    end = authority.certificate.not_valid_after_utc
    left = (end - _time(now)).days
    if left < 1:
        raise RegistrarError(
            f"the TLS authority ended {end:%Y-%m-%d}: move its folder away and make a new one with `aggregator "
            "registrar tls`; every client and the broker then need new files"
        )
    if not 1 <= days <= left:
        raise RegistrarError(
            f"a certificate for {days} days: from 1 to {left} are possible, the TLS authority ends {end:%Y-%m-%d}"
        )
    key = ec.generate_private_key(ec.SECP256R1())
    subject, issuer = _name(name), authority.certificate.subject
    builder = (
        _builder(subject, issuer, key, _time(now), _time(now) + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(_authority_key(authority.key), critical=False)
    )
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
    return _issued(builder.sign(authority.key, hashes.SHA256()), key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, start: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - _BACKDATED)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _issued(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Issued:
    return Issued(
        certificate=certificate.public_bytes(serialization.Encoding.PEM),
        key=key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
        serial=certificate.serial_number,
        not_after=int(certificate.not_valid_after_utc.timestamp()),
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not _HOST_NAME.fullmatch(host.lower()):
        raise RegistrarError(
            f"{host[:80]!r} is no host: a name such as broker.example or an IP address, without port or scheme"
        )
    return x509.DNSName(host.lower())


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _authority_key(key: ec.EllipticCurvePrivateKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(int(seconds), timezone.utc)
