"""The transport over a real broker: paho-mqtt 2, MQTT 5 where offered, else 3.1.1.

Choices, each because of how paho or brokers behave:

- One paho client per TCP connection. Its outgoing queue lives as long as the connection, so nothing is resent by
  paho behind the caller's back and memory does not grow while offline: ``publish`` raises NotConnected then.
- Our own thread drives paho's external-loop hooks with ``poll``: full-jitter back-off, and no limit at 1,024
  descriptors. Only that thread reads and writes the socket; others queue a packet and wake it.
- Back-pressure. Outgoing: at most ``max_inflight`` and the broker's ReceiveMaximum unacknowledged publishes, then
  ``publish`` blocks. Incoming: the broker sends at most ``receive_maximum`` unacknowledged messages (MQTT 5);
  where a 3.1.1 broker sends more, or any sends more than ``max_unacked_bytes``, the socket is not read until the
  caller acknowledges, unless it waits in ``publish`` itself. So the event queue needs no bound of its own.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from random import SystemRandom

from edge_runtime.transport.base import (
    BrokerUnreachable,
    Congested,
    Connected,
    Disconnected,
    Event,
    NotConnected,
    Received,
    check_fits,
    check_pattern,
    check_topic,
    full_jitter_s,
)
from edge_runtime.transport.mqtt_connection import (
    FAREWELL_S,
    FINAL,
    NAME_UNKNOWN,
    WRONG_VERSION,
    Connection,
    MqttOptions,
    Shared,
    Token,
)

__all__ = ["MqttOptions", "MqttTransport"]

log = logging.getLogger(__name__)

_system_random = SystemRandom().random
_STABLE_S = 5.0  # a connection that lived so long resets the back-off


class MqttTransport:
    """``Transport`` over MQTT. ``random``, uniform in [0, 1), spreads the reconnects of a fleet."""

    def __init__(self, options: MqttOptions, *, random: Callable[[], float] = _system_random) -> None:
        if options.will is not None:
            check_topic(options.will.topic)
        self.options = options
        self._random = random
        self._shared = Shared(on_ready=self._connected)
        self.counters = self._shared.counters
        self._events = self._shared.events
        self._changed = self._shared.changed  # guards all below, and every connection's counts
        self._patterns: dict[str, None] = {}
        self._connection: Connection | None = None  # the one in use, after its CONNACK
        self._was_connected = False
        self._failure: tuple[str, bool] | None = None  # why the last attempt failed; whether for good
        self._closing = self._shared.closing
        self._thread: threading.Thread | None = None

    def open(self, timeout_s: float = 5.0) -> None:
        """See ``Transport``. Wrong credentials are reported at once, not retried. Call it once."""
        if self._thread is not None:
            raise NotConnected("this transport has been opened before: make a new one")
        self._thread = threading.Thread(target=self._run, name=f"mqtt-{self.options.client_id}", daemon=True)
        deadline = time.monotonic() + timeout_s
        self._thread.start()
        with self._changed:
            while self._connection is None:
                left = deadline - time.monotonic()
                reason, final = self._failure or ("no answer", False)
                if final or (left <= 0 and (self._failure or timeout_s > 0)):
                    break
                self._changed.wait(max(left, 0.0) if timeout_s > 0 else None)
            else:
                return
        self._stop()
        address = self.options.address
        if final:
            remedy = "check the user name, the password or certificate, and the broker's ACLs"
        elif reason == NAME_UNKNOWN:
            remedy = "check the spelling of the URL, and the DNS of this network"
        else:
            remedy = "is the broker running there and not behind a firewall? (`aggregator broker` starts one)"
        if address.tls is not None and not final:  # a broker that wants another certificate just hangs up
            remedy += ", and does it take our certificate: not missing, expired or revoked?"
        raise BrokerUnreachable(address.host, address.port, reason, remedy)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """See ``Transport``."""
        check_topic(topic)
        deadline = time.monotonic() + self.options.publish_timeout_s
        with self._changed:
            while (connection := self._connection) is not None and connection.inflight >= connection.window:
                connection.publishers += 1
                connection.wake()
                in_time = self._changed.wait(max(deadline - time.monotonic(), 0.0))
                connection.publishers -= 1
                if not in_time:
                    raise Congested(
                        f"{self.options.address.url} has acknowledged nothing for "
                        f"{self.options.publish_timeout_s:g} s: it is overloaded or out of disk"
                    )
            if connection is None:
                raise NotConnected(f"not connected to {self.options.address.url}; nothing is queued")
            size = check_fits(topic, payload, connection.max_packet_bytes)
            connection.inflight += 1
            self.counters.bytes_up += size
        connection.publish(topic, payload, retain)

    def flush(self, timeout_s: float) -> bool:
        """See ``Transport``."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while (connection := self._connection) is not None and connection.inflight > 0:
                connection.publishers += 1  # so that acknowledgements are read whatever else waits
                connection.wake()
                in_time = self._changed.wait(max(deadline - time.monotonic(), 0.0))
                connection.publishers -= 1
                if not in_time:
                    return False
        return True

    def subscribe(self, pattern: str) -> None:
        """See ``Transport``. A refusal by the broker's ACL is logged as an error."""
        check_pattern(pattern)
        with self._changed:
            self._patterns[pattern] = None
            connection = self._connection
        if connection is not None:
            connection.subscribe([pattern])

    def unsubscribe(self, pattern: str) -> None:
        """See ``Transport``."""
        with self._changed:
            self._patterns.pop(pattern, None)
            connection = self._connection
        if connection is not None:
            connection.unsubscribe(pattern)

    def next_event(self, timeout_s: float) -> Event | None:
        """See ``Transport``."""
        try:
            event = self._events.get(timeout=timeout_s) if timeout_s > 0 else self._events.get_nowait()
        except queue.Empty:
            return None
        return event

    def ack(self, received: Received) -> None:
        """See ``Transport``."""
        token = received.token
        if isinstance(token, Token) and token.packet_id and token.connection is self._connection:
            token.connection.ack(token)

    def close(self) -> None:
        """See ``Transport``."""
        self.flush(FAREWELL_S)
        self._stop()

    def _stop(self) -> None:
        self._closing.set()
        with self._changed:
            connection = self._connection
        if connection is not None:
            connection.wake()
        if self._thread is not None and self._thread is not threading.current_thread():
            # A thread inside a blocking TCP connect ends by itself when that times out.
            self._thread.join(FAREWELL_S + 1.0)

    # Everything below runs in the network thread.

    def _run(self) -> None:
        attempt = 0
        v5 = True
        version_known = False
        while not self._closing.is_set():
            started = time.monotonic()
            connection = Connection(self.options, self._shared, v5=v5)
            try:
                reason = connection.serve()
            except Exception as error:  # whatever a broker sends, this thread must live
                log.exception("the MQTT connection failed unexpectedly")
                reason = f"{type(error).__name__} in the MQTT client"
            finally:
                connection.discard()
            if connection.ready:
                version_known = True
                with self._changed:
                    self._connection = None
                    self._changed.notify_all()
                if self._closing.is_set():
                    return
                self._events.put(Disconnected(reason))
                attempt = 0 if time.monotonic() - started >= _STABLE_S else attempt + 1
            else:
                if reason in WRONG_VERSION and not version_known:
                    v5 = not v5
                    if not v5:
                        continue  # at once; if that fails too, MQTT 5 again after a pause
                with self._changed:
                    self._failure = (reason, reason in FINAL)
                    self._changed.notify_all()
                log.warning("cannot connect to %s: %s", self.options.address.url, reason)
                attempt += 1
            self._closing.wait(full_jitter_s(max(attempt - 1, 0), self._random))

    def _connected(self, connection: Connection, session_present: bool) -> None:
        with self._changed:
            self.counters.reconnects += self._was_connected
            self._was_connected = True
            self._connection = connection
            patterns = list(self._patterns)
            self._failure = None
            self._changed.notify_all()
        connection.subscribe(patterns)
        self._events.put(Connected(session_present, connection.max_packet_bytes))
