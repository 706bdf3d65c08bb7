"""How updates are summed: integers, so the result does not depend on the order in which they arrive.

Device i contributes round(w_i * delta_i * 2^s) as int64. delta has 24 significant bits and w at most 16
(or is 2^16), so the product is exact in float64 and rounding to the nearest integer, ties to even, is the
only loss: at most half a unit of 2^-s per device and parameter. One float64 division ends the round.
"""

from __future__ import annotations

import decimal
import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from edge_runtime.protocol.errors import LocalProtocolError, RemoteProtocolError
from edge_runtime.protocol.rejects import Reject

WEIGHT_BITS = 16
MAX_WEIGHT = 1 << WEIGHT_BITS
MAX_SCALE_BITS = 60
MAX_BETA = 8.0
TILE = 1 << 16  # columns summed at a time: the float64 and int64 temporaries stay at 1 MiB
_INT64_MAX = (1 << 63) - 1
_POW = decimal.Context(prec=60, rounding=decimal.ROUND_HALF_EVEN)
_GUARD = decimal.Decimal("1e-30")

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


def weight(samples: int, sample_cap: int, beta: float) -> int:
    """floor(2^16 * (min(samples, cap) / cap)^(1 + beta)), at least 1; in [1, 2^16].

    Below the cap proportional to n^(1+beta): beta 0 is FedAvg (McMahan et al. 2017), -1 weighs every
    device alike. Computed in 60 decimal digits, rounded to 30 behind the point before the floor, since a
    float64 power differs between machines in its last bit.
    Raises RemoteProtocolError(OUT_OF_RANGE) for samples below 1, LocalProtocolError for a cap below 1 or
    beta outside [-1, 8].
    """
    if sample_cap < 1 or not -1.0 <= beta <= MAX_BETA:
        raise LocalProtocolError(f"sample cap {sample_cap} or beta {beta} of the plan is out of range")
    if samples < 1:
        raise RemoteProtocolError(Reject.OUT_OF_RANGE, f"an update from {samples} samples")
    ratio = _POW.divide(decimal.Decimal(min(samples, sample_cap)), decimal.Decimal(sample_cap))
    exponent = _POW.add(decimal.Decimal(1), decimal.Decimal(beta))
    scaled = _POW.multiply(decimal.Decimal(MAX_WEIGHT), _POW.power(ratio, exponent))
    return max(1, int(scaled.quantize(_GUARD, context=_POW).to_integral_value(decimal.ROUND_FLOOR)))


def max_scale_bits(cohort_size: int, max_abs_delta: float) -> int:
    """The largest s in [0, 60] with which ``cohort_size`` updates cannot overflow int64.

    That is: cohort_size * (2^16 * max_abs_delta * 2^s + 1/2) < 2^63, with coordinates in
    [-max_abs_delta, max_abs_delta]. Raises LocalProtocolError when not even s = 0 fits, or for a cohort
    below 1 or a max_abs_delta that is not positive and finite.
    """
    if cohort_size < 1 or not (0 < max_abs_delta < math.inf):
        raise LocalProtocolError(
            f"cohort size {cohort_size} or max_abs_delta {max_abs_delta} is out of range"
        )
    for bits in range(MAX_SCALE_BITS, -1, -1):
        if cohort_size * _largest(MAX_WEIGHT, bits, max_abs_delta) <= _INT64_MAX:
            return bits
    raise LocalProtocolError(
        f"{cohort_size} updates of up to {max_abs_delta} do not fit a 64-bit sum: lower max_abs_delta"
    )


def contribution(delta: F32, weight: int, scale_bits: int, max_abs_delta: float) -> I64:
    """round_half_even(weight * delta * 2^scale_bits): shape (d,), int64.

    ``delta``: shape (d,), float32. Raises RemoteProtocolError(NOT_FINITE) for NaN or infinity,
    (OUT_OF_RANGE) for a coordinate outside [-max_abs_delta, max_abs_delta]; LocalProtocolError for another
    dtype or rank, a weight outside [1, 2^16] or a scale that overflows int64.
    """
    _check_terms(weight, scale_bits, max_abs_delta)
    _check_delta(delta, max_abs_delta)
    return _scaled(delta, weight, scale_bits)


