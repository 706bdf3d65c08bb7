"""What the demo does, in numbers, and when devices die and return. Pure."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from edge_runtime.protocol.plan import Plan
from fldemo.processes import Event

DEVICES = tuple(f"device-{i:02d}" for i in range(1, 11))
FEDERATION = "demo"
AGGREGATOR = "aggregator"
COHORT, GOAL, MINIMUM, DEADLINE_S = 5, 4, 3, 10
LEAST_ROUNDS = 20

FIRST_KILL, SECOND_KILL, RETURN = 4, 6, 8
"""Rounds: a device dies while it trains in the first and in the second, or soon after; one returns in the third."""
TRIES = 10
"""Kills that may come too late: on a busy machine an update can be out before its sender is dead."""


@dataclass(frozen=True)
class Kill:
    """SIGKILL this device now: it is training in the open round."""

    device: str
    round: int


@dataclass(frozen=True)
class Restart:
    """Start this device again: ``round`` was the last one published before."""

    device: str
    round: int


@dataclass
class Faults:
    """Decides from the events who dies and who returns; the first to die is the one that returns.

    ``missed``: kills that came too late, the update was in the round. They count as none: the device starts again
    at once and another one dies instead.
    """

    kills: list[Kill] = field(default_factory=list)
    restarts: list[Restart] = field(default_factory=list)
    missed: list[Kill] = field(default_factory=list)
    _closed_round: int = 0

    def kill(self, event: Event) -> Kill | None:
        """Whom to kill now. Every event in the order in which it was read: a kill cannot wait."""
        match event.kind:
            case "round_frozen" | "round_aborted":
                self._closed_round = event.round
            case "training_started" if event.round > self._closed_round and self._due(event):
                self.kills.append(Kill(event.source, event.round))
                return self.kills[-1]
        return None

    def restart(self, event: Event) -> Restart | None:
        """Whom to start again now. Every event, some time after ``kill`` has seen it."""
        match event.kind:
            case "round_frozen":
                for kill in self.kills:
                    if kill.round == event.round and kill.device in event.fields["accepted"]:
                        self.kills.remove(kill)
                        self.missed.append(kill)
                        return Restart(kill.device, event.round - 1)
            case "round_published" | "round_aborted" if self.kills and not self.restarts:
                if event.round >= max(RETURN, self.kills[0].round + 1):
                    self.restarts.append(Restart(self.kills[0].device, event.round))
                    return self.restarts[0]
        return None

    def _due(self, event: Event) -> bool:
        starts = (FIRST_KILL, SECOND_KILL)
        return (
            len(self.kills) < len(starts)
            and len(self.missed) < TRIES
            and event.round >= starts[len(self.kills)]
            # one in a round: with goal 4 of 5 the round goes on without waiting for its deadline
            and event.round not in {kill.round for kill in (*self.kills, *self.missed)}
            and event.source not in {kill.device for kill in self.kills}
        )


@dataclass
class Round:
    """``seconds``: from the publication before to its own; for the first, from its opening.

    ``accepted``: whose updates are in it; ``score``: on held-out samples, in [0, 1].
    """

    number: int
    cohort: tuple[str, ...]
    accepted: tuple[str, ...] = ()
    published: bool = False
    version: int = 0
    aborted: bool = False
    seconds: float | None = None
    score: float | None = None


def sample_passes(rounds: Sequence[Round], samples: dict[str, int], plan: Plan) -> int:
    """Passes over all devices' data that the published updates amount to, rounded, at least 1."""
    drawn = sum(
        plan.steps * min(plan.batch_size, samples[device]) if plan.steps else plan.epochs * samples[device]
        for round_ in rounds
        if round_.published
        for device in round_.accepted
    )
    return max(1, round(drawn / sum(samples.values())))


def settings(plan: Plan, rounds: int) -> dict[str, str]:
    """``--set`` of ``aggregator init``: TOML values by dotted key; of the plan what differs from the default."""
    usual = Plan()
    if plan.schedule != usual.schedule or plan.scale_bits != usual.scale_bits:
        raise ValueError("the demo knows no schedules, and the scale follows from the cohort")
    values: dict[str, object] = {
        "round.rounds": rounds,
        "round.cohort": COHORT,
        "round.goal": GOAL,
        "round.minimum": MINIMUM,
        "round.deadline_s": DEADLINE_S,
        "round.fleet": len(DEVICES),
        **{
            f"plan.{field.name}": getattr(plan, field.name)
            for field in dataclasses.fields(plan)
            if getattr(plan, field.name) != getattr(usual, field.name)
        },
    }
    return {key: json.dumps(value) for key, value in values.items()}
