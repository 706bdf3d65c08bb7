"""Training that the policy, a stop or a death interrupts goes on, and its update is that of an undisturbed one."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.device.snapshot import Snapshot
from edge_runtime.protocol.messages import Update
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.rounds import FederationState
from edge_runtime.store import Checkpoints
from edge_runtime.store.files import FileLayer
from tests.support.device_stage import Stage

STEPS = 200
PLAN = Plan(codecs=("float32",), epochs=0, steps=STEPS, batch_size=4, optimizer="adam", learning_rate=1e-3)
COOL, HOT = Snapshot(charging=True, temperature_c=50.0), Snapshot(charging=True, temperature_c=95.0)


class Killed(BaseException):
    """The process is gone: nothing that would tidy up runs to an end."""


def checkpoints(stage: Stage) -> list[Path]:
    return list((stage.folder / "state" / "checkpoints").iterdir())


def until_the_update(stage: Stage) -> Update:
    """One more life."""
    stage.run(lambda: stage.told("update_journalled") and stage.update() is not None)
    update = stage.update()
    assert update is not None
    return update


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Update:
    stage = Stage(tmp_path_factory.mktemp("undisturbed"))
    stage.manifest(1, plan=PLAN)
    try:
        return until_the_update(stage)
    finally:
        stage.peer.close()


def after_training_began(stage: Stage, then: Callable[[], bool], polls: int = 30) -> Callable[[], bool]:
    """``then`` from the 30th poll after the first step on: the stop is asked before each of them."""
    count = iter(range(1 << 30))
    return lambda: (
        (stage.told("training_started") or stage.told("training_resumed")) and next(count) >= polls and then()
    )


def kill() -> bool:
    raise Killed


def fly(stage: Stage) -> None:
    """Time flies and the device's loop turns at once, also while it is idle."""
    stage.skew_s += 1.0
    stage.manifest(1, plan=PLAN)


# ---- policy -----------------------------------------------------------------------------------------


def test_a_device_that_may_not_train_says_why_and_takes_part_once_it_may(
    stage: Stage, undisturbed: Update
) -> None:
    stage.machine = HOT
    stage.manifest(1, plan=PLAN)
    polls = []

    def cooled() -> bool:
        polls.append(1)
        if not stage.told("training_started"):
            fly(stage)
        if len(polls) == 50:
            assert stage.told("ineligible", reasons="heat")
            assert "95 °C" in stage.events[0][1]["detail"]
            assert not stage.fetched
            assert not stage.updates
            stage.machine = COOL
        return stage.update() is not None

    stage.run(cooled)
    assert [name for name, _ in stage.events if name in ("ineligible", "eligible", "trained")] == [
        *("ineligible", "eligible", "trained")
    ]
    assert stage.update() == undisturbed


def test_a_device_that_gets_too_hot_stops_after_the_step_and_goes_on_from_there_when_it_is_cool(
    stage: Stage, undisturbed: Update
) -> None:
    stage.machine = COOL
    model = stage.manifest(1, plan=PLAN).manifest.model.digest

    def heat_up() -> bool:
        stage.machine = HOT
        stage.skew_s += 1.0
        return True

    heated = after_training_began(stage, heat_up)

    def enough() -> bool:
        if not stage.told("ineligible"):
            heated()
        elif not stage.told("training_resumed"):
            fly(stage)
            stage.machine = COOL
        return stage.update() is not None

    stage.run(enough)
    (written,) = stage.all_told("checkpoint_written")
    assert 0 < written["step"] < STEPS
    assert stage.all_told("training_stopped") == [{"round": 1, "reason": "not eligible"}]
    assert stage.all_told("training_resumed") == [{"round": 1, "step": written["step"]}]
    assert len(stage.all_told("training_started")) == 1
    assert stage.fetched.count(model) == 1
    assert stage.update() == undisturbed
    assert checkpoints(stage) == []


