"""The same trainer on the real runtime and the committed artifact of the digits example."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_runtime.backends.artifact_folder import initial_parameters, read_artifact_folder
from edge_runtime.backends.ort import OrtBackend
from edge_runtime.data import fit_dataset
from edge_runtime.protocol.plan import Plan
from edge_runtime.training.trainer import train

pytest.importorskip("onnxruntime")
ARTIFACT = Path(__file__).parents[3] / "examples" / "digits" / "artifact"


def test_training_on_one_thread_is_a_function_of_its_arguments_and_lowers_the_loss():
    artifact = read_artifact_folder(ARTIFACT)
    rng = np.random.default_rng(3)
    y = rng.integers(0, 10, 50)
    x = rng.normal(size=(50, *artifact.manifest.inputs[0].shape)) + y.reshape(50, 1, 1, 1) / 3
    dataset = fit_dataset([x], y, artifact.manifest)
    plan = Plan(epochs=8, batch_size=16, learning_rate=0.02)
    results = []
    for _ in range(2):
        steps = train(
            OrtBackend().load(artifact, threads=1),
            dataset,
            plan,
            initial_parameters(artifact),
            seed=bytes(32),
        )
        while True:
            try:
                next(steps)
            except StopIteration as end:
                results.append(end.value)
                break
    assert results[0].theta.tobytes() == results[1].theta.tobytes()
    assert results[0].steps == 8 * 4
    assert results[0].loss_last < results[0].loss_first
