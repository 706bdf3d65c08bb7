"""The demo judges itself: what must hold of its figures and of the run, each check with what was found."""

from __future__ import annotations

import signal
from typing import NamedTuple

from fldemo.federation import Run, exit_words
from fldemo.figures import Figures
from fldemo.scenario import LEAST_ROUNDS

GOAL_POINTS = 2.0
"""What the demo aims at: federated at most so many percentage points below central training."""
LIMIT_POINTS = 3.0
"""Where it fails. Which updates arrive first differs from run to run, and one point is four of 360 digits."""


class Check(NamedTuple):
    """``text``: what must hold, and what was found."""

    holds: bool
    text: str


def verify(figures: Figures, run: Run, rounds: int) -> tuple[Check, ...]:
    """All checks, in the order of importance."""
    baselines, gap = figures.baselines, 100 * (figures.baselines.central - figures.accuracy)
    unclean = {name: code for name, code in run.exit_codes.items() if code != 0}
    return (
        Check(
            figures.accuracy == figures.accuracy_npz,
            f"model.onnx and model.npz agree: {figures.accuracy:.2%} and {figures.accuracy_npz:.2%}",
        ),
        Check(
            figures.accuracy > baselines.local_mean,
            f"federated {figures.accuracy:.2%} is above local-only {baselines.local_mean:.2%}",
        ),
        Check(
            gap <= LIMIT_POINTS,
            f"federated is at most {LIMIT_POINTS:g} points below central (goal: {GOAL_POINTS:g}): {gap:+.1f} below",
        ),
        Check(
            figures.rounds >= max(rounds, LEAST_ROUNDS) and figures.version == rounds,
            f"{rounds} versions published: {figures.rounds}, the last is version {figures.version}",
        ),
        Check(
            not figures.violations,
            "no stored update was lost or counted twice: " + ("; ".join(figures.violations) or "none was"),
        ),
        *_faults(run),
        Check(
            not unclean,
            "every program that was not killed ended well: "
            + (", ".join(f"{name} {exit_words(code)}" for name, code in unclean.items()) or "all did"),
        ),
    )


def _faults(run: Run) -> tuple[Check, ...]:
    killed, returned = run.faults.kills, run.faults.restarts
    died = [kill for kill in killed if run.killed_codes.get(kill.device) == -signal.SIGKILL]
    absent = [kill for kill in killed if kill.device in run.round(kill.round).accepted]
    back = [
        round_.number
        for restart in returned
        for round_ in run.published
        if round_.number > restart.round and restart.device in round_.accepted
    ]
    names = ", ".join(f"{kill.device} in round {kill.round}" for kill in died)
    return (
        Check(len(died) == 2, f"two devices died by SIGKILL in the middle of a round: {names or 'none'}"),
        Check(
            not absent,
            "no update of a killed device was counted in the round it died in: "
            + (", ".join(kill.device for kill in absent) or "none was"),
        ),
        Check(
            bool(back),
            f"a device that died came back and took part again: {returned[0].device if returned else 'none'} "
            f"in {len(back)} rounds",
        ),
    )
