"""Orders in the pure core: what they change at once, what they leave alone, and how they meet an open round."""

from __future__ import annotations

from dataclasses import replace

import pytest

from aggregator.core.events import (
    Aggregate,
    CheckInArrived,
    CloseRound,
    Decision,
    DrainOrdered,
    Exit,
    PauseOrdered,
    PrepareRound,
    PublishRestored,
    Recovered,
    RepeatManifest,
    RestoreOrdered,
    ResumeOrdered,
    RevocationsRead,
    SendReceipt,
    Tick,
)
from aggregator.core.records import (
    Drained,
    Evicted,
    RoundAborted,
    RoundFrozen,
    VersionCommitted,
    VersionRestored,
)
from aggregator.core.round_rules import RoundRules
from aggregator.core.state import State
from aggregator.core.step import barred, screen, step
from edge_runtime.protocol.errors import LocalProtocolError
from edge_runtime.protocol.ids import RoundId, sha256
from edge_runtime.protocol.rejects import Reject
from edge_runtime.protocol.rounds import Phase, Verdict
from tests.support.round_shell import (
    DEVICES,
    RUN_SEED,
    CheckIn,
    Evict,
    Obey,
    Operation,
    Pass,
    Readmit,
    Revoke,
    Rollback,
    Send,
    Shell,
    Work,
)

# All six check in and are drawn, so the cohort is DEVICES.
RULES = RoundRules(rounds=9, cohort=6, goal=4, minimum=2, deadline_s=20.0, patience_s=10.0)
GATHER, PREPARE = CheckIn(None), Work()
A_ROUND = (GATHER, Pass(0), PREPARE, Send(0), Send(1), Send(2), Send(3), Work(), Work())


def ran(*operations: Operation, rules: RoundRules = RULES) -> Shell:
    shell = Shell(rules)
    for operation in operations:
        shell.run(operation)
    return shell


def collecting(*operations: Operation, rules: RoundRules = RULES) -> Shell:
    shell = ran(GATHER, Pass(0), PREPARE, *operations, rules=rules)
    assert shell.state.round is not None
    assert shell.state.round.cohort == set(DEVICES)
    return shell


def decided(shell: Shell, operation: Operation) -> Decision:
    decision = shell.run(operation)
    assert isinstance(decision, Decision)
    return decision


# ---- pause, resume, drain ---------------------------------------------------------------------------


def test_the_open_round_of_a_paused_federation_ends_normally_and_no_other_opens() -> None:
    shell = collecting(Obey(PauseOrdered()), Send(0), Send(1), Send(2), Send(3), Work(), Work(), GATHER)
    assert (shell.state.phase, shell.state.version) == (Phase.PUBLISHED, 1)
    assert decided(shell, Pass(100.0)) == Decision(wake_at=shell.now + RULES.retry_s)
    shell.run(GATHER)
    shell.run(Obey(ResumeOrdered()))
    assert [type(effect) for effect in decided(shell, Pass(0)).effects] == [PrepareRound]


def test_a_drain_ends_the_program_when_the_round_is_over_and_does_not_outlast_that() -> None:
    shell = collecting(Obey(DrainOrdered()))
    assert decided(shell, Pass(1.0)).effects == ()
    shell.run(Pass(RULES.deadline_s))
    assert shell.state.phase is Phase.ABORTED
    last = decided(shell, Pass(1.0))
    assert (last.records, last.effects) == ((Drained(at=shell.now),), (Exit(),))
    shell.run(GATHER)
    assert [type(effect) for effect in decided(shell, Pass(0)).effects] == [PrepareRound]


def test_a_drain_goes_on_after_a_restart_and_a_resume_calls_it_off() -> None:
    shell = ran(GATHER, Obey(DrainOrdered()))
    assert step(shell.state, RULES, RUN_SEED, shell.now, Recovered()).effects == (Exit(),)
    shell.run(Obey(ResumeOrdered()))
    assert [type(effect) for effect in decided(shell, Pass(0)).effects] == [PrepareRound]


