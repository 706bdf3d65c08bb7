"""A broker in memory that keeps the contract of ``base``, with faults as values drawn from a seeded source.

No clock and no threads of its own. ``immediate`` brokers deliver inside ``publish``; others hold every delivery
until ``deliver`` is called, so a simulator owns the schedule. Outages are operations: ``cut``, ``reconnect``,
``stop``, ``start``, and a transport's ``kill``.
"""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from edge_runtime.transport.base import (
    BrokerUnreachable,
    Connected,
    Counters,
    Disconnected,
    Event,
    NotConnected,
    Received,
    Will,
    check_fits,
    check_pattern,
    check_topic,
    matches,
    publish_packet_bytes,
)


@dataclass(frozen=True, kw_only=True)
class Faults:
    """Probabilities in [0, 1], drawn per message and receiver.

    ``drop``: the broker loses it after acknowledging (queue overflow, kill -9). ``duplicate``: delivered twice.
    ``reorder``: ``deliver`` takes any waiting message instead of the oldest, so some are delayed at will.
    """

    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0


@dataclass(frozen=True)
class _Message:
    topic: str
    payload: bytes
    retained: bool


class _Token(NamedTuple):
    connection: int
    message_id: int


@dataclass
class _Session:
    """What the broker remembers of a client between connections."""

    patterns: dict[str, None] = field(default_factory=dict)
    waiting: OrderedDict[int, _Message] = field(default_factory=OrderedDict)
    unacked: OrderedDict[int, _Message] = field(default_factory=OrderedDict)
    transport: MemoryTransport | None = None


class MemoryBroker:
    """Give it to ``MemoryTransport``. With ``faults`` a seeded ``random`` is required; runs then repeat exactly."""

    def __init__(
        self,
        *,
        immediate: bool = True,
        max_packet_bytes: int | None = None,
        faults: Faults | None = None,
        random: Random | None = None,
    ) -> None:
        if faults is not None and random is None:
            raise ValueError("faults are drawn from a seeded random source: pass `random`")
        self.max_packet_bytes = max_packet_bytes
        self._immediate = immediate
        self._faults = faults or Faults()
        self._random = random or Random(0)  # noqa: S311 - a simulation; unused without faults
        self._lock = threading.RLock()
        self._running = True
        self._retained: dict[str, bytes] = {}
        self._sessions: dict[str, _Session] = {}
        self._away: list[MemoryTransport] = []  # open, but cut off, oldest first
        self._next_id = 0

    def waiting(self) -> int:
        """Messages that ``deliver`` can hand over now."""
        with self._lock:
            return sum(len(session.waiting) for session in self._sessions.values() if session.transport)

    def deliver(self, count: int | None = None) -> int:
        """Hand over up to ``count`` waiting messages (None: all), in order unless ``reorder`` strikes.

        Returns how many. Messages for clients that are away wait in their session.
        """
        with self._lock:
            done = 0
            while count is None or done < count:
                waiting = [
                    (message_id, session)
                    for session in self._sessions.values()
                    if session.transport
                    for message_id in session.waiting
                ]
                if not waiting:
                    break
                if self._strikes(self._faults.reorder):
                    message_id, session = self._random.choice(waiting)
                else:
                    message_id, session = min(waiting, key=lambda entry: entry[0])
                self._hand_over(session, message_id)
                done += 1
            return done

    def cut(self, client_id: str) -> None:
        """The client's connection breaks: its last will fires; it stays away until ``reconnect`` or ``start``."""
        with self._lock:
            self._drop_link(client_id, "the connection broke")

    def reconnect(self, client_id: str) -> None:
        """A client that was cut off comes back (a real one would after its back-off). No-op while stopped."""
        with self._lock:
            for transport in self._away:
                if transport.client_id == client_id and self._running:
                    self._away.remove(transport)
                    self._attach(transport)
                    break

    def stop(self, *, lose_state: bool = False) -> None:
        """The broker ends; ``lose_state``: as kill -9 without persistence, sessions and retained messages go."""
        with self._lock:
            self._running = False
            for client_id in list(self._sessions):
                self._drop_link(client_id, "the broker stopped", fire_will=False)
            if lose_state:
                self._sessions.clear()
                self._retained.clear()

    def start(self) -> None:
        """The broker runs again and every open transport comes back, in the order in which they were lost."""
        with self._lock:
            self._running = True
            returning, self._away = self._away, []
            for transport in returning:
                self._attach(transport)

    # Called by MemoryTransport.

    def _open(self, transport: MemoryTransport) -> None:
        with self._lock:
            if not self._running:
                raise BrokerUnreachable("memory", 0, "connection refused", "start the broker in memory first")
            self._attach(transport)

    def _leave(self, transport: MemoryTransport, *, politely: bool) -> None:
        with self._lock:
            if transport in self._away:
                self._away.remove(transport)
            session = self._sessions.get(transport.client_id)
            if session is not None and session.transport is transport:
                session.transport = None
                if not politely:
                    self._fire_will(transport)

    def _attach(self, transport: MemoryTransport) -> None:
        known = transport.client_id in self._sessions
        if known:
            self._drop_link(transport.client_id, "the broker said goodbye: Session taken over")
        session = self._sessions.setdefault(transport.client_id, _Session())
        session.transport = transport
        session.waiting = OrderedDict([*session.unacked.items(), *session.waiting.items()])
        session.unacked = OrderedDict()
        transport._on_connected(known, self.max_packet_bytes)
        for pattern in transport._patterns:
            self._subscribe(session, pattern)
        self._settle()

    def _drop_link(self, client_id: str, reason: str, *, fire_will: bool = True) -> None:
        session = self._sessions.get(client_id)
        if session is None or session.transport is None:
            return
        transport, session.transport = session.transport, None
        self._away.append(transport)
        transport._on_disconnected(reason)
        if fire_will:
            self._fire_will(transport)

    def _fire_will(self, transport: MemoryTransport) -> None:
        if transport.will is not None:
            self._publish(transport.will.topic, transport.will.payload, transport.will.retain)

    def _publish(self, topic: str, payload: bytes, retain: bool) -> None:
        with self._lock:
            if retain and payload:
                self._retained[topic] = payload
            elif retain:
                self._retained.pop(topic, None)  # MQTT 5.0, 3.3.1.3: an empty payload clears it
            for session in self._sessions.values():
                if any(matches(pattern, topic) for pattern in session.patterns):
                    self._route(session, _Message(topic, payload, retained=False))
            self._settle()

    def _subscribe(self, session: _Session, pattern: str) -> None:
        session.patterns[pattern] = None
        for topic, payload in self._retained.items():
            if matches(pattern, topic):
                self._route(session, _Message(topic, payload, retained=True))

    def _subscribe_now(self, transport: MemoryTransport, pattern: str) -> None:
        with self._lock:
            session = self._sessions.get(transport.client_id)
            if session is not None and session.transport is transport:
                self._subscribe(session, pattern)
                self._settle()

    def _unsubscribe_now(self, transport: MemoryTransport, pattern: str) -> None:
        with self._lock:
            session = self._sessions.get(transport.client_id)
            if session is not None and session.transport is transport:
                session.patterns.pop(pattern, None)

    def _acknowledge(self, transport: MemoryTransport, message_id: int) -> None:
        with self._lock:
            session = self._sessions.get(transport.client_id)
            if session is not None and session.transport is transport:
                session.unacked.pop(message_id, None)

    def _route(self, session: _Session, message: _Message) -> None:
        if self._strikes(self._faults.drop):
            return
        for _ in range(2 if self._strikes(self._faults.duplicate) else 1):
            self._next_id += 1
            session.waiting[self._next_id] = message

    def _hand_over(self, session: _Session, message_id: int) -> None:
        message = session.waiting.pop(message_id)
        session.unacked[message_id] = message
        if session.transport is not None:
            session.transport._on_message(message, message_id)

    def _settle(self) -> None:
        if self._immediate:
            self.deliver()

    def _strikes(self, probability: float) -> bool:
        return probability > 0.0 and self._random.random() < probability


