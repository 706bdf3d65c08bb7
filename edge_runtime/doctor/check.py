"""One finding of ``edge-runtime doctor``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Outcome(Enum):
    """``WARNING``: it works, but not well or not for long. ``UNKNOWN``: it could not be looked at."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Check:
    """``finding``: what is there. ``remedy``: what to do; empty where nothing is."""

    name: str
    outcome: Outcome
    finding: str
    remedy: str = ""

    def to_document(self) -> dict[str, str]:
        return {
            "name": self.name,
            "outcome": self.outcome.value,
            "finding": self.finding,
            "remedy": self.remedy,
        }


def good(name: str, finding: str) -> Check:
    return Check(name, Outcome.OK, finding)


def warning(name: str, finding: str, remedy: str) -> Check:
    return Check(name, Outcome.WARNING, finding, remedy)


def problem(name: str, finding: str, remedy: str) -> Check:
    return Check(name, Outcome.PROBLEM, finding, remedy)


def unknown(name: str, finding: str, remedy: str = "") -> Check:
    return Check(name, Outcome.UNKNOWN, finding, remedy)
