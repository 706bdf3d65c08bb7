from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.protocol import codecs
from edge_runtime.protocol.codecs import available, codec_named, entropy
from edge_runtime.protocol.codecs.int8_block import BLOCK, LEVELS
from edge_runtime.protocol.crypto.prg import Stream
from edge_runtime.protocol.errors import RemoteProtocolError
from edge_runtime.protocol.rejects import Reject

VECTORS = json.loads(Path("tests/vectors/codecs.json").read_text())
SEED = bytes.fromhex(VECTORS["seed"])
F32_MAX = np.finfo(np.float32).max
TINY = np.float32(1e-45)


def _floats(rows: list[str]) -> np.ndarray:
    return np.frombuffer(bytes.fromhex("".join(rows)), dtype="<f4")


def _through(name: str, vector: np.ndarray) -> np.ndarray:
    codec = codec_named(name)
    encoded, _ = codec.encode(vector.astype(np.float32), codec.init(vector.size), Stream(SEED))
    return codec.decode(encoded, vector.size)


@pytest.mark.parametrize("row", VECTORS["vectors"], ids=lambda row: row["codec"])
def test_a_codec_meets_its_vector(row: dict[str, str]) -> None:
    codec = codec_named(row["codec"])
    vector = _floats(VECTORS["vector"])
    encoded, state = codec.encode(vector, codec.init(8), Stream(SEED))
    assert encoded.hex() == row["encoded"]
    assert codec.decode(encoded, 8).tobytes() == _floats(row["decoded"]).tobytes()
    assert state.shape == (0,)


def test_an_unknown_codec_is_refused_with_the_list_of_choices() -> None:
    with pytest.raises(RemoteProtocolError, match="int8-block, ") as refusal:
        codec_named("int4")
    assert refusal.value.reject is Reject.UNKNOWN_CODEC


def test_without_zstandard_its_codecs_are_neither_offered_nor_accepted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(entropy, "HAS_ZSTD", False)
    assert available() == ("int8-block+zlib", "int8-block", "float32+zlib", "float32")
    with pytest.raises(RemoteProtocolError) as refusal:
        codec_named("int8-block+zstd")
    assert refusal.value.reject is Reject.UNKNOWN_CODEC


def test_a_digits_model_costs_at_most_1_1_bytes_a_parameter() -> None:
    d = 38_000
    noise = Stream(SEED).uniform_float32(2 * d).astype(np.float64)
    gauss = np.sqrt(-2 * np.log(noise[:d] + 1e-9)) * np.cos(2 * np.pi * noise[d:])
    worst = (noise[:d] - 0.5).astype(np.float32)  # uniform: every int8 value equally often
    sparse = (1e-3 * gauss * (noise[d:] < 0.1)).astype(np.float32)
    for name in (n for n in available() if n.startswith("int8-block")):
        codec = codec_named(name)
        sizes = {}
        for label, vector in (("worst", worst), ("gauss", gauss.astype(np.float32)), ("sparse", sparse)):
            sizes[label] = len(codec.encode(vector, codec.init(d), Stream(SEED))[0]) / d
        assert max(sizes.values()) <= 1.1
        assert codec.max_bytes(d) <= 1.1 * d
        if "+" in name:
            assert sizes["gauss"] < 0.95
            assert sizes["sparse"] < 0.35


@pytest.mark.parametrize("magnitude", [F32_MAX, 1e30, 65504.0 * 1e3, 1.0, 6e-8, 1e-38, 1e-42, TINY, 0.0])
def test_int8_blocks_span_all_of_float32(magnitude: float) -> None:
    vector = (np.linspace(-1, 1, 2 * BLOCK + 7) * np.float64(magnitude)).astype(np.float32)
    vector[[0, -1]] = [-magnitude, magnitude]
    decoded = _through("int8-block", vector)
    error = np.abs(decoded.astype(np.float64) - vector)
    assert error.max() <= max(float(magnitude) / LEVELS, float(TINY)) * (1 + 2**-20)


