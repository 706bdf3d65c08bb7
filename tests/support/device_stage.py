"""A runtime over a broker in memory, with an aggregator that a test drives by hand from the stop poll."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.backends.artifact_folder import folder_bundle, initial_parameters, read_artifact_folder
from edge_runtime.backends.ort import OrtBackend
from edge_runtime.config import load_device_config
from edge_runtime.device.snapshot import Snapshot
from edge_runtime.protocol.crypto.provider import CRYPTO
from edge_runtime.protocol.envelope import unpack
from edge_runtime.protocol.ids import Digest
from edge_runtime.protocol.kinds import Kind
from edge_runtime.protocol.messages import Fetch, Update
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
        self.after_piece: Callable[[], None] = lambda: None

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        if (
            topic.startswith(f"fl/1/{FEDERATION}/up/")
            and unpack(payload, FEDERATION, *Kind).header.kind is Kind.UPDATE
        ):
            self.tried += 1
            self.stage.skew_s += self.stage.piece_s
            self.after_piece()
            if self.tried >= self.fails_at:
                raise Congested("nothing is acknowledged")
        super().publish(topic, payload, retain=retain)


@dataclass
class Stage:
    """The aggregator's side. ``pump`` answers fetches; ``updates`` are those that came, piece by piece.

    ``machine``: what the device's sensors read. ``settings``: sections of device.toml after [data].
    """

    folder: Path
    broker: MemoryBroker = field(default_factory=MemoryBroker)
    aggregator: Aggregator = field(default_factory=lambda: Aggregator(chunk_bytes=16_384))
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    fetched: list[Digest] = field(default_factory=list)
    updates: list[tuple[float, bytes]] = field(default_factory=list)
    max_blob_bytes: int = 1 << 28
    piece_s: float = 0.0
    skew_s: float = 0.0
    machine: Snapshot = field(default_factory=lambda: Snapshot(charging=True))
    looks: int = 0
    settings: str = ""

    def __post_init__(self) -> None:
        self.peer = MemoryTransport(self.broker, "aggregator")
        self.peer.open()
        self.peer.subscribe(f"fl/1/{FEDERATION}/up/#")
        self.uplink = Uplink(self)
        np.savez(self.folder / "train.npz", x=np.ones((64, 1, 8, 8), np.float32), y=np.arange(64) % 10)

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

        config = self.folder / "device.toml"
        config.write_text(f'state_folder = "state"\n[data]\nsource = "train.npz"\n{self.settings}')
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
                config=load_device_config(config),
                store=store,
                transport=self.uplink,
                backend=OrtBackend(),
                runtime_name="test",
                provider=CRYPTO,
                clock=self.clock,
                entropy=os.urandom,
                seed=bytes(32),
                report=lambda event, **fields: self.events.append((event, fields)),
                sensors=self._read,
            ).run(should_stop=should_stop, **options)
        self.uplink = Uplink(self)

    def _read(self) -> Snapshot:
        self.looks += 1
        return self.machine

    def all_told(self, event: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self.events if name == event]

    def update(self) -> Update | None:
        """The one that came, once it is whole."""
        envelopes = {
            (e := unpack(raw, FEDERATION, Kind.UPDATE)).header.chunk_index: e for _, raw in self.updates
        }
        if not envelopes or len(envelopes) < envelopes[min(envelopes)].header.chunk_count:
            return None
        whole = b"".join(envelopes[index].body for index in sorted(envelopes))
        return Update.decode(self.aggregator.open(envelopes[0], whole))

    def told(self, event: str, **fields: Any) -> bool:
        return any(name == event and fields.items() <= seen.items() for name, seen in self.events)
