"""What a record or a row of a batch does to the tables, inside the transaction of its commit.

Every move of a round is one guarded row update, so a commit that contradicts the ledger changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from sqlalchemy import Connection, Table, and_, bindparam, case, delete, func, insert, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from aggregator.core.records import (
    CheckedIn,
    Record,
    RoundAborted,
    RoundFrozen,
    RoundOpened,
    RoundPublished,
    UpdateStored,
    VersionCommitted,
)
from aggregator.ledger import encoding, tables
from aggregator.ledger.values import Batch, Count, DeviceSeen, Piece
from edge_runtime.protocol.errors import LocalProtocolError
from edge_runtime.protocol.ids import DeviceId, RoundId
from edge_runtime.protocol.messages import Telemetry
from edge_runtime.protocol.rejects import Reject
from edge_runtime.protocol.rounds import MOVES, Outcome, Phase

PRUNED = "journal-pruned"  # the counter of records that left the journal
_MAX_SECONDS = 1e15

# Two dialects, one API; sqlite's type stands for both.
_INSERT: Mapping[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}


def upsert(connection: Connection, table: Table) -> sqlite.Insert:
    """An INSERT that can be given ON CONFLICT."""
    statement: sqlite.Insert = _INSERT[connection.dialect.name](table)
    return statement


# ---- the journal ------------------------------------------------------------------------------------


def append_records(connection: Connection, epoch: int, now: float, records: Sequence[Record]) -> None:
    """Journal the records and bring the tables up to them. Raises LocalProtocolError on a contradiction."""
    if not records:
        return
    last = connection.scalar(select(func.coalesce(func.max(tables.journal.c.seq), 0))) or 0
    rows = []
    for seq, record in enumerate(records, last + 1):
        round_id = getattr(record, "round_id", None)
        rows.append(
            {
                "seq": seq,
                "epoch": epoch,
                "at": now,
                "kind": encoding.kind_of(record),
                "generation": round_id.generation if round_id else None,
                "round": round_id.number if round_id else None,
                "body": encoding.encode_record(record),
            }
        )
    connection.execute(insert(tables.journal), rows)
    seq = last + 1
    for kind, group in groupby(records, type):
        run = list(group)
        _PROJECT[kind](connection, now, seq, run)
        seq += len(run)


def _checked_in(connection: Connection, _now: float, _seq: int, run: Sequence[CheckedIn]) -> None:
    statement = upsert(connection, tables.checkins)
    new = statement.excluded
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["device"],
            set_={name: new[name] for name in ("sequence", "expires_at", "samples", "codecs", "available")},
        ),
        [
            {
                "device": record.device,
                "sequence": record.sequence,
                "expires_at": record.expires_at,
                "samples": record.samples,
                "codecs": encoding.encode_names(record.codecs),
                "available": True,
            }
            for record in run
        ],
    )


def _round_opened(connection: Connection, now: float, seq: int, run: Sequence[RoundOpened]) -> None:
    for at, record in enumerate(run, seq):
        generation = connection.scalar(select(tables.epoch.c.generation))
        if record.round_id.generation != generation:
            raise LocalProtocolError(f"round {record.round_id} opened, but the generation is {generation}")
        ended = [phase.value for phase in Phase if not MOVES[phase]]
        if connection.scalar(
            select(func.count()).select_from(tables.rounds).where(tables.rounds.c.phase.not_in(ended))
        ):
            raise LocalProtocolError(f"round {record.round_id} opened while another one is open")
        row = {
            **_key(record.round_id),
            "phase": Phase.COLLECTING.value,
            "base_version": record.base_version,
            "opened_seq": at,
            "opened_at": now,
            "cohort_size": len(record.cohort),
        }
        connection.execute(insert(tables.rounds), row)
        if record.cohort:
            connection.execute(
                update(tables.checkins)
                .where(tables.checkins.c.device == bindparam("of"))
                .values(available=False),
                [{"of": device} for device in record.cohort],
            )
        _prune_check_ins(connection, at)


def _prune_check_ins(connection: Connection, opened_seq: int) -> None:
    """Recovery reads from the last opening on and takes tickets from ``checkins``: older check-ins can go."""
    journal, opened = tables.journal.c, tables.rounds.c.opened_seq
    # The opening before this one has pruned what came before it.
    pruned_to = connection.scalar(select(func.max(opened)).where(opened < opened_seq)) or 0
    check_in = journal.kind == encoding.KIND_NAMES[CheckedIn]
    old = delete(tables.journal).where(journal.seq > pruned_to, journal.seq < opened_seq, check_in)
    _add_counts(connection, {PRUNED: connection.execute(old).rowcount})


def _update_stored(connection: Connection, _now: float, _seq: int, run: Sequence[UpdateStored]) -> None:
    for round_id in {record.round_id for record in run}:
        phase = connection.scalar(select(tables.rounds.c.phase).where(_is(tables.rounds, round_id)))
        if phase != Phase.COLLECTING.value:
            raise LocalProtocolError(f"an update stored for round {round_id}, which is {phase or 'unknown'}")
    connection.execute(
        insert(tables.updates),
        [
            {
                **_key(record.round_id),
                "device": record.device,
                "digest": record.digest,
                "samples": record.samples,
            }
            for record in run
        ],
    )


def _round_frozen(connection: Connection, _now: float, _seq: int, run: Sequence[RoundFrozen]) -> None:
    updates = tables.updates
    for record in run:
        _move(connection, record.round_id, Phase.FROZEN, accepted=len(record.accepted))
        stored = connection.scalars(select(updates.c.device).where(_is(updates, record.round_id)))
        if sorted(stored) != sorted(record.accepted):
            raise LocalProtocolError(f"round {record.round_id} accepts other updates than are stored")


def _version_committed(
    connection: Connection, _now: float, _seq: int, run: Sequence[VersionCommitted]
) -> None:
    updates = tables.updates
    for record in run:
        last = connection.scalar(select(func.coalesce(func.max(tables.versions.c.version), 0)))
        if record.version != (last or 0) + 1:
            raise LocalProtocolError(f"version {record.version} does not follow {last}")
        _move(connection, record.round_id, Phase.AGGREGATED)
        connection.execute(
            insert(tables.versions),
            {"version": record.version, **_key(record.round_id), "model_digest": record.model_digest},
        )
        for device, reason in record.excluded:
            done = connection.execute(
                update(updates)
                .where(
                    _is(updates, record.round_id),
                    updates.c.device == device,
                    updates.c.outcome.is_(None),
                )
                .values(outcome=Outcome.EXCLUDED.value, reason=reason.name.lower())
            )
            if done.rowcount != 1:
                raise LocalProtocolError(
                    f"{device} is excluded from {record.round_id}, which did not accept it"
                )
        connection.execute(
            update(updates)
            .where(_is(updates, record.round_id), updates.c.outcome.is_(None))
            .values(outcome=Outcome.AGGREGATED.value, version=record.version)
        )


def _round_published(connection: Connection, _now: float, _seq: int, run: Sequence[RoundPublished]) -> None:
    for record in run:
        _move(connection, record.round_id, Phase.PUBLISHED, closed_at=record.at)


def _round_aborted(connection: Connection, _now: float, _seq: int, run: Sequence[RoundAborted]) -> None:
    for record in run:
        _move(connection, record.round_id, Phase.ABORTED, closed_at=record.at, reason=record.reason)
        connection.execute(
            update(tables.updates)
            .where(_is(tables.updates, record.round_id))
            .values(outcome=Outcome.ABORTED.value)
        )


_PROJECT: Mapping[type[Any], Callable[[Connection, float, int, Sequence[Any]], None]] = {
    CheckedIn: _checked_in,
    RoundOpened: _round_opened,
    UpdateStored: _update_stored,
    RoundFrozen: _round_frozen,
    VersionCommitted: _version_committed,
    RoundPublished: _round_published,
    RoundAborted: _round_aborted,
}


def _move(connection: Connection, round_id: RoundId, to: Phase, **values: object) -> None:
    allowed = [phase.value for phase, successors in MOVES.items() if to in successors]
    done = connection.execute(
        update(tables.rounds)
        .where(_is(tables.rounds, round_id), tables.rounds.c.phase.in_(allowed))
        .values(phase=to.value, **values)
    )
    if done.rowcount != 1:
        raise LocalProtocolError(f"round {round_id} cannot become {to.value} now")


def _is(table: Table, round_id: RoundId) -> Any:
    return and_(table.c.generation == round_id.generation, table.c.round == round_id.number)


def _key(round_id: RoundId) -> dict[str, int]:
    return {"generation": round_id.generation, "round": round_id.number}


# ---- the other rows ---------------------------------------------------------------------------------


def write_rows(connection: Connection, now: float, batch: Batch) -> None:
    """Everything of a batch but its records."""
    _write_devices(connection, now, batch.devices)
    _write_pieces(connection, batch.pieces)
    _write_telemetry(connection, now, batch.telemetry)
    _add_counts(connection, {counter_name(what): more for what, more in batch.counts.items()})
    for round_id in batch.forget_pieces:
        connection.execute(delete(tables.pieces).where(_is(tables.pieces, round_id)))


def _write_devices(connection: Connection, now: float, seen: Sequence[DeviceSeen]) -> None:
    if not seen:
        return
    statement = upsert(connection, tables.devices)
    new, old = statement.excluded, tables.devices.c
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["device"],
            set_={
                "signing_key": new.signing_key,
                "certificate": new.certificate,
                "last_sequence": case(
                    # A new key counts its own messages; under the old one a sequence is a replay for ever.
                    (
                        or_(new.signing_key != old.signing_key, new.last_sequence > old.last_sequence),
                        new.last_sequence,
                    ),
                    else_=old.last_sequence,
                ),
                "last_seen": new.last_seen,
            },
        ),
        [
            {
                "device": row.device,
                "signing_key": row.signing_key,
                "certificate": row.certificate,
                "last_sequence": row.sequence,
                "first_seen": now,
                "last_seen": now,
            }
            for row in seen
        ],
    )


def _write_pieces(connection: Connection, pieces: Sequence[Piece]) -> None:
    if not pieces:
        return
    # The last number of pieces of an update is the one that holds: what was said with another is refused by now.
    counts = {(piece.round_id, piece.device, piece.digest): piece.count for piece in pieces}
    table = tables.pieces.c
    connection.execute(
        delete(tables.pieces).where(
            table.generation == bindparam("of_generation"),
            table.round == bindparam("of_round"),
            table.device == bindparam("of_device"),
            table.digest == bindparam("of_digest"),
            table.piece_count != bindparam("of_count"),
        ),
        [
            {
                "of_generation": round_id.generation,
                "of_round": round_id.number,
                "of_device": device,
                "of_digest": digest,
                "of_count": count,
            }
            for (round_id, device, digest), count in counts.items()
        ],
    )
    statement = upsert(connection, tables.pieces)
    new = statement.excluded
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["generation", "round", "device", "digest", "piece"],
            set_={name: new[name] for name in ("piece_count", "segment", "offset", "length")},
        ),
        [
            {
                **_key(piece.round_id),
                "device": piece.device,
                "digest": piece.digest,
                "piece": piece.index,
                "piece_count": piece.count,
                "segment": piece.position.segment,
                "offset": piece.position.offset,
                "length": piece.position.length,
            }
            for piece in pieces
            if piece.count == counts[piece.round_id, piece.device, piece.digest]
        ],
    )


def _write_telemetry(
    connection: Connection, now: float, reports: Sequence[tuple[DeviceId, Telemetry]]
) -> None:
    for device, report in reports:
        row = connection.execute(
            select(tables.telemetry).where(tables.telemetry.c.device == device)
        ).one_or_none()
        old: Mapping[str, Any] = dict(row._mapping) if row else {}
        values = {
            **_totals(old, encoding.decode_telemetry(old["latest"]) if row else Telemetry(), report),
            "at": now,
            "latest": encoding.encode_telemetry(report),
        }
        statement = upsert(connection, tables.telemetry).values(device=device, **values)
        connection.execute(statement.on_conflict_do_update(index_elements=["device"], set_=values))


def _totals(old: Mapping[str, Any], last: Telemetry, report: Telemetry) -> dict[str, int | float]:
    # A device may report anything: the totals saturate instead of overflowing their columns.
    def total(name: str, more: int) -> int:
        before: int = old.get(name, 0)
        return min(before + more, tables.MAX_INT64)

    def since(now_bytes: int, last_bytes: int) -> int:
        return now_bytes - last_bytes if now_bytes >= last_bytes else now_bytes

    peak = max(old.get("peak_memory_bytes", 0), report.peak_memory_bytes)
    return {
        "reports": total("reports", 1),
        "train_s": min(old.get("train_s", 0.0) + max(report.train_s, 0.0), _MAX_SECONDS),
        "steps": total("steps", report.steps),
        "samples": total("samples", report.samples),
        "peak_memory_bytes": min(peak, tables.MAX_INT64),
        "bytes_up": total("bytes_up", since(report.bytes_up, last.bytes_up)),
        "bytes_down": total("bytes_down", since(report.bytes_down, last.bytes_down)),
    }


_REJECT_PREFIX = "reject:"


def counter_name(what: Reject | Count) -> str:
    """The row of a counter; a refusal is kept by its code, which is for ever."""
    return f"{_REJECT_PREFIX}{what.code}" if isinstance(what, Reject) else what.value


def _add_counts(connection: Connection, counts: Mapping[str, int]) -> None:
    rows = [{"name": name, "value": more} for name, more in counts.items() if more]
    if rows:
        statement = upsert(connection, tables.counters)
        total = tables.counters.c.value + statement.excluded.value
        connection.execute(
            statement.on_conflict_do_update(index_elements=["name"], set_={"value": total}), rows
        )
