"""The whole document as tables for people: ``aggregator status``."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from aggregator.status.figures import Sparkline, duration, size
from edge_runtime.protocol.rounds import Phase

SHOWN_ROUNDS = 10
SHOWN_ORDERS = 5
DESCRIBES = ("version", "at", "samples")  # of an evaluation; all else in it are metrics

Document = dict[str, Any]


def render(document: Document, console: Console | None = None) -> None:
    """``document``: of ``collect``."""
    console = console or Console()
    rounds = document["rounds_by_phase"]
    published, aborted = rounds.get(Phase.PUBLISHED.value, 0), rounds.get(Phase.ABORTED.value, 0)
    console.print(
        f"[bold]{document['federation']}[/bold]  version {document['version']}, {document['state']}, "
        f"{published} rounds published, {aborted} aborted; state in {document['folder']}"
    )
    if document["rounds"]:
        console.print(rounds_table(document, SHOWN_ROUNDS, title="newest rounds"))
    if document["devices"]:
        console.print(devices_table(document, title="devices"))
    else:
        console.print("no device has checked in yet: they enrol, then `edge-runtime run`")
    for name, values in metrics_of(document).items():
        known = [value for value in values if value is not None]
        if known:
            console.print(
                f"{name:10} {known[-1]:.4f}  ", Sparkline(values, console.width - 24), sep="", end=""
            )
    for row in document["orders"][:SHOWN_ORDERS]:
        console.print(order_line(row))
    if document["refused"]:
        console.print(refused_line(document))
    violations: list[str] | None = document["invariant_violations"]
    if violations == []:
        console.print("the ledger is consistent")
    for violation in violations or ():
        console.print(f"[red]invariant violated:[/red] {escape(violation)}")


def rounds_table(document: Document, count: int, title: str | None = None) -> Table:
    """The newest ``count`` rounds, one a line."""
    table = Table("round", "phase", "cohort", "stored", "accepted", "seconds", "why", title=title)
    for row in document["rounds"][:count]:
        seconds = f"{row['closed_at'] - row['opened_at']:.2f}" if row["closed_at"] else ""
        accepted = "" if row["accepted"] is None else str(row["accepted"])
        counts = (str(row["cohort"]), str(row["stored"]), accepted)
        table.add_row(str(row["round"]), row["phase"], *counts, seconds, escape(row["reason"] or ""))
    return table


def devices_table(document: Document, count: int | None = None, title: str | None = None) -> Table:
    """By name; with a ``count`` those in the round first, then who was seen last."""
    rows = document["devices"]
    if count is not None:
        rows = sorted(rows, key=lambda row: (not row["selected"], -row["last_seen"]))[:count]
    table = Table("device", "seen", "up", "down", "peak", "trained", "", title=title)
    now = document["at"]
    for row in rows:
        told = row["telemetry"]
        figures = ["", "", "", ""]
        if told is not None:
            sizes = [size(told[name]) for name in ("bytes_up", "bytes_down", "peak_memory_bytes")]
            figures = [*sizes, f"{told['train_s']:.1f} s"]
        table.add_row(row["device"], f"{duration(now - row['last_seen'])} ago", *figures, device_note(row))
    return table


def device_note(row: Document) -> str:
    """What an operator decided about it, else whether the open round waits for it."""
    if row["revoked_epoch"] is not None:
        return "[red]revoked[/red]"
    if row["evicted_at"] is not None:
        return "[yellow]evicted[/yellow]"
    return "selected" if row["selected"] else ""


def metrics_of(document: Document) -> dict[str, list[float | None]]:
    """Each metric of the evaluations by version, in order; None where a version has it not."""
    rows = document["evaluations"]
    names = sorted({name for row in rows for name in row if name not in DESCRIBES})
    return {name: [row.get(name) for row in rows] for name in names}


def order_line(row: Document) -> str:
    """An order and its answer."""
    what = escape(f"{row['kind']} {row['argument']}".strip())
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["at"]))
    if row["settled_at"] is None:
        answer = "[yellow]waits[/yellow]: `aggregator serve` obeys it"
    else:
        answer = ("" if row["obeyed"] else "[red]refused[/red]: ") + escape(row["answer"] or "")
    return f"order {row['id']} of {when} by {escape(row['by'])}: {what}; {answer}"


def refused_line(document: Document) -> str:
    """Refused messages by reason, most frequent first."""
    counts = sorted(document["refused"].items(), key=lambda item: (-item[1], item[0]))
    return "refused: " + ", ".join(f"{name} {count}" for name, count in counts)
