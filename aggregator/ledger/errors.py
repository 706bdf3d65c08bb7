"""Why the ledger refuses to open or to commit."""

from __future__ import annotations

from edge_runtime.protocol.errors import Fault, FleetgradError


class LedgerError(
    FleetgradError,
    fault=Fault.OPERATOR,
    remedy="check the database that is named; restore it from a backup if it is damaged",
):
    """The ledger cannot be used as it is; the text says why and what the operator can do."""


class LedgerInUseError(
    LedgerError,
    fault=Fault.OPERATOR,
    remedy="stop the other aggregator, or `serve --take-over` if it is gone for good",
):
    """Another aggregator has claimed the ledger and has not released it."""


class FencedError(
    LedgerError, fault=Fault.OPERATOR, remedy="nothing here: another aggregator has taken over"
):
    """Another aggregator has claimed the ledger since; this one must stop at once, nothing was committed."""
