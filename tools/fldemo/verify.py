"""The demo judges itself: what must hold of its figures and of the run, each check with what was found."""

from __future__ import annotations

import signal
from typing import NamedTuple

from fldemo.federation import Run, exit_words
from fldemo.figures import Figures
from fldemo.scenario import LEAST_ROUNDS

MOSQUITTO = "mosquitto"  # as in aggregator.broker.KINDS
LIMIT_BYTES_PER_PARAMETER = 1.1
ENVELOPE_BYTES = 512
"""Header, signature and seal of an update: nothing beside a real model, half of a very small one's update."""
LIMIT_TOTAL_PSS = 1.3e9
LIMIT_DEVICE_PSS = 100e6
LIMIT_DEVICE_RSS = 150e6
_MB = 1e6


class Check(NamedTuple):
    """``text``: what must hold, and what was found."""

    holds: bool
    text: str


def verify(figures: Figures, run: Run, rounds: int, limit_points: float) -> tuple[Check, ...]:
    """All checks, in the order of importance. No time is among them: it says how busy the machine was.

    limit_points: the score may be so many hundredths below central training, give or take one standard error: with
    360 held-out digits a point is four of them, and the error of an accuracy of 97 % is 0.9 points.
    With amqtt only what makes a run right is demanded, no figure: it is there so that the demo runs anywhere.
    """
    baselines = figures.baselines
    unclean = {name: code for name, code in run.exit_codes.items() if code != 0}
    return (
        Check(
            figures.score == figures.score_npz,
            f"model.onnx and model.npz agree: {figures.score:.2%} and {figures.score_npz:.2%}",
        ),
        Check(
            figures.score > baselines.local_mean,
            f"federated {figures.score:.2%} is above local-only {baselines.local_mean:.2%}",
        ),
        *(_figures(figures, limit_points) if figures.broker == MOSQUITTO else ()),
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


def _figures(figures: Figures, limit_points: float) -> tuple[Check, ...]:
    """What the design promises. Memory only where it was measured (/proc)."""
    per = figures.update_bytes_per_parameter
    checks = [
        Check(
            figures.gap_points <= limit_points + figures.error_points,
            f"federated is at most {limit_points:g} points below central training: {figures.gap_points:+.1f} below "
            f"(standard error {figures.error_points:.1f})",
        ),
        Check(
            per is not None and per <= LIMIT_BYTES_PER_PARAMETER + ENVELOPE_BYTES / figures.parameters,
            f"an update takes at most {LIMIT_BYTES_PER_PARAMETER:g} bytes per parameter, and {ENVELOPE_BYTES}: "
            + ("none was sent" if per is None else f"{per:.2f}"),
        ),
    ]
    if memory := figures.memory:
        checks += [
            _memory("all processes hold", LIMIT_TOTAL_PSS, memory.total_peak, "of PSS"),
            _memory("a device holds", LIMIT_DEVICE_PSS, memory.device_pss_mean, "of PSS on average"),
            _memory("a device never holds", LIMIT_DEVICE_RSS, memory.device_rss_peak, "of RSS"),
        ]
    return tuple(checks)


def _memory(who: str, limit: float, found: int, kind: str) -> Check:
    more = "more than" if "never" in who else "at most"
    return Check(found <= limit, f"{who} {more} {limit / _MB:.0f} MB {kind}: {found / _MB:.0f} MB")


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
        Check(
            len(died) == 2,
            f"two devices died by SIGKILL in the middle of a round: {names or 'none'}"
            + (
                f"; {len(run.faults.missed)} other kills came too late and do not count"
                * bool(run.faults.missed)
            ),
        ),
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
