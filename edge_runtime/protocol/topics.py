"""The topic grammar. Every topic has at most seven slashes and parts from fixed alphabets.

fl/1/<federation>/manifest              retained: the open round
fl/1/<federation>/s/<device>            retained presence with last will: a display hint, never a decision
fl/1/<federation>/up/<shard>/<device>   all that a device says to the aggregator
fl/1/<federation>/e/<device>            what a device says to the registrar
fl/1/<federation>/d/<device>            all that is said to one device
fl/1/<federation>/b/<digest>/<piece>    a blob's chunks, published once for all who fetch ("index", 0, 1, ...)
"""

from __future__ import annotations

from typing import NamedTuple

from edge_runtime.protocol.errors import RemoteProtocolError
from edge_runtime.protocol.ids import DeviceId, Digest, FederationId, device_id, federation_id, shard_of
from edge_runtime.protocol.kinds import Direction, Kind
from edge_runtime.protocol.rejects import Reject

PREFIX = "fl/1"
INDEX_PIECE = "index"


def manifest(federation: FederationId) -> str:
    return f"{PREFIX}/{federation}/manifest"


def presence(federation: FederationId, device: DeviceId) -> str:
    return f"{PREFIX}/{federation}/s/{device}"


def up(federation: FederationId, device: DeviceId) -> str:
    return f"{PREFIX}/{federation}/up/{shard_of(device)}/{device}"


def enrol(federation: FederationId, device: DeviceId) -> str:
    return f"{PREFIX}/{federation}/e/{device}"


def down(federation: FederationId, device: DeviceId) -> str:
    return f"{PREFIX}/{federation}/d/{device}"


def blob_piece(federation: FederationId, blob: Digest, piece: int | None) -> str:
    """Where one piece of a blob is published; ``None`` is its index."""
    return f"{PREFIX}/{federation}/b/{blob.hex()}/{INDEX_PIECE if piece is None else piece}"


def all_up(federation: FederationId) -> str:
    """What the aggregator subscribes to."""
    return f"{PREFIX}/{federation}/up/+/+"


def all_enrol(federation: FederationId) -> str:
    """What the registrar subscribes to."""
    return f"{PREFIX}/{federation}/e/+"


def all_pieces(federation: FederationId, blob: Digest) -> str:
    """What a device subscribes to while it fetches this blob."""
    return f"{PREFIX}/{federation}/b/{blob.hex()}/+"


def up_topic(kind: Kind, federation: FederationId, device: DeviceId) -> str:
    """Where a device says a message of this kind."""
    if kind.direction is not Direction.UP:
        raise ValueError(f"{kind.name} does not travel up")
    return enrol(federation, device) if kind is Kind.ENROL else up(federation, device)


class Sender(NamedTuple):
    federation: FederationId
    device: DeviceId


def sender_of(topic: str) -> Sender:
    """Who a topic under ``up/`` or ``e/`` belongs to.

    Raises RemoteProtocolError(WRONG_TOPIC): another shape, or a shard that is not the device's.
    """
    parts = topic.split("/")
    try:
        if parts[:2] == PREFIX.split("/") and parts[3:4] == ["up"] and len(parts) == 6:
            sender = Sender(federation_id(parts[2]), device_id(parts[5]))
            if parts[4] == str(shard_of(sender.device)):
                return sender
        if parts[:2] == PREFIX.split("/") and parts[3:4] == ["e"] and len(parts) == 5:
            return Sender(federation_id(parts[2]), device_id(parts[4]))
    except RemoteProtocolError as error:
        raise RemoteProtocolError(Reject.WRONG_TOPIC, error.detail) from None
    raise RemoteProtocolError(Reject.WRONG_TOPIC, f"{topic[:120]!r} is no sender's topic")
