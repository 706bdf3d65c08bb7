"""One process per state folder: the kernel's lock, which dies with its holder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from edge_runtime.store.files import FILE_MODE
from edge_runtime.store.records import StateError


class FolderLock:
    """An exclusive flock(2) on ``path``; the file holds the holder's process id, for the error message only."""

    def __init__(self, path: Path) -> None:
        """Raises StateError naming the process that holds it."""
        self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, FILE_MODE)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._descriptor, 20, 0).decode("ascii", "replace").strip() or "unknown"
            self.release()
            raise StateError(
                f"{path.parent} is in use by process {holder}: stop that edge-runtime, or use another state_folder"
            ) from None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Lets the next process in. Doing it twice is fine."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
