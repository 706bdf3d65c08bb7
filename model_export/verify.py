"""What can be proved of an artifact without its model and without torch: its graphs against one another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_runtime.backends.artifact_folder import initial_parameters
from edge_runtime.backends.base import BackendError, Hyperparameters, TrainingSession
from edge_runtime.backends.ort import OrtBackend
from edge_runtime.protocol.artifact import Artifact, ValueSpec
from edge_runtime.protocol.tensors import TensorSpec, Vector
from model_export.report import Check

BATCH = 8
SEED = 1
SAME = 1e-5  # two ways to compute the same in float32
DIFFERENCES = 5e-2  # central differences of a float32 loss give one to two digits; kinks cost some
_CHANGES = (1e-2, 3e-3, 1e-3, 3e-4)  # of the loss: small enough to be smooth, large enough to be seen
_STEPS = {
    "SGD": Hyperparameters(
        learning_rate=0.01, momentum=0.9, nesterov=True, weight_decay=0.01, max_grad_norm=1.0
    ),
    "Adam": Hyperparameters(optimizer="adam", learning_rate=0.01, weight_decay=0.01, max_grad_norm=1.0),
    "AdamW": Hyperparameters(optimizer="adamw", learning_rate=0.01, weight_decay=0.05, max_grad_norm=1.0),
}

Array = npt.NDArray[Any]


class Unchecked(Exception):
    """The model cannot be computed with random data: what was asked of it needs the real ones."""


def verify(artifact: Artifact) -> Iterator[Check]:
    """Each comparison as it is made, at the artifact's own parameters and a random batch of BATCH samples.

    A step equals accumulating and applying; the gradient of each tensor equals central differences of the loss,
    along itself; eval and infer agree; dropout repeats with its seed. Raises Unchecked, BackendError.
    """
    session = OrtBackend().load(artifact)
    theta = initial_parameters(artifact)
    inputs, target = _batch(artifact, session, theta)
    evaluation = session.evaluate(theta, inputs, target)
    for spec, a, b in zip(
        artifact.manifest.outputs, evaluation.outputs, session.infer(theta, inputs), strict=True
    ):
        yield _same(f"{spec.name} of eval and infer", a, b)
    for name, hyper in _STEPS.items():
        yield _same(
            f"two steps of {name}, fused and accumulated",
            *(_steps(session, theta, inputs, target, hyper, fused) for fused in (True, False)),
        )
    yield from _gradients(artifact, session, theta, inputs, target)
    if artifact.manifest.dropout:
        first, again, *others = (
            _loss(session, theta, inputs, target, seed)[0]
            for seed in (SEED, SEED, *range(SEED + 1, SEED + 9))
        )
        yield _same("loss with the same dropout seed", np.array(first), np.array(again))
        alike = float(all(other == first for other in others))
        yield Check("loss with another dropout seed is another", BATCH, alike, 0.0, "itself")


def _steps(
    session: TrainingSession,
    theta: Vector,
    inputs: Sequence[Array],
    target: Array,
    hyper: Hyperparameters,
    fused: bool,
) -> Vector:
    session.start(theta)
    # Adam's usual epsilon would turn rounding of a gradient that is zero into steps
    hyper = replace(hyper, epsilon=1e-3)
    for seed in (SEED, SEED + 1):
        if fused:
            session.step(inputs, target, hyper, dropout_seed=seed)
        else:
            session.accumulate(inputs, target, scale=1.0, dropout_seed=seed)
            session.apply(hyper)
    return session.theta()


def _gradients(
    artifact: Artifact, session: TrainingSession, theta: Vector, inputs: Sequence[Array], target: Array
) -> Iterator[Check]:
    loss, gradient = _loss(session, theta, inputs, target, SEED)
    trained = artifact.manifest.parameters[: len(artifact.manifest.parameters) - artifact.manifest.buffers]
    norms = {spec.name: float(np.linalg.norm(_piece(gradient, spec))) for spec in trained}
    for spec in trained:
        norm = norms[spec.name]
        if norm <= 1e-4 * max(norms.values()):
            continue  # zero but for rounding: there is no direction to go
        direction = np.zeros_like(theta)
        _piece(direction, spec)[:] = _piece(gradient, spec) / norm
        errors = []
        for change in _CHANGES:
            h = np.float32(change * max(abs(loss), 1e-3) / (2 * norm))
            ahead, behind = theta + h * direction, theta - h * direction
            moved = float(np.linalg.norm(ahead.astype(np.float64) - behind))
            difference = (
                _loss(session, ahead, inputs, target, SEED)[0]
                - _loss(session, behind, inputs, target, SEED)[0]
            )
            errors.append(abs(difference / moved - norm) / norm if moved else np.inf)
        yield Check(f"gradient {spec.name}", BATCH, float(min(errors)), DIFFERENCES, "central differences")


def _piece(vector: Vector, spec: TensorSpec) -> Vector:
    return vector[spec.offset : spec.offset + spec.size]


def _loss(
    session: TrainingSession, theta: Vector, inputs: Sequence[Array], target: Array, seed: int
) -> tuple[float, Vector]:
    session.start(theta)
    return session.accumulate(inputs, target, scale=1.0, dropout_seed=seed), session.gradient()


def _same(what: str, a: Array, b: Array) -> Check:
    scale = max(float(np.abs(b).max(initial=0.0)), 1e-12)
    return Check(
        what, BATCH, float(np.abs(np.subtract(a, b, dtype=np.float64)).max()) / scale, SAME, "itself"
    )


def _batch(
    artifact: Artifact, session: TrainingSession, theta: Vector
) -> tuple[list[Array], npt.NDArray[Any]]:
    """Random data that the model can compute: integers, which may be indices, are 0 or 1, or all 0."""
    manifest = artifact.manifest
    for highest in (1, 0):
        random = np.random.default_rng(SEED)
        inputs = [_random(random, spec, highest) for spec in manifest.inputs]
        target = _random(random, manifest.target, (manifest.target.classes or highest + 1) - 1)
        if manifest.loss == "bce_with_logits":
            target = (target > 0).astype(target.dtype)
        try:
            loss, gradient = _loss(session, theta, inputs, target, SEED)
        except BackendError:
            if not highest:
                raise
            continue
        if np.isfinite(loss) and np.isfinite(gradient).all():
            return inputs, target
    raise Unchecked("loss or gradient is not finite on random data")


def _random(random: np.random.Generator, spec: ValueSpec, highest: int) -> Array:
    shape, dtype = (BATCH, *spec.shape), np.dtype(spec.dtype)
    if dtype.kind == "f":
        return random.standard_normal(shape, dtype=np.float32)
    if dtype == np.uint8:
        highest = 255 if highest else 0
    return random.integers(0, highest, shape, endpoint=True).astype(dtype)