def test_a_finished_federation_can_be_drained() -> None:
    shell = ran(*A_ROUND, rules=replace(RULES, rounds=1))
    assert [type(effect).__name__ for effect in decided(shell, Pass(0)).effects] == ["Finish"]
    shell.run(Obey(DrainOrdered()))
    assert decided(shell, Pass(0)).effects == (Exit(),)


def test_a_round_prepared_against_an_order_is_our_own_bug() -> None:
    shell = ran(GATHER, Pass(0))
    shell.send(PauseOrdered())
    with pytest.raises(LocalProtocolError, match="before an order against it"):
        shell.run(PREPARE)


# ---- evict, readmit ---------------------------------------------------------------------------------


def test_an_evicted_devices_update_is_left_out_of_the_sum_and_has_its_outcome() -> None:
    shell = collecting(Send(0), Send(1), Evict(0), Send(2), Send(3))
    assert shell.state.phase is Phase.COLLECTING, "an excluded update does not count towards the goal"
    shell.run(Send(4))
    frozen = shell.journal[-1]
    assert frozen == RoundFrozen(round_id=RoundId(1, 1), accepted=DEVICES[1:5])
    shell.run(Work())
    committed = shell.journal[-1]
    assert isinstance(committed, VersionCommitted)
    assert committed.excluded == ((DEVICES[0], Reject.EVICTED),)


def test_a_loss_and_an_eviction_in_one_round_are_excluded_each_for_its_reason() -> None:
    shell = collecting(Send(0), Evict(0), Send(1), Send(2), Send(3), Send(4), Work(loses_first=True))
    committed = shell.journal[-1]
    assert isinstance(committed, VersionCommitted)
    assert committed.excluded == ((DEVICES[0], Reject.EVICTED), (DEVICES[1], Reject.BAD_SEAL))


def test_the_goal_falls_with_the_devices_that_can_no_longer_send() -> None:
    shell = collecting(Send(0), Send(1), Evict(5), Evict(4))
    assert shell.state.phase is Phase.COLLECTING
    decision = decided(shell, Evict(3))
    assert shell.state.phase is Phase.COLLECTING, "device 2 may still send"
    assert [type(record) for record in decision.records] == [Evicted]
    decision = decided(shell, Evict(2))
    assert [type(record) for record in decision.records] == [Evicted, RoundFrozen]
    assert [type(effect) for effect in decision.effects] == [Aggregate]


def test_no_eviction_takes_a_round_below_its_minimum() -> None:
    shell = collecting(Send(0), *(Evict(i) for i in range(1, 6)))
    assert shell.state.phase is Phase.COLLECTING
    assert isinstance(decided(shell, Pass(RULES.deadline_s)).records[0], RoundAborted)


def test_a_readmitted_devices_stored_update_counts_again_and_may_reach_the_goal() -> None:
    shell = collecting(Send(0), Send(1), Evict(0), Send(2), Send(3))
    decision = decided(shell, Readmit(0))
    assert decision.records[1] == RoundFrozen(round_id=RoundId(1, 1), accepted=DEVICES[:4])
    assert [type(effect) for effect in decision.effects] == [Aggregate, RepeatManifest]


def test_an_evicted_device_is_told_so_but_what_is_stored_of_it_stays_stored() -> None:
    shell = collecting(Send(0), Evict(0), Evict(1))
    assert shell.run(Send(0)) is Verdict.STORED
    assert shell.run(Send(0, content=1)) is Reject.CONFLICTING
    assert shell.run(Send(1)) is Reject.EVICTED
    assert shell.run(CheckIn(1)) is Reject.EVICTED
    assert len([r for r in shell.receipts if isinstance(r, SendReceipt)]) == 1


def test_a_barred_check_in_that_reaches_the_core_is_our_own_bug() -> None:
    shell = ran(Evict(0))
    assert barred(shell.state, DEVICES[0], 1) is Reject.EVICTED
    arrived = CheckInArrived(device=DEVICES[0], sequence=1, ttl_s=1.0, samples=1, codecs=())
    with pytest.raises(LocalProtocolError, match="EVICTED"):
        step(shell.state, RULES, RUN_SEED, 1.0, arrived)


# ---- revocations ------------------------------------------------------------------------------------


