from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_runtime.protocol.errors import LocalProtocolError, RemoteProtocolError
from edge_runtime.protocol.fixed_point import (
    MAX_WEIGHT,
    TILE,
    Accumulator,
    apply_mean,
    contribution,
    max_scale_bits,
    mean,
    weight,
)
from edge_runtime.protocol.rejects import Reject

VECTORS = json.loads(Path("tests/vectors/fixed_point.json").read_text())
D, BOUND = 7, 4.0
deltas = hnp.arrays(np.float32, D, elements=st.floats(-BOUND, BOUND, width=32))
weights = st.integers(1, MAX_WEIGHT)
updates = st.lists(st.tuples(deltas, weights), min_size=1, max_size=8)


def _f32(rows: list[str]) -> np.ndarray:
    return np.frombuffer(bytes.fromhex("".join(rows)), dtype="<f4").astype(np.float32)


def _refused(reject: Reject, call, *args) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RemoteProtocolError) as refusal:
        call(*args)
    assert refusal.value.reject is reject


@pytest.mark.parametrize("row", VECTORS["weights"])
def test_a_weight_meets_its_vector(row: dict) -> None:  # type: ignore[type-arg]
    assert weight(row["samples"], row["sample_cap"], row["beta"]) == row["weight"]


@pytest.mark.parametrize("row", VECTORS["scale_bits"])
def test_the_scale_meets_its_vector(row: dict) -> None:  # type: ignore[type-arg]
    assert max_scale_bits(row["cohort_size"], row["max_abs_delta"]) == row["scale_bits"]


def test_a_round_meets_its_vector_field_by_field() -> None:
    row = VECTORS["round"]
    accumulator = Accumulator(4, row["scale_bits"], row["max_abs_delta"])
    for update in row["updates"]:
        delta = _f32(update["delta"])
        integers = contribution(delta, update["weight"], row["scale_bits"], row["max_abs_delta"])
        assert integers.tolist() == update["contribution"]
        accumulator.add(delta, update["weight"])
    assert accumulator.sum.tolist() == row["sum"]
    assert accumulator.total_weight == row["total_weight"]
    assert [value.hex() for value in mean(accumulator).tolist()] == row["mean"]
    assert apply_mean(_f32(row["theta"]), accumulator).tobytes() == _f32(row["updated"]).tobytes()


