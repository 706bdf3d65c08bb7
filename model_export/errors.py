"""Why a model makes no artifact. Every text says what, where in the model, and what can be done."""

from __future__ import annotations

from edge_runtime.protocol.errors import FleetgradError


class ExportError(FleetgradError):
    """The model cannot be exported."""


class UnsupportedModel(ExportError):
    """Something in the model (a module, dtype, buffer, shape) is not covered by this version."""


class MissingRule(ExportError):
    """An operator on the way from a parameter to the loss has no gradient rule, or not in this form."""


class ParityError(ExportError):
    """The exported graphs do not compute what torch computes; no artifact was written."""
