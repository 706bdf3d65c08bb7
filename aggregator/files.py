"""What the aggregator does to files: whole or not at all, and private.

POSIX promises that a rename is all or nothing; only the two syncs around it promise that it survives a power cut
(Pillai et al. 2014, "All File Systems Are Not Created Equal").
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

FILE_MODE = 0o600
FOLDER_MODE = 0o700
TEMPORARY_SUFFIX = ".tmp"


def make_private_folder(path: Path) -> None:
    """The folder, mode 0700, durably, with its parents; an existing one is left as it is."""
    if path.is_dir():
        return
    make_private_folder(path.parent)
    path.mkdir(mode=FOLDER_MODE, exist_ok=True)
    sync_folder(path.parent)


def write_atomic(path: Path, *parts: bytes, mode: int = FILE_MODE) -> None:
    """``path`` holds the joined parts, durably, when this returns; until then the old content or none.

    OSError passes through: a full disk must stop the caller. Not for two writers of one path at a time.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode)
    with open(descriptor, "wb") as file:  # noqa: PTH123 - of a descriptor
        os.fchmod(descriptor, mode)  # a file left by a crash keeps its old mode otherwise
        file.writelines(parts)
        file.flush()
        os.fsync(descriptor)
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """The entries of a folder (created, renamed, removed names) are durable when this returns."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class FileLayer:
    """The operations of the segment log, so that a test can stand between it and the disk.

    OSError passes through. ``descriptor`` comes from ``open_for_append``.
    """

    def open_for_append(self, path: Path) -> int:
        """Creates the file, mode 0600, if it is not there; its folder is not synced."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(path, flags, FILE_MODE)

    def append(self, descriptor: int, parts: Sequence[bytes]) -> None:
        """All of the joined parts; not durable."""
        written = os.writev(descriptor, parts)
        if written < sum(map(len, parts)):
            rest = memoryview(b"".join(parts))[written:]
            while rest:
                rest = rest[os.write(descriptor, rest) :]

    def sync(self, descriptor: int) -> None:
        """Content and length are durable when this returns."""
        os.fdatasync(descriptor)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """At most ``size`` bytes from ``offset``; fewer at the end of the file."""
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            parts: list[bytes] = []
            while size > 0 and (part := file.read(size)):
                parts.append(part)
                size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def truncate(self, path: Path, size: int) -> None:
        """Durable when this returns."""
        descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
        try:
            os.ftruncate(descriptor, size)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def make_folder(self, path: Path) -> None:
        make_private_folder(path)

    def remove_folder(self, path: Path) -> None:
        """An empty one; durable when this returns."""
        path.rmdir()
        sync_folder(path.parent)

    def sync_folder(self, path: Path) -> None:
        sync_folder(path)
