"""The round as a step function: (state, now, event) -> (records, effects). Pure.

The caller applies and commits the records first and runs the effects after the commit. Every effect may run
again after a crash: each is idempotent, and ``Recovered`` asks for those that an open round still needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from aggregator.core.records import (
    CheckedIn,
    Record,
    RoundAborted,
    RoundFrozen,
    RoundOpened,
    RoundPublished,
    UpdateStored,
    VersionCommitted,
)
from aggregator.core.selection import draw_cohort
from aggregator.core.state import Round, State
from edge_runtime.protocol.errors import LocalProtocolError
from edge_runtime.protocol.ids import DeviceId, Digest, RoundId
from edge_runtime.protocol.manifest import MAX_COHORT
from edge_runtime.protocol.rejects import Reject
from edge_runtime.protocol.rounds import Phase, Verdict


@dataclass(frozen=True, kw_only=True)
class RoundRules:
    """When a round opens and closes. Counts of devices; times in seconds.

    rounds: versions to make in all; the federation is finished then.
    fleet: wait for this many check-ins before the first round; 0: the cohort's size.
    cohort: how many are selected; more than ``goal`` is over-selection against dropout.
    share: select at least this share of the free devices, in [0, 1]; goal and minimum grow with the cohort.
    goal: freeze as soon as this many updates are stored. minimum: freeze at the deadline with at least this many.
    patience_s: after this long without a full cohort, open a round with at least ``minimum`` devices; the first
        round waits for its fleet however long it takes.
    retry_s: how often to look again while waiting.
    """

    rounds: int = 100
    cohort: int = 5
    goal: int = 4
    minimum: int = 3
    deadline_s: float = 300.0
    share: float = 0.0
    fleet: int = 0
    patience_s: float = 30.0
    retry_s: float = 1.0

    def size_of(self, available: int) -> int:
        """How many of ``available`` free devices to select."""
        return min(MAX_COHORT, max(self.cohort, math.floor(self.share * available)))

    def goal_of(self, selected: int) -> int:
        """The goal in a round of so many: in proportion above ``cohort``, never more than there are."""
        return max(min(self.goal, selected), self.goal * selected // self.cohort)

    def minimum_of(self, selected: int) -> int:
        """The minimum in a round of so many, in proportion above ``cohort``."""
        return max(self.minimum, self.minimum * selected // self.cohort)

    def problem(self) -> str | None:
        """What is wrong with these rules, in words for their author; None if nothing is."""
        checks = (
            (self.rounds >= 1, "rounds must be at least 1"),
            (1 <= self.minimum <= self.goal <= self.cohort, "1 <= minimum <= goal <= cohort must hold"),
            (self.deadline_s > 0 and math.isfinite(self.deadline_s), "deadline_s must be positive"),
            (0 <= self.share <= 1, "share must be 0..1"),
            (self.fleet >= 0, "fleet must not be negative"),
            (self.patience_s >= 0, "patience_s must not be negative"),
            (self.retry_s > 0, "retry_s must be positive"),
        )
        return next((text for holds, text in checks if not holds), None)


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


Event = (
    Recovered
    | Tick
    | CheckInArrived
    | RoundPrepared
    | UpdateArrived
    | Aggregated
    | AggregationFailed
    | VersionPublished
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
class CloseRound:
    """The round made no version: its private key and updates go."""

    round_id: RoundId


@dataclass(frozen=True, kw_only=True)
class Finish:
    """All rounds are done: announce it."""

    round_id: RoundId
    version: int


Effect = PrepareRound | PublishManifest | SendReceipt | Aggregate | PublishVersion | CloseRound | Finish


@dataclass(frozen=True)
class Decision:
    """``wake_at``: when to send the next Tick at the latest; None: no need."""

    records: tuple[Record, ...] = ()
    effects: tuple[Effect, ...] = ()
    wake_at: float | None = None


# ---- the step ---------------------------------------------------------------------------------------


def screen(
    state: State, device: DeviceId, round_id: RoundId, manifest_digest: Digest | None, digest: Digest
) -> Verdict | Reject | None:
    """What the header of an update alone already settles; None: open it and look inside.

    STORED answers a duplicate of what is stored for the current round. Older rounds are the ledger's to answer.
    """
    current = state.round
    if current is None or round_id > current.round_id:
        return Reject.WRONG_ROUND
    if round_id < current.round_id:
        return Verdict.LATE
    if manifest_digest != current.manifest_digest:
        return Reject.WRONG_MANIFEST
    if device not in current.cohort:
        return Reject.NOT_SELECTED
    if (stored := state.stored.get(device)) is not None:
        return Verdict.STORED if stored.digest == digest else Reject.CONFLICTING
    return None if current.phase is Phase.COLLECTING else Verdict.LATE


def step(state: State, rules: RoundRules, run_seed: bytes, now: float, event: Event) -> Decision:
    """Decide what to commit and what to do then. ``now``: seconds; ``run_seed``: 32 secret bytes.

    Never changes ``state``. Raises LocalProtocolError for an event that our own shell must not send now.
    """
    match event:
        case Recovered():
            return _resume(state, rules, run_seed, now)
        case Tick():
            return _tick(state, rules, run_seed, now)
        case CheckInArrived():
            record = CheckedIn(
                device=event.device,
                sequence=event.sequence,
                expires_at=now + event.ttl_s,
                samples=event.samples,
                codecs=event.codecs,
            )
            # The ticket counts from the commit on: the shell ticks after every batch.
            return Decision((record,), (), now)
        case RoundPrepared():
            return _open(state, event.opened)
        case UpdateArrived():
            return _store(state, rules, event.update)
        case Aggregated():
            current = _expect(state, event.round_id, Phase.FROZEN)
            excluded = {device for device, _ in event.excluded}
            if not excluded <= set(current.accepted):
                raise LocalProtocolError("an update is excluded that was not accepted")
            minimum = rules.minimum_of(len(current.cohort))
            if (left := len(current.accepted) - len(excluded)) < minimum:
                reason = f"{left} of at least {minimum} updates could be read back"
                return _abort(event.round_id, rules, now, reason)
            version = current.base_version + 1
            committed = VersionCommitted(
                round_id=event.round_id,
                version=version,
                model_digest=event.model_digest,
                excluded=event.excluded,
            )
            return Decision((committed,), (PublishVersion(round_id=event.round_id, version=version),))
        case AggregationFailed():
            _expect(state, event.round_id, Phase.FROZEN)
            return _abort(event.round_id, rules, now, event.reason)
        case VersionPublished():
            _expect(state, event.round_id, Phase.AGGREGATED)
            return Decision((RoundPublished(round_id=event.round_id, at=now),), (), now)


def _expect(state: State, round_id: RoundId, phase: Phase) -> Round:
    current = state.round
    if current is None or current.round_id != round_id or current.phase is not phase:
        raise LocalProtocolError(f"event for round {round_id} in phase {phase.value} came out of turn")
    return current


def _open(state: State, opened: RoundOpened) -> Decision:
    expected = RoundId(state.generation, (state.round.round_id.number if state.round else 0) + 1)
    idle = state.phase in (None, Phase.PUBLISHED, Phase.ABORTED)
    if not idle or opened.round_id != expected or opened.base_version != state.version:
        raise LocalProtocolError(f"round {tuple(opened.round_id)} was prepared out of turn")
    return Decision((opened,), (PublishManifest(manifest=opened.manifest),), opened.deadline)


def _store(state: State, rules: RoundRules, stored: UpdateStored) -> Decision:
    current = _expect(state, stored.round_id, Phase.COLLECTING)
    settled = screen(state, stored.device, stored.round_id, current.manifest_digest, stored.digest)
    if settled is not None:
        raise LocalProtocolError(f"an update reached the core that screening settles as {settled}")
    receipt = SendReceipt(
        device=stored.device,
        round_id=stored.round_id,
        digest=stored.digest,
        verdict=Verdict.STORED,
        samples=stored.samples,
    )
    if len(state.stored) + 1 < rules.goal_of(len(current.cohort)):
        return Decision((stored,), (receipt,))
    frozen, aggregate = _freeze(current, (*state.stored, stored.device))
    return Decision((stored, frozen), (receipt, aggregate))


def _freeze(current: Round, devices: tuple[DeviceId, ...]) -> tuple[RoundFrozen, Aggregate]:
    accepted = tuple(sorted(devices))
    return (
        RoundFrozen(round_id=current.round_id, accepted=accepted),
        Aggregate(round_id=current.round_id, base_version=current.base_version, accepted=accepted),
    )


def _abort(round_id: RoundId, rules: RoundRules, now: float, reason: str) -> Decision:
    return Decision(
        (RoundAborted(round_id=round_id, reason=reason, at=now),),
        (CloseRound(round_id=round_id),),
        now + rules.retry_s,
    )


def _tick(state: State, rules: RoundRules, run_seed: bytes, now: float) -> Decision:
    current = state.round
    match state.phase:
        case None | Phase.PUBLISHED | Phase.ABORTED:
            return _open_next(state, rules, run_seed, now)
        case Phase.COLLECTING if current is not None and now >= current.deadline:
            minimum = rules.minimum_of(len(current.cohort))
            if len(state.stored) >= minimum:
                frozen, aggregate = _freeze(current, tuple(state.stored))
                return Decision((frozen,), (aggregate,))
            reason = f"{len(state.stored)} of at least {minimum} updates at the deadline"
            return _abort(current.round_id, rules, now, reason)
        case Phase.COLLECTING if current is not None:
            return Decision(wake_at=current.deadline)
        case _:
            return Decision()


def _open_next(state: State, rules: RoundRules, run_seed: bytes, now: float) -> Decision:
    current = state.round
    number = current.round_id.number if current else 0
    if state.version >= rules.rounds:
        last = current.round_id if current else RoundId(state.generation, 0)
        return Decision((), (Finish(round_id=last, version=state.version),))
    available = {d for d, ticket in state.tickets.items() if ticket.expires_at > now}
    needed = max(rules.cohort, rules.fleet) if current is None else rules.cohort
    if state.idle_since is not None and now - state.idle_since >= rules.patience_s:
        needed = rules.minimum
    if len(available) < needed:
        return Decision(wake_at=now + rules.retry_s)
    round_id = RoundId(state.generation, number + 1)
    cohort = draw_cohort(available, rules.size_of(len(available)), run_seed, round_id)
    deadline = now + rules.deadline_s
    return Decision(
        (),
        (PrepareRound(round_id=round_id, base_version=state.version, cohort=cohort, deadline=deadline),),
    )


def _resume(state: State, rules: RoundRules, run_seed: bytes, now: float) -> Decision:
    current = state.round
    match state.phase:
        case Phase.COLLECTING | Phase.FROZEN if (
            current is not None and current.round_id.generation < state.generation
        ):
            # Restored from a backup: what devices were told since then is unknown, so the round cannot go on.
            return _abort(current.round_id, rules, now, "the generation was raised")
        case Phase.COLLECTING if current is not None:
            return Decision((), (PublishManifest(manifest=current.manifest),), now)
        case Phase.FROZEN if current is not None:
            again = Aggregate(
                round_id=current.round_id, base_version=current.base_version, accepted=current.accepted
            )
            return Decision((), (again,))
        case Phase.AGGREGATED if current is not None:
            return Decision((), (PublishVersion(round_id=current.round_id, version=state.version),))
        case _:
            return _open_next(state, rules, run_seed, now)
