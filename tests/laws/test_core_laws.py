"""Any interleaving of events, time and crashes keeps the laws of a round."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings

from aggregator.core.events import Decision, PrepareRound
from aggregator.core.records import (
    Record,
    RoundAborted,
    RoundFrozen,
    RoundOpened,
    RoundPublished,
    UpdateStored,
    VersionCommitted,
    VersionRestored,
)
from aggregator.core.round_rules import RoundRules
from aggregator.core.state import State, apply, fold
from aggregator.core.step import barred, screen
from edge_runtime.protocol.ids import DeviceId, sha256
from edge_runtime.protocol.rejects import Reject
from edge_runtime.protocol.rounds import MOVES, Phase, Verdict
from tests.support.round_shell import Operation, Pass, Shell, operations, operations_and_orders, rules

ENDED = (None, Phase.PUBLISHED, Phase.ABORTED)


@settings(max_examples=150, deadline=None)
@given(rules(), operations | operations_and_orders)
def test_any_interleaving_keeps_the_moves_legal_and_recovery_equal(
    rules: RoundRules, operations: list[Operation]
) -> None:
    shell = Shell(rules)
    shell.recover = lambda: fold(State(), shell.journal)
    for operation in operations:
        before, phase = shell.state.round, shell.state.phase
        decision = shell.run(operation)
        after = shell.state.round
        if before is not None and after is not None:
            if after.round_id == before.round_id:
                assert after.phase in (phase, *MOVES[before.phase], *_two_moves(before.phase))
            else:
                assert after.round_id > before.round_id
                assert phase in ENDED
        if isinstance(operation, Pass) and isinstance(decision, Decision):
            _check_tick(shell, decision)
        _check_screening(shell)
        assert shell.state == fold(State(), shell.journal)
    _check_journal(shell)


def _two_moves(phase: Phase) -> list[Phase]:
    return [later for move in MOVES[phase] for later in MOVES[move]]


def _check_tick(shell: Shell, decision: Decision) -> None:
    state, rules = shell.state, shell.rules
    assert state.round is None or state.phase is not Phase.COLLECTING or shell.now < state.round.deadline
    tickets = sum(ticket.expires_at > shell.now for ticket in state.tickets.values())
    prepares = any(isinstance(effect, PrepareRound) for effect in decision.effects)
    opened_next = state.at_rest and not decision.records and state.version < rules.rounds
    if state.paused:
        assert not prepares
        return
    if opened_next and state.idle_since is not None:
        patient = shell.now - state.idle_since < rules.patience_s
        assert prepares == (tickets >= (rules.cohort if patient else rules.minimum))


def _check_screening(shell: Shell) -> None:
    state = shell.state
    if state.round is None:
        return
    for device, stored in state.stored.items():
        known = (state, device, state.round.round_id, state.round.manifest_digest)
        assert screen(*known, stored.digest) is Verdict.STORED
        assert screen(*known, sha256(b"other bytes")) is Reject.CONFLICTING


def _check_journal(shell: Shell) -> None:
    rules, journal = shell.rules, shell.journal
    opened = {record.round_id: record for record in journal if isinstance(record, RoundOpened)}
    stored = Counter((r.round_id, r.device) for r in journal if isinstance(r, UpdateStored))
    frozen = {record.round_id: record.accepted for record in journal if isinstance(record, RoundFrozen)}
    ends = Counter(r.round_id for r in journal if isinstance(r, VersionCommitted | RoundAborted))
    versions = [r.version for r in journal if isinstance(r, VersionCommitted | VersionRestored)]

    assert all(count == 1 for count in stored.values()), "an update was stored twice"
    assert all(count == 1 for count in ends.values()), "a stored update has two outcomes"
    assert versions == list(range(1, len(versions) + 1))
    assert all(r.version <= rules.rounds for r in journal if isinstance(r, VersionCommitted))
    assert {(r.round_id, r.device) for r in shell.receipts} == set(stored)
    for round_id, accepted in frozen.items():
        cohort = opened[round_id].cohort
        assert set(accepted) <= set(cohort)
        assert rules.minimum <= len(accepted) <= min(rules.goal, len(cohort))
    for record in opened.values():
        assert rules.minimum <= len(record.cohort) <= rules.cohort
        assert record.cohort == tuple(sorted(set(record.cohort)))
    published = [record.round_id for record in journal if isinstance(record, RoundPublished)]
    assert len(published) == len(set(published))
    unfinished = [of for of in opened if of not in ends]
    assert unfinished in ([], [max(opened, default=None)])
    _check_orders(journal)


def _check_orders(journal: list[Record]) -> None:
    """Read along with the journal: who is barred, what is paused, at each record."""
    state, stored = State(), set[DeviceId]()
    left_out: set[DeviceId] = set()
    for record in journal:
        match record:
            case RoundOpened():
                assert not state.paused
                assert not state.draining
                for device in record.cohort:
                    assert barred(state, device, state.tickets[device].epoch) is None
                stored = set()
            case UpdateStored():
                assert record.device not in state.evicted
                stored.add(record.device)
            case RoundFrozen():
                left_out = stored & state.evicted
                assert record.accepted == tuple(sorted(stored - left_out))
            case VersionCommitted():
                evicted = {device for device, reason in record.excluded if reason is Reject.EVICTED}
                assert evicted == left_out
                assert len(record.excluded) == len({device for device, _ in record.excluded})
            case _:
                pass
        apply(state, record)
        assert not state.evicted & state.tickets.keys()
