"""One picture of a federation at a moment, for a terminal that is drawn again and again."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from aggregator.status.figures import Bar, Sparkline, duration
from aggregator.status.render import devices_table, metrics_of, refused_line, rounds_table
from edge_runtime.protocol.rounds import Phase

WIDE = 78  # columns from which the tables show everything
_COLOURS = {"finished": "green", "paused": "yellow", "draining": "yellow", "waiting": "cyan"}
_FIXED_LINES = 14

Document = dict[str, Any]


def render_live(document: Document, console_width: int, console_height: int = 40) -> RenderableType:
    """``document``: as ``collect`` gives it. Fits the width; the lists shrink to the height."""
    room = max(console_height - _FIXED_LINES - len(metrics_of(document)), 4)
    rounds, devices = max(room // 3, 2), max(room - room // 3, 2)
    wide = console_width >= WIDE
    parts: list[RenderableType] = [_header(document), _round_line(document)]
    if (current := document["open_round"]) is not None:
        parts.append(Bar(len(current["stored"]), current["goal"], min(console_width, 60)))
    parts.append(_curves(document, console_width))
    if document["rounds"]:
        parts += [Text(), _compact(rounds_table(document, rounds), wide, keep=4)]
    if document["devices"]:
        parts += [Text(), _compact(devices_table(document, devices), wide, keep=2)]
        if (more := len(document["devices"]) - devices) > 0:
            parts.append(Text(f"and {more} more devices", style="dim"))
    waiting = [row for row in document["orders"] if row["settled_at"] is None]
    if waiting:
        named = ", ".join(f"{row['kind']} {row['argument']}".strip() for row in waiting)
        parts.append(Text(f"orders that wait: {named}", style="yellow", overflow="crop"))
    if document["refused"]:
        parts.append(Text(refused_line(document), style="red", overflow="crop"))
    return Group(*parts)


def plain_line(document: Document) -> str:
    """The same in one line without the time of day, for a pipe: it changes when something has happened."""
    words = [
        document["federation"],
        f"version {document['version']}/{document['last_version']}",
        document["state"],
    ]
    current = document["open_round"]
    if current is not None:
        words.append(f"round {current['round']} {len(current['stored'])}/{current['goal']} updates")
    words += [
        f"{name} {values[-1]:.4f}" for name, values in metrics_of(document).items() if values[-1] is not None
    ]
    if document["refused"]:
        words.append(f"refused {sum(document['refused'].values())}")
    return "  ".join(words)


def _header(document: Document) -> Text:
    state = document["state"]
    header = Text(overflow="crop", no_wrap=True)
    header.append(document["federation"], style="bold")
    header.append(f"  version {document['version']}/{document['last_version']}  ")
    header.append(state, style=_COLOURS.get(state, "blue"))
    for word in ("paused", "draining"):
        if document[word] and state != word:
            header.append(
                f"  {word} after this round" if document["open_round"] else f"  {word}", style="yellow"
            )
    if not document["served"]:
        header.append("  no aggregator serves it", style="yellow")
    header.append(time.strftime("  %H:%M:%S", time.localtime(document["at"])), style="dim")
    return header


def _round_line(document: Document) -> Text:
    current = document["open_round"]
    if current is None:
        rounds = document["rounds_by_phase"]
        counts = [f"{rounds.get(phase.value, 0)} {phase.value}" for phase in (Phase.PUBLISHED, Phase.ABORTED)]
        return Text(f"no round is open; rounds: {', '.join(counts)}", overflow="crop", no_wrap=True)
    left = current["deadline"] - document["at"]
    line = f"round {current['round']}  {current['phase']}  {len(current['stored'])}/{current['goal']} updates"
    line += f" of {len(current['cohort'])} devices"
    if current["phase"] == Phase.COLLECTING.value:
        line += f"  {duration(left)} left" if left > 0 else "  deadline reached"
    return Text(line, overflow="crop", no_wrap=True)


def _curves(document: Document, width: int) -> Table:
    """A line for each metric of the evaluations: its newest value and its course."""
    lines = Table.grid(padding=(0, 1))
    for name, values in metrics_of(document).items():
        if known := [value for value in values if value is not None]:
            newest = Text(f"{name} {known[-1]:.4f}", no_wrap=True, overflow="crop")
            lines.add_row(newest, Sparkline(values, max(width - 24, 8)))
    return lines


def _compact(table: Table, wide: bool, *, keep: int) -> Table:
    """Without a frame; on a narrow terminal the first ``keep`` columns and, of rounds, no reason."""
    table.box = None
    table.pad_edge = False
    if not wide:
        table.columns = table.columns[:keep]
    for column in table.columns:
        column.no_wrap = True
        column.overflow = "crop"
    return table