def test_a_round_that_ends_while_the_device_is_too_hot_is_dropped_with_its_checkpoint(stage: Stage) -> None:
    stage.machine = COOL
    stage.manifest(1, plan=PLAN)

    def heat_up() -> bool:
        stage.machine = HOT
        stage.skew_s += 1.0
        return True

    heated = after_training_began(stage, heat_up)
    left: list[int] = []

    def enough() -> bool:
        if not stage.told("training_stopped"):
            heated()
        elif not left:
            left.append(len(checkpoints(stage)))
            stage.manifest(2, FederationState.WAITING)
        return bool(left) and not checkpoints(stage)

    stage.run(enough)
    assert left == [1]
    assert not stage.told("training_resumed")


def test_the_machine_is_read_at_most_once_a_second_also_while_it_trains(stage: Stage) -> None:
    stage.manifest(1, plan=PLAN)
    polls = []

    def enough() -> bool:
        polls.append(1)
        return stage.update() is not None

    began = stage.clock()
    stage.run(enough)
    assert len(polls) > STEPS
    assert stage.looks <= 1 + (stage.clock() - began)


def test_on_a_metered_network_a_finished_update_waits(stage: Stage) -> None:
    stage.uplink.fails_at = 1  # journalled, not sent
    stage.manifest(1, plan=PLAN)
    stage.run(lambda: stage.told("update_journalled"))
    stage.machine = Snapshot(charging=True, metered=True)
    polls = []

    def enough() -> bool:
        polls.append(stage.uplink.tried)
        fly(stage)
        if len(polls) == 50:
            stage.machine = COOL
        return stage.update() is not None

    stage.run(enough)
    assert set(polls[:50]) == {0}


# ---- checkpoints ------------------------------------------------------------------------------------


def test_a_device_killed_in_training_redoes_no_more_than_the_time_between_two_checkpoints(
    stage: Stage, undisturbed: Update
) -> None:
    stage.settings = "[training]\ncheckpoint_s = 5.0\n"
    stage.manifest(1, plan=PLAN)

    def killed_after_two_checkpoints() -> bool:
        if stage.told("training_started"):
            stage.skew_s += 0.1  # asked before each step
        return len(stage.all_told("checkpoint_written")) >= 2 and kill()

    with pytest.raises(Killed):
        stage.run(killed_after_two_checkpoints)
    first, second = (told["step"] for told in stage.all_told("checkpoint_written"))
    assert 0 < first < second < STEPS
    assert not stage.told("training_stopped")
    assert until_the_update(stage) == undisturbed
    assert stage.all_told("training_resumed") == [{"round": 1, "step": second}]
    assert checkpoints(stage) == []


def test_a_device_killed_again_and_again_comes_to_the_same_update(stage: Stage, undisturbed: Update) -> None:
    stage.settings = "[training]\ncheckpoint_s = 5.0\n"
    stage.manifest(1, plan=PLAN)
    for life in range(3):

        def written_once_more(life: int = life) -> bool:
            stage.skew_s += 0.1
            return len(stage.all_told("checkpoint_written")) > life and kill()

        with pytest.raises(Killed):
            stage.run(written_once_more)
    steps = [told["step"] for told in stage.all_told("checkpoint_written")]
    assert [told["step"] for told in stage.all_told("training_resumed")] == steps[:2]
    assert until_the_update(stage) == undisturbed


def test_a_clean_stop_loses_no_step(stage: Stage, undisturbed: Update) -> None:
    stage.manifest(1, plan=PLAN)
    stage.run(after_training_began(stage, lambda: True))
    (written,) = stage.all_told("checkpoint_written")
    assert stage.told("training_stopped", reason="the runtime stops")
    assert until_the_update(stage) == undisturbed
    assert stage.all_told("training_resumed") == [{"round": 1, "step": written["step"]}]


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-1], lambda raw: b"", lambda raw: raw[:200] + b"x" + raw[201:]]
)
def test_a_damaged_checkpoint_is_told_and_the_round_trained_from_its_beginning(
    stage: Stage, undisturbed: Update, damage: Callable[[bytes], bytes]
) -> None:  # fmt: skip
    stage.manifest(1, plan=PLAN)
    stage.run(after_training_began(stage, lambda: True))
    (path,) = checkpoints(stage)
    path.write_bytes(damage(path.read_bytes()))
    stage.events.clear()
    assert until_the_update(stage) == undisturbed
    (told,) = stage.all_told("checkpoint_damaged")
    assert told["round"] == 1
    assert str(path) in told["detail"]
    assert stage.told("training_started", round=1)
    assert not stage.told("training_resumed")


