"""Prometheus metrics, by one table: names, kinds, labels and help, from which docs/operations.md is checked.

Counters begin at 0 with the process, as Prometheus expects. What describes an open round is absent without one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from typing import NamedTuple

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from edge_runtime.protocol.rejects import Reject
from edge_runtime.protocol.rounds import MOVES, Phase, Verdict

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_ROUND_BUCKETS = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1800, 3600, 4 * 3600, 24 * 3600)
_COMMIT_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


class Kind(Enum):
    """As Prometheus names them."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Row(NamedTuple):
    kind: Kind
    labels: tuple[str, ...]
    help: str


C, G, H = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM
METRICS: dict[str, Row] = {
    "fleetgrad_build_info": Row(G, ("version",), "Always 1; the release that runs."),
    "fleetgrad_model_version": Row(G, (), "The newest version of the model; 0 is the artifact's."),
    "fleetgrad_rounds_total": Row(C, ("outcome",), "Rounds that ended: published or aborted."),
    "fleetgrad_round_duration_seconds": Row(H, ("outcome",), "From the opening of a round to its end."),
    "fleetgrad_round_number": Row(G, (), "The number of the open round, else of the last."),
    "fleetgrad_round_phase": Row(G, ("phase",), "1 for the phase of that round, 0 for the others."),
    "fleetgrad_round_cohort_devices": Row(G, (), "Devices selected for that round."),
    "fleetgrad_round_goal_updates": Row(G, (), "Updates at which that round closes before its deadline."),
    "fleetgrad_round_stored_updates": Row(G, (), "Updates stored for that round."),
    "fleetgrad_round_accepted_updates": Row(G, (), "Updates that make its version; 0 before the freeze."),
    "fleetgrad_open_round_age_seconds": Row(G, (), "Since the open round began; absent without one."),
    "fleetgrad_open_round_deadline_timestamp_seconds": Row(
        G, (), "When the open round is closed or aborted, in seconds since 1970; absent without one."
    ),
    "fleetgrad_updates_total": Row(
        C, ("verdict",), "Updates by what was found: stored, late, again (stored before) or rejected."
    ),
    "fleetgrad_receipts_total": Row(C, ("verdict",), "Signed receipts made: stored, late or rejected."),
    "fleetgrad_refusals_total": Row(C, ("code", "reject"), "Refused messages by reason."),
    "fleetgrad_received_bytes_total": Row(C, (), "MQTT PUBLISH packets received, redeliveries included."),
    "fleetgrad_sent_bytes_total": Row(C, (), "MQTT PUBLISH packets sent, redeliveries included."),
    "fleetgrad_broker_connected": Row(G, (), "1 while the connection to the broker stands."),
    "fleetgrad_broker_reconnects_total": Row(C, (), "Connections to the broker after the first."),
    "fleetgrad_queued_messages": Row(
        G, ("queue",), "Messages that wait to be sent: outgoing (receipts, manifests) and blobs (pieces)."
    ),
    "fleetgrad_commit_duration_seconds": Row(H, (), "From the sync of the inbox to the end of a commit."),
    "fleetgrad_evaluation_version": Row(G, (), "The version that was evaluated last."),
    "fleetgrad_evaluation_samples": Row(G, (), "Held-out samples of the last evaluation."),
    "fleetgrad_evaluation_value": Row(
        G, ("metric",), "Of that version on the held-out samples: loss, accuracy, auc; what the model has."
    ),
    "fleetgrad_devices_known": Row(G, (), "Devices that ever proved themselves."),
    "fleetgrad_devices_present": Row(G, (), "Devices whose last check-in has not expired."),
    "fleetgrad_devices_available": Row(G, (), "Devices with a check-in that no round has used."),
    "fleetgrad_devices_evicted": Row(G, (), "Devices that the operator excluded."),
    "fleetgrad_devices_revoked": Row(G, (), "Devices on the root's list of revocations."),
    "fleetgrad_paused": Row(G, (), "1 while the operator holds new rounds back."),
    "fleetgrad_draining": Row(G, (), "1 while the open round is the last before the exit that was ordered."),
    "fleetgrad_finished": Row(G, (), "1 once all rounds of the settings are done."),
    "fleetgrad_loop_age_seconds": Row(G, (), "Since the serving loop last turned."),
    "fleetgrad_state_free_bytes": Row(G, (), "Free space of the file system that holds the state folder."),
    # Of prometheus_client's ProcessCollector, in its words.
    "process_cpu_seconds_total": Row(C, (), "Total user and system CPU time spent in seconds."),
    "process_resident_memory_bytes": Row(G, (), "Resident memory size in bytes."),
    "process_virtual_memory_bytes": Row(G, (), "Virtual memory size in bytes."),
    "process_start_time_seconds": Row(G, (), "Start time of the process since unix epoch in seconds."),
    "process_open_fds": Row(G, (), "Number of open file descriptors."),
    "process_max_fds": Row(G, (), "Maximum number of open file descriptors."),
}

