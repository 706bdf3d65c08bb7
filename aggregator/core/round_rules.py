"""When a round opens and closes: the ``[round]`` section, and the figures that follow from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edge_runtime.protocol.manifest import MAX_COHORT


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
