"""What the ledger tells of a federation, as one document and as tables for people."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from aggregator.config import AggregatorConfig
from aggregator.ledger.invariants import check_invariants
from aggregator.service import open_ledger
from edge_runtime.protocol.rounds import Phase

SHOWN_ROUNDS = 10


def collect(config: AggregatorConfig, rounds: int = 1_000_000, *, verify: bool = False) -> dict[str, Any]:
    """JSON-ready: versions, rounds (newest first), devices, refusals.

    ``verify``: read the whole ledger and list its ``invariant_violations``; None if it was not asked for.
    Raises LedgerError.
    """
    ledger = open_ledger(config, read_only=True)
    try:
        totals = ledger.totals()
        telemetry = {row.device: row for row in ledger.telemetry()}
        return {
            "federation": config.federation,
            "folder": str(config.folder),
            "version": totals.version,
            "versions": [
                {
                    "version": row.version,
                    "round": row.round_id.number,
                    "generation": row.round_id.generation,
                    "model_sha256": row.model_digest.hex(),
                }
                for row in ledger.versions()
            ],
            "rounds": [
                {
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
                for row in ledger.rounds(rounds)
            ],
            "devices": [
                {
                    "device": row.device,
                    "last_seen": row.last_seen,
                    "telemetry": _telemetry(telemetry.get(row.device)),
                }
                for row in ledger.devices()
            ],
            "outcomes": {key.value if key else "open": count for key, count in totals.outcomes.items()},
            "refused": {key.name.lower(): count for key, count in totals.rejects.items()},
            "counters": {key.value: count for key, count in totals.counts.items()},
            "invariant_violations": check_invariants(ledger) if verify else None,
        }
    finally:
        ledger.close()


def render(document: dict[str, Any], console: Console | None = None) -> None:
    """The same for people."""
    console = console or Console()
    rounds: list[dict[str, Any]] = document["rounds"]
    published = sum(row["phase"] == Phase.PUBLISHED.value for row in rounds)
    aborted = sum(row["phase"] == Phase.ABORTED.value for row in rounds)
    console.print(
        f"[bold]{document['federation']}[/bold]  version {document['version']}, "
        f"{published} rounds published, {aborted} aborted; state in {document['folder']}"
    )
    table = Table("round", "phase", "cohort", "stored", "accepted", "seconds", "why", title="newest rounds")
    for row in rounds[:SHOWN_ROUNDS]:
        seconds = f"{row['closed_at'] - row['opened_at']:.2f}" if row["closed_at"] else ""
        accepted = "" if row["accepted"] is None else str(row["accepted"])
        table.add_row(
            str(row["round"]),
            row["phase"],
            str(row["cohort"]),
            str(row["stored"]),
            accepted,
            seconds,
            row["reason"],
        )
    console.print(table)
    devices = Table("device", "seen", "KiB up", "KiB down", "peak MiB", "trained s", title="devices")
    for row in document["devices"]:
        t = row["telemetry"]
        figures = (
            ["", "", "", ""]
            if t is None
            else [
                f"{t['bytes_up'] / 1024:.0f}",
                f"{t['bytes_down'] / 1024:.0f}",
                f"{t['peak_memory_bytes'] / 2**20:.0f}",
                f"{t['train_s']:.1f}",
            ]
        )
        devices.add_row(row["device"], f"{time.time() - row['last_seen']:.0f} s ago", *figures)
    console.print(devices)
    if document["refused"]:
        console.print(
            "refused: " + ", ".join(f"{name} {count}" for name, count in document["refused"].items())
        )
    violations: list[str] | None = document["invariant_violations"]
    if violations == []:
        console.print("the ledger is consistent")
    for violation in violations or ():
        console.print(f"[red]invariant violated:[/red] {escape(violation)}")


def _telemetry(row: Any) -> dict[str, Any] | None:
    if row is None:
        return None
    return {
        name: getattr(row, name)
        for name in ("reports", "train_s", "steps", "samples", "peak_memory_bytes", "bytes_up", "bytes_down")
    }
