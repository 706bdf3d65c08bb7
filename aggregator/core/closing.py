"""How a round stops collecting: frozen with enough updates, or aborted. Updates of evicted devices do not count."""

from __future__ import annotations

from collections.abc import Iterable

from aggregator.core.events import Aggregate, CloseRound, Decision
from aggregator.core.records import RoundAborted, RoundFrozen
from aggregator.core.round_rules import RoundRules
from aggregator.core.state import Round
from edge_runtime.protocol.ids import DeviceId, RoundId


def goal_is_reached(rules: RoundRules, current: Round, evicted: set[DeviceId], counted: int) -> bool:
    """The goal, or all that can still come, and never less than the minimum. ``counted``: updates that count."""
    selected = len(current.cohort)
    still_wanted = selected - sum(device in current.cohort for device in evicted)
    goal = min(rules.goal_of(selected), still_wanted)
    return counted >= max(goal, rules.minimum_of(selected))


def freeze(current: Round, devices: Iterable[DeviceId]) -> tuple[RoundFrozen, Aggregate]:
    accepted = tuple(sorted(devices))
    return (
        RoundFrozen(round_id=current.round_id, accepted=accepted),
        Aggregate(round_id=current.round_id, base_version=current.base_version, accepted=accepted),
    )


def abort(round_id: RoundId, rules: RoundRules, now: float, reason: str) -> Decision:
    return Decision(
        (RoundAborted(round_id=round_id, reason=reason, at=now),),
        (CloseRound(round_id=round_id),),
        now + rules.retry_s,
    )
