"""What the protocol asks of cryptography, and the real thing that answers.

A simulation passes another ``CryptoProvider`` whose operations are keyed hashes: the same types and
lengths, a hundredth of the price.
"""

from __future__ import annotations

from typing import Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from edge_runtime.protocol.crypto import hpke
from edge_runtime.protocol.crypto.keys import (
    KEY_BYTES,
    SIGNATURE_BYTES,
    SealingPrivateKey,
    SealingPublicKey,
    SigningKey,
    VerifyKey,
)
from edge_runtime.protocol.errors import LocalProtocolError, RemoteProtocolError
from edge_runtime.protocol.rejects import Reject


class CryptoProvider(Protocol):
    """Every operation is a function of its arguments: who needs randomness passes 32 bytes of it.

    ``entropy`` and ``ephemeral`` are 32 bytes from the operating system's generator in production and
    fixed in tests; another length raises LocalProtocolError.
    """

    def generate_signing_key(self, entropy: bytes) -> SigningKey: ...

    def verify_key(self, key: SigningKey) -> VerifyKey: ...

    def sign(self, key: SigningKey, message: bytes) -> bytes:
        """64 bytes. Messages come from ``signatures.signed_bytes``, so no two kinds can be confused."""
        ...

    def verify(self, key: VerifyKey, message: bytes, signature: bytes) -> None:
        """Raises RemoteProtocolError(BAD_SIGNATURE)."""
        ...

    def generate_sealing_key(self, entropy: bytes) -> SealingPrivateKey: ...

    def sealing_public_key(self, key: SealingPrivateKey) -> SealingPublicKey: ...

    def seal(
        self,
        recipient: SealingPublicKey,
        info: bytes,
        aad: bytes,
        plaintext: bytes | memoryview,
        ephemeral: bytes,
    ) -> bytes:
        """48 bytes longer than the plaintext. ``info`` names the context, ``aad`` what is sent beside it.

        Raises RemoteProtocolError(BAD_SEAL) for an unusable recipient key.
        """
        ...

    def open(
        self, recipient: SealingPrivateKey, info: bytes, aad: bytes, sealed: bytes | memoryview
    ) -> bytes:
        """Raises RemoteProtocolError(BAD_SEAL)."""
        ...

    def hkdf(self, secret: bytes, salt: bytes, info: bytes, length: int) -> bytes:
        """HKDF-SHA256 (RFC 5869); ``length`` 1 to 8160."""
        ...


class Cryptography:
    """Ed25519 (RFC 8032), HPKE over X25519 (RFC 9180), HKDF-SHA256, by the ``cryptography`` library."""

    def generate_signing_key(self, entropy: bytes) -> SigningKey:
        return SigningKey(_entropy(entropy))

    def verify_key(self, key: SigningKey) -> VerifyKey:
        return VerifyKey(_ed25519(key).public_key().public_bytes_raw())

    def sign(self, key: SigningKey, message: bytes) -> bytes:
        return _ed25519(key).sign(message)

    def verify(self, key: VerifyKey, message: bytes, signature: bytes) -> None:
        if len(signature) != SIGNATURE_BYTES:
            raise RemoteProtocolError(
                Reject.BAD_SIGNATURE, f"a signature has {SIGNATURE_BYTES} bytes, not {len(signature)}"
            )
        try:
            Ed25519PublicKey.from_public_bytes(key.raw).verify(signature, message)
        except (InvalidSignature, ValueError):
            raise RemoteProtocolError(Reject.BAD_SIGNATURE, f"does not verify under {key!r}") from None

    def generate_sealing_key(self, entropy: bytes) -> SealingPrivateKey:
        return SealingPrivateKey(_entropy(entropy))

    def sealing_public_key(self, key: SealingPrivateKey) -> SealingPublicKey:
        return SealingPublicKey(
            X25519PrivateKey.from_private_bytes(key.to_bytes()).public_key().public_bytes_raw()
        )

    def seal(
        self,
        recipient: SealingPublicKey,
        info: bytes,
        aad: bytes,
        plaintext: bytes | memoryview,
        ephemeral: bytes,
    ) -> bytes:
        return hpke.seal(recipient, info, aad, plaintext, ephemeral)

    def open(
        self, recipient: SealingPrivateKey, info: bytes, aad: bytes, sealed: bytes | memoryview
    ) -> bytes:
        return hpke.open_sealed(recipient, info, aad, sealed)

    def hkdf(self, secret: bytes, salt: bytes, info: bytes, length: int) -> bytes:
        return HKDF(algorithm=SHA256(), length=length, salt=salt, info=info).derive(secret)


CRYPTO: CryptoProvider = Cryptography()


def _entropy(raw: bytes) -> bytes:
    if len(raw) != KEY_BYTES:
        raise LocalProtocolError(f"a new key wants {KEY_BYTES} random bytes, not {len(raw)}")
    return raw


def _ed25519(key: SigningKey) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(key.to_bytes())
