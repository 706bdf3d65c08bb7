"""The X25519 key of each round: on disk before the manifest that names it, gone when the round is over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from aggregator.files import make_private_folder, sync_folder, write_atomic
from edge_runtime.protocol.crypto.keys import SealingPrivateKey
from edge_runtime.protocol.crypto.provider import CryptoProvider
from edge_runtime.protocol.errors import Fault, FleetgradError
from edge_runtime.protocol.ids import RoundId


class RoundKeyMissing(
    FleetgradError,
    fault=Fault.OPERATOR,
    remedy="nothing: the round is aborted and the next one opens; keep round-keys when a folder is moved",
):
    """The open round's private key is gone, so its updates cannot be opened."""


class RoundKeys:
    """One file per round, mode 0600. Deleting it makes every recorded ciphertext of the round useless."""

    def __init__(self, folder: Path, provider: CryptoProvider, entropy: Callable[[int], bytes]) -> None:
        self._folder = folder
        self._provider = provider
        self._entropy = entropy
        make_private_folder(folder)

    def create(self, round_id: RoundId) -> SealingPrivateKey:
        """A fresh key, durable when this returns; one that a crash left behind unpublished is replaced."""
        key = self._provider.generate_sealing_key(self._entropy(32))
        write_atomic(self._path(round_id), key.to_bytes())
        return key

    def get(self, round_id: RoundId) -> SealingPrivateKey:
        """Raises RoundKeyMissing."""
        try:
            return SealingPrivateKey(self._path(round_id).read_bytes())
        except FileNotFoundError:
            raise RoundKeyMissing(f"{self._path(round_id)} is gone; the round can only be aborted") from None

    def destroy(self, round_id: RoundId) -> None:
        """Gone, durably, when this returns; doing it again is fine."""
        self._path(round_id).unlink(missing_ok=True)
        sync_folder(self._folder)

    def destroy_all_but(self, keep: RoundId | None) -> None:
        """After a crash: only the open round may have a key."""
        for path in self._folder.glob("*.key"):
            if keep is None or path != self._path(keep):
                path.unlink()
        sync_folder(self._folder)

    def _path(self, round_id: RoundId) -> Path:
        return self._folder / f"{round_id.generation:06d}-{round_id.number:08d}.key"
