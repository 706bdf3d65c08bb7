"""What goes into the ledger in one commit, and what comes out of its tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from aggregator.core.records import Record
from aggregator.inbox.segments import Position
from edge_runtime.protocol.ids import DeviceId, Digest, RoundId
from edge_runtime.protocol.messages import Telemetry
from edge_runtime.protocol.rejects import Reject
from edge_runtime.protocol.rounds import Outcome, Phase


class Count(Enum):
    """What is counted besides refusals, which are counted by ``Reject``."""

    LATE = "late"
    DUPLICATE = "duplicate"
    UPDATE_BYTES = "update_bytes"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Piece ``index`` of ``count`` of the update with this payload digest lies at ``position`` of the inbox."""

    round_id: RoundId
    device: DeviceId
    digest: Digest
    index: int
    count: int
    position: Position


@dataclass(frozen=True, kw_only=True)
class DeviceSeen:
    """A device that proved itself. ``certificate``: as it travelled; ``sequence``: in [0, 2^64)."""

    device: DeviceId
    signing_key: bytes
    certificate: bytes
    sequence: int


class OrderKind(Enum):
    """What an operator can order; the values are for ever: they are in ledgers."""

    PAUSE = "pause"
    RESUME = "resume"
    DRAIN = "drain"
    EVICT = "evict"
    READMIT = "readmit"
    ROLLBACK = "rollback"


@dataclass(frozen=True, kw_only=True)
class OrderSettled:
    """The answer to an order that waited. ``obeyed`` False: it was refused and changed nothing."""

    id: int
    obeyed: bool
    answer: str


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """A version on held-out data. ``metrics``: by name, such as ``loss``; None: not a finite number."""

    version: int
    samples: int
    metrics: Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One transaction: all of it or nothing.

    records: applied to the state by the caller, in this order.
    pieces: must be durable in the inbox already. One that is known moves to its last position; another number
        of pieces begins the update anew.
    devices: new, or seen again; a device's last sequence never goes back under one key, a new key brings its own.
    telemetry: one report each, added to the device's totals.
    counts: added to the counters.
    forget_pieces: rounds whose pieces leave the index; their inbox folders may be deleted after the commit.
    orders: the answers to orders that waited; their records are in the same batch.
    evaluations: a version evaluated again replaces what was known of it.
    """

    records: tuple[Record, ...] = ()
    pieces: tuple[Piece, ...] = ()
    devices: tuple[DeviceSeen, ...] = ()
    telemetry: tuple[tuple[DeviceId, Telemetry], ...] = ()
    counts: Mapping[Reject | Count, int] = field(default_factory=dict)
    forget_pieces: tuple[RoundId, ...] = ()
    orders: tuple[OrderSettled, ...] = ()
    evaluations: tuple[Evaluated, ...] = ()


@dataclass(frozen=True, kw_only=True)
class UpdateRow:
    """A stored update. ``outcome``: None while its round is open; ``version``, ``reason``: as it asks for."""

    round_id: RoundId
    device: DeviceId
    digest: Digest
    samples: int
    outcome: Outcome | None
    version: int | None
    reason: str | None


@dataclass(frozen=True, kw_only=True)
class DeviceRow:
    device: DeviceId
    signing_key: bytes
    certificate: bytes
    last_sequence: int
    first_seen: float
    last_seen: float


@dataclass(frozen=True, kw_only=True)
class RoundRow:
    """``accepted``: None before the freeze. ``closed_at``: published or aborted, in the aggregator's seconds."""

    round_id: RoundId
    phase: Phase
    base_version: int
    opened_at: float
    closed_at: float | None
    cohort_size: int
    stored: int
    accepted: int | None
    reason: str | None


@dataclass(frozen=True, kw_only=True)
class Presence:
    """Devices: all that ever proved themselves; those whose last check-in has not expired."""

    known: int
    present: int


@dataclass(frozen=True, kw_only=True)
class VersionRow:
    """``round_id``: that made it; None for a version ``restored_from`` an earlier one, whose digest it has."""

    version: int
    round_id: RoundId | None
    model_digest: Digest
    restored_from: int | None


@dataclass(frozen=True, kw_only=True)
class OrderRow:
    """``at``, ``settled_at``: seconds of the clocks of who wrote them. The last three are None while it waits."""

    id: int
    at: float
    kind: str
    argument: str
    by: str
    settled_at: float | None
    obeyed: bool | None
    answer: str | None


@dataclass(frozen=True, kw_only=True)
class EvaluationRow:
    version: int
    at: float
    samples: int
    metrics: Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What orders and the root's revocations amount to now.

    ``evicted``: since when, by device; ``revoked``: the last void epoch, by device; ``revocations``: the number of
    the list that says so, 0 if none was taken.
    """

    paused: bool
    draining: bool
    evicted: Mapping[DeviceId, float]
    revocations: int
    revoked: Mapping[DeviceId, int]


@dataclass(frozen=True, kw_only=True)
class TelemetryRow:
    """The last report of a device and the totals of all. Totals stop at 2^63 - 1.

    ``bytes_up``, ``bytes_down``: a report counts since its process started; a smaller one than the last is
    taken for a new process.
    """

    device: DeviceId
    at: float
    latest: Telemetry
    reports: int
    train_s: float
    steps: int
    samples: int
    peak_memory_bytes: int
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True, kw_only=True)
class Totals:
    """``outcomes``: updates by what became of them; None: their round is open."""

    version: int
    rounds: Mapping[Phase, int]
    outcomes: Mapping[Outcome | None, int]
    devices: int
    rejects: Mapping[Reject, int]
    counts: Mapping[Count, int]
