"""Where training had come to, so that a device that dies in a round goes on with it. One round, one file.

Only a saving of time: what is damaged, or of another round, model, order of batches or data, is removed.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.protocol.ids import Digest
from edge_runtime.store import records
from edge_runtime.store.files import TEMPORARY_SUFFIX, FileLayer
from edge_runtime.store.records import DamagedFileError

_KIND = "checkpoint"
_SUFFIX = ".checkpoint"
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class SavedCheckpoint:
    """``content``: of ``Checkpoint.to_bytes``. ``trained_s``: seconds of training behind it."""

    content: bytes
    trained_s: float


class Checkpoints:
    """By the digest of the manifest, which names round, model, artifact and plan.

    ``binding``: digest of all else that the rest of the training depends on: order of batches and data.
    """

    def __init__(self, folder: Path, files: FileLayer) -> None:
        self._folder = folder
        self._files = files
        names = (path.name.removesuffix(_SUFFIX) for path in folder.glob(f"*{_SUFFIX}"))
        self._held = {Digest(bytes.fromhex(name)) for name in names if _HEX.fullmatch(name)}

    def put(self, manifest: Digest, binding: Digest, saved: SavedCheckpoint) -> None:
        """Durable when this returns; cut off before, the one before it is still there.

        OSError passes through, and leaves nothing behind that fills the disk further.
        """
        header = {
            "manifest": manifest.hex(),
            "binding": binding.hex(),
            "trained_ms": max(round(saved.trained_s * 1000), 0),
        }
        path = self._path(manifest)
        try:
            self._files.replace(path, records.encode(_KIND, header, [saved.content]))
        except OSError:
            with contextlib.suppress(OSError):
                self._files.remove(path.with_name(path.name + TEMPORARY_SUFFIX))
            raise
        self._held.add(manifest)

    def get(self, manifest: Digest, binding: Digest) -> SavedCheckpoint | None:
        """None: none is there, or none that fits; that one is removed.

        Raises DamagedFileError, after it has removed the file.
        """
        try:
            record = records.read(_KIND, self._path(manifest))
            if record is None:
                return None
            found = (record.digest("manifest"), record.digest("binding"))
            trained_s = record.integer("trained_ms") / 1000
        except DamagedFileError:
            self._discard(manifest)
            raise
        if found != (manifest, binding):
            self._discard(manifest)
            return None
        return SavedCheckpoint(content=bytes(record.content), trained_s=trained_s)

    def keep_only(self, manifest: Digest | None) -> None:
        """All others are of rounds that are over; None: every one is."""
        for other in self._held - {manifest}:
            self._discard(other)

    def _discard(self, manifest: Digest) -> None:
        self._files.discard(self._path(manifest))
        self._held.discard(manifest)

    def _path(self, manifest: Digest) -> Path:
        return self._folder / f"{manifest.hex()}{_SUFFIX}"


def read_trained_s(folder: Path) -> float | None:
    """Seconds of training behind the newest checkpoint in ``folder``, read without the lock; None: there is none.

    Raises DamagedFileError.
    """
    seconds = [
        record.integer("trained_ms") / 1000
        for path in folder.glob(f"*{_SUFFIX}")
        if (record := records.read(_KIND, path)) is not None
    ]
    return max(seconds, default=None)
