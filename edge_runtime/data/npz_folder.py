"""A folder of ``.npz`` files, such as one for each day: all of them together are the samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_runtime.data.dataset import Array, DataError, Dataset
from edge_runtime.data.npz import NpzFile, check_count
from edge_runtime.data.source import file_stamp
from edge_runtime.protocol.artifact import ArtifactManifest


@dataclass(frozen=True)
class NpzFolder:
    """Every ``*.npz`` directly in ``path``, sorted by name; names that begin with a dot are left out.

    A program that adds files writes them under another ending and renames them when they are whole.
    """

    path: Path
    inputs: tuple[str, ...] = ("x",)
    target: str = "y"

    def __str__(self) -> str:
        return f"{self.path}/"

    def files(self) -> tuple[NpzFile, ...]:
        """At least one. Raises DataError."""
        try:
            names = sorted(
                entry.name
                for entry in self.path.iterdir()
                if entry.name.endswith(".npz") and not entry.name.startswith(".")
            )
        except OSError as error:
            raise DataError(f"{self} cannot be read: {error.strerror or error} (see data.source)") from error
        if not names:
            raise DataError(f"{self} holds no .npz files: check data.source")
        return tuple(NpzFile(self.path / name, self.inputs, self.target) for name in names)

    def check(self) -> None:
        for file in self.files():
            file.check()

    def load(self, manifest: ArtifactManifest, max_bytes: int) -> Dataset:
        """Each file is checked against the model by itself, so that an error names it; then they are joined.

        Besides the joined arrays, memory holds one file's at a time.
        """
        check_count(self, self.inputs, manifest)
        files = self.files()
        announced = [file.announced() for file in files]
        specs = (*manifest.inputs, manifest.target)
        rows = sum(rows for rows, _ in announced)
        row_bytes = sum(math.prod(spec.shape) * np.dtype(spec.dtype).itemsize for spec in specs)
        total = max(rows * row_bytes, sum(size for _, size in announced))
        if total > max_bytes:
            raise DataError(
                f"{self}: the arrays of {len(files)} files take {total} bytes, above {max_bytes}; "
                "raise data.max_size_mb, or move old files away"
            )
        joined: list[Array] = [np.empty((rows, *spec.shape), spec.dtype) for spec in specs]
        start = 0
        for file, (expected, size) in zip(files, announced, strict=True):
            part = file.load(manifest, size)
            if part.samples != expected:
                raise DataError(
                    f"{file} changed while it was read: write a new file and rename it when whole"
                )
            for whole, array in zip(joined, (*part.inputs, part.target), strict=True):
                whole[start : start + part.samples] = array
            start += part.samples
        return Dataset(inputs=tuple(joined[:-1]), target=joined[-1])

    def stamp(self) -> object:
        try:
            return tuple((file.path.name, file_stamp(file.path)) for file in self.files())
        except DataError:
            return ()
