"""What the federation is compared with: the same network and steps on pooled data, and each device on its own.

Both run in this process through the trainer and the backend that the devices use; no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime

from edge_runtime.backends.artifact_folder import initial_parameters
from edge_runtime.backends.ort import OrtBackend
from edge_runtime.data import Dataset, fit_dataset
from edge_runtime.protocol.artifact import Artifact
from edge_runtime.protocol.errors import FleetgradError
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.tensors import Vector, flatten
from edge_runtime.training.trainer import train
from fldemo.data import CLASSES, Samples


class EvaluationError(FleetgradError):
    """A model file that does not give one logit per class for each image."""


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """Accuracies in [0, 1] on the held-out samples after ``passes`` over the data; ``local``: one per device."""

    central: float
    local: tuple[float, ...]
    passes: int

    @property
    def local_mean(self) -> float:
        return float(np.mean(self.local))


class Evaluator:
    """Accuracy on the held-out samples of theta or of published files."""

    def __init__(self, artifact: Artifact, held_out: Samples) -> None:
        self._artifact = artifact
        self._held_out = held_out
        self._session = OrtBackend().load(artifact)

    def of_theta(self, theta: Vector) -> float:
        """Through the inference graph of the artifact."""
        (logits,) = self._session.infer(theta, (self._held_out.x,))
        return accuracy(logits, self._held_out.y)

    def of_npz(self, path: Path) -> float:
        """Of ``model.npz``: parameters by name. Raises TensorError if names or shapes differ."""
        with np.load(path, allow_pickle=False) as arrays:
            theta = flatten(self._artifact.manifest.parameters, {name: arrays[name] for name in arrays.files})
        return self.of_theta(theta)

    def predictions(self, path: Path) -> npt.NDArray[np.int64]:
        """Classes, shape (held out,), that stock onnxruntime gives with ``model.onnx`` alone. Raises EvaluationError."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        inputs = session.get_inputs()
        if len(inputs) != 1:
            raise EvaluationError(f"{path} takes {len(inputs)} inputs: it must take the images only")
        logits = np.asarray(session.run(None, {inputs[0].name: self._held_out.x})[0])
        if logits.shape != (len(self._held_out.y), CLASSES):
            raise EvaluationError(f"{path} gives shape {logits.shape}, not ({len(self._held_out.y)}, {CLASSES})")
        return logits.argmax(axis=1)


def accuracy(logits: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> float:
    """Share of rows whose largest logit, shape (n, classes), is that of the label."""
    return float((logits.argmax(axis=1) == labels).mean())


def accuracy_per_class(
    predictions: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]
) -> tuple[float, ...]:
    """Share of each class's rows that were recognised."""
    return tuple(float((predictions[labels == label] == label).mean()) for label in range(CLASSES))


def train_baselines(
    artifact: Artifact,
    plan: Plan,
    *,
    pooled: Samples,
    devices: Sequence[Samples],
    evaluator: Evaluator,
    passes: int,
    seed: int,
) -> Baselines:
    """Central and local-only training from the artifact's parameters with the plan's rates.

    ``passes`` over the data each: as many as the accepted updates made over the pooled data in all.
    """
    alone = dataclasses.replace(plan, epochs=passes, steps=0)
    session = OrtBackend().load(artifact)
    start = initial_parameters(artifact)

    def trained(samples: Samples, name: str) -> float:
        dataset: Dataset = fit_dataset((samples.x,), samples.y, artifact.manifest)
        steps = train(session, dataset, alone, start, seed=seed_bytes(seed, name))
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return evaluator.of_theta(end.value.theta)

    return Baselines(
        central=trained(pooled, "central"),
        local=tuple(trained(samples, f"local-{i}") for i, samples in enumerate(devices)),
        passes=passes,
    )


def seed_bytes(seed: int, name: str) -> bytes:
    """32 bytes for one purpose of the demo, so that a run can be repeated. Never do this outside a demo."""
    return hashlib.sha256(f"fldemo/{seed}/{name}".encode()).digest()
