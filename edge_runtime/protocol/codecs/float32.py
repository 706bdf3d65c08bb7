"""``float32``: the values themselves, little-endian, 4 bytes each. Lossless."""

from __future__ import annotations

import numpy as np

from edge_runtime.protocol.codecs.base import F32, Quantizer, Uniforms


def _pack(vector: F32, stream: Uniforms) -> bytes:
    return vector.astype("<f4", copy=False).tobytes()


def _unpack(packed: bytes, d: int) -> F32:
    return np.frombuffer(packed, dtype="<f4", count=d).astype(np.float32)


FLOAT32 = Quantizer(name="float32", size=lambda d: 4 * d, pack=_pack, unpack=_unpack)
