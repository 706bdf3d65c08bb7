"""What only the default database has: a file, its mode, its pragmas, and the ways it can be wrong."""

from __future__ import annotations

import os
import re
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy

from aggregator.core.records import RoundAborted, RoundFrozen, RoundOpened, UpdateStored
from aggregator.ledger import database, tables
from aggregator.ledger.database import sqlite_url
from aggregator.ledger.errors import LedgerError
from aggregator.ledger.invariants import check_invariants
from aggregator.ledger.ledger import Ledger
from aggregator.ledger.values import Batch, Count
from edge_runtime.protocol.ids import DeviceId, FederationId, RoundId, sha256

FEDERATION = FederationId("fed")
A = DeviceId("a")
ONE = RoundId(1, 1)


def open_ledger(path: Path, **options: bool) -> Ledger:
    return Ledger.open(sqlite_url(path), federation=FEDERATION, **options)


def with_a_stored_update(path: Path) -> Ledger:
    ledger = open_ledger(path)
    ledger.claim("here")
    opened = RoundOpened(
        round_id=ONE, base_version=0, cohort=(A,), deadline=1.0, manifest=b"m", manifest_digest=sha256(b"m")
    )
    stored = UpdateStored(round_id=ONE, device=A, digest=sha256(b"u"), samples=1)
    ledger.commit(Batch(records=(opened, stored)))
    return ledger


def test_every_connection_is_durable_and_waits_for_others(tmp_path: Path) -> None:
    engine = database.connect(sqlite_url(tmp_path / "ledger.db"), read_only=False)
    with engine.connect() as first, engine.connect() as second:
        for connection in (first, second):
            found = {
                name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
                for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
            }
            assert found == {
                "journal_mode": "wal",
                "synchronous": 2,
                "foreign_keys": 1,
                "busy_timeout": database.BUSY_TIMEOUT_MS,
            }
    engine.dispose()


def test_the_files_are_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        ledger = with_a_stored_update(tmp_path / "ledger.db")
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
        ledger.close()
    finally:
        os.umask(before)
    assert set(modes.values()) == {0o600}
    assert {"ledger.db", "ledger.db-wal"} <= set(modes)


def test_a_reader_never_creates_a_ledger(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="there is no ledger at"):
        open_ledger(tmp_path / "ledger.db", read_only=True)
    assert list(tmp_path.iterdir()) == []


def test_a_readers_connection_refuses_to_write(tmp_path: Path) -> None:
    open_ledger(tmp_path / "ledger.db").close()
    engine = database.connect(sqlite_url(tmp_path / "ledger.db"), read_only=True)
    with (
        engine.connect() as connection,
        pytest.raises(sqlalchemy.exc.OperationalError, match="readonly"),
    ):
        connection.execute(sqlalchemy.update(tables.epoch).values(holder="x"))
    engine.dispose()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite://", "in memory would not survive"),
        ("sqlite:///:memory:", "in memory would not survive"),
        ("mysql://root:secret@host/db", "choose one of sqlite, postgresql"),
        ("not a url", "does not parse"),
        ("sqlite:////nowhere/at/all/ledger.db", "No such file or directory"),
    ],
)
def test_a_url_that_cannot_hold_a_ledger_is_refused_with_what_to_do(url: str, message: str) -> None:
    with pytest.raises(LedgerError, match=message) as error:
        Ledger.open(url, federation=FEDERATION)
    assert "secret" not in str(error.value)


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(b"a diary, not a database " * 50)
    with pytest.raises(LedgerError, match="file is not a database"):
        open_ledger(path)
    assert path.read_bytes() == b"a diary, not a database " * 50


def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
    connection.close()
    with pytest.raises(LedgerError, match="another program's tables"):
        open_ledger(path)


