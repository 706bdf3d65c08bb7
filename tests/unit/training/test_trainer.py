"""The plan is followed exactly, can be stopped at any step, and is a function of its arguments."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest

from edge_runtime.backends.base import StepResult
from edge_runtime.data import Dataset
from edge_runtime.protocol.ids import RoundId, device_id
from edge_runtime.protocol.plan import Plan
from edge_runtime.training.trainer import (
    TrainingDiverged,
    TrainingResult,
    batch_seed,
    delta,
    total_steps,
    train,
)

SEED = bytes(32)


class LeastSquares:
    """SGD with momentum on mean((x @ theta - y)^2): a whole backend in a few lines; records its batches."""

    def __init__(self):
        self.batches = []

    def start(self, theta):
        self._theta, self._velocity = theta.copy(), np.zeros_like(theta)

    def step(self, inputs, target, *, learning_rate, momentum, max_grad_norm):
        (x,) = inputs
        assert x.flags.c_contiguous
        assert len(x) == len(target)
        self.batches.append(x[:, -1].astype(int).tolist())
        error = x @ self._theta - target
        gradient = 2 * x.T @ error / len(x)
        norm = float(np.linalg.norm(gradient))
        if max_grad_norm and norm > max_grad_norm:
            gradient *= max_grad_norm / norm
        self._velocity = momentum * self._velocity + gradient
        self._theta -= np.float32(learning_rate) * self._velocity
        return StepResult(float(np.mean(error**2)), norm)

    def theta(self):
        return self._theta.copy()


def dataset(samples=10):
    """The last feature is the row's number (its parameter starts and stays near 0)."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(samples, 3)).astype(np.float32)
    y = x @ np.array([1, -2, 0], np.float32)
    x[:, 2] = np.arange(samples)
    return Dataset(inputs=(x,), target=y)


def run(plan, data=None, seed=SEED, should_stop=lambda: False):
    session = LeastSquares()
    steps = []
    generator = train(
        session, data or dataset(), plan, np.zeros(3, np.float32), seed=seed, should_stop=should_stop
    )
    while True:
        try:
            steps.append(next(generator))
        except StopIteration as end:
            return session, steps, end.value


PLAN = Plan(epochs=3, batch_size=4, learning_rate=0.001, momentum=0.9)


def test_every_pass_holds_each_row_once_in_a_new_order_and_the_smaller_last_batch_counts():
    session, steps, result = run(PLAN)
    assert [len(batch) for batch in session.batches] == [4, 4, 2] * 3
    passes = [list(chain(*session.batches[i : i + 3])) for i in (0, 3, 6)]
    assert all(sorted(rows) == list(range(10)) for rows in passes)
    assert len({tuple(rows) for rows in passes}) == 3
    assert [(step.index, step.total) for step in steps] == [(i, 9) for i in range(1, 10)]
    assert (result.samples, result.steps) == (10, 9)


def test_a_plan_in_steps_ends_in_the_middle_of_a_pass_or_goes_over_several():
    for steps in (1, 2, 3, 7):
        session, made, result = run(Plan(epochs=0, steps=steps, batch_size=4, learning_rate=0.001))
        assert len(made) == len(session.batches) == result.steps == steps
        assert max(Counter(chain(*session.batches[:3])).values()) == 1


def test_a_batch_larger_than_the_data_is_all_of_the_data():
    session, _, _ = run(Plan(epochs=2, batch_size=64, learning_rate=0.001))
    assert [len(batch) for batch in session.batches] == [10, 10]


def test_the_losses_are_means_per_sample_of_the_first_and_the_last_pass():
    session, steps, result = run(PLAN)
    sizes = np.array([len(batch) for batch in session.batches])
    losses = np.array([step.loss for step in steps])
    means = [np.average(losses[i : i + 3], weights=sizes[i : i + 3]) for i in (0, 6)]
    assert (result.loss_first, result.loss_last) == pytest.approx(means)
    assert result.loss_last < result.loss_first


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_batches():
    first, again, other = run(PLAN), run(PLAN), run(PLAN, seed=b"\1" * 32)
    assert first[2].theta.tobytes() == again[2].theta.tobytes()
    assert first[0].batches == again[0].batches != other[0].batches


def test_the_batch_order_of_a_seed_never_changes():
    session, _, _ = run(Plan(epochs=1, batch_size=10, learning_rate=0.001))
    assert session.batches == [[1, 0, 6, 9, 5, 3, 4, 2, 7, 8]]


def test_round_and_device_change_the_seed():
    seeds = {
        batch_seed(SEED, RoundId(generation, number), device_id(device))
        for generation in (1, 2)
        for number in (1, 2)
        for device in ("a", "b")
    }
    assert len(seeds) == 8


def test_training_stops_between_steps_when_the_host_says_so():
    answers = iter([False, False, True])
    session, steps, result = run(PLAN, should_stop=lambda: next(answers))
    assert result is None
    assert len(steps) == len(session.batches) == 2


def test_a_stop_after_the_last_step_still_gives_no_result():
    answers = iter([False, True])
    _, steps, result = run(Plan(steps=1, epochs=0, batch_size=4), should_stop=lambda: next(answers))
    assert result is None
    assert len(steps) == 1


def test_divergence_is_an_error_that_names_the_step():
    with (
        pytest.raises(TrainingDiverged, match=r"step \d+ of 900.*lower the learning rate"),
        np.errstate(all="ignore"),
    ):
        run(Plan(epochs=300, batch_size=4, learning_rate=100.0, max_grad_norm=0))


def test_a_parameter_that_ends_infinite_is_divergence():
    class Last(LeastSquares):
        def theta(self):
            return np.array([0, np.inf, 0], np.float32)

    with pytest.raises(TrainingDiverged, match="a parameter is not finite"):
        list(train(Last(), dataset(), PLAN, np.zeros(3, np.float32), seed=SEED))


def test_the_number_of_steps_is_known_before_training():
    assert total_steps(PLAN, 10) == 9
    assert total_steps(Plan(epochs=0, steps=5), 10) == 5


def test_the_delta_is_new_minus_base_in_float32():
    result = delta(np.array([1.5, 2], np.float32), np.array([1, 4], np.float32))
    assert result.dtype == np.float32
    assert result.tolist() == [0.5, -2]
    with pytest.raises(TrainingDiverged):
        delta(np.array([3e38], np.float32), np.array([-3e38], np.float32))


def test_a_result_is_a_training_result():
    assert isinstance(run(PLAN)[2], TrainingResult)
