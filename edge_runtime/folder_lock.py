"""One process per state folder: the kernel's lock, which dies with its holder."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from edge_runtime.protocol.errors import Fault, FleetgradError

LOCK_NAME = "lock"
_MODE = 0o600
_ATTEMPTS, _PAUSE_S = 3, 0.01


class FolderInUseError(
    FleetgradError,
    fault=Fault.ENGINEER,
    remedy="stop the program that is named, or give this one its own folder",
):
    """Another process holds the folder; the text names it."""


class FolderLock:
    """An exclusive flock(2) on ``folder/lock``: the kernel's, so it dies with its holder.

    The file holds the holder's process id, for the error message only.
    """

    def __init__(self, folder: Path) -> None:
        """Raises FolderInUseError naming the process that holds the folder."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor: int | None = os.open(folder / LOCK_NAME, flags, _MODE)
        for patience in reversed(range(_ATTEMPTS)):
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if patience:  # ``holder_of`` of another process takes it for a moment
                    time.sleep(_PAUSE_S)
                    continue
                holder = _named_in(self._descriptor)
                self.release()
                raise FolderInUseError(
                    f"{folder} is in use by process {holder}: stop that one, or use another folder"
                ) from None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Lets the next process in. Doing it twice is fine."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def holder_of(folder: Path) -> str | None:
    """The process id of whoever holds ``folder``, "unknown" if it does not say; None: nobody does.

    OSError passes through, except that a folder without a lock file is held by nobody.
    """
    try:
        descriptor = os.open(folder / LOCK_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _named_in(descriptor)
    finally:
        os.close(descriptor)
    return None


def _named_in(descriptor: int) -> str:
    return os.pread(descriptor, 20, 0).decode("ascii", "replace").strip() or "unknown"
