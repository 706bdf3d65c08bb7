"""Metrics: the table is what is exposed, and each event moves what it should."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from aggregator.ledger.errors import LedgerError
from aggregator.ledger.values import EvaluationRow, Presence, RoundRow
from aggregator.monitoring.gauges import Gauges, RoundGauges
from aggregator.monitoring.metrics import METRICS, Kind
from aggregator.monitoring.monitor import Monitor
from edge_runtime.protocol.ids import RoundId
from edge_runtime.protocol.rejects import Reject
from edge_runtime.protocol.rounds import Phase, Verdict


class Books:
    """A ledger that says what a test wants. ``broken``: it raises."""

    def __init__(self) -> None:
        self.broken = False
        self.ours = True
        self.evaluated: list[EvaluationRow] = []
        self.open_round: RoundRow | None = None

    def rounds(self, limit: int) -> list[RoundRow]:
        return [self.open_round] if self.open_round else []

    def evaluations(self) -> list[EvaluationRow]:
        return self.evaluated

    def presence(self, now: float) -> Presence:
        if self.broken:
            raise LedgerError("the disk is gone")
        return Presence(known=7, present=5)

    def is_ours(self) -> bool:
        if self.broken:
            raise LedgerError("the disk is gone")
        return self.ours


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def gauges(phase: Phase | None = Phase.COLLECTING, version: int = 4, connected: bool = True) -> Gauges:
    current = RoundGauges(
        generation=1,
        number=5,
        phase=phase or Phase.COLLECTING,
        cohort=6,
        goal=4,
        stored=3,
        accepted=0,
        deadline=1300.0,
    )
    return Gauges(
        version=version,
        round=current if phase else None,
        connected=connected,
        paused=True,
        draining=False,
        finished=False,
        available=9,
        evicted=2,
        revoked=1,
        queued={"outgoing": 2, "blobs": 30},
        bytes_up=111,
        bytes_down=222,
        reconnects=1,
    )


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def books() -> Books:
    return Books()


@pytest.fixture
def monitor(tmp_path: Path, clock: Clock, books: Books) -> Monitor:
    made = Monitor(folder=tmp_path, release="1.2.3", stalled_s=60.0, clock=clock, ticks=clock)
    made.watch(books)
    return made


def scrape(monitor: Monitor) -> dict[tuple[str, ...], float]:
    """Value by (name, label values ...), as Prometheus reads the page."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(monitor.page().decode())
        for sample in family.samples
    }


def test_the_page_has_the_names_kinds_and_help_of_the_table_and_no_others(monitor):
    monitor.event("evaluated", version=4, samples=360, loss=0.5)
    monitor.turned(gauges)
    monitor.event("round_opened", round=5)
    families = list(text_string_to_metric_families(monitor.page().decode()))
    found = {
        family.name + ("_total" if family.type == "counter" else ""): (family.type, family.documentation)
        for family in families
    }
    assert found == {name: (row.kind.value, row.help) for name, row in METRICS.items()}
    for family in families:
        row = METRICS[family.name + ("_total" if family.type == "counter" else "")]
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(row.labels), sample


def test_names_follow_prometheus_conventions():
    for name, row in METRICS.items():
        assert (row.kind is Kind.COUNTER) == name.endswith("_total"), name
        assert name.startswith(("fleetgrad_", "process_")), name
        assert row.help.endswith("."), name
        assert not any(unit in name for unit in ("_ms", "_milliseconds", "_kb", "_mb", "percent")), name


def test_a_round_is_timed_and_counted_by_how_it_ends(monitor, clock):
    assert scrape(monitor)["fleetgrad_rounds_total", "aborted"] == 0  # there before the first
    monitor.event("round_opened", round=1)
    clock.now += 12
    monitor.event("round_published", round=1, version=1)
    monitor.event("round_opened", round=2)
    clock.now += 600
    monitor.event("round_aborted", round=2, reason="few")
    found = scrape(monitor)
    assert found["fleetgrad_rounds_total", "published"] == 1
    assert found["fleetgrad_rounds_total", "aborted"] == 1
    assert found["fleetgrad_round_duration_seconds_sum", "published"] == 12
    assert found["fleetgrad_round_duration_seconds_sum", "aborted"] == 600


def test_a_round_that_a_restart_goes_on_with_is_timed_from_its_own_beginning(monitor, clock, books):
    books.open_round = RoundRow(
        round_id=RoundId(1, 5),
        phase=Phase.COLLECTING,
        base_version=4,
        opened_at=900.0,
        closed_at=None,
        cohort_size=6,
        stored=1,
        accepted=None,
        reason=None,
    )
    monitor.watch(books)
    monitor.turned(gauges)
    assert scrape(monitor)["fleetgrad_open_round_age_seconds",] == 100
    monitor.event("round_published", round=5)
    assert scrape(monitor)["fleetgrad_round_duration_seconds_sum", "published"] == 100


