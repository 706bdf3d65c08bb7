"""Small pictures and words for terminals: bars, sparklines, ages, sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII_BLOCKS = "_.-=*#"


class Sparkline:
    """Values over time in one line, newest at the right; plain characters on a terminal without others.

    A value that is not a finite number is a gap. Longer series keep their newest ``width`` values.
    """

    def __init__(self, values: Sequence[float | None], width: int) -> None:
        self.values = list(values)[-max(width, 1) :]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(sparkline(self.values, _ASCII_BLOCKS if options.ascii_only else _BLOCKS), no_wrap=True)


class Bar:
    """How much of ``total`` is done, ``width`` characters wide."""

    def __init__(self, done: int, total: int, width: int) -> None:
        self.full = width if total <= 0 else min(done * width // total, width)
        self.width = width

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        full, rest = "#-" if options.ascii_only else "█░"
        yield Text(full * self.full + rest * (self.width - self.full), no_wrap=True)


def sparkline(values: Sequence[float | None], blocks: str = _BLOCKS) -> str:
    """One character a value, from the least to the greatest of them; all alike: the middle."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return ""
    low, span = min(known), max(known) - min(known)
    top = len(blocks) - 1

    def block(value: float | None) -> str:
        if value is None or not math.isfinite(value):
            return " "
        return blocks[top // 2 if span == 0 else round((value - low) / span * top)]

    return "".join(map(block, values))


def duration(seconds: float) -> str:
    """``12 s``, ``3 min``, ``2 h``, ``5 d``: one unit, rounded down."""
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{max(seconds, 0) // unit:.0f} {name}"
    return f"{seconds // 86_400:.0f} d"


def size(count: int) -> str:
    """Bytes with a binary unit: ``512 B``, ``3.4 MiB``."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
