from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.rules.mean import aggregate, decode_update
from edge_runtime.protocol.codecs import codec_named
from edge_runtime.protocol.crypto.prg import Stream
from edge_runtime.protocol.errors import LocalProtocolError, RemoteProtocolError
from edge_runtime.protocol.fixed_point import max_scale_bits
from edge_runtime.protocol.ids import DeviceId
from edge_runtime.protocol.messages import Update
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.rejects import Reject

D = 50
MAX_DELTA = 4.0


def _plan(beta: float = 0.0, sample_cap: int = 1000, updates: int = 20) -> Plan:
    return Plan(
        beta=beta,
        sample_cap=sample_cap,
        max_abs_delta=MAX_DELTA,
        scale_bits=max_scale_bits(updates, MAX_DELTA),
        codecs=("float32", "int8-block+zlib"),
    )


def _update(delta: np.ndarray, samples: int = 100, codec: str = "float32") -> Update:
    chosen = codec_named(codec)
    raw, _ = chosen.encode(delta.astype(np.float32), chosen.init(delta.size), Stream(bytes(32)))
    return Update(
        samples=samples, steps=1, loss_first=1.0, loss_last=1.0, codec=codec, delta=raw, parameter_count=D
    )


def _deltas(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (n, D)).astype(np.float32)


def _named(updates: list) -> list:  # type: ignore[type-arg]
    return [(DeviceId(f"pi-{i}"), update) for i, update in enumerate(updates)]


THETA = np.linspace(-1, 1, D, dtype=np.float32)


@given(
    seed=st.integers(0, 1000),
    samples=st.lists(st.integers(1, 2000), min_size=1, max_size=12),
    beta=st.sampled_from([-1.0, 0.0, 0.5, 1.0]),
)
@settings(deadline=None, max_examples=60)
def test_the_aggregate_is_the_weighted_mean_within_the_fixed_points_tolerance(
    seed: int, samples: list[int], beta: float
) -> None:
    deltas, plan = _deltas(seed, len(samples)), _plan(beta)
    updates = _named([_update(delta, n) for delta, n in zip(deltas, samples, strict=True)])
    theta, excluded = aggregate(THETA, iter(updates), plan)
    weights = (np.minimum(samples, 1000).astype(np.float64) / 1000) ** (1 + beta)
    whole = np.maximum(np.floor(weights * 2**16 + 1e-6), 1)
    mean = (whole[:, None] * deltas.astype(np.float64)).sum(axis=0) / whole.sum()
    assert excluded == ()
    assert theta.dtype == np.float32
    tolerance = len(samples) * 2.0**-plan.scale_bits + np.abs(THETA.astype(np.float64) + mean) * 2**-23
    assert (np.abs(theta - (THETA.astype(np.float64) + mean)) <= tolerance).all()


@given(order=st.permutations(range(8)))
@settings(deadline=None, max_examples=25)
def test_the_order_of_the_updates_changes_no_bit(order: list[int]) -> None:
    updates = _named([_update(delta, 10 + i) for i, delta in enumerate(_deltas(7, 8))])
    first, _ = aggregate(THETA, updates, _plan(0.5))
    again, _ = aggregate(THETA, [updates[i] for i in order], _plan(0.5))
    assert first.tobytes() == again.tobytes()


def test_every_device_is_in_the_sum_exactly_once() -> None:
    updates = _named([_update(row) for row in np.eye(D, dtype=np.float32)[:10]])
    theta, excluded = aggregate(np.zeros(D, np.float32), updates, _plan())
    assert excluded == ()
    np.testing.assert_array_equal(theta, np.repeat([np.float32(0.1), 0], [10, D - 10]).astype(np.float32))


def test_samples_above_the_cap_count_as_the_cap() -> None:
    a, b = np.full(D, 1.0), np.full(D, -1.0)
    theta, _ = aggregate(np.zeros(D, np.float32), _named([_update(a, 10**9), _update(b, 1000)]), _plan())
    assert not theta.any()


BAD = {
    Reject.WRONG_SIZE: lambda: Update(
        samples=1, steps=1, loss_first=1.0, loss_last=1.0, codec="float32", delta=b"", parameter_count=D + 1
    ),
    Reject.UNKNOWN_CODEC: lambda: Update(
        samples=1, steps=1, loss_first=1.0, loss_last=1.0, codec="zip", delta=b"", parameter_count=D
    ),
    Reject.BAD_ENCODING: lambda: Update(
        samples=1,
        steps=1,
        loss_first=1.0,
        loss_last=1.0,
        codec="int8-block+zlib",
        delta=b"\xff" * 9,
        parameter_count=D,
    ),
    Reject.OUT_OF_RANGE: lambda: _update(np.full(D, 4.5)),
    Reject.NOT_FINITE: lambda: Update(
        samples=1,
        steps=1,
        loss_first=1.0,
        loss_last=1.0,
        codec="float32",
        delta=np.full(D, np.nan, "<f4").tobytes(),
        parameter_count=D,
    ),
}


@pytest.mark.parametrize("reject", BAD)
def test_an_unusable_update_is_excluded_with_its_reason_and_leaves_no_trace(reject: Reject) -> None:
    good = _named([_update(delta) for delta in _deltas(1, 3)])
    bad = BAD[reject]()
    with pytest.raises(RemoteProtocolError) as refusal:
        decode_update(bad, _plan(), D)
    assert refusal.value.reject is reject
    alone, _ = aggregate(THETA, good, _plan())
    theta, excluded = aggregate(THETA, [good[0], (DeviceId("bad"), bad), *good[1:]], _plan())
    assert excluded == ((DeviceId("bad"), reject),)
    assert theta.tobytes() == alone.tobytes()


def test_an_update_of_another_length_is_excluded() -> None:
    theta, excluded = aggregate(THETA, _named([_update(np.ones(D - 1))]), _plan())
    assert excluded[0][1] in (Reject.WRONG_SIZE, Reject.BAD_ENCODING)
    assert theta is THETA


def test_an_update_that_could_not_be_read_back_is_excluded_with_that_reason() -> None:
    lost = RemoteProtocolError(Reject.BAD_DIGEST, "gone")
    _, excluded = aggregate(THETA, _named([lost, _update(_deltas(1, 1)[0])]), _plan())
    assert excluded == ((DeviceId("pi-0"), Reject.BAD_DIGEST),)


def test_without_a_usable_update_the_model_stays() -> None:
    theta, excluded = aggregate(THETA, [], _plan())
    assert excluded == ()
    assert theta is THETA


def test_more_updates_than_the_scale_was_made_for_are_our_own_fault() -> None:
    plan = _plan(sample_cap=1, updates=2)
    with pytest.raises(LocalProtocolError, match="overflow"):
        aggregate(THETA, _named([_update(delta) for delta in _deltas(1, 5)]), plan)
