"""Laws of every schedule, and torch's schedulers where they have the same shape."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.schedules import Schedule

VERSIONS = st.integers(0, 2**32 - 1)
WARMUPS = st.integers(0, 50)
SHAPES = {
    "constant": st.builds(Schedule, warmup_rounds=WARMUPS),
    "step": st.builds(
        Schedule,
        shape=st.just("step"),
        factor=st.floats(0, 1, exclude_min=True),
        every=st.integers(1, 1000),
        after=st.integers(0, 1000),
        warmup_rounds=WARMUPS,
    ),
    "cosine": st.builds(
        Schedule,
        shape=st.just("cosine"),
        factor=st.floats(0, 1),
        rounds=st.integers(51, 10_000),
        warmup_rounds=WARMUPS,
    ),
}
SCHEDULES = st.one_of(*SHAPES.values())


@given(SCHEDULES, VERSIONS)
def test_a_schedule_is_valid_never_raises_the_rate_and_survives_the_wire(
    schedule: Schedule, version: int
) -> None:
    assert schedule.problem() is None
    assert 0 <= schedule.at(version) <= 1
    plan = Plan(learning_rate=0.25, schedule=schedule)
    assert Plan.from_wire(plan.to_wire()) == plan
    assert plan.learning_rate_at(version) == 0.25 * schedule.at(version)


@given(SCHEDULES, st.integers(0, 20_000))
def test_after_the_warm_up_the_rate_never_rises_again(schedule: Schedule, version: int) -> None:
    version += schedule.warmup_rounds
    assert schedule.at(version + 1) <= schedule.at(version)


@given(st.one_of(SHAPES["constant"], SHAPES["cosine"]))
def test_a_warm_up_rises_in_equal_steps_and_is_over_at_its_version(schedule: Schedule) -> None:
    warmup = schedule.warmup_rounds
    ramp = [schedule.at(version) for version in range(warmup + 1)]
    assert ramp == pytest.approx([(version + 1) / (warmup + 1) for version in range(warmup + 1)])
    assert ramp[-1] == 1


@given(SHAPES["cosine"], VERSIONS)
def test_a_cosine_ends_at_its_share_and_stays_there(schedule: Schedule, later: int) -> None:
    half_way = schedule.warmup_rounds + (schedule.rounds - schedule.warmup_rounds) // 2
    assert schedule.factor <= schedule.at(half_way) <= 1
    assert schedule.at(schedule.rounds + later) == pytest.approx(schedule.factor, abs=1e-15)


def test_the_shapes_of_the_literature() -> None:
    halved = Schedule(shape="step", factor=0.5, every=20)
    assert [halved.at(version) for version in (0, 19, 20, 39, 40, 60)] == [1, 1, 0.5, 0.5, 0.25, 0.125]
    decayed = Schedule(shape="step", factor=0.9, every=5, after=10)
    expected = [1, 1, 1, 0.9**2, 0.9**2, 0.9**3]
    assert [decayed.at(version) for version in (0, 5, 10, 11, 14, 15)] == pytest.approx(expected)
    cosine = Schedule(shape="cosine", factor=0.1, rounds=100)
    assert [cosine.at(version) for version in (0, 50, 100, 500)] == pytest.approx([1, 0.55, 0.1, 0.1])


def test_torch_draws_the_same_curves() -> None:
    torch = pytest.importorskip("torch")
    from torch.optim import lr_scheduler as torchs

    pairs = {
        Schedule(shape="step", factor=0.5, every=20): lambda o: torchs.StepLR(o, 20, 0.5),
        Schedule(shape="cosine", factor=0.1, rounds=60): lambda o: torchs.CosineAnnealingLR(o, 60, 0.1),
        Schedule(warmup_rounds=7): lambda o: torchs.LinearLR(o, 1 / 8, 1.0, 7),
        Schedule(shape="cosine", rounds=60, warmup_rounds=10): lambda o: torchs.SequentialLR(
            o, [torchs.LinearLR(o, 1 / 11, 1.0, 10), torchs.CosineAnnealingLR(o, 50)], [10]
        ),
    }
    for schedule, make in pairs.items():
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler = make(optimizer)
            rates = []
            for _ in range(61):
                rates.append(scheduler.get_last_lr()[0])
                optimizer.step()
                scheduler.step()
        assert [schedule.at(version) for version in range(61)] == pytest.approx(rates, abs=1e-12)
