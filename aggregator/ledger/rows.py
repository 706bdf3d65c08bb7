"""What a batch writes beside its records: devices, pieces, telemetry, counters, answers to orders, evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Table, and_, bindparam, case, delete, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from aggregator.ledger import encoding, tables
from aggregator.ledger.values import Batch, Count, DeviceSeen, Evaluated, OrderSettled, Piece
from edge_runtime.protocol.errors import LocalProtocolError
from edge_runtime.protocol.ids import DeviceId, RoundId
from edge_runtime.protocol.messages import Telemetry
from edge_runtime.protocol.rejects import Reject

PRUNED = "journal-pruned"  # the counter of records that left the journal
_MAX_SECONDS = 1e15

# Two dialects, one API; sqlite's type stands for both.
_INSERT: Mapping[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}


def upsert(connection: Connection, table: Table) -> sqlite.Insert:
    """An INSERT that can be given ON CONFLICT."""
    statement: sqlite.Insert = _INSERT[connection.dialect.name](table)
    return statement


def of_round(table: Table, round_id: RoundId) -> Any:
    return and_(table.c.generation == round_id.generation, table.c.round == round_id.number)


def round_key(round_id: RoundId) -> dict[str, int]:
    return {"generation": round_id.generation, "round": round_id.number}


def write_rows(connection: Connection, now: float, batch: Batch) -> None:
    """Everything of a batch but its records."""
    _write_devices(connection, now, batch.devices)
    _write_pieces(connection, batch.pieces)
    _write_telemetry(connection, now, batch.telemetry)
    add_counts(connection, {counter_name(what): more for what, more in batch.counts.items()})
    _settle_orders(connection, now, batch.orders)
    _write_evaluations(connection, now, batch.evaluations)
    for round_id in batch.forget_pieces:
        connection.execute(delete(tables.pieces).where(of_round(tables.pieces, round_id)))


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


def _settle_orders(connection: Connection, now: float, settled: Sequence[OrderSettled]) -> None:
    orders = tables.orders
    for order in settled:
        done = connection.execute(
            update(orders)
            .where(orders.c.id == order.id, orders.c.settled_at.is_(None))
            .values(settled_at=now, obeyed=order.obeyed, answer=order.answer)
        )
        if done.rowcount != 1:
            raise LocalProtocolError(f"order {order.id} was settled before, or was never given")


def _write_evaluations(connection: Connection, now: float, evaluated: Sequence[Evaluated]) -> None:
    for row in evaluated:
        values = {"at": now, "samples": row.samples, "metrics": encoding.encode_metrics(row.metrics)}
        statement = upsert(connection, tables.evaluations).values(version=row.version, **values)
        connection.execute(statement.on_conflict_do_update(index_elements=["version"], set_=values))


def set_standing(connection: Connection, **values: object) -> None:
    """Columns of the one row of ``standing``."""
    connection.execute(update(tables.standing).values(**values))


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
                **round_key(piece.round_id),
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


def add_counts(connection: Connection, counts: Mapping[str, int]) -> None:
    rows = [{"name": name, "value": more} for name, more in counts.items() if more]
    if rows:
        statement = upsert(connection, tables.counters)
        total = tables.counters.c.value + statement.excluded.value
        connection.execute(
            statement.on_conflict_do_update(index_elements=["name"], set_={"value": total}), rows
        )
