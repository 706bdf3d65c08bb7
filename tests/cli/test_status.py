"""``aggregator status``: quick by default; ``--verify`` reads the whole ledger; ``--watch`` goes on."""

from __future__ import annotations

import io
import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from aggregator import cli
from aggregator.config import load_aggregator_config
from aggregator.core.records import Evicted, Paused, RoundAborted, RoundOpened, UpdateStored
from aggregator.ledger.values import Batch, DeviceSeen, Evaluated, OrderKind
from aggregator.service import LEDGER_FILE, open_ledger
from aggregator.setup import initialise
from aggregator.status import collect, render_live
from aggregator.status.figures import duration, size, sparkline
from aggregator.status.live import plain_line
from edge_runtime.protocol.ids import DeviceId, RoundId, sha256
from edge_runtime.protocol.messages import Telemetry
from edge_runtime.protocol.rejects import Reject
from tests.support.brokers import ROOT
from tests.support.command_line import refusal, run
from tests.support.programs import HANG_S

A, B, ONE = DeviceId("a"), DeviceId("b"), RoundId(1, 1)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A federation whose ledger holds an open round with one update, and what else an operator looks for."""
    path = initialise(
        tmp_path / "agg", "digits", ROOT / "examples" / "digits" / "artifact", "mqtt://127.0.0.1:1", []
    )
    opened = RoundOpened(
        round_id=ONE, base_version=0, cohort=(A, B), deadline=9e9, manifest=b"m", manifest_digest=sha256(b"m")
    )
    stored = UpdateStored(round_id=ONE, device=A, digest=sha256(b"u"), samples=7)
    settings = load_aggregator_config(path)
    settings.folder.mkdir()
    ledger = open_ledger(settings, read_only=False)
    ledger.claim("here")
    seen = [DeviceSeen(device=d, signing_key=b"k" * 32, certificate=b"c", sequence=1) for d in (A, B)]
    ledger.commit(
        Batch(
            records=(opened, stored),
            devices=tuple(seen),
            telemetry=((A, Telemetry(train_s=1.5, bytes_up=2048, bytes_down=3 << 20)),),
            counts={Reject.REPLAYED: 3, Reject.NOT_FINITE: 5},
            evaluations=(
                Evaluated(version=0, samples=9, metrics={"accuracy": 0.1, "loss": 2.5}),
                Evaluated(version=1, samples=9, metrics={"accuracy": 0.6, "loss": None}),
                Evaluated(version=2, samples=9, metrics={"accuracy": 0.9, "loss": 0.5}),
            ),
        )
    )
    ledger.commit(Batch(records=(Evicted(device=B, at=1.0),)))
    ledger.give_order(OrderKind.PAUSE, "", "ann@office")
    ledger.close()
    return path


def status(config: Path, *words: str) -> str:
    done = run(cli.main, "status", "--config", str(config), *words)
    assert (done.code, done.err) == (0, "")
    return done.out


def live(document: dict[str, Any], width: int = 100, height: int = 40, encoding: str = "utf-8") -> str:
    """What a terminal of this size shows."""
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=out, width=width, height=height, force_terminal=True, color_system=None)
    console.print(render_live(document, width, height))
    out.flush()
    return out.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


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


def test_status_shows_devices_evaluations_orders_and_refusals(config: Path, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    shown = status(config)
    assert "version 0, collecting, 0 rounds published, 0 aborted" in shown
    assert "2.0 KiB" in shown
    assert "evicted" in shown
    assert "accuracy" in shown
    assert "0.9000" in shown
    assert "by ann@office: pause; waits" in shown
    assert "refused: not_finite 5, replayed 3" in shown


def test_the_document_says_what_is_open_and_what_was_decided(config: Path) -> None:
    document = json.loads(status(config, "--json"))
    assert document["state"] == "collecting"
    assert document["open_round"] == {
        "generation": 1,
        "round": 1,
        "phase": "collecting",
        "opened_at": document["rounds"][0]["opened_at"],
        "deadline": 9e9,
        "cohort": ["a", "b"],
        "stored": ["a"],
        "goal": 2,
        "minimum": 3,
    }
    a, b = document["devices"]
    assert (a["selected"], a["evicted_at"], a["telemetry"]["bytes_up"]) == (True, None, 2048)
    assert (b["evicted_at"], b["revoked_epoch"], b["telemetry"]) == (1.0, None, None)
    assert [row["accuracy"] for row in document["evaluations"]] == [0.1, 0.6, 0.9]
    (order,) = document["orders"]
    assert (order["kind"], order["by"], order["settled_at"]) == ("pause", "ann@office", None)


def test_the_live_picture_has_header_round_bar_curves_devices_orders_and_refusals(config: Path) -> None:
    shown = live(collect(load_aggregator_config(config)))
    for part in (
        "digits  version 0/100  collecting",
        "round 1  collecting  1/2 updates of 2 devices",
        " left\n" + "█" * 30 + "░" * 30 + "\n",
        "accuracy 0.9000 ▁▅█",
        "loss 0.5000     █ ▁",
        "2.0 KiB",
        "evicted",
        "orders that wait: pause",
        "refused: not_finite 5, replayed 3",
    ):
        assert part in shown, part


def test_the_live_picture_fits_the_terminal_whatever_its_width_and_characters(config: Path) -> None:
    document = collect(load_aggregator_config(config))
    document["devices"] = [{**document["devices"][0], "device": f"device-{i:03}"} for i in range(300)]
    for width, encoding in itertools.product((20, 40, 79, 80, 200), ("utf-8", "ascii")):
        lines = live(document, width, 24, encoding).splitlines()
        assert max(map(len, lines)) <= width
        assert len(lines) <= 24
        assert "device-000" in "".join(lines)


def test_a_round_that_is_over_and_a_pause_are_shown_as_such(config: Path) -> None:
    settings = load_aggregator_config(config)
    ledger = open_ledger(settings)
    ledger.claim("here")
    ledger.commit(
        Batch(records=(RoundAborted(round_id=ONE, reason="1 of at least 3 [b]", at=2.0), Paused(at=3.0)))
    )
    ledger.release()
    ledger.close()
    document = collect(settings)
    assert document["open_round"] is None
    shown = live(document)
    assert "digits  version 0/100  paused  no aggregator serves it" in shown
    assert "no round is open; rounds: 0 published, 1 aborted" in shown
    assert "1 of at least 3 [b]" in shown
    assert plain_line(document).startswith("digits  version 0/100  paused  accuracy 0.9000")


def test_a_federation_that_has_not_begun_is_shown_too(tmp_path: Path) -> None:
    path = initialise(tmp_path / "agg", "digits", ROOT / "examples" / "digits" / "artifact", "mqtt://x", [])
    assert "`aggregator serve` makes it" in refusal(cli.main, "status", "--config", str(path), "--watch")
    settings = load_aggregator_config(path)
    settings.folder.mkdir()
    open_ledger(settings).close()
    shown = live(collect(settings), 60)
    assert "version 0/100  waiting  no aggregator serves it" in shown


def test_watch_in_a_pipe_prints_a_line_for_every_change_and_ends_with_ctrl_c(config: Path) -> None:
    words = ["status", "--config", str(config), "--watch", "--interval-s", "0.1"]
    watching = subprocess.Popen(
        [sys.executable, "-m", "aggregator.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert watching.stdout is not None
        first = watching.stdout.readline()
        assert "digits  version 0/100  collecting  round 1 1/2 updates" in first
        ledger = open_ledger(load_aggregator_config(config))
        ledger.claim("here")
        ledger.commit(Batch(records=(UpdateStored(round_id=ONE, device=B, digest=sha256(b"v"), samples=7),)))
        ledger.close()
        assert "round 1 2/2 updates" in watching.stdout.readline()
        watching.send_signal(signal.SIGINT)
        out, err = watching.communicate(timeout=HANG_S)
    finally:
        watching.kill()
        watching.wait()
    assert (watching.returncode, out, err) == (0, "", "")


def test_watch_on_a_terminal_draws_again_and_gives_the_terminal_back(config: Path) -> None:
    master, slave = os.openpty()
    words = ["status", "--config", str(config), "--watch", "--interval-s", "0.1"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    watching = subprocess.Popen(
        [sys.executable, "-m", "aggregator.cli", *words],
        stdout=slave,
        stderr=subprocess.PIPE,
        env=environment,
    )
    os.close(slave)
    shown = b""
    try:
        while shown.count(b"refused: ") < 3:
            shown += os.read(master, 4096)
        watching.send_signal(signal.SIGINT)
        while True:  # what is not read would hold it up
            try:
                shown += os.read(master, 4096)
            except OSError:  # it has ended
                break
        _, err = watching.communicate(timeout=HANG_S)
    finally:
        watching.kill()
        watching.wait()
        os.close(master)
    assert (watching.returncode, err) == (0, b"")
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")  # the cursor is back


def test_watch_excludes_what_makes_no_sense_with_it(config: Path) -> None:
    for other in ("--json", "--verify"):
        assert "--watch" in refusal(cli.main, "status", "--config", str(config), "--watch", other)


def test_figures_say_what_they_say() -> None:
    assert [duration(s) for s in (-1, 0.4, 119, 120, 7199, 7200, 172_800)] == [
        "0 s", "0 s", "119 s", "2 min", "119 min", "2 h", "2 d",
    ]  # fmt: skip
    assert [size(n) for n in (0, 1023, 1024, 150 << 10, 3 << 40, 5000 << 40)] == [
        "0 B", "1023 B", "1.0 KiB", "150 KiB", "3.0 TiB", "5000 TiB",
    ]  # fmt: skip
    assert sparkline([1.0, None, 2.0, float("nan"), 3.0]) == "▁ ▅ █"
    assert sparkline([2.0, 2.0]) == "▄▄"
    assert sparkline([None]) == ""