def test_updates_receipts_and_refusals_are_counted_by_what_was_found(monitor):
    for event in ("update_stored", "update_stored", "update_late", "update_again"):
        monitor.event(event, round=1, device="a")
    monitor.event("refused", reject="not_finite", detail="", topic="t", device="a", round=1)
    monitor.event("refused", reject="replayed", detail="", topic="t", device="a")  # no update
    monitor.answered(Verdict.STORED)
    monitor.answered(Verdict.REJECTED)
    found = scrape(monitor)
    assert [found["fleetgrad_updates_total", v] for v in ("stored", "late", "again", "rejected")] == [
        2,
        1,
        1,
        1,
    ]
    assert found["fleetgrad_refusals_total", str(Reject.NOT_FINITE.code), "not_finite"] == 1
    assert found["fleetgrad_refusals_total", str(Reject.REPLAYED.code), "replayed"] == 1
    assert found["fleetgrad_receipts_total", "stored"] == found["fleetgrad_receipts_total", "rejected"] == 1
    assert {key[2] for key in found if key[0] == "fleetgrad_refusals_total"} == {
        r.name.lower() for r in Reject
    }


def test_the_open_round_is_described_and_what_is_not_open_is_absent(monitor, clock):
    assert ("fleetgrad_model_version",) not in scrape(monitor)  # before the first turn nothing is known
    monitor.turned(gauges)
    monitor.event("round_opened", round=5)
    clock.now += 30
    found = scrape(monitor)
    assert found["fleetgrad_open_round_age_seconds",] == 30
    assert found["fleetgrad_open_round_deadline_timestamp_seconds",] == 1300
    assert found["fleetgrad_round_phase", "collecting"] == 1
    assert sum(value for key, value in found.items() if key[0] == "fleetgrad_round_phase") == 1
    assert (found["fleetgrad_round_stored_updates",], found["fleetgrad_round_goal_updates",]) == (3, 4)
    assert (found["fleetgrad_devices_known",], found["fleetgrad_devices_present",]) == (7, 5)
    assert found["fleetgrad_queued_messages", "blobs"] == 30
    assert found["fleetgrad_paused",] == 1
    clock.now += 30
    monitor.turned(lambda: gauges(Phase.PUBLISHED))
    gone = scrape(monitor)
    assert ("fleetgrad_open_round_age_seconds",) not in gone
    assert ("fleetgrad_open_round_deadline_timestamp_seconds",) not in gone
    monitor.turned(lambda: gauges(None))


def test_gauges_are_read_now_and_then_and_every_turn_is_noted(monitor, clock):
    reads: list[float] = []

    def read() -> Gauges:
        reads.append(clock.now)
        return gauges()

    for _ in range(100):
        clock.now += 0.01
        monitor.turned(read)
    assert 4 <= len(reads) <= 6
    assert scrape(monitor)["fleetgrad_loop_age_seconds",] == 0


def test_the_last_evaluation_is_shown_also_after_a_restart(monitor, books):
    assert not [key for key in scrape(monitor) if "evaluation" in key[0]]
    old = EvaluationRow(version=3, at=0.0, samples=360, metrics={"loss": 0.75, "accuracy": 0.5})
    books.evaluated = [old, EvaluationRow(version=4, at=1.0, samples=360, metrics={"loss": 0.5, "auc": None})]
    monitor.watch(books)
    found = scrape(monitor)
    assert {key: value for key, value in found.items() if "evaluation" in key[0]} == {
        ("fleetgrad_evaluation_version",): 4,
        ("fleetgrad_evaluation_samples",): 360,
        ("fleetgrad_evaluation_value", "loss"): 0.5,
    }
    monitor.event("evaluated", version=6, samples=360, loss=0.25, accuracy=0.875)
    found = scrape(monitor)
    assert found["fleetgrad_evaluation_version",] == 6
    assert found["fleetgrad_evaluation_value", "accuracy"] == 0.875


def test_a_ledger_that_fails_takes_nothing_else_off_the_page(monitor, books):
    books.broken = True
    monitor.turned(gauges)
    found = scrape(monitor)
    assert ("fleetgrad_devices_known",) not in found
    assert found["fleetgrad_model_version",] == 4
    assert found["fleetgrad_state_free_bytes",] > 0
    assert monitor.readiness()["ledger"] == (False, "the disk is gone")


def test_ready_means_loop_broker_and_ledger(monitor, books, clock, tmp_path):
    assert {name: check.ok for name, check in monitor.readiness().items()} == {
        "loop": False,  # has not begun
        "broker": False,
        "ledger": True,
    }
    assert monitor.liveness()["loop"].ok  # starting is alive
    monitor.turned(gauges)
    assert all(check.ok for check in monitor.readiness().values())
    books.ours = False
    assert monitor.readiness()["ledger"] == (False, "another aggregator has taken it over")
    books.ours = True
    clock.now += 61
    assert not monitor.readiness()["loop"].ok
    assert not monitor.liveness()["loop"].ok
    monitor.turned(lambda: gauges(connected=False))
    assert monitor.readiness()["broker"] == (False, "not connected")
    assert monitor.liveness()["loop"].ok
    monitor.unwatch()
    assert monitor.readiness()["ledger"] == (False, "not open")
