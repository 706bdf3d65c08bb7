"""The exported graphs against torch: float32 in the runtime, float64 in torch, at three batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edge_runtime.backends.base import BackendError, Hyperparameters, TrainingSession
from edge_runtime.backends.ort import OrtBackend
from edge_runtime.protocol.artifact import Artifact
from edge_runtime.protocol.tensors import unflatten
from model_export.errors import ParityError, UnsupportedModel
from model_export.model import BATCH_NORM, Model
from model_export.reference import (
    DROPOUT_SEED,
    Float64,
    NoDoubleReference,
    reference_inference,
    reference_steps,
    reference_values,
)
from model_export.report import Check

TOLERANCE = 1e-4  # float32 against float64; the rules that are right stay below 1e-5
FLOAT32_TOLERANCE = 1e-3  # where torch computes in float32 as well
LARGE_BATCH = 61  # a prime that no shape in a graph equals by chance
# Epsilon and clipping are put in by the size of the gradient: with Adam's usual 1e-8 a gradient that is zero but
# for rounding (a bias before a normalisation) would step as far as any.
STEPS: Mapping[str, Hyperparameters] = {
    "SGD": Hyperparameters(learning_rate=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": Hyperparameters(optimizer="adam", learning_rate=0.01, weight_decay=0.01),
    "AdamW": Hyperparameters(optimizer="adamw", learning_rate=0.01, weight_decay=0.05),
}

_HINTS = (
    "torch's exporter leaves out label smoothing (write it out) and torch.no_grad() (use detach()); random numbers "
    "in forward() and branches on values cannot be exported. Otherwise please report it with the model"
)


def batch_sizes(model: Model) -> tuple[int, ...]:
    """The example's batch size, the smallest that torch trains with (7 if that is the example's), and LARGE_BATCH.

    The smallest is 1; 2 with BatchNorm, which has to see two values in a channel.
    """
    example = model.target.shape[0]
    smallest = 2 if _batch_norms(model) else 1
    return tuple(dict.fromkeys((example, smallest if example > smallest else 7, LARGE_BATCH)))


def check_parity(model: Model, artifact: Artifact) -> list[Check]:
    """The checks of ``compare``, all passed.

    Raises ParityError naming everything that differs, and as ``compare`` does.
    """
    checks = compare(model, artifact)
    failed = [check for check in checks if not check.passed]
    if not failed:
        return checks
    if all(check.what.startswith(("inference ", "evaluation ")) for check in failed):
        raise UnsupportedModel(
            f"the module computes something else in eval(): {failed[0].what.partition(' ')[2]} differs by "
            f"{failed[0].error:.1e} of its size. But for BatchNorm and dropout the exported model is one function "
            "for training and inference: do not use self.training in forward()"
        )
    lines = "; ".join(
        f"{check.what} at batch {check.batch}: relative error {check.error:.1e}" for check in failed[:8]
    )
    raise ParityError(
        f"the exported model differs from torch in {len(failed)} of {len(checks)} checks (tolerance "
        f"{failed[0].tolerance:g}), nothing was written: {lines}. {_HINTS}."
    )


def compare(model: Model, artifact: Artifact) -> list[Check]:
    """Loss, every gradient and running statistic, and eval(), at every batch size; two clipped steps of STEPS.

    At the model's parameters as they are. The reference is float64; float32 with FLOAT32_TOLERANCE for a model that
    cannot compute in float64. Raises UnsupportedModel if eval() computes something else, ExportError if the model
    does not run in torch at one of the sizes, ParityError if the graphs do not run there.
    """
    try:
        return _checks(model, artifact, torch.float64)
    except NoDoubleReference:
        return _checks(model, artifact, torch.float32)


def _checks(model: Model, artifact: Artifact, dtype: torch.dtype) -> list[Check]:
    session = OrtBackend().load(artifact)
    checks: list[Check] = []
    max_norm = 0.0
    sizes = batch_sizes(model)
    for size in sizes:
        expected = reference_values(model, size, dtype)
        max_norm = max_norm or 0.5 * _norm(expected)
        with _runs(size):
            measured = _measured_values(model, session, size)
        again = partial(reference_values, model, size, torch.float32)
        checks += _compare(size, measured, expected, dtype, again)
    one = (1,) if all(norm.running_mean is not None for norm in _batch_norms(model)) else ()
    for size in dict.fromkeys((*sizes, *one)):
        expected = reference_inference(model, size, dtype)
        with _runs(size):
            measured = _measured_inference(model, session, size)
        again = partial(reference_inference, model, size, torch.float32)
        checks += _compare(size, measured, expected, dtype, again)
    for name, step in STEPS.items():
        rms = max_norm / artifact.manifest.trainable_count**0.5
        checks += _step_checks(
            model, session, name, replace(step, max_grad_norm=max_norm, epsilon=rms), dtype
        )
    return checks


def _step_checks(
    model: Model, session: TrainingSession, name: str, hyper: Hyperparameters, dtype: torch.dtype
) -> list[Check]:
    """The worst of each kind, for the fused graph and for accumulating and applying."""
    size = batch_sizes(model)[0]
    expected = reference_steps(model, size, hyper, dtype)
    checks = []
    for way in ("fused", "accumulated"):
        with _runs(size):
            measured = _measured_steps(model, session, size, hyper, way)
        again = partial(reference_steps, model, size, hyper, torch.float32)
        compared = _compare(size, measured, expected, dtype, again)
        kinds = {
            "norm": f"gradient norm ({name}, {way} step)",
            "parameter": f"parameters after 2 {way} steps of {name}",
            "buffer": f"running statistics after 2 {way} steps of {name}",
        }
        for kind, what in kinds.items():
            if of_kind := [check for check in compared if check.what.startswith(kind)]:
                worst = max(of_kind, key=lambda c: np.nan_to_num(c.error / c.tolerance, nan=np.inf))
                checks.append(replace(worst, what=what))
    return checks


def _compare(
    size: int,
    measured: Mapping[str, object],
    expected: Mapping[str, Float64],
    dtype: torch.dtype,
    float32: Callable[[], Mapping[str, Float64]],
) -> list[Check]:
    """A check for each value, relative to the largest value of its tensor.

    A tensor that is zero but for rounding (a bias before a normalisation) has no scale of its own: what float32
    costs torch itself is allowed ten times, while that is within the tolerance of the largest tensor of its kind.
    """
    base = TOLERANCE if dtype is torch.float64 else FLOAT32_TOLERANCE
    largest: dict[str, float] = {}
    for what, value in expected.items():
        largest[_kind(what)] = max(largest.get(_kind(what), 0.0), float(np.abs(value).max(initial=0.0)))
    rounding: Mapping[str, Float64] | None = None
    checks = []
    for what, value in expected.items():
        floor = 1e-3 * largest[_kind(what)] if what.startswith("gradient ") else 0.0
        scale = max(float(np.abs(value).max(initial=0.0)), floor, 1e-12)
        error = _difference(measured[what], value) / scale
        tolerance = base
        if not error <= base and dtype is torch.float64:
            rounding = rounding if rounding is not None else float32()
            allowed = min(10 * _difference(rounding[what], value), base * largest[_kind(what)]) / scale
            tolerance = max(base, allowed)
        checks.append(Check(what, size, error, tolerance, str(dtype).removeprefix("torch.")))
    return checks


def _kind(what: str) -> str:
    """The gradients are of one kind, so are the parameters and the buffers; every other value is its own."""
    word = what.partition(" ")[0]
    return word if word in ("gradient", "parameter", "buffer") else what


def _measured_values(model: Model, session: TrainingSession, size: int) -> dict[str, object]:
    inputs, target = _arrays(model, size)
    theta = model.theta()
    session.start(theta)
    values: dict[str, object] = {
        "loss": session.accumulate(inputs, target, scale=1.0, dropout_seed=DROPOUT_SEED)
    }
    before = unflatten(model.specs, theta)
    for name, value in unflatten(model.specs, session.gradient()).items():
        if name in model.buffers:
            values[f"buffer {name}"] = before[name] + value
        else:
            values[f"gradient {name}"] = value
    return values


def _measured_inference(model: Model, session: TrainingSession, size: int) -> dict[str, object]:
    inputs, target = _arrays(model, size)
    evaluation = session.evaluate(model.theta(), inputs, target)
    inferred = session.infer(model.theta(), inputs)
    values: dict[str, object] = {"evaluation loss": evaluation.loss}
    for i, spec in enumerate(model.output_specs):
        values[f"evaluation {spec.name}"] = evaluation.outputs[i]
        values[f"inference {spec.name}"] = inferred[i]
    return values


def _measured_steps(
    model: Model, session: TrainingSession, size: int, hyper: Hyperparameters, way: str
) -> dict[str, object]:
    """Two steps, through the fused graph or through the accumulator."""
    inputs, target = _arrays(model, size)
    session.start(model.theta())
    values: dict[str, object] = {}
    for step in (1, 2):
        seed = DROPOUT_SEED + step
        if way == "fused":
            values[f"norm {step}"] = session.step(inputs, target, hyper, dropout_seed=seed).grad_norm
        else:
            session.accumulate(inputs, target, scale=1.0, dropout_seed=seed)
            values[f"norm {step}"] = session.apply(hyper)
    for name, value in unflatten(model.specs, session.theta()).items():
        values[f"{'buffer' if name in model.buffers else 'parameter'} {name}"] = value
    return values


class _runs:  # noqa: N801 - reads as the sentence it is
    """Turns the runtime's failure into a ParityError: the graph does not fit this batch size."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, BackendError):
            raise ParityError(
                f"the exported graphs do not run at batch {self._size}, nothing was written: {error}. "
                "Sizes that forward() computes must come from x.shape, not from the example"
            ) from error


def _batch_norms(model: Model) -> list[torch.nn.modules.batchnorm._BatchNorm]:
    return [child for child in model.module.modules() if isinstance(child, BATCH_NORM)]


def _arrays(model: Model, size: int) -> tuple[Sequence[npt.NDArray[Any]], npt.NDArray[Any]]:
    inputs, target = model.batch(size)
    return [value.detach().numpy() for value in inputs], target.detach().numpy()


def _norm(values: Mapping[str, Float64]) -> float:
    return float(
        np.sqrt(sum(float((value**2).sum()) for what, value in values.items() if _kind(what) == "gradient"))
    )


def _difference(measured: object, expected: Float64) -> float:
    """The largest absolute difference; infinite where shapes differ."""
    ours = np.asarray(measured, np.float64)
    if ours.shape != expected.shape:
        return float("inf")
    return float(np.abs(ours - expected).max(initial=0.0))
