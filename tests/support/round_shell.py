"""A shell around the round core that a list of operations drives: faults are operations, a run is a list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hypothesis import strategies as st

from aggregator.core.events import (
    Aggregate,
    Aggregated,
    AggregationFailed,
    CheckInArrived,
    CloseRound,
    Decision,
    DrainOrdered,
    Effect,
    Event,
    EvictOrdered,
    Exit,
    Finish,
    Order,
    PauseOrdered,
    PrepareRound,
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
from aggregator.core.records import Record, RoundOpened, UpdateStored, VersionCommitted, VersionRestored
from aggregator.core.round_rules import RoundRules
from aggregator.core.state import State, apply
from aggregator.core.step import barred, screen, step
from edge_runtime.protocol.ids import DeviceId, Digest, RoundId, sha256
from edge_runtime.protocol.rejects import Reject
from edge_runtime.protocol.rounds import Phase, Verdict

DEVICES = tuple(DeviceId(f"device-{i}") for i in range(6))
RUN_SEED = bytes(range(32))
Commit = Callable[[Sequence[Record]], None]


@dataclass(frozen=True)
class CheckIn:
    """``device``: None for all of them."""

    device: int | None
    ttl_s: float = 60.0


@dataclass(frozen=True)
class Send:
    """A device sends its update for the current round; ``content`` tells updates of one device apart.

    ``device``: counts through the cohort, so that most are selected; ``stranger``: through all devices.
    """

    device: int
    content: int = 0
    stranger: bool = False


@dataclass(frozen=True)
class Pass:
    """Time passes, then a tick."""

    seconds: float


@dataclass(frozen=True)
class Work:
    """The shell does the oldest thing asked of it; it may fail if it is an aggregation, or lose a device."""

    fails: bool = False
    loses_first: bool = False


@dataclass(frozen=True)
class Crash:
    """All that is not committed is gone; then recovery."""


@dataclass(frozen=True)
class Obey:
    """An order without an argument."""

    order: PauseOrdered | ResumeOrdered | DrainOrdered


@dataclass(frozen=True)
class Evict:
    device: int


@dataclass(frozen=True)
class Readmit:
    device: int


@dataclass(frozen=True)
class Rollback:
    """To so many versions before the newest."""

    back: int


@dataclass(frozen=True)
class Revoke:
    """The root's next list, with one entry more; the device may have enrolled again, in the next epoch."""

    device: int
    enrols_again: bool = False


Operation = CheckIn | Send | Pass | Work | Crash | Obey | Evict | Readmit | Rollback | Revoke


@st.composite
def rules(draw: st.DrawFn) -> RoundRules:
    cohort = draw(st.integers(1, 4))
    goal = draw(st.integers(1, cohort))
    return RoundRules(
        rounds=draw(st.integers(1, 4)),
        cohort=cohort,
        goal=goal,
        minimum=draw(st.integers(1, goal)),
        deadline_s=draw(st.sampled_from((5.0, 20.0))),
        fleet=draw(st.sampled_from((0, 0, 5))),
        patience_s=draw(st.sampled_from((0.0, 10.0))),
    )


_device = st.integers(0, len(DEVICES) - 1)
_often = [
    st.just(CheckIn(None)),
    st.builds(Send, _device, st.sampled_from((0, 0, 0, 1))),
    st.builds(Send, _device),
    st.builds(Pass, st.sampled_from((0.0, 1.0, 1.0, 6.0, 25.0))),
    st.just(Work()),
    st.just(Work()),
]
_seldom = [
    st.builds(CheckIn, _device, st.sampled_from((3.0, 60.0))),
    st.builds(Send, _device, st.just(0), st.just(True)),
    st.builds(Work, st.booleans(), st.booleans()),
    st.just(Crash()),
]
_orders = [
    st.builds(Obey, st.sampled_from((PauseOrdered(), ResumeOrdered(), ResumeOrdered(), DrainOrdered()))),
    st.builds(Evict, _device),
    st.builds(Readmit, _device),
    st.builds(Readmit, _device),
    st.builds(Rollback, st.integers(0, 2)),
    st.builds(Revoke, _device, st.sampled_from((True, True, True, False))),
]
operations = st.lists(st.one_of(*_often, *_often, *_seldom), min_size=40, max_size=80)
operations_and_orders = st.lists(
    st.one_of(*_often, *_often, *_often, *_often, *_seldom, *_orders), min_size=40, max_size=80
)


