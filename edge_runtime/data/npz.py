"""One ``.npz`` file, read so that a small file cannot ask for much memory and objects are never loaded."""

from __future__ import annotations

import math
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from edge_runtime.data.dataset import Array, DataError, Dataset, fit_dataset, spell_shape
from edge_runtime.data.source import file_stamp
from edge_runtime.protocol.artifact import ArtifactManifest

# A header is Python's text for a dict: numpy tokenizes it, evaluates its literals and trusts what they hold.
_BAD_HEADER = (
    *(ValueError, TypeError, SyntaxError, tokenize.TokenError, LookupError, AttributeError),
    *(OverflowError, RecursionError, MemoryError),
)
_BAD_ARCHIVE = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    NotImplementedError,
    RuntimeError,
    EOFError,
    zlib.error,
)


@dataclass(frozen=True)
class NpzFile:
    """Arrays by name, as ``numpy.savez`` or ``savez_compressed`` writes them.

    ``inputs``: names in the order of the model's inputs.
    """

    path: Path
    inputs: tuple[str, ...] = ("x",)
    target: str = "y"

    def __str__(self) -> str:
        return str(self.path)

    def check(self) -> None:
        if not self.path.is_file():
            raise DataError(f"{self} does not exist or is no file: check data.source")
        self.announced()

    def load(self, manifest: ArtifactManifest, max_bytes: int) -> Dataset:
        check_count(self, self.inputs, manifest)
        names = (*self.inputs, self.target)
        *arrays, labels = _read_npz(self.path, names, max_bytes)
        return fit_dataset(arrays, labels, manifest, [f"{self}: {name!r}" for name in names])

    def stamp(self) -> object:
        return file_stamp(self.path)

    def announced(self) -> Announced:
        """What the headers say, without reading the arrays. Raises DataError."""
        names = (*self.inputs, self.target)
        with _opened(self.path) as archive:
            members = _members(self.path, archive, names)
            shapes = [
                _announced_shape(archive, info, f"{self.path}: {name!r}")
                for name, info in zip(names, members, strict=True)
            ]
        return Announced(shapes[-1][0] if shapes[-1] else 0, sum(info.file_size for info in members))


class Announced(NamedTuple):
    """``rows`` of the target; ``size``: bytes of all arrays."""

    rows: int
    size: int


def check_count(source: object, inputs: Sequence[str], manifest: ArtifactManifest) -> None:
    """Raises DataError unless as many arrays are named as the model takes."""
    if len(inputs) != len(manifest.inputs):
        wanted = ", ".join(spec.name for spec in manifest.inputs)
        raise DataError(
            f"{source}: the model takes {len(manifest.inputs)} inputs ({wanted}), "
            f"data.inputs names {len(inputs)} ({', '.join(inputs)})"
        )


def _read_npz(path: Path, names: Sequence[str], max_bytes: int) -> list[Array]:
    """The named arrays. Sizes are read from the headers first: a small file cannot ask for much memory."""
    with _opened(path) as archive:
        members = _members(path, archive, names)
        total = sum(info.file_size for info in members)
        if total > max_bytes:
            raise DataError(
                f"{path}: the arrays take {total} bytes, above {max_bytes}; raise data.max_size_mb"
            )
        return [
            _read_array(archive, info, f"{path}: {name!r}") for name, info in zip(names, members, strict=True)
        ]


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror or error}; correct the path in the settings"
        ) from error
    except _BAD_ARCHIVE as error:
        raise DataError(f"{path}: damaged, or not an .npz file: {error}") from error


def _members(path: Path, archive: zipfile.ZipFile, names: Sequence[str]) -> list[zipfile.ZipInfo]:
    members = {info.filename: info for info in archive.infolist()}
    for name in names:
        if f"{name}.npy" not in members:
            held = ", ".join(sorted(member.removesuffix(".npy") for member in members)[:20])
            raise DataError(
                f"{path}: no array {name!r}; it holds {held or 'nothing'} (see data.inputs, data.target)"
            )
    return [members[f"{name}.npy"] for name in names]


def _announced_shape(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> tuple[int, ...]:
    """The shape in the header. Raises DataError unless numbers of just that size follow."""
    try:
        with archive.open(info) as file, _silenced():
            shape, dtype = _read_header(file)
            if dtype.hasobject or dtype.kind not in "biuf":
                raise DataError(f"{name} is of type {dtype}; numbers are needed (objects are never loaded)")
            if math.prod(shape) * dtype.itemsize != info.file_size - file.tell():
                raise DataError(
                    f"{name}: its header announces {spell_shape(shape)} of {dtype}, which is not its size"
                )
            return shape
    except (ValueError, OverflowError) as error:
        raise DataError(f"{name}: not an array as numpy.save writes it: {error}") from error


def _read_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> Array:
    _announced_shape(archive, info, name)
    try:
        with archive.open(info) as file, _silenced():
            return np.asarray(np.lib.format.read_array(file, allow_pickle=False))
    except (ValueError, OverflowError) as error:
        raise DataError(f"{name}: not an array as numpy.save writes it: {error}") from error


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Raises ValueError for everything that numpy's parser raises about bytes that are no header."""
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, _, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            raise ValueError(f"format version {version}")
    except _BAD_HEADER as error:
        raise ValueError(str(error) or type(error).__name__) from error
    return shape, dtype


@contextmanager
def _silenced() -> Iterator[None]:
    """Numpy warns of headers by Python 2, Python of odd literals: neither says anything about the data."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
