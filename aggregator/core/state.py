"""The state of the federation's rounds, and ``apply``: the only code that changes it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from aggregator.core.records import (
    CheckedIn,
    DrainBegun,
    Drained,
    Evicted,
    Paused,
    Readmitted,
    Record,
    Resumed,
    RevocationsTaken,
    RoundAborted,
    RoundFrozen,
    RoundOpened,
    RoundPublished,
    UpdateStored,
    VersionCommitted,
    VersionRestored,
)
from edge_runtime.protocol.errors import LocalProtocolError
from edge_runtime.protocol.ids import DeviceId, Digest, RoundId
from edge_runtime.protocol.rounds import MOVES, Phase


@dataclass(frozen=True, kw_only=True)
class Round:
    """The current round. ``cohort`` and ``accepted`` are sorted; ``deadline`` is in the aggregator's seconds."""

    round_id: RoundId
    phase: Phase
    base_version: int
    cohort: frozenset[DeviceId]
    deadline: float
    manifest: bytes
    manifest_digest: Digest
    accepted: tuple[DeviceId, ...] = ()


@dataclass(kw_only=True)
class State:
    """``round`` is None before the first. ``tickets``: check-ins not yet used, by device.

    ``idle_since``: when the last round ended, in the aggregator's seconds; None before the first.
    ``restored_from``: the version that the newest one repeats, until a round opens on it.
    ``revoked``: by device, the last epoch of the certificates that are void; ``revocations``: the list's number.
    """

    generation: int = 1
    version: int = 0
    round: Round | None = None
    stored: dict[DeviceId, UpdateStored] = field(default_factory=dict)
    tickets: dict[DeviceId, CheckedIn] = field(default_factory=dict)
    idle_since: float | None = None
    restored_from: int | None = None
    paused: bool = False
    draining: bool = False
    evicted: set[DeviceId] = field(default_factory=set)
    revocations: int = 0
    revoked: dict[DeviceId, int] = field(default_factory=dict)

    @property
    def phase(self) -> Phase | None:
        return self.round.phase if self.round else None

    @property
    def at_rest(self) -> bool:
        """No round is open."""
        return self.round is None or not MOVES[self.round.phase]

    @property
    def counted(self) -> frozenset[DeviceId]:
        """Whose stored updates the open round would aggregate now: all but those of evicted devices."""
        return frozenset(self.stored.keys() - self.evicted)


def fold(state: State, records: Iterable[Record]) -> State:
    """Apply all, in order; what recovery does with the journal."""
    for record in records:
        apply(state, record)
    return state


def apply(state: State, record: Record) -> None:
    """Change ``state`` by one record. Raises LocalProtocolError if the journal contradicts itself."""
    match record:
        case CheckedIn():
            state.tickets[record.device] = record
        case RoundOpened():
            if state.round is not None and MOVES[state.round.phase]:
                raise LocalProtocolError(
                    f"round {record.round_id} opened while one is {state.round.phase.value}"
                )
            if state.round is not None and record.round_id <= state.round.round_id:
                raise LocalProtocolError(f"round {record.round_id} is not after {state.round.round_id}")
            for device in record.cohort:
                state.tickets.pop(device, None)
            state.stored = {}
            state.restored_from = None
            state.generation = record.round_id.generation
            state.round = Round(
                round_id=record.round_id,
                phase=Phase.COLLECTING,
                base_version=record.base_version,
                cohort=frozenset(record.cohort),
                deadline=record.deadline,
                manifest=record.manifest,
                manifest_digest=record.manifest_digest,
            )
        case UpdateStored():
            current = _current(state, record.round_id)
            if current.phase is not Phase.COLLECTING or record.device in state.stored:
                raise LocalProtocolError(
                    f"{record.device} stored twice or after the cut-off of {record.round_id}"
                )
            state.stored[record.device] = record
        case RoundFrozen():
            if not set(record.accepted) <= state.counted:
                raise LocalProtocolError(f"round {record.round_id} accepts updates that do not count")
            _move(state, record.round_id, Phase.FROZEN, accepted=record.accepted)
        case VersionCommitted():
            if record.version != state.version + 1:
                raise LocalProtocolError(f"version {record.version} does not follow {state.version}")
            _move(state, record.round_id, Phase.AGGREGATED)
            state.version = record.version
        case RoundPublished():
            _move(state, record.round_id, Phase.PUBLISHED)
            state.idle_since = record.at
        case RoundAborted():
            _move(state, record.round_id, Phase.ABORTED)
            state.idle_since = record.at
        case VersionRestored():
            if not state.at_rest or record.version != state.version + 1 or not 0 <= record.of < state.version:
                raise LocalProtocolError(f"version {record.version} cannot be version {record.of} again")
            state.version = record.version
            state.restored_from = record.of
        case Paused():
            state.paused = True
        case DrainBegun():
            state.draining = True
        case Drained():
            state.draining = False
        case Resumed():
            state.paused = state.draining = False
        case Evicted():
            state.evicted.add(record.device)
            state.tickets.pop(record.device, None)
        case Readmitted():
            state.evicted.discard(record.device)
        case RevocationsTaken():
            if not state.at_rest or record.number <= state.revocations:
                raise LocalProtocolError(
                    f"list {record.number} of revocations is not after {state.revocations}"
                )
            state.revocations = record.number
            state.revoked = dict(record.revoked)
            for device, epoch in record.revoked:
                if (ticket := state.tickets.get(device)) is not None and ticket.epoch <= epoch:
                    del state.tickets[device]


def _current(state: State, round_id: RoundId) -> Round:
    if state.round is None or state.round.round_id != round_id:
        raise LocalProtocolError(f"a record speaks of round {round_id}, which is not the current one")
    return state.round


def _move(state: State, round_id: RoundId, to: Phase, accepted: tuple[DeviceId, ...] | None = None) -> None:
    current = _current(state, round_id)
    if to not in MOVES[current.phase]:
        raise LocalProtocolError(f"round {round_id} cannot go from {current.phase.value} to {to.value}")
    # Round is small and immutable: whoever holds one holds a consistent view.
    state.round = Round(
        **{**current.__dict__, "phase": to, "accepted": current.accepted if accepted is None else accepted}
    )
