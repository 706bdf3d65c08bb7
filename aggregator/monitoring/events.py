"""What the aggregator says while it runs: one table, for the log's levels and for docs/operations.md."""

from __future__ import annotations

from typing import NamedTuple


class EventRow(NamedTuple):
    """``fields``: what it carries besides time, event, level and federation; not each of them every time."""

    level: str
    fields: tuple[str, ...]
    meaning: str


EVENTS: dict[str, EventRow] = {
    "monitoring": EventRow("info", ("url",), "metrics and health can be asked for at this address"),
    "connected": EventRow(
        "info", ("session_present",), "the broker answered; the manifest is announced again"
    ),
    "disconnected": EventRow("warning", ("reason",), "the connection to the broker ended; it is tried again"),
    "resumed": EventRow("info", ("round", "phase"), "a restart goes on with the round that was open"),
    "round_opened": EventRow(
        "info", ("round", "cohort", "base_version"), "a round began: these devices are asked for updates"
    ),
    "update_stored": EventRow(
        "info", ("round", "device", "samples"), "an update is durable and will get one outcome"
    ),
    "update_late": EventRow(
        "info", ("round", "device"), "an update came after the cut-off and is not counted"
    ),
    "update_again": EventRow(
        "info", ("round", "device"), "a stored update came again; its receipt is repeated"
    ),
    "refused": EventRow(
        "warning",
        ("device", "round", "reject", "detail", "topic"),
        "a message was refused; `device` is whom its topic names, `reject` the reason",
    ),
    "round_frozen": EventRow("info", ("round", "accepted"), "the updates of these devices make the version"),
    "round_published": EventRow(
        "info", ("round", "version", "updates", "folder"), "the round is over and its version is on disk"
    ),
    "round_aborted": EventRow("warning", ("round", "reason"), "the round made no version; the model stays"),
    "finished": EventRow("info", ("version",), "all rounds of the settings are done"),
    "evaluated": EventRow(
        "info", ("version", "samples"), "a version on held-out data; a field for each metric"
    ),
    "evaluation_failed": EventRow("warning", ("version", "reason"), "there are no figures for this version"),
    "standing_orders": EventRow(
        "info", ("paused", "draining", "evicted", "revoked"), "what earlier orders still mean at this start"
    ),
    "order_obeyed": EventRow(
        "info", ("order", "kind", "argument", "by", "answer"), "an operator's order took effect"
    ),
    "order_refused": EventRow(
        "warning", ("order", "kind", "argument", "by", "answer"), "an operator's order changed nothing"
    ),
    "version_restored": EventRow(
        "info",
        ("version", "restored_from", "folder"),
        "a rollback: this version has an earlier one's parameters",
    ),
    "drained": EventRow("info", (), "the last round is over and the aggregator exits, as it was ordered"),
    "revocations_taken": EventRow("info", ("number", "devices"), "the root's new list of revocations counts"),
    "revocations_refused": EventRow(
        "warning", ("reason",), "the list of revocations is not used; the last one is"
    ),
    "library": EventRow("as given", ("logger", "message"), "what a library or the transport had to say"),
}
