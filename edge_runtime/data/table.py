"""What CSV files and SQL queries have in common: named columns, and cells that become the model's numbers."""

from __future__ import annotations

import itertools
import math
import sys
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from edge_runtime.data.dataset import Array, DataError, Dataset, fit_dataset, spell_shape
from edge_runtime.protocol.artifact import ArtifactManifest, TargetSpec, ValueSpec
from edge_runtime.settings import require

DType: TypeAlias = Literal["bool", "float32", "int32", "int64", "uint8"]
Cell: TypeAlias = str | int | float | bytes | None

_TYPECODES = {"bool": "B", "float32": "f", "int32": "i", "int64": "q", "uint8": "B"}
_BOUNDS = {"bool": (0, 1), "int32": (-(1 << 31), (1 << 31) - 1), "int64": (-(1 << 63), (1 << 63) - 1)}
_BOUNDS["uint8"] = (0, 255)
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_EXACT_IN_FLOAT64 = 1 << 53
_SHOWN_CHARACTERS = 60
MISSING_WORDS = ("", "NA", "N/A", "nan", "NaN", "null", "NULL", "None")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns make which input and the target. Raises BadSetting for what contradicts itself.

    inputs: for each input of the model the names of its columns, in order; ``first..last`` stands for all columns
    from one to the other. A row of them becomes the shape of the model's input, in C order.
    labels: words in the target column, which stand for 0, 1, 2, ...; none: the column holds numbers.
    dtypes: of the cells, one for each input; none: those of the model.
    fill: what a missing cell of an input becomes; None: it is refused. A missing target is always refused.
    """

    inputs: tuple[tuple[str, ...], ...]
    target: str
    labels: tuple[str, ...] = ()
    dtypes: tuple[DType, ...] = ()
    fill: float | None = None

    def __post_init__(self) -> None:
        require(len(self.inputs) > 0, "inputs", [], "name the columns of at least one input")
        for names in self.inputs:
            require(len(names) > 0 and all(names), "inputs", list(names), "each input needs columns")
        named = [name for names in self.inputs for name in names]
        require(len(set(named)) == len(named), "inputs", named, "each column once")
        require(self.target != "", "target", self.target, "the name of a column")
        require(self.target not in named, "target", self.target, "not among the inputs")
        require(len(set(self.labels)) == len(self.labels), "labels", list(self.labels), "each word once")
        require(
            len(self.dtypes) in (0, len(self.inputs)),
            "dtypes",
            list(self.dtypes),
            f"one for each input, so {len(self.inputs)}",
        )
        whole = any(dtype != "float32" for dtype in self.dtypes)
        require(
            self.fill is None or not whole or self.fill.is_integer(),
            "fill",
            self.fill,
            "a whole number, since one of dtypes is",
        )

    def places(self, held: Sequence[str], where: str) -> tuple[tuple[int, ...], ...]:
        """For each input, then the target, the positions of its columns in ``held``. Raises DataError."""
        positions = {name: position for position, name in reversed([*enumerate(held)])}

        def of(name: str) -> range:
            first, _, last = (name, "", name) if name in positions else name.partition("..")
            if first not in positions or last not in positions or positions[first] > positions[last]:
                some = ", ".join(map(shown, held[:20])) + (", ..." if len(held) > 20 else "")
                raise DataError(f"{where}: no column {shown(name)}; it has {some or 'none'}")
            return range(positions[first], positions[last] + 1)

        found = tuple(
            tuple(place for name in names for place in of(name)) for names in (*self.inputs, (self.target,))
        )
        count = Counter(held)
        taken: set[int] = set()
        for place in itertools.chain(*found):
            if place in taken:
                raise DataError(f"{where}: the column {shown(held[place])} is taken twice, once in a range")
            if count[held[place]] > 1:
                raise DataError(f"{where}: two columns are named {shown(held[place])}; rename one")
            taken.add(place)
        return found


class CellError(ValueError):
    """What is wrong with a cell; the reader of the source says where it stands."""

    def __init__(self, index: int, cell: Cell, reason: str) -> None:
        super().__init__(reason)
        self.index = index
        self.cell = cell


class Values:
    """The numbers of one input or of the target, growing row by row, 1.13 times their own size at most."""

    def __init__(
        self,
        spec: ValueSpec,
        count: int,
        *,
        dtype: DType | None = None,
        labels: Sequence[str] = (),
        fill: float | None = None,
        missing: Sequence[str] = MISSING_WORDS,
    ) -> None:
        """``count``: numbers in a row. Where the model has labels, a number outside of them is refused at once."""
        self.dtype = dtype or spec.dtype
        self.row_bytes = count * np.dtype(self.dtype).itemsize
        self._numbers: array[Any] = array(_TYPECODES[self.dtype])
        self._missing = frozenset(missing)
        self._fill = fill
        self._labels = {word: label for label, word in enumerate(labels)}
        self._is_float = self.dtype == "float32"
        self._may_hurry = not labels and not any(map(_is_number, missing))
        classes = spec.classes if isinstance(spec, TargetSpec) else None
        self._low, self._high = (0, 0) if self._is_float else _BOUNDS[self.dtype]
        if classes is not None and not self._is_float:
            self._low, self._high = 0, classes - 1

    def add(self, cells: Sequence[Cell]) -> None:
        """One row, all of it or none. Raises CellError."""
        numbers = self._at_once(cells)
        self._numbers.extend(numbers if numbers is not None else self._one_by_one(cells))

    def add_blob(self, cell: Cell) -> None:
        """One row as little-endian numbers of ``dtype``. Raises CellError unless it is just as long."""
        if not isinstance(cell, bytes) or len(cell) != self.row_bytes:
            raise CellError(0, cell, f"is not a BLOB of {self.row_bytes} bytes ({self.dtype})")
        numbers = array(self._numbers.typecode, cell)
        if sys.byteorder == "big":
            numbers.byteswap()
        self._numbers.extend(numbers)

    def flat(self) -> Array:
        """All numbers in one row, not copied: nothing can be added any more."""
        return np.frombuffer(self._numbers, self.dtype)

    def _at_once(self, cells: Sequence[Cell]) -> Sequence[float] | None:
        """The fast way where nothing is unusual; None: look at each cell."""
        if not self._may_hurry:
            return None
        try:
            if type(cells[0]) is str:
                text = "".join(cells)  # type: ignore[arg-type]
                if "_" in text or not text.isascii():
                    return None
            elif any(type(cell) is not (float if self._is_float else int) for cell in cells):
                return None
            if self._is_float:
                reals = [float(cell) for cell in cells]  # type: ignore[arg-type]
                return reals if sum(map(abs, reals)) <= _FLOAT32_MAX else None
            wholes = [int(cell) for cell in cells]  # type: ignore[arg-type]
            return wholes if self._low <= min(wholes) and max(wholes) <= self._high else None
        except (TypeError, ValueError):
            return None

    def _one_by_one(self, cells: Sequence[Cell]) -> list[float]:
        numbers = []
        for index, cell in enumerate(cells):
            try:
                numbers.append(self._number(cell))
            except ValueError as error:
                raise CellError(index, cell, str(error)) from None
        return numbers

    def _number(self, cell: Cell) -> float:
        """Raises ValueError with the reason, for a person."""
        if isinstance(cell, str):
            cell = cell.strip()
        if self._labels:
            if cell in self._labels:
                return self._labels[str(cell)]
            raise ValueError(f"is none of the labels {', '.join(map(shown, list(self._labels)[:20]))}")
        if cell is None or cell in self._missing:
            if self._fill is None:
                raise ValueError("is missing; declare a fill for missing inputs, or leave the row out")
            cell = self._fill
        if isinstance(cell, bytes):
            raise ValueError("is a BLOB where a number is needed; see blob_shapes")  # noqa: TRY004 - one kind
        return self._real(cell) if self._is_float else self._whole(cell)

    def _real(self, cell: str | int | float) -> float:
        try:
            number = float(cell) if _plain(cell) else math.nan
        except (ValueError, OverflowError):
            raise ValueError("is no number") from None
        if math.isnan(number):
            raise ValueError("is no number")
        if abs(number) > _FLOAT32_MAX:
            raise ValueError("is infinite or too large for float32")
        return number

    def _whole(self, cell: str | int | float) -> int:
        if self.dtype == "bool" and isinstance(cell, str) and cell.lower() in ("true", "false"):
            return cell.lower() == "true"
        try:
            number = int(cell) if isinstance(cell, int | str) and _plain(cell) else None
        except ValueError:
            number = None
        if number is None:  # "3.0": programs that know no missing whole numbers write them so
            try:
                real = float(cell) if _plain(cell) else math.nan
            except ValueError:
                real = math.nan
            if not real.is_integer() or abs(real) > _EXACT_IN_FLOAT64:
                raise ValueError(f"is no whole number, which {self.dtype} needs")
            number = int(real)
        if not self._low <= number <= self._high:
            raise ValueError(f"is outside {self._low} to {self._high}")
        return number


def values_for(
    source: object,
    columns: Columns,
    widths: Sequence[int],
    manifest: ArtifactManifest,
    missing: Sequence[str] = MISSING_WORDS,
) -> list[Values]:
    """Empty, one for each input and the last for the target. ``widths``: numbers in a row of each.

    Raises DataError unless the columns fit the model: count of inputs, numbers in a row, labels.
    """
    if len(columns.inputs) != len(manifest.inputs):
        wanted = ", ".join(spec.name for spec in manifest.inputs)
        raise DataError(
            f"{source}: the model takes {len(manifest.inputs)} inputs ({wanted}), "
            f"inputs lists columns for {len(columns.inputs)}"
        )
    for spec, width in zip((*manifest.inputs, manifest.target), widths, strict=True):
        if width != math.prod(spec.shape):
            raise DataError(
                f"{source}: {width} columns for {spec.name!r}; the model needs "
                f"{spell_shape(('rows', *spec.shape))}, so {math.prod(spec.shape)}"
            )
    classes = 2 if manifest.loss == "bce_with_logits" else manifest.target.classes
    if columns.labels and len(columns.labels) != classes:
        expected = f"has {classes} classes" if classes is not None else "is not trained on labels"
        raise DataError(f"{source}: {len(columns.labels)} labels are declared, the model {expected}")
    dtypes = columns.dtypes or (None,) * len(manifest.inputs)
    inputs = [
        Values(spec, width, dtype=dtype, fill=columns.fill, missing=missing)
        for spec, width, dtype in zip(manifest.inputs, widths, dtypes, strict=False)
    ]
    return [*inputs, Values(manifest.target, 1, labels=columns.labels, missing=missing)]


def fit_rows(
    source: object, columns: Columns, values: Sequence[Values], manifest: ArtifactManifest
) -> Dataset:
    """Rows of flat numbers (``values_for``) in the shapes of the model. Raises DataError."""
    specs = (*manifest.inputs, manifest.target)
    names = [f"{source}: input {spec.name!r}" for spec in manifest.inputs]
    names.append(f"{source}: column {shown(columns.target)}")
    arrays = [part.flat().reshape(-1, *spec.shape) for spec, part in zip(specs, values, strict=True)]
    return fit_dataset(arrays[:-1], arrays[-1], manifest, names)


def too_large(source: object, max_bytes: int) -> DataError:
    """The samples do not fit into data.max_size_mb."""
    return DataError(f"{source}: the samples take more than {max_bytes} bytes; raise data.max_size_mb")


def shown(cell: Cell) -> str:
    """For a message: quoted, ASCII, short."""
    if isinstance(cell, bytes):
        return f"a BLOB of {len(cell)} bytes"
    text = ascii(cell[: _SHOWN_CHARACTERS + 1]) if isinstance(cell, str) else repr(cell)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def _plain(cell: str | int | float) -> bool:
    """Python also reads "1_000" and digits of other scripts: nobody means them as numbers in data."""
    return not isinstance(cell, str) or (cell.isascii() and "_" not in cell)


def _is_number(word: str) -> bool:
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False
