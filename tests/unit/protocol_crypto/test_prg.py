from __future__ import annotations

import itertools
import json
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.protocol.crypto.prg import Stream, derive_seed
from edge_runtime.protocol.crypto.provider import CRYPTO
from edge_runtime.protocol.errors import LocalProtocolError

VECTOR = json.loads(Path("tests/vectors/prg.json").read_text())
SEED = bytes.fromhex(VECTOR["seed"])
SECRET = bytes.fromhex(VECTOR["secret"])


class _Words(Stream):
    """A stream that reads a given list of 64-bit words: rare cases on demand."""

    def __init__(self, words: list[int]) -> None:
        self._raw = b"".join(struct.pack("<Q", word) for word in words)

    def bytes(self, n: int) -> bytes:
        taken, self._raw = self._raw[:n], self._raw[n:]
        return taken


def test_the_seed_meets_its_vector_field_by_field() -> None:
    assert derive_seed(SECRET, b"\x01\x02", "batch-order", 7) == SEED
    assert CRYPTO.hkdf(SECRET, b"", bytes.fromhex(VECTOR["info"]), 32) == SEED


def test_the_stream_meets_its_vectors() -> None:
    assert Stream(SEED).bytes(64).hex() == VECTOR["stream"]
    assert Stream(SEED).uniform_float32(4).tolist() == VECTOR["uniform_float32"]
    assert Stream(SEED).integers_below(1000, 8).tolist() == VECTOR["integers_below_1000"]
    assert Stream(SEED).permutation(8).tolist() == VECTOR["permutation_8"]


def test_the_stream_is_the_chacha20_of_rfc_8439() -> None:
    assert Stream(bytes(32)).bytes(32).hex() == (
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"  # appendix A.1, vector 1
    )


def test_contexts_that_read_alike_give_different_seeds() -> None:
    contexts: list[tuple[bytes | str | int, ...]] = [
        (),
        ("",),
        ("", ""),
        (b"",),
        ("ab", "c"),
        ("a", "bc"),
        ("abc",),
        (b"abc",),
        (1,),
        ("1",),
        ((1).to_bytes(8, "little"),),
        (1, 2),
        (2, 1),
    ]
    assert len({derive_seed(SECRET, *context) for context in contexts}) == len(contexts)


@pytest.mark.parametrize("context", [-1, 1 << 64, True, 1.5, None])
def test_what_has_no_one_encoding_is_no_context(context: int) -> None:
    with pytest.raises(LocalProtocolError):
        derive_seed(SECRET, context)


def test_a_short_secret_or_seed_is_refused() -> None:
    with pytest.raises(LocalProtocolError):
        derive_seed(bytes(31))
    with pytest.raises(LocalProtocolError):
        Stream(bytes(31))


def test_uniforms_are_in_range_and_spread() -> None:
    drawn = Stream(SEED).uniform_float32(100_000)
    assert drawn.dtype == np.float32
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts, _ = np.histogram(drawn, bins=16, range=(0, 1))
    assert np.abs(counts - 6250).max() < 5 * np.sqrt(6250)


def test_a_word_that_would_bias_the_integers_is_passed_over() -> None:
    bound = 3 << 61  # twice fits into 2^64, a quarter of which remains: words in it would favour small values
    assert _Words([bound + 5, 2 * bound, 2**64 - 1, 9]).integers_below(bound, 2).tolist() == [5, 9]
    stream = _Words([7, 2**63 - 1, 2**63 + 4])
    assert stream.integers_below(2**63, 3).tolist() == [7, 2**63 - 1, 4]
    third = (2**64 - 1) // 3
    assert _Words([2**64 - 1, 3 * third - 1, 5]).integers_below(third, 2).tolist() == [third - 1, 5]


def test_every_permutation_of_four_is_equally_likely() -> None:
    stream = Stream(SEED)
    counts = Counter(tuple(stream.permutation(4).tolist()) for _ in range(4800))
    assert set(counts) == set(itertools.permutations(range(4)))
    assert all(abs(count - 200) < 5 * np.sqrt(200) for count in counts.values())


def test_equal_words_are_drawn_again() -> None:
    assert _Words([5, 5, 1, 9, 2, 4]).permutation(3).tolist() == [1, 2, 0]


def test_nothing_can_be_drawn_of_nothing() -> None:
    stream = Stream(SEED)
    assert stream.bytes(0) == b""
    assert stream.permutation(0).tolist() == []
    assert stream.permutation(1).tolist() == [0]
    assert stream.integers_below(1, 3).tolist() == [0, 0, 0]
    for draw in (
        lambda: stream.bytes(-1),
        lambda: stream.integers_below(0, 1),
        lambda: stream.permutation(-1),
    ):
        with pytest.raises(LocalProtocolError):
            draw()


def test_a_stream_does_not_show_its_seed() -> None:
    assert repr(Stream(SEED)) == "Stream(secret)"
