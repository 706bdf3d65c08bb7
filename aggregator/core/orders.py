"""What the operator orders, decided: records, effects, and an answer in words. Pure, as ``step`` is."""

from __future__ import annotations

from dataclasses import replace

from aggregator.core.closing import abort, freeze, goal_is_reached
from aggregator.core.events import (
    Decision,
    DrainOrdered,
    Effect,
    EvictOrdered,
    Order,
    PauseOrdered,
    PublishRestored,
    ReadmitOrdered,
    RepeatManifest,
    RestoreOrdered,
    ResumeOrdered,
)
from aggregator.core.records import (
    DrainBegun,
    Evicted,
    Paused,
    Readmitted,
    Record,
    Resumed,
    VersionRestored,
)
from aggregator.core.round_rules import RoundRules
from aggregator.core.state import State
from edge_runtime.protocol.errors import LocalProtocolError
from edge_runtime.protocol.ids import DeviceId
from edge_runtime.protocol.rounds import Phase


def obey(state: State, rules: RoundRules, now: float, order: Order) -> Decision:
    """Decide an order. An order for what holds already changes nothing and is not refused."""
    match order:
        case PauseOrdered():
            if state.paused:
                return _unchanged(state, now, "it is paused already")
            return Decision((Paused(at=now),), (), now, f"no new round opens; {_open_round(state)}")
        case ResumeOrdered():
            if not state.paused and not state.draining:
                return _unchanged(state, now, "it is not paused")
            return Decision((Resumed(at=now),), (), now, "rounds open again")
        case DrainOrdered():
            if state.draining:
                return _unchanged(state, now, "it is draining already")
            return Decision(
                (DrainBegun(at=now),), (), now, f"the aggregator ends; {_open_round(state)} first"
            )
        case EvictOrdered(device):
            if device in state.evicted:
                return _unchanged(state, now, f"{device} is evicted already")
            fate = "; its update of the open round is excluded" if _may_count(state, device) else ""
            answer = f"{device} takes part in nothing until `aggregator readmit {device}`{fate}"
            return _with_goal(state, rules, now, Evicted(device=device, at=now), answer)
        case ReadmitOrdered(device):
            if device not in state.evicted:
                return _unchanged(state, now, f"{device} is not evicted")
            readmitted = _with_goal(
                state, rules, now, Readmitted(device=device), f"{device} may check in again"
            )
            return replace(readmitted, effects=(*readmitted.effects, RepeatManifest()))
        case RestoreOrdered():
            return _restore(state, rules, now, order)


def _unchanged(state: State, now: float, answer: str) -> Decision:
    return Decision((), (), now, answer)


def _open_round(state: State) -> str:
    return (
        "no round is open"
        if state.round is None or state.at_rest
        else (f"round {state.round.round_id.number} ends normally")
    )


def _may_count(state: State, device: DeviceId) -> bool:
    return state.phase is Phase.COLLECTING and device in state.stored


def _with_goal(
    state: State, rules: RoundRules, now: float, record: Evicted | Readmitted, answer: str
) -> Decision:
    """Who may still send has changed, so the goal may be reached by it."""
    current = state.round
    if current is None or current.phase is not Phase.COLLECTING:
        return Decision((record,), (), now, answer)
    change = {record.device}
    evicted = state.evicted | change if isinstance(record, Evicted) else state.evicted - change
    counted = state.stored.keys() - evicted
    if not goal_is_reached(rules, current, evicted, len(counted)):
        return Decision((record,), (), now, answer)
    frozen, aggregate = freeze(current, counted)
    return Decision((record, frozen), (aggregate,), now, answer)


def _restore(state: State, rules: RoundRules, now: float, order: RestoreOrdered) -> Decision:
    if order.of == state.version:
        return Decision((), (), now, f"version {order.of} is the newest already", refused=True)
    if not 0 <= order.of < state.version:
        return Decision((), (), now, f"there is no version {order.of}", refused=True)
    current, version = state.round, state.version + 1
    records: tuple[Record, ...] = ()
    effects: tuple[Effect, ...] = ()
    answer = f"version {version} has the parameters of version {order.of}"
    if current is not None and not state.at_rest:
        if current.phase is not Phase.COLLECTING:
            raise LocalProtocolError("an order to restore a version reached the core while it makes one")
        reason = f"the model was rolled back to version {order.of}"
        ended = abort(current.round_id, rules, now, reason)
        records, effects = ended.records, ended.effects
        answer += f"; round {current.round_id.number} was aborted"
    if version >= rules.rounds:
        answer += (
            f"; all {rules.rounds} versions are made: to train on from it, raise round.rounds and start again"
        )
    restored = VersionRestored(version=version, of=order.of, model_digest=order.model_digest)
    return Decision(
        (*records, restored), (*effects, PublishRestored(version=version, of=order.of)), now, answer
    )
