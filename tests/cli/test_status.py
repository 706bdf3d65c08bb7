"""``aggregator status``: quick by default; ``--verify`` reads the whole ledger."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from aggregator import cli
from aggregator.config import load_aggregator_config
from aggregator.core.records import RoundOpened, UpdateStored
from aggregator.ledger.values import Batch
from aggregator.service import LEDGER_FILE, open_ledger
from aggregator.setup import initialise
from edge_runtime.protocol.ids import DeviceId, RoundId, sha256
from tests.support.brokers import ROOT
from tests.support.command_line import run

A, ONE = DeviceId("a"), RoundId(1, 1)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A federation whose ledger holds an open round with one update."""
    path = initialise(
        tmp_path / "agg", "digits", ROOT / "examples" / "digits" / "artifact", "mqtt://127.0.0.1:1", []
    )
    opened = RoundOpened(
        round_id=ONE, base_version=0, cohort=(A,), deadline=9e9, manifest=b"m", manifest_digest=sha256(b"m")
    )
    stored = UpdateStored(round_id=ONE, device=A, digest=sha256(b"u"), samples=7)
    settings = load_aggregator_config(path)
    settings.folder.mkdir()
    ledger = open_ledger(settings, read_only=False)
    ledger.claim("here")
    ledger.commit(Batch(records=(opened, stored)))
    ledger.close()
    return path


def status(config: Path, *words: str) -> str:
    done = run(cli.main, "status", "--config", str(config), *words)
    assert (done.code, done.err) == (0, "")
    return done.out


def test_status_tells_of_violations_only_when_asked_to_verify(config: Path) -> None:
    assert json.loads(status(config, "--json"))["invariant_violations"] is None
    assert json.loads(status(config, "--json", "--verify"))["invariant_violations"] == []
    assert "the ledger is consistent" in status(config, "--verify")
    assert "consistent" not in status(config)
    connection = sqlite3.connect(config.parent / "state" / LEDGER_FILE)
    with connection:
        connection.execute("UPDATE updates SET outcome = 'excluded'")
    connection.close()
    (found,) = json.loads(status(config, "--json", "--verify"))["invariant_violations"]
    assert found.endswith("has excluded in a round that is collecting")
    assert "invariant violated: a's update" in status(config, "--verify")
    assert "violated" not in status(config)
