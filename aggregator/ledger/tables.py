"""The tables. ``journal`` is the truth of rounds, versions and orders that were obeyed: ``checkins``, ``rounds``,
``updates``, ``versions``, ``standing`` and ``exclusions`` follow.

``orders`` is the operator's letter box: any connection may put one in, only the serving aggregator settles it.

Check-ins leave the journal once a later round has opened; the tickets they gave stay in ``checkins``.

Times are seconds of the aggregator's clock. Nothing here is secret; payloads and keys that sign are elsewhere.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Dialect,
    Float,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
)

SCHEMA = 2
MAX_INT64 = (1 << 63) - 1
_BIAS = 1 << 63


class Unsigned64(TypeDecorator[int]):
    """An integer in [0, 2^64), as the wire's uint64; kept less 2^63, which keeps the order."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Dialect) -> int | None:
        return None if value is None else value - _BIAS

    def process_result_value(self, value: int | None, dialect: Dialect) -> int | None:
        return None if value is None else value + _BIAS


metadata = MetaData()

meta = Table(
    "meta",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("federation", String(48), nullable=False),
    Column("schema", Integer, nullable=False),
    CheckConstraint("id = 1"),
)

epoch = Table(
    "epoch",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("epoch", BigInteger, nullable=False),  # raised by every claim: the fence
    Column("holder", Text, nullable=False),  # empty: released
    Column("generation", BigInteger, nullable=False),
    Column("seen_at", Float(53), nullable=False),  # of the last claim or commit
    CheckConstraint("id = 1"),
)

journal = Table(
    "journal",
    metadata,
    Column("seq", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=False),
    Column("epoch", BigInteger, nullable=False),
    Column("at", Float(53), nullable=False),
    Column("kind", String(32), nullable=False),
    Column("generation", BigInteger),  # null: not about a round
    Column("round", BigInteger),
    Column("body", Text, nullable=False),
)

checkins = Table(
    "checkins",
    metadata,
    Column("device", String(48), primary_key=True),
    Column("sequence", Unsigned64, nullable=False),
    Column("expires_at", Float(53), nullable=False),
    Column("samples", BigInteger, nullable=False),
    Column("codecs", Text, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column(
        "available", Boolean, nullable=False
    ),  # false: used up by a round, or its device may not take part
)

devices = Table(
    "devices",
    metadata,
    Column("device", String(48), primary_key=True),
    Column("signing_key", LargeBinary, nullable=False),
    Column("certificate", LargeBinary, nullable=False),
    Column("last_sequence", Unsigned64, nullable=False),
    Column("first_seen", Float(53), nullable=False),
    Column("last_seen", Float(53), nullable=False),
)

rounds = Table(
    "rounds",
    metadata,
    Column("generation", BigInteger, primary_key=True, autoincrement=False),
    Column("round", BigInteger, primary_key=True, autoincrement=False),
    Column("phase", String(16), nullable=False),
    Column("base_version", BigInteger, nullable=False),
    Column(
        "opened_seq", BigInteger, nullable=False
    ),  # of its RoundOpened in the journal: recovery starts there
    Column("opened_at", Float(53), nullable=False),
    Column("closed_at", Float(53)),  # published or aborted
    Column("cohort_size", Integer, nullable=False),
    Column("accepted", Integer),  # null: not frozen
    Column("reason", Text),  # of an aborted round
)

updates = Table(
    "updates",
    metadata,
    Column("generation", BigInteger, primary_key=True, autoincrement=False),
    Column("round", BigInteger, primary_key=True, autoincrement=False),
    Column("device", String(48), primary_key=True),
    Column("digest", LargeBinary, nullable=False),
    Column("samples", BigInteger, nullable=False),
    Column("outcome", String(16)),  # null: the round is open
    Column("version", BigInteger),  # that it is in, if aggregated
    Column("reason", Text),  # if excluded
    ForeignKeyConstraint(["generation", "round"], ["rounds.generation", "rounds.round"]),
    CheckConstraint("(version IS NOT NULL) = (outcome IS NOT NULL AND outcome = 'aggregated')"),
)

versions = Table(
    "versions",
    metadata,
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("generation", BigInteger),  # of the round that made it; null: no round did
    Column("round", BigInteger),
    Column("model_digest", LargeBinary, nullable=False),
    Column("restored_from", BigInteger),  # the earlier version that it repeats
    ForeignKeyConstraint(["generation", "round"], ["rounds.generation", "rounds.round"]),
    CheckConstraint(
        "(round IS NULL) = (generation IS NULL) AND (round IS NULL) = (restored_from IS NOT NULL)"
    ),
    Index("one_version_per_round", "generation", "round", unique=True),
)

standing = Table(
    "standing",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("paused", Boolean, nullable=False),
    Column("draining", Boolean, nullable=False),
    Column("revocations", Unsigned64, nullable=False),  # the number of the root's list; 0: none was taken
    CheckConstraint("id = 1"),
)

exclusions = Table(
    "exclusions",
    metadata,
    Column("device", String(48), primary_key=True),
    Column("evicted_at", Float(53)),  # null: not evicted
    Column("revoked_epoch", BigInteger),  # certificates up to this epoch are void; null: none is
)

orders = Table(
    "orders",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("at", Float(53), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("argument", Text, nullable=False),  # a device or a version; empty where the kind takes none
    Column("by", Text, nullable=False),
    Column("settled_at", Float(53)),  # null: it waits
    Column("obeyed", Boolean),  # null: it waits; false: refused
    Column("answer", Text),
    CheckConstraint("(settled_at IS NULL) = (obeyed IS NULL) AND (settled_at IS NULL) = (answer IS NULL)"),
    sqlite_autoincrement=True,
)

evaluations = Table(
    "evaluations",
    metadata,
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("at", Float(53), nullable=False),
    Column("samples", BigInteger, nullable=False),
    Column("metrics", Text, nullable=False),
)

pieces = Table(
    "pieces",
    metadata,
    Column("generation", BigInteger, primary_key=True, autoincrement=False),
    Column("round", BigInteger, primary_key=True, autoincrement=False),
    Column("device", String(48), primary_key=True),
    Column("digest", LargeBinary, primary_key=True),
    Column("piece", Integer, primary_key=True, autoincrement=False),
    Column("piece_count", Integer, nullable=False),
    Column("segment", Integer, nullable=False),
    Column("offset", BigInteger, nullable=False),
    Column("length", BigInteger, nullable=False),
)

telemetry = Table(
    "telemetry",
    metadata,
    Column("device", String(48), primary_key=True),
    Column("at", Float(53), nullable=False),
    Column("latest", Text, nullable=False),
    Column("reports", BigInteger, nullable=False),
    Column("train_s", Float(53), nullable=False),
    Column("steps", BigInteger, nullable=False),
    Column("samples", BigInteger, nullable=False),
    Column("peak_memory_bytes", BigInteger, nullable=False),
    Column("bytes_up", BigInteger, nullable=False),
    Column("bytes_down", BigInteger, nullable=False),
)

counters = Table(
    "counters",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("value", BigInteger, nullable=False),
)
