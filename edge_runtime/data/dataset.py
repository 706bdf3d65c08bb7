"""Samples as arrays, and the check that they fit the model before a step is made on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from edge_runtime.protocol.artifact import ArtifactManifest, TargetSpec, ValueSpec
from edge_runtime.protocol.errors import Fault, FleetgradError

Array: TypeAlias = npt.NDArray[Any]

DEFAULT_MAX_BYTES = 1 << 30
_EXACT_IN_FLOAT32 = 1 << 24  # every whole number up to here is a float32


class DataError(
    FleetgradError,
    fault=Fault.ENGINEER,
    remedy="correct the named array, column or row, or the [data] settings",
):
    """Local data that cannot be read or does not fit the model; names the array, the row and what is expected."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """C-contiguous finite arrays with the dtypes of the model, ``samples`` rows each."""

    inputs: tuple[Array, ...]
    target: Array

    @property
    def samples(self) -> int:
        """n_k."""
        return len(self.target)


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


def _check_shape(name: str, spec: ValueSpec, array: Array) -> None:
    if array.ndim == 0 or array.shape[1:] != spec.shape:
        raise DataError(
            f"{name} has shape {spell_shape(array.shape)}; "
            f"the model's {spec.name!r} needs {spell_shape(('rows', *spec.shape))}"
        )


def spell_shape(sizes: Sequence[object]) -> str:
    """As Python writes a tuple."""
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
