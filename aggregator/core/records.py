"""What the journal holds. State is a fold over these; nothing else changes it (``state.apply``)."""

from __future__ import annotations

from dataclasses import dataclass

from edge_runtime.protocol.ids import DeviceId, Digest, RoundId
from edge_runtime.protocol.rejects import Reject


@dataclass(frozen=True, kw_only=True)
class CheckedIn:
    """A device's ticket for one selection. ``expires_at``: seconds of the aggregator's clock."""

    device: DeviceId
    sequence: int
    expires_at: float
    samples: int
    codecs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class RoundOpened:
    """``manifest``: the exact signed bytes, so that a restart publishes the same. Uses up the cohort's tickets."""

    round_id: RoundId
    base_version: int
    cohort: tuple[DeviceId, ...]
    deadline: float
    manifest: bytes
    manifest_digest: Digest


@dataclass(frozen=True, kw_only=True)
class UpdateStored:
    """A durable update; it will get exactly one outcome. ``samples`` is n_k after the cap of the plan."""

    round_id: RoundId
    device: DeviceId
    digest: Digest
    samples: int


@dataclass(frozen=True, kw_only=True)
class RoundFrozen:
    """The accepted set, sorted: the next version is a function of it alone."""

    round_id: RoundId
    accepted: tuple[DeviceId, ...]


@dataclass(frozen=True, kw_only=True)
class VersionCommitted:
    """The model moved. ``excluded``: accepted updates that could not be read back, with the reason."""

    round_id: RoundId
    version: int
    model_digest: Digest
    excluded: tuple[tuple[DeviceId, Reject], ...] = ()


@dataclass(frozen=True, kw_only=True)
class RoundPublished:
    """The version's files are in place and the round's private key is gone. ``at``: the aggregator's seconds."""

    round_id: RoundId
    at: float


@dataclass(frozen=True, kw_only=True)
class RoundAborted:
    """No version came of this round; every stored update of it has the outcome ``aborted``."""

    round_id: RoundId
    reason: str
    at: float


Record = (
    CheckedIn | RoundOpened | UpdateStored | RoundFrozen | VersionCommitted | RoundPublished | RoundAborted
)
