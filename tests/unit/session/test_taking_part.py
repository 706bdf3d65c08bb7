from __future__ import annotations

from dataclasses import replace

import pytest

from edge_runtime.protocol import topics
from edge_runtime.protocol.crypto.provider import CRYPTO
from edge_runtime.protocol.envelope import Header, pack, seal_context
from edge_runtime.protocol.errors import RemoteProtocolError
from edge_runtime.protocol.ids import RoundId, sha256
from edge_runtime.protocol.kinds import Kind
from edge_runtime.protocol.messages import Chunk, Telemetry, Update
from edge_runtime.protocol.rejects import Reject
from edge_runtime.protocol.rounds import FederationState
from edge_runtime.session import standing_subscriptions
from edge_runtime.session_values import (
    ArtifactLost,
    FederationFinished,
    Journal,
    KeepArtifact,
    Refused,
    Remember,
    Send,
    SendUpdate,
    Settle,
    StopTraining,
    Subscribe,
    Train,
    Trained,
    TrainingFailed,
    Work,
)
from tests.support.session_driver import (
    ARTIFACT,
    DEVICE,
    FEDERATION,
    MODEL,
    OTHER,
    TTL_S,
    Aggregator,
    Device,
    an_update,
    messages,
    ready,
    sealing_key,
    signing_key,
    training,
)


def _only(effects: list, kind: type) -> list:  # type: ignore[type-arg]
    return [effect for effect in effects if isinstance(effect, kind)]


# ---- from manifest to update ------------------------------------------------------------------------


def test_a_device_that_is_not_selected_fetches_the_cohort_and_nothing_else() -> None:
    device = ready()
    published = device.aggregator.manifest(1, cohort=[OTHER])
    device.hear_manifest(published)
    device.fetch_all()
    assert published.manifest.cohort is not None
    assert [fetch.digest for fetch in device.fetches()] == [published.manifest.cohort.digest]
    assert device.session.work is Work.IDLE
    assert not device.subscribed
    assert not _only(device.effects, Train)


def test_a_selected_device_fetches_cohort_then_model_and_artifact_and_trains() -> None:
    device = ready()
    published = device.aggregator.manifest(1, cohort=[DEVICE, OTHER])
    manifest = published.manifest
    device.hear_manifest(published)
    assert len(device.fetches()) == 1
    effects = device.fetch_all()
    assert manifest.cohort is not None
    assert [fetch.digest for fetch in device.fetches()] == [
        manifest.cohort.digest,
        manifest.model.digest,
        manifest.artifact.digest,
    ]
    assert effects[-2:] == [
        KeepArtifact(manifest.artifact.digest, ARTIFACT),
        Train(manifest, published.digest, manifest.artifact.digest, MODEL),
    ]
    assert not device.subscribed


def test_an_artifact_in_the_cache_is_not_fetched_again() -> None:
    device = training()
    artifact = device.aggregator.manifest(1).manifest.artifact.digest
    before = len(device.effects)
    training(2, device)
    assert artifact not in [fetch.digest for fetch in device.fetches(device.effects[before:])]
    assert len(_only(device.effects, Train)) == 2


def test_a_new_round_is_remembered_before_anything_else() -> None:
    device = ready()
    effects = device.hear_manifest(device.aggregator.manifest(1))
    assert effects[0] == Remember(RoundId(1, 1))
    assert isinstance(effects[1], Subscribe)


def test_an_update_is_journalled_before_it_is_sent_and_opens_only_with_the_rounds_key() -> None:
    device = training()
    effects = device.trained()
    assert isinstance(effects[0], Journal)
    assert effects[1:] == [SendUpdate(RoundId(1, 1), effects[0].entry.messages)]
    (envelope,) = device.sent(Kind.UPDATE)
    assert Update.decode(device.aggregator.open(envelope)) == an_update()
    assert sha256(envelope.body) == effects[0].entry.update_digest == envelope.header.payload_digest
    assert envelope.header.manifest_digest == device.aggregator.manifest(1).digest
    with pytest.raises(RemoteProtocolError, match="bad_seal"):
        CRYPTO.open(sealing_key(99), seal_context(envelope.header), b"", envelope.body)


def test_a_large_update_travels_in_pieces_of_the_manifests_chunk_size() -> None:
    device = training()
    effects = device.trained(an_update(bytes(20_000)))
    envelopes = sorted(device.sent(Kind.UPDATE, effects), key=lambda envelope: envelope.header.chunk_index)
    assert [len(envelope.body) for envelope in envelopes][:2] == [8192, 8192]
    assert [envelope.header.chunk_index for envelope in envelopes] == [0, 1, 2]
    whole = b"".join(envelope.body for envelope in envelopes)
    assert Update.decode(device.aggregator.open(envelopes[0], whole)) == an_update(bytes(20_000))