@dataclass
class Shell:
    """``commit`` must make the records durable; ``journal`` keeps them in any case, for comparison."""

    rules: RoundRules
    state: State = field(default_factory=State)
    commit: Commit = lambda records: None
    recover: Callable[[], State] | None = None
    now: float = 1000.0
    sequence: int = 0
    journal: list[Record] = field(default_factory=list)
    todo: list[Effect] = field(default_factory=list)
    receipts: list[SendReceipt] = field(default_factory=list)
    closed: list[RoundId] = field(default_factory=list)
    finished: bool = False
    exits: int = 0
    epochs: dict[DeviceId, int] = field(default_factory=dict)

    def run(self, operation: Operation) -> Decision | Verdict | Reject | None:
        """What came of it: a decision of the core, a refusal by screening, or nothing."""
        match operation:
            case CheckIn(None, ttl_s):
                return [self._check_in(device, ttl_s) for device in DEVICES][-1]
            case CheckIn(int(device), ttl_s):
                return self._check_in(DEVICES[device], ttl_s)
            case Send(device, content, stranger):
                known = self.state.round.cohort if self.state.round and not stranger else DEVICES
                sender = sorted(known)[device % len(known)]
                return self._update(sender, sha256(sender.encode(), bytes([content])))
            case Pass(seconds):
                self.now += seconds
                return self.send(Tick())
            case Work():
                return self._work(operation)
            case Obey(order):
                return self.obey(order)
            case Evict(device):
                return self.obey(EvictOrdered(DEVICES[device]))
            case Readmit(device):
                return self.obey(ReadmitOrdered(DEVICES[device]))
            case Rollback(back):
                of = self.state.version - back
                return self.obey(RestoreOrdered(of=of, model_digest=self._digest(of)))
            case Revoke():
                return self._revoke(operation)
            case _:
                self.todo.clear()
                if self.recover is not None:
                    self.state = self.recover()
                return self.send(Recovered())

    def send(self, event: Event) -> Decision:
        """Step, commit, apply, then effects."""
        decision = step(self.state, self.rules, RUN_SEED, self.now, event)
        if decision.records:
            self.commit(decision.records)
        for record in decision.records:
            apply(self.state, record)
            self.journal.append(record)
        for effect in decision.effects:
            match effect:
                case SendReceipt():
                    self.receipts.append(effect)
                case CloseRound(round_id=round_id):
                    self.closed.append(round_id)
                case Finish():
                    self.finished = True
                case Exit():
                    self.exits += 1
                case PrepareRound() if any(isinstance(other, PrepareRound) for other in self.todo):
                    pass  # being prepared already
                case PrepareRound() | Aggregate() | PublishVersion():
                    self.todo.append(effect)
                case _:
                    pass
        return decision

    def obey(self, order: Order) -> Decision | None:
        """Orders wait while a version is being made; a round that is only being prepared is drawn anew."""
        if self.state.phase in (Phase.FROZEN, Phase.AGGREGATED):
            return None
        self.todo = [effect for effect in self.todo if not isinstance(effect, PrepareRound)]
        return self.send(order)

    def _digest(self, version: int) -> Digest:
        made = (r for r in self.journal if isinstance(r, VersionCommitted | VersionRestored))
        return {0: sha256(b"initial"), **{r.version: r.model_digest for r in made}}.get(version, sha256())

    def _revoke(self, operation: Revoke) -> Decision | None:
        if not self.state.at_rest:
            return None
        self.todo = [effect for effect in self.todo if not isinstance(effect, PrepareRound)]
        device = DEVICES[operation.device]
        epoch = self.epochs.get(device, 1)
        self.epochs[device] = epoch + operation.enrols_again
        revoked = tuple(sorted({**self.state.revoked, device: epoch}.items()))
        return self.send(RevocationsRead(number=self.state.revocations + 1, revoked=revoked))

    def _check_in(self, device: DeviceId, ttl_s: float) -> Decision | Reject:
        self.sequence += 1
        epoch = self.epochs.get(device, 1)
        if (reject := barred(self.state, device, epoch)) is not None:
            return reject
        return self.send(
            CheckInArrived(
                device=device,
                sequence=self.sequence,
                ttl_s=ttl_s,
                samples=10,
                codecs=("float32",),
                epoch=epoch,
            )
        )

    def _update(self, device: DeviceId, digest: Digest) -> Decision | Verdict | Reject | None:
        current = self.state.round
        if current is None:
            return None
        settled = screen(self.state, device, current.round_id, current.manifest_digest, digest)
        if settled is not None:
            return settled
        return self.send(
            UpdateArrived(UpdateStored(device=device, round_id=current.round_id, digest=digest, samples=7))
        )

    def _work(self, how: Work) -> Decision | None:
        if not self.todo:
            return None
        match self.todo.pop(0):
            case PrepareRound() as asked:
                manifest = b"manifest %d %d" % asked.round_id
                return self.send(
                    RoundPrepared(
                        RoundOpened(**asked.__dict__, manifest=manifest, manifest_digest=sha256(manifest))
                    )
                )
            case Aggregate() as asked:
                if how.fails:
                    return self.send(AggregationFailed(round_id=asked.round_id, reason="nothing can be read"))
                lost = asked.accepted[:1] if how.loses_first else ()
                return self.send(
                    Aggregated(
                        round_id=asked.round_id,
                        model_digest=sha256(b"model", *(device.encode() for device in asked.accepted)),
                        excluded=tuple((device, Reject.BAD_SEAL) for device in lost),
                    )
                )
            case PublishVersion(round_id=round_id):
                return self.send(VersionPublished(round_id=round_id))
            case _:
                return None
