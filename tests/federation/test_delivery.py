"""However models and updates are cut up, and whoever the broker is: the same models."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.protocol.kinds import Kind
from edge_runtime.protocol.messages import Chunk
from tests.federation.conftest import ROUNDS, Undisturbed
from tests.support.federation import aggregated_once, federation

pytestmark = pytest.mark.long


def test_small_chunks_make_the_same_models(tmp_path: Path, undisturbed: Undisturbed) -> None:
    with federation(tmp_path, record=True, plan__sample_cap=10_007, delivery__chunk_bytes=8192) as fed:
        fed.start()
        assert fed.finish() == undisturbed.models
        aggregated_once(fed.status(), devices=3, versions=ROUNDS)
        sent = fed.traffic.updates()
        assert len(sent) == 3 * ROUNDS
        assert min(len(pieces) for pieces in sent.values()) >= 3
        chunks = [Chunk.decode(envelope.body) for _, envelope in fed.traffic.envelopes(Kind.CHUNK)]
        assert max(chunk.index for chunk in chunks if chunk.index is not None) >= 18
        assert max(len(message.payload) for message in fed.traffic.messages()) <= 8192 + 512


def test_an_update_of_several_pieces_survives_the_death_of_its_device_and_of_the_aggregator(
    tmp_path: Path, undisturbed: Undisturbed
) -> None:
    """Both die as soon as the update is journalled: before, among or after its pieces, as it happens."""
    with federation(
        tmp_path, record=True, gated=["device-2"], plan__sample_cap=10_007, delivery__chunk_bytes=8192
    ) as fed:
        fed.start()
        fed.wait_at_gate("device-2")
        fed.open_gate("device-2")
        slow = fed.devices["device-2"]
        slow.wait_for("update_journalled", round=1)
        slow.kill()
        fed.aggregator.kill()
        fed.aggregator.start()
        slow.start()
        assert fed.finish() == undisturbed.models
        aggregated_once(fed.status(), devices=3, versions=ROUNDS)
        sent = fed.traffic.updates()
        assert {len(payloads) for pieces in sent.values() for payloads in pieces.values()} == {1}


def test_the_python_broker_carries_a_run(tmp_path: Path, undisturbed: Undisturbed) -> None:
    with federation(tmp_path, broker="amqtt", plan__sample_cap=10_007, round__rounds=2) as fed:
        fed.start()
        models = fed.finish()
        assert models == {version: undisturbed.models[version] for version in (1, 2)}
        aggregated_once(fed.status(), devices=3, versions=2)
