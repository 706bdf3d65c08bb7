"""The round as a step function: (state, now, event) -> (records, effects). Pure.

The caller applies and commits the records first and runs the effects after the commit. Every effect may run
again after a crash: each is idempotent, and ``Recovered`` asks for those that an open round still needs.
"""

from __future__ import annotations

from aggregator.core.closing import abort, freeze, goal_is_reached
from aggregator.core.events import (
    Aggregate,
    Aggregated,
    AggregationFailed,
    CheckInArrived,
    Decision,
    DrainOrdered,
    Event,
    EvictOrdered,
    Exit,
    Finish,
    PauseOrdered,
    PrepareRound,
    PublishManifest,
    PublishRestored,
    PublishVersion,
    ReadmitOrdered,
    Recovered,
    RestoreOrdered,
    ResumeOrdered,
    RevocationsRead,
    RoundPrepared,
    SendReceipt,
    Tick,
    UpdateArrived,
    VersionPublished,
)
from aggregator.core.orders import obey
from aggregator.core.records import (
    CheckedIn,
    Drained,
    RevocationsTaken,
    RoundOpened,
    RoundPublished,
    UpdateStored,
    VersionCommitted,
)
from aggregator.core.round_rules import RoundRules
from aggregator.core.selection import draw_cohort
from aggregator.core.state import Round, State
from edge_runtime.protocol.errors import LocalProtocolError
from edge_runtime.protocol.ids import DeviceId, Digest, RoundId
from edge_runtime.protocol.rejects import Reject
from edge_runtime.protocol.rounds import Phase, Verdict


def barred(state: State, device: DeviceId, epoch: int) -> Reject | None:
    """Why this device takes part in nothing under a certificate of this epoch; None: it may."""
    if device in state.evicted:
        return Reject.EVICTED
    revoked = state.revoked.get(device)
    return Reject.REVOKED if revoked is not None and epoch <= revoked else None


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
    if (stored := state.stored.get(device)) is not None:
        return Verdict.STORED if stored.digest == digest else Reject.CONFLICTING
    if device in state.evicted:
        return Reject.EVICTED
    if device not in current.cohort:
        return Reject.NOT_SELECTED
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
            if (reject := barred(state, event.device, event.epoch)) is not None:
                raise LocalProtocolError(f"a check-in reached the core that is {reject.name}")
            record = CheckedIn(
                device=event.device,
                sequence=event.sequence,
                expires_at=now + event.ttl_s,
                samples=event.samples,
                codecs=event.codecs,
                epoch=event.epoch,
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
                return abort(event.round_id, rules, now, reason)
            version = current.base_version + 1
            evicted = ((device, Reject.EVICTED) for device in state.stored.keys() - set(current.accepted))
            committed = VersionCommitted(
                round_id=event.round_id,
                version=version,
                model_digest=event.model_digest,
                excluded=tuple(sorted((*event.excluded, *evicted), key=lambda row: row[0])),
            )
            return Decision((committed,), (PublishVersion(round_id=event.round_id, version=version),))
        case AggregationFailed():
            _expect(state, event.round_id, Phase.FROZEN)
            return abort(event.round_id, rules, now, event.reason)
        case VersionPublished():
            _expect(state, event.round_id, Phase.AGGREGATED)
            return Decision((RoundPublished(round_id=event.round_id, at=now),), (), now)
        case RevocationsRead():
            if not state.at_rest or event.number <= state.revocations:
                raise LocalProtocolError("a list of revocations came out of turn")
            taken = RevocationsTaken(number=event.number, revoked=event.revoked)
            return Decision((taken,), (), now)
        case (
            PauseOrdered()
            | DrainOrdered()
            | ResumeOrdered()
            | EvictOrdered()
            | ReadmitOrdered()
            | RestoreOrdered()
        ):
            return obey(state, rules, now, event)


def _expect(state: State, round_id: RoundId, phase: Phase) -> Round:
    current = state.round
    if current is None or current.round_id != round_id or current.phase is not phase:
        raise LocalProtocolError(f"event for round {round_id} in phase {phase.value} came out of turn")
    return current


def _open(state: State, opened: RoundOpened) -> Decision:
    expected = RoundId(state.generation, (state.round.round_id.number if state.round else 0) + 1)
    if state.paused or state.draining or any(device in state.evicted for device in opened.cohort):
        raise LocalProtocolError(f"round {tuple(opened.round_id)} was prepared before an order against it")
    if not state.at_rest or opened.round_id != expected or opened.base_version != state.version:
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
    not_counted = sum(device in state.stored for device in state.evicted)
    if not goal_is_reached(rules, current, state.evicted, len(state.stored) - not_counted + 1):
        return Decision((stored,), (receipt,))
    frozen, aggregate = freeze(current, (*state.counted, stored.device))
    return Decision((stored, frozen), (receipt, aggregate))


def _tick(state: State, rules: RoundRules, run_seed: bytes, now: float) -> Decision:
    current = state.round
    match state.phase:
        case None | Phase.PUBLISHED | Phase.ABORTED:
            return _open_next(state, rules, run_seed, now)
        case Phase.COLLECTING if current is not None and now >= current.deadline:
            minimum = rules.minimum_of(len(current.cohort))
            if len(state.counted) >= minimum:
                frozen, aggregate = freeze(current, state.counted)
                return Decision((frozen,), (aggregate,))
            reason = f"{len(state.counted)} of at least {minimum} updates at the deadline"
            return abort(current.round_id, rules, now, reason)
        case Phase.COLLECTING if current is not None:
            return Decision(wake_at=current.deadline)
        case _:
            return Decision()


def _open_next(state: State, rules: RoundRules, run_seed: bytes, now: float) -> Decision:
    current = state.round
    number = current.round_id.number if current else 0
    if state.draining:
        return Decision((Drained(at=now),), (Exit(),))
    if state.version >= rules.rounds:
        last = current.round_id if current else RoundId(state.generation, 0)
        return Decision((), (Finish(round_id=last, version=state.version),))
    if state.paused:
        return Decision(wake_at=now + rules.retry_s)
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
            return abort(current.round_id, rules, now, "the generation was raised")
        case Phase.COLLECTING if current is not None:
            return Decision((), (PublishManifest(manifest=current.manifest),), now)
        case Phase.FROZEN if current is not None:
            again = Aggregate(
                round_id=current.round_id, base_version=current.base_version, accepted=current.accepted
            )
            return Decision((), (again,))
        case Phase.AGGREGATED if current is not None:
            return Decision((), (PublishVersion(round_id=current.round_id, version=state.version),))
        case _ if state.restored_from is not None:
            restored = PublishRestored(version=state.version, of=state.restored_from)
            return Decision((), (restored,), now)
        case _:
            return _open_next(state, rules, run_seed, now)
