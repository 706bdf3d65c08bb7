"""The state after a restart: tickets and totals from the tables, the current round from the journal."""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import Connection, func, or_, select

from aggregator.core.records import CheckedIn, Record
from aggregator.core.state import State, apply
from aggregator.ledger import encoding, tables
from aggregator.ledger.errors import LedgerError
from edge_runtime.protocol.ids import DeviceId


def read_journal(
    connection: Connection, first_seq: int = 1, *, rounds_only: bool = False
) -> Iterator[Record]:
    """The records from ``first_seq`` on, in order; ``rounds_only``: without check-ins. Raises LedgerError."""
    journal = tables.journal
    wanted = select(journal.c.kind, journal.c.body).where(journal.c.seq >= first_seq).order_by(journal.c.seq)
    if rounds_only:
        wanted = wanted.where(journal.c.generation.is_not(None))
    for kind, body in connection.execute(wanted.execution_options(yield_per=500)):
        yield encoding.decode_record(kind, body)


def load_state(connection: Connection) -> State:
    """Equal to a fold over all records ever committed, without reading more than the last round's."""
    rounds, versions = tables.rounds.c, tables.versions.c
    generation = connection.scalar(select(tables.epoch.c.generation))
    if generation is None:
        raise LedgerError("the ledger has lost its epoch row: restore it from a backup")
    state = State(generation=generation)
    last_two = connection.execute(
        select(rounds.generation, rounds.round, rounds.opened_seq, rounds.closed_at)
        .order_by(rounds.generation.desc(), rounds.round.desc())
        .limit(2)
    ).all()
    if last_two:
        current, before = last_two[0], last_two[1:]
        state.version = (
            connection.scalar(
                select(func.max(versions.version)).where(
                    or_(versions.generation != current.generation, versions.round != current.round)
                )
            )
            or 0
        )
        state.idle_since = before[0].closed_at if before else None
        for record in read_journal(connection, current.opened_seq, rounds_only=True):
            apply(state, record)
        state.generation = generation
    state.tickets = _tickets(connection)
    return state


def _tickets(connection: Connection) -> dict[DeviceId, CheckedIn]:
    checkins = tables.checkins
    return {
        row.device: CheckedIn(
            device=row.device,
            sequence=row.sequence,
            expires_at=row.expires_at,
            samples=row.samples,
            codecs=encoding.decode_names(row.codecs),
        )
        for row in connection.execute(select(checkins).where(checkins.c.available))
    }
