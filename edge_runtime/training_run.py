"""One training in progress on this device, and the checkpoints from which it goes on after a stop or a crash."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from edge_runtime import session_values as sv
from edge_runtime.backends.base import Backend, TrainingSession
from edge_runtime.config import DataConfig
from edge_runtime.data import Dataset, load_dataset
from edge_runtime.protocol import codecs
from edge_runtime.protocol.artifact import from_bundle
from edge_runtime.protocol.crypto.prg import Stream
from edge_runtime.protocol.ids import Digest, RoundId, sha256
from edge_runtime.protocol.messages import Update
from edge_runtime.protocol.tensors import Vector, vector_to_bytes
from edge_runtime.store import Checkpoints, DamagedFileError, SavedCheckpoint
from edge_runtime.training.checkpoint import Checkpoint, CheckpointError
from edge_runtime.training.trainer import LocalTraining, TrainingResult, delta

FINGERPRINT_ROWS = 64

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """What is kept between rounds: loading it is slow, and it changes only with the artifact or the data."""

    artifact: Digest
    parameter_count: int
    session: TrainingSession
    dataset: Dataset
    data_stamp: object


def load_model(
    digest: Digest, bundle: bytes, data: DataConfig, backend: Backend, threads: int
) -> LoadedModel:
    """The artifact in ``bundle`` with the local samples, which fit it.

    Raises RemoteProtocolError for the bundle; DataError; BackendError.
    """
    stamp = data.origin.stamp()  # before the data: what changes while they are read is read again
    artifact = from_bundle(bundle)
    dataset = load_dataset(data.origin, artifact.manifest, max_bytes=data.max_bytes)
    session = backend.load(artifact, threads=threads)
    return LoadedModel(digest, artifact.manifest.parameter_count, session, dataset, stamp)


class TrainingRun:
    """From one ``Train`` to an update. ``base``: its model, float32 (d,). ``seed``: 32 bytes (``batch_seed``).

    every_s: seconds of ``clock`` between two checkpoints.
    Goes on from a checkpoint of the same training, if one is kept: ``resumed_at`` is its step, 0 without.
    ``damage``: why one that was there could not be used; it is gone then.
    Raises RemoteProtocolError if no codec of the plan can be used here; BackendError.
    """

    def __init__(
        self,
        train: sv.Train,
        base: Vector,
        model: LoadedModel,
        *,
        seed: bytes,
        checkpoints: Checkpoints,
        every_s: float,
        clock: Callable[[], float],
    ) -> None:
        # Without the model's bytes, which ``base`` holds too.
        self._train = replace(train, model=b"")
        self._binding = sha256(seed, fingerprint(model.dataset))
        self._base = base
        self._codec = codecs.choose(train.manifest.plan.codecs)
        self._checkpoints = checkpoints
        self._every_s = every_s
        self._clock = clock
        self.damage: str | None = None
        try:
            saved = checkpoints.get(train.manifest_digest, self._binding)
            checkpoint = Checkpoint.from_bytes(saved.content) if saved else None
            self._local = self._training(model, seed, checkpoint)
        except (DamagedFileError, CheckpointError) as error:
            self.damage = str(error)
            checkpoints.keep_only(None)
            saved = checkpoint = None
            self._local = self._training(model, seed, None)
        self._steps = self._local.steps()
        self.step = self.resumed_at = checkpoint.step if checkpoint else 0
        self._saved_step = self.step
        self._begun_at = clock() - (saved.trained_s if saved else 0.0)
        self._saved_at = clock()

    @property
    def round_id(self) -> RoundId:
        return self._train.manifest.round_id

    @property
    def train(self) -> sv.Train:
        """What was begun, whole again."""
        return replace(self._train, model=vector_to_bytes(self._base))

    @property
    def trained_s(self) -> float:
        """Seconds since the first step, without the time between a checkpoint and the resumption from it."""
        return self._clock() - self._begun_at

    def advance(self) -> TrainingResult | None:
        """Makes one step; the result once there is none left. Raises TrainingDiverged, BackendError."""
        try:
            step = next(self._steps)
        except StopIteration as end:
            result: TrainingResult | None = end.value
            return result
        self.step = step.index
        _log.debug("step %d of %d: loss %.4f", step.index, step.total, step.loss)
        return None

    def checkpoint_due(self) -> bool:
        return self._clock() - self._saved_at >= self._every_s

    def save(self) -> bool:
        """Durably, where the training stands, between two steps. False: nothing is new since the last time."""
        self._saved_at = self._clock()
        if self.step == self._saved_step:
            return False
        content = self._local.checkpoint().to_bytes()
        saved = SavedCheckpoint(content=content, trained_s=self.trained_s)
        self._checkpoints.put(self._train.manifest_digest, self._binding, saved)
        self._saved_step, self._saved_at = self.step, self._clock()
        return True

    def update(self, result: TrainingResult, codec_seed: bytes) -> Update:
        """What ``advance`` returned, encoded. Raises TrainingDiverged."""
        change = delta(result.theta, self._base)
        codec = codecs.codec_named(self._codec)
        encoded, _ = codec.encode(change, codec.init(change.size), Stream(codec_seed))
        return Update(
            samples=result.samples,
            steps=result.steps,
            loss_first=result.loss_first,
            loss_last=result.loss_last,
            codec=self._codec,
            delta=encoded,
            parameter_count=change.size,
        )

    def _training(self, model: LoadedModel, seed: bytes, resume: Checkpoint | None) -> LocalTraining:
        manifest = self._train.manifest
        return LocalTraining(
            *(model.session, model.dataset, manifest.plan, self._base),
            seed=seed,
            version=manifest.base_version,
            resume=resume,
        )


def fingerprint(dataset: Dataset) -> Digest:
    """Digest of shapes, dtypes and at most 64 rows, evenly spaced: tells data that changed, but for a few rows."""
    rows = np.unique(np.linspace(0, dataset.samples - 1, FINGERPRINT_ROWS).astype(np.int64))
    parts = []
    for array in (*dataset.inputs, dataset.target):
        parts += [f"{array.dtype.str}{array.shape}".encode(), array[rows].tobytes()]
    return sha256(*parts)
