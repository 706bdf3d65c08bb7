"""Whose fault it is decides the type: ours (LocalProtocolError), the peer's (RemoteProtocolError)."""

from __future__ import annotations

from edge_runtime.protocol.rejects import Reject


class FleetgradError(Exception):
    """Base of every error this project raises on purpose; its text says what, where and what to do."""


class LocalProtocolError(FleetgradError):
    """Our own code broke the protocol: a bug here, never the peer's fault."""


class RemoteProtocolError(FleetgradError):
    """The peer broke the protocol: count it, answer with ``reject``, drop the message.

    ``detail`` is for logs on this side; it never holds key material or data.
    """

    def __init__(self, reject: Reject, detail: str) -> None:
        super().__init__(f"{reject.name.lower()}: {detail}")
        self.reject = reject
        self.detail = detail
