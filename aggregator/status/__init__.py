"""``aggregator status``: what the ledger tells of a federation, as a document, as tables, and live."""

from __future__ import annotations

from aggregator.status.collect import collect
from aggregator.status.live import render_live
from aggregator.status.render import render
from aggregator.status.watch import watch, watch_ledger

__all__ = ["collect", "render", "render_live", "watch", "watch_ledger"]
