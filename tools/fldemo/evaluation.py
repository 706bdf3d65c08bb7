"""Accuracy on the held-out digits: of parameters, and of the files that users take home."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_runtime.backends.ort import OrtBackend, run_model
from edge_runtime.protocol.artifact import Artifact
from edge_runtime.protocol.errors import Fault, FleetgradError
from edge_runtime.protocol.tensors import Vector, flatten
from fldemo.data import CLASSES, Samples

Predictions = npt.NDArray[np.int64]


class EvaluationError(FleetgradError, fault=Fault.BUG, remedy="report it, with the work folder of the demo"):
    """A model file that does not give one logit per class for each image."""


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

    def predictions(self, path: Path) -> Predictions:
        """Classes, shape (held out,), by stock onnxruntime from ``model.onnx`` alone.

        Raises EvaluationError; BackendError for a file that the runtime refuses.
        """
        logits, *others = run_model(path.read_bytes(), (self._held_out.x,))
        if others or logits.shape != (len(self._held_out.y), CLASSES):
            found = ", ".join(str(output.shape) for output in (logits, *others))
            raise EvaluationError(f"{path} gives {found}, not ({len(self._held_out.y)}, {CLASSES})")
        classes: Predictions = logits.argmax(axis=1)
        return classes


def accuracy(logits: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> float:
    """Share of rows whose largest logit, shape (n, classes), is that of the label."""
    return float((logits.argmax(axis=1) == labels).mean())


def accuracy_per_class(predictions: Predictions, labels: Predictions) -> tuple[float, ...]:
    """Share of each class's rows that were recognised."""
    return tuple(float((predictions[labels == label] == label).mean()) for label in range(CLASSES))
