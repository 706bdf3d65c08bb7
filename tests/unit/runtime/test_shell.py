"""The runtime as a shell: what it does with artifacts, stops and uploads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edge_runtime.backends.artifact_folder import folder_bundle
from edge_runtime.device.snapshot import Snapshot
from edge_runtime.protocol.artifact import Artifact, FileEntry
from edge_runtime.protocol.ids import sha256
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.rounds import FederationState
from tests.support.device_stage import ARTIFACT, BUNDLE, MODEL, Stage

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


def artifact_with(graph: bytes, **changes: Any) -> bytes:
    """Its step for SGD is ``graph``; by its digests it is whole."""
    files = {**ARTIFACT.files, "step_sgd.onnx": graph}
    entries = {name: FileEntry(sha256(content), len(content)) for name, content in files.items()}
    return folder_bundle(Artifact(replace(ARTIFACT.manifest, files=entries, **changes), files))


def test_an_artifact_that_the_backend_cannot_run_costs_its_round_and_not_the_device(stage: Stage) -> None:
    too_new = artifact_with(ARTIFACT.files["step_sgd.onnx"], opset=99)
    fails_at_the_first_step = artifact_with(b"no graph")
    for number, bundle in enumerate((too_new, fails_at_the_first_step), start=1):
        stage.manifest(number, artifact=bundle)
        stage.run(lambda number=number: stage.told("training_failed", round=number))
    reasons = [told["reason"] for told in stage.all_told("training_failed")]
    assert "opset 99" in reasons[0]
    assert "cannot load step_sgd.onnx" in reasons[1]
    assert stage.told("training_started", round=2)
    stage.manifest(3)
    stage.run(lambda: stage.told("update_journalled", round=3))


def test_a_plan_without_a_codec_for_this_machine_costs_its_round(stage: Stage) -> None:
    stage.manifest(1, plan=Plan(codecs=("from-tomorrow",)))
    stage.run(lambda: stage.told("training_failed", round=1))
    (told,) = stage.all_told("training_failed")
    assert "no codec of from-tomorrow can be used here" in told["reason"]


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


def test_an_upload_stops_when_the_network_becomes_metered_and_goes_on_when_it_is_not(stage: Stage) -> None:
    stage.manifest(1, chunk_bytes=8192)
    uplink, polls, pieces = stage.uplink, [], len(MODEL) // 8192 + 1
    stage.piece_s = 1.0  # the machine is looked at between two pieces
    uplink.after_piece = lambda: setattr(stage, "machine", Snapshot(charging=True, metered=True))

    def look() -> bool:
        if stage.told("ineligible", reasons="metered"):
            polls.append(uplink.tried)
            uplink.after_piece = lambda: None
            stage.skew_s += 1.0
            stage.manifest(1, chunk_bytes=8192)
        if len(polls) == 50:
            stage.machine = Snapshot(charging=True)
        return stage.update() is not None

    stage.run(look)
    assert pieces > 1
    assert set(polls[:50]) == {1}
