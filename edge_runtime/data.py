"""Where local samples come from, and the check that they fit the model before a step is made on them."""

from __future__ import annotations

import importlib
import math
import sys
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from edge_runtime.protocol.artifact import ArtifactManifest, TargetSpec, ValueSpec
from edge_runtime.protocol.errors import Fault, FleetgradError

Array: TypeAlias = npt.NDArray[Any]

DEFAULT_MAX_BYTES = 1 << 30
# A header is Python's text for a dict: numpy tokenizes it, evaluates its literals and trusts what they hold.
_BAD_HEADER = (
    *(ValueError, TypeError, SyntaxError, tokenize.TokenError, LookupError, AttributeError),
    *(OverflowError, RecursionError, MemoryError),
)
_EXACT_IN_FLOAT32 = 1 << 24  # every whole number up to here is a float32


class DataError(
    FleetgradError,
    fault=Fault.ENGINEER,
    remedy="correct the named array, column or row, or the [data] settings",
):
    """Local data that cannot be read or does not fit the model; names the array, the row and what is expected."""


@dataclass(frozen=True)
class NpzFile:
    """Arrays by name, as ``numpy.savez`` or ``savez_compressed`` writes them."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class PythonFunction:
    """``module.function()`` returns (inputs, target); looked for in ``folder``, the working folder, sys.path."""

    module: str
    function: str
    folder: Path

    def __str__(self) -> str:
        return f"python:{self.module}:{self.function}"


DataSource: TypeAlias = NpzFile | PythonFunction


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """C-contiguous finite arrays with the dtypes of the model, ``samples`` rows each."""

    inputs: tuple[Array, ...]
    target: Array

    @property
    def samples(self) -> int:
        """n_k."""
        return len(self.target)


def check_source(source: DataSource) -> None:
    """Raises DataError for a file that is not there: better told at the start than in the first round."""
    if isinstance(source, NpzFile) and not source.path.is_file():
        raise DataError(f"{source} does not exist or is no file: check data.source")


def load_dataset(
    source: DataSource,
    manifest: ArtifactManifest,
    *,
    inputs: Sequence[str] = ("x",),
    target: str = "y",
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> Dataset:
    """Reads ``source`` and checks it against ``manifest``.

    inputs, target: names of the arrays in an ``.npz``; inputs in the order of the model's.
    max_bytes: of all arrays together, checked before memory is taken (for a function: after it returned).
    Raises DataError.
    """
    if isinstance(source, NpzFile):
        if len(inputs) != len(manifest.inputs):
            wanted = ", ".join(spec.name for spec in manifest.inputs)
            raise DataError(
                f"{source}: the model takes {len(manifest.inputs)} inputs ({wanted}), "
                f"data.inputs names {len(inputs)} ({', '.join(inputs)})"
            )
        *arrays, labels = _read_npz(source.path, (*inputs, target), max_bytes)
        names = tuple(f"{source}: {name!r}" for name in (*inputs, target))
    else:
        arrays, labels = _call(source)
        names = (*(f"{source}: input {i}" for i in range(len(arrays))), f"{source}: target")
        if sum(array.nbytes for array in (*arrays, labels)) > max_bytes:
            raise DataError(f"{source}: the arrays take more than {max_bytes} bytes; raise data.max_size_mb")
    return fit_dataset(arrays, labels, manifest, names)


def fit_dataset(
    inputs: Sequence[Array], target: Array, manifest: ArtifactManifest, names: Sequence[str] | None = None
) -> Dataset:
    """The arrays with the model's dtypes, copied only where they must be.

    float64 and float16 become float32, whole numbers the target's or input's type where no value changes;
    nothing else is converted. ``names``: what to call the inputs and the target in errors.
    Raises DataError: count of inputs, rows, shape of a row, dtype, range, labels outside [0, classes), NaN.
    """
    if len(inputs) != len(manifest.inputs):
        raise DataError(f"the model takes {len(manifest.inputs)} inputs, the data has {len(inputs)}")
    specs: tuple[ValueSpec, ...] = (*manifest.inputs, manifest.target)
    names = names or [repr(spec.name) for spec in specs]
    arrays = (*inputs, target)
    for name, spec, array in zip(names, specs, arrays, strict=True):
        _check_shape(name, spec, array)
    rows = [len(array) for array in arrays]
    if len(set(rows)) > 1:
        found = ", ".join(f"{name} has {n}" for name, n in zip(names, rows, strict=True))
        raise DataError(f"the arrays need one row for each sample, so equally many: {found}")
    if rows[0] == 0:
        raise DataError(f"{names[0]}: no rows; at least one sample is needed")
    fitted = tuple(_cast(name, spec, array) for name, spec, array in zip(names, specs, arrays, strict=True))
    _check_labels(names[-1], manifest.target, fitted[-1])
    return Dataset(inputs=fitted[:-1], target=fitted[-1])


# ---- fitting ----------------------------------------------------------------------------------------


def _check_shape(name: str, spec: ValueSpec, array: Array) -> None:
    if array.ndim == 0 or array.shape[1:] != spec.shape:
        raise DataError(
            f"{name} has shape {_shape(array.shape)}; "
            f"the model's {spec.name!r} needs {_shape(('rows', *spec.shape))}"
        )


def _shape(sizes: Sequence[object]) -> str:
    return f"({', '.join(map(str, sizes))}{',' if len(sizes) == 1 else ''})"


def _cast(name: str, spec: ValueSpec, array: Array) -> Array:
    """The array as ``spec.dtype``, C order. Raises DataError if a value would change."""
    wanted = np.dtype(spec.dtype)
    if array.dtype.kind == "f" and not _all(np.isfinite(array)):
        row = _first_row(~np.isfinite(array))
        kind = "NaN" if bool(np.isnan(array[row]).any()) else "infinity"
        raise DataError(f"{name}, row {row}: {kind}; the model's {spec.name!r} needs finite values")
    allowed = {"f": "fiub", "i": "iub", "u": "iub", "b": "b"}[wanted.kind]
    if array.dtype.kind not in allowed:
        hint = ""
        if array.dtype.kind == "f":
            hint = f' (if they are labels, store them with .astype("{wanted.name}"))'
        raise DataError(f"{name} is {array.dtype}; the model's {spec.name!r} needs {wanted.name}{hint}")
    if array.dtype.kind in "iu" and not np.can_cast(array.dtype, wanted):
        low, high = (-_EXACT_IN_FLOAT32, _EXACT_IN_FLOAT32) if wanted.kind == "f" else _integer_range(wanted)
        # Compared as Python integers where the bounds do not fit the array's own type.
        bad = np.zeros(array.shape, np.bool_)
        own = _integer_range(array.dtype)
        if low > own[0]:
            bad |= array < low
        if high < own[1]:
            bad |= array > high
        if _any(bad):
            raise DataError(
                f"{name}, row {_first_row(bad)}: a value outside {low}..{high}, which {wanted.name} cannot hold; "
                f"the model's {spec.name!r} needs {wanted.name}"
            )
    with np.errstate(over="ignore"):  # found just below, with its row
        fitted = np.require(array, dtype=wanted, requirements="C")
    if array.dtype.kind == "f" and array.dtype.itemsize > wanted.itemsize and not _all(np.isfinite(fitted)):
        row = _first_row(~np.isfinite(fitted))
        raise DataError(
            f"{name}, row {row}: a value too large for {wanted.name}, which the model's {spec.name!r} needs"
        )
    return fitted


def _check_labels(name: str, spec: TargetSpec, labels: Array) -> None:
    if spec.classes is None:
        return
    bad = (labels < 0) | (labels >= spec.classes)
    if _any(bad):
        row = _first_row(bad)
        label = labels[row][bad[row]].reshape(-1)[0] if labels.ndim > 1 else labels[row]
        raise DataError(
            f"{name}, row {row}: label {label}; the model has {spec.classes} classes, 0 to {spec.classes - 1}"
        )


def _integer_range(dtype: np.dtype[Any]) -> tuple[int, int]:
    info = np.iinfo(dtype)
    return int(info.min), int(info.max)


def _all(mask: Array) -> bool:
    return bool(mask.all())


def _any(mask: Array) -> bool:
    return bool(mask.any())


def _first_row(mask: Array) -> int:
    return int(np.argmax(mask.reshape(len(mask), -1).any(axis=1)))


# ---- reading ----------------------------------------------------------------------------------------


def _read_npz(path: Path, names: Sequence[str], max_bytes: int) -> list[Array]:
    """The named arrays. Sizes are read from the headers first: a small file cannot ask for much memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            for name in names:
                if f"{name}.npy" not in members:
                    held = ", ".join(sorted(member.removesuffix(".npy") for member in members)[:20])
                    raise DataError(
                        f"{path}: no array {name!r}; it holds {held or 'nothing'} (see data.inputs, data.target)"
                    )
            wanted = [members[f"{name}.npy"] for name in names]
            total = sum(info.file_size for info in wanted)
            if total > max_bytes:
                raise DataError(
                    f"{path}: the arrays take {total} bytes, above {max_bytes}; raise data.max_size_mb"
                )
            return [
                _read_array(archive, info, f"{path}: {name!r}")
                for name, info in zip(names, wanted, strict=True)
            ]
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error} (see data.source)") from error
    except (
        zipfile.BadZipFile,
        zipfile.LargeZipFile,
        NotImplementedError,
        RuntimeError,
        EOFError,
        zlib.error,
    ) as error:
        raise DataError(f"{path}: damaged, or not an .npz file: {error}") from error


def _read_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> Array:
    try:
        with archive.open(info) as file, _silenced():
            shape, dtype = _read_header(file)
            if dtype.hasobject or dtype.kind not in "biuf":
                raise DataError(f"{name} is of type {dtype}; numbers are needed (objects are never loaded)")
            if math.prod(shape) * dtype.itemsize != info.file_size - file.tell():
                raise DataError(
                    f"{name}: its header announces {_shape(shape)} of {dtype}, which is not its size"
                )
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
