"""The engine's start, on a real folder: what a crash has left behind is taken up or cleared away."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from aggregator.config import AggregatorConfig, load_aggregator_config
from aggregator.core.records import RoundAborted, RoundPublished
from aggregator.engine import MAX_WAITING
from aggregator.intake import UpdatePiece
from aggregator.ledger.errors import LedgerInUseError
from aggregator.ledger.values import Batch, Count, Piece
from aggregator.round_maker import ArtifactChanged, ChunksTooSmall, OptimizerMissing
from aggregator.service import Service, open_ledger
from aggregator.setup import initialise
from aggregator.work import Outgoing, Work
from edge_runtime.protocol import topics
from edge_runtime.protocol.artifact import Artifact
from edge_runtime.protocol.envelope import Header, pack, unpack
from edge_runtime.protocol.ids import RoundId, sha256
from edge_runtime.protocol.kinds import Kind
from edge_runtime.protocol.manifest import Manifest
from edge_runtime.protocol.messages import Fetch
from edge_runtime.protocol.rounds import FederationState, Phase
from tests.support.engines import FEDERATION, ONE, A, announced, opened, service

ARTIFACT = Path(__file__).parents[3] / "examples" / "digits" / "artifact"


@pytest.fixture
def config(tmp_path: Path) -> AggregatorConfig:
    return load_aggregator_config(
        initialise(tmp_path / "agg", FEDERATION, ARTIFACT, "mqtt://127.0.0.1:1", [])
    )


def leave_a_piece(running: Service) -> Piece:
    inbox = running.engine.updates.inbox
    position = inbox.append(ONE, b"sealed")
    inbox.sync()
    return Piece(round_id=ONE, device=A, digest=sha256(b"sealed"), index=0, count=1, position=position)


def test_a_crash_before_an_aborted_round_was_cleaned_up_leaves_no_key_and_no_update(
    config: AggregatorConfig,
) -> None:
    with service(config) as running:
        piece = leave_a_piece(running)
        aborted = RoundAborted(round_id=ONE, reason="too few", at=1.0)
        running.engine.ledger.commit(Batch(records=(opened(running), aborted), pieces=(piece,)))
    with service(config) as running:
        running.engine.start()
        assert running.engine.ledger.durable_ends() == {}
        assert running.engine.updates.inbox.rounds() == ()
        assert not list((config.folder / "round-keys").iterdir())


def test_the_pieces_and_the_key_of_an_open_round_stay(config: AggregatorConfig) -> None:
    with service(config) as running:
        piece = leave_a_piece(running)
        running.engine.ledger.commit(Batch(records=(opened(running),), pieces=(piece,)))
    with service(config) as running:
        running.engine.start()
        assert running.engine.ledger.durable_ends() == {ONE: piece.position}
        assert running.engine.keys.get(ONE)
        (manifest,) = announced(running.engine)
        assert (manifest.state, manifest.round_id) == (FederationState.COLLECTING, ONE)


def test_a_federation_without_an_open_round_asks_devices_to_check_in(config: AggregatorConfig) -> None:
    with service(config) as running:
        running.engine.start()
        (manifest,) = announced(running.engine)
        assert (manifest.state, manifest.round_id) == (FederationState.WAITING, RoundId(1, 0))


def test_a_broker_that_takes_nothing_is_not_sent_ever_more_pieces(config: AggregatorConfig) -> None:
    with service(config) as running:
        engine = running.engine
        engine.start()
        engine.outgoing.extend([Outgoing("t", b"")] * (MAX_WAITING - len(engine.outgoing)))
        ref = engine.blobs.offer(bytes(10_000))
        engine.blobs.request(engine.clock(), A, Fetch(digest=ref.digest, wave=False, want_index=True))
        engine.tick()
        assert len(engine.outgoing) == MAX_WAITING
        engine.outgoing.clear()
        engine.tick()
        assert [message.topic for message in engine.outgoing] == [topics.down(FEDERATION, A)]


def test_a_raised_generation_aborts_the_open_round_and_says_so_under_the_new_one(
    config: AggregatorConfig, tmp_path: Path
) -> None:
    from aggregator import registrar
    from aggregator.setup import write_certificate
    from edge_runtime.protocol.crypto.provider import CRYPTO

    with service(config) as running:
        running.engine.ledger.commit(Batch(records=(opened(running),)))
        identity = running.engine.maker.identity
    root = registrar.open(tmp_path / "agg" / "registrar")
    public = (
        CRYPTO.verify_key(identity.signing_key).raw,
        CRYPTO.sealing_public_key(identity.sealing_key).raw,
    )
    write_certificate(config.certificate_file, root.certify_aggregator(*public, 2, 0, 100))
    root.close()
    text = (tmp_path / "agg" / "aggregator.toml").read_text().replace("generation = 1", "generation = 2")
    (tmp_path / "agg" / "aggregator.toml").write_text(text)
    with service(load_aggregator_config(tmp_path / "agg" / "aggregator.toml")) as running:
        running.engine.start()
        assert running.engine.state.phase is Phase.ABORTED
        (manifest,) = announced(running.engine)
        assert (manifest.state, manifest.round_id) == (FederationState.WAITING, RoundId(2, 1))
        records = list(running.engine.ledger.journal())
        assert isinstance(records[-1], RoundAborted)
        assert not any(isinstance(record, RoundPublished) for record in records)


def test_chunks_too_small_for_the_list_of_chunks_are_refused_before_serving(
    config: AggregatorConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aggregator.round_maker.index_bytes", lambda size, chunk: chunk + 1)
    with pytest.raises(ChunksTooSmall, match="double"), service(config):
        pass


def test_an_artifact_without_the_plans_optimizer_is_refused_before_serving(config: AggregatorConfig) -> None:
    with service(config) as running:
        maker = running.engine.maker
    manifest = dataclasses.replace(maker.artifact.manifest, optimizers={"sgd": ("momentum",)})
    artifact = Artifact(manifest, maker.artifact.files)
    with pytest.raises(OptimizerMissing, match=r"plan.optimizer is 'adamw'.* has graphs of sgd only"):
        dataclasses.replace(maker, artifact=artifact, plan=dataclasses.replace(maker.plan, optimizer="adamw"))


def test_an_open_round_is_counted_by_the_plan_of_its_manifest_whatever_the_settings_say_now(
    config: AggregatorConfig, tmp_path: Path
) -> None:
    with service(config) as running:
        record = opened(running)
        running.engine.ledger.commit(Batch(records=(record,)))
        promised = Manifest.decode(unpack(record.manifest, FEDERATION, Kind.MANIFEST).body).plan
    changed = dataclasses.replace(
        config, plan=dataclasses.replace(config.plan, beta=2.0, codecs=("float32",))
    )
    with service(changed) as running:
        running.engine.start()
        assert running.engine._plan == promised
        assert promised.beta == 0.0


def test_an_update_of_an_open_round_may_have_the_size_of_the_codec_that_round_asked_for(
    config: AggregatorConfig,
) -> None:
    plan = dataclasses.replace(config.plan, codecs=("float32",))
    with service(dataclasses.replace(config, plan=plan)) as running:
        asked_for = running.engine.updates.max_bytes
        running.engine.ledger.commit(Batch(records=(opened(running),)))
    small = dataclasses.replace(config, plan=dataclasses.replace(config.plan, codecs=("int8-block",)))
    with service(small) as running:
        assert running.engine.updates.max_bytes < asked_for / 2
        running.engine.start()
        assert running.engine.updates.max_bytes == asked_for


def test_an_open_round_of_another_artifact_is_refused_at_the_start(
    config: AggregatorConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with service(config) as running:
        running.engine.ledger.commit(Batch(records=(opened(running),)))
    with service(config) as running:
        running.engine.maker._bundle += b"changed"
        with pytest.raises(ArtifactChanged, match="put that one back"):
            running.engine.start()


def test_a_clean_stop_lets_another_holder_claim_the_ledger(config: AggregatorConfig) -> None:
    with service(config) as running, pytest.raises(LedgerInUseError):
        running.engine.ledger.claim("another")
    ledger = open_ledger(config)
    ledger.claim("another")
    ledger.close()


def test_an_update_in_many_pieces_that_comes_late_is_answered_and_counted_once(
    config: AggregatorConfig,
) -> None:
    with service(config) as running:
        record = opened(running)
        running.engine.ledger.commit(
            Batch(records=(record, RoundAborted(round_id=ONE, reason="few", at=1.0)))
        )
    with service(config) as running:
        head = Header(
            kind=Kind.UPDATE,
            federation=FEDERATION,
            round_id=ONE,
            manifest_digest=record.manifest_digest,
            device=A,
            payload_digest=sha256(),
        )
        work = Work()
        for piece in pack(head, bytes(20_000), lambda message: bytes(64), 8192):
            running.engine._reception._update(UpdatePiece(A, unpack(piece, FEDERATION, Kind.UPDATE)), work)
        assert len(work.outgoing) == 1
        assert work.counts == {Count.LATE: 1}
