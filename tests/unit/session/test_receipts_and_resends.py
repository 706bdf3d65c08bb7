from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from edge_runtime.protocol.envelope import unpack
from edge_runtime.protocol.ids import DeviceId, RoundId, sha256
from edge_runtime.protocol.kinds import Kind
from edge_runtime.protocol.rejects import Reject
from edge_runtime.protocol.rounds import FederationState, Verdict
from edge_runtime.session import RESEND_BASE_S, RESEND_CAP_S
from edge_runtime.session_values import (
    Connected,
    FederationFinished,
    Refused,
    SendUpdate,
    Settle,
    StopTraining,
    Tick,
    Train,
    Trained,
    UpdateSent,
    Work,
)
from tests.support.session_driver import (
    FEDERATION,
    OTHER,
    TTL_S,
    Aggregator,
    Device,
    an_update,
    messages,
    ready,
    signing_key,
    training,
    waiting_for_receipt,
)

ROUND = RoundId(1, 1)


def _entry(device: Device):  # type: ignore[no-untyped-def]
    return device.journal[ROUND]


# ---- resends ----------------------------------------------------------------------------------------


def test_an_update_without_a_receipt_is_sent_again_byte_for_byte() -> None:
    device = waiting_for_receipt()
    device.wait(3600)
    copies = device.updates()
    assert len(copies) > 20
    assert len(set(copies)) == 1
    assert device.session.resends == len(copies) - 1


def test_the_pause_between_resends_grows_to_its_bound() -> None:
    device = waiting_for_receipt()
    pauses = []
    for _ in range(40):
        before = device.now
        wake = device.session.wake_at()
        assert wake is not None
        device.wait(wake - device.now)
        pauses.append(device.now - before)
    assert all(RESEND_BASE_S / 2 <= pause < RESEND_BASE_S / 2 + RESEND_CAP_S for pause in pauses)
    assert pauses[0] < RESEND_BASE_S / 2 + 2 * RESEND_BASE_S
    assert max(pauses) > 10 * RESEND_BASE_S


@pytest.mark.parametrize("upload_s", [0.0, 20.0, 600.0])
def test_the_pause_is_counted_from_the_end_of_an_upload_and_grows_with_it(upload_s: float) -> None:
    device = training()
    device.upload_s = upload_s
    device.trained()
    pauses = []
    for _ in range(40):
        wake = device.session.wake_at()
        assert wake is not None
        pauses.append(wake - device.now)
        device.wait(wake - device.now)
    bound = RESEND_BASE_S / 2 + max(RESEND_CAP_S, upload_s)
    assert all(RESEND_BASE_S / 2 <= pause < bound for pause in pauses)
    assert max(pauses) > 0.7 * bound


def test_an_update_is_not_sent_again_while_it_leaves() -> None:
    device = training()
    trained = Trained(ROUND, an_update())
    session = device.session
    sending = session.handle(device.now, trained)[-1]
    assert isinstance(sending, SendUpdate)
    for later in (1.0, 10.0, 1000.0):
        assert session.handle(device.now + later, Tick()) == []
    assert session.handle(device.now + 1001.0, UpdateSent(RoundId(1, 7), 0.0)) == []  # not of this update
    assert session.handle(device.now + 1002.0, Tick()) == []
    assert session.handle(device.now + 1003.0, UpdateSent(ROUND, 1003.0)) == []
    assert session.handle(device.now + 3003.0, Tick())[0].messages == sending.messages


def test_over_a_link_that_drops_after_each_second_piece_every_piece_arrives() -> None:
    """Each sending begins at another piece, with the same bytes."""
    device = training()
    device.trained(an_update(bytes(80_000)))
    pieces = _entry(device).messages
    assert len(pieces) == 10
    arrived = set()
    for _ in range(60):
        mark = len(device.effects)
        device.disconnect()
        device.connect(session_present=True)
        device.wait(RESEND_BASE_S)
        arrived.update(device.updates(device.effects[mark:])[:2])
    assert arrived == {piece.payload for piece in pieces}
    starts = [e.messages[0].payload for e in device.effects if isinstance(e, SendUpdate)]
    assert len(set(starts)) == 10


