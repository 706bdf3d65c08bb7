"""Metrics and health of a real aggregator, scraped while it serves; its log is what the table of events says."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from aggregator.monitoring.events import EVENTS
from aggregator.monitoring.metrics import METRICS
from tests.support.federation import federation
from tests.support.programs import Event, eventually

COMMON = {"time", "event", "level", "federation"}


def get(url: str) -> tuple[int, str]:
    """(status, body), whatever the status is."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def scrape(url: str) -> dict[tuple[str, ...], float]:
    """Value by (name, label values ...)."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(get(f"{url}/metrics")[1])
        for sample in family.samples
    }


def check_log(events: list[Event]) -> None:
    """Each line names its event, the federation, and only fields of the table."""
    for event in events:
        row = EVENTS[event.name]
        assert event.fields.keys() >= COMMON
        assert row.level in (event.fields["level"], "as given")
        assert event.fields.keys() - COMMON <= {*row.fields}, event.name
        assert event.fields["time"] > 1e9


def test_an_aggregator_is_scraped_while_a_round_is_open_and_after_it_over_the_loss_of_its_broker(
    tmp_path: Path,
) -> None:
    with federation(
        tmp_path,
        samples=(160, 160, 160),
        gated=["device-2"],
        monitoring__listen="127.0.0.1:0",
        round__rounds=2,
        plan__epochs=1,
    ) as fed:
        fed.start()
        url = fed.aggregator.wait_for("monitoring").fields["url"]
        fed.wait_at_gate("device-2")
        fed.aggregator.wait_for("update_stored", times=2)
        # Round 1 is open, with two updates of three.
        eventually(
            lambda: scrape(url).get(("fleetgrad_round_stored_updates",)) == 2, "two updates on the page"
        )
        found = scrape(url)
        assert found["fleetgrad_round_phase", "collecting"] == 1
        assert found["fleetgrad_round_cohort_devices",] == found["fleetgrad_devices_known",] == 3
        assert found["fleetgrad_open_round_age_seconds",] > 0
        assert found["fleetgrad_updates_total", "stored"] == found["fleetgrad_receipts_total", "stored"] == 2
        assert found["fleetgrad_commit_duration_seconds_count",] > 2
        assert found["fleetgrad_received_bytes_total",] > 10_000
        assert found["process_resident_memory_bytes",] > 1e7
        assert get(f"{url}/healthz")[0] == get(f"{url}/readyz")[0] == 200

        # A kill: the same round goes on, and its age is counted from its own beginning.
        opened_at = fed.status()["open_round"]["opened_at"]
        fed.aggregator.kill()
        fed.aggregator.start()
        url = fed.aggregator.wait_for("monitoring", times=2).fields["url"]
        eventually(lambda: ("fleetgrad_open_round_age_seconds",) in scrape(url), "the round is known again")
        assert fed.status()["open_round"]["opened_at"] == opened_at
        fed.open_gate("device-2")
        fed.aggregator.wait_for("finished")
        eventually(lambda: scrape(url)["fleetgrad_rounds_total", "published"] == 2, "both rounds are counted")
        eventually(lambda: scrape(url)["fleetgrad_finished",] == 1, "the end is on the page")
        found = scrape(url)
        assert found["fleetgrad_model_version",] == 2
        assert ("fleetgrad_open_round_age_seconds",) not in found
        assert found["fleetgrad_round_duration_seconds_count", "published"] == 2
        assert {key[0].rpartition("_bucket")[0] or key[0] for key in found} <= {
            name + suffix for name in METRICS for suffix in ("", "_sum", "_count")
        }

        # Without its broker it lives but is not ready.
        fed.broker.stop()
        eventually(lambda: get(f"{url}/readyz")[0] == 503, "not ready without its broker")
        checks = json.loads(get(f"{url}/readyz")[1])["checks"]
        assert {name: check["ok"] for name, check in checks.items()} == {
            "loop": True,
            "broker": False,
            "ledger": True,
        }
        assert get(f"{url}/healthz")[0] == 200
        eventually(lambda: scrape(url)["fleetgrad_broker_connected",] == 0, "the page says so too")
        fed.aggregator.close()
        check_log(fed.aggregator.events())
        assert fed.aggregator.errors() == ""
