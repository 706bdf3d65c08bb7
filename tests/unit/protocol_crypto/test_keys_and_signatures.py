from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest

from edge_runtime.protocol.crypto import signatures
from edge_runtime.protocol.crypto.keys import (
    DamagedKeyError,
    SealingPrivateKey,
    SealingPublicKey,
    SigningKey,
    VerifyKey,
)
from edge_runtime.protocol.crypto.provider import CRYPTO
from edge_runtime.protocol.errors import LocalProtocolError, RemoteProtocolError
from edge_runtime.protocol.rejects import Reject

SECRET = bytes(range(100, 132))
VECTOR = json.loads(Path("tests/vectors/signatures.json").read_text())


@pytest.mark.parametrize("kind", [SigningKey, SealingPrivateKey])
def test_a_secret_key_is_not_printed_hashed_or_pickled(kind: type[SigningKey]) -> None:
    key = kind(SECRET)
    for shown in (repr(key), str(key), f"{key}", f"{[key]}"):
        assert "secret" in shown
        assert SECRET.hex() not in shown
        assert repr(SECRET) not in shown
    with pytest.raises(TypeError):
        hash(key)
    for escape in (pickle.dumps, copy.copy):
        with pytest.raises(TypeError):
            escape(key)


def test_secret_keys_are_equal_by_content_and_type() -> None:
    assert SigningKey(SECRET) == SigningKey(SECRET)
    assert SigningKey(SECRET) != SigningKey(bytes(32))
    assert SigningKey(SECRET) != SealingPrivateKey(SECRET)
    assert SigningKey(SECRET).to_bytes() == SECRET


def test_public_keys_are_values_that_print() -> None:
    assert VerifyKey(SECRET) == VerifyKey(SECRET)
    assert VerifyKey(SECRET) != SealingPublicKey(SECRET)
    assert len({VerifyKey(SECRET), VerifyKey(SECRET)}) == 1
    assert SECRET.hex() in repr(VerifyKey(SECRET))


@pytest.mark.parametrize("length", [0, 31, 33, 64])
def test_a_key_of_another_length_is_refused(length: int) -> None:
    for public in (VerifyKey, SealingPublicKey):
        with pytest.raises(RemoteProtocolError) as refusal:
            public(bytes(length))
        assert refusal.value.reject is Reject.MALFORMED
    for secret in (SigningKey, SealingPrivateKey):
        with pytest.raises(DamagedKeyError, match=f"{length} found"):
            secret(bytes(length))
    for generate in (CRYPTO.generate_signing_key, CRYPTO.generate_sealing_key):
        with pytest.raises(LocalProtocolError):
            generate(bytes(length))


def test_ed25519_meets_the_first_vector_of_rfc_8032() -> None:
    key = CRYPTO.generate_signing_key(
        bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    )
    public = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    signature = bytes.fromhex(
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
        "d25bf5f0595bbe24655141438e7a100b"
    )
    assert CRYPTO.verify_key(key).raw.hex() == public
    assert CRYPTO.sign(key, b"") == signature
    CRYPTO.verify(CRYPTO.verify_key(key), b"", signature)


def test_hkdf_meets_the_first_vector_of_rfc_5869() -> None:
    okm = CRYPTO.hkdf(b"\x0b" * 22, bytes(range(13)), bytes(range(0xF0, 0xFA)), 42)
    assert okm.hex() == (
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    )


def test_the_signed_bytes_and_signature_meet_their_vector() -> None:
    header, body = bytes.fromhex(VECTOR["header"]), bytes.fromhex(VECTOR["body"])
    key = SigningKey(bytes.fromhex(VECTOR["seed"]))
    assert signatures.signed_bytes(VECTOR["kind"], header, body).hex() == VECTOR["signed"]
    signature = signatures.sign(CRYPTO, key, VECTOR["kind"], header, body)
    assert signature.hex() == VECTOR["signature"]
    public = CRYPTO.verify_key(key)
    assert public.raw.hex() == VECTOR["public"]
    signatures.verify(CRYPTO, public, VECTOR["kind"], header, memoryview(body), signature)


@pytest.mark.parametrize(
    ("kind", "header", "body"),
    [
        ("receipt", b"header", b"body"),
        ("update", b"Header", b"body"),
        ("update", b"header", b"Body"),
        ("update", b"headerb", b"ody"),
        ("update", b"", b"body"),
    ],
)
def test_a_signature_serves_one_kind_header_and_body(kind: str, header: bytes, body: bytes) -> None:
    key = CRYPTO.generate_signing_key(SECRET)
    signature = signatures.sign(CRYPTO, key, "update", b"header", b"body")
    with pytest.raises(RemoteProtocolError) as refusal:
        signatures.verify(CRYPTO, CRYPTO.verify_key(key), kind, header, body, signature)
    assert refusal.value.reject is Reject.BAD_SIGNATURE


@pytest.mark.parametrize("signature", [b"", bytes(63), bytes(64), bytes(65), b"\xff" * 64])
def test_garbage_is_no_signature(signature: bytes) -> None:
    public = CRYPTO.verify_key(CRYPTO.generate_signing_key(SECRET))
    for key in (public, VerifyKey(b"\xff" * 32), VerifyKey(b"\x02" + bytes(31))):
        with pytest.raises(RemoteProtocolError) as refusal:
            CRYPTO.verify(key, b"message", signature)
        assert refusal.value.reject is Reject.BAD_SIGNATURE


@pytest.mark.parametrize("kind", ["", "Update", "a\0b", "a/b", "ü", "x" * 49, "update\n"])
def test_a_kind_that_could_be_read_two_ways_is_not_signed(kind: str) -> None:
    with pytest.raises(LocalProtocolError):
        signatures.signed_bytes(kind, b"", b"")
