"""Why the ledger refuses to open or to commit."""

from __future__ import annotations

from edge_runtime.protocol.errors import FleetgradError


class LedgerError(FleetgradError):
    """The ledger cannot be used as it is; the text says why and what the operator can do."""


class LedgerInUseError(LedgerError):
    """Another aggregator has claimed the ledger and has not released it."""


class FencedError(LedgerError):
    """Another aggregator has claimed the ledger since; this one must stop at once, nothing was committed."""
