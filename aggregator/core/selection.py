"""Who takes part in a round: drawn from the check-ins, reproducibly, by a secret seed."""

from __future__ import annotations

from collections.abc import Iterable

from edge_runtime.protocol.crypto.prg import Stream, derive_seed
from edge_runtime.protocol.ids import DeviceId, RoundId


def draw_cohort(
    available: Iterable[DeviceId], size: int, run_seed: bytes, round_id: RoundId
) -> tuple[DeviceId, ...]:
    """``size`` of the available devices, uniformly, sorted; all of them if there are fewer."""
    candidates = sorted(available)
    seed = derive_seed(run_seed, b"cohort", round_id.generation, round_id.number)
    order = Stream(seed).permutation(len(candidates))
    return tuple(sorted(candidates[int(i)] for i in order[:size]))