def test_a_revoked_certificate_loses_its_ticket_and_a_later_one_does_not() -> None:
    shell = ran(GATHER, Revoke(0, enrols_again=True), CheckIn(0), Revoke(1))
    assert shell.state.tickets.keys() == set(DEVICES) - {DEVICES[1]}
    assert shell.state.tickets[DEVICES[0]].epoch == 2
    assert shell.run(CheckIn(1)) is Reject.REVOKED
    assert barred(shell.state, DEVICES[1], 2) is None


@pytest.mark.parametrize("open_round", [True, False])
def test_a_list_comes_between_rounds_and_never_goes_back(open_round: bool) -> None:
    shell = collecting() if open_round else ran(Revoke(0))
    with pytest.raises(LocalProtocolError, match="out of turn"):
        step(shell.state, RULES, RUN_SEED, 1.0, RevocationsRead(number=1, revoked=()))


# ---- rollback ---------------------------------------------------------------------------------------


def test_a_rollback_at_rest_is_a_new_version_and_the_next_round_starts_from_it() -> None:
    shell = ran(*A_ROUND, *A_ROUND)
    decision = decided(shell, Rollback(1))
    (record,) = decision.records
    assert isinstance(record, VersionRestored)
    assert (record.version, record.of) == (3, 1)
    assert decision.effects == (PublishRestored(version=3, of=1),)
    assert decision.answer == "version 3 has the parameters of version 1"
    shell.run(GATHER)
    (asked,) = decided(shell, Pass(0)).effects
    assert isinstance(asked, PrepareRound)
    assert asked.base_version == 3


def test_a_rollback_that_makes_the_last_version_says_how_training_goes_on() -> None:
    shell = ran(*A_ROUND, *A_ROUND, rules=replace(RULES, rounds=3))
    assert "raise round.rounds" in decided(shell, Rollback(1)).answer


def test_a_rollback_aborts_an_open_round_in_the_same_commit() -> None:
    shell = ran(*A_ROUND, GATHER, Pass(0), PREPARE, Send(0))
    decision = decided(shell, Rollback(1))
    assert [type(record) for record in decision.records] == [RoundAborted, VersionRestored]
    assert [type(effect) for effect in decision.effects] == [CloseRound, PublishRestored]
    assert decision.answer.endswith("; round 2 was aborted")


def test_the_files_of_a_restored_version_are_asked_for_again_until_a_round_has_opened_on_it() -> None:
    shell = ran(*A_ROUND, Rollback(1))
    recovered = step(shell.state, RULES, RUN_SEED, shell.now, Recovered())
    assert recovered.effects == (PublishRestored(version=2, of=0),)
    for operation in (GATHER, Pass(0), PREPARE, Pass(RULES.deadline_s)):
        shell.run(operation)
    assert shell.state.phase is Phase.ABORTED
    again = step(shell.state, RULES, RUN_SEED, shell.now, Recovered())
    assert not any(isinstance(effect, PublishRestored) for effect in again.effects)


@pytest.mark.parametrize(
    ("of", "complaint"), [(1, "newest already"), (2, "no version 2"), (-1, "no version -1")]
)
def test_a_rollback_to_nowhere_is_refused(of: int, complaint: str) -> None:
    shell = ran(*A_ROUND)
    decision = shell.send(RestoreOrdered(of=of, model_digest=sha256()))
    assert decision.refused
    assert complaint in decision.answer
    assert (decision.records, decision.effects) == ((), ())


def test_a_rollback_in_the_middle_of_a_sum_is_our_own_bug() -> None:
    shell = collecting(Send(0), Send(1), Send(2), Send(3))
    assert shell.state.phase is Phase.FROZEN
    shell.state.version = 1
    with pytest.raises(LocalProtocolError, match="while it makes one"):
        shell.send(RestoreOrdered(of=0, model_digest=sha256()))


def test_a_state_without_orders_bars_nobody() -> None:
    assert barred(State(), DEVICES[0], 0) is None
    assert step(State(), RULES, RUN_SEED, 1.0, Tick()) == Decision(wake_at=1.0 + RULES.retry_s)
    assert screen(State(), DEVICES[0], RoundId(1, 1), None, sha256()) is Reject.WRONG_ROUND
