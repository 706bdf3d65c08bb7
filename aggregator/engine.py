"""The aggregator between broker and disk: verify, decide, commit, and only then act.

``handle`` takes a batch of messages through one commit; ``outgoing`` is what may be published after it. Nothing
leaves before the commit it speaks of, so a crash anywhere loses nothing that was promised.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from aggregator.blob_server import BlobServer
from aggregator.core import events
from aggregator.core.events import Decision
from aggregator.core.round_rules import RoundRules
from aggregator.core.state import State, apply
from aggregator.core.step import step
from aggregator.evaluation import EvaluationFailed, Evaluator
from aggregator.inbox.updates import UpdateInbox
from aggregator.intake import max_update_bytes
from aggregator.ledger.ledger import Ledger
from aggregator.ledger.values import Batch, Piece
from aggregator.orders import OrderBox
from aggregator.reception import About, Reception
from aggregator.revocations import RevocationsError, RevocationsFile
from aggregator.round_keys import RoundKeyMissing, RoundKeys
from aggregator.round_maker import RoundMaker
from aggregator.rules.mean import aggregate
from aggregator.versions import VersionStore
from aggregator.work import Incoming, Meter, NoMeter, Outgoing, Report, Work
from edge_runtime.protocol import topics
from edge_runtime.protocol.envelope import unpack
from edge_runtime.protocol.errors import LocalProtocolError
from edge_runtime.protocol.ids import Digest, FederationId, RoundId
from edge_runtime.protocol.kinds import Kind
from edge_runtime.protocol.manifest import Manifest
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.rounds import MOVES, FederationState, Phase
from edge_runtime.protocol.tensors import Vector

MAX_WAITING = 100  # messages that the broker has not taken yet: above that no pieces of blobs join them


@dataclass(kw_only=True)
class Engine:
    """One thread calls it. ``clock``: seconds since 1970; ``run_seed``: 32 secret bytes for the selection.

    ``rules`` may differ from those an open round began with; its plan may not: it is read from its manifest.
    """

    federation: FederationId
    rules: RoundRules
    run_seed: bytes
    ledger: Ledger
    updates: UpdateInbox
    keys: RoundKeys
    versions: VersionStore
    maker: RoundMaker
    blobs: BlobServer
    clock: Callable[[], float]
    report: Report
    keep_updates: bool = False
    evaluator: Evaluator | None = None
    revocations: RevocationsFile | None = None
    meter: Meter = field(default_factory=NoMeter)
    state: State = field(init=False)
    finished: bool = field(default=False, init=False)
    drained: bool = field(default=False, init=False)
    wake_at: float | None = field(default=None, init=False)
    outgoing: deque[Outgoing] = field(default_factory=deque, init=False)
    _reception: Reception = field(init=False)
    _orders: OrderBox = field(init=False)
    _theta: Vector = field(init=False)
    _plan: Plan = field(init=False)  # see _use_plan
    _manifest: bytes | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.state = self.ledger.load_state()
        self._use_plan(self.maker.plan)
        self._orders = OrderBox(ledger=self.ledger, versions=self.versions)
        self._reception = Reception(
            federation=self.federation,
            plan=lambda: self._plan,
            parameter_count=self.versions.parameter_count,
            ledger=self.ledger,
            updates=self.updates,
            keys=self.keys,
            maker=self.maker,
            blobs=self.blobs,
            clock=self.clock,
            state=self.state,
            decide=self._step,
            meter=self.meter,
        )

    # ---- entrances ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Recover: what the journal says is open goes on, from exactly the bytes it had."""
        current = self.state.round
        open_round = current if current is not None and MOVES[current.phase] else None
        self.keys.destroy_all_but(open_round.round_id if open_round else None)
        self._forget_closed_rounds(open_round.round_id if open_round else None)
        self._theta = self._read_theta(self.state.version)
        if open_round is not None:
            self.updates.restore(self._pieces_on_file(open_round.round_id))
            if open_round.phase in (Phase.COLLECTING, Phase.FROZEN):
                manifest = _read_manifest(open_round.manifest, self.federation)
                self.maker.offer_again(manifest, open_round.cohort, self._theta)
                self._use_plan(manifest.plan)
            self.report("resumed", round=open_round.round_id.number, phase=open_round.phase.value)
        else:
            work = Work()
            self._take_revocations(work)
            self._commit(work)
        self._say_standing()
        self._decide(events.Recovered())
        if self._manifest is None and not self.drained:
            self._rest(FederationState.WAITING)
        self.versions.prune(self.state.version)
        for version in (0, *reversed(self.versions.kept(self.state.version))):
            self._evaluate(version)  # the newest first; those that a crash has kept waiting too

    def handle(self, batch: Sequence[Incoming]) -> None:
        """Verify and commit a batch. After it returns the messages may be acknowledged to the broker."""
        work = Work()
        for message in batch:
            self._reception.take(message, work)
        self._commit(work)
        self.tick()

    def tick(self) -> None:
        """Time has passed: deadlines, waves, the next round."""
        now = self.clock()
        for work in self._orders.take(now, self.state, self._step):
            self._commit(work)
        self._take_evaluations()
        if self.wake_at is None or now >= self.wake_at or self._resting():
            self._decide(events.Tick())
        if len(self.outgoing) < MAX_WAITING:
            self.outgoing.extend(Outgoing(topic, payload) for topic, payload in self.blobs.due(now))

    def next_wake(self) -> float | None:
        """When ``tick`` is wanted at the latest."""
        times = [at for at in (self.wake_at, self.blobs.wake_at()) if at is not None]
        return min(times, default=None)

    def announce(self) -> None:
        """Publish the current manifest again, for a broker that may have forgotten it."""
        if self._manifest is not None:
            self.outgoing.append(Outgoing(topics.manifest(self.federation), self._manifest, retain=True))

    # ---- decisions, commits, effects ----------------------------------------------------------------

    def _step(self, event: events.Event, work: Work) -> Decision:
        decision = step(self.state, self.rules, self.run_seed, self.clock(), event)
        for record in decision.records:
            apply(self.state, record)
        work.records += decision.records
        work.effects += decision.effects
        self.wake_at = decision.wake_at
        return decision

    def _decide(self, event: events.Event) -> None:
        work = Work()
        self._step(event, work)
        self._commit(work)

    def _commit(self, work: Work) -> None:
        """Make durable, then run the effects; what they lead to is committed in turn."""
        while True:
            began = time.perf_counter()
            if work.pieces:
                self.updates.inbox.sync()
            batch = work.batch()
            if batch != Batch():
                self.ledger.commit(batch)
                self.meter.committed(time.perf_counter() - began)
            for round_id in work.forget:
                self.updates.inbox.delete_round(round_id)
            self.outgoing.extend(work.outgoing)
            for event, fields in work.reports:
                self.report(event, **fields)
            if not work.effects:
                return
            effects, work = work.effects, Work()
            for effect in effects:
                self._perform(effect, work)

    def _perform(self, effect: events.Effect, work: Work) -> None:
        match effect:
            case events.PrepareRound() if self._take_revocations(work):
                pass  # the next tick draws the cohort anew
            case events.PrepareRound():
                opened = self.maker.prepare(effect, self._theta)
                self._use_plan(_read_manifest(opened.manifest, self.federation).plan)
                self._step(events.RoundPrepared(opened), work)
                work.say(
                    "round_opened",
                    round=effect.round_id.number,
                    cohort=list(effect.cohort),
                    base_version=effect.base_version,
                )
            case events.PublishManifest():
                self._publish_manifest(effect.manifest, work)
            case events.RepeatManifest():
                self.announce()
            case events.SendReceipt():
                current = self.state.round
                about = About(
                    effect.device,
                    effect.round_id,
                    current.manifest_digest if current else None,
                    effect.digest,
                )
                work.outgoing.append(self._reception.answer(about, effect.verdict, samples=effect.samples))
            case events.Aggregate():
                self._aggregate(effect, work)
            case events.PublishVersion():
                self._publish_version(effect, work)
            case events.PublishRestored():
                self._publish_restored(effect, work)
            case events.CloseRound():
                self._clean_up(effect.round_id, work)
                last = next(iter(self.ledger.rounds(1)), None)
                reason = last.reason if last else None
                self.report("round_aborted", round=effect.round_id.number, reason=reason)
            case events.Finish():
                if not self.finished:
                    self.finished = True
                    self._rest(FederationState.FINISHED)
                    work.say("finished", version=effect.version)
            case events.Exit():
                self.drained = True
                work.say("drained")

    def _aggregate(self, effect: events.Aggregate, work: Work) -> None:
        current = self.state.round
        if current is None:
            raise LocalProtocolError("nothing to aggregate")
        self.report("round_frozen", round=effect.round_id.number, accepted=list(effect.accepted))
        accepted = tuple((device, self.state.stored[device].digest) for device in effect.accepted)
        try:
            stream = self.updates.updates(
                effect.round_id, current.manifest_digest, accepted, lambda: self.keys.get(effect.round_id)
            )
            theta, excluded = aggregate(self._theta, stream, self._plan)
        except RoundKeyMissing as error:
            self._step(events.AggregationFailed(effect.round_id, str(error)), work)
            return
        digest = self.versions.write_parameters(effect.base_version + 1, theta)
        self._step(events.Aggregated(round_id=effect.round_id, model_digest=digest, excluded=excluded), work)

    def _publish_version(self, effect: events.PublishVersion, work: Work) -> None:
        self._theta = self._read_theta(effect.version)
        current = self.state.round
        accepted = list(current.accepted) if current else []
        folder = self.versions.publish(
            effect.version,
            self._theta,
            {"federation": self.federation, "round": effect.round_id.number, "accepted": len(accepted)},
        )
        self._clean_up(effect.round_id, work)
        self.versions.prune(effect.version)
        self._evaluate(effect.version)
        self._step(events.VersionPublished(effect.round_id), work)
        work.say(
            "round_published",
            round=effect.round_id.number,
            version=effect.version,
            updates=len(accepted),
            folder=str(folder),
        )

    def _publish_restored(self, effect: events.PublishRestored, work: Work) -> None:
        self._theta = self._read_theta(effect.version)
        folder = self.versions.publish(
            effect.version, self._theta, {"federation": self.federation, "restored_from": effect.of}
        )
        self.versions.prune(effect.version)
        self._evaluate(effect.version)
        self._rest(FederationState.FINISHED if self.finished else FederationState.WAITING)
        work.say("version_restored", version=effect.version, restored_from=effect.of, folder=str(folder))

    def _clean_up(self, round_id: RoundId, work: Work) -> None:
        self.keys.destroy(round_id)
        self.updates.forget_round(round_id)
        if not self.keep_updates:
            work.forget.append(round_id)

    # ---- revocations and evaluations -------------------------------------------------------------------

    def _take_revocations(self, work: Work) -> bool:
        """Whether the root's list has changed. One that is refused is reported, and leaves the last in force."""
        if self.revocations is None:
            return False
        try:
            found = self.revocations.newer_than(self.state.revocations, self.state.revoked)
        except RevocationsError as error:
            self.report("revocations_refused", reason=str(error))
            return False
        if found is None:
            return False
        revoked = tuple((entry.device, entry.epoch) for entry in found.entries)
        self._step(events.RevocationsRead(number=found.number, revoked=revoked), work)
        if revoked or self.state.revocations > 1:  # the empty list of a new registrar is no news
            work.say("revocations_taken", number=found.number, devices=len(revoked))
        return True

    @property
    def evaluating(self) -> bool:
        """A version is being evaluated, or waits for it."""
        return self.evaluator is not None and self.evaluator.busy

    def _evaluate(self, version: int) -> None:
        """Ask for it, unless that was done; the figures are committed when they come."""
        if self.evaluator is None or not self.evaluator.wants(version):
            return
        if self.ledger.evaluation(version) is None:
            self.evaluator.submit(version, self._digest(version))

    def _take_evaluations(self) -> None:
        for result in self.evaluator.results() if self.evaluator is not None else ():
            if isinstance(result, EvaluationFailed):
                self.report("evaluation_failed", version=result.version, reason=result.reason)
                continue
            work = Work(evaluations=[result])
            work.say("evaluated", version=result.version, samples=result.samples, **result.metrics)
            self._commit(work)

    # ---- small helpers ------------------------------------------------------------------------------

    def _use_plan(self, plan: Plan) -> None:
        """Of the open round, as its manifest says, or of the next."""
        self._plan = plan
        self.updates.max_bytes = max_update_bytes(plan, self.versions.parameter_count)

    def _say_standing(self) -> None:
        state = self.state
        if state.paused or state.draining or state.evicted or state.revoked:
            self.report(
                "standing_orders",
                paused=state.paused,
                draining=state.draining,
                evicted=sorted(state.evicted),
                revoked=len(state.revoked),
            )

    def _forget_closed_rounds(self, open_round: RoundId | None) -> None:
        """What a crash between the end of a round and its cleaning up has left."""
        left = tuple(round_id for round_id in self.ledger.durable_ends() if round_id != open_round)
        if left and not self.keep_updates:
            self._commit(Work(forget=list(left)))

    def _pieces_on_file(self, round_id: RoundId) -> Iterator[Piece]:
        yield from self.ledger.unfinished_pieces(round_id)
        for device, stored in self.state.stored.items():
            positions = self.ledger.pieces_of(round_id, device)
            for index, position in enumerate(positions):
                yield Piece(
                    round_id=round_id,
                    device=device,
                    digest=stored.digest,
                    index=index,
                    count=len(positions),
                    position=position,
                )

    def _resting(self) -> bool:
        return self.state.at_rest and not self.finished and not self.drained

    def _rest(self, state: FederationState) -> None:
        last = RoundId(self.state.generation, self.state.round.round_id.number if self.state.round else 0)
        manifest = self.maker.at_rest(last, state, self.state.version, self._theta)
        self._manifest = manifest
        self.announce()

    def _publish_manifest(self, manifest: bytes, work: Work) -> None:
        self._manifest = manifest
        work.outgoing.append(Outgoing(topics.manifest(self.federation), manifest, retain=True))

    def _read_theta(self, version: int) -> Vector:
        return self.versions.read_parameters(version, self._digest(version))

    def _digest(self, version: int) -> Digest:
        if version == 0:
            return self.versions.initial_digest()
        row = self.ledger.version(version)
        if row is None:
            raise LocalProtocolError(f"version {version} is not in the ledger")
        return row.model_digest


def _read_manifest(payload: bytes, federation: FederationId) -> Manifest:
    """A manifest that this aggregator signed, out of its journal."""
    return Manifest.decode(unpack(payload, federation, Kind.MANIFEST).body)
