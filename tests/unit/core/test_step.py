from __future__ import annotations

from dataclasses import replace

import pytest

from aggregator.core.events import (
    Aggregate,
    Aggregated,
    AggregationFailed,
    CloseRound,
    Decision,
    Finish,
    PrepareRound,
    PublishManifest,
    PublishVersion,
    Recovered,
    RoundPrepared,
    SendReceipt,
    Tick,
    UpdateArrived,
    VersionPublished,
)
from aggregator.core.records import CheckedIn, RoundAborted, RoundFrozen, RoundOpened, UpdateStored
from aggregator.core.round_rules import RoundRules
from aggregator.core.selection import draw_cohort
from aggregator.core.state import State, apply
from aggregator.core.step import screen, step
from edge_runtime.protocol.errors import LocalProtocolError
from edge_runtime.protocol.ids import DeviceId, RoundId, sha256
from edge_runtime.protocol.rejects import Reject
from edge_runtime.protocol.rounds import Phase, Verdict
from tests.support.round_shell import (
    DEVICES,
    RUN_SEED,
    CheckIn,
    Crash,
    Operation,
    Pass,
    Send,
    Shell,
    Work,
)

RULES = RoundRules(rounds=2, cohort=4, goal=3, minimum=2, deadline_s=20.0, patience_s=10.0)
ONE = RoundId(1, 1)
GATHER, PREPARE = CheckIn(None), Work()


def ran(*operations: Operation, rules: RoundRules = RULES) -> Shell:
    shell = Shell(rules)
    for operation in operations:
        shell.run(operation)
    return shell


def collecting(rules: RoundRules = RULES) -> Shell:
    return ran(GATHER, Pass(0), PREPARE, rules=rules)


def decided(shell: Shell, operation: Operation) -> Decision:
    decision = shell.run(operation)
    assert isinstance(decision, Decision)
    return decision


# ---- opening ----------------------------------------------------------------------------------------


def test_a_round_opens_when_a_full_cohort_has_checked_in() -> None:
    shell = ran(CheckIn(0), CheckIn(1), CheckIn(2))
    waiting = decided(shell, Pass(0))
    assert waiting == Decision(wake_at=shell.now + RULES.retry_s)
    shell.run(CheckIn(3))
    (asked,) = decided(shell, Pass(0)).effects
    assert asked == PrepareRound(
        round_id=ONE, base_version=0, cohort=DEVICES[:4], deadline=shell.now + RULES.deadline_s
    )


def test_the_first_round_waits_for_the_fleet_and_later_ones_do_not() -> None:
    rules = replace(RULES, fleet=6, goal=2)
    shell = ran(*(CheckIn(i) for i in range(5)), rules=rules)
    assert decided(shell, Pass(0)).effects == ()
    shell.run(CheckIn(5))
    assert len(decided(shell, Pass(0)).effects) == 1
    for operation in (PREPARE, Send(0), Send(1), Work(), Work(), *(CheckIn(i) for i in range(4))):
        shell.run(operation)
    assert shell.state.phase is Phase.PUBLISHED
    assert any(isinstance(effect, PrepareRound) for effect in decided(shell, Pass(0)).effects)


def test_an_expired_check_in_is_not_drawn() -> None:
    shell = ran(CheckIn(0, 3.0), CheckIn(1), CheckIn(2), CheckIn(3))
    assert decided(shell, Pass(3.0)).effects == ()
    shell.run(CheckIn(4))
    (asked,) = decided(shell, Pass(0)).effects
    assert isinstance(asked, PrepareRound)
    assert asked.cohort == DEVICES[1:5]


def test_a_ticket_is_used_up_by_the_round_it_was_drawn_for() -> None:
    shell = collecting()
    assert shell.state.round is not None
    assert shell.state.tickets.keys() == set(DEVICES) - shell.state.round.cohort


def test_patience_opens_a_smaller_round_after_the_first() -> None:
    shell = collecting()
    shell.run(Pass(RULES.deadline_s))
    assert shell.state.phase is Phase.ABORTED
    assert len(shell.state.tickets) == 2
    assert decided(shell, Pass(9.0)).effects == ()
    (asked,) = decided(shell, Pass(1.0)).effects
    assert isinstance(asked, PrepareRound)
    assert asked.round_id == RoundId(1, 2)
    assert len(asked.cohort) == RULES.minimum


def test_the_draw_is_reproducible_secret_and_different_every_round() -> None:
    fleet = [DeviceId(f"d{i}") for i in range(50)]
    first = draw_cohort(fleet, 10, RUN_SEED, ONE)
    assert first == draw_cohort(reversed(fleet), 10, RUN_SEED, ONE) == tuple(sorted(first))
    assert len(set(first)) == 10
    assert first != draw_cohort(fleet, 10, RUN_SEED, RoundId(1, 2))
    assert first != draw_cohort(fleet, 10, bytes(32), ONE)
    assert draw_cohort(fleet[:3], 10, RUN_SEED, ONE) == tuple(fleet[:3])


# ---- collecting -------------------------------------------------------------------------------------


def test_the_goal_freezes_the_round_with_the_last_receipt() -> None:
    shell = collecting()
    assert [type(effect) for effect in decided(shell, Send(2)).effects] == [SendReceipt]
    shell.run(Send(0))
    last = decided(shell, Send(1))
    assert [type(record) for record in last.records] == [UpdateStored, RoundFrozen]
    receipt, aggregate = last.effects
    assert isinstance(receipt, SendReceipt)
    assert receipt.verdict is Verdict.STORED
    assert isinstance(aggregate, Aggregate)
    assert shell.state.round is not None
    assert aggregate.accepted == tuple(sorted(shell.state.round.cohort))[:3]


def test_the_deadline_freezes_with_the_minimum() -> None:
    shell = collecting()
    shell.run(Send(0))
    shell.run(Send(1))
    assert decided(shell, Pass(RULES.deadline_s - 1)).records == ()
    assert [type(record) for record in decided(shell, Pass(1)).records] == [RoundFrozen]


def test_the_deadline_aborts_below_the_minimum_and_says_how_many_came() -> None:
    shell = collecting()
    shell.run(Send(0))
    decision = decided(shell, Pass(RULES.deadline_s))
    assert decision.records == (
        RoundAborted(round_id=ONE, reason="1 of at least 2 updates at the deadline", at=shell.now),
    )
    assert decision.effects == (CloseRound(round_id=ONE),)


def test_screening_settles_what_the_header_alone_can_settle() -> None:
    shell = collecting()
    current = shell.state.round
    assert current is not None
    inside, outside = min(current.cohort), min(set(DEVICES) - current.cohort)
    manifest, digest = current.manifest_digest, sha256(b"update")
    assert screen(State(), inside, ONE, manifest, digest) is Reject.WRONG_ROUND
    assert screen(shell.state, inside, RoundId(1, 2), manifest, digest) is Reject.WRONG_ROUND
    assert screen(shell.state, inside, RoundId(1, 0), manifest, digest) is Verdict.LATE
    assert screen(shell.state, inside, ONE, sha256(b"other"), digest) is Reject.WRONG_MANIFEST
    assert screen(shell.state, inside, ONE, None, digest) is Reject.WRONG_MANIFEST
    assert screen(shell.state, outside, ONE, manifest, digest) is Reject.NOT_SELECTED
    assert screen(shell.state, inside, ONE, manifest, digest) is None


def test_a_duplicate_gets_the_same_answer_in_every_phase_and_other_bytes_are_refused() -> None:
    shell = collecting()
    current = shell.state.round
    assert current is not None
    for operation in (Send(0), Send(1), Send(2), Work(), Work()):
        shell.run(operation)
        device, stored = next(iter(shell.state.stored.items()))
        assert screen(shell.state, device, ONE, current.manifest_digest, stored.digest) is Verdict.STORED
        assert screen(shell.state, device, ONE, current.manifest_digest, sha256(b"?")) is Reject.CONFLICTING
    assert shell.state.phase is Phase.PUBLISHED


def test_a_late_update_is_refused_and_not_counted() -> None:
    shell = collecting()
    for i in range(3):
        shell.run(Send(i))
    assert shell.run(Send(3)) is Verdict.LATE
    assert len(shell.state.stored) == 3


# ---- closing ----------------------------------------------------------------------------------------


def test_a_version_is_committed_then_published_and_the_last_finishes() -> None:
    shell = collecting(replace(RULES, rounds=1))
    for i in range(3):
        shell.run(Send(i))
    assert decided(shell, Work()).effects == (PublishVersion(round_id=ONE, version=1),)
    shell.run(Work())
    assert shell.state.phase is Phase.PUBLISHED
    assert decided(shell, Pass(0)) == Decision((), (Finish(round_id=ONE, version=1),))


def test_a_failed_aggregation_aborts_and_the_next_round_has_the_next_number() -> None:
    shell = collecting()
    for i in range(3):
        shell.run(Send(i))
    shell.run(Work(fails=True))
    assert shell.state.phase is Phase.ABORTED
    assert shell.closed == [ONE]
    shell.run(GATHER)
    (asked,) = decided(shell, Pass(0)).effects
    assert isinstance(asked, PrepareRound)
    assert (asked.round_id, asked.base_version) == (RoundId(1, 2), 0)


@pytest.mark.parametrize(
    ("before", "effect"),
    [
        ([], PublishManifest),
        ([Send(0), Send(1), Send(2)], Aggregate),
        ([Send(0), Send(1), Send(2), Work()], PublishVersion),
        ([Send(0), Send(1), Send(2), Work(), Work(), GATHER], PrepareRound),
        ([Pass(20.0), GATHER], PrepareRound),
    ],
)
def test_recovery_asks_again_for_what_the_phase_still_needs(before: list[Operation], effect: type) -> None:
    shell = collecting()
    for operation in before:
        shell.run(operation)
    decision = decided(shell, Crash())
    assert decision.records == ()
    assert [type(asked) for asked in decision.effects] == [effect]


@pytest.mark.parametrize(
    "event",
    [
        Aggregated(round_id=ONE, model_digest=sha256(b"m")),
        AggregationFailed(round_id=ONE, reason=""),
        VersionPublished(round_id=ONE),
        UpdateArrived(
            UpdateStored(device=DEVICES[0], round_id=RoundId(1, 2), digest=sha256(b"u"), samples=1)
        ),
        UpdateArrived(
            UpdateStored(device=DeviceId("stranger"), round_id=ONE, digest=sha256(b"u"), samples=1)
        ),
    ],
)
def test_an_event_out_of_turn_is_our_own_bug(
    event: Aggregated | AggregationFailed | VersionPublished | UpdateArrived,
) -> None:
    shell = collecting()
    with pytest.raises(LocalProtocolError):
        step(shell.state, RULES, RUN_SEED, shell.now, event)


def test_a_second_round_cannot_open_beside_an_open_one() -> None:
    shell = collecting()
    again = RoundPrepared(
        RoundOpened(
            round_id=RoundId(1, 2),
            base_version=0,
            cohort=DEVICES[:4],
            deadline=shell.now,
            manifest=b"m",
            manifest_digest=sha256(b"m"),
        )
    )
    with pytest.raises(LocalProtocolError):
        shell.send(again)
    assert shell.state.round is not None
    assert shell.state.round.round_id == ONE


