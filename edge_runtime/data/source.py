"""What every source of local samples can do; the runtime and ``doctor`` know no more of them."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from edge_runtime.data.dataset import DEFAULT_MAX_BYTES, Dataset
from edge_runtime.protocol.artifact import ArtifactManifest


class DataSource(Protocol):
    """A frozen value that says where samples lie and how to read them; ``str`` of it is its name in messages."""

    def check(self) -> None:
        """Raises DataError for what can be told without a model and without reading everything."""

    def load(self, manifest: ArtifactManifest, max_bytes: int) -> Dataset:
        """All samples, fitted to the model, in at most ``max_bytes`` of arrays. Raises DataError."""

    def stamp(self) -> object:
        """Cheap, and equal as long as ``load`` would read the same; None: cannot be told, load once."""


def check_source(source: DataSource) -> None:
    """Raises DataError for data that are not there: better told at the start than in the first round."""
    source.check()


def load_dataset(
    source: DataSource, manifest: ArtifactManifest, *, max_bytes: int = DEFAULT_MAX_BYTES
) -> Dataset:
    """Reads ``source`` and checks it against ``manifest``.

    max_bytes: of all arrays together, checked before memory is taken (for a function: after it returned).
    Raises DataError.
    """
    return source.load(manifest, max_bytes)


def file_stamp(path: Path) -> tuple[int, ...]:
    """Changes when the file is replaced or written to; () without the file."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns
