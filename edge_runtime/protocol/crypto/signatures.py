"""What is signed. The kind comes first and ends in a zero byte, so a signature serves one purpose only."""

from __future__ import annotations

import hashlib
import re

from edge_runtime.protocol.crypto.keys import SigningKey, VerifyKey
from edge_runtime.protocol.crypto.provider import CryptoProvider
from edge_runtime.protocol.errors import LocalProtocolError

PREFIX = b"fleetgrad/1/"
_KIND = re.compile(r"[a-z][a-z0-9-]{0,47}")


def signed_bytes(kind: str, header: bytes, body: bytes | memoryview) -> bytes:
    """``fleetgrad/1/<kind>`` 0x00 || header || SHA-256(body).

    The digest has a fixed length and ends the message, so header and body cannot slide into each other.
    Both are the bytes as sent or received: protobuf is not canonical, nothing is encoded again.
    ``kind``: 1-48 of ``a-z 0-9 -``, else LocalProtocolError.
    """
    if not _KIND.fullmatch(kind):
        raise LocalProtocolError(f"{kind!r} cannot name a kind of signed message")
    return b"".join((PREFIX, kind.encode(), b"\0", header, hashlib.sha256(body).digest()))


def sign(
    provider: CryptoProvider, key: SigningKey, kind: str, header: bytes, body: bytes | memoryview
) -> bytes:
    """Ed25519 over ``signed_bytes``: 64 bytes."""
    return provider.sign(key, signed_bytes(kind, header, body))


def verify(
    provider: CryptoProvider,
    key: VerifyKey,
    kind: str,
    header: bytes,
    body: bytes | memoryview,
    signature: bytes,
) -> None:
    """Raises RemoteProtocolError(BAD_SIGNATURE) unless ``key`` signed exactly this."""
    provider.verify(key, signed_bytes(kind, header, body), signature)