class MemoryTransport:
    """``Transport`` over a ``MemoryBroker``."""

    def __init__(self, broker: MemoryBroker, client_id: str, *, will: Will | None = None) -> None:
        self.client_id = client_id
        self.will = will
        self.counters = Counters()
        self._broker = broker
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._patterns: dict[str, None] = {}
        self._connection = 0  # number of the connection; odd while it stands

    def open(self, timeout_s: float = 5.0) -> None:
        """See ``Transport``; waits for nothing."""
        self._broker._open(self)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """See ``Transport``; never congested."""
        check_topic(topic)
        if not self._connection % 2:
            raise NotConnected("not connected to the broker in memory; nothing is queued")
        self.counters.bytes_up += check_fits(topic, payload, self._broker.max_packet_bytes)
        self._broker._publish(topic, bytes(payload), retain)

    def flush(self, timeout_s: float) -> bool:
        """See ``Transport``; the broker takes everything at once."""
        return True

    def subscribe(self, pattern: str) -> None:
        """See ``Transport``."""
        check_pattern(pattern)
        self._patterns[pattern] = None
        self._broker._subscribe_now(self, pattern)

    def unsubscribe(self, pattern: str) -> None:
        """See ``Transport``."""
        self._patterns.pop(pattern, None)
        self._broker._unsubscribe_now(self, pattern)

    def next_event(self, timeout_s: float) -> Event | None:
        """See ``Transport``."""
        try:
            return self._events.get(timeout=timeout_s) if timeout_s > 0 else self._events.get_nowait()
        except queue.Empty:
            return None

    def ack(self, received: Received) -> None:
        """See ``Transport``."""
        token = received.token
        if isinstance(token, _Token) and token.connection == self._connection:
            self._broker._acknowledge(self, token.message_id)

    def close(self) -> None:
        """See ``Transport``."""
        self._end(politely=True)

    def kill(self) -> None:
        """The process dies: nothing more is said, the last will fires, the session stays."""
        self._end(politely=False)

    def _end(self, *, politely: bool) -> None:
        self._connection += self._connection % 2
        self._broker._leave(self, politely=politely)

    # Called by MemoryBroker, under its lock.

    def _on_connected(self, session_present: bool, max_packet_bytes: int | None) -> None:
        self.counters.reconnects += self._connection > 0
        self._connection += 1
        self._events.put(Connected(session_present, max_packet_bytes))

    def _on_disconnected(self, reason: str) -> None:
        self._connection += 1
        self._events.put(Disconnected(reason))

    def _on_message(self, message: _Message, message_id: int) -> None:
        self.counters.bytes_down += publish_packet_bytes(message.topic, len(message.payload))
        token = _Token(self._connection, message_id)
        self._events.put(Received(message.topic, message.payload, message.retained, token))
