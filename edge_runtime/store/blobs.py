"""Blobs a device has verified before, so that an artifact is fetched once and not every round."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from edge_runtime.protocol.ids import Digest
from edge_runtime.store import records
from edge_runtime.store.files import FileLayer

_KIND = "blob"
_SUFFIX = ".blob"
_HEX = re.compile(r"[0-9a-f]{64}")


class BlobCache:
    """Content by the digest of its index. Only a cache: what is damaged is dropped and fetched again."""

    def __init__(self, folder: Path, files: FileLayer, max_bytes: int) -> None:
        self._folder = folder
        self._files = files
        self._max_bytes = max_bytes

    def get(self, digest: Digest) -> bytes | None:
        """The content that was put under ``digest``; None: fetch it."""
        path = self._path(digest)
        try:
            record = records.read(_KIND, path)
        except records.DamagedFileError:
            self._files.discard(path)
            return None
        return bytes(record.content) if record else None

    def digests(self) -> frozenset[Digest]:
        """What is kept. ``get`` may still answer None: damage shows when a file is read."""
        names = (path.name.removesuffix(_SUFFIX) for path in self._folder.glob(f"*{_SUFFIX}"))
        return frozenset(Digest(bytes.fromhex(name)) for name in names if _HEX.fullmatch(name))

    def put(self, digest: Digest, content: bytes) -> frozenset[Digest]:
        """Keeps verified content, forgets the least recently put beyond ``max_bytes``; returns what it forgot."""
        before = self.digests()
        self._files.replace(self._path(digest), records.encode(_KIND, {"digest": digest.hex()}, [content]))
        kept = 0
        by_age = sorted(
            self._folder.glob(f"*{_SUFFIX}"), key=lambda path: path.stat().st_mtime_ns, reverse=True
        )
        for path in by_age:
            kept += path.stat().st_size
            if kept > self._max_bytes and path != self._path(digest):
                self._files.remove(path)
        return before - self.digests()

    def _path(self, digest: Digest) -> Path:
        return self._folder / f"{digest.hex()}{_SUFFIX}"


def read_newest(folder: Path) -> bytes | None:
    """The content put last into ``folder``, read without the store's lock; None: there is none that is whole."""
    by_age = []
    for path in folder.glob(f"*{_SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):  # forgotten meanwhile
            by_age.append((path.stat().st_mtime_ns, path))
    for _, path in sorted(by_age, reverse=True):
        try:
            record = records.read(_KIND, path)
        except records.DamagedFileError:
            continue
        if record is not None:
            return bytes(record.content)
    return None
