"""``edge-runtime doctor``: what could keep this device from taking part, and what to do about it.

One room for each part of the world: ``look`` gathers facts, ``checks`` judges them and is pure.
"""

from edge_runtime.doctor.check import Check, Outcome
from edge_runtime.doctor.examination import Examination

__all__ = ["Check", "Examination", "Outcome"]