def test_telemetry_is_sealed_to_the_aggregator_and_not_sent_offline() -> None:
    device = training()
    effects = device.trained(telemetry=Telemetry(steps=3))
    (envelope,) = device.sent(Kind.TELEMETRY, effects)
    assert Telemetry.decode(device.aggregator.open(envelope)) == Telemetry(steps=3)
    other = training()
    other.disconnect()
    assert not messages(other.trained(telemetry=Telemetry(steps=3)))


def test_training_that_fails_settles_the_round_and_asks_for_the_next() -> None:
    device = training()
    effects = device.handle(TrainingFailed(RoundId(1, 1), "no data"))
    assert effects[0] == Settle(RoundId(1, 1), None)
    assert len(device.checkins(effects)) == 1
    device.restart()
    device.connect()
    device.hear_manifest(device.aggregator.manifest(1))
    assert device.session.work is Work.IDLE


def test_a_lost_artifact_is_fetched_again_within_the_round_and_nothing_else_is() -> None:
    device = training()
    (train,) = _only(device.effects, Train)
    device.cache.clear()
    effects = device.handle(ArtifactLost(train))
    assert [fetch.digest for fetch in device.fetches(effects)] == [train.artifact]
    assert not device.checkins(effects)
    assert device.fetch_all()[-2:] == [KeepArtifact(train.artifact, ARTIFACT), train]
    device.trained()
    assert device.updates() == [device.journal[RoundId(1, 1)].messages[0].payload]


def test_an_artifact_lost_twice_costs_the_round_and_not_the_next() -> None:
    device = training()
    (train,) = _only(device.effects, Train)
    device.handle(ArtifactLost(train))
    device.fetch_all()
    effects = device.handle(ArtifactLost(train))
    assert effects[0] == Settle(RoundId(1, 1), None)
    assert not device.fetches(effects)
    training(2, device)
    assert device.session.work is Work.TRAINING


def test_a_late_word_of_an_artifact_lost_only_makes_the_next_round_fetch_it() -> None:
    device = training()
    (train,) = _only(device.effects, Train)
    device.hear_manifest(device.aggregator.manifest(2))
    assert device.handle(ArtifactLost(train)) == []
    device.fetch_all()
    assert train.artifact in [fetch.digest for fetch in device.fetches()][3:]
    assert device.session.work is Work.TRAINING


def test_a_late_word_of_training_that_was_stopped_changes_nothing() -> None:
    device = training()
    device.hear_manifest(device.aggregator.manifest(2, cohort=[OTHER]))
    assert device.handle(TrainingFailed(RoundId(1, 1), "stopped")) == []
    assert device.handle(Trained(RoundId(1, 1), an_update())) == []
    assert not device.journal


def test_a_new_manifest_stops_the_training_and_drops_the_fetches() -> None:
    device = training()
    effects = device.hear_manifest(device.aggregator.manifest(2))
    assert effects[:2] == [Remember(RoundId(1, 2)), StopTraining("the round is over")]
    fetching = set(device.subscribed)
    device.hear_manifest(device.aggregator.manifest(3, cohort=[OTHER]))
    assert fetching
    assert not fetching & device.subscribed


def test_the_same_manifest_again_does_nothing() -> None:
    device = training()
    assert device.hear_manifest(device.aggregator.manifest(1)) == []
    assert device.session.work is Work.TRAINING


def test_the_end_of_the_federation_is_told() -> None:
    device = ready()
    finished = device.aggregator.manifest(9, FederationState.FINISHED)
    effects = device.hear_manifest(finished)
    assert effects == [Remember(RoundId(1, 9)), FederationFinished(finished.manifest)]
    assert not device.checkins(device.wait(10 * TTL_S))


def test_a_round_missed_while_the_device_was_off_is_fetched_at_the_manifest() -> None:
    device = Device(Aggregator())
    device.connect()
    device.hear_manifest(device.aggregator.manifest(17))
    device.fetch_all()
    assert device.session.work is Work.TRAINING


# ---- whom it believes -------------------------------------------------------------------------------


def _changed(aggregator: Aggregator, **changes: object) -> bytes:
    return aggregator.manifest(1, certificate=aggregator.certificate(**changes)).payload


def _with(**changes: object) -> bytes:
    return Aggregator(**changes).manifest(1).payload  # type: ignore[arg-type]