class Accumulator:
    """The weighted integer sum of a round. Memory: 8 bytes a parameter, however many updates.

    ``sum``: shape (d,), int64; ``total_weight`` and ``count``: of the updates in it.
    """

    __slots__ = ("_bound", "count", "max_abs_delta", "scale_bits", "sum", "total_weight")

    def __init__(self, parameter_count: int, scale_bits: int, max_abs_delta: float) -> None:
        _check_terms(1, scale_bits, max_abs_delta)
        self.sum: I64 = np.zeros(parameter_count, dtype=np.int64)
        self.total_weight = 0
        self.count = 0
        self.scale_bits = scale_bits
        self.max_abs_delta = max_abs_delta
        self._bound = 0

    def add(self, delta: F32, weight: int) -> None:
        """Add one update; a refused one leaves the sum as it was.

        Raises what ``contribution`` raises, RemoteProtocolError(WRONG_SIZE) for another length, and
        LocalProtocolError when the sum could overflow: more updates than the plan's scale was made for.
        """
        _check_terms(weight, self.scale_bits, self.max_abs_delta)
        _check_delta(delta, self.max_abs_delta, self.sum.size)
        bound = self._bound + _largest(weight, self.scale_bits, self.max_abs_delta)
        if bound > _INT64_MAX:
            raise LocalProtocolError(
                f"update {self.count + 1} could overflow the sum at scale 2^{self.scale_bits}"
            )
        for start in range(0, self.sum.size, TILE):
            tile = slice(start, start + TILE)
            self.sum[tile] += _scaled(delta[tile], weight, self.scale_bits)
        self._bound = bound
        self.total_weight += weight
        self.count += 1


def mean(accumulator: Accumulator) -> F64:
    """sum / (total_weight * 2^s): shape (d,), float64.

    The divisor is exact; a sum above 2^53 is rounded once on its way to float64, then comes the division.
    Raises LocalProtocolError when nothing was added.
    """
    return accumulator.sum.astype(np.float64) / _divisor(accumulator)


def apply_mean(theta: F32, accumulator: Accumulator) -> F32:
    """theta + mean, added in float64 and rounded once: shape (d,), float32, a new array.

    Raises LocalProtocolError when nothing was added, the shapes differ, or the model leaves float32.
    """
    if theta.dtype != np.float32 or theta.shape != accumulator.sum.shape:
        raise LocalProtocolError(
            f"the model is {theta.dtype} {theta.shape}, the sum is of shape {accumulator.sum.shape}"
        )
    divisor = _divisor(accumulator)
    updated = np.empty_like(theta)
    for start in range(0, theta.size, TILE):
        tile = slice(start, start + TILE)
        step = accumulator.sum[tile].astype(np.float64) / divisor
        with np.errstate(over="ignore"):
            updated[tile] = (theta[tile].astype(np.float64) + step).astype(np.float32)
    if not np.isfinite(updated).all():
        raise LocalProtocolError("the model is outside the range of float32: lower max_abs_delta")
    return updated


def _divisor(accumulator: Accumulator) -> float:
    if accumulator.total_weight == 0:
        raise LocalProtocolError("the mean of no updates")
    return math.ldexp(accumulator.total_weight, accumulator.scale_bits)


def _scaled(delta: F32, weight: int, scale_bits: int) -> I64:
    exact = delta.astype(np.float64) * math.ldexp(weight, scale_bits)
    return np.rint(exact, out=exact).astype(np.int64)


def _largest(weight: int, scale_bits: int, max_abs_delta: float) -> int:
    """The largest magnitude a contribution can have, at least 1."""
    return math.ceil(weight * Fraction(max_abs_delta) * (1 << scale_bits) + Fraction(1, 2))


def _check_terms(weight: int, scale_bits: int, max_abs_delta: float) -> None:
    if not 1 <= weight <= MAX_WEIGHT:
        raise LocalProtocolError(f"weight {weight} is outside [1, {MAX_WEIGHT}]")
    if not 0 <= scale_bits <= MAX_SCALE_BITS or not 0 < max_abs_delta < math.inf:
        raise LocalProtocolError(f"scale 2^{scale_bits} or max_abs_delta {max_abs_delta} is out of range")
    if _largest(weight, scale_bits, max_abs_delta) > _INT64_MAX:
        raise LocalProtocolError(
            f"one update of up to {max_abs_delta} overflows int64 at scale 2^{scale_bits}"
        )


def _check_delta(delta: F32, max_abs_delta: float, parameter_count: int | None = None) -> None:
    if delta.dtype != np.float32 or delta.ndim != 1:
        raise LocalProtocolError(f"an update is float32 of shape (d,), not {delta.dtype} {delta.shape}")
    if parameter_count is not None and delta.size != parameter_count:
        raise RemoteProtocolError(
            Reject.WRONG_SIZE, f"{delta.size} values, the model has {parameter_count} parameters"
        )
    if delta.size == 0:
        return
    largest = max(float(delta.max()), -float(delta.min()))  # NaN if any value is: min and max propagate it
    if not math.isfinite(largest):
        raise RemoteProtocolError(Reject.NOT_FINITE, "the update holds NaN or infinity")
    if largest > max_abs_delta:
        raise RemoteProtocolError(
            Reject.OUT_OF_RANGE, f"a coordinate of magnitude {largest:.6g} is above {max_abs_delta:.6g}"
        )