def test_a_small_block_beside_a_large_one_keeps_its_own_scale() -> None:
    vector = np.concatenate((np.full(BLOCK, 1e6), np.full(BLOCK, 1e-6), np.zeros(BLOCK), [3.0])).astype(
        np.float32
    )
    np.testing.assert_allclose(_through("int8-block", vector), vector, rtol=1e-6)


def test_stochastic_rounding_is_unbiased() -> None:
    codec = codec_named("int8-block")
    vector = np.array([1.0, 0.3 / 127, -0.3 / 127, 55.75 / 127], dtype=np.float32)
    stream, n = Stream(SEED), 4000
    total = np.zeros(4)
    for _ in range(n):
        total += codec.decode(codec.encode(vector, codec.init(4), stream)[0], 4)
    assert np.abs(total / n - vector).max() < 5 * (0.5 / 127) / np.sqrt(n)


def test_whole_steps_are_not_changed_by_rounding() -> None:
    vector = np.arange(-127, 128).astype(np.float32)
    for _ in range(20):
        assert np.array_equal(_through("int8-block", vector), vector)


@pytest.mark.parametrize(
    ("encoded", "reject"),
    [
        (struct.pack("<fb", float("nan"), 1), Reject.NOT_FINITE),
        (struct.pack("<fb", float("inf"), 0), Reject.NOT_FINITE),
        (struct.pack("<fb", 3e38, 127), Reject.NOT_FINITE),
        (struct.pack("<fb", -1.0, 1), Reject.BAD_ENCODING),
        (struct.pack("<fb", -0.0, 1), Reject.BAD_ENCODING),
        (struct.pack("<fb", 1.0, -128), Reject.BAD_ENCODING),
        (struct.pack("<f", 1.0), Reject.BAD_ENCODING),
        (struct.pack("<fbb", 1.0, 1, 1), Reject.BAD_ENCODING),
    ],
)
def test_an_int8_block_has_one_spelling(encoded: bytes, reject: Reject) -> None:
    with pytest.raises(RemoteProtocolError) as refusal:
        codec_named("int8-block").decode(encoded, 1)
    assert refusal.value.reject is reject


def test_a_decompression_bomb_is_refused_before_it_grows() -> None:
    bomb = zlib.compress(bytes(50_000_000), 9)
    for codec in (codec_named("int8-block+zlib"), codec_named("float32+zlib")):
        with pytest.raises(RemoteProtocolError) as refusal:
            codec.decode(bomb[: codec.max_bytes(60_000)], 60_000)
        assert refusal.value.reject is Reject.BAD_ENCODING
    with pytest.raises(RemoteProtocolError, match="not one stream"):
        entropy.ZLIB.decompress(bomb, 100)


def test_a_zstd_frame_must_declare_the_expected_size() -> None:
    zstandard = pytest.importorskip("zstandard")
    decode = entropy.zstd().decompress
    content = bytes(1000)
    assert decode(zstandard.ZstdCompressor().compress(content), 1000) == content
    undeclared = zstandard.ZstdCompressor(write_content_size=False).compress(content)
    frame = zstandard.ZstdCompressor().compress(content)
    huge = bytearray(zstandard.ZstdCompressor().compress(bytes(1 << 20)))
    for encoded in (undeclared, frame + b"x", frame + frame, frame[:-1], bytes(huge)):
        with pytest.raises(RemoteProtocolError) as refusal:
            decode(encoded, 1000)
        assert refusal.value.reject is Reject.BAD_ENCODING


@pytest.mark.parametrize("tail", [b"x", zlib.compress(b"x"), b"\0"])
def test_bytes_after_a_zlib_stream_are_refused(tail: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as refusal:
        entropy.ZLIB.decompress(zlib.compress(b"content") + tail, 7)
    assert refusal.value.reject is Reject.BAD_ENCODING


def test_the_table_is_the_whole_choice() -> None:
    assert set(available()) <= set(codecs.CODECS)
    assert all(codec_named(name).name == name for name in available())
