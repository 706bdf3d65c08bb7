"""What the registrar must not forget: tokens given out and devices enrolled. SQLite, so that another process may
list them or add a token while one answers. A transaction is on disk when its block ends (WAL, synchronous FULL).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa

from aggregator.registrar.folder import RegistrarError
from edge_runtime.protocol.crypto.keys import VerifyKey
from edge_runtime.protocol.ids import DeviceId, FederationId

_SCHEMA_VERSION = 1
_BUSY_S = 10.0  # how long a transaction waits for that of another process

_metadata = sa.MetaData()
_federation = sa.Table(  # one row
    "federation",
    _metadata,
    sa.Column("schema_version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("name", sa.String, nullable=False),
    sa.Column("root_key", sa.LargeBinary, nullable=False),  # Ed25519 public: the files belong together
)
_devices = sa.Table(
    "devices",
    _metadata,
    sa.Column("device", sa.String, primary_key=True),
    sa.Column("signing_key", sa.LargeBinary, nullable=False),
    sa.Column("certificate", sa.LargeBinary, nullable=False),
    sa.Column("enrolled_at", sa.Integer, nullable=False),  # Unix seconds
)
_tokens = sa.Table(
    "tokens",
    _metadata,
    sa.Column("token_id", sa.String, primary_key=True),
    sa.Column("secret_hash", sa.LargeBinary, nullable=False),  # SHA-256
    sa.Column("expires_at", sa.Integer, nullable=False),  # Unix seconds
    sa.Column("device", sa.String),  # the name it is bound to
    sa.Column("used_by", sa.LargeBinary),  # Ed25519 public
    sa.Column("used_as", sa.String, sa.ForeignKey(_devices.c.device)),
)


class TokenRow(NamedTuple):
    """``expires_at``: Unix seconds. ``device``: the only name it is good for. ``used_*``: by which key, as whom."""

    token_id: str
    expires_at: int
    device: DeviceId | None
    used_by: bytes | None
    used_as: DeviceId | None


class DeviceRow(NamedTuple):
    """``signing_key``: Ed25519 public. ``certificate``: encoded SignedBytes. ``enrolled_at``: Unix seconds."""

    device: DeviceId
    signing_key: bytes
    certificate: bytes
    enrolled_at: int


class Store:
    """The database of one registrar."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._engine = sa.create_engine(
            sa.URL.create("sqlite", database=str(path)),
            connect_args={"timeout": _BUSY_S},
            hide_parameters=True,
        )
        sa.event.listen(self._engine, "connect", _configure)
        sa.event.listen(self._engine, "begin", _begin)

    def initialize(self, federation: FederationId, root: VerifyKey) -> None:
        """Make the tables, in one transaction. Raises RegistrarError."""
        with self._connection() as connection:
            _metadata.create_all(connection)
            row = {"schema_version": _SCHEMA_VERSION, "name": federation, "root_key": root.raw}
            connection.execute(_federation.insert().values(row))

    def federation(self) -> tuple[str, bytes]:
        """Name and root public key as written by ``initialize``. Raises RegistrarError."""
        with self._connection() as connection:
            row = connection.execute(sa.select(_federation)).one_or_none()
        if row is None or row.schema_version != _SCHEMA_VERSION:
            raise RegistrarError(f"{self._path} is of another version: use the software that made it")
        return row.name, row.root_key

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """All or nothing, and alone: other processes wait. Raises RegistrarError if the disk or file fails."""
        with self._connection() as connection:
            yield Transaction(connection)

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _connection(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except (sa.exc.DBAPIError, sqlite3.Error) as error:  # the latter from ``_configure``
            reason = error.orig if isinstance(error, sa.exc.DBAPIError) else error
            raise RegistrarError(
                f"the registrar's database {self._path} failed: {reason}; check the disk, its space and the "
                "file's permissions, or restore the folder from its backup"
            ) from error


class Transaction:
    """The rows, inside one transaction."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def add_token(self, token_id: str, secret_hash: bytes, expires_at: int, device: DeviceId | None) -> None:
        self._connection.execute(
            _tokens.insert().values(
                token_id=token_id, secret_hash=secret_hash, expires_at=expires_at, device=device
            )
        )

    def token(self, token_id: str) -> tuple[TokenRow, bytes] | None:
        """The token and the hash of its secret."""
        row = self._connection.execute(sa.select(_tokens).where(_tokens.c.token_id == token_id)).one_or_none()
        return None if row is None else (_token(row), row.secret_hash)

    def tokens(self) -> list[TokenRow]:
        """In the order of expiry."""
        rows = self._connection.execute(sa.select(_tokens).order_by(_tokens.c.expires_at, _tokens.c.token_id))
        return [_token(row) for row in rows]

    def use_token(self, token_id: str, key: bytes, device: DeviceId) -> None:
        self._connection.execute(
            _tokens.update().where(_tokens.c.token_id == token_id).values(used_by=key, used_as=device)
        )

    def add_device(self, row: DeviceRow) -> None:
        self._connection.execute(_devices.insert().values(row._asdict()))

    def device(self, name: DeviceId) -> DeviceRow | None:
        row = self._connection.execute(sa.select(_devices).where(_devices.c.device == name)).one_or_none()
        return None if row is None else _device(row)

    def devices(self) -> list[DeviceRow]:
        """In the order of names."""
        return [
            _device(row) for row in self._connection.execute(sa.select(_devices).order_by(_devices.c.device))
        ]


def _token(row: sa.Row[Any]) -> TokenRow:
    return TokenRow(row.token_id, row.expires_at, row.device, row.used_by, row.used_as)


def _device(row: sa.Row[Any]) -> DeviceRow:
    return DeviceRow(row.device, row.signing_key, row.certificate, row.enrolled_at)


def _configure(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = (
        None  # transactions begin where ``_begin`` says, not where the driver guesses
    )
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: sa.Connection) -> None:
    # A transaction that reads first and writes later would fail if another process wrote in between.
    connection.exec_driver_sql("BEGIN IMMEDIATE")
