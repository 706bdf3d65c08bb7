"""What every codec promises; a new one is one more parameter."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.protocol.codecs import Codec, available, codec_named, entropy
from edge_runtime.protocol.crypto.prg import Stream
from edge_runtime.protocol.errors import LocalProtocolError, RemoteProtocolError
from edge_runtime.protocol.rejects import Reject

SIZES = [0, 1, 1023, 1024, 1025, 5000, 65_536, 65_537]


@pytest.fixture(params=available())
def codec(request: pytest.FixtureRequest) -> Codec:
    return codec_named(request.param)


def _encode(codec: Codec, vector: np.ndarray, seed: int = 1) -> bytes:
    return codec.encode(vector, codec.init(vector.size), Stream(bytes([seed]) * 32))[0]


def _vector(d: int) -> np.ndarray:
    return Stream(bytes(32)).uniform_float32(d) - np.float32(0.5)


@pytest.mark.parametrize("d", SIZES)
def test_a_vector_comes_back_with_its_shape_and_dtype_and_within_a_step(codec: Codec, d: int) -> None:
    vector = _vector(d)
    decoded = codec.decode(_encode(codec, vector), d)
    assert decoded.dtype == np.float32
    assert decoded.shape == (d,)
    assert decoded.flags.writeable
    assert np.abs(decoded - vector).max(initial=0) <= np.abs(vector).max(initial=0) / 127 * 1.0001


@pytest.mark.parametrize("d", SIZES)
def test_no_encoding_is_longer_than_it_says(codec: Codec, d: int) -> None:
    noise = np.frombuffer(Stream(bytes(32)).bytes(4 * d), "<u4") & np.uint32(0xBF7FFFFF)  # any finite float32
    assert len(_encode(codec, noise.astype("<u4").view("<f4").astype(np.float32))) <= codec.max_bytes(d)


def test_unit_vectors_and_zeros_are_exact(codec: Codec) -> None:
    for i in (0, 1023, 1024, 2999):
        unit = np.zeros(3000, dtype=np.float32)
        unit[i] = 1
        assert np.array_equal(codec.decode(_encode(codec, unit), 3000), unit)
    zeros = np.zeros(3000, dtype=np.float32)
    assert codec.decode(_encode(codec, zeros), 3000).tobytes() == zeros.tobytes()


def test_the_same_stream_gives_the_same_bytes_and_the_vector_is_not_touched(codec: Codec) -> None:
    vector = _vector(3000)
    before = vector.tobytes()
    vector.flags.writeable = False
    assert _encode(codec, vector) == _encode(codec, vector)
    assert vector.tobytes() == before


def test_a_strided_view_is_encoded_as_the_values_it_shows(codec: Codec) -> None:
    vector = _vector(2000)
    assert _encode(codec, vector[::2]) == _encode(codec, vector[::2].copy())


@pytest.mark.parametrize("off_by", [-1, 1])
def test_another_length_is_refused(codec: Codec, off_by: int) -> None:
    encoded = _encode(codec, _vector(2048))
    with pytest.raises(RemoteProtocolError) as refusal:
        codec.decode(encoded, 2048 + off_by)
    assert refusal.value.reject is Reject.BAD_ENCODING


def test_cut_and_trailing_bytes_are_refused(codec: Codec) -> None:
    encoded = _encode(codec, _vector(2048))
    for damaged in (encoded + b"\0", encoded[:-1], encoded[:10], b"", encoded * 2):
        with pytest.raises(RemoteProtocolError) as refusal:
            codec.decode(damaged, 2048)
        assert refusal.value.reject is Reject.BAD_ENCODING


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_vector_that_is_not_finite_is_not_encoded(codec: Codec, bad: float) -> None:
    vector = _vector(10)
    vector[3] = bad
    with pytest.raises(LocalProtocolError, match="NaN"):
        _encode(codec, vector)


def test_a_vector_of_another_dtype_or_rank_is_not_encoded(codec: Codec) -> None:
    for vector in (np.zeros(4), np.zeros((2, 2), dtype=np.float32)):
        with pytest.raises(LocalProtocolError, match="float32"):
            _encode(codec, vector)


def test_a_peer_that_sends_nan_is_refused(codec: Codec) -> None:
    vector = np.full(5, np.nan, dtype="<f4")
    if codec.name.startswith("int8"):
        packed = vector[:1].tobytes() + bytes(5)
    else:
        packed = vector.tobytes()
    encoded = _stage(codec.name)(packed)
    with pytest.raises(RemoteProtocolError) as refusal:
        codec.decode(encoded, 5)
    assert refusal.value.reject is Reject.NOT_FINITE


def _stage(name: str):  # type: ignore[no-untyped-def]
    match name.partition("+")[2]:
        case "zlib":
            return entropy.ZLIB.compress
        case "zstd":
            return entropy.zstd().compress
        case _:
            return bytes
