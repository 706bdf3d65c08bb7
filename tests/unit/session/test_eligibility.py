"""What a device says and does while its owner's policy forbids it to train, and how it comes back."""

from __future__ import annotations

from edge_runtime.protocol.ids import RoundId
from edge_runtime.protocol.kinds import Kind
from edge_runtime.protocol.rounds import FederationState, Verdict
from edge_runtime.session import RETURN_WITHIN_S
from edge_runtime.session_values import (
    Eligibility,
    Journal,
    PauseTraining,
    SendUpdate,
    StopTraining,
    Train,
    TrainingPaused,
    Work,
)
from tests.support.session_driver import Aggregator, Device, messages, ready, training

STOP, GO, METERED = Eligibility(False), Eligibility(True), Eligibility(False, may_send=False)


def trains(device: Device) -> list[Train]:
    return [effect for effect in device.effects if isinstance(effect, Train)]


def test_a_device_that_is_not_eligible_says_nothing_and_fetches_nothing() -> None:
    device = Device(Aggregator())
    device.handle(STOP)
    device.connect()
    device.hear_manifest(device.aggregator.manifest(1, FederationState.WAITING))
    device.hear_manifest(device.aggregator.manifest(2))
    device.wait(10_000)
    assert not messages(device.effects)
    assert not device.subscribed
    assert device.highest == RoundId(1, 2)  # but it keeps up with the rounds


def test_it_comes_back_at_a_random_moment_with_a_check_in_and_takes_part() -> None:
    device, moments = ready(), set()
    for _ in range(8):
        device.handle(STOP)
        device.wait(100)
        assert not device.checkins(device.handle(GO))
        before = device.now
        while not device.checkins(device.wait(0.25)):
            pass
        moments.add(device.now - before)
    assert len(moments) > 4
    assert max(moments) <= RETURN_WITHIN_S + 0.25
    device.hear_manifest(device.aggregator.manifest(2))
    device.fetch_all()
    assert device.session.work is Work.TRAINING


def test_a_policy_that_flaps_begins_the_wait_anew() -> None:
    device = ready()
    for _ in range(10):
        device.handle(STOP)
        assert not messages(device.handle(GO))
    device.handle(STOP)
    assert not messages(device.wait(10 * RETURN_WITHIN_S))


def test_training_is_paused_and_taken_up_in_the_same_round_without_fetching_again() -> None:
    device = training()
    (train,) = trains(device)
    effects = device.handle(STOP)
    assert effects == [PauseTraining()]
    assert device.session.work is Work.IDLE
    assert device.handle(TrainingPaused(train)) == []
    device.wait(3600)
    device.handle(GO)
    effects = device.wait(RETURN_WITHIN_S)
    assert trains(device) == [train, train]
    assert not device.fetches(effects)
    assert not device.checkins(effects)
    device.trained()
    assert len(device.updates()) == 1


def test_a_paused_training_whose_model_is_not_handed_back_fetches_it_again() -> None:
    device = training()
    device.handle(STOP)
    device.handle(GO)
    device.wait(RETURN_WITHIN_S)
    device.fetch_all()
    first, second = trains(device)
    assert first == second


def test_a_round_that_ended_meanwhile_is_dropped_and_the_next_is_taken() -> None:
    device = training()
    (train,) = trains(device)
    device.handle(STOP)
    device.handle(TrainingPaused(train))
    effects = device.hear_manifest(device.aggregator.manifest(2))
    assert not [effect for effect in effects if isinstance(effect, StopTraining)]  # it has stopped already
    device.handle(GO)
    device.wait(RETURN_WITHIN_S)
    device.fetch_all()
    assert trains(device)[-1].manifest.round_id == RoundId(1, 2)


def test_a_late_word_of_a_pause_does_not_bring_an_old_model_back() -> None:
    device = training()
    (train,) = trains(device)
    device.hear_manifest(device.aggregator.manifest(2, model=b"other model." * 1000))
    assert device.handle(TrainingPaused(train)) == []
    device.fetch_all()
    assert trains(device)[-1].model == b"other model." * 1000


def test_half_a_fetch_is_given_up_and_begun_again() -> None:
    device = ready()
    device.hear_manifest(device.aggregator.manifest(1))
    device.handle(STOP)
    assert not device.subscribed
    assert device.session.work is Work.IDLE
    device.handle(GO)
    device.wait(RETURN_WITHIN_S)
    device.fetch_all()
    assert device.session.work is Work.TRAINING


def test_a_finished_update_is_sent_and_answered_all_the_same() -> None:
    device = training()
    device.disconnect()
    (journal,) = [effect for effect in device.trained() if isinstance(effect, Journal)]
    device.handle(STOP)
    effects = device.connect()
    assert [type(effect) for effect in effects] == [SendUpdate]
    device.hear(device.aggregator.receipt(journal.entry, Verdict.STORED))
    assert device.session.pending is None
    assert not device.checkins(device.wait(10_000))


def test_on_a_metered_network_a_finished_update_waits_for_another_one() -> None:
    device = training()
    device.handle(METERED)
    assert device.session.work is Work.IDLE
    device = training()
    device.disconnect()
    device.trained()
    device.handle(METERED)
    device.connect()
    assert not messages(device.wait(10_000))
    assert device.sent(Kind.UPDATE, device.handle(STOP))  # too hot to train now, but no longer metered


def test_nothing_is_sent_or_asked_for_offline_and_the_return_waits_for_the_connection() -> None:
    device = ready()
    device.disconnect()
    device.handle(STOP)
    device.handle(GO)
    assert not messages(device.wait(1000))
    assert device.session.wake_at() is None
    assert len(device.checkins(device.connect())) == 1