@given(n=st.integers(1, 2**40), cap=st.integers(1, 2**40))
def test_a_weight_with_beta_zero_is_the_exact_share_of_the_cap(n: int, cap: int) -> None:
    assert weight(n, cap, 0.0) == max(1, MAX_WEIGHT * min(n, cap) // cap)


@given(n=st.integers(1, 2000), cap=st.integers(1, 2000), beta=st.integers(-1, 8))
def test_a_weight_with_a_whole_beta_is_exact(n: int, cap: int, beta: int) -> None:
    assert weight(n, cap, float(beta)) == max(
        1, math.floor(MAX_WEIGHT * Fraction(min(n, cap), cap) ** (1 + beta))
    )


@given(root=st.integers(1, 256))
def test_a_power_that_is_whole_is_not_rounded_down(root: int) -> None:
    assert weight(root**2, 256**2, -0.5) == 256 * root


@given(n=st.integers(1, 10**6), cap=st.integers(1, 10**6), beta=st.floats(-1, 8))
def test_a_weight_grows_with_the_samples_and_stays_in_range(n: int, cap: int, beta: float) -> None:
    assert 1 <= weight(n, cap, beta) <= weight(n + 1, cap, beta) <= MAX_WEIGHT
    assert weight(cap, cap, beta) == MAX_WEIGHT


def test_bad_terms_are_refused() -> None:
    _refused(Reject.OUT_OF_RANGE, weight, 0, 10, 0.0)
    for cap, beta in [(0, 0.0), (10, -1.1), (10, 8.1), (10, math.nan), (10, math.inf)]:
        with pytest.raises(LocalProtocolError):
            weight(1, cap, beta)
    for cohort, bound in [(0, 1.0), (1, 0.0), (1, -1.0), (1, math.nan), (1, math.inf), (10, 1e30)]:
        with pytest.raises(LocalProtocolError):
            max_scale_bits(cohort, bound)


@given(cohort=st.integers(1, 10**6), bound=st.floats(1e-6, 1e6))
def test_the_scale_is_the_largest_that_cannot_overflow(cohort: int, bound: float) -> None:
    def worst(bits: int) -> Fraction:
        return cohort * (MAX_WEIGHT * Fraction(bound) * 2**bits + Fraction(1, 2))

    bits = max_scale_bits(cohort, bound)
    assert worst(bits) < 2**63
    assert bits == 60 or worst(bits + 1) >= 2**63 - 2 * cohort


@given(delta=deltas, w=weights, bits=st.integers(0, 40))
def test_a_contribution_is_the_exact_product_rounded_half_to_even(
    delta: np.ndarray, w: int, bits: int
) -> None:
    expected = [round(Fraction(float(value)) * w * 2**bits) for value in delta]
    assert contribution(delta, w, bits, BOUND).tolist() == expected


@given(updates=updates, data=st.data())
@settings(deadline=None)
def test_the_sum_does_not_depend_on_the_order(
    updates: list[tuple[np.ndarray, int]], data: st.DataObject
) -> None:
    bits = max_scale_bits(len(updates), BOUND)
    theta = np.linspace(-1, 1, D).astype(np.float32)
    results = set()
    for order in (updates, data.draw(st.permutations(updates))):
        accumulator = Accumulator(D, bits, BOUND)
        for delta, w in order:
            accumulator.add(delta, w)
        results.add((accumulator.sum.tobytes(), apply_mean(theta, accumulator).tobytes()))
    assert len(results) == 1


@given(updates=updates)
@settings(deadline=None)
def test_the_mean_is_the_weighted_mean_within_a_rounding(updates: list[tuple[np.ndarray, int]]) -> None:
    bits = max_scale_bits(len(updates), BOUND)
    accumulator = Accumulator(D, bits, BOUND)
    for delta, w in updates:
        accumulator.add(delta, w)
    total = sum(w for _, w in updates)
    for j, value in enumerate(mean(accumulator).tolist()):
        exact = sum(Fraction(float(delta[j])) * w for delta, w in updates) / total
        assert (
            abs(Fraction(value) - exact) <= Fraction(len(updates), 2 * total * 2**bits) + abs(exact) / 2**51
        )


def test_every_device_is_counted_once_with_its_unit_vector() -> None:
    n = 300
    accumulator = Accumulator(n, max_scale_bits(n, 1.0), 1.0)
    for i in range(n):
        accumulator.add(np.eye(1, n, i, dtype=np.float32)[0], MAX_WEIGHT)
    assert np.array_equal(mean(accumulator) * n, np.ones(n))


def test_tiles_join_without_a_seam() -> None:
    d = 2 * TILE + 3
    delta = np.linspace(-1, 1, d).astype(np.float32)
    accumulator = Accumulator(d, 30, 1.0)
    accumulator.add(delta, 3)
    assert np.array_equal(accumulator.sum, contribution(delta, 3, 30, 1.0))
    theta = np.ones(d, dtype=np.float32)
    expected = (theta.astype(np.float64) + mean(accumulator)).astype(np.float32)
    assert apply_mean(theta, accumulator).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("delta", "reject"),
    [
        ([0, np.nan, 0], Reject.NOT_FINITE),
        ([0, np.inf, 0], Reject.NOT_FINITE),
        ([0, -np.inf, 0], Reject.NOT_FINITE),
        ([0, np.nextafter(np.float32(1), np.float32(2)), 0], Reject.OUT_OF_RANGE),
        ([0, 0, -2], Reject.OUT_OF_RANGE),
        ([0, 0], Reject.WRONG_SIZE),
    ],
)
def test_a_refused_update_leaves_the_sum_as_it_was(delta: list[float], reject: Reject) -> None:
    accumulator = Accumulator(3, 20, 1.0)
    accumulator.add(np.array([1, -1, 0.5], dtype=np.float32), 7)
    before = accumulator.sum.tobytes()
    _refused(reject, accumulator.add, np.array(delta, dtype=np.float32), 7)
    assert (accumulator.sum.tobytes(), accumulator.total_weight, accumulator.count) == (before, 7, 1)


def test_more_updates_than_the_scale_was_made_for_are_refused_before_they_overflow() -> None:
    bits = max_scale_bits(2, 1.0)
    accumulator = Accumulator(1, bits, 1.0)
    one = np.ones(1, dtype=np.float32)
    while 2**63 - int(accumulator.sum[0]) > MAX_WEIGHT << bits:
        accumulator.add(one, MAX_WEIGHT)
    with pytest.raises(LocalProtocolError, match="overflow"):
        accumulator.add(one, MAX_WEIGHT)
    assert accumulator.count >= 2
    assert int(accumulator.sum[0]) == accumulator.count * MAX_WEIGHT << bits


def test_local_mistakes_are_named() -> None:
    good = np.zeros(2, dtype=np.float32)
    for delta, w, bits, bound in [
        (np.zeros(2), 1, 20, 1.0),
        (good.reshape(1, 2), 1, 20, 1.0),
        (good, 0, 20, 1.0),
        (good, MAX_WEIGHT + 1, 20, 1.0),
        (good, 1, -1, 1.0),
        (good, 1, 61, 1.0),
        (good, MAX_WEIGHT, 47, 1.0),
        (good, 1, 20, math.nan),
    ]:
        with pytest.raises(LocalProtocolError):
            contribution(delta, w, bits, bound)
    empty = Accumulator(2, 20, 1.0)
    for call in (lambda: mean(empty), lambda: apply_mean(good, empty)):
        with pytest.raises(LocalProtocolError, match="no updates"):
            call()
    empty.add(good, 1)
    with pytest.raises(LocalProtocolError, match="shape"):
        apply_mean(np.zeros(3, dtype=np.float32), empty)
    assert apply_mean(good, empty).tobytes() == good.tobytes()
