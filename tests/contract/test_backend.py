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
from edge_runtime.backends.base import (
    Backend,
    BackendError,
    BatchError,
    Hyperparameters,
    TrainingSession,
    TrainingState,
)
from edge_runtime.backends.ort import OrtBackend
from edge_runtime.protocol.artifact import Artifact
from edge_runtime.protocol.tensors import TensorError
from tests.support.tiny_artifact import DECAY, P, tiny_artifact

BACKENDS: list[Backend] = [OrtBackend()]
ARTIFACT = read_artifact_folder(Path(__file__).parents[2] / "examples" / "digits" / "artifact")
THETA = initial_parameters(ARTIFACT)
HYPER = Hyperparameters(learning_rate=0.1, momentum=0.9, max_grad_norm=0.5)
OPTIMIZERS = {
    "sgd": Hyperparameters(learning_rate=0.3),
    "sgd with momentum": HYPER,
    "sgd, Nesterov, weight decay": Hyperparameters(
        learning_rate=0.1, momentum=0.8, nesterov=True, weight_decay=0.01
    ),
    "adam": Hyperparameters(optimizer="adam", learning_rate=0.01, weight_decay=0.01, max_grad_norm=5.0),
    "adamw": Hyperparameters(optimizer="adamw", learning_rate=0.01, weight_decay=0.1, beta2=0.9),
}
every_optimizer = pytest.mark.parametrize("hyper", OPTIMIZERS.values(), ids=OPTIMIZERS)


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


@every_optimizer
def test_training_lowers_the_loss(session: TrainingSession, hyper: Hyperparameters) -> None:
    losses = [session.step(*batch(16), hyper).loss for _ in range(60)]
    assert losses[-1] < 0.7 * losses[0]


@every_optimizer
def test_the_same_steps_give_the_same_bytes(backend: Backend, hyper: Hyperparameters) -> None:
    runs = []
    for _ in range(2):
        session = backend.load(ARTIFACT, threads=1)
        session.start(THETA)
        results = [session.step(*batch(5, seed), hyper) for seed in range(4)]
        runs.append((results, session.theta().tobytes()))
    assert runs[0] == runs[1]


@every_optimizer
def test_micro_batches_add_up_to_the_batch(backend: Backend, hyper: Hyperparameters) -> None:
    inputs, target = batch(12)
    whole, parts = backend.load(ARTIFACT), backend.load(ARTIFACT)
    whole.start(THETA)
    parts.start(THETA)
    for _ in range(3):
        result = whole.step(inputs, target, hyper)
        pieces = [slice(0, 5), slice(5, 10), slice(10, 12)]
        losses = [
            parts.accumulate([inputs[0][piece]], target[piece], scale=(piece.stop - piece.start) / 12)
            for piece in pieces
        ]
        norm = parts.apply(hyper)
        assert sum(losses) == pytest.approx(result.loss, rel=1e-4)
        assert norm == pytest.approx(result.grad_norm, rel=1e-3)
        assert not parts.gradient().any()
    # Adam divides a gradient by its own size, so where it is next to nothing its rounding decides.
    loose = hyper.optimizer != "sgd"
    difference = np.abs(parts.theta() - whole.theta())
    assert np.quantile(difference, 0.99 if loose else 1) < (1e-4 if loose else 1e-6)


# ---- optimisers -------------------------------------------------------------------------------------


def gradients(session: TrainingSession, theta: np.ndarray, seed: int) -> np.ndarray:
    """Of one batch at theta."""
    session.start(theta)
    session.accumulate(*batch(8, seed), scale=1.0)
    return session.gradient().astype(np.float64)


def formula(hyper: Hyperparameters, theta: np.ndarray, steps: int, session: TrainingSession) -> np.ndarray:
    """The textbook's update in float64, on the session's own gradients."""
    theta = theta.astype(np.float64)
    first, second = np.zeros_like(theta), np.zeros_like(theta)
    for t in range(1, steps + 1):
        g = gradients(session, theta.astype(np.float32), t)
        if hyper.max_grad_norm:
            g *= min(1.0, hyper.max_grad_norm / np.linalg.norm(g))
        if hyper.optimizer == "adamw":
            theta = theta * (1 - hyper.learning_rate * hyper.weight_decay)
        else:
            g = g + hyper.weight_decay * theta
        if hyper.optimizer == "sgd":
            first = hyper.momentum * first + g
            theta = theta - hyper.learning_rate * (g + hyper.momentum * first if hyper.nesterov else first)
            continue
        first = hyper.beta1 * first + (1 - hyper.beta1) * g
        second = hyper.beta2 * second + (1 - hyper.beta2) * g**2
        root = np.sqrt(second / (1 - hyper.beta2**t)) + hyper.epsilon
        theta = theta - hyper.learning_rate * first / (1 - hyper.beta1**t) / root
    return theta


