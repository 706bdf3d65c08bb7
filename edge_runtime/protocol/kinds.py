"""Every kind of message, once: direction, signer, sealing, size. Topics, ACLs and checks are derived from it."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from edge_runtime.protocol.errors import RemoteProtocolError
from edge_runtime.protocol.rejects import Reject

KIB = 1024
MIB = 1024 * KIB


class Direction(Enum):
    UP = "device to server"
    DOWN = "server to one device"
    BROADCAST = "server to all devices"


class Signer(Enum):
    DEVICE = "the device's own key"
    AGGREGATOR = "the key of the aggregator's certificate"
    ROOT = "the registrar's root key"
    CONTENT = "nobody: the digest it was asked by proves it"


class _Row(NamedTuple):
    number: int
    direction: Direction
    signer: Signer
    sealed: bool
    max_payload_bytes: int
    purpose: str


class Kind(Enum):
    """The value's first field is the wire number. Numbers are for ever; 3, 6, 7, 12 and 13 are reserved."""

    ENROL = _Row(1, Direction.UP, Signer.DEVICE, True, 4 * KIB, "ask the registrar for a device certificate")
    CHECKIN = _Row(2, Direction.UP, Signer.DEVICE, True, 8 * KIB, "one ticket for one selection")
    FETCH = _Row(4, Direction.UP, Signer.DEVICE, False, 64 * KIB, "ask for a blob, or for its missing chunks")
    UPDATE = _Row(5, Direction.UP, Signer.DEVICE, True, 512 * MIB, "the result of local training")
    TELEMETRY = _Row(8, Direction.UP, Signer.DEVICE, True, 4 * KIB, "time, memory and traffic; never needed")
    RECEIPT = _Row(
        9, Direction.DOWN, Signer.AGGREGATOR, False, 16 * KIB, "what became of an update on arrival"
    )
    CHUNK = _Row(10, Direction.DOWN, Signer.CONTENT, False, 17 * MIB, "one piece of a blob")
    ENROLLED = _Row(11, Direction.DOWN, Signer.ROOT, False, 4 * KIB, "the registrar's answer")
    MANIFEST = _Row(14, Direction.BROADCAST, Signer.AGGREGATOR, False, 16 * KIB, "the open round")

    @property
    def number(self) -> int:
        return self.value.number

    @property
    def direction(self) -> Direction:
        return self.value.direction

    @property
    def signer(self) -> Signer:
        return self.value.signer

    @property
    def sealed(self) -> bool:
        return self.value.sealed

    @property
    def max_payload_bytes(self) -> int:
        return self.value.max_payload_bytes

    @property
    def label(self) -> str:
        """The name that signatures and seals are bound to, e.g. ``update``."""
        return self.name.lower()

    @classmethod
    def from_number(cls, number: int) -> Kind:
        """The kind with this wire number. Raises RemoteProtocolError(UNEXPECTED_KIND)."""
        kind = _BY_NUMBER.get(number)
        if kind is None:
            raise RemoteProtocolError(Reject.UNEXPECTED_KIND, f"no kind has number {number}")
        return kind


_BY_NUMBER = {kind.number: kind for kind in Kind}
