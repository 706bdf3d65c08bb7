"""What the registrar must not forget: tokens, devices, revocations, TLS certificates.

SQLite, so that another process may list them or add a token while one answers. A transaction is on disk when its
block ends (WAL, synchronous FULL).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from aggregator.registrar.folder import RegistrarError
from edge_runtime.protocol.crypto.keys import VerifyKey
from edge_runtime.protocol.ids import DeviceId, FederationId

_SCHEMA_VERSION = 2  # 2 added the three tables of revocation
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

_revocations = sa.Table(
    "revocations",
    _metadata,
    sa.Column("signing_key", sa.LargeBinary, primary_key=True),  # Ed25519 public; never certified again
    sa.Column("device", sa.String, primary_key=True),  # a key may have been certified under two names
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("revoked_at", sa.Integer, nullable=False),  # Unix seconds
)
_lists = sa.Table(  # what was published; the newest counts
    "revocation_lists",
    _metadata,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("revocations", sa.LargeBinary, nullable=False),  # encoded SignedBytes of a RevocationList
    sa.Column("crl", sa.LargeBinary),  # PEM; NULL while there is no TLS authority
)
_tls_certificates = sa.Table(
    "tls_certificates",
    _metadata,
    sa.Column("serial", sa.String, primary_key=True),  # hex
    sa.Column("name", sa.String, nullable=False),  # common name
    sa.Column("not_after", sa.Integer, nullable=False),  # Unix seconds
    sa.Column("revoked_at", sa.Integer),  # Unix seconds
)


class TokenRow(NamedTuple):
    """``expires_at``: Unix seconds. ``device``: the only name it is good for. ``used_*``: by which key, as whom."""

    token_id: str
    expires_at: int
    device: DeviceId | None
    used_by: bytes | None
    used_as: DeviceId | None


class DeviceRow(NamedTuple):
    """``signing_key``: Ed25519 public. ``certificate``: encoded SignedBytes. ``*_at``: Unix seconds."""

    device: DeviceId
    signing_key: bytes
    certificate: bytes
    enrolled_at: int
    revoked_at: int | None = None


class TlsRow(NamedTuple):
    """A client certificate of the registrar's TLS authority. ``name``: common name; times: Unix seconds."""

    serial: int
    name: str
    not_after: int
    revoked_at: int | None = None


class Published(NamedTuple):
    """``revocations``: encoded SignedBytes of a RevocationList; ``crl``: PEM, None without TLS."""

    number: int
    revocations: bytes
    crl: bytes | None


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
            if row is not None and row.schema_version == 1:
                _metadata.create_all(connection)
                connection.execute(_federation.update().values(schema_version=_SCHEMA_VERSION))
            elif row is None or row.schema_version != _SCHEMA_VERSION:
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

    def expire_tokens(self, device: DeviceId, now: int) -> int:
        """Unused tokens for exactly this name end now; how many there were."""
        wanted = (_tokens.c.device == device, _tokens.c.used_by.is_(None), _tokens.c.expires_at > now)
        return self._connection.execute(_tokens.update().where(*wanted).values(expires_at=now)).rowcount

    def put_device(self, row: DeviceRow) -> None:
        """In place of an older row of that name."""
        values = row._asdict()
        del values["revoked_at"]
        insert = sqlite_insert(_devices).values(values)
        self._connection.execute(insert.on_conflict_do_update([_devices.c.device], set_=values))

    def device(self, name: DeviceId) -> DeviceRow | None:
        row = self._connection.execute(_DEVICES.where(_devices.c.device == name)).one_or_none()
        return None if row is None else _device(row)

    def devices(self) -> list[DeviceRow]:
        """In the order of names."""
        return [_device(row) for row in self._connection.execute(_DEVICES.order_by(_devices.c.device))]

    # ---- revocation ---------------------------------------------------------------------------------

    def add_revocation(self, key: bytes, device: DeviceId, epoch: int, now: int) -> None:
        self._connection.execute(
            _revocations.insert().values(signing_key=key, device=device, epoch=epoch, revoked_at=now)
        )

    def is_revoked(self, key: bytes) -> bool:
        query = sa.select(_revocations.c.epoch).where(_revocations.c.signing_key == key)
        return self._connection.execute(query).first() is not None

    def revoked_epochs(self) -> dict[DeviceId, int]:
        """The highest revoked epoch of each device that has one, in the order of names."""
        columns = (_revocations.c.device, sa.func.max(_revocations.c.epoch))
        query = sa.select(*columns).group_by(_revocations.c.device).order_by(_revocations.c.device)
        return {DeviceId(device): epoch for device, epoch in self._connection.execute(query)}

    def publish(self, row: Published) -> None:
        """In place of an older row of that number."""
        values = row._asdict()
        insert = sqlite_insert(_lists).values(values)
        self._connection.execute(insert.on_conflict_do_update([_lists.c.number], set_=values))

    def published(self) -> Published | None:
        """The newest."""
        row = self._connection.execute(sa.select(_lists).order_by(_lists.c.number.desc()).limit(1)).first()
        return None if row is None else Published(row.number, row.revocations, row.crl)

    def add_tls(self, row: TlsRow) -> None:
        self._connection.execute(
            _tls_certificates.insert().values({**row._asdict(), "serial": f"{row.serial:x}"})
        )

    def revoke_tls(self, name: str, now: int) -> int:
        """Every certificate of this name that is not revoked yet; how many there were."""
        wanted = (_tls_certificates.c.name == name, _tls_certificates.c.revoked_at.is_(None))
        return self._connection.execute(
            _tls_certificates.update().where(*wanted).values(revoked_at=now)
        ).rowcount

    def tls_certificates(self) -> list[TlsRow]:
        """In the order of names and expiry."""
        query = sa.select(_tls_certificates).order_by(_tls_certificates.c.name, _tls_certificates.c.not_after)
        return [
            TlsRow(int(row.serial, 16), row.name, row.not_after, row.revoked_at)
            for row in self._connection.execute(query)
        ]


_DEVICES = sa.select(_devices, _revocations.c.revoked_at).join_from(
    _devices,
    _revocations,
    (_devices.c.signing_key == _revocations.c.signing_key) & (_devices.c.device == _revocations.c.device),
    isouter=True,
)


def _token(row: sa.Row[Any]) -> TokenRow:
    return TokenRow(row.token_id, row.expires_at, row.device, row.used_by, row.used_as)


def _device(row: sa.Row[Any]) -> DeviceRow:
    return DeviceRow(row.device, row.signing_key, row.certificate, row.enrolled_at, row.revoked_at)


def _configure(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = (
        None  # transactions begin where ``_begin`` says, not where the driver guesses
    )
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: sa.Connection) -> None:
    # A transaction that reads first and writes later would fail if another process wrote in between.
    connection.exec_driver_sql("BEGIN IMMEDIATE")