@every_optimizer
def test_steps_are_those_of_the_textbook(backend: Backend, hyper: Hyperparameters) -> None:
    session = backend.load(ARTIFACT)
    session.start(THETA)
    for t in range(1, 6):
        session.step(*batch(8, t), hyper)
    expected = formula(hyper, THETA, 5, backend.load(ARTIFACT))
    loose = hyper.optimizer != "sgd"
    difference = np.abs(session.theta() - expected)
    assert np.quantile(difference, 0.99 if loose else 1) < (1e-4 if loose else 2e-6)


@every_optimizer
def test_a_session_resumed_from_a_state_goes_on_to_the_same_bytes(
    backend: Backend, hyper: Hyperparameters
) -> None:
    whole = backend.load(ARTIFACT)
    whole.start(THETA)
    for t in range(3):
        whole.step(*batch(6, t), hyper)
    state = whole.state()
    assert state.steps == 3
    assert len(state.vectors) == len(ARTIFACT.manifest.optimizers[state.optimizer])
    copied = [vector.copy() for vector in (state.theta, *state.vectors)]
    resumed = backend.load(ARTIFACT)
    resumed.accumulate(*batch(4), scale=1.0)
    resumed.resume(state)
    assert not resumed.gradient().any()
    results = [[one.step(*batch(6, t), hyper) for t in range(3, 6)] for one in (whole, resumed)]
    assert results[0] == results[1]
    assert whole.theta().tobytes() == resumed.theta().tobytes()
    for vector, before in zip((state.theta, *state.vectors), copied, strict=True):
        np.testing.assert_array_equal(vector, before)


def test_the_state_before_the_first_step_is_theta_alone(session: TrainingSession) -> None:
    state = session.state()
    assert (state.optimizer, state.vectors, state.steps) == ("", (), 0)
    session.step(*batch(4), HYPER)
    session.resume(state)
    np.testing.assert_array_equal(session.theta(), THETA)
    assert session.state().vectors == ()


def test_another_optimizer_begins_with_state_of_zero(backend: Backend, session: TrainingSession) -> None:
    for _ in range(2):
        session.step(*batch(4), OPTIMIZERS["adam"])
    theta = session.theta()
    session.step(*batch(4), HYPER)
    fresh = backend.load(ARTIFACT)
    fresh.start(theta)
    fresh.step(*batch(4), HYPER)
    np.testing.assert_array_equal(session.theta(), fresh.theta())
    assert session.state().steps == 1


def test_an_optimizer_that_the_artifact_does_not_have_is_named(backend: Backend) -> None:
    manifest = dataclasses.replace(ARTIFACT.manifest, optimizers={"sgd": ("momentum",)})
    session = backend.load(Artifact(manifest, ARTIFACT.files))
    session.start(THETA)
    with pytest.raises(BackendError, match="no optimizer 'adamw', it has sgd"):
        session.step(*batch(4), OPTIMIZERS["adamw"])


def test_a_state_of_another_model_is_refused_and_nothing_moves(session: TrainingSession) -> None:
    short = THETA[1:]
    for state in (
        TrainingState(short),
        TrainingState(THETA, "sgd", (short,), 1),
        TrainingState(THETA, "sgd", (), 1),
        TrainingState(THETA, "adam", (THETA,), 1),
        TrainingState(THETA, "lamb", (), 1),
        TrainingState(THETA, "", (THETA,), 1),
    ):
        with pytest.raises(TensorError):
            session.resume(state)
        np.testing.assert_array_equal(session.theta(), THETA)


# ---- clipping, starting, evaluating -----------------------------------------------------------------


def test_a_step_moves_by_no_more_than_rate_times_clip_norm(session: TrainingSession) -> None:
    session.step(*batch(8), Hyperparameters(learning_rate=0.5, max_grad_norm=0.01))
    assert np.linalg.norm(session.theta() - THETA) == pytest.approx(0.005, rel=1e-3)


def test_a_clip_norm_of_zero_does_not_clip(session: TrainingSession) -> None:
    result = session.step(*batch(8), Hyperparameters(learning_rate=0.5))
    assert np.linalg.norm(session.theta() - THETA) == pytest.approx(0.5 * result.grad_norm, rel=1e-3)


def test_start_forgets_what_came_before(session: TrainingSession) -> None:
    first = session.step(*batch(8), HYPER)
    after = session.theta()
    session.accumulate(*batch(8), scale=1.0)
    session.start(THETA)
    assert not session.gradient().any()
    assert session.step(*batch(8), HYPER) == first
    np.testing.assert_array_equal(session.theta(), after)


