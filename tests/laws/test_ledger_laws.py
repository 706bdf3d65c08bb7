"""The round core over a real ledger: whatever is killed whenever, the invariants hold and recovery is the fold."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.core.records import (
    CheckedIn,
    Evicted,
    Paused,
    Record,
    RevocationsTaken,
    RoundOpened,
    UpdateStored,
    VersionCommitted,
    VersionRestored,
)
from aggregator.core.round_rules import RoundRules
from aggregator.core.state import State, fold
from aggregator.ledger.database import sqlite_url
from aggregator.ledger.encoding import KINDS, decode_record, encode_record, kind_of
from aggregator.ledger.errors import FencedError, LedgerError
from aggregator.ledger.invariants import check_invariants
from aggregator.ledger.ledger import Ledger
from aggregator.ledger.values import Batch
from edge_runtime.protocol.ids import DeviceId, Digest, FederationId, RoundId
from edge_runtime.protocol.rejects import Reject
from tests.support.round_shell import Crash, Operation, Shell, operations, operations_and_orders, rules
from tests.support.scratch import scratch_folder

FEDERATION = FederationId("fed")


@settings(max_examples=25, deadline=None)
@given(rules(), operations | operations_and_orders)
def test_any_run_with_crashes_keeps_the_ledgers_invariants(
    rules: RoundRules, operations: list[Operation]
) -> None:
    with scratch_folder() as folder:
        url = sqlite_url(folder / "ledger.db")
        open_ledgers: list[Ledger] = []

        def recover() -> State:
            ledger = Ledger.open(url, federation=FEDERATION)
            ledger.claim("here")
            open_ledgers.append(ledger)
            return ledger.load_state()

        def commit(records: Sequence[Record]) -> None:
            open_ledgers[-1].commit(Batch(records=tuple(records)))

        shell = Shell(rules, state=recover(), commit=commit, recover=recover)
        for operation in operations:
            shell.run(operation)
            if operation == Crash():
                assert shell.state == fold(State(), shell.journal)
        ledger = open_ledgers[-1]
        assert list(ledger.journal()) == _without_old_check_ins(shell.journal)
        assert ledger.load_state() == shell.state == fold(State(), shell.journal)
        assert check_invariants(ledger) == []
        for zombie in open_ledgers[:-1]:
            with pytest.raises(FencedError):
                zombie.commit(Batch())
        for each in open_ledgers:
            each.close()


def _without_old_check_ins(records: list[Record]) -> list[Record]:
    last = max((n for n, record in enumerate(records) if isinstance(record, RoundOpened)), default=0)
    return [record for n, record in enumerate(records) if n >= last or not isinstance(record, CheckedIn)]


_round_ids = st.builds(RoundId, st.integers(1, 1 << 32), st.integers(0, 1 << 32))
_devices = st.from_regex(r"[a-z0-9]{1,8}", fullmatch=True).map(DeviceId)
_digests = st.binary(min_size=32, max_size=32).map(Digest)
_seconds = st.floats(0, 1e12)
_records: st.SearchStrategy[Record] = st.one_of(
    st.builds(
        CheckedIn,
        device=_devices,
        sequence=st.integers(0, (1 << 64) - 1),
        expires_at=_seconds,
        samples=st.integers(1, 1 << 40),
        codecs=st.lists(st.text(max_size=10)).map(tuple),
    ),
    st.builds(
        RoundOpened,
        round_id=_round_ids,
        base_version=st.integers(0, 1 << 32),
        cohort=st.lists(_devices).map(tuple),
        deadline=_seconds,
        manifest=st.binary(max_size=300),
        manifest_digest=_digests,
    ),
    st.builds(
        UpdateStored, round_id=_round_ids, device=_devices, digest=_digests, samples=st.integers(1, 1 << 40)
    ),
    st.builds(
        VersionCommitted,
        round_id=_round_ids,
        version=st.integers(1, 1 << 32),
        model_digest=_digests,
        excluded=st.lists(st.tuples(_devices, st.sampled_from(Reject))).map(tuple),
    ),
    st.builds(
        VersionRestored, version=st.integers(1, 1 << 32), of=st.integers(0, 1 << 32), model_digest=_digests
    ),
    st.builds(Paused, at=_seconds),
    st.builds(Evicted, device=_devices, at=_seconds),
    st.builds(
        RevocationsTaken,
        number=st.integers(1, 1 << 62),
        revoked=st.lists(st.tuples(_devices, st.integers(0, (1 << 32) - 1))).map(tuple),
    ),
)


@given(_records)
def test_a_record_survives_its_json_exactly(record: Record) -> None:
    again = decode_record(kind_of(record), encode_record(record))
    assert again == record
    assert encode_record(again) == encode_record(record)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
).map(json.dumps)


@given(st.sampled_from([*KINDS, "unknown"]), _json | st.text(max_size=30))
def test_a_damaged_journal_line_is_a_ledger_error_and_nothing_else(kind: str, text: str) -> None:
    with pytest.raises(LedgerError):
        decode_record(kind, text)
