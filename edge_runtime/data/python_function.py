"""A function of the owner's: the way to every source this project does not know."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_runtime.data.dataset import Array, DataError, Dataset, fit_dataset
from edge_runtime.protocol.artifact import ArtifactManifest


@dataclass(frozen=True)
class PythonFunction:
    """``module.function()`` returns (inputs, target); looked for in ``folder``, the working folder, sys.path."""

    module: str
    function: str
    folder: Path

    def __str__(self) -> str:
        return f"python:{self.module}:{self.function}"

    def check(self) -> None:
        """Nothing: importing the owner's module is the first thing that can be told, and runs their code."""

    def load(self, manifest: ArtifactManifest, max_bytes: int) -> Dataset:
        arrays, labels = _call(self)
        if sum(array.nbytes for array in (*arrays, labels)) > max_bytes:
            raise DataError(f"{self}: the arrays take more than {max_bytes} bytes; raise data.max_size_mb")
        names = (*(f"{self}: input {i}" for i in range(len(arrays))), f"{self}: target")
        return fit_dataset(arrays, labels, manifest, names)

    def stamp(self) -> object:
        return None


def _call(source: PythonFunction) -> tuple[list[Array], Array]:
    with _search_path(source.folder, Path.cwd()):
        try:
            function = getattr(importlib.import_module(source.module), source.function)
            result = function()
        except (
            Exception
        ) as error:  # the owner's code: whatever it raises is theirs to read, with its traceback
            raise DataError(f"{source}: {type(error).__name__}: {error}") from error
    if not isinstance(result, tuple) or len(result) != 2:
        raise DataError(f"{source} returned {type(result).__name__}; it must return (inputs, target)")
    inputs, target = result
    arrays = list(inputs) if isinstance(inputs, tuple | list) else [inputs]
    for value in (*arrays, target):
        if not isinstance(value, np.ndarray):
            raise DataError(f"{source} returned a {type(value).__name__} where a numpy array is needed")
    return arrays, target


@contextmanager
def _search_path(*folders: Path) -> Iterator[None]:
    added = [str(folder) for folder in folders if str(folder) not in sys.path]
    sys.path[:0] = added
    try:
        yield
    finally:
        for entry in added:
            if entry in sys.path:
                sys.path.remove(entry)
