"""Identities: short names from fixed alphabets, and digests. Nothing here can hold ``+ # /`` or a dot-dot."""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple, NewType

from edge_runtime.protocol.errors import RemoteProtocolError
from edge_runtime.protocol.rejects import Reject

FederationId = NewType("FederationId", str)
DeviceId = NewType("DeviceId", str)
Digest = NewType("Digest", bytes)

NAME_PATTERN = r"[a-z0-9](?:[a-z0-9_-]{0,46}[a-z0-9])?"
_NAME = re.compile(NAME_PATTERN)
DIGEST_BYTES = 32
SHARDS = 256


class RoundId(NamedTuple):
    """Ordered (generation, number): a device that has seen one never goes back."""

    generation: int
    number: int


def federation_id(text: str) -> FederationId:
    """A federation's name: 1-48 of ``a-z 0-9 _ -``, beginning and ending with a letter or digit.

    Raises RemoteProtocolError(MALFORMED).
    """
    return FederationId(_name("federation", text))


def device_id(text: str) -> DeviceId:
    """A device's name, same alphabet as a federation's. Raises RemoteProtocolError(MALFORMED)."""
    return DeviceId(_name("device", text))


def _name(what: str, text: str) -> str:
    if not _NAME.fullmatch(text):
        raise RemoteProtocolError(
            Reject.MALFORMED, f"{text[:60]!r} is no {what} name: 1-48 of a-z 0-9 _ -, no _ or - at the ends"
        )
    return text


def digest(raw: bytes) -> Digest:
    """Bytes as a SHA-256 digest. Raises RemoteProtocolError(MALFORMED) unless there are 32."""
    if len(raw) != DIGEST_BYTES:
        raise RemoteProtocolError(Reject.MALFORMED, f"a digest has {DIGEST_BYTES} bytes, not {len(raw)}")
    return Digest(raw)


def sha256(*parts: bytes) -> Digest:
    """SHA-256 over the parts, joined."""
    state = hashlib.sha256()
    for part in parts:
        state.update(part)
    return Digest(state.digest())


def shard_of(device: DeviceId) -> int:
    """SHA-256(device) mod 256: workers split the load by it on any broker."""
    return hashlib.sha256(device.encode()).digest()[-1]
