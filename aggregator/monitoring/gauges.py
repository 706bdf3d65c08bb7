"""What the serving loop shows of itself, once a turn: a value that other threads may read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge_runtime.protocol.rounds import MOVES, Phase
from edge_runtime.transport.base import Counters

if TYPE_CHECKING:
    from aggregator.engine import Engine


@dataclass(frozen=True, kw_only=True)
class RoundGauges:
    """The open round, else the last one. ``deadline``: seconds since 1970."""

    generation: int
    number: int
    phase: Phase
    cohort: int
    goal: int
    stored: int
    accepted: int
    deadline: float

    @property
    def is_open(self) -> bool:
        return bool(MOVES[self.phase])


@dataclass(frozen=True, kw_only=True)
class Gauges:
    """Counts since the process started, and how things stand. ``queued``: messages that wait, by queue."""

    version: int
    round: RoundGauges | None
    connected: bool
    paused: bool
    draining: bool
    finished: bool
    available: int  # devices with a check-in that no round has used
    evicted: int
    revoked: int
    queued: dict[str, int]
    bytes_up: int
    bytes_down: int
    reconnects: int


def read_gauges(engine: Engine, counters: Counters, *, connected: bool, now: float) -> Gauges:
    """In the thread of the loop, between two turns; walks over the check-ins. ``now``: seconds since 1970."""
    state = engine.state
    current = state.round
    return Gauges(
        version=state.version,
        round=None
        if current is None
        else RoundGauges(
            generation=current.round_id.generation,
            number=current.round_id.number,
            phase=current.phase,
            cohort=len(current.cohort),
            goal=engine.rules.goal_of(len(current.cohort)),
            stored=len(state.stored),
            accepted=len(current.accepted),
            deadline=current.deadline,
        ),
        connected=connected,
        paused=state.paused,
        draining=state.draining,
        finished=engine.finished,
        available=sum(ticket.expires_at > now for ticket in state.tickets.values()),
        evicted=len(state.evicted),
        revoked=len(state.revoked),
        queued={"outgoing": len(engine.outgoing), "blobs": engine.blobs.queued},
        bytes_up=counters.bytes_up,
        bytes_down=counters.bytes_down,
        reconnects=counters.reconnects,
    )
