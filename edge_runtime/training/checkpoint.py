"""What local training needs to go on after a stop, as bytes that a store can keep.

Little-endian: HEADER, then theta, then the optimiser's vectors, float32 each, then SHA-256 of all before it.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import numpy as np

from edge_runtime.backends.base import TrainingState
from edge_runtime.protocol.artifact import MAX_PARAMETER_COUNT
from edge_runtime.protocol.errors import Fault, FleetgradError

MAGIC = b"FGCK\1"
# magic, steps made, samples, pass, losses (first, sum of the pass), samples of the pass,
# optimizer, its steps, how many vectors it has, d, p
HEADER = struct.Struct("<5s Q Q Q d d Q 16s Q B I I")
_DIGEST_BYTES = 32


class CheckpointError(
    FleetgradError,
    fault=Fault.SURROUNDINGS,
    remedy="nothing: the device trains the round from its beginning; if it happens again, check the disk",
):
    """A checkpoint that is damaged, or of other data, another plan or another model."""


@dataclass(frozen=True, kw_only=True)
class PassLosses:
    """Losses per sample. ``first``: mean of the first pass so far; the others: of pass ``number``, from 0."""

    first: float = 0.0
    number: int = 0
    total: float = 0.0
    samples: int = 0

    def after(self, number: int, loss: float, samples: int) -> PassLosses:
        """With one more batch: its pass, its mean loss and its size."""
        same = number == self.number
        total = (self.total if same else 0.0) + loss * samples
        count = (self.samples if same else 0) + samples
        first = total / count if number == 0 else self.first
        return PassLosses(first=first, number=number, total=total, samples=count)

    @property
    def last(self) -> float:
        """Mean of the latest pass so far."""
        return self.total / self.samples


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """Between two steps. ``step``: how many were made; the batch order and the dropout masks follow from it.

    samples: of the dataset it was made with.
    """

    step: int
    samples: int
    losses: PassLosses
    state: TrainingState

    def to_bytes(self) -> bytes:
        """At most 12 d + 150 bytes with SGD or Adam."""
        state, losses = self.state, self.losses
        header = HEADER.pack(
            *(MAGIC, self.step, self.samples),
            *(losses.number, losses.first, losses.total, losses.samples),
            *(state.optimizer.encode(), state.steps, len(state.vectors)),
            *(state.theta.size, state.vectors[0].size if state.vectors else 0),
        )
        vectors = (vector.astype("<f4", copy=False) for vector in (state.theta, *state.vectors))
        parts: list[bytes | memoryview] = [header, *(vector.data for vector in vectors)]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        return b"".join((*parts, digest.digest()))

    @classmethod
    def from_bytes(cls, raw: bytes) -> Checkpoint:
        """The inverse of ``to_bytes``; raises CheckpointError for any other bytes."""
        if len(raw) < HEADER.size + _DIGEST_BYTES:
            raise CheckpointError(f"a checkpoint of {len(raw)} bytes is too short")
        content = memoryview(raw)[:-_DIGEST_BYTES]
        if hashlib.sha256(content).digest() != raw[-_DIGEST_BYTES:]:
            raise CheckpointError("the checkpoint is damaged: its SHA-256 does not match")
        magic, step, samples, number, first, total, in_pass, optimizer, steps, count, d, p = (
            HEADER.unpack_from(content)
        )
        if magic != MAGIC:
            raise CheckpointError("the checkpoint is of another version of this software")
        sizes = (d, *(p for _ in range(count)))
        if (
            max(d, p) > MAX_PARAMETER_COUNT
            or len(content) != HEADER.size + 4 * sum(sizes)
            or (step > 0) != (in_pass > 0)
            or (count > 0) != (p > 0)
            or not optimizer.isascii()
        ):
            raise CheckpointError(f"a checkpoint of {len(raw)} bytes does not hold what its header says")
        vectors, at = [], HEADER.size
        for size in sizes:
            vectors.append(np.frombuffer(content, "<f4", size, at).astype(np.float32))
            at += 4 * size
        name = optimizer.rstrip(b"\0").decode("ascii")
        return cls(
            step=step,
            samples=samples,
            losses=PassLosses(first=first, number=number, total=total, samples=in_pass),
            state=TrainingState(vectors[0], name, tuple(vectors[1:]), steps),
        )
