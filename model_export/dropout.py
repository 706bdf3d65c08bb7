"""Dropout masks from a counter: a hash of (element, dropout_seed, node), the same in every runtime and in numpy.

A counter-based generator (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3") has no stream to
lose, so a step can be repeated. The runtime's own Dropout is of no use: the first element of its mask stays the
same between calls. Exact arithmetic modulo 2^32 of standard operators; the multipliers and shifts are those of
Wellons 2018, "Prospecting for Hash Functions" (lowbias32).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import helper

from model_export.autodiff.builder import Builder

SEED = "dropout_seed"  # the scalar input, int64
_U32 = np.dtype(np.uint32)
_UINT32, _UINT64, _INT32, _FLOAT = (
    helper.np_dtype_to_tensor_dtype(np.dtype(kind)) for kind in (np.uint32, np.uint64, np.int32, np.float32)
)
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B
_WORD = 0xFFFFFFFF

Uint32 = npt.NDArray[np.uint32]


def keep_mask(seed: int, salt: int, probability: float, shape: Sequence[int]) -> npt.NDArray[np.bool_]:
    """True where an element is kept: what the graphs compute. Each is dropped with ``probability`` in [0, 1).

    ``seed``: int64; ``salt``: which dropout of the model, 0 to 2^31 - 1. Elements are counted in C order.
    """
    low, high = (np.array([(seed >> shift) & _WORD], _U32) for shift in (0, 32))
    first = _mix(low ^ np.uint32(_salts(salt)[0]))
    second = _mix((high + first) ^ np.uint32(_salts(salt)[1]))
    x = np.arange(math.prod(shape), dtype=_U32) ^ first
    x = (x ^ (x >> np.uint32(16))) * np.uint32(_FIRST) ^ second
    x = (x ^ (x >> np.uint32(15))) * np.uint32(_SECOND)
    return np.asarray(x >= np.uint32(_threshold(probability))).reshape(tuple(shape))


def write_mask(b: Builder, salt: int, probability: float, shape: str) -> str:
    """The same in a graph that has the input SEED: float32, 0 or 1 / (1 - probability), of a ``shape`` value."""
    words = b.op("Cast", SEED, to=_UINT64)
    low = b.op("Cast", words, to=_UINT32)
    high = b.op(
        "Cast", b.op("BitShift", words, b.constant(np.array(32, np.uint64)), direction="RIGHT"), to=_UINT32
    )
    first = _write_mix(b, b.op("BitwiseXor", low, _word(b, _salts(salt)[0])))
    second = _write_mix(b, b.op("BitwiseXor", b.op("Add", high, first), _word(b, _salts(salt)[1])))
    count = b.op("Cast", b.op("ReduceProd", shape, keepdims=0), to=_INT32)
    counter = b.op("Range", b.constant(np.array(0, np.int32)), count, b.constant(np.array(1, np.int32)))
    x = b.op("BitwiseXor", b.op("Cast", counter, to=_UINT32), first)
    x = b.op("BitwiseXor", b.op("Mul", _write_fold(b, x, 16), _word(b, _FIRST)), second)
    x = b.op("Mul", _write_fold(b, x, 15), _word(b, _SECOND))
    kept = b.op("Cast", b.op("GreaterOrEqual", x, _word(b, _threshold(probability))), to=_FLOAT)
    return b.op("Reshape", b.op("Mul", kept, 1.0 / (1.0 - probability)), shape)


def _threshold(probability: float) -> int:
    return min(int(probability * 2**32), _WORD)


def _salts(salt: int) -> tuple[int, int]:
    first, second = _mix(np.array([2 * salt + 1, 2 * salt + 2], _U32)).tolist()
    return first, second


def _mix(x: Uint32) -> Uint32:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(_FIRST)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(_SECOND)
    mixed: Uint32 = x ^ (x >> np.uint32(16))
    return mixed


def _write_mix(b: Builder, x: str) -> str:
    x = b.op("Mul", _write_fold(b, x, 16), _word(b, _FIRST))
    x = b.op("Mul", _write_fold(b, x, 15), _word(b, _SECOND))
    return _write_fold(b, x, 16)


def _write_fold(b: Builder, x: str, bits: int) -> str:
    return b.op("BitwiseXor", x, b.op("BitShift", x, _word(b, bits), direction="RIGHT"))


def _word(b: Builder, value: int) -> str:
    constant: npt.NDArray[Any] = np.array(value, _U32)
    return b.constant(constant)