Sample = tuple[tuple[str, ...], float]
"""Label values in the order of the row, and the value."""

Readings = Callable[[], Mapping[str, Iterable[Sample]]]
"""What cannot be counted as it happens: samples by name of the metric, taken when somebody asks."""

_COUNTED: dict[str, list[tuple[str, ...]]] = {
    "fleetgrad_rounds_total": [("published",), ("aborted",)],
    "fleetgrad_updates_total": [("stored",), ("late",), ("again",), ("rejected",)],
    "fleetgrad_receipts_total": [(verdict.name.lower(),) for verdict in Verdict],
    "fleetgrad_refusals_total": [(str(reject.code), reject.name.lower()) for reject in Reject],
}


class Metrics:
    """All of one aggregator. Methods may be called from any thread. ``readings`` must not raise."""

    def __init__(self, readings: Readings) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a series of its own for each, which nobody asks for
        self.registry = CollectorRegistry()
        self._counters = {name: self._counter(name, series) for name, series in _COUNTED.items()}
        self._histograms = {
            "fleetgrad_round_duration_seconds": self._histogram(
                "fleetgrad_round_duration_seconds", _ROUND_BUCKETS
            ),
            "fleetgrad_commit_duration_seconds": self._histogram(
                "fleetgrad_commit_duration_seconds", _COMMIT_BUCKETS
            ),
        }
        self.registry.register(_Readings(readings))
        ProcessCollector(registry=self.registry)

    def count(self, name: str, *labels: str) -> None:
        """One more of a counter of ``METRICS``."""
        counter = self._counters[name]
        (counter.labels(*labels) if labels else counter).inc()

    def observe(self, name: str, seconds: float, *labels: str) -> None:
        """One more value of a histogram."""
        histogram = self._histograms[name]
        (histogram.labels(*labels) if labels else histogram).observe(seconds)

    def page(self) -> bytes:
        """Prometheus text format 0.0.4."""
        return generate_latest(self.registry)

    def _counter(self, name: str, series: list[tuple[str, ...]]) -> Counter:
        row = METRICS[name]
        counter = Counter(name, row.help, row.labels, registry=self.registry)
        for labels in series:  # there from the start, so that the first increase is seen by rate()
            counter.labels(*labels)
        return counter

    def _histogram(self, name: str, buckets: tuple[float, ...]) -> Histogram:
        row = METRICS[name]
        return Histogram(name, row.help, row.labels, registry=self.registry, buckets=buckets)


class _Readings(Collector):
    def __init__(self, readings: Readings) -> None:
        self._readings = readings

    def describe(self) -> Iterable[Metric]:
        """Nothing: else registering would already read."""
        return ()

    def collect(self) -> Iterator[Metric]:
        for name, samples in self._readings().items():
            row = METRICS[name]
            family = (CounterMetricFamily if row.kind is C else GaugeMetricFamily)(
                name, row.help, labels=row.labels
            )
            for labels, value in samples:
                family.add_metric(labels, value)
            yield family


def phase_samples(phase: Phase | None) -> list[Sample]:
    """1 for this phase, 0 for the others."""
    return [((each.value,), float(each is phase)) for each in MOVES]