def test_the_step_never_changes_the_state() -> None:
    shell = collecting()
    before = repr(shell.state)
    for event in (Tick(), Recovered()):
        step(shell.state, RULES, RUN_SEED, shell.now + 100, event)
    assert repr(shell.state) == before


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"rounds": 0}, "rounds"),
        ({"minimum": 0}, "minimum"),
        ({"goal": 5}, "goal"),
        ({"minimum": 4}, "minimum"),
        ({"deadline_s": 0.0}, "deadline_s"),
        ({"deadline_s": float("inf")}, "deadline_s"),
        ({"deadline_s": float("nan")}, "deadline_s"),
        ({"fleet": -1}, "fleet"),
        ({"patience_s": -1.0}, "patience_s"),
        ({"retry_s": 0.0}, "retry_s"),
    ],
)
def test_bad_rules_are_named(change: dict[str, int], problem: str | None) -> None:
    found = replace(RULES, **change).problem()
    assert (found is None) if problem is None else (found is not None and problem in found)


# ---- the fold ---------------------------------------------------------------------------------------


def test_a_journal_that_contradicts_itself_does_not_fold() -> None:
    shell = collecting()
    for i in range(3):
        shell.run(Send(i))
    opened = next(record for record in shell.journal if isinstance(record, RoundOpened))
    stored = next(record for record in shell.journal if isinstance(record, UpdateStored))
    for bad in (
        opened,
        stored,
        RoundFrozen(round_id=ONE, accepted=()),
        replace(stored, round_id=RoundId(1, 9)),
    ):
        with pytest.raises(LocalProtocolError):
            apply(shell.state, bad)


def test_a_new_check_in_replaces_the_devices_ticket() -> None:
    state = State()
    for sequence in (1, 2):
        apply(
            state,
            CheckedIn(device=DEVICES[0], sequence=sequence, expires_at=9.0, samples=1, codecs=()),
        )
    assert [ticket.sequence for ticket in state.tickets.values()] == [2]


def test_a_raised_generation_aborts_the_open_round_and_counts_on() -> None:
    shell = collecting()
    shell.state.generation = 2
    decision = step(shell.state, RULES, RUN_SEED, 1.0, Recovered())
    (record,) = decision.records
    assert record == RoundAborted(round_id=ONE, reason="the generation was raised", at=1.0)
    apply(shell.state, record)
    for device in DEVICES:
        apply(
            shell.state, CheckedIn(device=device, sequence=1, expires_at=1e9, samples=1, codecs=("float32",))
        )
    (effect,) = step(shell.state, RULES, RUN_SEED, 2.0, Tick()).effects
    assert isinstance(effect, PrepareRound)
    assert effect.round_id == RoundId(2, 2)


def test_a_round_prepared_out_of_turn_is_our_own_bug() -> None:
    shell = collecting()
    prepared = RoundPrepared(
        RoundOpened(
            round_id=RoundId(1, 2),
            base_version=0,
            cohort=tuple(DEVICES[:4]),
            deadline=9.0,
            manifest=b"m",
            manifest_digest=sha256(b"m"),
        )
    )
    with pytest.raises(LocalProtocolError, match="out of turn"):
        step(shell.state, RULES, RUN_SEED, 1.0, prepared)


@pytest.mark.parametrize(
    ("available", "selected", "goal", "minimum"),
    [(5, 5, 4, 3), (10, 5, 4, 3), (20, 8, 6, 4), (1000, 400, 320, 240)],
)
def test_a_share_of_a_large_fleet_is_selected_and_goal_and_minimum_grow_with_it(
    available: int, selected: int, goal: int, minimum: int
) -> None:
    rules = RoundRules(cohort=5, goal=4, minimum=3, share=0.4)
    assert rules.size_of(available) == selected
    assert (rules.goal_of(selected), rules.minimum_of(selected)) == (goal, minimum)


def test_a_round_of_fewer_devices_than_a_cohort_asks_for_no_more_than_there_are() -> None:
    rules = RoundRules(cohort=5, goal=4, minimum=2)
    assert (rules.goal_of(3), rules.minimum_of(3)) == (3, 2)
