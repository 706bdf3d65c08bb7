"""What every backend must do. A new one is one more entry of BACKENDS."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from edge_runtime.backends.artifact_folder import initial_parameters, read_artifact_folder
from edge_runtime.backends.base import Backend, BackendError, BatchError, TrainingSession
from edge_runtime.backends.ort import OrtBackend
from edge_runtime.protocol.artifact import Artifact
from edge_runtime.protocol.tensors import TensorError

BACKENDS: list[Backend] = [OrtBackend()]
ARTIFACT = read_artifact_folder(Path(__file__).parents[2] / "examples" / "digits" / "artifact")
THETA = initial_parameters(ARTIFACT)
RATES = {"learning_rate": 0.1, "momentum": 0.9, "max_grad_norm": 0.5}


@pytest.fixture(params=BACKENDS, ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.param


@pytest.fixture
def session(backend: Backend) -> TrainingSession:
    session = backend.load(ARTIFACT)
    session.start(THETA)
    return session


def batch(size: int, seed: int = 0) -> tuple[list[np.ndarray], np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.random((size, 1, 8, 8), np.float32)], random.integers(0, 10, size)


def test_training_lowers_the_loss(session: TrainingSession) -> None:
    losses = [session.step(*batch(16), **RATES).loss for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


def test_the_same_steps_give_the_same_bytes(backend: Backend) -> None:
    runs = []
    for _ in range(2):
        session = backend.load(ARTIFACT, threads=1)
        session.start(THETA)
        results = [session.step(*batch(5, seed), **RATES) for seed in range(4)]
        runs.append((results, session.theta().tobytes()))
    assert runs[0] == runs[1]


def test_micro_batches_add_up_to_the_batch(backend: Backend) -> None:
    inputs, target = batch(12)
    whole, parts = backend.load(ARTIFACT), backend.load(ARTIFACT)
    whole.start(THETA)
    parts.start(THETA)
    for _ in range(3):
        result = whole.step(inputs, target, **RATES)
        pieces = [slice(0, 5), slice(5, 10), slice(10, 12)]
        losses = [
            parts.accumulate([inputs[0][piece]], target[piece], scale=(piece.stop - piece.start) / 12)
            for piece in pieces
        ]
        norm = parts.apply(**RATES)
        assert sum(losses) == pytest.approx(result.loss, rel=1e-5)
        assert norm == pytest.approx(result.grad_norm, rel=1e-4)
        assert not parts.gradient().any()
    np.testing.assert_allclose(parts.theta(), whole.theta(), atol=1e-6)


def test_a_step_moves_by_no_more_than_rate_times_clip_norm(session: TrainingSession) -> None:
    session.step(*batch(8), learning_rate=0.5, momentum=0.0, max_grad_norm=0.01)
    assert np.linalg.norm(session.theta() - THETA) == pytest.approx(0.005, rel=1e-3)


def test_a_clip_norm_of_zero_does_not_clip(session: TrainingSession) -> None:
    result = session.step(*batch(8), learning_rate=0.5, momentum=0.0, max_grad_norm=0.0)
    assert np.linalg.norm(session.theta() - THETA) == pytest.approx(0.5 * result.grad_norm, rel=1e-3)


def test_start_forgets_what_came_before(session: TrainingSession) -> None:
    first = session.step(*batch(8), **RATES)
    after = session.theta()
    session.accumulate(*batch(8), scale=1.0)
    session.start(THETA)
    assert not session.gradient().any()
    assert session.step(*batch(8), **RATES) == first
    np.testing.assert_array_equal(session.theta(), after)


def test_evaluation_reports_the_mean_loss_and_touches_nothing(session: TrainingSession) -> None:
    session.step(*batch(8), **RATES)
    before = session.theta()
    inputs, target = batch(6)
    evaluation = session.evaluate(THETA, inputs, target)
    (logits,) = evaluation.outputs
    shifted = logits - logits.max(1, keepdims=True)
    log_likelihood = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    assert logits.shape == (6, 10)
    assert evaluation.loss == pytest.approx(-log_likelihood[np.arange(6), target].mean(), rel=1e-5)
    np.testing.assert_array_equal(session.infer(THETA, inputs)[0], logits)
    np.testing.assert_array_equal(session.theta(), before)


def test_vectors_that_go_in_or_out_are_copies(session: TrainingSession) -> None:
    theta = THETA.copy()
    session.start(theta)
    session.theta()[:] = 0
    session.gradient()[:] = 1
    session.step(*batch(8), **RATES)
    np.testing.assert_array_equal(theta, THETA)
    assert not session.gradient().any()
    outputs = session.infer(THETA, batch(2)[0])
    kept = outputs[0].copy()
    session.infer(THETA, batch(2, seed=1)[0])
    np.testing.assert_array_equal(outputs[0], kept)


X, Y = batch(4)
BAD_BATCHES = {
    "another shape": ([X[0][:, :, 1:]], Y),
    "another dtype": ([X[0].astype(np.float64)], Y),
    "labels of another dtype": (X, Y.astype(np.int32)),
    "fewer labels": (X, Y[:3]),
    "no samples": ([X[0][:0]], Y[:0]),
    "no batch dimension": ([X[0][0]], Y[0]),
    "scalars": ([np.float32(1).reshape(())], Y),
    "too many inputs": ([*X, *X], Y),
    "not contiguous": ([X[0].transpose(0, 1, 3, 2)], Y),
}


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_a_batch_that_does_not_fit_is_refused_and_nothing_moves(session: TrainingSession, name: str) -> None:
    inputs, target = BAD_BATCHES[name]
    with pytest.raises(BatchError):
        session.step(inputs, target, **RATES)
    with pytest.raises(BatchError):
        session.accumulate(inputs, target, scale=1.0)
    with pytest.raises(BatchError):
        session.evaluate(THETA, inputs, target)
    np.testing.assert_array_equal(session.theta(), THETA)


def test_a_label_outside_the_classes_is_an_error_and_nothing_moves(session: TrainingSession) -> None:
    with pytest.raises(BackendError):
        session.step(X, Y + 100, **RATES)
    np.testing.assert_array_equal(session.theta(), THETA)


def test_a_vector_that_does_not_fit_is_refused(session: TrainingSession) -> None:
    for wrong in (THETA[1:], THETA.astype(np.float64)):
        with pytest.raises(TensorError):
            session.start(wrong)
        with pytest.raises(TensorError):
            session.infer(wrong, X)


def test_an_artifact_for_a_newer_opset_is_refused(backend: Backend) -> None:
    newer = Artifact(dataclasses.replace(ARTIFACT.manifest, opset=99), ARTIFACT.files)
    with pytest.raises(BackendError, match=r"opset 99.*update fleetgrad"):
        backend.load(newer)


# ---- stock onnxruntime only -------------------------------------------------------------------------


def test_an_onnxruntime_that_is_too_old_or_absent_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, message in (
        (SimpleNamespace(__version__="1.21.1"), "1.21.1 is too old, 1.22 or newer"),
        (None, "not installed; install it with: pip install 'fleetgrad\\[device\\]'"),
    ):
        monkeypatch.setitem(sys.modules, "onnxruntime", module)  # type: ignore[arg-type]
        with pytest.raises(BackendError, match=message):
            OrtBackend().load(ARTIFACT)


def test_a_device_process_stays_below_150_megabytes() -> None:
    program = (
        "import re, numpy as np; from pathlib import Path\n"
        "from edge_runtime.backends.artifact_folder import *; from edge_runtime.backends.ort import OrtBackend\n"
        "artifact = read_artifact_folder(Path('examples/digits/artifact'))\n"
        "session = OrtBackend().load(artifact); session.start(initial_parameters(artifact))\n"
        "x, y = np.ones((32, 1, 8, 8), np.float32), np.zeros(32, np.int64)\n"
        "for _ in range(20): session.step([x], y, learning_rate=.1, momentum=.9, max_grad_norm=1.)\n"
        "session.evaluate(session.theta(), [x], y)\n"
        # of this process image alone: ru_maxrss would count the tests that started it
        "print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 150 * 1024
