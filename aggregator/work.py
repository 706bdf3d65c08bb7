"""What one batch of messages becomes on its way to a commit, and what leaves after it."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from aggregator.core.events import Effect
from aggregator.core.records import Record
from aggregator.ledger.values import Batch, Count, DeviceSeen, Evaluated, OrderSettled, Piece
from edge_runtime.protocol.ids import DeviceId, RoundId
from edge_runtime.protocol.messages import Telemetry
from edge_runtime.protocol.rejects import Reject
from edge_runtime.protocol.rounds import Verdict

Report = Callable[..., None]
"""``report(event, **fields)``: what happens, for the log and the terminal."""


class Meter(Protocol):
    """What is measured where it happens. Must return at once and never raise."""

    def committed(self, seconds: float) -> None:
        """A commit took so long."""

    def answered(self, verdict: Verdict) -> None:
        """A receipt was made."""


class NoMeter:
    """For an engine that nobody measures."""

    def committed(self, seconds: float) -> None:
        """Nothing."""

    def answered(self, verdict: Verdict) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Outgoing:
    """To publish after the commit."""

    topic: str
    payload: bytes
    retain: bool = False


@dataclass(frozen=True)
class Incoming:
    """A message of the broker."""

    topic: str
    payload: bytes


@dataclass
class Work:
    """What one batch gathers before its commit."""

    records: list[Record] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    devices: dict[DeviceId, DeviceSeen] = field(default_factory=dict)
    telemetry: list[tuple[DeviceId, Telemetry]] = field(default_factory=list)
    counts: Counter[Reject | Count] = field(default_factory=Counter)
    forget: list[RoundId] = field(default_factory=list)
    orders: list[OrderSettled] = field(default_factory=list)
    evaluations: list[Evaluated] = field(default_factory=list)
    effects: deque[Effect] = field(default_factory=deque)
    outgoing: list[Outgoing] = field(default_factory=list)
    reports: list[tuple[str, dict[str, object]]] = field(default_factory=list)

    def say(self, event: str, **fields: object) -> None:
        """Report it once it is committed."""
        self.reports.append((event, fields))

    def batch(self) -> Batch:
        """All of it, for one transaction."""
        return Batch(
            records=tuple(self.records),
            pieces=tuple(self.pieces),
            devices=tuple(self.devices.values()),
            telemetry=tuple(self.telemetry),
            counts=dict(self.counts),
            forget_pieces=tuple(self.forget),
            orders=tuple(self.orders),
            evaluations=tuple(self.evaluations),
        )
