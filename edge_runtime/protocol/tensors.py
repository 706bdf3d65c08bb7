"""Parameters as one flat vector: where each named tensor lies in float32 theta of shape (d,)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_runtime.protocol.errors import Fault, FleetgradError

Vector = npt.NDArray[np.float32]


class TensorError(
    FleetgradError,
    fault=Fault.MODELLER,
    remedy="build the artifact again; vector and artifact must come from the same export",
):
    """Arrays that do not fit the TensorSpecs: a missing or unknown name, another shape or dtype."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One parameter: ``theta[offset:offset + size].reshape(shape)``. ``shape`` () is a scalar of size 1."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


def layout(shapes: Iterable[tuple[str, Sequence[int]]]) -> tuple[TensorSpec, ...]:
    """Specs of the (name, shape) pairs, packed without gaps in the order given.

    Raises TensorError for a name that comes twice or a dimension below 1.
    """
    specs: list[TensorSpec] = []
    seen: set[str] = set()
    offset = 0
    for name, shape in shapes:
        if name in seen:
            raise TensorError(f"parameter {name!r} comes twice")
        if any(dimension < 1 for dimension in shape):
            raise TensorError(
                f"parameter {name!r} has shape {tuple(shape)}: every dimension must be at least 1"
            )
        seen.add(name)
        specs.append(TensorSpec(name, tuple(shape), offset))
        offset += specs[-1].size
    return tuple(specs)


def parameter_count(specs: Sequence[TensorSpec]) -> int:
    """d, the length of theta."""
    return specs[-1].offset + specs[-1].size if specs else 0


def flatten(specs: Sequence[TensorSpec], arrays: Mapping[str, npt.NDArray[np.float32]]) -> Vector:
    """Named float32 arrays as a new vector of shape (d,).

    Raises TensorError unless the names are those of the specs, with their shapes and float32.
    """
    names = {spec.name for spec in specs}
    if names != arrays.keys():
        missing, unknown = sorted(names - arrays.keys()), sorted(arrays.keys() - names)
        raise TensorError(f"parameters do not match: missing {missing[:5]}, unknown {unknown[:5]}")
    theta = np.empty(parameter_count(specs), np.float32)
    for spec in specs:
        array = arrays[spec.name]
        if array.shape != spec.shape or array.dtype != np.float32:
            raise TensorError(
                f"parameter {spec.name!r} is {array.dtype} of shape {array.shape}, expected float32 of {spec.shape}"
            )
        theta[spec.offset : spec.offset + spec.size] = array.reshape(-1)
    return theta


def unflatten(specs: Sequence[TensorSpec], theta: Vector) -> dict[str, npt.NDArray[np.float32]]:
    """Views into ``theta``, float32 of shape (d,), by parameter name, in the order of the specs.

    Raises TensorError for another shape or dtype.
    """
    check_vector(parameter_count(specs), theta)
    return {spec.name: theta[spec.offset : spec.offset + spec.size].reshape(spec.shape) for spec in specs}


def check_vector(d: int, theta: Vector) -> None:
    """Raises TensorError unless ``theta`` is float32 of shape (d,)."""
    if theta.shape != (d,) or theta.dtype != np.float32:
        raise TensorError(f"the vector is {theta.dtype} of shape {theta.shape}, expected float32 of ({d},)")


def vector_to_bytes(theta: Vector) -> bytes:
    """float32 little-endian, 4 d bytes: ``params.bin`` and the model blob."""
    return theta.astype("<f4", copy=False).tobytes()


def vector_from_bytes(d: int, raw: bytes) -> Vector:
    """The inverse of vector_to_bytes: a new, writable vector of shape (d,). Raises TensorError unless 4 d bytes."""
    if len(raw) != 4 * d:
        raise TensorError(f"the vector has {len(raw)} bytes, expected {4 * d} for {d} parameters")
    return np.frombuffer(raw, "<f4").astype(np.float32)
