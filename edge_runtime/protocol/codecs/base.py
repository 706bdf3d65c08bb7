"""What a codec is: four pure functions under a name. The caller keeps the state between rounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from edge_runtime.protocol.codecs.entropy import Entropy
from edge_runtime.protocol.errors import LocalProtocolError, RemoteProtocolError
from edge_runtime.protocol.rejects import Reject

F32: TypeAlias = npt.NDArray[np.float32]
# What encoding one round leaves for the next (a residual, say): float32, shape (k,), easily journalled.
# k = 0 for a codec without memory.
CodecState: TypeAlias = npt.NDArray[np.float32]


class Uniforms(Protocol):
    """The randomness of stochastic rounding; ``crypto.prg.Stream`` is one."""

    def uniform_float32(self, n: int) -> F32:
        """Shape (n,), float32, uniform in [0, 1)."""
        ...


@dataclass(frozen=True)
class Codec:
    """A way for a float32 vector of shape (d,) to travel.

    ``init(d)``: the first state. ``encode(vector, state, stream)``: bytes and the next state; vector
    float32 of shape (d,), finite, else LocalProtocolError. ``decode(encoded, d)``: float32 of shape (d,),
    finite; raises RemoteProtocolError(BAD_ENCODING) or (NOT_FINITE), and allocates nothing that d does not
    justify. ``max_bytes(d)``: no encoding of d values is longer, and no longer one is decoded.
    """

    name: str
    init: Callable[[int], CodecState]
    encode: Callable[[F32, CodecState, Uniforms], tuple[bytes, CodecState]]
    decode: Callable[[bytes, int], F32]
    max_bytes: Callable[[int], int]


@dataclass(frozen=True)
class Quantizer:
    """The first stage: d values as exactly ``size(d)`` bytes, and back. ``unpack`` gets exactly those."""

    name: str
    size: Callable[[int], int]
    pack: Callable[[F32, Uniforms], bytes]
    unpack: Callable[[bytes, int], F32]


def chain(quantizer: Quantizer, entropy: Entropy | None) -> Codec:
    """The codec ``<quantizer>+<entropy>``, or the quantizer alone."""

    def init(d: int) -> CodecState:
        return np.empty(0, dtype=np.float32)

    def encode(vector: F32, state: CodecState, stream: Uniforms) -> tuple[bytes, CodecState]:
        _check_vector(vector)
        packed = quantizer.pack(np.ascontiguousarray(vector), stream)
        return (packed if entropy is None else entropy.compress(packed)), state

    def decode(encoded: bytes, d: int) -> F32:
        if len(encoded) > max_bytes(d):
            raise RemoteProtocolError(
                Reject.BAD_ENCODING, f"{len(encoded)} bytes for {d} values: {max_bytes(d)} are enough"
            )
        expected = quantizer.size(d)
        packed = encoded if entropy is None else entropy.decompress(encoded, expected)
        if len(packed) != expected:
            raise RemoteProtocolError(
                Reject.BAD_ENCODING, f"{d} values are {expected} bytes of {quantizer.name}, not {len(packed)}"
            )
        vector = quantizer.unpack(packed, d)
        if not np.isfinite(vector).all():
            raise RemoteProtocolError(Reject.NOT_FINITE, "the vector holds NaN or infinity")
        return vector

    def max_bytes(d: int) -> int:
        size = quantizer.size(d)
        return size if entropy is None else entropy.bound(size)

    name = quantizer.name if entropy is None else f"{quantizer.name}+{entropy.name}"
    return Codec(name, init, encode, decode, max_bytes)


def _check_vector(vector: F32) -> None:
    if vector.dtype != np.float32 or vector.ndim != 1:
        raise LocalProtocolError(f"a codec takes float32 of shape (d,), not {vector.dtype} {vector.shape}")
    if not np.isfinite(vector).all():
        raise LocalProtocolError("the vector to encode holds NaN or infinity: check it after training")
