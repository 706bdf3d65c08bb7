"""The rows of one SELECT over an SQLite database that another program may be writing meanwhile."""

from __future__ import annotations

import contextlib
import math
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.data.dataset import DataError, Dataset
from edge_runtime.data.source import file_stamp
from edge_runtime.data.table import CellError, Columns, fit_rows, shown, too_large, values_for
from edge_runtime.protocol.artifact import ArtifactManifest
from edge_runtime.settings import require

_BUSY_S = 5.0  # how long to wait for a writer that holds the database
_STEPS_BETWEEN_LOOKS = 10_000  # of SQLite's virtual machine, a fraction of a millisecond
# Reading and computing; not ATTACH, PRAGMA or anything that changes a database.
_ALLOWED = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    getattr(sqlite3, "SQLITE_RECURSIVE", 33),
}


@dataclass(frozen=True, kw_only=True)
class SqliteQuery(Columns):
    """``[data.sqlite]``: the columns are those of the one SELECT in ``query``.

    blob_shapes: for each input the shape of one BLOB, which then is its whole row: little-endian numbers of its
    dtype in C order; [] for an input of plain columns.
    timeout_s: seconds of the whole query. max_rows: more than these are refused, not cut.
    """

    file: Path
    query: str
    blob_shapes: tuple[tuple[int, ...], ...] = ()
    timeout_s: float = 60.0
    max_rows: int = 10_000_000

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.query.strip() != "", "query", self.query, "one SELECT")
        require(
            len(self.blob_shapes) in (0, len(self.inputs)),
            "blob_shapes",
            list(self.blob_shapes),
            f"one for each input, so {len(self.inputs)}",
        )
        for shape, names in zip(self.blob_shapes, self.inputs, strict=False):
            require(all(1 <= size <= 1 << 28 for size in shape), "blob_shapes", list(shape), "numbers from 1")
            require(not shape or len(names) == 1, "inputs", list(names), "an input of a BLOB is one column")
        require(0.1 <= self.timeout_s <= 86_400, "timeout_s", self.timeout_s, "0.1 to 86400")
        require(1 <= self.max_rows <= 1 << 31, "max_rows", self.max_rows, "1 to 2147483648")

    def __str__(self) -> str:
        return str(self.file)

    def check(self) -> None:
        """That the database opens; the query runs when the samples are loaded."""
        with _opened(self) as connection:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()

    def load(self, manifest: ArtifactManifest, max_bytes: int) -> Dataset:
        """An error names the row of the result, from 1, and the column."""
        with _opened(self) as connection:
            cursor = _executed(self, connection)
            names = [str(column[0]) for column in cursor.description]
            places = self.places(names, f"{self}: the query")
            shapes = (*(self.blob_shapes or ((),) * len(self.inputs)), ())
            widths = [
                math.prod(shape) if shape else len(where) for shape, where in zip(shapes, places, strict=True)
            ]
            values = values_for(self, self, widths, manifest)
            most = min(self.max_rows, max_bytes // sum(part.row_bytes for part in values))
            for number, row in enumerate(cursor, start=1):
                if number > self.max_rows:
                    raise DataError(
                        f"{self}: more than {self.max_rows} rows; raise data.sqlite.max_rows, or add a LIMIT"
                    )
                if number > most:
                    raise too_large(self, max_bytes)
                for part, where, shape in zip(values, places, shapes, strict=True):
                    cells = [row[place] for place in where]
                    try:
                        part.add_blob(cells[0]) if shape else part.add(cells)
                    except CellError as error:
                        raise DataError(
                            f"{self}, row {number}, column {shown(names[where[error.index]])}: "
                            f"{shown(error.cell)} {error}"
                        ) from None
        return fit_rows(self, self, values, manifest)

    def stamp(self) -> object:
        """Of the database and its write-ahead log."""
        return file_stamp(self.file), file_stamp(self.file.with_name(f"{self.file.name}-wal"))


@contextlib.contextmanager
def _opened(source: SqliteQuery) -> Iterator[sqlite3.Connection]:
    """Read-only, for SELECT alone. Raises DataError, also for what goes wrong while it is used."""
    if not source.file.is_file():
        raise DataError(f"{source} does not exist or is no file: check data.sqlite.file")
    deadline = time.monotonic() + source.timeout_s
    try:
        with contextlib.closing(
            sqlite3.connect(
                f"{source.file.absolute().as_uri()}?mode=ro", uri=True, timeout=min(_BUSY_S, source.timeout_s)
            )
        ) as connection:
            connection.set_authorizer(_authorise)
            connection.set_progress_handler(lambda: time.monotonic() > deadline, _STEPS_BETWEEN_LOOKS)
            yield connection
    except (sqlite3.Error, sqlite3.Warning) as error:
        if time.monotonic() > deadline:
            raise DataError(
                f"{source}: the query took longer than {source.timeout_s:g} s; "
                "add an index or a LIMIT, or raise data.sqlite.timeout_s"
            ) from None
        raise DataError(f"{source}: {error} (see data.sqlite)") from error


def _authorise(action: int, *_: object) -> int:
    return sqlite3.SQLITE_OK if action in _ALLOWED else sqlite3.SQLITE_DENY


def _executed(source: SqliteQuery, connection: sqlite3.Connection) -> sqlite3.Cursor:
    try:
        cursor = connection.execute(source.query)
    except sqlite3.DatabaseError as error:
        if "not authorized" in str(error) or "prohibited" in str(error):
            raise DataError(f"{source}: {error}; data.sqlite.query is one SELECT") from error
        raise
    if cursor.description is None:
        raise DataError(f"{source}: the query gives no columns; data.sqlite.query is one SELECT")
    return cursor
