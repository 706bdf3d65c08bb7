"""The registrar: a program of its own that keeps the root key, answers enrolment and issues certificates.

The aggregator's service shares nothing with it but the root's public key (docs/decisions/0004).
"""

from aggregator.registrar.authority import Registrar, create, open
from aggregator.registrar.folder import RegistrarError
from aggregator.registrar.store import DeviceRow, TokenRow

__all__ = ["DeviceRow", "Registrar", "RegistrarError", "TokenRow", "create", "open"]
