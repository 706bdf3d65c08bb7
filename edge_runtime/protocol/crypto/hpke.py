"""RFC 9180, base mode, single shot: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM.

Built of primitives that cryptography 42 has, the floor that Android sets; newer versions have HPKE itself.
The labels and the order of the steps are those of the RFC; names in comments are its names.
"""

from __future__ import annotations

import hmac

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from edge_runtime.protocol.crypto.keys import KEY_BYTES, SealingPrivateKey, SealingPublicKey
from edge_runtime.protocol.errors import LocalProtocolError, RemoteProtocolError
from edge_runtime.protocol.rejects import Reject

ENC_BYTES = 32
TAG_BYTES = 16
OVERHEAD_BYTES = ENC_BYTES + TAG_BYTES
MAX_PLAINTEXT_BYTES = 2**31 - 1 - TAG_BYTES  # one call of AESGCM
_NONCE_BYTES = 12

_KEM_SUITE = b"KEM" + (0x0020).to_bytes(2, "big")
_HPKE_SUITE = b"HPKE" + b"".join(i.to_bytes(2, "big") for i in (0x0020, 0x0001, 0x0002))  # KEM, KDF, AEAD
_MODE_BASE = b"\x00"


def seal(
    recipient: SealingPublicKey, info: bytes, aad: bytes, plaintext: bytes | memoryview, ephemeral: bytes
) -> bytes:
    """Encrypt to ``recipient``: enc (32 bytes) || ciphertext (as long as the plaintext) || tag (16).

    ``ephemeral``: 32 fresh secret random bytes, the RFC's ikmE. Used twice with one recipient and info, it
    repeats key and nonce and breaks the secrecy of both messages.
    Raises RemoteProtocolError(BAD_SEAL) for a recipient key of low order, LocalProtocolError for a wrong
    length of ``ephemeral`` or a plaintext above 2 GiB.
    """
    if len(ephemeral) != KEY_BYTES:
        raise LocalProtocolError(f"seal wants {KEY_BYTES} random bytes, not {len(ephemeral)}")
    if len(plaintext) > MAX_PLAINTEXT_BYTES:
        raise LocalProtocolError(f"a plaintext of {len(plaintext)} bytes is above {MAX_PLAINTEXT_BYTES}")
    private = X25519PrivateKey.from_private_bytes(derive_key_pair(ephemeral))
    enc = private.public_key().public_bytes_raw()
    secret = _shared_secret(private, recipient.raw, kem_context=enc + recipient.raw)
    key, nonce = key_schedule(secret, info)
    return b"".join((enc, AESGCM(key).encrypt(nonce, plaintext, aad)))


def open_sealed(recipient: SealingPrivateKey, info: bytes, aad: bytes, sealed: bytes | memoryview) -> bytes:
    """The plaintext of ``seal``.

    Raises RemoteProtocolError(BAD_SEAL) when it is too short, made with a point of low order, for another
    key, info or aad, or altered: which of these is not told.
    """
    if len(sealed) < OVERHEAD_BYTES:
        raise RemoteProtocolError(Reject.BAD_SEAL, f"{len(sealed)} bytes are less than {OVERHEAD_BYTES}")
    view = memoryview(sealed)
    enc, ciphertext = bytes(view[:ENC_BYTES]), view[ENC_BYTES:]
    private = X25519PrivateKey.from_private_bytes(recipient.to_bytes())
    public = private.public_key().public_bytes_raw()
    secret = _shared_secret(private, enc, kem_context=enc + public)
    key, nonce = key_schedule(secret, info)
    try:
        return AESGCM(key).decrypt(nonce, ciphertext, aad)
    except (InvalidTag, OverflowError):
        raise RemoteProtocolError(
            Reject.BAD_SEAL, "the seal does not open with this key and context"
        ) from None


def derive_key_pair(ikm: bytes) -> bytes:
    """DeriveKeyPair of section 7.1.3: an X25519 private key of 32 bytes."""
    prk = _labeled_extract(_KEM_SUITE, b"", b"dkp_prk", ikm)
    return _labeled_expand(_KEM_SUITE, prk, b"sk", b"", KEY_BYTES)


def key_schedule(shared_secret: bytes, info: bytes) -> tuple[bytes, bytes]:
    """Key (32 bytes) and nonce (12) of the first message, section 5.1."""
    psk_id_hash = _labeled_extract(_HPKE_SUITE, b"", b"psk_id_hash", b"")
    info_hash = _labeled_extract(_HPKE_SUITE, b"", b"info_hash", info)
    context = _MODE_BASE + psk_id_hash + info_hash
    secret = _labeled_extract(_HPKE_SUITE, shared_secret, b"secret", b"")
    key = _labeled_expand(_HPKE_SUITE, secret, b"key", context, 32)
    return key, _labeled_expand(_HPKE_SUITE, secret, b"base_nonce", context, _NONCE_BYTES)


def _shared_secret(private: X25519PrivateKey, public: bytes, *, kem_context: bytes) -> bytes:
    try:
        dh = private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:  # the shared point is zero: RFC 7748 section 6.1, RFC 9180 section 7.1.4
        raise RemoteProtocolError(Reject.BAD_SEAL, "an X25519 public key of low order") from None
    prk = _labeled_extract(_KEM_SUITE, b"", b"eae_prk", dh)
    return _labeled_expand(_KEM_SUITE, prk, b"shared_secret", kem_context, 32)


def _labeled_extract(suite: bytes, salt: bytes, label: bytes, ikm: bytes) -> bytes:
    return hmac.digest(salt, b"HPKE-v1" + suite + label + ikm, "sha256")


def _labeled_expand(suite: bytes, prk: bytes, label: bytes, info: bytes, length: int) -> bytes:
    labeled = length.to_bytes(2, "big") + b"HPKE-v1" + suite + label + info
    return HKDFExpand(algorithm=SHA256(), length=length, info=labeled).derive(prk)
