"""What must hold of a ledger at any moment, whatever died: for tests, the demo, the soak and operators."""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import Connection, func, select

from aggregator.core.records import RoundFrozen, UpdateStored, VersionCommitted, VersionRestored
from aggregator.core.state import State, fold
from aggregator.core.step import barred
from aggregator.ledger import queries, recovery, tables
from aggregator.ledger.ledger import Ledger
from aggregator.ledger.values import RoundRow, UpdateRow, VersionRow
from edge_runtime.protocol.errors import LocalProtocolError
from edge_runtime.protocol.ids import DeviceId, RoundId
from edge_runtime.protocol.rounds import MOVES, Outcome, Phase

_ALL = 1 << 31


def check_invariants(ledger: Ledger) -> list[str]:
    """Every violation in words; empty if all is well. Reads the whole ledger, in one consistent view."""
    with ledger.reading() as connection:
        return [
            *_journal_has_no_gap(connection),
            *_state_is_the_fold(connection),
            *_versions_follow_one_another(connection),
            *_every_update_has_its_outcome(connection),
            *(
                f"{device}'s update of {round_id} has pieces missing from the index"
                for round_id, device in queries.pieces_without_whole_update(connection)
            ),
        ]


def _journal_has_no_gap(connection: Connection) -> Iterator[str]:
    seq, epoch = tables.journal.c.seq, tables.journal.c.epoch
    count, last = connection.execute(select(func.count(), func.coalesce(func.max(seq), 0))).one()
    if count + (pruned := queries.pruned(connection)) != last:
        yield f"the journal has {count} records, {pruned} were pruned, and it ends at {last}"
    epochs = [row.epoch for row in connection.execute(select(epoch).order_by(seq))]
    if epochs != sorted(epochs):
        yield "a record of an earlier epoch follows one of a later: a fenced aggregator has committed"


def _state_is_the_fold(connection: Connection) -> Iterator[str]:
    try:
        recovered = recovery.load_state(connection)
        folded = fold(State(generation=recovered.generation), recovery.read_journal(connection))
    except LocalProtocolError as error:
        yield f"the journal contradicts itself: {error}"
        return
    folded.generation = recovered.generation
    if folded.round is not None:
        # Check-ins from before the last round are pruned: of those tickets only this much can be known, that
        # none is of a device in its cohort, or of one that may not take part.
        folded.tickets = {
            **{
                d: t
                for d, t in recovered.tickets.items()
                if d not in folded.round.cohort and barred(folded, d, t.epoch) is None
            },
            **folded.tickets,
        }
    if recovered != folded:
        yield "the recovered state is not the fold of the journal"


def _versions_follow_one_another(connection: Connection) -> Iterator[str]:
    versions = queries.versions(connection)
    rounds = {row.round_id: row for row in queries.rounds(connection, _ALL)}
    if [row.version for row in versions] != list(range(1, len(versions) + 1)):
        yield f"versions have a gap: {[row.version for row in versions]}"
    digests = {version.version: version.model_digest for version in versions}
    for version in versions:
        if version.round_id is not None:
            yield from _check_version(version, rounds[version.round_id])
        elif version.restored_from and digests.get(version.restored_from) != version.model_digest:
            yield f"version {version.version} does not have the parameters of version {version.restored_from}"
    journalled = {
        record.version: record.model_digest
        for record in recovery.read_journal(connection, check_ins=False)
        if isinstance(record, VersionCommitted | VersionRestored)
    }
    if digests != journalled:
        yield "the versions are not those of the journal"
    with_version = {version.round_id for version in versions}
    for round_id, row in rounds.items():
        if (row.phase in (Phase.AGGREGATED, Phase.PUBLISHED)) != (round_id in with_version):
            number = "a" if round_id in with_version else "no"
            yield f"round {round_id} is {row.phase.value} and has {number} version"
        if MOVES[row.phase] and round_id != max(rounds):
            yield f"round {round_id} is still {row.phase.value}, but a later one was opened"


def _check_version(version: VersionRow, row: RoundRow) -> Iterator[str]:
    if version.version != row.base_version + 1:
        yield f"version {version.version} was made from {row.base_version}"


def _every_update_has_its_outcome(connection: Connection) -> Iterator[str]:
    versions = {row.round_id: row.version for row in queries.versions(connection)}
    rounds = queries.rounds(connection, _ALL)
    journalled: list[tuple[RoundId, DeviceId]] = []
    accepted: dict[RoundId, tuple[DeviceId, ...]] = {}
    for record in recovery.read_journal(connection, check_ins=False):
        if isinstance(record, UpdateStored):
            journalled.append((record.round_id, record.device))
        elif isinstance(record, RoundFrozen):
            accepted[record.round_id] = record.accepted
    for row in rounds:
        updates = queries.updates(connection, row.round_id)
        for update in updates:
            yield from _check_outcome(update, row.phase, versions.get(row.round_id))
            if update.outcome is Outcome.AGGREGATED and update.device not in accepted.get(row.round_id, ()):
                yield f"{update.device}'s update of {row.round_id} is aggregated and was not accepted"
        if row.accepted is not None and row.accepted > len(updates):
            yield f"round {row.round_id} accepted {row.accepted} of {len(updates)} stored updates"
    if len(journalled) != len(set(journalled)) or len(journalled) != sum(row.stored for row in rounds):
        yield "the stored updates are not those of the journal, each once"


def _check_outcome(update: UpdateRow, phase: Phase, version: int | None) -> Iterator[str]:
    name = f"{update.device}'s update of {update.round_id}"
    match phase:
        case Phase.COLLECTING | Phase.FROZEN:
            right = update.outcome is None
        case Phase.ABORTED:
            right = update.outcome is Outcome.ABORTED
        case Phase.AGGREGATED | Phase.PUBLISHED:
            right = update.outcome in (Outcome.AGGREGATED, Outcome.EXCLUDED)
    if not right:
        outcome = update.outcome.value if update.outcome else "no outcome"
        yield f"{name} has {outcome} in a round that is {phase.value}"
    if update.outcome is Outcome.AGGREGATED and update.version != version:
        yield f"{name} is in version {update.version}, its round made {version}"
