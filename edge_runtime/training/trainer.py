"""One round of local training as a generator of steps; the host decides after each whether there is a next."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edge_runtime.backends.base import TrainingSession
from edge_runtime.data import Dataset
from edge_runtime.protocol.crypto.prg import Stream, derive_seed
from edge_runtime.protocol.errors import Fault, FleetgradError
from edge_runtime.protocol.ids import DeviceId, RoundId
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.tensors import Vector


class TrainingDiverged(
    FleetgradError,
    fault=Fault.MODELLER,
    remedy="lower learning_rate or max_grad_norm of the plan; check the local data for wild values",
):
    """Loss, gradient or parameters are no longer finite: nothing of this round is sent."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step that was made. ``index`` counts from 1 to ``total``; ``loss``: mean of the batch before the step."""

    index: int
    total: int
    loss: float
    grad_norm: float


class TrainingResult(NamedTuple):
    """``theta``: float32 of shape (d,). Losses: mean per sample of the first and of the last pass over the data."""

    theta: Vector
    samples: int
    steps: int
    loss_first: float
    loss_last: float


def batch_seed(device_seed: bytes, round_id: RoundId, device: DeviceId) -> bytes:
    """The 32-byte seed of one device's batch order in one round, from its own 32-byte secret."""
    return derive_seed(device_seed, "batch-order", round_id.generation, round_id.number, device)


def total_steps(plan: Plan, samples: int) -> int:
    """Optimiser steps the plan asks for with this many samples; the last, smaller batch of a pass counts."""
    return plan.steps or plan.epochs * math.ceil(samples / plan.batch_size)


def train(
    session: TrainingSession,
    dataset: Dataset,
    plan: Plan,
    theta: Vector,
    *,
    seed: bytes,
    should_stop: Callable[[], bool] = lambda: False,
) -> Generator[Step, None, TrainingResult | None]:
    """Runs ``plan`` from ``theta``, float32 of shape (d,); yields every step, returns the result.

    seed: 32 bytes (``batch_seed``); each pass over the data is shuffled anew from it, every sample once.
    should_stop: asked before each step and before the result; True ends the training with None.
    With one thread the same arguments give the same bytes.
    Raises TrainingDiverged, and what the backend raises.
    """
    session.start(theta)
    total = total_steps(plan, dataset.samples)
    losses = _PassLosses()
    for index, (epoch, rows) in enumerate(_batches(dataset.samples, plan.batch_size, seed), 1):
        if should_stop():
            return None
        # Fancy indexing copies: the batch is C-contiguous, as backends require.
        loss, grad_norm = session.step(
            tuple(array[rows] for array in dataset.inputs),
            dataset.target[rows],
            learning_rate=plan.learning_rate,
            momentum=plan.momentum,
            max_grad_norm=plan.max_grad_norm,
        )
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise _diverged(f"loss {loss:g}, gradient norm {grad_norm:g}", index, total)
        losses.add(epoch, loss, len(rows))
        yield Step(index, total, loss, grad_norm)
        if index == total:
            break
    if should_stop():
        return None
    result = session.theta()
    if not np.isfinite(result).all():
        raise _diverged("a parameter is not finite", total, total)
    return TrainingResult(result, dataset.samples, total, losses.first, losses.last)


def delta(theta: Vector, base: Vector) -> Vector:
    """``theta`` - ``base`` as a new float32 vector of shape (d,). Raises TrainingDiverged if not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        difference: Vector = np.subtract(theta, base, dtype=np.float32)
    if not np.isfinite(difference).all():
        raise TrainingDiverged("the update is not finite: lower the learning rate, or check the local data")
    return difference


def _batches(samples: int, batch_size: int, seed: bytes) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """(pass, rows of a batch) without end; a pass holds each row once, its last batch may be smaller."""
    epoch = 0
    while True:
        order = Stream(derive_seed(seed, "epoch", epoch)).permutation(samples)
        for start in range(0, samples, batch_size):
            yield epoch, order[start : start + batch_size]
        epoch += 1


class _PassLosses:
    """Mean losses per sample of the first and the latest pass."""

    def __init__(self) -> None:
        self.first = self.last = math.nan
        self._epoch, self._sum, self._samples = 0, 0.0, 0

    def add(self, epoch: int, loss: float, samples: int) -> None:
        if epoch != self._epoch:
            self._epoch, self._sum, self._samples = epoch, 0.0, 0
        self._sum += loss * samples
        self._samples += samples
        self.last = self._sum / self._samples
        if epoch == 0:
            self.first = self.last


def _diverged(what: str, index: int, total: int) -> TrainingDiverged:
    return TrainingDiverged(
        f"training diverged at step {index} of {total} ({what}): lower the learning rate or "
        "max_grad_norm of the plan, or check the local data"
    )
