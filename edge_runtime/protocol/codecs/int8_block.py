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
TILE_BLOCKS = 64  # rounded at a time: the float32 temporaries stay below 2 MiB, whatever the model
# The greatest scale whose largest multiple is finite in float32.
_MAX_SCALE = np.nextafter(np.finfo(np.float32).max / np.float32(LEVELS), np.float32(0), dtype=np.float32)


def _size(d: int) -> int:
    return 4 * _blocks(d) + d


def _blocks(d: int) -> int:
    return -(-d // BLOCK)


def _pack(vector: F32, stream: Uniforms) -> bytes:
    scales = np.empty(_blocks(vector.size), dtype="<f4")
    rounded = np.empty(vector.size, dtype=np.int8)
    for first in range(0, len(scales), TILE_BLOCKS):
        tile = vector[first * BLOCK : (first + TILE_BLOCKS) * BLOCK]
        blocks = np.zeros((_blocks(tile.size), BLOCK), dtype=np.float32)
        blocks.reshape(-1)[: tile.size] = tile
        tile_scales = _scales(np.abs(blocks).max(axis=1))
        scales[first : first + len(blocks)] = tile_scales
        blocks /= np.where(tile_scales > 0, tile_scales, np.float32(1))[:, np.newaxis]
        steps = blocks.reshape(-1)[: tile.size]
        # Comparing with the fraction, which is exact, leaves integers alone; floor(steps + uniform) would not.
        floor = np.floor(steps)
        up = stream.uniform_float32(tile.size) < steps - floor
        rounded[first * BLOCK :][: tile.size] = np.clip(floor + up, -LEVELS, LEVELS)
    return scales.tobytes() + rounded.tobytes()


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