def _other_header() -> bytes:
    """Signed well, but header and body speak of different rounds."""
    aggregator = Aggregator()
    body = aggregator.manifest(1).manifest.encode()
    header = Header(
        kind=Kind.MANIFEST, federation=FEDERATION, round_id=RoundId(1, 2), payload_digest=sha256(body)
    )
    return next(pack(header, body, aggregator.sign))


def _unsigned_change() -> bytes:
    raw = bytearray(Aggregator().manifest(1).payload)
    raw[-1] ^= 1  # in the signature
    return bytes(raw)


FORGERIES = {
    "a broken signature": (_unsigned_change, Reject.BAD_SIGNATURE),
    "header and body of different rounds": (_other_header, Reject.WRONG_ROUND),
    "another root": (lambda: _with(root=signing_key(66)), Reject.BAD_CERTIFICATE),
    "a key the certificate does not name": (
        lambda: (
            Aggregator(signing=signing_key(66)).manifest(1, certificate=Aggregator().certificate()).payload
        ),
        Reject.BAD_SIGNATURE,
    ),
    "a certificate of another federation": (
        lambda: _changed(Aggregator(), federation="other"),
        Reject.BAD_CERTIFICATE,
    ),
    "a certificate of another generation": (
        lambda: _changed(Aggregator(), generation=2),
        Reject.BAD_CERTIFICATE,
    ),
    "a certificate of later rounds": (
        lambda: _changed(Aggregator(), first_round=2),
        Reject.BAD_CERTIFICATE,
    ),
    "a certificate of earlier rounds": (
        lambda: _changed(Aggregator(), last_round=0),
        Reject.BAD_CERTIFICATE,
    ),
    "no certificate": (
        lambda: Aggregator().manifest(1, certificate=b"").payload,
        Reject.BAD_CERTIFICATE,
    ),
    "another federation": (lambda: _with(federation="other"), Reject.WRONG_FEDERATION),
    "bytes": (lambda: b"\xff\xff", Reject.MALFORMED),
    "nothing": (lambda: b"", Reject.MALFORMED),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_manifest_is_refused_and_stops_nothing(name: str) -> None:
    make, reject = FORGERIES[name]
    device = training(1)
    device.session.highest_round = device.highest = RoundId(
        0, 0
    )  # so that only the forgery speaks against it
    (refused,) = device.hear_manifest(make())
    assert isinstance(refused, Refused)
    assert refused.reject is reject
    assert device.session.work is Work.TRAINING


@pytest.mark.parametrize("at", range(0, 400, 7))
def test_a_manifest_with_one_changed_bit_is_refused(at: int) -> None:
    device = ready()
    raw = bytearray(device.aggregator.manifest(1).payload)
    raw[at] ^= 1 << at % 8
    assert [type(effect) for effect in device.hear_manifest(bytes(raw))] == [Refused]


def test_an_older_round_is_refused_also_after_a_restart() -> None:
    device = ready()
    older = device.aggregator.manifest(4)
    device.hear_manifest(device.aggregator.manifest(5, cohort=[OTHER]))
    device.restart()
    device.connect()
    (refused,) = device.hear_manifest(older)
    assert isinstance(refused, Refused)
    assert refused.reject is Reject.WRONG_ROUND
    assert device.session.manifest is None


def test_an_older_generation_is_refused_however_high_its_round() -> None:
    device = ready(Aggregator(generation=2))
    (refused,) = device.hear_manifest(Aggregator(generation=1).manifest(900))
    assert isinstance(refused, Refused)
    assert refused.reject is Reject.WRONG_ROUND


def test_another_manifest_of_the_same_round_takes_the_place_of_the_first() -> None:
    device = training(1)
    other = device.aggregator.manifest(1, model=MODEL[:64])
    effects = device.hear_manifest(other)
    assert effects[0] == StopTraining("the round is over")
    device.fetch_all()
    assert device.session.work is Work.TRAINING
    (envelope,) = device.sent(Kind.UPDATE, device.trained())
    assert envelope.header.manifest_digest == other.digest


def test_a_cohort_that_does_not_read_is_refused_and_the_round_sat_out() -> None:
    device = ready()
    aggregator = device.aggregator
    device.hear_manifest(aggregator.manifest(1, cohort=[DEVICE, OTHER]))
    bad = aggregator.manifest(2)
    blob = aggregator.blobs.offer(b"\xff no cohort")
    device.hear_manifest(aggregator.publish(replace(bad.manifest, cohort=blob)))
    effects = device.fetch_all()
    assert any(isinstance(effect, Refused) and effect.reject is Reject.MALFORMED for effect in effects)
    assert device.session.work is Work.IDLE


@pytest.mark.parametrize("point", [bytes(32), (1).to_bytes(32, "little")])
def test_a_round_key_nothing_can_be_sealed_to_is_the_aggregators_fault(point: bytes) -> None:
    device = ready()
    device.hear_manifest(device.aggregator.manifest(1, sealing_key=point))
    device.fetch_all()
    effects = device.trained()
    assert isinstance(effects[0], Refused)
    assert effects[0].reject is Reject.BAD_SEAL
    assert effects[1] == Settle(RoundId(1, 1), None)
    assert not device.updates()


def test_an_aggregator_key_nothing_can_be_sealed_to_is_refused_at_the_check_in() -> None:
    aggregator = Aggregator()
    device = Device(aggregator)
    device.connect()
    bad = aggregator.manifest(
        0, FederationState.WAITING, certificate=aggregator.certificate(sealing_key=bytes(32))
    )
    effects = device.hear_manifest(bad)
    assert [effect.reject for effect in effects if isinstance(effect, Refused)] == [Reject.BAD_SEAL]


def test_what_is_not_for_a_device_is_refused() -> None:
    device = ready()
    (refused,) = device.hear(device.aggregator.manifest(1).payload)  # not on the manifest's topic
    assert isinstance(refused, Refused)
    assert refused.reject is Reject.UNEXPECTED_KIND
    (checkin,) = (effect for effect in device.effects if isinstance(effect, Send))
    (refused,) = device.hear(checkin.payload)
    assert isinstance(refused, Refused)
    assert refused.reject is Reject.UNEXPECTED_KIND


def test_the_standing_subscriptions_are_the_manifest_and_the_own_topic() -> None:
    device = ready()
    assert standing_subscriptions(device.session.identity) == (
        topics.manifest(FEDERATION),
        topics.down(FEDERATION, DEVICE),
    )


# ---- blobs ------------------------------------------------------------------------------------------


def test_what_the_wave_lost_is_pulled_and_nothing_else() -> None:
    device = ready()
    published = device.aggregator.manifest(1)
    model = published.manifest.model.digest
    lost = {topics.blob_piece(FEDERATION, model, index) for index in (0, 2)}
    device.hear_manifest(published)
    device.fetch_all(lambda topic, payload: topic in lost)
    assert device.session.work is Work.FETCHING
    (pull,) = device.fetches(device.wait(4.0))
    assert (pull.digest, pull.wave, pull.want_index, pull.chunks) == (model, False, False, (2,))
    (rest,) = device.fetches(device.fetch_all())  # the last is here, so what is missing before it was lost
    assert (rest.digest, rest.wave, rest.want_index, rest.chunks) == (model, False, False, (0,))
    assert device.session.work is Work.TRAINING


def test_a_wave_lost_as_a_whole_is_pulled_from_the_index_on() -> None:
    device = ready()
    published = device.aggregator.manifest(1)
    model = published.manifest.model.digest
    device.hear_manifest(published)
    device.fetch_all(lambda topic, payload: model.hex() in topic)
    (first,) = device.fetches(device.wait(4.0))
    assert (first.digest, first.want_index, first.chunks) == (model, True, ())
    (second,) = device.fetches(device.fetch_all())  # asked for at once: time stands still here
    assert (second.want_index, second.chunks) == (False, (0, 1, 2))
    assert device.session.work is Work.TRAINING


def test_a_forged_piece_is_refused_and_the_honest_one_still_counts() -> None:
    device = ready()
    published = device.aggregator.manifest(1)
    device.hear_manifest(published)
    forged = Chunk(digest=device.fetches()[0].digest, index=None, content=b"FLB1 forged")
    header = Header(kind=Kind.CHUNK, federation=FEDERATION, payload_digest=sha256())
    (refused,) = device.hear(next(pack(header, forged.encode(), None)))
    assert isinstance(refused, Refused)
    assert refused.reject is Reject.BAD_DIGEST
    device.fetch_all()
    assert device.session.work is Work.TRAINING


def test_a_missed_round_may_have_used_up_the_ticket_so_another_is_sent() -> None:
    device = ready()
    published = device.aggregator.manifest(1, cohort=("device-b",))
    device.hear_manifest(published)
    device.fetch_all()
    sent = len(device.checkins())
    device.hear_manifest(device.aggregator.manifest(2, cohort=("device-b",)))
    device.fetch_all()
    assert len(device.checkins()) == sent
    device.hear_manifest(device.aggregator.manifest(4, cohort=("device-b",)))
    device.fetch_all()
    assert len(device.checkins()) == sent + 1