def test_a_lost_connection_makes_it_send_again_soon() -> None:
    device = waiting_for_receipt()
    device.disconnect()
    assert device.wait(3600) == []
    assert device.session.wake_at() is None
    again = device.connect(session_present=False) + device.wait(RESEND_BASE_S)
    assert device.updates(again)[0] == _entry(device).messages[0].payload


def test_what_was_trained_offline_is_journalled_and_sent_at_the_connection() -> None:
    device = training()
    device.disconnect()
    effects = device.trained()
    assert not messages(effects)
    assert ROUND in device.journal
    assert device.updates(device.connect()) == [_entry(device).messages[0].payload]


def test_a_restart_sends_the_journalled_bytes_and_does_not_train_again() -> None:
    device = waiting_for_receipt()
    before = device.updates()
    device.restart()
    mark = len(device.effects)
    device.connect()
    device.hear_manifest(device.aggregator.manifest(1))
    device.wait(60)
    assert set(device.updates(device.effects[mark:])) == set(before)
    assert not any(isinstance(effect, Train) for effect in device.effects[mark:])
    device.hear(device.aggregator.receipt(_entry(device)))
    assert device.settled == ROUND


def test_a_restart_before_the_journal_trains_again_and_nothing_was_sent() -> None:
    device = training()
    assert not device.updates()
    device.restart()
    device.connect()
    device.hear_manifest(device.aggregator.manifest(1))
    device.fetch_all()
    assert device.session.work is Work.TRAINING


# ---- receipts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdict", "reject"),
    [(Verdict.STORED, None), (Verdict.LATE, None), (Verdict.REJECTED, Reject.NOT_FINITE)],
)
def test_any_verdict_settles_the_update_and_a_check_in_follows(
    verdict: Verdict, reject: Reject | None
) -> None:
    device = waiting_for_receipt()
    effects = device.hear(device.aggregator.receipt(_entry(device), verdict, reject))
    assert effects[0] == Settle(ROUND, verdict, reject)
    assert len(device.checkins(effects)) == 1
    assert not device.updates(device.wait(TTL_S))


def test_a_settled_round_is_not_trained_again() -> None:
    device = waiting_for_receipt()
    device.hear(device.aggregator.receipt(_entry(device)))
    for published in (device.aggregator.manifest(1), device.aggregator.manifest(1, chunk_bytes=16_384)):
        device.hear_manifest(published)
        assert device.session.work is Work.IDLE
    device.restart()
    device.connect()
    device.hear_manifest(device.aggregator.manifest(1))
    assert device.session.work is Work.IDLE
    assert len([effect for effect in device.effects if isinstance(effect, Train)]) == 1


def test_a_receipt_twice_is_harmless() -> None:
    device = waiting_for_receipt()
    receipt = device.aggregator.receipt(_entry(device))
    device.hear(receipt)
    assert device.hear(receipt) == []


def test_a_receipt_in_the_middle_of_a_manifests_change_counts() -> None:
    device = waiting_for_receipt()
    device.hear_manifest(device.aggregator.manifest(2, cohort=[OTHER]))
    effects = device.hear(device.aggregator.receipt(_entry(device), Verdict.LATE))
    assert effects[0] == Settle(ROUND, Verdict.LATE)


def test_a_receipt_before_any_manifest_is_left_for_the_answer_to_the_resend() -> None:
    device = waiting_for_receipt()
    device.restart()
    device.connect()
    assert device.hear(device.aggregator.receipt(_entry(device))) == []
    device.hear_manifest(device.aggregator.manifest(1))
    assert isinstance(device.hear(device.aggregator.receipt(_entry(device)))[0], Settle)


IGNORED = {
    "another round": lambda entry: replace(entry, round_id=RoundId(1, 2)),
    "another generation": lambda entry: replace(entry, round_id=RoundId(2, 1)),
    "another manifest": lambda entry: replace(entry, manifest_digest=sha256(b"other")),
    "another update": lambda entry: replace(entry, update_digest=sha256(b"other")),
}


