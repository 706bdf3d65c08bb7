from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_runtime.protocol.codecs import available, codec_named, entropy
from edge_runtime.protocol.crypto.prg import Stream
from edge_runtime.protocol.errors import RemoteProtocolError

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
vectors = hnp.arrays(np.float32, st.integers(0, 1500), elements=finite)


@pytest.mark.parametrize("name", available())
@given(vector=vectors, seed=st.binary(min_size=32, max_size=32))
@settings(max_examples=40, deadline=None)
def test_a_vector_survives_within_one_step_of_its_block(name: str, vector: np.ndarray, seed: bytes) -> None:
    codec = codec_named(name)
    encoded, _ = codec.encode(vector, codec.init(vector.size), Stream(seed))
    decoded = codec.decode(encoded, vector.size)
    if name.startswith("float32"):
        assert decoded.tobytes() == vector.tobytes()
        return
    for start in range(0, vector.size, 1024):
        block = slice(start, start + 1024)
        step = max(float(np.abs(vector[block]).max()) / 127, 1.5e-45) * (1 + 2**-20)
        assert np.abs(decoded[block].astype(np.float64) - vector[block]).max() <= step


@pytest.mark.parametrize("name", available())
@given(garbage=st.binary(max_size=300), d=st.integers(0, 80))
@settings(max_examples=150, deadline=None)
def test_garbage_decodes_to_finite_values_or_is_the_peers_fault(name: str, garbage: bytes, d: int) -> None:
    stages = {"zlib": entropy.ZLIB.compress, "zstd": entropy.zstd().compress if entropy.HAS_ZSTD else None}
    compress = stages.get(name.partition("+")[2])
    for encoded in (garbage, compress(garbage) if compress else garbage[: codec_named(name).max_bytes(d)]):
        try:
            decoded = codec_named(name).decode(encoded, d)
        except RemoteProtocolError:
            continue
        assert decoded.shape == (d,)
        assert np.isfinite(decoded).all()


@pytest.mark.parametrize("name", [name for name in available() if "+" in name])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_flipped_byte_gives_a_value_or_is_the_peers_fault(name: str, data: st.DataObject) -> None:
    codec = codec_named(name)
    vector = np.linspace(-1, 1, 500).astype(np.float32)
    encoded = bytearray(codec.encode(vector, codec.init(500), Stream(bytes(32)))[0])
    encoded[data.draw(st.integers(0, len(encoded) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(RemoteProtocolError):
        assert codec.decode(bytes(encoded), 500).shape == (500,)


@given(name=st.text(max_size=80))
def test_any_name_is_a_codec_or_the_peers_fault(name: str) -> None:
    with contextlib.suppress(RemoteProtocolError):
        assert codec_named(name).name == name
