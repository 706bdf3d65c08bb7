"""Versions on held-out data, in a thread of their own: rounds and receipts never wait for a figure."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from aggregator.config import EvaluationConfig
from aggregator.ledger.values import Evaluated
from edge_runtime.backends.base import Backend
from edge_runtime.backends.ort import OrtBackend
from edge_runtime.data import Array, DataError, Dataset, NpzFile, load_dataset
from edge_runtime.protocol.artifact import Artifact
from edge_runtime.protocol.errors import Fault, FleetgradError
from edge_runtime.protocol.ids import Digest
from edge_runtime.protocol.tensors import Vector

BATCH = 256  # samples at a time: bounds the memory of the activations
ReadParameters = Callable[[int, Digest], Vector]
"""(version, digest) -> float32 of shape (d,)."""


class EvaluationError(
    FleetgradError, fault=Fault.OPERATOR, remedy="correct [evaluation], or take its `data` out to go without"
):
    """The held-out data cannot be read or do not fit the model."""


class EvaluationFailed(NamedTuple):
    """No figures for this version."""

    version: int
    reason: str


class Evaluator:
    """Loads the data at once and starts one thread; ``close`` ends it after the batch it is at.

    Raises EvaluationError.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        artifact: Artifact,
        read_parameters: ReadParameters,
        backend: Backend | None = None,
    ) -> None:
        if config.data is None:
            raise EvaluationError("[evaluation] names no data")
        source = NpzFile(config.data, config.inputs, config.target)
        try:
            self._data = load_dataset(source, artifact.manifest)
        except DataError as error:
            raise EvaluationError(f"evaluation.data: {error}") from error
        self._every = config.every
        self._threads = config.threads
        self._artifact = artifact
        self._read_parameters = read_parameters
        self._backend = backend or OrtBackend()
        self._asked: queue.SimpleQueue[tuple[int, Digest] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Evaluated | EvaluationFailed] = queue.SimpleQueue()
        self._open: set[int] = set()  # asked for and not collected; of the caller's thread alone
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="evaluation", daemon=True)
        self._thread.start()

    def wants(self, version: int) -> bool:
        """Every ``every``-th version, and version 0."""
        return version % self._every == 0

    def submit(self, version: int, digest: Digest) -> None:
        """Evaluate it when its turn comes. Its parameters are read then: versions that wait take no memory."""
        if version not in self._open:
            self._open.add(version)
            self._asked.put((version, digest))

    def results(self) -> list[Evaluated | EvaluationFailed]:
        """What is ready now."""
        found: list[Evaluated | EvaluationFailed] = []
        while not self._done.empty():
            found.append(self._done.get())
        self._open -= {result.version for result in found}
        return found

    @property
    def busy(self) -> bool:
        """Something was asked for that ``results`` has not given yet."""
        return bool(self._open)

    def close(self) -> None:
        """What waits is given up."""
        self._closing.set()
        self._asked.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (asked := self._asked.get()) is not None and not self._closing.is_set():
            version, digest = asked
            try:
                result = self._evaluate(version, digest)
            # Whatever a runtime or a disk comes up with, the aggregator goes on without this figure.
            except Exception as error:  # noqa: BLE001
                reason = str(error) or type(error).__name__
                self._done.put(EvaluationFailed(version, reason))
            else:
                if result is not None:
                    self._done.put(result)

    def _evaluate(self, version: int, digest: Digest) -> Evaluated | None:
        theta = self._read_parameters(version, digest)
        session = self._backend.load(self._artifact, threads=self._threads)
        data, loss, parts = self._data, 0.0, []
        for start in range(0, data.samples, BATCH):
            if self._closing.is_set():
                return None
            rows = slice(start, start + BATCH)
            target = data.target[rows]
            result = session.evaluate(theta, [array[rows] for array in data.inputs], target)
            loss += result.loss * len(target)
            parts.append(result.outputs[0])
        metrics = {
            "loss": loss / data.samples,
            **figures(self._artifact.manifest.loss, np.concatenate(parts), data),
        }
        return Evaluated(version=version, samples=data.samples, metrics=finite(metrics))


def figures(loss: str, output: Array, data: Dataset) -> dict[str, float]:
    """What people ask of a model with this loss; nothing for a custom one. ``output``: the first, one row a sample.

    cross_entropy: accuracy (the class axis is the second); bce_with_logits: accuracy at logit 0, and AUC where both
    classes occur; mse: rmse and mae. A prediction that is not a number counts as wrong, and makes the others NaN.
    """
    if loss == "cross_entropy":
        right = np.argmax(output, axis=1) == data.target
        sound = np.isfinite(output).all(axis=1)
        return {"accuracy": float(np.mean(right & sound))}
    if loss not in ("bce_with_logits", "mse") or output.size != data.target.size:
        return {}
    scores, target = output.reshape(-1).astype(np.float64), data.target.reshape(-1).astype(np.float64)
    if loss == "mse":
        error = scores - target
        return {"rmse": float(np.sqrt(np.mean(error**2))), "mae": float(np.mean(np.abs(error)))}
    positive = target > 0.5
    found = {"accuracy": float(np.mean(((scores > 0) == positive) & np.isfinite(scores)))}
    if positive.any() and not positive.all():
        found["auc"] = auc(scores, positive)
    return found


def auc(scores: npt.NDArray[np.float64], positive: npt.NDArray[np.bool_]) -> float:
    """Area under the ROC curve: the share of pairs ordered rightly, ties counting half; NaN if a score is NaN.

    ``scores``, ``positive``: shape (n,), both classes occur. Source: Hanley and McNeil 1982, by ranks.
    """
    if np.isnan(scores).any():
        return math.nan
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count - 1) / 2)[place.reshape(-1)]
    n_positive = int(positive.sum())
    n_negative = len(scores) - n_positive
    wins = float(ranks[positive].sum()) - n_positive * (n_positive + 1) / 2
    return wins / (n_positive * n_negative)


def finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """None for NaN and infinity, which a diverged model has."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}
