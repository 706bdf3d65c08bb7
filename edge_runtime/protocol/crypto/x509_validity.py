"""From when to when a certificate in a PEM file is valid (RFC 5280, 4.1.2.5); ssl tells it of the peer's only."""

from __future__ import annotations

from datetime import timezone
from typing import NamedTuple

from cryptography import x509


class Validity(NamedTuple):
    """Unix seconds."""

    not_before: float
    not_after: float


def pem_validity(pem: bytes) -> Validity | None:
    """Of the first certificate in the text, which is the owner's own; None: there is none that can be read."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
    except ValueError:
        return None
    # The properties that end in _utc need cryptography 42, and so does this project.
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return Validity(*(moment.astimezone(timezone.utc).timestamp() for moment in (start, end)))
