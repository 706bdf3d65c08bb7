"""The operator's orders between the ledger and the core: read, made sense of, answered; and given, by commands."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from aggregator.core import events
from aggregator.core.state import State
from aggregator.ledger.ledger import Ledger
from aggregator.ledger.values import OrderKind, OrderRow, OrderSettled
from aggregator.versions import VersionError, VersionStore
from aggregator.work import Work
from edge_runtime.protocol.errors import Fault, FleetgradError, RemoteProtocolError
from edge_runtime.protocol.ids import DeviceId, device_id

LOOK_EVERY_S = 1.0
_POLL_S = 0.1


class OrderRefused(
    FleetgradError,
    fault=Fault.OPERATOR,
    remedy="do what the text says; `aggregator status` shows what there is",
):
    """The aggregator does not do what it was ordered to; nothing has changed."""


@dataclass(kw_only=True)
class OrderBox:
    """The serving aggregator's side."""

    ledger: Ledger
    versions: VersionStore
    _looked_at: float | None = field(default=None, init=False)

    def take(
        self, now: float, state: State, decide: Callable[[events.Event, Work], events.Decision]
    ) -> Iterator[Work]:
        """What each order that waits leads to, oldest first; the caller commits each before it asks for the next.

        An order is settled in the transaction of its records, so it is obeyed exactly once. The ledger is looked
        into at most once in ``LOOK_EVERY_S``; ``now``: seconds; ``decide``: runs the core's step.
        """
        if self._looked_at is not None and 0 <= now - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = now
        for row in self.ledger.waiting_orders():
            work = Work()
            try:
                decision = decide(self.understand(row, state.version), work)
                obeyed, answer = not decision.refused, decision.answer
            except OrderRefused as error:
                obeyed, answer = False, str(error)
            work.orders.append(OrderSettled(id=row.id, obeyed=obeyed, answer=answer))
            work.say(
                "order_obeyed" if obeyed else "order_refused",
                order=row.id,
                kind=row.kind,
                argument=row.argument or None,
                by=row.by,
                answer=answer,
            )
            yield work

    def understand(self, row: OrderRow, version: int) -> events.Order:
        """The order for the core; ``version``: the newest.

        For a rollback the parameters of the next version are durable when it returns: the records follow them.
        Raises OrderRefused for an unknown kind, device or version, and for a version that is no longer on disk.
        """
        match row.kind:
            case OrderKind.PAUSE.value:
                return events.PauseOrdered()
            case OrderKind.RESUME.value:
                return events.ResumeOrdered()
            case OrderKind.DRAIN.value:
                return events.DrainOrdered()
            case OrderKind.EVICT.value:
                return events.EvictOrdered(self._known(row.argument))
            case OrderKind.READMIT.value:
                return events.ReadmitOrdered(self._known(row.argument))
            case OrderKind.ROLLBACK.value:
                return self._restore(row.argument, version)
            case _:
                raise OrderRefused(f"this aggregator knows no order {row.kind!r}: update it")

    def _known(self, name: str) -> DeviceId:
        try:
            device = device_id(name)
        except RemoteProtocolError as error:
            raise OrderRefused(error.detail) from error
        if self.ledger.device(device) is None:
            raise OrderRefused(f"no device {device} has ever checked in: see `aggregator status`")
        return device

    def _restore(self, text: str, newest: int) -> events.RestoreOrdered:
        number = int(text) if text.isdecimal() and text.isascii() and len(text) < 19 else -1
        row = self.ledger.version(number) if number > 0 else None
        if row is None and number != 0:
            raise OrderRefused(f"there is no version {text[:20]}; the newest is {newest}")
        digest = row.model_digest if row is not None else self.versions.initial_digest()
        if number == newest:
            return events.RestoreOrdered(of=number, model_digest=digest)  # the core has the words for it
        try:
            theta = self.versions.read_parameters(number, digest)
        except VersionError as error:
            raise OrderRefused(str(error)) from error
        self.versions.write_parameters(newest + 1, theta)
        return events.RestoreOrdered(of=number, model_digest=digest)


def await_answer(
    ledger: Ledger, number: int, wait_s: float, sleep: Callable[[float], None] = time.sleep
) -> str | None:
    """What the aggregator answered within ``wait_s`` seconds; None: nothing yet. Raises OrderRefused."""
    until = time.monotonic() + wait_s
    while True:
        row = ledger.order(number)
        if row is not None and row.answer is not None:
            if not row.obeyed:
                raise OrderRefused(row.answer)
            return row.answer
        if time.monotonic() >= until:
            return None
        sleep(_POLL_S)
