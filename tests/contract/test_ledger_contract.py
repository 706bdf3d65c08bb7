"""What every database behind the ledger must keep. A new one is one more parameter of ``url``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy

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
from aggregator.core.state import State, fold
from aggregator.inbox.segments import Position
from aggregator.ledger import tables
from aggregator.ledger.database import sqlite_url
from aggregator.ledger.errors import FencedError, LedgerError, LedgerInUseError
from aggregator.ledger.invariants import check_invariants
from aggregator.ledger.ledger import Ledger
from aggregator.ledger.values import (
    Batch,
    Count,
    DeviceSeen,
    Evaluated,
    EvaluationRow,
    OrderKind,
    OrderRow,
    OrderSettled,
    Piece,
    VersionRow,
)
from edge_runtime.protocol.errors import LocalProtocolError
from edge_runtime.protocol.ids import DeviceId, FederationId, RoundId, sha256
from edge_runtime.protocol.messages import Telemetry
from edge_runtime.protocol.rejects import Reject
from edge_runtime.protocol.rounds import Outcome, Phase
from tests.support.postgres import schema_of_its_own

FEDERATION = FederationId("fed")
A, B, C = DeviceId("a"), DeviceId("b"), DeviceId("c")
ONE, TWO = RoundId(1, 1), RoundId(1, 2)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield sqlite_url(tmp_path / "ledger.db")
    else:
        with schema_of_its_own(request.getfixturevalue("postgres"), "fleetgrad_test") as own:
            yield own


@pytest.fixture
def ledger(url: str) -> Iterator[Ledger]:
    ledger = Ledger.open(url, federation=FEDERATION, clock=lambda: 50.0)
    ledger.claim("here")
    yield ledger
    ledger.close()


def check_in(device: DeviceId, sequence: int = 1) -> CheckedIn:
    return CheckedIn(
        device=device, sequence=sequence, expires_at=99.5, samples=10, codecs=("int8", "float32")
    )


def opened(round_id: RoundId = ONE, base: int = 0, cohort: tuple[DeviceId, ...] = (A, B, C)) -> RoundOpened:
    manifest = bytes(range(256))
    return RoundOpened(
        round_id=round_id,
        base_version=base,
        cohort=cohort,
        deadline=80.25,
        manifest=manifest,
        manifest_digest=sha256(manifest),
    )


def stored(device: DeviceId, round_id: RoundId = ONE) -> UpdateStored:
    return UpdateStored(round_id=round_id, device=device, digest=sha256(device.encode()), samples=7)


def frozen(*devices: DeviceId, round_id: RoundId = ONE) -> RoundFrozen:
    return RoundFrozen(round_id=round_id, accepted=devices)


def committed(
    version: int = 1, round_id: RoundId = ONE, excluded: tuple[tuple[DeviceId, Reject], ...] = ()
) -> VersionCommitted:
    return VersionCommitted(
        round_id=round_id, version=version, model_digest=sha256(b"model"), excluded=excluded
    )


def restored(version: int, of: int, model: bytes = b"model") -> VersionRestored:
    return VersionRestored(version=version, of=of, model_digest=sha256(model))


def commit(ledger: Ledger, *records: Record) -> None:
    ledger.commit(Batch(records=records))


def outcome(ledger: Ledger, device: DeviceId, round_id: RoundId = ONE) -> tuple[object, object, object]:
    row = ledger.find_update(round_id, device)
    assert row is not None
    return row.outcome, row.version, row.reason


# ---- rounds -----------------------------------------------------------------------------------------


def test_the_journal_gives_back_every_kind_of_record_as_it_was(ledger: Ledger) -> None:
    records: list[Record] = [
        opened(),
        stored(A),
        stored(B),
        frozen(A, B),
        committed(excluded=((B, Reject.BAD_SEAL),)),
        RoundPublished(round_id=ONE, at=60.5),
        opened(TWO, base=1),
        check_in(A, (1 << 64) - 1),
        RoundAborted(round_id=TWO, reason="too few: 0", at=70.0),
        VersionRestored(version=2, of=0, model_digest=sha256(b"initial")),
        Paused(at=71.0),
        DrainBegun(at=72.0),
        Drained(at=73.0),
        Resumed(at=74.0),
        Evicted(device=A, at=75.0),
        Readmitted(device=A),
        RevocationsTaken(number=(1 << 64) - 1, revoked=((A, (1 << 32) - 1), (B, 1))),
    ]
    commit(ledger, *records[:3])
    commit(ledger, *records[3:])
    assert list(ledger.journal()) == records
    assert check_invariants(ledger) == []


def test_a_committed_version_aggregates_the_accepted_and_excludes_the_unreadable(ledger: Ledger) -> None:
    commit(ledger, opened(), stored(A), stored(B), frozen(A, B))
    assert outcome(ledger, A) == (None, None, None)
    commit(ledger, committed(excluded=((B, Reject.BAD_SEAL),)))
    assert outcome(ledger, A) == (Outcome.AGGREGATED, 1, None)
    assert outcome(ledger, B) == (Outcome.EXCLUDED, None, "bad_seal")
    (version,) = ledger.versions()
    assert (version.version, version.round_id, version.model_digest) == (1, ONE, sha256(b"model"))
    assert check_invariants(ledger) == []


def test_an_aborted_round_aborts_its_updates_and_no_others(ledger: Ledger) -> None:
    commit(ledger, opened(), stored(A), frozen(A), committed(), RoundPublished(round_id=ONE, at=60.0))
    commit(ledger, opened(TWO, base=1), stored(A, TWO), RoundAborted(round_id=TWO, reason="late", at=70.0))
    assert outcome(ledger, A) == (Outcome.AGGREGATED, 1, None)
    assert outcome(ledger, A, TWO) == (Outcome.ABORTED, None, None)
    last, first = ledger.rounds(10)
    assert (last.phase, last.reason, last.closed_at, last.accepted) == (Phase.ABORTED, "late", 70.0, None)
    assert (first.phase, first.stored, first.accepted, first.cohort_size) == (Phase.PUBLISHED, 1, 1, 3)
    assert ledger.rounds(1) == [last]
    assert check_invariants(ledger) == []


@pytest.mark.parametrize(
    "records",
    [
        pytest.param([stored(A)], id="an update stored twice"),
        pytest.param([stored(A, TWO)], id="an update of an unknown round"),
        pytest.param([opened(TWO)], id="a round beside an open one"),
        pytest.param([frozen(A, B, C)], id="an accepted update that is not stored"),
        pytest.param([frozen(A)], id="a stored update that is not accepted"),
        pytest.param([committed()], id="a version of a round that is not frozen"),
        pytest.param([frozen(A, B), stored(C)], id="an update after the freeze"),
        pytest.param([frozen(A, B), frozen(A, B)], id="a round frozen twice"),
        pytest.param([frozen(A, B), committed(version=2)], id="a version that skips one"),
        pytest.param(
            [frozen(A, B), committed(excluded=((C, Reject.BAD_SEAL),))], id="excluded, not accepted"
        ),
        pytest.param(
            [RoundAborted(round_id=ONE, reason="", at=1.0), opened(RoundId(2, 2))], id="another generation"
        ),
        pytest.param([restored(2, 0)], id="a restored version that skips one"),
        pytest.param([restored(1, 1)], id="a version restored from itself"),
        pytest.param(
            [frozen(A, B), committed(), restored(2, 0), restored(3, 1, b"other")],
            id="a restored version with other parameters",
        ),
        pytest.param([Evicted(device=A, at=1.0), frozen(A, B)], id="an evicted device's update accepted"),
        pytest.param(
            [RevocationsTaken(number=2, revoked=()), RevocationsTaken(number=2, revoked=())],
            id="a list of revocations taken twice",
        ),
    ],
)
def test_a_batch_that_contradicts_the_ledger_changes_nothing(ledger: Ledger, records: list[Record]) -> None:
    commit(ledger, opened(), stored(A), stored(B))
    state, journal = ledger.load_state(), list(ledger.journal())
    with pytest.raises(LocalProtocolError):
        ledger.commit(Batch(records=(check_in(C), *records), counts={Count.LATE: 1}))
    assert ledger.load_state() == state
    assert list(ledger.journal()) == journal
    assert ledger.totals().counts[Count.LATE] == 0
    assert check_invariants(ledger) == []


# ---- recovery ---------------------------------------------------------------------------------------


def test_recovery_equals_the_fold_at_every_point_of_a_run(ledger: Ledger) -> None:
    run: list[Record] = [
        check_in(A),
        check_in(B),
        check_in(C),
        opened(cohort=(A, B)),
        check_in(A, 2),
        stored(A),
        RoundAborted(round_id=ONE, reason="", at=55.0),
        opened(TWO, cohort=(A, C)),
        stored(C, TWO),
        check_in(B, 3),
        frozen(C, round_id=TWO),
        committed(round_id=TWO),
        RoundPublished(round_id=TWO, at=65.0),
        check_in(C, 4),
        Evicted(device=B, at=66.0),
        restored(2, 0),
        Paused(at=67.0),
        restored(3, 1),
        RevocationsTaken(number=4, revoked=((C, 1), (DeviceId("d"), 9))),
        replace(check_in(C, 5), epoch=2),
        Resumed(at=68.0),
        Readmitted(device=B),
        check_in(B, 4),
        RevocationsTaken(number=5, revoked=((C, 1),)),
        opened(RoundId(1, 3), base=3, cohort=(B,)),
        stored(B, RoundId(1, 3)),
        Evicted(device=B, at=69.0),
        DrainBegun(at=70.0),
        RoundAborted(round_id=RoundId(1, 3), reason="", at=71.0),
        restored(4, 2),
        Drained(at=72.0),
    ]
    for n, record in enumerate(run, 1):
        commit(ledger, record)
        assert ledger.load_state() == fold(State(), run[:n])
        assert check_invariants(ledger) == []


def test_check_ins_leave_the_journal_when_a_later_round_opens_and_their_tickets_stay(
    url: str, ledger: Ledger
) -> None:
    first = [check_in(A), check_in(B), opened(cohort=(A,)), check_in(A, 2)]
    end = RoundAborted(round_id=ONE, reason="", at=55.0)
    commit(ledger, *first, end)
    assert list(ledger.journal()) == [opened(cohort=(A,)), check_in(A, 2), end]
    commit(ledger, check_in(C))
    second = [opened(TWO, cohort=(C,)), check_in(C, 2), stored(C, TWO)]
    commit(ledger, *second)
    assert list(ledger.journal()) == [opened(cohort=(A,)), end, *second]
    assert ledger.load_state().tickets == {A: check_in(A, 2), B: check_in(B), C: check_in(C, 2)}
    assert check_invariants(ledger) == []
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:  # one that is not pruned yet, so C's ticket has no origin
        connection.execute(sqlalchemy.delete(tables.journal).where(tables.journal.c.kind == "checked-in"))
    engine.dispose()
    problems = check_invariants(ledger)
    assert any("were pruned" in text for text in problems)
    assert any("not the fold" in text for text in problems)


def test_an_empty_ledger_recovers_to_the_first_state(ledger: Ledger) -> None:
    assert ledger.load_state() == State()


# ---- versions restored, devices barred ------------------------------------------------------------


def test_a_restored_version_has_no_round_and_the_digest_of_its_source(ledger: Ledger) -> None:
    commit(ledger, opened(), stored(A), frozen(A), committed(), RoundPublished(round_id=ONE, at=60.0))
    commit(ledger, restored(2, 0, b"initial"), restored(3, 1))
    second, third = ledger.version(2), ledger.version(3)
    assert second == VersionRow(version=2, round_id=None, model_digest=sha256(b"initial"), restored_from=0)
    assert third is not None
    assert (third.restored_from, third.model_digest) == (1, sha256(b"model"))
    assert ledger.totals().version == 3
    commit(ledger, opened(TWO, base=3), stored(A, TWO), frozen(A, round_id=TWO), committed(4, TWO))
    assert check_invariants(ledger) == []


def test_an_evicted_devices_stored_update_is_left_out_of_the_freeze_and_excluded(ledger: Ledger) -> None:
    commit(ledger, opened(), stored(A), stored(B), Evicted(device=B, at=55.0), frozen(A))
    assert [row.accepted for row in ledger.rounds(1)] == [1]
    commit(ledger, committed(excluded=((B, Reject.EVICTED),)))
    assert outcome(ledger, A) == (Outcome.AGGREGATED, 1, None)
    assert outcome(ledger, B) == (Outcome.EXCLUDED, None, "evicted")
    assert check_invariants(ledger) == []


def test_who_is_barred_has_no_ticket_and_a_newer_certificate_brings_it_back(ledger: Ledger) -> None:
    commit(ledger, check_in(A), check_in(B), replace(check_in(C), epoch=2))
    commit(ledger, Evicted(device=A, at=55.0), RevocationsTaken(number=7, revoked=((B, 1), (C, 1))))
    assert ledger.load_state().tickets.keys() == {C}
    standing = ledger.standing()
    assert (standing.evicted, standing.revocations, standing.revoked) == ({A: 55.0}, 7, {B: 1, C: 1})
    commit(ledger, Readmitted(device=A), check_in(A, 2), RevocationsTaken(number=8, revoked=()))
    assert ledger.load_state().tickets.keys() == {A, C}
    assert (ledger.standing().evicted, ledger.standing().revoked) == ({}, {})
    assert check_invariants(ledger) == []


# ---- orders and evaluations -------------------------------------------------------------------------


def test_an_order_is_given_beside_the_serving_aggregator_and_settled_once(url: str, ledger: Ledger) -> None:
    operator = Ledger.open(url, federation=FEDERATION, clock=lambda: 40.0)
    first = operator.give_order(OrderKind.EVICT, "a", "mia@host")
    second = operator.give_order(OrderKind.PAUSE, "", "mia@host")
    assert [row.id for row in ledger.waiting_orders()] == [first, second]
    ledger.commit(
        Batch(
            records=(Evicted(device=A, at=50.0),),
            orders=(OrderSettled(id=first, obeyed=True, answer="done"),),
        )
    )
    assert [row.id for row in ledger.waiting_orders()] == [second]
    assert operator.order(first) == OrderRow(
        id=first,
        at=40.0,
        kind="evict",
        argument="a",
        by="mia@host",
        settled_at=50.0,
        obeyed=True,
        answer="done",
    )
    again = Batch(records=(Paused(at=1.0),), orders=(OrderSettled(id=first, obeyed=False, answer="again"),))
    with pytest.raises(LocalProtocolError, match="settled before"):
        ledger.commit(again)
    assert ledger.standing().paused is False
    assert [row.id for row in ledger.orders(1)] == [second]
    assert operator.order(second + 1) is None
    operator.close()


def test_a_claim_is_seen_by_others_until_it_is_given_up(url: str, ledger: Ledger) -> None:
    other = Ledger.open(url, federation=FEDERATION, read_only=True)
    assert other.is_claimed()
    ledger.release()
    assert not other.is_claimed()
    other.close()


def test_an_evaluation_replaces_an_earlier_one_of_its_version_and_may_lack_a_figure(ledger: Ledger) -> None:
    ledger.commit(Batch(evaluations=(Evaluated(version=1, samples=9, metrics={"loss": None}),)))
    figures = {"loss": 0.25, "accuracy": 1.0}
    ledger.commit(
        Batch(
            evaluations=(
                Evaluated(version=1, samples=9, metrics=figures),
                Evaluated(version=0, samples=9, metrics={}),
            )
        )
    )
    assert [row.version for row in ledger.evaluations()] == [0, 1]
    assert ledger.evaluation(1) == EvaluationRow(version=1, at=50.0, samples=9, metrics=figures)
    assert ledger.evaluation(2) is None


# ---- the fence --------------------------------------------------------------------------------------


def test_the_same_holder_claims_again_after_a_crash_and_fences_its_past(url: str, ledger: Ledger) -> None:
    again = Ledger.open(url, federation=FEDERATION)
    assert again.claim("here") == 2
    with pytest.raises(FencedError, match="taken the ledger over"):
        commit(ledger, check_in(A))
    with pytest.raises(FencedError):
        ledger.release()
    commit(again, check_in(B))
    assert list(again.journal()) == [check_in(B)]
    again.close()


def test_another_holder_is_refused_until_it_takes_over_or_the_first_releases(
    url: str, ledger: Ledger
) -> None:
    other = Ledger.open(url, federation=FEDERATION, clock=lambda: 53.0)
    with pytest.raises(LedgerInUseError, match="claimed by here, last seen 3 s ago"):
        other.claim("there")
    commit(ledger, check_in(A))
    assert other.claim("there", take_over=True) == 2
    with pytest.raises(FencedError):
        commit(ledger, check_in(A, 2))
    other.release()
    assert ledger.claim("here") == 3
    commit(ledger, check_in(A, 3))
    other.close()


def test_nothing_is_committed_without_a_claim(url: str) -> None:
    ledger = Ledger.open(url, federation=FEDERATION)
    with pytest.raises(LocalProtocolError, match="claim"):
        commit(ledger, check_in(A))
    ledger.close()


# ---- rows beside the records ------------------------------------------------------------------------


def test_a_devices_sequence_never_goes_back_under_one_key_and_its_first_sight_stays(url: str) -> None:
    now = [10.0]
    ledger = Ledger.open(url, federation=FEDERATION, clock=lambda: now[0])
    ledger.claim("here")
    row = DeviceSeen(device=A, signing_key=b"k" * 32, certificate=b"old", sequence=1 << 63)
    ledger.commit(Batch(devices=(row,)))
    now[0] = 20.0
    ledger.commit(Batch(devices=(replace(row, certificate=b"new", sequence=5),)))
    seen = ledger.device(A)
    assert seen is not None
    assert (seen.last_sequence, seen.certificate, seen.first_seen, seen.last_seen) == (
        1 << 63,
        b"new",
        10.0,
        20.0,
    )
    ledger.commit(Batch(devices=(replace(row, sequence=(1 << 64) - 1),)))
    assert [row.last_sequence for row in ledger.devices()] == [(1 << 64) - 1]
    assert ledger.device(B) is None
    ledger.close()


def test_a_new_key_of_a_device_brings_its_own_sequence(ledger: Ledger) -> None:
    old = DeviceSeen(device=A, signing_key=b"k" * 32, certificate=b"old", sequence=1 << 63)
    ledger.commit(Batch(devices=(old,)))
    ledger.commit(Batch(devices=(replace(old, signing_key=b"n" * 32, certificate=b"new", sequence=5),)))
    assert [(row.signing_key, row.last_sequence) for row in ledger.devices()] == [(b"n" * 32, 5)]
    ledger.commit(Batch(devices=(replace(old, signing_key=b"n" * 32, sequence=4),)))
    assert [row.last_sequence for row in ledger.devices()] == [5]


def test_counters_add_up_and_refusals_are_counted_by_code(ledger: Ledger) -> None:
    for _ in range(2):
        ledger.commit(Batch(counts={Reject.BAD_SEAL: 2, Count.LATE: 1, Count.UPDATE_BYTES: 1 << 40}))
    totals = ledger.totals()
    assert totals.rejects == {Reject.BAD_SEAL: 4}
    assert totals.counts == {
        Count.LATE: 2,
        Count.DUPLICATE: 0,
        Count.UPDATE_BYTES: 1 << 41,
    }


def test_totals_count_rounds_by_phase_and_updates_by_outcome(ledger: Ledger) -> None:
    commit(ledger, opened(), stored(A), stored(B), frozen(A, B))
    commit(ledger, committed(excluded=((B, Reject.BAD_SEAL),)), RoundPublished(round_id=ONE, at=60.0))
    commit(ledger, opened(TWO, base=1), stored(C, TWO))
    totals = ledger.totals()
    assert totals.version == 1
    assert totals.rounds == {Phase.PUBLISHED: 1, Phase.COLLECTING: 1}
    assert totals.outcomes == {Outcome.AGGREGATED: 1, Outcome.EXCLUDED: 1, None: 1}


def test_telemetry_keeps_the_last_report_and_totals_over_restarts_of_the_device(ledger: Ledger) -> None:
    first = Telemetry(train_s=1.5, steps=10, samples=100, peak_memory_bytes=900, bytes_up=50, bytes_down=500)
    same_process = replace(first, bytes_up=80, bytes_down=500, peak_memory_bytes=700)
    restarted = replace(first, bytes_up=20, bytes_down=30, temperature_c=51.5)
    ledger.commit(Batch(telemetry=((A, first), (A, same_process))))
    ledger.commit(Batch(telemetry=((A, restarted), (B, first))))
    row, other = ledger.telemetry()
    assert row.latest == restarted
    assert (row.reports, row.train_s, row.steps, row.samples) == (3, 4.5, 30, 300)
    assert (row.bytes_up, row.bytes_down, row.peak_memory_bytes) == (100, 530, 900)
    assert (other.device, other.reports) == (B, 1)


def test_absurd_telemetry_saturates_instead_of_stopping_the_aggregator(ledger: Ledger) -> None:
    absurd = Telemetry(
        train_s=1e308, samples=(1 << 64) - 1, peak_memory_bytes=(1 << 64) - 1, bytes_up=(1 << 64) - 1
    )
    ledger.commit(Batch(telemetry=((A, absurd), (A, absurd))))
    (row,) = ledger.telemetry()
    assert row.latest == absurd
    assert row.samples == row.peak_memory_bytes == row.bytes_up == (1 << 63) - 1


def test_a_version_is_found_by_its_number(ledger: Ledger) -> None:
    commit(ledger, opened(), stored(A), frozen(A), committed())
    assert [ledger.version(1)] == ledger.versions()
    assert ledger.version(0) is None
    assert ledger.version(2) is None


# ---- the inbox's index ------------------------------------------------------------------------------


def piece(
    device: DeviceId, index: int, offset: int, *, segment: int = 0, content: bytes = b"", count: int = 2
) -> Piece:
    return Piece(
        round_id=ONE,
        device=device,
        digest=sha256(content or device.encode()),
        index=index,
        count=count,
        position=Position(segment, offset, 100),
    )


def test_pieces_come_back_in_order_and_one_sent_again_is_at_its_last_place(ledger: Ledger) -> None:
    commit(ledger, opened())
    ledger.commit(Batch(pieces=(piece(A, 1, 8), piece(B, 0, 300), piece(A, 0, 200, content=b"other bytes"))))
    ledger.commit(Batch(pieces=(piece(A, 0, 8, segment=1), piece(A, 1, 500)), records=(stored(A),)))
    assert ledger.pieces_of(ONE, A) == [Position(1, 8, 100), Position(0, 500, 100)]
    assert ledger.pieces_of(ONE, B) == []
    assert ledger.unfinished_pieces(ONE) == [piece(B, 0, 300)]
    assert ledger.durable_ends() == {ONE: Position(1, 8, 100)}
    assert check_invariants(ledger) == []


@pytest.mark.parametrize("batches", [1, 2])
def test_wrong_pieces_of_a_refused_update_give_way_to_the_right_ones(ledger: Ledger, batches: int) -> None:
    commit(ledger, opened())
    wrong = tuple(piece(A, index, 8 + index, count=3) for index in range(3))
    right = (piece(A, 0, 300), piece(A, 1, 500))
    beside = (piece(A, 2, 700, content=b"other bytes", count=3), piece(B, 2, 900, count=3))
    for pieces in ((*beside, *wrong, *right),) if batches == 1 else ((*beside, *wrong), right):
        ledger.commit(Batch(pieces=pieces))
    assert set(ledger.unfinished_pieces(ONE)) == {*right, *beside}
    commit(ledger, stored(A))
    assert ledger.pieces_of(ONE, A) == [Position(0, 300, 100), Position(0, 500, 100)]
    assert check_invariants(ledger) == []


def test_forgotten_pieces_leave_the_index_and_the_update_keeps_its_outcome(ledger: Ledger) -> None:
    commit(ledger, opened())
    ledger.commit(Batch(pieces=(piece(A, 0, 8), piece(A, 1, 200)), records=(stored(A), frozen(A))))
    commit(ledger, committed())
    ledger.commit(Batch(records=(RoundPublished(round_id=ONE, at=60.0),), forget_pieces=(ONE,)))
    assert ledger.pieces_of(ONE, A) == []
    assert ledger.durable_ends() == {}
    assert outcome(ledger, A) == (Outcome.AGGREGATED, 1, None)


def test_the_invariants_name_a_stored_update_with_a_missing_piece(ledger: Ledger) -> None:
    commit(ledger, opened())
    ledger.commit(Batch(pieces=(piece(A, 1, 8),), records=(stored(A),)))
    assert any("pieces missing" in text for text in check_invariants(ledger))


# ---- opening ----------------------------------------------------------------------------------------


def test_what_was_committed_is_there_after_opening_again(url: str, ledger: Ledger) -> None:
    commit(ledger, check_in(A), opened(), stored(A))
    again = Ledger.open(url, federation=FEDERATION)
    assert again.load_state() == ledger.load_state() == fold(State(), ledger.journal())
    again.close()


def test_a_reader_sees_commits_while_the_writer_goes_on_and_can_change_nothing(
    url: str, ledger: Ledger
) -> None:
    reader = Ledger.open(url, federation=FEDERATION, read_only=True)
    commit(ledger, opened(), stored(A))
    assert reader.load_state() == ledger.load_state()
    with pytest.raises(LocalProtocolError, match="reading only"):
        reader.claim("reader")
    commit(ledger, stored(B))
    assert len(reader.updates(ONE)) == 2
    reader.close()


def test_another_federations_ledger_is_refused(url: str, ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="belongs to federation 'fed', not 'other'"):
        Ledger.open(url, federation=FederationId("other"))


@pytest.mark.parametrize(
    ("schema", "complaint"),
    [
        (
            tables.SCHEMA + 1,
            "schema 3, this release knows 2: use the release .* that wrote it, or a newer one",
        ),
        (1, "schema 1, this release needs 2 and cannot convert it: finish with the release"),
    ],
)
def test_another_schema_is_refused_with_what_to_do(
    url: str, ledger: Ledger, schema: int, complaint: str
) -> None:
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.update(tables.meta).values(schema=schema))
    engine.dispose()
    with pytest.raises(LedgerError, match=complaint):
        Ledger.open(url, federation=FEDERATION)


def test_a_generation_is_raised_by_a_claim_and_never_lowered(ledger: Ledger) -> None:
    ledger.claim("here", generation=3)
    assert ledger.load_state().generation == 3
    with pytest.raises(LedgerError, match="set generation = 3"):
        ledger.claim("here", generation=2)
    ledger.claim("here")
    assert ledger.load_state().generation == 3
