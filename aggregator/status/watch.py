"""``aggregator status --watch``: drawn again every second on a terminal, a line per change in a pipe."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

from rich.console import Console
from rich.live import Live

from aggregator.config import AggregatorConfig
from aggregator.service import open_ledger
from aggregator.status.collect import collect_from
from aggregator.status.live import plain_line, render_live

SHOWN_ROUNDS = 50
_STEP_S = 0.05  # how soon a signal is heeded


def watch_ledger(
    config: AggregatorConfig,
    *,
    interval_s: float,
    should_stop: Callable[[], bool],
    console: Console | None = None,
) -> None:
    """Watch the federation of these settings. Raises LedgerError."""
    with closing(open_ledger(config, read_only=True)) as ledger:
        watch(
            lambda: collect_from(ledger, config, SHOWN_ROUNDS),
            console=console or Console(),
            interval_s=interval_s,
            should_stop=should_stop,
        )


def watch(
    collect: Callable[[], dict[str, Any]],
    *,
    console: Console,
    interval_s: float,
    should_stop: Callable[[], bool],
) -> None:
    """Show what ``collect`` gives until ``should_stop``; what it raises ends it."""
    if not console.is_terminal:
        last = None
        while not should_stop():
            line = plain_line(collect())
            if line != last:
                console.print(
                    f"{time.strftime('%H:%M:%S')}  {line}", soft_wrap=True, markup=False, highlight=False
                )
                last = line
            _wait(interval_s, should_stop)
        return
    with Live(console=console, auto_refresh=False) as live:
        while not should_stop():
            live.update(render_live(collect(), console.width, console.height), refresh=True)
            _wait(interval_s, should_stop)


def _wait(seconds: float, should_stop: Callable[[], bool]) -> None:
    until = time.monotonic() + seconds
    while not should_stop() and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, _STEP_S))