def test_evaluation_reports_the_mean_loss_and_touches_nothing(session: TrainingSession) -> None:
    session.step(*batch(8), HYPER)
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
    session.step(*batch(8), HYPER)
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
        session.step(inputs, target, HYPER)
    with pytest.raises(BatchError):
        session.accumulate(inputs, target, scale=1.0)
    with pytest.raises(BatchError):
        session.evaluate(THETA, inputs, target)
    np.testing.assert_array_equal(session.theta(), THETA)


def test_a_label_outside_the_classes_is_an_error_and_nothing_moves(session: TrainingSession) -> None:
    with pytest.raises(BackendError):
        session.step(X, Y + 100, HYPER)
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


# ---- buffers and dropout ----------------------------------------------------------------------------


TINY = tiny_artifact()
TINY_THETA = initial_parameters(TINY)
ROWS = np.random.default_rng(5).standard_normal((6, P)).astype(np.float32)
VALUES = np.arange(6, dtype=np.float32).reshape(6, 1)


@pytest.fixture
def tiny(backend: Backend) -> TrainingSession:
    session = backend.load(TINY)
    session.start(TINY_THETA)
    return session


@every_optimizer
def test_a_step_moves_buffers_by_its_forward_pass_and_trains_the_rest(
    tiny: TrainingSession, hyper: Hyperparameters
) -> None:
    mean = float(TINY_THETA[-1])
    for step in range(1, 4):
        tiny.step([ROWS], VALUES, hyper, dropout_seed=step)
        mean = DECAY * mean + (1 - DECAY) * float(ROWS.mean())
        assert tiny.theta()[-1] == pytest.approx(mean, rel=1e-5)
    assert {vector.shape for vector in tiny.state().vectors} == {(P,)}
    assert (tiny.theta()[:P] != TINY_THETA[:P]).all()


@every_optimizer
def test_micro_batches_add_up_their_changes_of_buffers(tiny: TrainingSession, hyper: Hyperparameters) -> None:
    for piece in (slice(0, 2), slice(2, 6)):
        tiny.accumulate([ROWS[piece]], VALUES[piece], scale=len(ROWS[piece]) / 6)
    change = (1 - DECAY) * (float(ROWS.mean()) - float(TINY_THETA[-1]))
    assert tiny.gradient()[-1] == pytest.approx(change, rel=1e-4)
    norm = float(np.linalg.norm(tiny.gradient()[:P]))
    assert tiny.apply(hyper) == pytest.approx(norm, rel=1e-5)
    assert tiny.theta()[-1] == pytest.approx(float(TINY_THETA[-1]) + change, rel=1e-5)


def test_a_dropout_seed_decides_the_masks_of_a_step(backend: Backend) -> None:
    def trained(seed: int, way: str) -> tuple[float, bytes]:
        session = backend.load(TINY)
        session.start(TINY_THETA)
        if way == "fused":
            return session.step([ROWS], VALUES, HYPER, dropout_seed=seed).loss, session.theta().tobytes()
        loss = session.accumulate([ROWS], VALUES, scale=1.0, dropout_seed=seed)
        return loss, session.gradient().tobytes()

    for way in ("fused", "accumulated"):
        seeds = (0, 1, 2, 1 << 32, (1 << 63) - 1)
        results = [trained(seed, way) for seed in seeds]
        assert len(set(results)) == len(seeds)
        assert [trained(seed, way) for seed in seeds] == results


def test_evaluation_and_inference_drop_nothing(tiny: TrainingSession) -> None:
    expected = ROWS @ TINY_THETA[:P, np.newaxis]
    evaluation = tiny.evaluate(TINY_THETA, [ROWS], VALUES)
    np.testing.assert_allclose(evaluation.outputs[0], expected, rtol=1e-5)
    assert evaluation.loss == pytest.approx(float(((expected - VALUES) ** 2).mean()), rel=1e-5)
    np.testing.assert_allclose(tiny.infer(TINY_THETA, [ROWS])[0], expected, rtol=1e-5)


def test_a_model_without_dropout_takes_any_seed(session: TrainingSession) -> None:
    result = session.step(*batch(4), HYPER, dropout_seed=1)
    session.start(THETA)
    assert session.step(*batch(4), HYPER, dropout_seed=2) == result


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
        "from edge_runtime.backends.base import Hyperparameters\n"
        "artifact = read_artifact_folder(Path('examples/digits/artifact'))\n"
        "session = OrtBackend().load(artifact); session.start(initial_parameters(artifact))\n"
        "x, y = np.ones((32, 1, 8, 8), np.float32), np.zeros(32, np.int64)\n"
        "for _ in range(20): session.step([x], y, Hyperparameters(learning_rate=.1, momentum=.9))\n"
        "session.evaluate(session.theta(), [x], y)\n"
        # of this process image alone: ru_maxrss would count the tests that started it
        "print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 150 * 1024
