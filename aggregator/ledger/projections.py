"""What a record does to the tables, inside the transaction of its commit.

Every move of a round is one guarded row update, so a commit that contradicts the ledger changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from sqlalchemy import Connection, bindparam, delete, func, insert, select, update

from aggregator.core.records import (
    CheckedIn,
    DrainBegun,
    Drained,
    Evicted,
    Paused,
    Readmitted,
    Record,
    Resumed,
    RevocationsTaken,
    RoundAborted,
    RoundFrozen,
    RoundOpened,
    RoundPublished,
    UpdateStored,
    VersionCommitted,
    VersionRestored,
)
from aggregator.ledger import encoding, tables
from aggregator.ledger.rows import PRUNED, add_counts, of_round, round_key, set_standing, upsert
from edge_runtime.protocol.errors import LocalProtocolError
from edge_runtime.protocol.ids import RoundId
from edge_runtime.protocol.rounds import MOVES, Outcome, Phase

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
            set_={
                name: new[name]
                for name in ("sequence", "expires_at", "samples", "codecs", "epoch", "available")
            },
        ),
        [
            {
                "device": record.device,
                "sequence": record.sequence,
                "expires_at": record.expires_at,
                "samples": record.samples,
                "codecs": encoding.encode_names(record.codecs),
                "epoch": record.epoch,
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
            **round_key(record.round_id),
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
    add_counts(connection, {PRUNED: connection.execute(old).rowcount})


def _update_stored(connection: Connection, _now: float, _seq: int, run: Sequence[UpdateStored]) -> None:
    for round_id in {record.round_id for record in run}:
        phase = connection.scalar(select(tables.rounds.c.phase).where(of_round(tables.rounds, round_id)))
        if phase != Phase.COLLECTING.value:
            raise LocalProtocolError(f"an update stored for round {round_id}, which is {phase or 'unknown'}")
    connection.execute(
        insert(tables.updates),
        [
            {
                **round_key(record.round_id),
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
        stored = set(connection.scalars(select(updates.c.device).where(of_round(updates, record.round_id))))
        evicted = connection.scalars(
            select(tables.exclusions.c.device).where(tables.exclusions.c.evicted_at.is_not(None))
        )
        if stored - set(evicted) != set(record.accepted):
            raise LocalProtocolError(f"round {record.round_id} accepts other updates than are stored")


def _version_committed(
    connection: Connection, _now: float, _seq: int, run: Sequence[VersionCommitted]
) -> None:
    updates = tables.updates
    for record in run:
        _follows(connection, record.version)
        _move(connection, record.round_id, Phase.AGGREGATED)
        connection.execute(
            insert(tables.versions),
            {"version": record.version, **round_key(record.round_id), "model_digest": record.model_digest},
        )
        for device, reason in record.excluded:
            done = connection.execute(
                update(updates)
                .where(
                    of_round(updates, record.round_id),
                    updates.c.device == device,
                    updates.c.outcome.is_(None),
                )
                .values(outcome=Outcome.EXCLUDED.value, reason=reason.name.lower())
            )
            if done.rowcount != 1:
                raise LocalProtocolError(
                    f"{device} is excluded from {record.round_id}, which did not store its update"
                )
        connection.execute(
            update(updates)
            .where(of_round(updates, record.round_id), updates.c.outcome.is_(None))
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
            .where(of_round(tables.updates, record.round_id))
            .values(outcome=Outcome.ABORTED.value)
        )


def _version_restored(connection: Connection, _now: float, _seq: int, run: Sequence[VersionRestored]) -> None:
    versions = tables.versions
    for record in run:
        _follows(connection, record.version)
        source = connection.scalar(select(versions.c.model_digest).where(versions.c.version == record.of))
        # Version 0 is the artifact's and has no row.
        if not 0 <= record.of < record.version - 1 or (record.of > 0 and source != record.model_digest):
            raise LocalProtocolError(f"version {record.version} cannot be version {record.of} again")
        connection.execute(
            insert(versions),
            {
                "version": record.version,
                "model_digest": record.model_digest,
                "restored_from": record.of,
            },
        )


def _follows(connection: Connection, version: int) -> None:
    last = connection.scalar(select(func.coalesce(func.max(tables.versions.c.version), 0)))
    if version != (last or 0) + 1:
        raise LocalProtocolError(f"version {version} does not follow {last}")


def _stand(**values: object) -> Callable[[Connection, float, int, Sequence[Record]], None]:
    return lambda connection, _now, _seq, _run: set_standing(connection, **values)


def _evicted(connection: Connection, _now: float, _seq: int, run: Sequence[Evicted]) -> None:
    statement = upsert(connection, tables.exclusions)
    new = {"evicted_at": statement.excluded.evicted_at}
    connection.execute(
        statement.on_conflict_do_update(index_elements=["device"], set_=new),
        [{"device": record.device, "evicted_at": record.at} for record in run],
    )
    for record in run:
        _withdraw_tickets(connection, tables.checkins.c.device == record.device)


def _readmitted(connection: Connection, _now: float, _seq: int, run: Sequence[Readmitted]) -> None:
    devices = [record.device for record in run]
    connection.execute(
        update(tables.exclusions).where(tables.exclusions.c.device.in_(devices)).values(evicted_at=None)
    )


def _revocations_taken(
    connection: Connection, _now: float, _seq: int, run: Sequence[RevocationsTaken]
) -> None:
    for record in run:
        taken = connection.scalar(select(tables.standing.c.revocations)) or 0
        if record.number <= taken:
            raise LocalProtocolError(f"list {record.number} of revocations is not after {taken}")
        set_standing(connection, revocations=record.number)
        connection.execute(update(tables.exclusions).values(revoked_epoch=None))
        if not record.revoked:
            continue
        statement = upsert(connection, tables.exclusions)
        new = {"revoked_epoch": statement.excluded.revoked_epoch}
        connection.execute(
            statement.on_conflict_do_update(index_elements=["device"], set_=new),
            [{"device": device, "revoked_epoch": epoch} for device, epoch in record.revoked],
        )
        void = select(tables.exclusions.c.device).where(
            tables.exclusions.c.device == tables.checkins.c.device,
            tables.exclusions.c.revoked_epoch >= tables.checkins.c.epoch,
        )
        _withdraw_tickets(connection, void.exists())


def _withdraw_tickets(connection: Connection, of: Any) -> None:
    connection.execute(update(tables.checkins).where(of).values(available=False))


_PROJECT: Mapping[type[Any], Callable[[Connection, float, int, Sequence[Any]], None]] = {
    CheckedIn: _checked_in,
    RoundOpened: _round_opened,
    UpdateStored: _update_stored,
    RoundFrozen: _round_frozen,
    VersionCommitted: _version_committed,
    RoundPublished: _round_published,
    RoundAborted: _round_aborted,
    VersionRestored: _version_restored,
    Paused: _stand(paused=True),
    DrainBegun: _stand(draining=True),
    Drained: _stand(draining=False),
    Resumed: _stand(paused=False, draining=False),
    Evicted: _evicted,
    Readmitted: _readmitted,
    RevocationsTaken: _revocations_taken,
}


def _move(connection: Connection, round_id: RoundId, to: Phase, **values: object) -> None:
    allowed = [phase.value for phase, successors in MOVES.items() if to in successors]
    done = connection.execute(
        update(tables.rounds)
        .where(of_round(tables.rounds, round_id), tables.rounds.c.phase.in_(allowed))
        .values(phase=to.value, **values)
    )
    if done.rowcount != 1:
        raise LocalProtocolError(f"round {round_id} cannot become {to.value} now")
