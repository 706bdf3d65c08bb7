"""The ledger: opened, claimed by one aggregator at a time, written one transaction per batch, read by anybody."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, Engine, insert, select, update
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from aggregator.core.records import Record
from aggregator.core.state import State
from aggregator.inbox.segments import Position
from aggregator.ledger import database, projections, queries, recovery, rows, tables
from aggregator.ledger.errors import FencedError, LedgerError, LedgerInUseError
from aggregator.ledger.values import (
    Batch,
    DeviceRow,
    EvaluationRow,
    OrderKind,
    OrderRow,
    Piece,
    Presence,
    RoundRow,
    Standing,
    TelemetryRow,
    Totals,
    UpdateRow,
    VersionRow,
)
from edge_runtime.protocol.errors import LocalProtocolError
from edge_runtime.protocol.ids import DeviceId, FederationId, RoundId

Clock = Callable[[], float]


class Ledger:
    """See ``open``. Every method may raise LedgerError when the database fails; nothing is half done then.

    Commit from one thread at a time; reading is safe from others.
    """

    def __init__(self, url: str, engine: Engine, clock: Clock, *, read_only: bool) -> None:
        """For ``open``."""
        self._url = url
        self._engine = engine
        self._reader = database.reading(engine)
        self._writer = database.writing(engine)
        self._clock = clock
        self._read_only = read_only
        self._epoch: int | None = None

    @classmethod
    def open(
        cls, url: str, *, federation: FederationId, clock: Clock = time.time, read_only: bool = False
    ) -> Ledger:
        """The ledger at a SQLAlchemy URL (``database.sqlite_url`` makes one of a path), created if it is not there.

        ``read_only``: for looking while an aggregator serves; neither creates nor claims.
        Raises LedgerError for a database that is no ledger, of another federation, or of another release's schema.
        """
        ledger = cls(url, database.connect(url, read_only=read_only), clock, read_only=read_only)
        try:
            with ledger._reading() if read_only else ledger._writing() as connection:
                database.create_or_check(connection, federation, create=not read_only, now=clock())
        except BaseException:
            ledger.close()
            raise
        return ledger

    def close(self) -> None:
        """Gives up the connections, not the claim. Doing it twice is fine."""
        self._engine.dispose()

    # ---- writing ------------------------------------------------------------------------------------

    def claim(self, holder: str, take_over: bool = False, generation: int | None = None) -> int:
        """Become the one aggregator that may commit; gives the new epoch, which fences all earlier ones.

        ``holder``: names what the caller's OS lock guards (host and state folder). The same holder may claim
        again without ``take_over``: having that lock, it knows that its predecessor is dead.
        ``generation``: what rounds are opened in from now on; raised after a restore from a backup, never lowered.
        Raises LedgerInUseError if another holder has it and ``take_over`` is false, LedgerError for a generation
        below the ledger's.
        """
        if not holder:
            raise LocalProtocolError("a ledger is claimed by a holder with a name")
        with self._writing() as connection:
            # PostgreSQL: the row lock makes two claims follow one another.
            row = connection.execute(select(tables.epoch).with_for_update()).one()
            if row.holder not in ("", holder) and not take_over:
                raise LedgerInUseError(
                    f"the ledger is claimed by {row.holder}, last seen {self._clock() - row.seen_at:.0f} s ago: "
                    "stop that aggregator, or if it is gone for good use `serve --take-over`"
                )
            wanted = row.generation if generation is None else generation
            if wanted < row.generation:
                raise LedgerError(
                    f"the settings say generation {wanted}, the ledger is in generation {row.generation}: set "
                    f"generation = {row.generation}, with a certificate for it"
                )
            epoch: int = row.epoch + 1
            values = {"epoch": epoch, "holder": holder, "generation": wanted, "seen_at": self._clock()}
            connection.execute(update(tables.epoch).values(**values))
        self._epoch = epoch
        return epoch

    def release(self) -> None:
        """Give up the claim, so that any holder may have it next. Raises FencedError if it is gone already."""
        with self._writing() as connection:
            self._fence(connection)
            connection.execute(update(tables.epoch).values(holder=""))
        self._epoch = None

    def commit(self, batch: Batch) -> None:
        """All of the batch is durable when this returns, or none of it if it raises.

        Outcomes follow in the same transaction: of VersionCommitted, the stored updates are aggregated in it or
        excluded; of RoundAborted, all stored ones are aborted.
        Raises FencedError if another aggregator has claimed the ledger since, LocalProtocolError for a batch
        that contradicts the ledger or without a claim, LedgerError if the database fails.
        """
        try:
            with self._writing() as connection:
                epoch = self._fence(connection)
                now = self._clock()
                projections.append_records(connection, epoch, now, batch.records)
                rows.write_rows(connection, now, batch)
        except IntegrityError as error:
            raise LocalProtocolError(f"a batch contradicts the ledger: {error.orig}") from None

    def give_order(self, kind: OrderKind, argument: str, by: str) -> int:
        """Durable when this returns; the aggregator that has the claim settles it. Needs no claim. Gives its id."""
        order = {"at": self._clock(), "kind": kind.value, "argument": argument, "by": by}
        with self._writing() as connection:
            number: int = connection.execute(
                insert(tables.orders).returning(tables.orders.c.id), order
            ).scalar_one()
        return number

    def _fence(self, connection: Connection) -> int:
        if self._epoch is None:
            raise LocalProtocolError("the ledger is not claimed: call claim first")
        mine = connection.execute(
            update(tables.epoch).where(tables.epoch.c.epoch == self._epoch).values(seen_at=self._clock())
        )
        if mine.rowcount != 1:
            raise FencedError(
                f"another aggregator has taken the ledger over (this one had epoch {self._epoch})"
            )
        return self._epoch

    # ---- reading ------------------------------------------------------------------------------------

    def load_state(self) -> State:
        """The state after the last commit: what a fold over all records ever committed gives."""
        with self._reading() as connection:
            return recovery.load_state(connection)

    def journal(self) -> Iterator[Record]:
        """The records in the order of their commits, as of the first ``next``: all of rounds, and the check-ins
        since the last one opened; earlier check-ins are pruned, the tickets they left are in ``load_state``."""
        with self._reading() as connection:
            yield from recovery.read_journal(connection)

    def is_claimed(self) -> bool:
        """An aggregator serves it, or died without giving it up."""
        with self._reading() as connection:
            return connection.scalar(select(tables.epoch.c.holder)) != ""

    def standing(self) -> Standing:
        """Paused, draining, evicted and revoked: what a fold over all records gives."""
        with self._reading() as connection:
            return queries.standing(connection)

    def order(self, number: int) -> OrderRow | None:
        with self._reading() as connection:
            return queries.order(connection, number)

    def orders(self, limit: int) -> list[OrderRow]:
        """The last ``limit``, newest first."""
        with self._reading() as connection:
            return queries.orders(connection, limit=limit)

    def waiting_orders(self) -> list[OrderRow]:
        """Those not settled yet, oldest first."""
        with self._reading() as connection:
            return queries.orders(connection, waiting=True)

    def evaluations(self) -> list[EvaluationRow]:
        """By version; version 0 is the artifact's."""
        with self._reading() as connection:
            return queries.evaluations(connection)

    def evaluation(self, version: int) -> EvaluationRow | None:
        with self._reading() as connection:
            return next(iter(queries.evaluations(connection, version)), None)

    def find_update(self, round_id: RoundId, device: DeviceId) -> UpdateRow | None:
        """The stored update of a device for a round, of any round ever."""
        with self._reading() as connection:
            return next(iter(queries.updates(connection, round_id, device)), None)

    def updates(self, round_id: RoundId) -> list[UpdateRow]:
        """The stored updates of a round, by device."""
        with self._reading() as connection:
            return queries.updates(connection, round_id)

    def device(self, device: DeviceId) -> DeviceRow | None:
        with self._reading() as connection:
            return next(iter(queries.devices(connection, device)), None)

    def devices(self) -> list[DeviceRow]:
        """All that ever proved themselves, by name."""
        with self._reading() as connection:
            return queries.devices(connection)

    def versions(self) -> list[VersionRow]:
        """From 1 up; version 0 is the artifact's."""
        with self._reading() as connection:
            return queries.versions(connection)

    def version(self, number: int) -> VersionRow | None:
        """The version of this number; None if there is none, and for 0, which is the artifact's."""
        with self._reading() as connection:
            return next(iter(queries.versions(connection, number)), None)

    def rounds(self, limit: int) -> list[RoundRow]:
        """The last ``limit``, newest first."""
        with self._reading() as connection:
            return queries.rounds(connection, limit)

    def totals(self) -> Totals:
        with self._reading() as connection:
            return queries.totals(connection)

    def presence(self, now: float) -> Presence:
        """How many devices are known and how many are present at ``now``, in the aggregator's seconds."""
        with self._reading() as connection:
            return queries.presence(connection, now)

    def is_ours(self) -> bool:
        """Claimed by this object, and by nobody since."""
        with self._reading() as connection:
            return self._epoch is not None and queries.epoch(connection) == self._epoch

    def telemetry(self) -> list[TelemetryRow]:
        """By device."""
        with self._reading() as connection:
            return queries.telemetry(connection)

    def pieces_of(self, round_id: RoundId, device: DeviceId) -> list[Position]:
        """Where the pieces of a stored update lie, in order; empty if none is stored or they were forgotten."""
        with self._reading() as connection:
            return queries.pieces_of(connection, round_id, device)

    def unfinished_pieces(self, round_id: RoundId) -> list[Piece]:
        """Pieces of devices without a stored update in the round: what a restart goes on assembling."""
        with self._reading() as connection:
            return queries.unfinished_pieces(connection, round_id)

    def durable_ends(self) -> dict[RoundId, Position]:
        """What ``Inbox`` must find on disk: the furthest indexed position of each round."""
        with self._reading() as connection:
            return queries.durable_ends(connection)

    # ---- transactions -------------------------------------------------------------------------------

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """One consistent view of all tables, for ``check_invariants``."""
        with self._reading() as connection:
            yield connection

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        try:
            with self._reader.begin() as connection:
                yield connection
        except SQLAlchemyError as error:
            raise database.explain(self._url, error) from error

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        if self._read_only:
            raise LocalProtocolError("this ledger was opened for reading only")
        try:
            with self._writer.begin() as connection:
                yield connection
        except IntegrityError:
            raise
        except SQLAlchemyError as error:
            raise database.explain(self._url, error) from error


__all__ = ["FencedError", "Ledger", "LedgerError", "LedgerInUseError"]
