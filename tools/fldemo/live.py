"""The picture of ``aggregator status --watch`` below the lines of the demo, while its rounds run."""

from __future__ import annotations

import contextlib
import threading
from contextlib import closing
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

from aggregator.config import load_aggregator_config
from aggregator.service import open_ledger
from aggregator.status import render_live
from aggregator.status.collect import collect_from
from edge_runtime.protocol.errors import FleetgradError

INTERVAL_S = 0.5
_ROUNDS = 50


class LiveView:
    """Use as a context manager. Without a terminal it shows nothing: the lines alone remain.

    ``config``: the aggregator.toml that will be there once the federation is set up.
    """

    def __init__(self, console: Console, config: Path) -> None:
        self._console = console
        self._config = config
        self._live = Live(Text(), console=console, auto_refresh=False, transient=True)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._draw, name="live view", daemon=True)

    def __enter__(self) -> LiveView:
        if self._console.is_terminal:
            self._live.start()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """Take the picture away. Doing it twice is fine."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
            self._live.stop()

    def _draw(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            # Before the first round there is no ledger, and while it is made it cannot be read.
            with contextlib.suppress(FleetgradError, OSError):
                self._draw_ledger()

    def _draw_ledger(self) -> None:
        config = load_aggregator_config(self._config)
        with closing(open_ledger(config, read_only=True)) as ledger:
            while not self._stop.is_set():
                document = collect_from(ledger, config, _ROUNDS)
                picture = render_live(document, self._console.width, self._console.height // 2)
                self._live.update(picture, refresh=True)
                self._stop.wait(INTERVAL_S)
