"""A shell around the round core that a list of operations drives: faults are operations, a run is a list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hypothesis import strategies as st

from aggregator.core.records import Record, RoundOpened, UpdateStored
from aggregator.core.state import State, apply
from aggregator.core.step import (
    Aggregate,
    Aggregated,
    AggregationFailed,
    CheckInArrived,
    CloseRound,
    Decision,
    Effect,
    Event,
    Finish,
    PrepareRound,
    PublishVersion,
    Recovered,
    RoundPrepared,
    RoundRules,
    SendReceipt,
    Tick,
    UpdateArrived,
    VersionPublished,
    screen,
    step,
)
from edge_runtime.protocol.ids import DeviceId, Digest, RoundId, sha256
from edge_runtime.protocol.rejects import Reject
from edge_runtime.protocol.rounds import Verdict

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


Operation = CheckIn | Send | Pass | Work | Crash


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
operations = st.lists(st.one_of(*_often, *_often, *_seldom), min_size=40, max_size=80)


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
                case PrepareRound() if any(isinstance(other, PrepareRound) for other in self.todo):
                    pass  # being prepared already
                case PrepareRound() | Aggregate() | PublishVersion():
                    self.todo.append(effect)
                case _:
                    pass
        return decision

    def _check_in(self, device: DeviceId, ttl_s: float) -> Decision:
        self.sequence += 1
        return self.send(
            CheckInArrived(
                device=device, sequence=self.sequence, ttl_s=ttl_s, samples=10, codecs=("float32",)
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
