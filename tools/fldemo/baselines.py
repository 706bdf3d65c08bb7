"""What the federation is compared with: the same network and steps on pooled data, and each device on its own.

Both run in this process through the trainer and the backend that the devices use; no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from edge_runtime.backends.artifact_folder import initial_parameters
from edge_runtime.backends.ort import OrtBackend
from edge_runtime.data import Dataset, fit_dataset
from edge_runtime.protocol.artifact import Artifact
from edge_runtime.protocol.plan import Plan
from edge_runtime.training.trainer import LocalTraining
from fldemo.data import Samples
from fldemo.evaluation import Evaluator

THREADS = 2


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """Scores in [0, 1] on the held-out samples after ``passes`` over the data; ``local``: one per device."""

    central: float
    local: tuple[float, ...]
    passes: int

    @property
    def local_mean(self) -> float:
        return float(np.mean(self.local))


def train_baselines(
    artifact: Artifact,
    plan: Plan,
    *,
    pooled: Samples,
    devices: Sequence[Samples],
    evaluator: Evaluator,
    passes: int,
    batch_size: int,
    seed: int,
) -> Baselines:
    """Central and local-only training from the artifact's parameters, with the plan's rates and this batch size.

    ``passes`` over the data each: as many as the accepted updates made over the pooled data in all.
    """
    alone = dataclasses.replace(plan, epochs=passes, steps=0, batch_size=batch_size)
    start = initial_parameters(artifact)

    def trained(job: tuple[str, Samples]) -> float:
        name, samples = job
        session = OrtBackend().load(artifact)
        dataset: Dataset = fit_dataset((samples.x,), samples.y, artifact.manifest)
        training = LocalTraining(session, dataset, alone, start, seed=seed_bytes(seed, name), version=0)
        return evaluator.of_theta(training.run().theta)

    jobs = [("central", pooled), *((f"local-{i}", samples) for i, samples in enumerate(devices))]
    with ThreadPoolExecutor(THREADS) as pool:  # the runtime computes outside the interpreter's lock
        central, *local = pool.map(trained, jobs)
    return Baselines(central=central, local=tuple(local), passes=passes)


def seed_bytes(seed: int, name: str) -> bytes:
    """32 bytes for one purpose of the demo, so that a run can be repeated. Never do this outside a demo."""
    return hashlib.sha256(f"fldemo/{seed}/{name}".encode()).digest()
