"""Reading the tables: for the service, for ``aggregator status``, for tests."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Row, and_, func, or_, select, true

from aggregator.inbox.segments import Position
from aggregator.ledger import encoding, tables
from aggregator.ledger.errors import LedgerError
from aggregator.ledger.rows import PRUNED, counter_name
from aggregator.ledger.values import (
    Count,
    DeviceRow,
    EvaluationRow,
    OrderRow,
    Piece,
    Presence,
    RoundRow,
    Standing,
    TelemetryRow,
    Totals,
    UpdateRow,
    VersionRow,
)
from edge_runtime.protocol.ids import DeviceId, RoundId
from edge_runtime.protocol.rejects import Reject
from edge_runtime.protocol.rounds import Outcome, Phase


def updates(connection: Connection, round_id: RoundId, device: DeviceId | None = None) -> list[UpdateRow]:
    table = tables.updates
    of_device = table.c.device == device if device is not None else true()
    rows = connection.execute(
        select(table)
        .where(table.c.generation == round_id.generation, table.c.round == round_id.number, of_device)
        .order_by(table.c.device)
    )
    return [
        UpdateRow(
            round_id=round_id,
            device=row.device,
            digest=row.digest,
            samples=row.samples,
            outcome=Outcome(row.outcome) if row.outcome else None,
            version=row.version,
            reason=row.reason,
        )
        for row in rows
    ]


def devices(connection: Connection, device: DeviceId | None = None) -> list[DeviceRow]:
    table = tables.devices
    wanted = select(table).order_by(table.c.device)
    if device is not None:
        wanted = wanted.where(table.c.device == device)
    return [DeviceRow(**row._mapping) for row in connection.execute(wanted)]


def rounds(connection: Connection, limit: int) -> list[RoundRow]:
    table, stored = tables.rounds, tables.updates
    of_round = and_(stored.c.generation == table.c.generation, stored.c.round == table.c.round)
    count = select(func.count()).select_from(stored).where(of_round).correlate(table).scalar_subquery()
    rows = connection.execute(
        select(table, count.label("stored"))
        .order_by(table.c.generation.desc(), table.c.round.desc())
        .limit(limit)
    )
    return [
        RoundRow(
            round_id=RoundId(row.generation, row.round),
            phase=Phase(row.phase),
            base_version=row.base_version,
            opened_at=row.opened_at,
            closed_at=row.closed_at,
            cohort_size=row.cohort_size,
            stored=row.stored,
            accepted=row.accepted,
            reason=row.reason,
        )
        for row in rows
    ]


def versions(connection: Connection, version: int | None = None) -> list[VersionRow]:
    table = tables.versions
    wanted = select(table).order_by(table.c.version)
    if version is not None:
        wanted = wanted.where(table.c.version == version)
    return [
        VersionRow(
            version=row.version,
            round_id=None if row.round is None else RoundId(row.generation, row.round),
            model_digest=row.model_digest,
            restored_from=row.restored_from,
        )
        for row in connection.execute(wanted)
    ]


def standing(connection: Connection) -> Standing:
    """Raises LedgerError if its row is lost."""
    row = connection.execute(select(tables.standing)).one_or_none()
    if row is None:
        raise LedgerError("the ledger has lost its standing row: restore it from a backup")
    excluded = connection.execute(select(tables.exclusions).order_by(tables.exclusions.c.device)).all()
    return Standing(
        paused=row.paused,
        draining=row.draining,
        evicted={each.device: each.evicted_at for each in excluded if each.evicted_at is not None},
        revocations=row.revocations,
        revoked={each.device: each.revoked_epoch for each in excluded if each.revoked_epoch is not None},
    )


def orders(connection: Connection, *, waiting: bool = False, limit: int | None = None) -> list[OrderRow]:
    """All, newest first; or those that wait, oldest first."""
    table = tables.orders
    wanted = select(table).order_by(table.c.id if waiting else table.c.id.desc()).limit(limit)
    if waiting:
        wanted = wanted.where(table.c.settled_at.is_(None))
    return [OrderRow(**row._mapping) for row in connection.execute(wanted)]


def order(connection: Connection, number: int) -> OrderRow | None:
    row = connection.execute(select(tables.orders).where(tables.orders.c.id == number)).one_or_none()
    return OrderRow(**row._mapping) if row else None


def evaluations(connection: Connection, version: int | None = None) -> list[EvaluationRow]:
    table = tables.evaluations
    wanted = select(table).order_by(table.c.version)
    if version is not None:
        wanted = wanted.where(table.c.version == version)
    return [
        EvaluationRow(**{**row._mapping, "metrics": encoding.decode_metrics(row.metrics)})
        for row in connection.execute(wanted)
    ]


def presence(connection: Connection, now: float) -> Presence:
    """How many devices there are. ``now``: seconds of the aggregator's clock."""
    known = connection.scalar(select(func.count()).select_from(tables.devices))
    expires_at = tables.checkins.c.expires_at
    present = connection.scalar(select(func.count()).select_from(tables.checkins).where(expires_at > now))
    return Presence(known=known or 0, present=present or 0)