def test_a_checkpoint_on_other_data_is_not_gone_on_with(stage: Stage, undisturbed: Update) -> None:
    stage.manifest(1, plan=PLAN)
    stage.run(after_training_began(stage, lambda: True))
    np.savez(stage.folder / "train.npz", x=np.ones((64, 1, 8, 8), np.float32), y=np.arange(64) % 9)
    stage.events.clear()
    assert until_the_update(stage) != undisturbed
    assert stage.told("training_started", round=1)
    assert not stage.told("checkpoint_damaged")


def test_data_that_do_not_fit_any_more_cost_the_round_and_not_the_device(stage: Stage) -> None:
    good = (stage.folder / "train.npz").read_bytes()

    def enough() -> bool:
        match len(turns):
            case 0 if stage.told("training_started", round=1):
                turns.append(2)
                (stage.folder / "train.npz").write_bytes(b"half of a file that is being written")
                stage.manifest(2, plan=PLAN)
            case 1 if stage.told("training_failed", round=2):
                turns.append(3)
                (stage.folder / "train.npz").write_bytes(good)
                stage.manifest(3, plan=PLAN)
        return stage.told("update_journalled", round=3)

    turns: list[int] = []
    stage.manifest(1, plan=PLAN)
    stage.run(enough)
    (failed,) = stage.all_told("training_failed")
    assert "not an .npz file" in failed["reason"]


def test_a_checkpoint_of_a_round_that_is_over_is_gone_when_the_device_is_back(stage: Stage) -> None:
    stage.manifest(1, plan=PLAN)
    stage.run(after_training_began(stage, lambda: True))
    assert len(checkpoints(stage)) == 1
    stage.manifest(2, plan=PLAN)
    stage.events.clear()
    stage.run(lambda: stage.told("training_started", round=2))
    assert not stage.told("training_resumed")
    stage.run(lambda: stage.told("update_journalled"))
    assert checkpoints(stage) == []


def test_a_device_killed_between_the_journal_and_the_end_of_its_checkpoint_sends_what_it_journalled(
    stage: Stage, undisturbed: Update, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.settings = "[training]\ncheckpoint_s = 0.1\n"
    stage.manifest(1, plan=PLAN)

    def killed(self: Checkpoints, manifest: object) -> None:
        if manifest is None:
            raise Killed

    def passing() -> bool:
        stage.skew_s += 0.01
        return False

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "keep_only", killed)
        with pytest.raises(Killed):
            stage.run(passing)
    assert len(checkpoints(stage)) == 1
    assert not stage.updates
    stage.events.clear()
    stage.run(lambda: stage.update() is not None)
    assert stage.update() == undisturbed
    assert not stage.told("training_started")
    assert not stage.told("training_resumed")
    stage.manifest(2, FederationState.WAITING)
    stage.run(lambda: checkpoints(stage) == [])


def test_a_disk_too_full_for_a_checkpoint_is_told_and_the_update_is_made_all_the_same(
    stage: Stage, undisturbed: Update, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.settings = "[training]\ncheckpoint_s = 5.0\n"
    stage.manifest(1, plan=PLAN)
    write = FileLayer.write

    def full(self: FileLayer, path: Path, parts: Sequence[bytes]) -> None:
        write(self, path, parts)
        if path.parent.name == "checkpoints":
            raise OSError(errno.ENOSPC, "No space left on device")

    def passing() -> bool:
        stage.skew_s += 0.1 * stage.told("training_started")
        return stage.update() is not None

    monkeypatch.setattr(FileLayer, "write", full)
    stage.run(passing)
    failed = stage.all_told("checkpoint_failed")
    assert len(failed) >= 2
    assert "No space left" in failed[0]["reason"]
    assert checkpoints(stage) == []
    assert stage.update() == undisturbed
