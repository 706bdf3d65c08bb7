"""The runtime as a shell: what it does with artifacts, stops and uploads."""

from __future__ import annotations

from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.rounds import FederationState
from tests.support.device_stage import BUNDLE, MODEL, Stage

# ---- artifacts --------------------------------------------------------------------------------------


def test_a_damaged_artifact_is_fetched_again_and_the_round_is_not_lost(stage: Stage) -> None:
    stage.manifest(1)
    stage.run(lambda: stage.told("training_started"))
    (blob,) = (stage.folder / "state" / "blobs").glob("*.blob")
    blob.write_bytes(blob.read_bytes()[:-1])
    stage.events.clear()
    stage.run(lambda: stage.told("trained"))
    assert stage.told("artifact_lost", round=1)
    assert stage.told("trained", round=1)
    assert not stage.told("training_failed")


def test_an_artifact_that_another_pushed_out_of_the_cache_is_fetched_when_it_is_wanted(stage: Stage) -> None:
    stage.max_blob_bytes = len(BUNDLE) + 1000
    artifact = stage.manifest(1).manifest.artifact.digest
    sent_round = iter((2, 3))

    def next_round() -> bool:
        if stage.told("training_started", round=1) and not stage.told("training_stopped", round=1):
            stage.manifest(2, artifact=b"not a bundle" * 100)
        if stage.told("training_failed", round=2) and next(sent_round, None) == 2:
            stage.manifest(3)
        return stage.told("training_started", round=3)

    stage.run(next_round)
    assert stage.fetched.count(artifact) == 2
    assert not stage.told("artifact_lost")


def test_a_model_of_the_wrong_size_costs_its_round_and_not_the_artifact(stage: Stage) -> None:
    artifact = stage.manifest(1, model=MODEL[:-4]).manifest.artifact.digest
    stage.run(lambda: stage.told("training_failed", round=1))
    stage.manifest(2)
    stage.run(lambda: stage.told("training_started", round=2))
    assert stage.fetched.count(artifact) == 1
    assert not stage.told("artifact_lost")


# ---- stopping ---------------------------------------------------------------------------------------


def test_a_signal_in_the_middle_of_training_ends_it_at_the_next_step(stage: Stage) -> None:
    stage.manifest(1)
    polls = []

    def signalled() -> bool:
        polls.extend([1] * stage.told("training_started"))
        return len(polls) >= 5

    stage.run(signalled)
    assert stage.told("training_stopped", round=1, reason="the runtime stops")
    assert not stage.told("trained")
    assert not stage.updates


def test_a_round_that_is_over_ends_its_training_through_the_same_poll(stage: Stage) -> None:
    stage.manifest(1, plan=Plan(codecs=("float32",), epochs=0, steps=1_000_000, batch_size=1))
    opened = []

    def second_round() -> bool:
        if stage.told("training_started", round=1) and not opened:
            opened.append(stage.manifest(2))
        return stage.told("trained", round=2)

    stage.run(second_round)
    assert stage.told("training_stopped", round=1, reason="the round is over")
    assert not stage.told("trained", round=1)


def test_a_device_whose_receipt_never_comes_still_ends_with_the_federation(stage: Stage) -> None:
    stage.manifest(1)
    finished = []

    def finish() -> bool:
        if stage.updates and not finished:
            finished.append(stage.manifest(1, FederationState.FINISHED))
        return False

    stage.run(finish, until_finished=True)
    assert stage.told("settled", round=1, verdict="none")
    assert stage.events[-1][0] == "finished"


# ---- uploads ----------------------------------------------------------------------------------------


def test_an_update_that_takes_long_to_leave_is_not_sent_twice_on_that_account(stage: Stage) -> None:
    stage.piece_s = 100.0
    uplink, polls, pieces = stage.uplink, [], len(MODEL) // 8192 + 1
    stage.manifest(1, chunk_bytes=8192)

    def look() -> bool:
        if uplink.tried >= pieces:
            polls.append(uplink.tried)
            stage.manifest(1, chunk_bytes=8192)  # an event: the loop turns at once
        return len(polls) >= 5

    stage.run(look)
    assert polls == [pieces] * 5
    assert len({payload for _, payload in stage.updates}) == pieces


def test_after_a_piece_that_cannot_be_sent_the_others_are_not_tried(stage: Stage) -> None:
    stage.manifest(1, chunk_bytes=8192)
    uplink, polls = stage.uplink, []
    uplink.fails_at = 2

    def look() -> bool:
        if uplink.tried >= 2:
            polls.append(uplink.tried)
            stage.manifest(1, chunk_bytes=8192)
        return len(polls) >= 3

    stage.run(look)
    assert polls == [2, 2, 2]
    assert len(stage.updates) == 1
