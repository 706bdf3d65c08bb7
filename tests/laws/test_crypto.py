from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.protocol.crypto import signatures
from edge_runtime.protocol.crypto.keys import SealingPublicKey, VerifyKey
from edge_runtime.protocol.crypto.prg import Stream, derive_seed
from edge_runtime.protocol.crypto.provider import CRYPTO
from edge_runtime.protocol.errors import RemoteProtocolError

raw32 = st.binary(min_size=32, max_size=32)
items = st.one_of(st.binary(max_size=12), st.text(max_size=12), st.integers(0, 2**64 - 1))


@given(entropy=raw32, ephemeral=raw32, info=st.binary(), aad=st.binary(), plaintext=st.binary())
@settings(max_examples=60, deadline=None)
def test_what_is_sealed_opens(
    entropy: bytes, ephemeral: bytes, info: bytes, aad: bytes, plaintext: bytes
) -> None:
    key = CRYPTO.generate_sealing_key(entropy)
    sealed = CRYPTO.seal(CRYPTO.sealing_public_key(key), info, aad, plaintext, ephemeral)
    assert len(sealed) == len(plaintext) + 48
    assert CRYPTO.open(key, info, aad, sealed) == plaintext


@given(data=st.data(), plaintext=st.binary(max_size=50))
@settings(max_examples=60, deadline=None)
def test_a_seal_with_any_byte_altered_does_not_open(data: st.DataObject, plaintext: bytes) -> None:
    key = CRYPTO.generate_sealing_key(bytes(range(32)))
    sealed = bytearray(CRYPTO.seal(CRYPTO.sealing_public_key(key), b"i", b"a", plaintext, bytes(32)))
    sealed[data.draw(st.integers(0, len(sealed) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(RemoteProtocolError):
        CRYPTO.open(key, b"i", b"a", bytes(sealed))


@given(garbage=st.binary(max_size=200), info=st.binary(max_size=20))
@settings(max_examples=100, deadline=None)
def test_garbage_is_no_seal_key_or_signature(garbage: bytes, info: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        CRYPTO.open(CRYPTO.generate_sealing_key(bytes(range(32))), info, b"", garbage)
    with pytest.raises(RemoteProtocolError):
        CRYPTO.verify(VerifyKey(garbage[:32]), info, garbage[32:96])
    with contextlib.suppress(RemoteProtocolError):  # almost any 32 bytes are an X25519 key
        assert len(CRYPTO.seal(SealingPublicKey(garbage[:32]), info, b"", b"", bytes(range(32)))) == 48


@given(entropy=raw32, header=st.binary(), body=st.binary())
@settings(max_examples=40, deadline=None)
def test_what_is_signed_verifies(entropy: bytes, header: bytes, body: bytes) -> None:
    key = CRYPTO.generate_signing_key(entropy)
    signature = signatures.sign(CRYPTO, key, "update", header, body)
    signatures.verify(CRYPTO, CRYPTO.verify_key(key), "update", header, body, signature)


@given(one=st.lists(items, max_size=4), two=st.lists(items, max_size=4))
def test_seeds_are_equal_only_for_equal_contexts(
    one: list[bytes | str | int], two: list[bytes | str | int]
) -> None:
    same = [(type(item), item) for item in one] == [(type(item), item) for item in two]
    assert (derive_seed(bytes(32), *one) == derive_seed(bytes(32), *two)) is same


@given(seed=raw32, n=st.integers(0, 300), bound=st.integers(1, 2**63))
@settings(deadline=None)
def test_draws_have_their_shape_and_range_and_are_repeatable(seed: bytes, n: int, bound: int) -> None:
    stream, again = Stream(seed), Stream(seed)
    integers = stream.integers_below(bound, n)
    assert integers.shape == (n,)
    assert all(int(i) < bound for i in integers)
    assert np.array_equal(integers, again.integers_below(bound, n))
    assert sorted(stream.permutation(n)) == list(range(n))


@given(seed=raw32, cuts=st.lists(st.integers(0, 100), max_size=8))
@settings(deadline=None)
def test_a_stream_reads_on_where_it_stopped(seed: bytes, cuts: list[int]) -> None:
    stream = Stream(seed)
    assert b"".join(stream.bytes(n) for n in cuts) == Stream(seed).bytes(sum(cuts))
