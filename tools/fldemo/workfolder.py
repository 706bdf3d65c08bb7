"""The folder of a run: fresh each time, and never one that is not ours to remove."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_runtime.protocol.errors import Fault, FleetgradError

MARKER = "made-by-fldemo"
_TEXT = "fldemo made this folder and removes all that is in it when it runs again.\n"


class WorkFolderError(
    FleetgradError, fault=Fault.ENGINEER, remedy="name a new folder, or one of an earlier demo"
):
    """The folder cannot be used; the text says why."""


@contextmanager
def fresh_folder(path: Path) -> Iterator[Path]:
    """``path``, absolute and empty but for our marker, locked while the block runs.

    What an earlier run left is removed. Raises WorkFolderError: not empty and not ours, another run is in it, the
    disk.
    """
    path = path.resolve()
    try:
        lock = _claim(path)
    except OSError as error:
        raise WorkFolderError(f"{error.filename or path}: {error.strerror or error}") from error
    try:
        yield path
    finally:
        os.close(lock)


def _claim(path: Path) -> int:
    """The descriptor that holds the lock."""
    marker = path / MARKER
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()) and not marker.is_file():
        raise WorkFolderError(
            f"{path} is not empty and no demo made it: name another with --folder, or empty it yourself"
        )
    lock = os.open(marker, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for entry in path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry != marker:
                entry.unlink()
        os.truncate(lock, 0)
        os.write(lock, _TEXT.encode())
    except BaseException as error:
        os.close(lock)
        if isinstance(error, BlockingIOError):
            raise WorkFolderError(f"another demo runs in {path}: wait for it, or use --folder") from None
        raise
    return lock
