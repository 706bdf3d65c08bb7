"""Found by killing a broker: a receipt was lost, the next round opened, and the device in it slept through it."""

from __future__ import annotations

from edge_runtime.protocol.ids import RoundId
from edge_runtime.session_values import Train, Work
from tests.support.session_driver import OTHER, waiting_for_receipt


def test_a_device_selected_while_its_receipt_was_lost_trains_as_soon_as_the_receipt_is_there() -> None:
    device = waiting_for_receipt()
    first = device.journal[RoundId(1, 1)]
    device.hear_manifest(device.aggregator.manifest(2))
    assert device.fetch_all() == []
    device.hear(device.aggregator.receipt(first))
    (train,) = (effect for effect in device.fetch_all() if isinstance(effect, Train))
    assert train.manifest.round_id == RoundId(1, 2)
    device.trained()
    assert set(device.outbox) == {RoundId(1, 2)}


def test_a_device_not_selected_meanwhile_checks_in_after_the_receipt() -> None:
    device = waiting_for_receipt()
    first = device.journal[RoundId(1, 1)]
    device.hear_manifest(device.aggregator.manifest(2, cohort=[OTHER]))
    before = len(device.checkins())
    device.hear(device.aggregator.receipt(first))
    device.fetch_all()
    assert device.session.work is Work.IDLE
    assert len(device.checkins()) == before + 1
