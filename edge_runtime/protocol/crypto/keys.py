"""Keys as types. Public keys print and hash; secret keys do neither and compare in constant time."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from typing import NoReturn

from edge_runtime.protocol.errors import Fault, FleetgradError, RemoteProtocolError
from edge_runtime.protocol.rejects import Reject

KEY_BYTES = 32
SIGNATURE_BYTES = 64


class DamagedKeyError(
    FleetgradError,
    fault=Fault.OPERATOR,
    remedy="restore the key file from a backup, or make and certify a new key",
):
    """A secret key kept on this machine does not have its length: restore the file, or enrol again."""


@dataclass(frozen=True)
class _PublicKey:
    """32 raw bytes, as in RFC 8032 (Ed25519) or RFC 7748 (X25519).

    Raises RemoteProtocolError(MALFORMED) for any other length. That the bytes are a useful point is found
    out on first use.
    """

    raw: bytes

    def __post_init__(self) -> None:
        if len(self.raw) != KEY_BYTES:
            raise RemoteProtocolError(
                Reject.MALFORMED, f"{type(self).__name__}: {KEY_BYTES} bytes wanted, {len(self.raw)} found"
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.raw.hex()})"


class VerifyKey(_PublicKey):
    """Ed25519 public key."""


class SealingPublicKey(_PublicKey):
    """X25519 public key that messages are sealed to."""


class _SecretKey:
    """32 secret bytes. ``to_bytes`` is the one way out: for the key file, never for a log."""

    __slots__ = ("_raw",)

    def __init__(self, raw: bytes) -> None:
        if len(raw) != KEY_BYTES:
            raise DamagedKeyError(f"{type(self).__name__}: {KEY_BYTES} bytes wanted, {len(raw)} found")
        self._raw = bytes(raw)

    def to_bytes(self) -> bytes:
        return self._raw

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return hmac.compare_digest(self._raw, other._raw)

    __hash__ = None  # type: ignore[assignment]  # a hash would leak into dictionaries and their order

    def __repr__(self) -> str:
        return f"{type(self).__name__}(secret)"

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} is not pickled or copied by accident; use to_bytes")


class SigningKey(_SecretKey):
    """Ed25519 private key: the 32-byte seed of RFC 8032."""

    __slots__ = ()


class SealingPrivateKey(_SecretKey):
    """X25519 private key, before clamping (RFC 7748)."""

    __slots__ = ()
