"""Whose fault an error or a refusal is: the table that errors, refusals and docs/errors.md share."""

from __future__ import annotations

from enum import Enum


class Fault(Enum):
    """Who can mend it."""

    NOBODY = "nobody: it happens in a healthy run"
    BUG = "a bug of this project: report it"
    PEER = "whoever sent the message"
    MODELLER = "the modeller, in the model or the artifact"
    OPERATOR = "the operator, in settings, keys or folders of the server"
    ENGINEER = "the device's engineer, in settings, data or installation"
    SURROUNDINGS = "the machine, its disk or the network"
