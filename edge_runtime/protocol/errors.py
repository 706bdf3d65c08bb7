"""Whose fault it is decides the type: ours (LocalProtocolError), the peer's (RemoteProtocolError)."""

from __future__ import annotations

from typing import ClassVar

from edge_runtime.protocol.faults import Fault as Fault
from edge_runtime.protocol.rejects import Reject


class FleetgradError(Exception):
    """Base of every error this project raises on purpose; its text says what, where and what to do.

    A subclass names ``fault`` and ``remedy`` once, in its class statement, or inherits them; ``docs/errors.md``
    is generated from them and from the first line of its docstring.
    """

    fault: ClassVar[Fault] = Fault.BUG
    remedy: ClassVar[str] = ""

    def __init_subclass__(cls, *, fault: Fault | None = None, remedy: str | None = None) -> None:
        super().__init_subclass__()
        if fault is not None:
            cls.fault = fault
        if remedy is not None:
            cls.remedy = remedy


class LocalProtocolError(
    FleetgradError, fault=Fault.BUG, remedy="report it, with the log of the program that stopped"
):
    """Our own code broke the protocol: a bug here, never the peer's fault."""


class RemoteProtocolError(
    FleetgradError, fault=Fault.PEER, remedy="see the code of its refusal in the table of refusals"
):
    """The peer broke the protocol: count it, answer with ``reject``, drop the message.

    ``detail`` is for logs on this side; it never holds key material or data.
    """

    def __init__(self, reject: Reject, detail: str) -> None:
        super().__init__(f"{reject.name.lower()}: {detail}")
        self.reject = reject
        self.detail = detail
