"""SIGKILL anywhere, of anything: the models are those of an undisturbed run, each update in one of them once."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from edge_runtime.store import DeviceStore
from tests.federation.conftest import ROUNDS, Undisturbed
from tests.support.federation import Federation, aggregated_once, federation
from tests.support.programs import eventually

SAME_SUM = {"plan__sample_cap": 10_007}  # as in the undisturbed run
DYING = Path(__file__).with_name("dying_aggregator.py")
DYING_DEVICE = Path(__file__).with_name("dying_device.py")


def assert_as_undisturbed(fed: Federation, undisturbed: Undisturbed) -> None:
    """Wait for the end; compare every version, the ledger, and what devices sent."""
    assert fed.finish() == undisturbed.models
    aggregated_once(fed.status(), devices=3, versions=ROUNDS)
    if fed.recorder is not None:
        sent = fed.recorder.updates()
        assert set(sent) == {(name, number) for name in fed.devices for number in range(1, ROUNDS + 1)}
        different = {key: len(payloads) for key, pieces in sent.items() for payloads in pieces.values()}
        assert set(different.values()) == {1}, "a device sent two different updates for one round"


def test_a_device_killed_in_mid_upload_sends_the_identical_bytes_once_the_killed_aggregator_is_back(
    tmp_path: Path, undisturbed: Undisturbed
) -> None:
    with federation(tmp_path, record=True, gated=["device-2"], **SAME_SUM) as fed:
        slow = fed.devices["device-2"]
        fed.start()
        fed.wait_at_gate("device-2")
        fed.aggregator.wait_for("update_stored", round=1)
        fed.aggregator.kill()
        fed.open_gate("device-2")
        slow.wait_for("update_journalled", round=1)
        slow.kill()
        before = fed.traffic.sendings("device-2", 1)
        with DeviceStore(fed.folder / "device-2") as store:
            (journalled,) = store.outbox.entries()
        slow.start()
        eventually(lambda: fed.traffic.sendings("device-2", 1) > before, "the restarted device resends")
        fed.aggregator.start()
        assert_as_undisturbed(fed, undisturbed)
        (sent,) = fed.traffic.updates()["device-2", 1][0]
        assert sent == journalled.messages[0].payload
        assert not slow.seen("training_started", run=1, round=1)


@pytest.mark.long
def test_a_device_killed_between_two_pieces_of_its_update_sends_the_identical_bytes_when_it_is_back(
    tmp_path: Path, undisturbed: Undisturbed
) -> None:
    with federation(tmp_path, record=True, delivery__chunk_bytes=8192, **SAME_SUM) as fed:
        victim = fed.devices["device-1"]
        fed.aggregator.start()
        for device in fed.devices.values():
            dying = [sys.executable, str(DYING_DEVICE), *device.command[3:]] if device is victim else None
            device.start(command=dying)
        assert victim.wait() == -signal.SIGKILL, victim.output()
        eventually(lambda: ("device-1", 1) in fed.traffic.updates(), "the first piece is recorded")
        before = fed.traffic.updates()["device-1", 1]
        with DeviceStore(fed.folder / "device-1") as store:
            (journalled,) = store.outbox.entries()
        pieces = [message.payload for message in journalled.messages]
        assert 1 <= len(before) < len(pieces)
        assert not fed.aggregator.seen("update_stored", round=1, device="device-1")
        victim.start()
        assert_as_undisturbed(fed, undisturbed)
        # before and after together: one payload for each piece, as journalled
        sent = fed.traffic.updates()["device-1", 1]
        assert [sent[index] for index in range(len(pieces))] == [{payload} for payload in pieces]
        assert not victim.seen("training_started", run=1, round=1)


@pytest.mark.long
@pytest.mark.parametrize("moment", ["round_opened", "round_frozen", "round_published"])
def test_an_aggregator_killed_in_every_round_makes_the_same_models(
    tmp_path: Path, undisturbed: Undisturbed, moment: str
) -> None:
    with federation(tmp_path, record=True, **SAME_SUM) as fed:
        fed.start()
        for number in range(1, ROUNDS + 1):
            fed.aggregator.wait_for(moment, round=number)
            fed.aggregator.kill()
            fed.aggregator.start()
        assert_as_undisturbed(fed, undisturbed)


@pytest.mark.long
def test_an_aggregator_that_dies_after_every_few_operations_makes_the_same_models(
    tmp_path: Path, undisturbed: Undisturbed
) -> None:
    with federation(tmp_path, **SAME_SUM) as fed:
        for device in fed.devices.values():
            device.start()
        words = fed.aggregator.command[3:]
        lives, life = 0, fed.aggregator
        while not fed.aggregator.seen("finished"):
            # From 13 on every life comes further than its own start, so the rounds go on.
            fatal = 13 + 3 * (lives % 7) + lives // 7
            fed.aggregator.start(command=[sys.executable, str(DYING), str(fatal), *words])
            lives += 1
            # A life in which the federation is finished may have nothing left to do, and so nothing to die of.
            eventually(lambda: life.crashed or bool(life.seen("finished")), "the end of a life")
            if life.crashed:
                assert life.wait() == -signal.SIGKILL, life.output()
            else:
                life.kill()
            assert lives < 100, fed.aggregator.output()
        assert lives > 5
        fed.aggregator.start()
        fed.aggregator.wait_for("connected", times=1)
        assert_as_undisturbed(fed, undisturbed)


@pytest.mark.long
def test_a_device_killed_while_it_trains_starts_the_round_again_and_sends_one_update(
    tmp_path: Path, undisturbed: Undisturbed
) -> None:
    with federation(tmp_path, record=True, gated=["device-1"], **SAME_SUM) as fed:
        fed.start()
        victim = fed.devices["device-1"]
        fed.wait_at_gate("device-1")
        victim.kill()  # before the first step
        fed.open_gate("device-1")
        for number in (1, 2):  # among the steps, or soon after them
            victim.start()
            victim.wait_for("training_started", round=number)
            victim.kill()
        victim.start()
        assert_as_undisturbed(fed, undisturbed)


@pytest.mark.long
def test_a_broker_killed_in_mid_round_loses_nothing_that_matters(
    tmp_path: Path, undisturbed: Undisturbed
) -> None:
    """The new one starts with an empty folder: sessions, queues and the retained manifest are gone."""
    with federation(tmp_path, **SAME_SUM) as fed:
        fed.start()
        for moment, number in (("round_opened", 1), ("update_stored", 2)):
            fed.aggregator.wait_for(moment, round=number)
            fed.broker.kill()
            for path in fed.broker.folder.glob("*.db*"):
                path.unlink()
            fed.broker.start()
        assert_as_undisturbed(fed, undisturbed)