def epoch(connection: Connection) -> int:
    """Of the last claim."""
    return connection.scalar(select(tables.epoch.c.epoch)) or 0


def telemetry(connection: Connection) -> list[TelemetryRow]:
    rows = connection.execute(select(tables.telemetry).order_by(tables.telemetry.c.device))
    return [TelemetryRow(**{**row._mapping, "latest": encoding.decode_telemetry(row.latest)}) for row in rows]


def totals(connection: Connection) -> Totals:
    phase, outcome, counters = tables.rounds.c.phase, tables.updates.c.outcome, tables.counters.c
    values = {row.name: row.value for row in connection.execute(select(counters.name, counters.value))}
    return Totals(
        version=connection.scalar(select(func.max(tables.versions.c.version))) or 0,
        rounds={
            Phase(row.phase): row.n
            for row in connection.execute(select(phase, func.count().label("n")).group_by(phase))
        },
        outcomes={
            Outcome(row.outcome) if row.outcome else None: row.n
            for row in connection.execute(select(outcome, func.count().label("n")).group_by(outcome))
        },
        devices=connection.scalar(select(func.count()).select_from(tables.devices)) or 0,
        rejects={reject: values[name] for reject in Reject if (name := counter_name(reject)) in values},
        counts={count: values.get(counter_name(count), 0) for count in Count},
    )


# ---- the inbox's index ------------------------------------------------------------------------------


def pieces_of(connection: Connection, round_id: RoundId, device: DeviceId) -> list[Position]:
    """The positions of a stored update's pieces, in order; empty if none is stored or they were forgotten."""
    table, stored = tables.pieces.c, tables.updates.c
    rows = connection.execute(
        select(table.segment, table.offset, table.length)
        .where(
            table.generation == round_id.generation,
            table.round == round_id.number,
            table.device == device,
            stored.generation == table.generation,
            stored.round == table.round,
            stored.device == table.device,
            stored.digest == table.digest,
        )
        .order_by(table.piece)
    )
    return [Position(*row) for row in rows]


def unfinished_pieces(connection: Connection, round_id: RoundId) -> list[Piece]:
    """Pieces of a round whose devices have no stored update yet: what a restart goes on assembling."""
    table, stored = tables.pieces, tables.updates
    is_stored = (
        select(stored.c.device)
        .where(
            stored.c.generation == table.c.generation,
            stored.c.round == table.c.round,
            stored.c.device == table.c.device,
        )
        .exists()
    )
    rows = connection.execute(
        select(table)
        .where(table.c.generation == round_id.generation, table.c.round == round_id.number, ~is_stored)
        .order_by(table.c.device, table.c.digest, table.c.piece)
    )
    return [_piece(row) for row in rows]


def durable_ends(connection: Connection) -> dict[RoundId, Position]:
    """The furthest indexed position of every round that has pieces: what ``Inbox`` must find on disk."""
    table = tables.pieces.c
    last_segment = (
        select(table.generation, table.round, func.max(table.segment).label("segment"))
        .group_by(table.generation, table.round)
        .subquery()
    )
    last_offset = (
        select(table.generation, table.round, table.segment, func.max(table.offset).label("offset"))
        .join(
            last_segment,
            and_(
                last_segment.c.generation == table.generation,
                last_segment.c.round == table.round,
                last_segment.c.segment == table.segment,
            ),
        )
        .group_by(table.generation, table.round, table.segment)
        .subquery()
    )
    rows = connection.execute(
        select(table.generation, table.round, table.segment, table.offset, table.length).join(
            last_offset,
            and_(
                last_offset.c.generation == table.generation,
                last_offset.c.round == table.round,
                last_offset.c.segment == table.segment,
                last_offset.c.offset == table.offset,
            ),
        )
    )
    return {RoundId(row.generation, row.round): Position(row.segment, row.offset, row.length) for row in rows}


def _piece(row: Row[Any]) -> Piece:
    return Piece(
        round_id=RoundId(row.generation, row.round),
        device=row.device,
        digest=row.digest,
        index=row.piece,
        count=row.piece_count,
        position=Position(row.segment, row.offset, row.length),
    )


def pruned(connection: Connection) -> int:
    """How many records the journal has let go."""
    counters = tables.counters.c
    return connection.scalar(select(counters.value).where(counters.name == PRUNED)) or 0


# ---- problems, for check_invariants -----------------------------------------------------------------


def pieces_without_whole_update(connection: Connection) -> list[tuple[RoundId, DeviceId]]:
    """Stored updates some of whose pieces are in the index and some are not."""
    table, stored = tables.pieces.c, tables.updates.c
    rows = connection.execute(
        select(table.generation, table.round, table.device)
        .where(
            stored.generation == table.generation,
            stored.round == table.round,
            stored.device == table.device,
            stored.digest == table.digest,
        )
        .group_by(table.generation, table.round, table.device)
        .having(
            or_(
                func.count() != func.max(table.piece_count),
                func.max(table.piece) != func.max(table.piece_count) - 1,
            )
        )
    )
    return [(RoundId(row.generation, row.round), row.device) for row in rows]
