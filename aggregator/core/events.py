"""What may happen to the core (events), and what it asks its shell to do after the commit (effects)."""

from __future__ import annotations

from dataclasses import dataclass

from aggregator.core.records import Record, RoundOpened, UpdateStored
from edge_runtime.protocol.ids import DeviceId, Digest, RoundId
from edge_runtime.protocol.rejects import Reject
from edge_runtime.protocol.rounds import Verdict

# ---- events -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recovered:
    """The state was folded from the journal; nothing is running."""


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, kw_only=True)
class CheckInArrived:
    device: DeviceId
    sequence: int
    ttl_s: float
    samples: int
    codecs: tuple[str, ...]
    epoch: int = 1


@dataclass(frozen=True)
class RoundPrepared:
    """The shell made the round's key, cohort blob and signed manifest that ``PrepareRound`` asked for."""

    opened: RoundOpened


@dataclass(frozen=True)
class UpdateArrived:
    """A screened update whose content has been opened and checked."""

    update: UpdateStored


@dataclass(frozen=True, kw_only=True)
class Aggregated:
    """The new model is on disk. ``excluded``: accepted updates that could not be read back."""

    round_id: RoundId
    model_digest: Digest
    excluded: tuple[tuple[DeviceId, Reject], ...] = ()


@dataclass(frozen=True)
class AggregationFailed:
    round_id: RoundId
    reason: str


@dataclass(frozen=True)
class VersionPublished:
    round_id: RoundId


@dataclass(frozen=True)
class PauseOrdered:
    """The operator wants no new round."""


@dataclass(frozen=True)
class DrainOrdered:
    """The operator wants the open round to end, no new one, and the aggregator to exit then."""


@dataclass(frozen=True)
class ResumeOrdered:
    """The operator wants rounds again."""


@dataclass(frozen=True)
class EvictOrdered:
    device: DeviceId


@dataclass(frozen=True)
class ReadmitOrdered:
    device: DeviceId


@dataclass(frozen=True, kw_only=True)
class RestoreOrdered:
    """The operator wants version ``of`` again; its parameters are on disk as those of the next version."""

    of: int
    model_digest: Digest


@dataclass(frozen=True, kw_only=True)
class RevocationsRead:
    """The root's list, verified, with a higher number than the last. Only between rounds."""

    number: int
    revoked: tuple[tuple[DeviceId, int], ...]


Order = PauseOrdered | DrainOrdered | ResumeOrdered | EvictOrdered | ReadmitOrdered | RestoreOrdered

Event = (
    Recovered
    | Tick
    | CheckInArrived
    | RoundPrepared
    | UpdateArrived
    | Aggregated
    | AggregationFailed
    | VersionPublished
    | RevocationsRead
    | Order
)


# ---- effects ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PrepareRound:
    """Answer with ``RoundPrepared`` before the next event: until then every Tick asks again."""

    round_id: RoundId
    base_version: int
    cohort: tuple[DeviceId, ...]
    deadline: float


@dataclass(frozen=True, kw_only=True)
class PublishManifest:
    manifest: bytes


@dataclass(frozen=True)
class RepeatManifest:
    """Say the current manifest again: a device that was not let in then checks in, as others that are idle do."""


@dataclass(frozen=True, kw_only=True)
class SendReceipt:
    device: DeviceId
    round_id: RoundId
    digest: Digest
    verdict: Verdict
    samples: int = 0


@dataclass(frozen=True, kw_only=True)
class Aggregate:
    """Sum the accepted updates onto ``base_version`` and write the model of ``base_version + 1``."""

    round_id: RoundId
    base_version: int
    accepted: tuple[DeviceId, ...]


@dataclass(frozen=True, kw_only=True)
class PublishVersion:
    round_id: RoundId
    version: int


@dataclass(frozen=True, kw_only=True)
class PublishRestored:
    """Put the files of a restored version in place and announce it."""

    version: int
    of: int


@dataclass(frozen=True, kw_only=True)
class CloseRound:
    """The round made no version: its private key and updates go."""

    round_id: RoundId


@dataclass(frozen=True, kw_only=True)
class Finish:
    """All rounds are done: announce it."""

    round_id: RoundId
    version: int


@dataclass(frozen=True)
class Exit:
    """The drain is done: end the program."""


Effect = (
    PrepareRound
    | PublishManifest
    | RepeatManifest
    | SendReceipt
    | Aggregate
    | PublishVersion
    | PublishRestored
    | CloseRound
    | Finish
    | Exit
)


@dataclass(frozen=True)
class Decision:
    """``wake_at``: when to send the next Tick at the latest; None: no need.

    ``answer``: to an order, for the operator; ``refused``: the order changes nothing.
    """

    records: tuple[Record, ...] = ()
    effects: tuple[Effect, ...] = ()
    wake_at: float | None = None
    answer: str = ""
    refused: bool = False
