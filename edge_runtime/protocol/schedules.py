"""How the learning rate changes from version to version: a table of shapes, each a pure function.

A version counts the models made so far: the first round trains at version 0, an aborted round changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from edge_runtime.protocol import wire_pb2 as wire
from edge_runtime.protocol.parsing import finite, malformed

MAX_ROUNDS = 1 << 31
SHAPES = ("constant", "step", "cosine")  # the wire code is the position


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What the learning rate is multiplied by, in [0, 1]. What a shape does not use is 0.

    shape: one of SHAPES.
        step: ``factor`` ^ (version // ``every``) above version ``after``, 1 up to it.
        cosine: from 1 to ``factor`` at version ``rounds``, and that from then on (arXiv 1608.03983, one cycle).
    warmup_rounds: times (version + 1) / (warmup_rounds + 1) below this version, with any shape; it is reached with
        1 (arXiv 1706.02677). The cosine begins where the warm-up ends.
    """

    shape: str = "constant"
    factor: float = 0.0
    every: int = 0
    after: int = 0
    rounds: int = 0
    warmup_rounds: int = 0

    def at(self, version: int) -> float:
        """The multiplier for training from ``version``, at least 0."""
        multiplier = _MULTIPLIERS[self.shape](self, version)
        if version < self.warmup_rounds:
            multiplier *= (version + 1) / (self.warmup_rounds + 1)
        return multiplier

    def problem(self) -> str | None:
        """What is wrong with this schedule, in words for its author; None if nothing is."""
        if self.shape not in SHAPES:
            return f"schedule.shape must be one of {', '.join(SHAPES)}"
        for name in ("factor", "every", "after", "rounds"):
            if name not in _USED[self.shape] and getattr(self, name) != 0:
                return f"schedule.{name} means nothing to the shape {self.shape}: choose another, or 0 here"
        for name in ("every", "after", "rounds", "warmup_rounds"):
            if not 0 <= getattr(self, name) <= MAX_ROUNDS:
                return f"schedule.{name} must be 0..{MAX_ROUNDS}"
        if self.shape == "step" and not (0 < self.factor <= 1 and self.every > 0):
            return "schedule.factor of a step must be above 0 and at most 1, schedule.every at least 1"
        if self.shape == "cosine" and not (0 <= self.factor <= 1 and self.rounds > self.warmup_rounds):
            return "schedule.factor of a cosine must be 0..1, schedule.rounds above 0 and above warmup_rounds"
        return None

    def to_wire(self) -> wire.Schedule:
        return wire.Schedule(**{**self.__dict__, "shape": SHAPES.index(self.shape)})

    @classmethod
    def from_wire(cls, m: wire.Schedule) -> Schedule:
        """Raises RemoteProtocolError(MALFORMED) for an unknown shape or a value outside its bounds."""
        if m.shape >= len(SHAPES):
            raise malformed(f"the shape {m.shape} of a schedule is not known here")
        schedule = cls(
            shape=SHAPES[m.shape],
            factor=finite("schedule.factor", m.factor),
            every=m.every,
            after=m.after,
            rounds=m.rounds,
            warmup_rounds=m.warmup_rounds,
        )
        if problem := schedule.problem():
            raise malformed(problem)
        return schedule


def _step(schedule: Schedule, version: int) -> float:
    return schedule.factor ** (version // schedule.every) if version > schedule.after else 1.0


def _cosine(schedule: Schedule, version: int) -> float:
    begin, end = schedule.warmup_rounds, schedule.rounds
    progress = (min(max(version, begin), end) - begin) / (end - begin)
    return schedule.factor + (1 - schedule.factor) * (1 + math.cos(math.pi * progress)) / 2


_USED: Mapping[str, tuple[str, ...]] = {
    "constant": (),
    "step": ("factor", "every", "after"),
    "cosine": ("factor", "rounds"),
}
_MULTIPLIERS: Mapping[str, Callable[[Schedule, int], float]] = {
    "constant": lambda schedule, version: 1.0,
    "step": _step,
    "cosine": _cosine,
}
