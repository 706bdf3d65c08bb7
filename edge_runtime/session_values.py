"""What goes into a device's session and what comes out: events, effects, and who the device is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from edge_runtime.protocol.crypto.keys import SigningKey, VerifyKey
from edge_runtime.protocol.ids import DeviceId, Digest, FederationId, RoundId
from edge_runtime.protocol.manifest import Manifest
from edge_runtime.protocol.messages import Telemetry, Update
from edge_runtime.protocol.rejects import Reject
from edge_runtime.protocol.rounds import Verdict
from edge_runtime.store.outbox import Message, OutboxEntry

# ---- events -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Connected:
    session_present: bool


@dataclass(frozen=True)
class Disconnected:
    pass


@dataclass(frozen=True)
class Received:
    topic: str
    payload: bytes


@dataclass(frozen=True)
class Trained:
    """Training of this round ended; ``update`` is ready to be sealed."""

    round_id: RoundId
    update: Update
    telemetry: Telemetry | None = None


@dataclass(frozen=True)
class TrainingFailed:
    """Local training could not produce an update; the device sits this round out."""

    round_id: RoundId
    reason: str


@dataclass(frozen=True)
class UpdateSent:
    """A ``SendUpdate`` was run, wholly or until the connection failed; ``upload_s``: how long that took."""

    round_id: RoundId
    upload_s: float


@dataclass(frozen=True)
class ArtifactLost:
    """The artifact of this ``Train`` is no longer in the cache; nothing was trained."""

    train: Train


@dataclass(frozen=True)
class Eligibility:
    """The owner's policy has changed its mind. Without this event a device may do both.

    ``may_train``: False ends check-ins, fetches and training. ``may_send``: False keeps back a finished update too.
    """

    may_train: bool
    may_send: bool = True


@dataclass(frozen=True)
class TrainingPaused:
    """The answer to ``PauseTraining``: what was begun, so that it need not be fetched again."""

    train: Train


@dataclass(frozen=True)
class Tick:
    pass


Event = (
    Connected
    | Disconnected
    | Received
    | Trained
    | TrainingFailed
    | TrainingPaused
    | UpdateSent
    | ArtifactLost
    | Eligibility
    | Tick
)

# ---- effects ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subscribe:
    pattern: str


@dataclass(frozen=True)
class Unsubscribe:
    pattern: str


@dataclass(frozen=True)
class Send:
    topic: str
    payload: bytes


@dataclass(frozen=True)
class SendUpdate:
    """All messages of an update, in this order; after one that cannot be sent, the others need not be tried.

    Answer with ``UpdateSent``: until then the update is not sent again.
    """

    round_id: RoundId
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Remember:
    """Durably: this is the highest round seen."""

    round_id: RoundId


@dataclass(frozen=True)
class Journal:
    """Durably: these messages, before any of them is sent."""

    entry: OutboxEntry


@dataclass(frozen=True)
class Settle:
    """Durably: this round is over for us; its journal entry can go and it is never trained again.

    ``verdict``: what the receipt said; None: no update came of the training, or no receipt matters any more.
    """

    round_id: RoundId
    verdict: Verdict | None
    reject: Reject | None = None


@dataclass(frozen=True)
class KeepArtifact:
    """Put the artifact into the cache."""

    digest: Digest
    content: bytes


@dataclass(frozen=True)
class Train:
    """``artifact`` is in the cache under this digest; ``model``: float32 little-endian, shape (d,).

    The round may have been begun before, in this process or an earlier one: go on from its checkpoint.
    """

    manifest: Manifest
    manifest_digest: Digest
    artifact: Digest
    model: bytes


@dataclass(frozen=True)
class StopTraining:
    """For good: the round is over."""

    reason: str


@dataclass(frozen=True)
class PauseTraining:
    """Checkpoint and stop, for want of eligibility; answer with ``TrainingPaused``."""


@dataclass(frozen=True)
class Refused:
    """A message from outside was refused; count and log it."""

    reject: Reject
    detail: str


@dataclass(frozen=True)
class FederationFinished:
    manifest: Manifest


Effect = (
    Subscribe
    | Unsubscribe
    | Send
    | SendUpdate
    | Remember
    | Journal
    | Settle
    | KeepArtifact
    | Train
    | StopTraining
    | PauseTraining
    | Refused
    | FederationFinished
)


class Work(Enum):
    """What the device is at."""

    IDLE = "idle"
    FETCHING = "fetching"
    TRAINING = "training"


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Who this device is and whom it trusts."""

    federation: FederationId
    device: DeviceId
    signing_key: SigningKey
    certificate: bytes
    root: VerifyKey


@dataclass(frozen=True, kw_only=True)
class Capability:
    """What a check-in tells."""

    samples: int
    free_memory_bytes: int
    codecs: tuple[str, ...]
    runtime: str
    ttl_s: int
