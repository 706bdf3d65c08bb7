"""The runtime over a broker in memory, with an aggregator that a test drives by hand from the stop poll."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.backends.artifact_folder import folder_bundle, initial_parameters, read_artifact_folder
from edge_runtime.backends.ort import OrtBackend
from edge_runtime.config import load_device_config
from edge_runtime.protocol.crypto.provider import CRYPTO
from edge_runtime.protocol.envelope import unpack
from edge_runtime.protocol.ids import Digest
from edge_runtime.protocol.kinds import Kind
from edge_runtime.protocol.messages import Fetch
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.rounds import FederationState
from edge_runtime.runtime import Runtime
from edge_runtime.store import DeviceStore, Enrolment
from edge_runtime.transport.base import Congested, Received
from edge_runtime.transport.memory import MemoryBroker, MemoryTransport
from tests.support.brokers import ROOT
from tests.support.session_driver import (
    DEVICE,
    FEDERATION,
    Aggregator,
    Published,
    device_identity,
    signing_key,
)

ARTIFACT = read_artifact_folder(ROOT / "examples" / "digits" / "artifact")
BUNDLE = folder_bundle(ARTIFACT)
MODEL = initial_parameters(ARTIFACT).astype("<f4").tobytes()
PLAN = Plan(codecs=("float32",), epochs=0, steps=12, batch_size=32)


class Uplink(MemoryTransport):
    """Every publish takes ``seconds`` of the test's clock; from the ``fails_at``-th piece of an update on, none
    is taken."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage.broker, "device")
        self.stage = stage
        self.tried = 0
        self.fails_at = 1 << 30

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        if (
            topic.startswith(f"fl/1/{FEDERATION}/up/")
            and unpack(payload, FEDERATION, *Kind).header.kind is Kind.UPDATE
        ):
            self.tried += 1
            self.stage.skew_s += self.stage.piece_s
            if self.tried >= self.fails_at:
                raise Congested("nothing is acknowledged")
        super().publish(topic, payload, retain=retain)


@dataclass
class Stage:
    """The aggregator's side. ``pump`` answers fetches; ``updates`` are those that came, piece by piece."""

    folder: Path
    broker: MemoryBroker = field(default_factory=MemoryBroker)
    aggregator: Aggregator = field(default_factory=lambda: Aggregator(chunk_bytes=16_384))
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    fetched: list[Digest] = field(default_factory=list)
    updates: list[tuple[float, bytes]] = field(default_factory=list)
    max_blob_bytes: int = 1 << 28
    piece_s: float = 0.0
    skew_s: float = 0.0

    def __post_init__(self) -> None:
        self.peer = MemoryTransport(self.broker, "aggregator")
        self.peer.open()
        self.peer.subscribe(f"fl/1/{FEDERATION}/up/#")
        self.uplink = Uplink(self)
        np.savez(self.folder / "train.npz", x=np.ones((64, 1, 8, 8), np.float32), y=np.arange(64) % 10)
        (self.folder / "device.toml").write_text('state_folder = "state"\n[data]\nsource = "train.npz"\n')

    def clock(self) -> float:
        return time.monotonic() + self.skew_s

    def manifest(
        self, number: int, state: FederationState = FederationState.COLLECTING, **changes: Any
    ) -> Published:
        values = {
            "model": MODEL,
            "artifact": BUNDLE,
            "plan": PLAN,
            "parameter_count": len(MODEL) // 4,
            **changes,
        }
        published = self.aggregator.manifest(number, state, **values)
        self.peer.publish(f"fl/1/{FEDERATION}/manifest", published.payload, retain=True)
        return published

    def pump(self) -> None:
        while (event := self.peer.next_event(0)) is not None:
            if not isinstance(event, Received):
                continue
            envelope = unpack(event.payload, FEDERATION, *Kind)
            if envelope.header.kind is Kind.FETCH:
                fetch = Fetch.decode(envelope.body)
                self.fetched.append(fetch.digest)
                self.aggregator.blobs.request(self.clock(), DEVICE, fetch)
            elif envelope.header.kind is Kind.UPDATE:
                self.updates.append((self.clock(), event.payload))
        for topic, payload in self.aggregator.blobs.due(self.clock()):
            self.peer.publish(topic, payload)

    def run(self, enough: Callable[[], bool], **options: Any) -> None:
        """One life of the device, until ``enough`` at a poll; 30 s are too long."""
        deadline = time.monotonic() + 30.0

        def should_stop() -> bool:
            self.pump()
            assert time.monotonic() < deadline, self.events
            return enough()

        identity = device_identity(self.aggregator)
        with DeviceStore(self.folder / "state", max_blob_bytes=self.max_blob_bytes) as store:
            store.signing_key(lambda: signing_key(20))
            store.enrol(
                Enrolment(
                    federation=FEDERATION,
                    device=DEVICE,
                    broker_url="mqtt://unused",
                    root_key=identity.root,
                    certificate=identity.certificate,
                )
            )
            Runtime(
                config=load_device_config(self.folder / "device.toml"),
                store=store,
                transport=self.uplink,
                backend=OrtBackend(),
                runtime_name="test",
                provider=CRYPTO,
                clock=self.clock,
                entropy=os.urandom,
                seed=bytes(32),
                report=lambda event, **fields: self.events.append((event, fields)),
            ).run(should_stop=should_stop, **options)
        self.uplink = Uplink(self)

    def told(self, event: str, **fields: Any) -> bool:
        return any(name == event and fields.items() <= seen.items() for name, seen in self.events)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path)
    yield stage
    stage.peer.close()


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
