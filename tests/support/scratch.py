"""A scratch folder for tests that sync thousands of times and do not measure the disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MEMORY = Path("/dev/shm")  # noqa: S108 - a unique folder is made in it


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """In memory where the system has such a place; gone afterwards."""
    where = _MEMORY if _MEMORY.is_dir() and os.access(_MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where) as folder:
        yield Path(folder)
