"""The same trainer on the real runtime and the committed artifact of the digits example."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_runtime.backends.artifact_folder import initial_parameters, read_artifact_folder
from edge_runtime.backends.ort import OrtBackend
from edge_runtime.data import fit_dataset
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.schedules import Schedule
from edge_runtime.training.checkpoint import Checkpoint
from edge_runtime.training.trainer import LocalTraining
from tests.support.tiny_artifact import tiny_artifact

pytest.importorskip("onnxruntime")
ARTIFACT = Path(__file__).parents[3] / "examples" / "digits" / "artifact"


def test_training_on_one_thread_is_a_function_of_its_arguments_and_lowers_the_loss():
    artifact = read_artifact_folder(ARTIFACT)
    rng = np.random.default_rng(3)
    y = rng.integers(0, 10, 50)
    x = rng.normal(size=(50, *artifact.manifest.inputs[0].shape)) + y.reshape(50, 1, 1, 1) / 3
    dataset = fit_dataset([x], y, artifact.manifest)
    plan = Plan(epochs=8, batch_size=16, learning_rate=0.02)
    results = [
        LocalTraining(
            OrtBackend().load(artifact, threads=1),
            dataset,
            plan,
            initial_parameters(artifact),
            seed=bytes(32),
            version=0,
        ).run()
        for _ in range(2)
    ]
    assert results[0].theta.tobytes() == results[1].theta.tobytes()
    assert results[0].steps == 8 * 4
    assert results[0].loss_last < results[0].loss_first


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_training_killed_at_any_step_goes_on_to_the_same_bytes(optimizer):
    """With dropout, a buffer, momentum or moments, a schedule, and a checkpoint that went through bytes."""
    artifact = tiny_artifact()
    rng = np.random.default_rng(7)
    x = rng.normal(size=(10, 4)).astype(np.float32)
    dataset = fit_dataset([x], x[:, :1] - x[:, 1:2], artifact.manifest)
    schedule = Schedule(shape="step", factor=0.5, every=2)
    plan = Plan(optimizer=optimizer, epochs=2, batch_size=4, weight_decay=0.01, schedule=schedule)

    def training(theta, resume=None):
        session = OrtBackend().load(artifact, threads=1)
        return LocalTraining(session, dataset, plan, theta, seed=bytes(32), version=3, resume=resume)

    theta = initial_parameters(artifact)
    whole = training(theta).run()
    for killed_after in range(7):
        first = training(theta)
        steps = first.steps()
        for _ in range(killed_after):
            next(steps)
        kept = Checkpoint.from_bytes(first.checkpoint().to_bytes())
        resumed = training(np.zeros_like(theta), resume=kept).run()
        assert resumed.theta.tobytes() == whole.theta.tobytes()
        assert resumed[1:] == whole[1:]
