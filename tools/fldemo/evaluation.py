"""The score on the held-out samples: of parameters, and of the files that users take home."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edge_runtime.backends.ort import OrtBackend, run_model
from edge_runtime.protocol.artifact import Artifact
from edge_runtime.protocol.errors import Fault, FleetgradError
from edge_runtime.protocol.tensors import Vector, flatten
from fldemo.data import Samples
from fldemo.examples import Metric, Outputs


class EvaluationError(FleetgradError, fault=Fault.BUG, remedy="report it, with the work folder of the demo"):
    """A model file that does not give the outputs of its manifest for each sample."""


class Evaluator:
    """Scores theta or published files on the held-out samples."""

    def __init__(self, artifact: Artifact, held_out: Samples, metric: Metric) -> None:
        self._artifact = artifact
        self._held_out = held_out
        self._metric = metric
        self._session = OrtBackend().load(artifact)

    def of_theta(self, theta: Vector) -> float:
        """Through the inference graph of the artifact."""
        (outputs,) = self._session.infer(theta, (self._held_out.x,))
        return self.of_outputs(outputs)

    def of_npz(self, path: Path) -> float:
        """Of ``model.npz``: parameters by name. Raises TensorError if names or shapes differ."""
        with np.load(path, allow_pickle=False) as arrays:
            theta = flatten(self._artifact.manifest.parameters, {name: arrays[name] for name in arrays.files})
        return self.of_theta(theta)

    def of_outputs(self, outputs: Outputs) -> float:
        """Of what ``outputs`` gave."""
        return self._metric.score(outputs, self._held_out.labels)

    def outputs(self, path: Path) -> Outputs:
        """Logits by stock onnxruntime from ``model.onnx`` alone, a row for each held-out sample.

        Raises EvaluationError; BackendError for a file that the runtime refuses.
        """
        logits, *others = run_model(path.read_bytes(), (self._held_out.x,))
        wanted = (len(self._held_out.y), *self._artifact.manifest.outputs[0].shape)
        if others or logits.shape != wanted:
            found = ", ".join(str(output.shape) for output in (logits, *others))
            raise EvaluationError(f"{path} gives {found}, not {wanted}")
        return logits

    def recall(self, outputs: Outputs, classes: int) -> tuple[float, ...]:
        """Share of each class's rows that were recognised."""
        predicted, labels = self._metric.classes(outputs), self._held_out.labels
        return tuple(float((predicted[labels == label] == label).mean()) for label in range(classes))
