"""The weighted mean: theta + sum(w_i delta_i) / sum(w_i), in fixed point, w_i ~ n_i^(1+beta).

beta = 0 is FedAvg (McMahan et al. 2017, arXiv 1602.05629).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from edge_runtime.protocol import fixed_point
from edge_runtime.protocol.codecs import codec_named
from edge_runtime.protocol.errors import RemoteProtocolError
from edge_runtime.protocol.ids import DeviceId
from edge_runtime.protocol.messages import Update
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.rejects import Reject

F32 = npt.NDArray[np.float32]


def decode_update(update: Update, plan: Plan, parameter_count: int) -> F32:
    """The delta of an opened update: float32, shape (d,), finite, every |x| <= plan.max_abs_delta.

    Raises RemoteProtocolError: WRONG_SIZE, UNKNOWN_CODEC, BAD_ENCODING, NOT_FINITE, OUT_OF_RANGE.
    """
    if update.parameter_count != parameter_count:
        detail = f"{update.parameter_count} values, the model has {parameter_count} parameters"
        raise RemoteProtocolError(Reject.WRONG_SIZE, detail)
    if update.codec not in plan.codecs:
        raise RemoteProtocolError(Reject.UNKNOWN_CODEC, f"{update.codec!r} is not among the plan's codecs")
    delta = codec_named(update.codec).decode(update.delta, parameter_count)
    largest = float(np.abs(delta).max(initial=0.0))
    if largest > plan.max_abs_delta:
        raise RemoteProtocolError(Reject.OUT_OF_RANGE, f"a coordinate of magnitude {largest:.4g}")
    return delta


def aggregate(
    theta: F32, updates: Iterable[tuple[DeviceId, Update | RemoteProtocolError]], plan: Plan
) -> tuple[F32, tuple[tuple[DeviceId, Reject], ...]]:
    """The next model, and the updates that are not in it with the reason; without any update, ``theta`` itself.

    ``updates`` is consumed one at a time: memory is O(d). Their order does not matter: the sum is of integers.
    """
    accumulator = fixed_point.Accumulator(theta.size, plan.scale_bits, plan.max_abs_delta)
    excluded: list[tuple[DeviceId, Reject]] = []
    for device, update in updates:
        try:
            if isinstance(update, RemoteProtocolError):
                raise update
            delta = decode_update(update, plan, theta.size)
            accumulator.add(delta, fixed_point.weight(update.samples, plan.sample_cap, plan.beta))
        except RemoteProtocolError as error:
            excluded.append((device, error.reject))
    if accumulator.count == 0:
        return theta, tuple(excluded)
    return fixed_point.apply_mean(theta, accumulator), tuple(excluded)
