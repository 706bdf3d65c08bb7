"""What the demo prints: a line for each round, and the table at the end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fldemo.examples import DIGITS, EXAMPLES
from fldemo.figures import Figures, Spread
from fldemo.scenario import COHORT, DEVICES, GOAL, Round
from fldemo.verify import Check

# Flower 1.41.0, its default deployment (one SuperLink, ten SuperNodes) and its in-process simulator, with the same
# data, network (38k parameters), 5 of 10 clients a round and 3 local epochs, measured on the machine that this
# project's own published figures come from, when it was quiet. Other machines give other numbers for both.
PEER_DEPLOYED_ROUND_S = 24.0
PEER_DEPLOYED_BYTES = 4.6e9
PEER_SIMULATED_ROUND_S = 0.35
PEER = "Flower 1.41.0"

ROUND_GOAL_S = 1.0
"""Shown only: a busy machine takes longer, and nothing is wrong with it."""

# What a refusal means that is there in a healthy run too.
_HARMLESS = {"unknown_blob": "a returning device asks for what is gone"}

_MB = 1e6


def round_line(round_: Round, total: int, metric: str) -> str:
    """One round, in one line."""
    if round_.aborted:
        return f"round {round_.number:3d}  aborted: too few updates at the deadline"
    shown = "" if round_.score is None else f"  {metric} {round_.score:6.2%}"
    return (
        f"round {round_.number:3d}  version {round_.version:3d}/{total}  "
        f"{len(round_.accepted)} of {len(round_.cohort)} updates{shown}  {round_.seconds or 0.0:5.2f} s"
    )


def print_table(console: Console, figures: Figures) -> None:
    """All figures beside what they are compared with."""
    table = Table(title="Federated learning on ten device processes", title_justify="left", show_lines=False)
    for heading in ("figure", "this run", "beside"):
        table.add_column(heading, overflow="fold")
    for section in (_accuracy(figures), _rounds(figures), _traffic(figures), _memory(figures)):
        for name, value, beside in section:
            table.add_row(name, value, beside)
        table.add_section()
    table.add_row("model files", "\n".join(_short(file) for file in figures.files), "")
    console.print(table)


def print_checks(console: Console, checks: Sequence[Check]) -> None:
    """What was verified; what failed stands out."""
    for check in checks:
        mark = "[green]ok    [/]" if check.holds else "[bold red]FAILED[/]"
        console.print(mark, check.text, highlight=False)


def seed_line(figures: Figures, checks: Sequence[Check]) -> tuple[str, bool]:
    """One run among many, in one line, and whether all its checks hold."""
    failed = [check.text for check in checks if not check.holds]
    line = (
        f"{'FAILED ' if failed else 'passed '}  seed {figures.seed:3d}  {figures.metric} {figures.score:6.2%}  "
        f"central {figures.baselines.central:6.2%}  gap {figures.gap_points:+.2f} points  "
        f"{figures.round_median_s:5.2f} s a round"
    )
    return "; ".join([line, *failed]), not failed


def write_json(path: Path, figures: Figures, checks: Sequence[Check], rounds: Sequence[Round]) -> None:
    """All figures, the checks, each round, and the peer's constants where it was measured."""
    document = {
        **figures.as_json(),
        "checks": [check._asdict() for check in checks],
        "every_round": [round_.__dict__ for round_ in rounds],
    }
    if _has_peer(figures):
        document["peer"] = {
            "name": PEER,
            "deployed_round_s": PEER_DEPLOYED_ROUND_S,
            "deployed_bytes": PEER_DEPLOYED_BYTES,
            "simulated_round_s": PEER_SIMULATED_ROUND_S,
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", "utf-8")


Rows = list[tuple[str, str, str]]


def _accuracy(figures: Figures) -> Rows:
    base = figures.baselines
    worst = min(figures.recall, key=lambda name: figures.recall[name])
    sample = EXAMPLES[figures.example].sample
    sizes = sorted(figures.samples.values())
    return [
        (
            f"{figures.metric} on {figures.held_out} held-out {sample}",
            f"[bold]{figures.score:.2%}[/]",
            f"central training {base.central:.2%}; mean of local-only {base.local_mean:.2%}",
        ),
        (
            "worst class",
            f"{worst}: {figures.recall[worst]:.2%} recognised",
            f"{base.passes} passes over the data each; local-only {min(base.local):.1%} to {max(base.local):.1%}",
        ),
        (
            "data",
            f"{sum(sizes)} {sample} on {len(sizes)} devices, {sizes[0]} to {sizes[-1]} each",
            "Dirichlet(0.3)",
        ),
    ]


def _rounds(figures: Figures) -> Rows:
    killed = ", ".join(f"{device} (round {number})" for device, number in figures.killed.items())
    back = ", ".join(f"{device} after round {number}" for device, number in figures.returned.items())
    refused = ", ".join(
        f"{count} {reason}" + (f" ({_HARMLESS[reason]})" if reason in _HARMLESS else "")
        for reason, count in figures.refused.items()
    )
    peer = (
        f"; {PEER}: {PEER_DEPLOYED_ROUND_S:g} deployed, {PEER_SIMULATED_ROUND_S:g} simulated without a wire"
    )
    return [
        (
            "seconds a round",
            f"[bold]median {figures.round_median_s:.2f}, mean {figures.round_mean_s:.2f}[/]",
            f"goal {ROUND_GOAL_S:g}" + (peer if _has_peer(figures) else ""),
        ),
        (
            "rounds",
            f"{figures.rounds} published, {figures.aborted} aborted",
            f"{COHORT} of {len(DEVICES)} selected, goal {GOAL}; from one version to the next, all included",
        ),
        (
            "updates",
            f"{figures.updates} counted, {figures.late} late",
            f"late: the round had its {GOAL} already; messages refused: {refused or 'none'}",
        ),
        ("killed in mid-round", killed or "none", f"started again: {back or 'none'}"),
        (
            "time",
            f"{figures.total_s:.0f} s in all",
            f"{figures.start_up_s:.0f} s until the first round opened",
        ),
    ]


def _traffic(figures: Figures) -> Rows:
    per = figures.update_bytes_per_parameter
    return [
        (
            "an update on the wire",
            "not measured" if per is None else f"{per:.2f} bytes per parameter",
            f"{figures.parameters:,} parameters; float32: 4 bytes",
        ),
        ("bytes up per device", _spread(figures.bytes_up), "minimum / mean / maximum over the run"),
        ("bytes down per device", _spread(figures.bytes_down), "minimum / mean / maximum over the run"),
    ]


def _memory(figures: Figures) -> Rows:
    memory = figures.memory
    if memory is None:
        return [("memory", "not measured", "needs /proc (Linux)")]
    return [
        (
            f"memory of all {memory.processes} processes",
            f"[bold]{memory.total_peak / _MB:.0f} MB[/] PSS, at its highest",
            f"{PEER}: {PEER_DEPLOYED_BYTES / _MB:.0f} MB deployed" if _has_peer(figures) else "",
        ),
        (
            "a device",
            f"{memory.device_pss_mean / _MB:.0f} MB PSS",
            f"mean over devices and time; largest resident set {memory.device_rss_peak / _MB:.0f} MB",
        ),
        (
            "aggregator, broker",
            f"{memory.aggregator_pss / _MB:.0f} MB, {memory.broker_pss / _MB:.0f} MB PSS",
            f"broker: {figures.broker}",
        ),
    ]


def _has_peer(figures: Figures) -> bool:
    """The peer was measured with the digits only."""
    return figures.example == DIGITS.name


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return "not measured"
    return f"{spread.least / _MB:.2f} / {spread.mean / _MB:.2f} / {spread.most / _MB:.2f} MB"


def _short(file: str) -> str:
    """Relative to the working folder where that is shorter."""
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file
