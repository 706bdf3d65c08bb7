"""``aggregator pause|resume|drain|evict|readmit|rollback`` without a running aggregator, and ``keys``."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from aggregator import cli, registrar
from aggregator.config import load_aggregator_config
from aggregator.ledger.ledger import Ledger
from aggregator.ledger.values import Batch, OrderSettled
from aggregator.service import open_ledger
from aggregator.setup import initialise
from tests.support.brokers import ROOT
from tests.support.command_line import refusal, run
from tests.support.programs import eventually

ORDERS = [
    ["pause"],
    ["resume"],
    ["drain"],
    ["evict", "kitchen-pi"],
    ["readmit", "kitchen-pi"],
    ["rollback", "--to", "3"],
]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return initialise(
        tmp_path / "agg", "digits", ROOT / "examples" / "digits" / "artifact", "mqtt://127.0.0.1:1", []
    )


@pytest.fixture
def ledger(config: Path) -> Ledger:
    settings = load_aggregator_config(config)
    settings.folder.mkdir()
    return open_ledger(settings)


def words(config: Path, order: list[str], wait_s: float = 0) -> list[str]:
    return [*order, "--config", str(config), "--wait-s", str(wait_s)]


@pytest.mark.parametrize("order", ORDERS)
def test_an_order_does_not_make_a_ledger(config: Path, order: list[str]) -> None:
    assert "there is no ledger at" in refusal(cli.main, *words(config, order))
    assert not (config.parent / "state").exists()


@pytest.mark.parametrize("order", ORDERS)
def test_an_order_without_an_answer_stays_and_says_so(config: Path, ledger: Ledger, order: list[str]) -> None:
    ledger.claim("an aggregator that hangs")
    done = run(cli.main, *words(config, order))
    assert (done.code, done.err) == (0, "")
    assert "order 1 is given and takes effect when the aggregator runs" in done.out
    (row,) = ledger.waiting_orders()
    assert (row.kind, row.argument) == (order[0], order[-1] if len(order) > 1 else "")
    assert "@" in row.by
    ledger.close()


@pytest.mark.parametrize(("obeyed", "code"), [(True, 0), (False, 1)])
def test_the_answer_is_printed_and_a_refusal_is_an_error(
    config: Path, ledger: Ledger, obeyed: bool, code: int
) -> None:
    ledger.claim("here")

    def serve() -> None:
        eventually(lambda: bool(ledger.waiting_orders()), "an order comes")
        ledger.commit(Batch(orders=(OrderSettled(id=1, obeyed=obeyed, answer="so it is"),)))

    server = threading.Thread(target=serve)
    server.start()
    done = run(cli.main, *words(config, ["evict", "kitchen-pi"], wait_s=60))
    server.join()
    ledger.close()
    assert done.code == code
    assert "so it is" in (done.out if obeyed else done.err)


def test_a_drain_of_nothing_is_refused_and_leaves_no_order(config: Path, ledger: Ledger) -> None:
    assert "nothing to drain" in refusal(cli.main, *words(config, ["drain"]))
    assert ledger.waiting_orders() == []
    ledger.close()


@pytest.mark.parametrize(
    ("order", "complaint"),
    [
        (["rollback"], "--to"),
        (["rollback", "--to", "-1"], "equal to 0"),
        (["evict"], "DEVICE"),
        (["pause", "--wait-s", "-1"], "equal to 0"),
    ],
)
def test_an_order_that_is_not_complete_is_told_as_such(
    config: Path, order: list[str], complaint: str
) -> None:
    done = run(cli.main, *order, "--config", str(config))
    assert (done.code, done.out) == (2, "")
    assert complaint in done.err


def test_the_public_keys_are_those_that_the_registrar_certifies(config: Path, tmp_path: Path) -> None:
    done = run(cli.main, "keys", "--config", str(config))
    assert (done.code, done.err) == (0, "")
    found = dict(line.split() for line in done.out.splitlines())
    assert found.keys() == {"signing-key", "sealing-key", "root-key"}
    folder = config.parent / "registrar"
    office = registrar.open(folder)
    assert found["root-key"] == office.root.raw.hex()
    office.close()
    out = tmp_path / "certificate"
    options = [
        "--signing-key",
        found["signing-key"],
        "--sealing-key",
        found["sealing-key"],
        "--out",
        str(out),
    ]
    assert run(cli.main, "registrar", "certify", "--folder", str(folder), *options).code == 0
    secrets = [
        (config.parent / "keys" / f"{name}.key").read_text().strip() for name in ("signing", "sealing")
    ]
    assert not any(secret in done.out for secret in secrets)
    (config.parent / "keys" / "signing.key").chmod(0o644)
    assert "other users can read it" in refusal(cli.main, "keys", "--config", str(config))


def test_a_word_that_can_be_no_device_is_refused_before_it_is_an_order(config: Path, ledger: Ledger) -> None:
    assert "Kitchen" in refusal(cli.main, *words(config, ["evict", "Kitchen Pi"]))
    assert ledger.orders(10) == []
    ledger.close()
