"""A CSV file (RFC 4180), read line by line: memory holds the numbers and one line."""

from __future__ import annotations

import contextlib
import csv
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from edge_runtime.data.dataset import DataError, Dataset
from edge_runtime.data.source import file_stamp
from edge_runtime.data.table import (
    MISSING_WORDS,
    CellError,
    Columns,
    fit_rows,
    shown,
    too_large,
    values_for,
)
from edge_runtime.protocol.artifact import ArtifactManifest
from edge_runtime.settings import require

MAX_LINE_CHARACTERS = 4 << 20
_NO_DELIMITERS = '"\r\n\0.+-_ '


@dataclass(frozen=True, kw_only=True)
class CsvFile(Columns):
    """``[data.csv]``. UTF-8. Without ``header`` the columns are named by their numbers, from "1".

    missing: words that stand for a missing cell, besides the empty one.
    """

    file: Path
    header: bool = True
    delimiter: str = ","
    missing: tuple[str, ...] = MISSING_WORDS

    def __post_init__(self) -> None:
        super().__post_init__()
        one = len(self.delimiter) == 1 and not self.delimiter.isalnum()
        require(
            one and self.delimiter not in _NO_DELIMITERS,
            "delimiter",
            self.delimiter,
            'one character, such as ",", ";" or "\\t"',
        )

    def __str__(self) -> str:
        return str(self.file)

    def check(self) -> None:
        with _opened(self) as table:
            self.places(table.names, str(self))

    def load(self, manifest: ArtifactManifest, max_bytes: int) -> Dataset:
        """An error names the line and the column."""
        with _opened(self) as table:
            places = self.places(table.names, str(self))
            missing = ("", *self.missing)
            values = values_for(self, self, [len(part) for part in places], manifest, missing)
            most = max_bytes // sum(part.row_bytes for part in values)
            pick = [operator.itemgetter(*part) if len(part) > 1 else None for part in places]
            for count, cells in enumerate(table.rows(), start=1):
                if count > most:
                    raise too_large(self, max_bytes)
                for part, take, where in zip(values, pick, places, strict=True):
                    try:
                        part.add(take(cells) if take else (cells[where[0]],))
                    except CellError as error:
                        raise DataError(
                            f"{self}, line {table.line}, column {shown(table.names[where[error.index]])}: "
                            f"{shown(error.cell)} {error}"
                        ) from None
        return fit_rows(self, self, values, manifest)

    def stamp(self) -> object:
        return file_stamp(self.file)


class _Table:
    """The rows of an open file; ``names`` of its columns are known at once."""

    def __init__(self, source: CsvFile, file: TextIO) -> None:
        self._source = source
        self._reader = csv.reader(_lines(source, file), delimiter=source.delimiter, strict=True)
        first = self._next()
        if first is None:
            raise DataError(f"{source}: it is empty")
        self.names = [cell.strip() for cell in first]
        self._first = None if source.header else first
        if self._first is not None:
            self.names = [str(number) for number in range(1, len(first) + 1)]

    @property
    def line(self) -> int:
        """Of the row last given, from 1; its last line where a quoted cell spans several."""
        return self._reader.line_num

    def rows(self) -> Iterator[list[str]]:
        """As many cells each as there are names; empty lines are left out."""
        cells = self._first or self._next()
        while cells is not None:
            if len(cells) != len(self.names):
                raise DataError(
                    f"{self._source}, line {self.line}: {len(cells)} cells, expected {len(self.names)}; "
                    f"is the delimiter {shown(self._source.delimiter)}?"
                )
            yield cells
            cells = self._next()

    def _next(self) -> list[str] | None:
        try:
            return next((cells for cells in self._reader if cells), None)
        except csv.Error as error:
            raise DataError(f"{self._source}, line {self.line}: {error}") from None


def _lines(source: CsvFile, file: TextIO) -> Iterator[str]:
    """Never more than one line in memory, and no line without an end."""
    number = 0
    while line := file.readline(MAX_LINE_CHARACTERS):
        number += 1
        if len(line) == MAX_LINE_CHARACTERS:
            raise DataError(
                f"{source}, line {number}: longer than {MAX_LINE_CHARACTERS} characters; is this a CSV file?"
            )
        yield line


@contextlib.contextmanager
def _opened(source: CsvFile) -> Iterator[_Table]:
    try:
        # A byte that is not UTF-8 becomes a character that no number and no label has: told with its cell.
        with source.file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            yield _Table(source, file)
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {error.strerror or error} (see data.csv.file)") from error
