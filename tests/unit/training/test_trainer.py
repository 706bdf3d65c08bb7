"""The plan is followed exactly, can be stopped at any step, and is a function of its arguments."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.backends.base import Hyperparameters, StepResult, TrainingState
from edge_runtime.data import Dataset
from edge_runtime.protocol.errors import LocalProtocolError
from edge_runtime.protocol.ids import RoundId, device_id, sha256
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.schedules import Schedule
from edge_runtime.protocol.tensors import check_vector
from edge_runtime.training.checkpoint import Checkpoint, CheckpointError
from edge_runtime.training.trainer import (
    LocalTraining,
    TrainingDiverged,
    TrainingResult,
    batch_seed,
    delta,
    total_steps,
)

SEED = bytes(32)


class LeastSquares:
    """SGD with momentum on mean((x @ theta - y)^2): a whole backend in a few lines; records what it is asked."""

    def __init__(self):
        self.batches, self.hypers, self.dropout_seeds = [], [], []

    def start(self, theta):
        self.resume(TrainingState(theta))

    def resume(self, state):
        check_vector(3, state.theta)
        self._theta, self._steps = state.theta.copy(), state.steps
        self._velocity = state.vectors[0].copy() if state.vectors else np.zeros_like(state.theta)

    def state(self):
        vectors = (self._velocity.copy(),) if self._steps else ()
        return TrainingState(self.theta(), "sgd" if self._steps else "", vectors, self._steps)

    def step(self, inputs, target, hyper, *, dropout_seed=0):
        (x,) = inputs
        assert x.flags.c_contiguous
        assert len(x) == len(target)
        self.batches.append(x[:, -1].astype(int).tolist())
        self.hypers.append(hyper)
        self.dropout_seeds.append(dropout_seed)
        error = x @ self._theta - target
        gradient = 2 * x.T @ error / len(x)
        norm = float(np.linalg.norm(gradient))
        if hyper.max_grad_norm and norm > hyper.max_grad_norm:
            gradient *= hyper.max_grad_norm / norm
        self._velocity = np.float32(hyper.momentum) * self._velocity + gradient
        self._theta -= np.float32(hyper.learning_rate) * self._velocity
        self._steps += 1
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


def training(session, plan=None, data=None, seed=SEED, version=0, **more):
    start = np.zeros(3, np.float32)
    return LocalTraining(session, data or dataset(), plan or PLAN, start, seed=seed, version=version, **more)


def run(plan, **more):
    """(session, steps, result) of a whole training."""
    session, steps = LeastSquares(), []
    generator = training(session, plan, **more).steps()
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
        training(Last()).run()


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
    np.testing.assert_array_equal(training(LeastSquares()).run().theta, run(PLAN)[2].theta)
    with pytest.raises(LocalProtocolError, match="driven by its steps"):
        training(LeastSquares(), should_stop=lambda: True).run()


# ---- what the plan says of each step ----------------------------------------------------------------


def test_every_step_has_the_plans_optimizer_and_the_rate_of_its_version():
    plan = Plan(
        epochs=2,
        batch_size=4,
        optimizer="adamw",
        learning_rate=0.001,
        weight_decay=0.1,
        adam_beta1=0.8,
        adam_beta2=0.99,
        adam_epsilon=1e-6,
        schedule=Schedule(shape="step", factor=0.5, every=20),
    )
    for version, rate in ((0, 0.001), (19, 0.001), (20, 0.0005), (40, 0.00025)):
        session, _, _ = run(plan, version=version)
        assert set(session.hypers) == {
            Hyperparameters(
                optimizer="adamw",
                learning_rate=rate,
                momentum=0.9,
                weight_decay=0.1,
                beta1=0.8,
                beta2=0.99,
                epsilon=1e-6,
                max_grad_norm=5.0,
            )
        }


def test_every_step_has_a_fresh_dropout_seed_that_repeats_with_the_training():
    session, again, other = run(PLAN)[0], run(PLAN)[0], run(PLAN, seed=b"\1" * 32)[0]
    seeds = session.dropout_seeds
    assert len(set(seeds)) == len(seeds) == 9
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert seeds == again.dropout_seeds
    assert not set(seeds) & set(other.dropout_seeds)


# ---- stopping and going on --------------------------------------------------------------------------


@pytest.mark.parametrize("stop", range(10))
def test_a_training_resumed_at_any_step_ends_with_the_same_bytes(stop):
    whole, steps, result = run(PLAN)
    first = training(LeastSquares())
    driver = first.steps()
    made = [next(driver) for _ in range(stop)]
    kept = first.checkpoint().to_bytes()
    later, rest, end = run(PLAN, resume=Checkpoint.from_bytes(kept))
    assert made + rest == steps
    assert later.batches == whole.batches[stop:]
    assert later.dropout_seeds == whole.dropout_seeds[stop:]
    assert end.theta.tobytes() == result.theta.tobytes()
    assert end[1:] == result[1:]


def checkpoint_after(steps, **more):
    one = training(LeastSquares(), **more)
    driver = one.steps()
    for _ in range(steps):
        next(driver)
    return one.checkpoint()


def test_a_checkpoint_is_a_copy_that_later_steps_do_not_touch():
    one = training(LeastSquares())
    driver = one.steps()
    next(driver)
    checkpoint = one.checkpoint()
    before = checkpoint.to_bytes()
    list(driver)
    assert checkpoint.to_bytes() == before


def test_a_checkpoint_of_other_data_another_plan_or_another_model_is_refused():
    for checkpoint in (
        checkpoint_after(2, data=dataset(11)),
        checkpoint_after(10, plan=Plan(epochs=4, batch_size=4, learning_rate=0.001)),
        replace(checkpoint_after(1), state=TrainingState(np.zeros(3, np.float32), "adam", (), 1)),
        replace(checkpoint_after(1), state=TrainingState(np.zeros(4, np.float32))),
    ):
        with pytest.raises(CheckpointError, match="the checkpoint is of"):
            training(LeastSquares(), resume=checkpoint)


def test_a_damaged_checkpoint_is_an_error_wherever_it_is_damaged():
    raw = checkpoint_after(2).to_bytes()
    damaged = [raw[:end] for end in range(len(raw))] + [raw + b"\0"]
    damaged += [raw[:at] + bytes([raw[at] ^ 0x10]) + raw[at + 1 :] for at in range(len(raw))]
    for content in damaged:
        with pytest.raises(CheckpointError):
            Checkpoint.from_bytes(content)


@given(content=st.binary(max_size=300), at=st.integers(0, 120))
def test_any_bytes_with_a_right_digest_are_a_checkpoint_or_an_error(content, at):
    raw = checkpoint_after(2).to_bytes()[:-32]
    forged = raw[:at] + content + raw[at + len(content) :]
    with suppress(CheckpointError):
        checkpoint = Checkpoint.from_bytes(forged + sha256(forged))
        assert checkpoint.to_bytes()[:-32] == forged
        with suppress(CheckpointError):
            training(LeastSquares(), resume=checkpoint)
