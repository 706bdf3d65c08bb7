"""One case of the blob measurement, as the three processes of a run hand it to one another."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import Enum

from edge_runtime.protocol.crypto.keys import SigningKey
from edge_runtime.protocol.crypto.prg import Stream
from edge_runtime.protocol.ids import DeviceId, FederationId, sha256

FEDERATION = FederationId("perftest")
# No secret: the whole fleet signs with it, so that the server has the work of verifying, without an enrolment.
FLEET_KEY = SigningKey(sha256(b"flperftest fleet"))


class Path(str, Enum):
    """How a client fetches: it asks for the wave first, or each one pulls everything for itself."""

    WAVE = "wave"
    PULL = "pull"


@dataclass(frozen=True, kw_only=True)
class BlobCase:
    """``processes``: over so many the clients are spread. ``timeout_s``: who has not all by then counts as lost."""

    path: Path
    clients: int
    size_bytes: int
    chunk_bytes: int
    gather_s: float
    bytes_per_s: float
    processes: int
    timeout_s: float
    broker: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> BlobCase:
        fields = json.loads(text)
        return cls(**{**fields, "path": Path(fields["path"])})

    def devices(self, process: int) -> list[DeviceId]:
        """The clients of one process, numbered from 0."""
        return [DeviceId(f"client-{i:05d}") for i in range(process, self.clients, self.processes)]


def content_of(size: int) -> bytes:
    """The blob: bytes that no compression makes smaller, the same in every process."""
    return Stream(bytes(32)).bytes(size)
