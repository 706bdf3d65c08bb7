"""One round of local training, step by step: the host decides after each whether there is a next."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edge_runtime.backends.base import Hyperparameters, TrainingSession
from edge_runtime.data import Dataset
from edge_runtime.protocol.crypto.prg import Stream, derive_seed
from edge_runtime.protocol.errors import Fault, FleetgradError, LocalProtocolError
from edge_runtime.protocol.ids import DeviceId, RoundId
from edge_runtime.protocol.plan import OPTIMIZERS, Plan
from edge_runtime.protocol.tensors import TensorError, Vector
from edge_runtime.training.checkpoint import Checkpoint, CheckpointError, PassLosses


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


def hyperparameters(plan: Plan, version: int) -> Hyperparameters:
    """Of every step of a round that starts from ``version``."""
    return Hyperparameters(
        optimizer=plan.optimizer,
        learning_rate=plan.learning_rate_at(version),
        momentum=plan.momentum,
        nesterov=plan.nesterov,
        weight_decay=plan.weight_decay,
        beta1=plan.adam_beta1,
        beta2=plan.adam_beta2,
        epsilon=plan.adam_epsilon,
        max_grad_norm=plan.max_grad_norm,
    )


class LocalTraining:
    """The steps of ``plan`` on a session that nobody else uses meanwhile, from ``theta``, float32 (d,).

    seed: 32 bytes (``batch_seed``). Each pass over the data is shuffled anew from it, every sample once; the
        dropout masks of a step follow from it and the step's number.
    version: how many models were made before, for the plan's schedule.
    resume: what ``checkpoint`` gave in a training with the same other arguments; ``theta`` is not looked at then.
    should_stop: asked before each step and before the result; True ends the training with None.
    With one thread the same arguments give the same bytes, stopped and resumed or not.
    Raises CheckpointError if ``resume`` is of other data, another plan or model; TensorError; BackendError.
    """

    def __init__(
        self,
        session: TrainingSession,
        dataset: Dataset,
        plan: Plan,
        theta: Vector,
        *,
        seed: bytes,
        version: int,
        resume: Checkpoint | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.total = total_steps(plan, dataset.samples)
        self._session, self._dataset, self._should_stop = session, dataset, should_stop
        self._hyper = hyperparameters(plan, version)
        self._batch_size = min(plan.batch_size, dataset.samples)
        self._seed = seed
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None  # of the pass that it was made for
        self._made, self._losses = 0, PassLosses()
        if resume is None:
            session.start(theta)
        else:
            self._go_on_from(resume)

    def steps(self) -> Generator[Step, None, TrainingResult | None]:
        """Makes the steps that are left, yields each, returns the result. Once only.

        Raises TrainingDiverged, and what the backend raises.
        """
        while self._made < self.total:
            if self._should_stop():
                return None
            yield self._step()
        if self._should_stop():
            return None
        theta = self._session.theta()
        if not np.isfinite(theta).all():
            raise _diverged("a parameter is not finite", self.total, self.total)
        losses = self._losses
        return TrainingResult(theta, self._dataset.samples, self.total, losses.first, losses.last)

    def run(self) -> TrainingResult:
        """All ``steps`` at once, for a training that nothing stops."""
        steps = self.steps()
        while True:
            try:
                next(steps)
            except StopIteration as end:
                if end.value is None:
                    raise LocalProtocolError(
                        "a training that may be stopped is driven by its steps"
                    ) from None
                result: TrainingResult = end.value
                return result

    def checkpoint(self) -> Checkpoint:
        """Where the training stands, between two steps."""
        return Checkpoint(
            step=self._made,
            samples=self._dataset.samples,
            losses=self._losses,
            state=self._session.state(),
        )

    def _go_on_from(self, checkpoint: Checkpoint) -> None:
        optimizer = OPTIMIZERS[self._hyper.optimizer]
        if (
            checkpoint.samples != self._dataset.samples
            or not 0 <= checkpoint.step <= self.total
            or checkpoint.state.optimizer not in ("", optimizer)
        ):
            raise CheckpointError(
                f"the checkpoint is of step {checkpoint.step} on {checkpoint.samples} samples with "
                f"{checkpoint.state.optimizer!r}; the training makes {self.total} steps on {self._dataset.samples} "
                f"with {optimizer!r}"
            )
        try:
            self._session.resume(checkpoint.state)
        except TensorError as error:
            raise CheckpointError(f"the checkpoint is of another model: {error}") from error
        self._made, self._losses = checkpoint.step, checkpoint.losses

    def _step(self) -> Step:
        number, rows = self._batch(self._made)
        # Fancy indexing copies: the batch is C-contiguous, as backends require.
        loss, grad_norm = self._session.step(
            tuple(array[rows] for array in self._dataset.inputs),
            self._dataset.target[rows],
            self._hyper,
            dropout_seed=_dropout_seed(self._seed, self._made),
        )
        self._made += 1
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise _diverged(f"loss {loss:g}, gradient norm {grad_norm:g}", self._made, self.total)
        self._losses = self._losses.after(number, loss, len(rows))
        return Step(self._made, self.total, loss, grad_norm)

    def _batch(self, index: int) -> tuple[int, npt.NDArray[np.int64]]:
        """The pass and the rows of a step, from 0; a pass holds each row once, its last batch may be smaller."""
        samples = self._dataset.samples
        number, batch = divmod(index, math.ceil(samples / self._batch_size))
        if self._order is None or self._order[0] != number:
            order = Stream(derive_seed(self._seed, "epoch", number)).permutation(samples)
            self._order = number, order
        start = batch * self._batch_size
        return number, self._order[1][start : start + self._batch_size]


def delta(theta: Vector, base: Vector) -> Vector:
    """``theta`` - ``base`` as a new float32 vector of shape (d,). Raises TrainingDiverged if not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        difference: Vector = np.subtract(theta, base, dtype=np.float32)
    if not np.isfinite(difference).all():
        raise TrainingDiverged("the update is not finite: lower the learning rate, or check the local data")
    return difference


def _dropout_seed(seed: bytes, step: int) -> int:
    """0 to 2^63 - 1."""
    return int.from_bytes(derive_seed(seed, "dropout", step)[:8], "little") >> 1


def _diverged(what: str, index: int, total: int) -> TrainingDiverged:
    return TrainingDiverged(
        f"training diverged at step {index} of {total} ({what}): lower the learning rate or "
        "max_grad_norm of the plan, or check the local data"
    )
