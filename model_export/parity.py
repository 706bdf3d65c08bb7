"""The exported graphs against torch: float32 in the runtime, float64 in torch, at two batch sizes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edge_runtime.backends.base import TrainingSession
from edge_runtime.backends.ort import OrtBackend
from edge_runtime.protocol.artifact import Artifact
from edge_runtime.protocol.tensors import unflatten
from model_export.errors import ParityError
from model_export.model import Model, as_outputs

TOLERANCE = 1e-4  # float32 against float64; the rules that are right stay below 1e-5
LEARNING_RATE, MOMENTUM = 0.05, 0.9

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Check:
    """One comparison. ``error``: largest difference over the largest absolute value that torch has there."""

    what: str
    batch: int
    error: float

    @property
    def passed(self) -> bool:
        """NaN does not pass."""
        return self.error <= TOLERANCE


@dataclass(frozen=True)
class _Reference:
    loss: float
    outputs: list[Float64]
    gradients: dict[str, Float64]


def batch_sizes(model: Model) -> tuple[int, int]:
    """The example's batch size, and one that no constant in the graph could fit by chance."""
    example = model.target.shape[0]
    return example, 1 if example > 1 else 7


def check_parity(model: Model, artifact: Artifact) -> list[Check]:
    """Loss, outputs and every gradient at both batch sizes; two clipped steps of SGD.

    Raises ParityError naming everything that differs.
    """
    session = OrtBackend().load(artifact)
    checks: list[Check] = []
    for size in batch_sizes(model):
        checks += _check_gradients(model, artifact, session, size)
    checks += _check_steps(model, session)
    if failed := [check for check in checks if not check.passed]:
        lines = "; ".join(
            f"{check.what} at batch {check.batch}: relative error {check.error:.1e}" for check in failed[:8]
        )
        raise ParityError(
            f"the exported model differs from torch in {len(failed)} of {len(checks)} checks (tolerance "
            f"{TOLERANCE:g}), nothing was written: {lines}. If the model draws random numbers in forward(), "
            "or branches on values, take that out; otherwise please report it with the model."
        )
    return checks


def _check_gradients(model: Model, artifact: Artifact, session: TrainingSession, size: int) -> list[Check]:
    inputs, target = _arrays(model, size)
    reference = _reference(model, size)
    session.start(model.theta())
    loss = session.accumulate(inputs, target, scale=1.0)
    checks = [Check("loss", size, _error(loss, reference.loss))]
    largest = max(float(np.abs(value).max()) for value in reference.gradients.values())
    for name, value in unflatten(model.specs, session.gradient()).items():
        # a gradient that is zero up to rounding is measured against the others
        checks.append(
            Check(f"gradient {name}", size, _error(value, reference.gradients[name], 1e-3 * largest))
        )
    evaluation = session.evaluate(model.theta(), inputs, target)
    inferred = session.infer(model.theta(), inputs)
    checks.append(Check("evaluation loss", size, _error(evaluation.loss, reference.loss)))
    for i, spec in enumerate(artifact.manifest.outputs):
        checks.append(
            Check(f"evaluation {spec.name}", size, _error(evaluation.outputs[i], reference.outputs[i]))
        )
        checks.append(Check(f"inference {spec.name}", size, _error(inferred[i], reference.outputs[i])))
    return checks


def _check_steps(model: Model, session: TrainingSession) -> list[Check]:
    """Two steps, clipped to half the gradient's norm, fused and through the accumulator, against torch.optim."""
    size = batch_sizes(model)[0]
    inputs, target = _arrays(model, size)
    module, doubles, target64 = _double(model, size)
    optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    norms: list[float] = []
    max_norm = 0.0
    for _ in range(2):
        optimizer.zero_grad()
        model.loss.reference(module(*doubles), target64).backward()  # type: ignore[no-untyped-call]
        if not norms:
            squares = [
                float((value.grad**2).sum()) for value in module.parameters() if value.grad is not None
            ]
            max_norm = 0.5 * float(np.sqrt(sum(squares)))
        norms.append(float(torch.nn.utils.clip_grad_norm_(module.parameters(), max_norm)))
        optimizer.step()
    expected = {name: value.detach().numpy() for name, value in module.named_parameters()}

    checks = []
    for way in ("fused", "accumulated"):
        session.start(model.theta())
        for norm in norms:
            if way == "fused":
                measured = session.step(
                    inputs, target, learning_rate=LEARNING_RATE, momentum=MOMENTUM, max_grad_norm=max_norm
                ).grad_norm
            else:
                session.accumulate(inputs, target, scale=1.0)
                measured = session.apply(
                    learning_rate=LEARNING_RATE, momentum=MOMENTUM, max_grad_norm=max_norm
                )
            checks.append(Check(f"gradient norm ({way} step)", size, _error(measured, norm)))
        moved = unflatten(model.specs, session.theta())
        worst = max(_error(moved[name], value) for name, value in expected.items())
        checks.append(Check(f"parameters after 2 {way} steps", size, worst))
    return checks


def _reference(model: Model, size: int) -> _Reference:
    module, inputs, target = _double(model, size)
    returned = module(*inputs)
    loss = model.loss.reference(returned, target)
    loss.backward()  # type: ignore[no-untyped-call]
    return _Reference(
        float(loss.detach()),
        [output.detach().numpy() for output in as_outputs(returned)],
        {
            name: np.zeros(value.shape) if value.grad is None else value.grad.numpy()
            for name, value in module.named_parameters()
        },
    )


def _double(model: Model, size: int) -> tuple[torch.nn.Module, list[torch.Tensor], torch.Tensor]:
    inputs, target = model.batch(size)
    *inputs64, target64 = (
        value.double() if value.is_floating_point() else value for value in (*inputs, target)
    )
    return copy.deepcopy(model.module).double(), inputs64, target64


def _arrays(model: Model, size: int) -> tuple[Sequence[npt.NDArray[Any]], npt.NDArray[Any]]:
    inputs, target = model.batch(size)
    return [value.numpy() for value in inputs], target.numpy()


def _error(measured: object, expected: object, floor: float = 0.0) -> float:
    """Largest difference relative to the largest expected value; infinite where shapes differ."""
    ours, theirs = np.asarray(measured, np.float64), np.asarray(expected, np.float64)
    if ours.shape != theirs.shape:
        return float("inf")
    scale = max(float(np.abs(theirs).max(initial=0.0)), floor, 1e-12)
    return float(np.abs(ours - theirs).max(initial=0.0)) / scale
