"""An aggregator's engine on a real folder, over a broker in memory, with a clock that a test moves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aggregator.config import AggregatorConfig
from aggregator.core.events import PrepareRound
from aggregator.core.records import (
    Record,
    RoundFrozen,
    RoundOpened,
    RoundPublished,
    UpdateStored,
    VersionCommitted,
)
from aggregator.engine import Engine
from aggregator.ledger.values import Batch, DeviceSeen
from aggregator.service import Service
from edge_runtime.protocol import topics
from edge_runtime.protocol.envelope import unpack
from edge_runtime.protocol.ids import DeviceId, FederationId, RoundId, sha256
from edge_runtime.protocol.kinds import Kind
from edge_runtime.protocol.manifest import Manifest
from edge_runtime.protocol.tensors import Vector
from edge_runtime.transport.memory import MemoryBroker, MemoryTransport

FEDERATION = FederationId("fed")
ONE = RoundId(1, 1)
A, B = DeviceId("a"), DeviceId("b")
FAR = 4e9  # a deadline that does not come


@dataclass
class Said:
    """What an engine reported."""

    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def __call__(self, event: str, **fields: object) -> None:
        self.events.append((event, fields))

    def of(self, event: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self.events if name == event]


@contextmanager
def service(config: AggregatorConfig, report: Said | None = None) -> Iterator[Service]:
    """Wired and claimed, not started; closed cleanly at the end."""
    transport = MemoryTransport(MemoryBroker(), "aggregator")
    with Service(config=config, report=report or Said(), transport=transport) as running:
        yield running


def opened(
    running: Service, round_id: RoundId = ONE, base: int = 0, cohort: tuple[DeviceId, ...] = (A,)
) -> RoundOpened:
    """What a round's opening leaves in the journal; its key is on disk then."""
    engine = running.engine
    effect = PrepareRound(round_id=round_id, base_version=base, cohort=cohort, deadline=FAR)
    return engine.maker.prepare(effect, parameters(running, base))


def stored(device: DeviceId, round_id: RoundId = ONE) -> UpdateStored:
    return UpdateStored(round_id=round_id, device=device, digest=sha256(device.encode()), samples=7)


def seen(device: DeviceId) -> DeviceSeen:
    """A device that has checked in once."""
    return DeviceSeen(device=device, signing_key=bytes(32), certificate=b"", sequence=1)


def make_versions(running: Service, count: int) -> None:
    """Versions 1 to ``count`` as their rounds leave them: parameters all ``version``, files, records."""
    engine = running.engine
    for version in range(1, count + 1):
        round_id = RoundId(1, version)
        theta = np.full(engine.versions.parameter_count, version, np.float32)
        digest = engine.versions.write_parameters(version, theta)
        engine.versions.publish(version, theta, {"round": version})
        records: tuple[Record, ...] = (
            opened(running, round_id, version - 1),
            stored(A, round_id),
            RoundFrozen(round_id=round_id, accepted=(A,)),
            VersionCommitted(round_id=round_id, version=version, model_digest=digest),
            RoundPublished(round_id=round_id, at=float(version)),
        )
        engine.ledger.commit(Batch(records=records))


def parameters(running: Service, version: int) -> Vector:
    """Of a version in the ledger, or of version 0."""
    engine = running.engine
    row = engine.ledger.version(version)
    digest = row.model_digest if row is not None else engine.versions.initial_digest()
    return engine.versions.read_parameters(version, digest)


def announced(engine: Engine) -> list[Manifest]:
    """The manifests that wait to be published, oldest first."""
    return [
        Manifest.decode(unpack(message.payload, FEDERATION, Kind.MANIFEST).body)
        for message in engine.outgoing
        if message.topic == topics.manifest(FEDERATION)
    ]