def test_a_commit_survives_kill_9(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from aggregator.ledger.ledger import Ledger\n"
        "from aggregator.ledger.values import Batch, Count\n"
        "ledger = Ledger.open(sys.argv[1], federation='fed')\n"
        "ledger.claim('here')\n"
        "ledger.commit(Batch(counts={Count.LATE: 41}))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    url = sqlite_url(tmp_path / "ledger.db")
    done = subprocess.run([sys.executable, "-c", program, url], check=False)
    assert done.returncode == -9
    ledger = open_ledger(tmp_path / "ledger.db")
    assert ledger.claim("here") == 2
    ledger.commit(Batch(counts={Count.LATE: 1}))
    assert ledger.totals().counts[Count.LATE] == 42
    ledger.close()


@pytest.mark.parametrize(
    ("tampering", "complaint"),
    [
        ("UPDATE updates SET outcome = 'excluded'", "has excluded in a round that is collecting"),
        ("UPDATE rounds SET phase = 'aborted'", "has no outcome in a round that is aborted"),
        ("UPDATE rounds SET phase = 'published'", "round .* is published and has no version"),
        (
            "UPDATE updates SET outcome = 'aggregated', version = 1",
            "a's update of .* is aggregated and was not accepted",
        ),
        ("UPDATE rounds SET accepted = 2", "accepted 2 of 1 stored"),
        ("DELETE FROM updates", "not those of the journal"),
        ("UPDATE journal SET seq = 7 WHERE seq = 2", "has 2 records, 0 were pruned, and it ends at 7"),
        ("UPDATE journal SET epoch = 9 WHERE seq = 1", "a fenced aggregator has committed"),
        ("DELETE FROM journal WHERE kind = 'round-opened'", "the journal contradicts itself"),
        ("INSERT INTO versions VALUES (3, 1, 1, x'00', NULL)", "versions have a gap"),
        ("INSERT INTO versions VALUES (1, NULL, NULL, x'00', 0)", "versions are not those of the journal"),
        (
            "INSERT INTO versions VALUES (1, 1, 1, x'01', NULL), (2, NULL, NULL, x'02', 1)",
            "version 2 does not have the parameters of version 1",
        ),
        ("INSERT INTO exclusions VALUES ('a', 1.0, NULL)", "not the fold of the journal"),
        ("UPDATE standing SET paused = 1", "not the fold of the journal"),
        ("INSERT INTO counters VALUES ('journal-pruned', 1)", "has 2 records, 1 were pruned"),
        ("INSERT INTO checkins VALUES ('a', 0, 1.0, 1, '[]', 1, 1)", "not the fold of the journal"),
    ],
)
def test_the_invariants_see_tampering(tmp_path: Path, tampering: str, complaint: str) -> None:
    path = tmp_path / "ledger.db"
    ledger = with_a_stored_update(path)
    assert check_invariants(ledger) == []
    with sqlite3.connect(path) as connection:
        connection.execute(tampering)
    connection.close()
    problems = check_invariants(ledger)
    assert any(re.search(complaint, problem) for problem in problems), problems
    ledger.close()


def test_a_damaged_journal_line_stops_recovery_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    ledger = with_a_stored_update(path)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE journal SET body = '{}' WHERE kind = 'update-stored'")
    connection.close()
    with pytest.raises(LedgerError, match=r"damaged update-stored: restore it from a backup"):
        ledger.load_state()
    ledger.close()


def test_a_round_of_a_thousand_devices_is_one_commit(tmp_path: Path) -> None:
    devices = tuple(DeviceId(f"d{i:04d}") for i in range(1000))
    ledger = open_ledger(tmp_path / "ledger.db")
    ledger.claim("here")
    opened = RoundOpened(
        round_id=ONE,
        base_version=0,
        cohort=devices,
        deadline=1.0,
        manifest=b"m",
        manifest_digest=sha256(b"m"),
    )
    updates = [
        UpdateStored(round_id=ONE, device=device, digest=sha256(device.encode()), samples=1)
        for device in devices
    ]
    frozen = RoundFrozen(round_id=ONE, accepted=devices)
    aborted = RoundAborted(round_id=ONE, reason="", at=2.0)
    ledger.commit(Batch(records=(opened, *updates, frozen, aborted)))
    assert len(ledger.updates(ONE)) == 1000
    assert check_invariants(ledger) == []
    ledger.close()
