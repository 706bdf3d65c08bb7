"""What the journal holds. State is a fold over these; nothing else changes it (``state.apply``)."""

from __future__ import annotations

from dataclasses import dataclass

from edge_runtime.protocol.ids import DeviceId, Digest, RoundId
from edge_runtime.protocol.rejects import Reject


@dataclass(frozen=True, kw_only=True)
class CheckedIn:
    """A device's ticket for one selection. ``expires_at``: seconds of the aggregator's clock.

    ``epoch``: of the certificate it showed.
    """

    device: DeviceId
    sequence: int
    expires_at: float
    samples: int
    codecs: tuple[str, ...]
    epoch: int = 1


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
    """The accepted set, sorted: the next version is a function of it alone.

    A stored update is left out only if its device was evicted meanwhile.
    """

    round_id: RoundId
    accepted: tuple[DeviceId, ...]


@dataclass(frozen=True, kw_only=True)
class VersionCommitted:
    """The model moved. ``excluded``: stored updates that are not in it, with the reason, by device: evicted before
    the freeze, or accepted and not to be read back."""

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


@dataclass(frozen=True, kw_only=True)
class VersionRestored:
    """``version`` has the parameters of the earlier version ``of``; no round made it."""

    version: int
    of: int
    model_digest: Digest


@dataclass(frozen=True, kw_only=True)
class Paused:
    """No round opens until ``Resumed``."""

    at: float


@dataclass(frozen=True, kw_only=True)
class DrainBegun:
    """No round opens; once none is open the aggregator exits. A restart goes on with it."""

    at: float


@dataclass(frozen=True, kw_only=True)
class Drained:
    """The aggregator exits now; the next start opens rounds again, unless it is paused."""

    at: float


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """Rounds may open again: the end of a pause, and of a drain that is not done."""

    at: float


@dataclass(frozen=True, kw_only=True)
class Evicted:
    """The device takes part in nothing from now on; its ticket is gone."""

    device: DeviceId
    at: float


@dataclass(frozen=True, kw_only=True)
class Readmitted:
    """The end of an eviction."""

    device: DeviceId


@dataclass(frozen=True, kw_only=True)
class RevocationsTaken:
    """The root's list ``number``, which replaces the last: each device's certificates up to this epoch are void."""

    number: int
    revoked: tuple[tuple[DeviceId, int], ...]


Record = (
    CheckedIn
    | RoundOpened
    | UpdateStored
    | RoundFrozen
    | VersionCommitted
    | RoundPublished
    | RoundAborted
    | VersionRestored
    | Paused
    | DrainBegun
    | Drained
    | Resumed
    | Evicted
    | Readmitted
    | RevocationsTaken
)
