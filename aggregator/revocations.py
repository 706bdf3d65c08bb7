"""The registrar's list of certificates that are void: a file, verified each time it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.protocol import certificates
from edge_runtime.protocol.crypto.keys import VerifyKey
from edge_runtime.protocol.crypto.provider import CryptoProvider
from edge_runtime.protocol.errors import Fault, FleetgradError, RemoteProtocolError
from edge_runtime.protocol.identities import RevocationList
from edge_runtime.protocol.ids import DeviceId, FederationId

MAX_FILE_BYTES = 16 << 20  # of hex: more than the largest list has


class RevocationsError(
    FleetgradError,
    fault=Fault.OPERATOR,
    remedy="copy the newest list from the registrar's folder; until then the last good one holds",
):
    """The list of revoked devices cannot be read, is not signed by the root, or is older than the one taken."""


@dataclass(frozen=True)
class RevocationsFile:
    """``path``: hex, as `aggregator registrar revoke` writes it."""

    path: Path
    provider: CryptoProvider
    root: VerifyKey
    federation: FederationId

    def newer_than(self, number: int, revoked: Mapping[DeviceId, int]) -> RevocationList | None:
        """The list, if its number is above ``number``, that of the one taken last; None if it is the same one.

        ``revoked``: by device, the epochs of that one. A registrar that was restored from a backup would give its
        number to another list. A file that is not there is no list yet, as long as none was taken.
        Raises RevocationsError.
        """
        try:
            with self.path.open("rb") as file:
                text = file.read(MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            if number == 0:
                return None
            raise RevocationsError(f"{self.path} is gone; list {number} holds") from None
        except OSError as error:
            raise RevocationsError(f"{self.path}: {error.strerror}; list {number} holds") from error
        try:
            raw = bytes.fromhex(text.decode("ascii")) if len(text) <= MAX_FILE_BYTES else b""
            found = certificates.check_revocations(self.provider, self.root, raw, self.federation)
        except (ValueError, RemoteProtocolError) as error:
            reason = error.detail if isinstance(error, RemoteProtocolError) else "it is no hex"
            raise RevocationsError(f"{self.path} is refused ({reason}); list {number} holds") from error
        if found.number < number:
            raise RevocationsError(f"{self.path} is list {found.number}; the newer list {number} holds")
        if found.number > number:
            return found
        if {entry.device: entry.epoch for entry in found.entries} != revoked:
            raise RevocationsError(
                f"{self.path} is another list {number} than the one taken, which holds: was the registrar restored "
                "from a backup? Revoke again what was revoked since, until its list has a higher number"
            )
        return None
