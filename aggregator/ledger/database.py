"""Connections to the ledger's database: durable, checked, one writer. SQLite by default; PostgreSQL by its URL."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, insert, inspect, select
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from aggregator.files import FILE_MODE
from aggregator.ledger import tables
from aggregator.ledger.errors import LedgerError
from edge_runtime.protocol.ids import FederationId

BUSY_TIMEOUT_MS = 5000
DIALECTS = ("sqlite", "postgresql")
_WRITES = "fleetgrad_writes"
# PRAGMA, value to set, value it then reads back
_PRAGMAS: tuple[tuple[str, object, object], ...] = (
    ("busy_timeout", BUSY_TIMEOUT_MS, BUSY_TIMEOUT_MS),
    ("journal_mode", "WAL", "wal"),
    ("synchronous", "FULL", 2),  # NORMAL loses commits in a power cut
    ("foreign_keys", "ON", 1),
)


def sqlite_url(path: Path) -> str:
    """The URL of a ledger in a file."""
    return URL.create("sqlite", database=str(path)).render_as_string()


def connect(url: str, *, read_only: bool) -> Engine:
    """An engine whose connections are as durable as the ledger promises.

    A SQLite file is created, mode 0600, unless ``read_only``. Raises LedgerError.
    """
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise LedgerError("the ledger's URL does not parse: write sqlite:///path/to/ledger.db") from None
    if parsed.get_backend_name() not in DIALECTS:
        raise LedgerError(f"no ledger on {parsed.get_backend_name()}: choose one of {', '.join(DIALECTS)}")
    sqlite_file = parsed.get_backend_name() == "sqlite"
    if sqlite_file:
        _prepare_file(parsed.database, read_only=read_only)
    try:
        # Parameters hold what devices sent: they stay out of errors and logs.
        engine = create_engine(parsed, hide_parameters=True)
    except ModuleNotFoundError as error:
        raise LedgerError(f"the ledger's URL needs the Python package {error.name}: install it") from None
    if sqlite_file:
        event.listen(engine, "connect", _query_only if read_only else _configure)
        event.listen(engine, "begin", _begin)
    return engine


def writing(engine: Engine) -> Engine:
    """The same engine, whose transactions take SQLite's write lock at their beginning and so never deadlock."""
    return engine.execution_options(**{_WRITES: True})


def reading(engine: Engine) -> Engine:
    """The same engine, whose transactions see one moment of the ledger, as SQLite's always do."""
    if engine.dialect.name == "postgresql":
        return engine.execution_options(isolation_level="REPEATABLE READ")
    return engine


def create_or_check(connection: Connection, federation: FederationId, *, create: bool, now: float) -> None:
    """The tables are there and are those of this release and this federation. Raises LedgerError."""
    names = set(inspect(connection).get_table_names())
    if tables.meta.name not in names:
        if names and connection.dialect.name == "sqlite":
            raise LedgerError("the ledger's file holds another program's tables: choose another path")
        if not create:
            raise LedgerError("the database holds no ledger yet: `aggregator serve` makes it")
        tables.metadata.create_all(connection)
        connection.execute(insert(tables.meta), {"id": 1, "federation": federation, "schema": tables.SCHEMA})
        standing = {"id": 1, "paused": False, "draining": False, "revocations": 0}
        connection.execute(insert(tables.standing), standing)
        connection.execute(
            insert(tables.epoch), {"id": 1, "epoch": 0, "holder": "", "generation": 1, "seen_at": now}
        )
        return
    schema = connection.scalar(select(tables.meta.c.schema)) or 0
    if schema > tables.SCHEMA:
        raise LedgerError(
            f"the ledger has schema {schema}, this release knows {tables.SCHEMA}: "
            "use the release of fleetgrad that wrote it, or a newer one"
        )
    if schema < tables.SCHEMA:
        raise LedgerError(
            f"the ledger has schema {schema}, this release needs {tables.SCHEMA} and cannot convert it: finish "
            "with the release of fleetgrad that wrote it, or start a new folder with `aggregator init`"
        )
    found = connection.scalar(select(tables.meta.c.federation))
    if found != federation:
        raise LedgerError(f"the ledger belongs to federation {found!r}, not {federation!r}: check the config")


def explain(url: str, error: SQLAlchemyError) -> LedgerError:
    """The database's own complaint, with the place and without passwords or parameters."""
    where = make_url(url).render_as_string(hide_password=True)
    reason = getattr(error, "orig", None) or error
    return LedgerError(f"the ledger {where} fails: {str(reason).strip()}")


def _prepare_file(database: str | None, *, read_only: bool) -> None:
    if not database or database.startswith((":", "file:")):
        raise LedgerError("a ledger in memory would not survive: write sqlite:///path/to/ledger.db")
    path = Path(database)
    if path.is_file():
        return
    if read_only:
        raise LedgerError(
            f"there is no ledger at {path} yet: `aggregator serve` makes it; or name the folder that has one"
        )
    try:
        # SQLite gives its -wal and -shm files the mode of the database.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, FILE_MODE))
    except OSError as error:
        raise LedgerError(f"no ledger can be made at {path}: {error.strerror}") from None


def _configure(connection: Any, _: object) -> None:
    # The driver must not begin transactions by its own rules: ``_begin`` does.
    connection.isolation_level = None
    for name, value, expected in _PRAGMAS:
        connection.execute(f"PRAGMA {name} = {value}")
        found = connection.execute(f"PRAGMA {name}").fetchone()[0]
        if found != expected:
            raise sqlite3.OperationalError(
                f"PRAGMA {name} is {found!r}, not {expected!r}, on this file system"
            )


def _query_only(connection: Any, _: object) -> None:
    connection.isolation_level = None
    connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    connection.execute("PRAGMA query_only = ON")


def _begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
