from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_runtime.protocol.crypto import hpke
from edge_runtime.protocol.crypto.keys import SealingPrivateKey, SealingPublicKey
from edge_runtime.protocol.crypto.provider import CRYPTO
from edge_runtime.protocol.errors import LocalProtocolError, RemoteProtocolError
from edge_runtime.protocol.rejects import Reject

RFC = {
    name: bytes.fromhex(value)
    for name, value in json.loads(Path("tests/vectors/hpke.json").read_text())["vector"].items()
}
PRIVATE = SealingPrivateKey(RFC["skRm"])
PUBLIC = SealingPublicKey(RFC["pkRm"])
# Every u of order 1, 2, 4 or 8 on the curve or its twist, canonical or not (RFC 7748 section 6.1).
LOW_ORDER = [
    bytes(32),
    bytes([1]) + bytes(31),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    *((2**255 - 19 + i).to_bytes(32, "little") for i in (-1, 0, 1)),
]


def test_the_rfc_vector_is_met_step_by_step() -> None:
    assert hpke.derive_key_pair(RFC["ikmE"]) == RFC["skEm"]
    assert hpke.derive_key_pair(RFC["ikmR"]) == RFC["skRm"]
    assert CRYPTO.sealing_public_key(PRIVATE) == PUBLIC
    assert hpke.key_schedule(RFC["shared_secret"], RFC["info"]) == (RFC["key"], RFC["base_nonce"])


def test_the_rfc_vector_is_sealed_and_opened_byte_for_byte() -> None:
    sealed = CRYPTO.seal(PUBLIC, RFC["info"], RFC["aad"], RFC["pt"], RFC["ikmE"])
    assert sealed == RFC["enc"] + RFC["ct"]
    assert CRYPTO.open(PRIVATE, RFC["info"], RFC["aad"], sealed) == RFC["pt"]
    assert CRYPTO.open(PRIVATE, RFC["info"], RFC["aad"], memoryview(sealed)) == RFC["pt"]


def test_the_hpke_of_a_newer_cryptography_opens_what_we_seal_and_the_reverse() -> None:
    theirs = pytest.importorskip("cryptography.hazmat.primitives.hpke")
    x25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.x25519")
    suite = theirs.Suite(theirs.KEM.X25519, theirs.KDF.HKDF_SHA256, theirs.AEAD.AES_256_GCM)
    private = x25519.X25519PrivateKey.from_private_bytes(RFC["skRm"])
    sealed = CRYPTO.seal(PUBLIC, b"info", b"", b"plaintext", bytes(range(32)))
    assert suite.decrypt(sealed, private, info=b"info") == b"plaintext"
    sealed = suite.encrypt(b"plaintext", private.public_key(), info=b"info")
    assert CRYPTO.open(PRIVATE, b"info", b"", sealed) == b"plaintext"


@pytest.mark.parametrize("point", LOW_ORDER, ids=lambda p: p.hex()[:8])
def test_a_point_of_low_order_is_refused_on_both_sides(point: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as sealing:
        CRYPTO.seal(SealingPublicKey(point), b"", b"", b"x", bytes(32))
    with pytest.raises(RemoteProtocolError) as opening:
        CRYPTO.open(PRIVATE, b"", b"", point + bytes(40))
    assert sealing.value.reject is opening.value.reject is Reject.BAD_SEAL


@pytest.mark.parametrize("length", [0, 31, 47, 48])
def test_a_truncated_seal_is_refused(length: int) -> None:
    sealed = CRYPTO.seal(PUBLIC, b"", b"", b"plaintext", bytes(range(32)))
    with pytest.raises(RemoteProtocolError) as refusal:
        CRYPTO.open(PRIVATE, b"", b"", sealed[:length])
    assert refusal.value.reject is Reject.BAD_SEAL


def test_another_key_info_or_aad_does_not_open() -> None:
    sealed = CRYPTO.seal(PUBLIC, b"round 1", b"header", b"plaintext", bytes(range(32)))
    other = CRYPTO.generate_sealing_key(bytes(range(1, 33)))
    for key, info, aad in [
        (other, b"round 1", b"header"),
        (PRIVATE, b"round 2", b"header"),
        (PRIVATE, b"round 1", b"another"),
    ]:
        with pytest.raises(RemoteProtocolError) as refusal:
            CRYPTO.open(key, info, aad, sealed)
        assert refusal.value.reject is Reject.BAD_SEAL


def test_an_empty_plaintext_is_sealed_in_48_bytes() -> None:
    sealed = CRYPTO.seal(PUBLIC, b"", b"", b"", bytes(range(32)))
    assert len(sealed) == hpke.OVERHEAD_BYTES
    assert CRYPTO.open(PRIVATE, b"", b"", sealed) == b""


def test_too_little_randomness_is_our_bug() -> None:
    with pytest.raises(LocalProtocolError):
        CRYPTO.seal(PUBLIC, b"", b"", b"", bytes(31))
