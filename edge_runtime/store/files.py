"""Every change the store makes on disk, as five operations that a test can interrupt or undo.

A file is replaced by: write a temporary file beside it, sync it, rename it over, sync the folder. POSIX
promises the rename is all or nothing; only the two syncs promise that it survives a power cut
(Pillai et al. 2014, "All File Systems Are Not Created Equal").
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp"
FILE_MODE = 0o600
FOLDER_MODE = 0o700


class FileLayer:
    """The operations. OSError passes through: a full or read-only disk must stop the device, not be skipped."""

    def write(self, path: Path, parts: Sequence[bytes]) -> None:
        """Creates or truncates ``path`` with the joined parts, mode 0600; not durable."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, FILE_MODE)
        with open(descriptor, "wb") as file:  # noqa: PTH123 - of a descriptor
            file.writelines(parts)

    def sync(self, path: Path) -> None:
        """Content of a file, or entries of a folder: durable when this returns."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        source.replace(target)

    def remove(self, path: Path) -> None:
        """A file that is not there is fine: an earlier run may have been cut off after this step."""
        path.unlink(missing_ok=True)

    def make_folder(self, path: Path) -> None:
        path.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)

    # ---- composed -----------------------------------------------------------------------------------

    def replace(self, path: Path, parts: Sequence[bytes]) -> None:
        """``path`` holds the joined parts, durably, when this returns; before that, the old content or the new."""
        temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
        self.write(temporary, parts)
        self.sync(temporary)
        self.rename(temporary, path)
        self.sync(path.parent)

    def discard(self, path: Path) -> None:
        """``path`` is gone, durably, when this returns."""
        self.remove(path)
        self.sync(path.parent)

    def move(self, source: Path, target: Path) -> None:
        """``source`` is ``target``, durably, when this returns; never neither of them."""
        self.rename(source, target)
        self.sync(target.parent)
        self.sync(source.parent)
