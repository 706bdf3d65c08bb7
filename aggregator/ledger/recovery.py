"""The state after a restart: tickets and standing orders from the tables, the current round from the journal."""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import Connection, select

from aggregator.core.records import CheckedIn, Record
from aggregator.core.state import State, apply
from aggregator.ledger import encoding, queries, tables
from aggregator.ledger.errors import LedgerError
from edge_runtime.protocol.ids import DeviceId


def read_journal(connection: Connection, first_seq: int = 1, *, check_ins: bool = True) -> Iterator[Record]:
    """The records from ``first_seq`` on, in order; ``check_ins``: with those too. Raises LedgerError."""
    journal = tables.journal
    wanted = select(journal.c.kind, journal.c.body).where(journal.c.seq >= first_seq).order_by(journal.c.seq)
    if not check_ins:
        wanted = wanted.where(journal.c.kind != encoding.KIND_NAMES[CheckedIn])
    for kind, body in connection.execute(wanted.execution_options(yield_per=500)):
        yield encoding.decode_record(kind, body)


def load_state(connection: Connection) -> State:
    """Equal to a fold over all records ever committed, without reading more than the last round's."""
    rounds = tables.rounds.c
    generation = connection.scalar(select(tables.epoch.c.generation))
    if generation is None:
        raise LedgerError("the ledger has lost its epoch row: restore it from a backup")
    state = State(generation=generation)
    last_two = connection.execute(
        select(rounds.generation, rounds.base_version, rounds.opened_seq, rounds.closed_at)
        .order_by(rounds.generation.desc(), rounds.round.desc())
        .limit(2)
    ).all()
    if last_two:
        current, before = last_two[0], last_two[1:]
        state.version = current.base_version
        state.idle_since = before[0].closed_at if before else None
    for record in read_journal(connection, last_two[0].opened_seq if last_two else 1, check_ins=False):
        apply(state, record)
    state.generation = generation
    standing = queries.standing(connection)
    state.paused, state.draining = standing.paused, standing.draining
    state.evicted = set(standing.evicted)
    state.revocations, state.revoked = standing.revocations, dict(standing.revoked)
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
            epoch=row.epoch,
        )
        for row in connection.execute(select(checkins).where(checkins.c.available))
    }
