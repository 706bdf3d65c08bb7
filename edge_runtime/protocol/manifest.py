"""What the aggregator announces: the open round, its plan, and content by name."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from edge_runtime.protocol import wire_pb2 as wire
from edge_runtime.protocol.artifact import MAX_PARAMETER_COUNT
from edge_runtime.protocol.chunks import MAX_CHUNK_BYTES, MIN_CHUNK_BYTES
from edge_runtime.protocol.ids import (
    DeviceId,
    Digest,
    FederationId,
    RoundId,
    device_id,
    digest,
    federation_id,
)
from edge_runtime.protocol.parsing import key_bytes, malformed, parse, within
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.rounds import FederationState

MAX_COHORT = 100_000


@dataclass(frozen=True, kw_only=True)
class BlobRef:
    """Content by name. ``digest``: SHA-256 of its index; ``size``: bytes of the content."""

    digest: Digest
    size: int


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """The selected devices, sorted and unique."""

    devices: tuple[DeviceId, ...]

    def encode(self) -> bytes:
        return wire.Cohort(devices=self.devices).SerializeToString(deterministic=True)

    @classmethod
    def decode(cls, raw: bytes) -> Cohort:
        m = parse(wire.Cohort, raw)
        within("number of selected devices", len(m.devices), 1, MAX_COHORT)
        devices = tuple(device_id(name) for name in m.devices)
        if any(a >= b for a, b in itertools.pairwise(devices)):
            raise malformed("a cohort is sorted and names nobody twice")
        return cls(devices=devices)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The open round. Its digest, the SHA-256 of the received bytes, binds every message of the round.

    ``cohort`` and ``sealing_key`` (the round's X25519 public key, 32 bytes) are there only while collecting.
    """

    federation: FederationId
    round_id: RoundId
    state: FederationState
    base_version: int
    deadline_unix_ms: int
    plan: Plan
    model: BlobRef
    artifact: BlobRef
    chunk_bytes: int
    certificate: bytes
    parameter_count: int
    cohort: BlobRef | None = None
    sealing_key: bytes = b""

    def encode(self) -> bytes:
        def ref(blob: BlobRef) -> wire.BlobRef:
            return wire.BlobRef(digest=blob.digest, size=blob.size)

        return wire.Manifest(
            federation=self.federation,
            generation=self.round_id.generation,
            round=self.round_id.number,
            state=self.state.value,
            base_version=self.base_version,
            deadline_unix_ms=self.deadline_unix_ms,
            plan=self.plan.to_wire(),
            model=ref(self.model),
            artifact=ref(self.artifact),
            cohort=ref(self.cohort) if self.cohort else None,
            sealing_key=self.sealing_key,
            chunk_bytes=self.chunk_bytes,
            certificate=self.certificate,
            parameter_count=self.parameter_count,
        ).SerializeToString(deterministic=True)

    @classmethod
    def decode(cls, raw: bytes) -> Manifest:
        m = parse(wire.Manifest, raw)

        def ref(what: str, blob: wire.BlobRef) -> BlobRef:
            return BlobRef(
                digest=digest(blob.digest), size=within(f"{what}.size", blob.size, 1, 4 * MAX_PARAMETER_COUNT)
            )

        state = FederationState(within("state", m.state, 1, len(FederationState)))
        collecting = state is FederationState.COLLECTING
        return cls(
            federation=federation_id(m.federation),
            round_id=RoundId(m.generation, m.round),
            state=state,
            base_version=m.base_version,
            deadline_unix_ms=m.deadline_unix_ms,
            plan=Plan.from_wire(m.plan),
            model=ref("model", m.model),
            artifact=ref("artifact", m.artifact),
            cohort=ref("cohort", m.cohort) if collecting else None,
            sealing_key=key_bytes("sealing_key", m.sealing_key) if collecting else b"",
            chunk_bytes=within("chunk_bytes", m.chunk_bytes, MIN_CHUNK_BYTES, MAX_CHUNK_BYTES),
            certificate=m.certificate,
            parameter_count=within("parameter_count", m.parameter_count, 1, MAX_PARAMETER_COUNT),
        )
