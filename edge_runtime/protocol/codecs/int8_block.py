"""``int8-block``: 8-bit integers with one scale per 1024 values, rounded at random so that no bias adds up.

Layout: ceil(d / 1024) scales (float32 LE), then d int8 values in [-127, 127]. Scale s of a block is the
least float32 with 127 s >= max|x| (the greatest usable one at the end of the range), so float16's overflow
above 65504 and underflow below 6e-8 do not arise; 4 bytes per 1024 values cost 0.4 %.
Error: |decoded - x| <= s (1 + 2^-22), and the expectation is x within 2^-22 s (Alistarh et al. 2017, QSGD).
A block of zeros has scale 0.
"""

from __future__ import annotations

import numpy as np

from edge_runtime.protocol.codecs.base import F32, Quantizer, Uniforms
from edge_runtime.protocol.errors import RemoteProtocolError
from edge_runtime.protocol.rejects import Reject

BLOCK = 1024
LEVELS = 127
# The greatest scale whose largest multiple is finite in float32.
_MAX_SCALE = np.nextafter(np.finfo(np.float32).max / np.float32(LEVELS), np.float32(0), dtype=np.float32)


def _size(d: int) -> int:
    return 4 * _blocks(d) + d


def _blocks(d: int) -> int:
    return -(-d // BLOCK)


def _pack(vector: F32, stream: Uniforms) -> bytes:
    blocks = _blocks(vector.size)
    padded = np.zeros((blocks, BLOCK), dtype=np.float32)
    padded.reshape(-1)[: vector.size] = vector
    scales = _scales(np.abs(padded).max(axis=1, initial=0))
    steps = padded / np.where(scales > 0, scales, np.float32(1))[:, np.newaxis]
    floor = np.floor(steps)
    uniforms = np.zeros_like(padded)
    uniforms.reshape(-1)[: vector.size] = stream.uniform_float32(vector.size)
    # Comparing with the fraction, which is exact, keeps integers what they are; floor(steps + uniform) would not.
    rounded = np.clip(floor + (uniforms < steps - floor), -LEVELS, LEVELS).astype(np.int8)
    packed: bytes = scales.astype("<f4").tobytes() + rounded.reshape(-1)[: vector.size].tobytes()
    return packed


def _scales(largest: F32) -> F32:
    scales = largest / np.float32(LEVELS)
    with np.errstate(over="ignore"):
        short = scales * np.float32(LEVELS) < largest
    scales = np.where(short, np.nextafter(scales, np.float32(np.inf)), scales)
    least: F32 = np.minimum(scales, _MAX_SCALE)
    return least


def _unpack(packed: bytes, d: int) -> F32:
    blocks = _blocks(d)
    scales = np.frombuffer(packed, dtype="<f4", count=blocks).astype(np.float32)
    values = np.frombuffer(packed, dtype=np.int8, count=d, offset=4 * blocks)
    if bool(np.signbit(scales).any()) or bool((values < -LEVELS).any()):
        raise RemoteProtocolError(Reject.BAD_ENCODING, "int8-block: a negative scale, or a value of -128")
    vector = np.zeros((blocks, BLOCK), dtype=np.float32)
    vector.reshape(-1)[:d] = values
    with np.errstate(over="ignore", invalid="ignore"):
        vector *= scales[:, np.newaxis]
    return vector.reshape(-1)[:d]


INT8_BLOCK = Quantizer(name="int8-block", size=_size, pack=_pack, unpack=_unpack)
