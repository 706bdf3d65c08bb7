"""What is fed by the serving loop and asked by the operator's tools: counts, readings, health.

The loop calls ``event``, ``committed``, ``answered`` and ``turned``; none of them waits for anybody. The endpoint's
threads call the rest.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from aggregator.ledger.errors import LedgerError
from aggregator.ledger.values import Evaluated, EvaluationRow, Presence, RoundRow
from aggregator.monitoring.gauges import Gauges
from aggregator.monitoring.metrics import Metrics, Sample, phase_samples
from edge_runtime.protocol.rejects import Reject
from edge_runtime.protocol.rounds import Verdict

GAUGES_EVERY_S = 0.2  # the loop may turn a thousand times a second
_UPDATES = {"update_stored": "stored", "update_late": "late", "update_again": "again"}
_ROUND_ENDS = {"round_published": "published", "round_aborted": "aborted"}


class LedgerView(Protocol):
    """What is asked of the ledger, also from other threads than the loop's. All raise LedgerError."""

    def rounds(self, limit: int) -> list[RoundRow]: ...

    def evaluations(self) -> list[EvaluationRow]: ...

    def presence(self, now: float) -> Presence: ...

    def is_ours(self) -> bool:
        """Nobody else has claimed it since."""


class Check(NamedTuple):
    """``detail``: what is wrong, or how it is."""

    ok: bool
    detail: str


