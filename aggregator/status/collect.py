"""What the ledger tells of a federation, as one JSON-ready document; reads only, while ``serve`` runs or not."""

from __future__ import annotations

import time
from typing import Any

from aggregator.config import AggregatorConfig
from aggregator.core.state import State
from aggregator.ledger.invariants import check_invariants
from aggregator.ledger.ledger import Ledger
from aggregator.ledger.values import RoundRow
from aggregator.service import open_ledger

ORDERS = 20


def collect(config: AggregatorConfig, rounds: int = 1_000_000, *, verify: bool = False) -> dict[str, Any]:
    """Versions, rounds and orders (newest first), devices, evaluations, refusals; ``rounds``: at most so many.

    ``open_round`` is None without one. ``verify``: read the whole ledger and list its ``invariant_violations``;
    None if it is not asked for. Raises LedgerError.
    """
    ledger = open_ledger(config, read_only=True)
    try:
        return collect_from(ledger, config, rounds, verify=verify)
    finally:
        ledger.close()


def collect_from(
    ledger: Ledger, config: AggregatorConfig, rounds: int = 1_000_000, *, verify: bool = False
) -> dict[str, Any]:
    """The same from a ledger that is open; ``status --watch`` keeps one."""
    totals, state, newest = ledger.totals(), ledger.load_state(), ledger.rounds(rounds)
    return {
        "at": time.time(),
        "federation": config.federation,
        "folder": str(config.folder),
        "generation": state.generation,
        "state": _state(state, config),
        "paused": state.paused,
        "draining": state.draining,
        "served": ledger.is_claimed(),
        "version": totals.version,
        "last_version": config.round.rounds,
        "rounds_by_phase": {phase.value: count for phase, count in totals.rounds.items()},
        "open_round": _open_round(state, newest, config),
        "versions": [
            {
                "version": row.version,
                "round": row.round_id.number if row.round_id else None,
                "generation": row.round_id.generation if row.round_id else None,
                "restored_from": row.restored_from,
                "model_sha256": row.model_digest.hex(),
            }
            for row in ledger.versions()
        ],
        "rounds": [_round(row) for row in newest],
        "devices": _devices(ledger, state),
        "evaluations": [
            {"version": row.version, "at": row.at, "samples": row.samples, **row.metrics}
            for row in ledger.evaluations()
        ],
        "orders": [{name: getattr(row, name) for name in _ORDER_FIELDS} for row in ledger.orders(ORDERS)],
        "outcomes": {key.value if key else "open": count for key, count in totals.outcomes.items()},
        "refused": {key.name.lower(): count for key, count in totals.rejects.items()},
        "counters": {key.value: count for key, count in totals.counts.items()},
        "invariant_violations": check_invariants(ledger) if verify else None,
    }


_ORDER_FIELDS = ("id", "at", "kind", "argument", "by", "settled_at", "obeyed", "answer")
_TELEMETRY_FIELDS = (
    "reports",
    "train_s",
    "steps",
    "samples",
    "peak_memory_bytes",
    "bytes_up",
    "bytes_down",
)


def _state(state: State, config: AggregatorConfig) -> str:
    if not state.at_rest and state.round is not None:
        return state.round.phase.value
    if state.version >= config.round.rounds:
        return "finished"
    return "draining" if state.draining else "paused" if state.paused else "waiting"


def _open_round(state: State, rounds: list[RoundRow], config: AggregatorConfig) -> dict[str, Any] | None:
    current = state.round
    if current is None or state.at_rest:
        return None
    opened_at = next((row.opened_at for row in rounds if row.round_id == current.round_id), None)
    return {
        "generation": current.round_id.generation,
        "round": current.round_id.number,
        "phase": current.phase.value,
        "opened_at": opened_at,
        "deadline": current.deadline,
        "cohort": sorted(current.cohort),
        "stored": sorted(state.stored),
        "goal": config.round.goal_of(len(current.cohort)),
        "minimum": config.round.minimum_of(len(current.cohort)),
    }


def _round(row: RoundRow) -> dict[str, Any]:
    return {
        "generation": row.round_id.generation,
        "round": row.round_id.number,
        "phase": row.phase.value,
        "base_version": row.base_version,
        "opened_at": row.opened_at,
        "closed_at": row.closed_at,
        "cohort": row.cohort_size,
        "stored": row.stored,
        "accepted": row.accepted,
        "reason": row.reason,
    }


def _devices(ledger: Ledger, state: State) -> list[dict[str, Any]]:
    telemetry = {row.device: row for row in ledger.telemetry()}
    standing = ledger.standing()
    in_round = state.round.cohort if state.round is not None and not state.at_rest else frozenset()
    found = []
    for row in ledger.devices():
        reported = telemetry.get(row.device)
        found.append(
            {
                "device": row.device,
                "last_seen": row.last_seen,
                "selected": row.device in in_round,
                "evicted_at": standing.evicted.get(row.device),
                "revoked_epoch": standing.revoked.get(row.device),
                "telemetry": reported and {name: getattr(reported, name) for name in _TELEMETRY_FIELDS},
            }
        )
    return found