@pytest.mark.parametrize("what", IGNORED)
def test_a_receipt_about_something_else_leaves_the_update_pending(what: str) -> None:
    device = waiting_for_receipt()
    assert device.hear(device.aggregator.receipt(IGNORED[what](_entry(device)))) == []
    assert device.session.pending == _entry(device)


REFUSED = {
    "another key": (Aggregator(signing=signing_key(66)), {}, Reject.BAD_SIGNATURE),
    "the root": (Aggregator(signing=signing_key(10)), {}, Reject.BAD_SIGNATURE),
    "another federation": (Aggregator(federation="other"), {}, Reject.WRONG_FEDERATION),  # type: ignore[arg-type]
    "another device": (Aggregator(), {"device": OTHER}, Reject.WRONG_TOPIC),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_forged_receipt_is_refused_and_the_update_stays(what: str) -> None:
    aggregator, changes, reject = REFUSED[what]
    device = waiting_for_receipt()
    (refused,) = device.hear(aggregator.receipt(_entry(device), **changes))
    assert isinstance(refused, Refused)
    assert refused.reject is reject
    assert device.updates(device.wait(TTL_S))


def test_no_bit_of_a_receipt_can_change() -> None:
    device = waiting_for_receipt()
    receipt = device.aggregator.receipt(_entry(device))
    for at in range(len(receipt)):
        changed = bytearray(receipt)
        changed[at] ^= 1 << at % 8
        effects = device.hear(bytes(changed))
        assert all(isinstance(effect, Refused) for effect in effects), at
    assert device.session.pending is not None


# ---- a newer round or generation --------------------------------------------------------------------


def test_a_device_with_a_pending_update_takes_no_part_in_the_next_round_but_keeps_sending() -> None:
    device = waiting_for_receipt()
    device.hear_manifest(device.aggregator.manifest(2))
    assert device.session.work is Work.IDLE
    assert device.updates(device.wait(TTL_S))


def test_a_raised_generation_drops_the_pending_update() -> None:
    device = waiting_for_receipt()
    newer = Aggregator(generation=2)
    effects = device.hear_manifest(newer.manifest(1, cohort=[OTHER]))
    assert Settle(ROUND, None) in effects
    assert not device.updates(device.wait(TTL_S))
    device.restart()
    assert device.session.pending is None


def test_after_a_raised_generation_the_device_trains_again() -> None:
    device = waiting_for_receipt()
    device.aggregator = Aggregator(generation=2)
    training(1, device)
    assert device.session.work is Work.TRAINING
    device.trained()
    assert device.sent(Kind.UPDATE)[-1].header.round_id == RoundId(2, 1)


@pytest.mark.parametrize("number", [1, 9])
def test_the_end_of_the_federation_settles_a_pending_update(number: int) -> None:
    """No later version can hold it, and the aggregator that would answer is about to leave."""
    device = waiting_for_receipt()
    finished = device.aggregator.manifest(number, FederationState.FINISHED)
    effects = device.hear_manifest(finished)
    assert effects[-2:] == [Settle(ROUND, None), FederationFinished(finished.manifest)]
    assert device.session.pending is None
    assert device.hear(device.aggregator.receipt(_entry(device))) == []  # too late, and harmless
    assert not messages(device.wait(10 * TTL_S))
    device.restart()
    assert device.session.pending is None


def test_a_device_that_comes_back_after_the_end_settles_what_it_had_journalled() -> None:
    device = waiting_for_receipt()
    device.restart()
    device.connect()
    effects = device.hear_manifest(device.aggregator.manifest(2, FederationState.FINISHED))
    assert Settle(ROUND, None) in effects
    assert device.session.pending is None


# ---- check-ins --------------------------------------------------------------------------------------


def test_a_waiting_federation_gets_one_check_in_with_the_devices_capability() -> None:
    device = ready()
    (checkin,) = device.checkins()
    assert (checkin.ttl_s, checkin.samples, checkin.codecs) == (TTL_S, 100, ("float32",))
    assert checkin.certificate == device.session.identity.certificate
    assert not device.checkins(device.wait(0.39 * TTL_S))


def test_every_waiting_manifest_gets_a_check_in() -> None:
    device = ready()
    effects = device.hear_manifest(device.aggregator.manifest(1, FederationState.WAITING))
    assert len(device.checkins(effects)) == 1


def test_a_check_in_is_renewed_before_it_expires() -> None:
    device = ready()
    at = []
    for _ in range(10):
        wake = device.session.wake_at()
        assert wake is not None
        effects = device.wait(wake - device.now)
        if device.checkins(effects):
            at.append(device.now)
    pauses = [b - a for a, b in itertools.pairwise(at)]
    assert all(0.4 * TTL_S <= pause <= 0.6 * TTL_S for pause in pauses)
    sequences = [envelope.header.sequence for envelope in device.sent(Kind.CHECKIN)]
    assert sequences == sorted(set(sequences))


def test_a_device_checks_in_after_a_lost_broker_session_only() -> None:
    device = ready()
    device.disconnect()
    assert not device.checkins(device.handle(Connected(session_present=True)))
    device.disconnect()
    assert len(device.checkins(device.handle(Connected(session_present=False)))) == 1


def test_no_check_in_while_training_or_while_an_update_waits() -> None:
    device = training()
    assert not device.checkins(device.wait(10 * TTL_S))
    device.trained()
    assert not device.checkins(device.wait(10 * TTL_S))


def test_nothing_is_sent_offline() -> None:
    device = ready()
    device.disconnect()
    device.hear_manifest(device.aggregator.manifest(1))
    assert device.wait(10 * TTL_S) == []
    assert device.fetches(device.connect()) != []


def test_a_selected_device_that_came_too_late_asks_for_a_new_ticket_at_once() -> None:
    """Its selection used up the last one; without a new one it would be out until the renewal."""
    device = training(1)
    effects = device.hear_manifest(device.aggregator.manifest(2, cohort=[OTHER])) + device.fetch_all()
    assert any(isinstance(effect, StopTraining) for effect in effects)
    assert len(device.checkins(effects)) == 1


def test_a_device_whose_ticket_was_not_used_does_not_check_in_at_every_round() -> None:
    device = ready()
    for number in range(1, 10):
        device.hear_manifest(device.aggregator.manifest(number, cohort=[DeviceId("pi-9")]))
        device.fetch_all()
    assert len(device.checkins()) == 1


def test_a_second_result_of_one_training_is_dropped() -> None:
    device = waiting_for_receipt()
    assert device.trained(an_update(b"other")) == []
    assert set(device.updates(device.wait(60))) == {_entry(device).messages[0].payload}


def test_a_new_device_checks_in_before_it_fetches_though_a_round_is_open() -> None:
    """The aggregator serves nobody it does not know, and rounds may follow each other without a pause."""
    device = Device(Aggregator())
    device.connect()
    effects = device.hear_manifest(device.aggregator.manifest(5, cohort=[OTHER]))
    kinds = [unpack(payload, FEDERATION, *Kind).header.kind for _, payload in messages(effects)]
    assert kinds == [Kind.CHECKIN, Kind.FETCH]


def test_the_next_update_starts_with_short_pauses_again() -> None:
    device = waiting_for_receipt()
    device.wait(1000)
    device.hear(device.aggregator.receipt(_entry(device)))
    waiting_for_receipt(2, device)
    wake = device.session.wake_at()
    assert wake is not None
    assert wake - device.now < RESEND_BASE_S / 2 + 2 * RESEND_BASE_S


def test_a_manifest_said_again_is_answered_by_a_check_in_since_the_last_may_be_lost() -> None:
    device = ready()
    published = device.aggregator.manifest(1, cohort=("device-b",))
    device.hear_manifest(published)
    device.fetch_all()
    sent = len(device.checkins())
    device.hear_manifest(published)
    assert len(device.checkins()) == sent + 1