class Monitor:
    """``folder``: the state folder. ``stalled_s``: a loop that has not turned for so long is taken for dead.

    ``clock``: seconds since 1970; ``ticks``: seconds that never jump.
    """

    def __init__(
        self,
        *,
        folder: Path,
        release: str,
        stalled_s: float,
        clock: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        self.metrics = Metrics(self._readings)
        self._folder = folder
        self._release = release
        self._stalled_s = stalled_s
        self._clock = clock
        self._ticks = ticks
        self._lock = threading.Lock()
        self._ledger: LedgerView | None = None
        self._gauges: Gauges | None = None
        self._turned_at: float | None = None
        self._read_at: float | None = None
        self._opened_at: float | None = None
        self._evaluated: Evaluated | None = None

    # ---- fed by the loop ----------------------------------------------------------------------------

    def watch(self, ledger: LedgerView) -> None:
        """The ledger to ask from now on. Raises LedgerError."""
        last = next(iter(ledger.rounds(1)), None)
        self._opened_at = last.opened_at if last is not None and last.closed_at is None else None
        if rows := ledger.evaluations():
            last_row = rows[-1]
            self._evaluated = Evaluated(
                version=last_row.version, samples=last_row.samples, metrics=last_row.metrics
            )
        self._ledger = ledger

    def unwatch(self) -> None:
        """The ledger closes; the loop turns no more."""
        self._ledger = None

    def event(self, event: str, **fields: object) -> None:
        """A ``Report``: what the engine says, counted."""
        match event:
            case "round_opened":
                self._opened_at = self._clock()
            case "round_published" | "round_aborted":
                outcome = _ROUND_ENDS[event]
                self.metrics.count("fleetgrad_rounds_total", outcome)
                if self._opened_at is not None:
                    seconds = max(self._clock() - self._opened_at, 0.0)
                    self.metrics.observe("fleetgrad_round_duration_seconds", seconds, outcome)
                self._opened_at = None
            case "update_stored" | "update_late" | "update_again":
                self.metrics.count("fleetgrad_updates_total", _UPDATES[event])
            case "refused":
                reject = Reject[str(fields["reject"]).upper()]
                self.metrics.count("fleetgrad_refusals_total", str(reject.code), reject.name.lower())
                if "round" in fields:
                    self.metrics.count("fleetgrad_updates_total", "rejected")
            case "evaluated":
                self._evaluated = _evaluated(**typing.cast(dict[str, Any], fields))

    def committed(self, seconds: float) -> None:
        """A commit took so long."""
        self.metrics.observe("fleetgrad_commit_duration_seconds", seconds)

    def answered(self, verdict: Verdict) -> None:
        """A receipt was made."""
        self.metrics.count("fleetgrad_receipts_total", verdict.name.lower())

    def turned(self, read: Callable[[], Gauges]) -> None:
        """The loop has turned; ``read`` is called now and then."""
        now = self._ticks()
        if self._read_at is None or now - self._read_at >= GAUGES_EVERY_S:
            self._gauges, self._read_at = read(), now
        self._turned_at = now

    # ---- asked by the endpoint ----------------------------------------------------------------------

    def page(self) -> bytes:
        """Prometheus text. One at a time."""
        with self._lock:
            return self.metrics.page()

    def liveness(self) -> dict[str, Check]:
        """The process answers and its loop turns. Before the first turn: it is starting."""
        turned_at = self._turned_at
        if turned_at is None:
            return {"loop": Check(True, "starting")}
        age = self._ticks() - turned_at
        return {"loop": Check(age <= self._stalled_s, f"turned {age:.1f} s ago")}

    def readiness(self) -> dict[str, Check]:
        """It can do its work: loop, broker, ledger."""
        gauges = self._gauges
        connected = gauges is not None and gauges.connected
        loop = self.liveness()["loop"] if self._turned_at is not None else Check(False, "starting")
        return {
            "loop": loop,
            "broker": Check(connected, "connected" if connected else "not connected"),
            "ledger": self._ledger_check(),
        }

    # ---- readings -----------------------------------------------------------------------------------

    def _ledger_check(self) -> Check:
        ledger = self._ledger
        if ledger is None:
            return Check(False, "not open")
        if not os.access(self._folder, os.W_OK):
            return Check(False, "the state folder cannot be written to")
        try:
            ours = ledger.is_ours()
        except LedgerError as error:
            return Check(False, str(error))
        return Check(ours, "claimed" if ours else "another aggregator has taken it over")

    def _readings(self) -> Mapping[str, list[Sample]]:
        found: dict[str, list[Sample]] = {"fleetgrad_build_info": [((self._release,), 1.0)]}

        def one(name: str, value: float) -> None:
            found[name] = [((), float(value))]

        if (gauges := self._gauges) is not None:
            self._gauge_readings(gauges, found, one)
        if (turned_at := self._turned_at) is not None:
            one("fleetgrad_loop_age_seconds", max(self._ticks() - turned_at, 0.0))
        if (evaluated := self._evaluated) is not None:
            one("fleetgrad_evaluation_version", evaluated.version)
            one("fleetgrad_evaluation_samples", evaluated.samples)
            found["fleetgrad_evaluation_value"] = [
                ((name,), value) for name, value in evaluated.metrics.items() if value is not None
            ]
        with contextlib.suppress(OSError):  # an absent sample is what Prometheus shows as unknown
            one("fleetgrad_state_free_bytes", shutil.disk_usage(self._folder).free)
        if (ledger := self._ledger) is not None:
            with contextlib.suppress(LedgerError):  # /readyz says why
                presence = ledger.presence(self._clock())
                one("fleetgrad_devices_known", presence.known)
                one("fleetgrad_devices_present", presence.present)
        return found

    def _gauge_readings(
        self, gauges: Gauges, found: dict[str, list[Sample]], one: Callable[[str, float], None]
    ) -> None:
        one("fleetgrad_model_version", gauges.version)
        one("fleetgrad_broker_connected", gauges.connected)
        one("fleetgrad_broker_reconnects_total", gauges.reconnects)
        one("fleetgrad_received_bytes_total", gauges.bytes_down)
        one("fleetgrad_sent_bytes_total", gauges.bytes_up)
        one("fleetgrad_devices_available", gauges.available)
        one("fleetgrad_devices_evicted", gauges.evicted)
        one("fleetgrad_devices_revoked", gauges.revoked)
        one("fleetgrad_paused", gauges.paused)
        one("fleetgrad_draining", gauges.draining)
        one("fleetgrad_finished", gauges.finished)
        found["fleetgrad_queued_messages"] = [((queue,), n) for queue, n in gauges.queued.items()]
        current = gauges.round
        found["fleetgrad_round_phase"] = phase_samples(current.phase if current else None)
        if current is None:
            return
        one("fleetgrad_round_number", current.number)
        one("fleetgrad_round_cohort_devices", current.cohort)
        one("fleetgrad_round_goal_updates", current.goal)
        one("fleetgrad_round_stored_updates", current.stored)
        one("fleetgrad_round_accepted_updates", current.accepted)
        if current.is_open:
            one("fleetgrad_open_round_deadline_timestamp_seconds", current.deadline)
            if (opened_at := self._opened_at) is not None:
                one("fleetgrad_open_round_age_seconds", max(self._clock() - opened_at, 0.0))


def _evaluated(version: int, samples: int, **metrics: float | None) -> Evaluated:
    return Evaluated(version=version, samples=samples, metrics=metrics)
