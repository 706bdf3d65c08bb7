"""The transport over a real broker: paho-mqtt 2, MQTT 5 where offered, else 3.1.1. Only this module imports paho.

Choices, each because of how paho or brokers behave:

- One paho client per TCP connection. Its outgoing queue lives as long as the connection, so nothing is resent by
  paho behind the caller's back and memory does not grow while offline: ``publish`` raises NotConnected then.
- Our own thread drives paho's external-loop hooks with ``poll``: full-jitter back-off, and no limit at 1,024
  descriptors. Only that thread reads and writes the socket; others queue a packet and wake it.
- Back-pressure. Outgoing: at most ``max_inflight`` and the broker's ReceiveMaximum unacknowledged publishes, then
  ``publish`` blocks. Incoming: the broker sends at most ``receive_maximum`` unacknowledged messages (MQTT 5);
  where a 3.1.1 broker sends more, or any sends more than ``max_unacked_bytes``, the socket is not read until the
  caller acknowledges. The events themselves therefore need no bound of their own.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import SystemRandom
from typing import Any, NamedTuple

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edge_runtime.transport.address import BrokerAddress
from edge_runtime.transport.base import (
    BrokerUnreachable,
    Congested,
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
    full_jitter_s,
    publish_packet_bytes,
)

log = logging.getLogger(__name__)

_system_random = SystemRandom().random
_STABLE_S = 5.0  # a connection that lived so long resets the back-off
_FAREWELL_S = 2.0
# Refusals that no retry mends (MQTT 5.0, 3.2.2.2; paho translates those of 3.1.1 to the same names).
_FINAL = {"Bad user name or password", "Not authorized", "Client identifier not valid", "Banned"}
# How a broker that speaks only the other version answers CONNECT.
_SILENT = "the broker closed before answering CONNECT"
_MUTE = "no answer to CONNECT"
_WRONG_VERSION = {"Unsupported protocol version", _SILENT, _MUTE}
_MUTE_S = 2.0  # how long to wait for an answer to MQTT 5 before the other version is tried


@dataclass(frozen=True, kw_only=True)
class MqttOptions:
    """``client_id`` names the broker's session: two clients with the same one throw each other out.

    ``max_packet_bytes`` caps packets where a 3.1.1 broker cannot say its limit itself.
    """

    address: BrokerAddress
    client_id: str
    will: Will | None = None
    keepalive_s: int = 30
    session_expiry_s: int = 86_400
    max_inflight: int = 20
    receive_maximum: int = 64
    max_unacked_bytes: int = 64 << 20
    max_packet_bytes: int | None = None
    connect_timeout_s: float = 5.0
    publish_timeout_s: float = 30.0


class _Token(NamedTuple):
    connection: _Connection
    packet_id: int  # 0: QoS 0, nothing to acknowledge
    size: int


class MqttTransport:
    """``Transport`` over MQTT. ``random``, uniform in [0, 1), spreads the reconnects of a fleet."""

    def __init__(self, options: MqttOptions, *, random: Callable[[], float] = _system_random) -> None:
        if options.will is not None:
            check_topic(options.will.topic)
        self.options = options
        self.counters = Counters()
        self._random = random
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._changed = threading.Condition()  # guards all below, and every _Connection's counts
        self._patterns: dict[str, None] = {}
        self._connection: _Connection | None = None  # the one in use, after its CONNACK
        self._was_connected = False
        self._failure: tuple[str, bool] | None = None  # why the last attempt failed; whether for good
        self._closing = threading.Event()
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
        remedy = (
            "check the user name, the password or certificate, and the broker's ACLs"
            if final
            else "is the broker running there and not behind a firewall? (`aggregator broker` starts one)"
        )
        raise BrokerUnreachable(address.host, address.port, reason, remedy)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """See ``Transport``."""
        check_topic(topic)
        deadline = time.monotonic() + self.options.publish_timeout_s
        with self._changed:
            while (connection := self._connection) is not None and connection.inflight >= connection.window:
                if not self._changed.wait(max(deadline - time.monotonic(), 0.0)):
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
        if isinstance(token, _Token) and token.packet_id and token.connection is self._connection:
            token.connection.ack(token)

    def close(self) -> None:
        """See ``Transport``."""
        deadline = time.monotonic() + _FAREWELL_S
        with self._changed:
            while self._connection is not None and self._connection.inflight > 0:
                if not self._changed.wait(max(deadline - time.monotonic(), 0.0)):
                    break
        self._stop()

    def _stop(self) -> None:
        self._closing.set()
        with self._changed:
            connection = self._connection
        if connection is not None:
            connection.wake()
        if self._thread is not None and self._thread is not threading.current_thread():
            # A thread inside a blocking TCP connect ends by itself when that times out.
            self._thread.join(_FAREWELL_S + 1.0)

    # Everything below runs in the network thread.

    def _run(self) -> None:
        attempt = 0
        version = MQTTProtocolVersion.MQTTv5
        version_known = False
        while not self._closing.is_set():
            started = time.monotonic()
            connection = _Connection(self, version)
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
                if reason in _WRONG_VERSION and not version_known:
                    version = _OTHER[version]
                    if version is MQTTProtocolVersion.MQTTv311:
                        continue  # at once; if that fails too, MQTT 5 again after a pause
                with self._changed:
                    self._failure = (reason, reason in _FINAL)
                    self._changed.notify_all()
                log.warning("cannot connect to %s: %s", self.options.address.url, reason)
                attempt += 1
            self._closing.wait(full_jitter_s(max(attempt - 1, 0), self._random))

    def _connected(self, connection: _Connection, session_present: bool) -> None:
        with self._changed:
            self.counters.reconnects += self._was_connected
            self._was_connected = True
            self._connection = connection
            patterns = list(self._patterns)
            self._failure = None
            self._changed.notify_all()
        connection.subscribe(patterns)
        self._events.put(Connected(session_present, connection.max_packet_bytes))


_OTHER = {
    MQTTProtocolVersion.MQTTv5: MQTTProtocolVersion.MQTTv311,
    MQTTProtocolVersion.MQTTv311: MQTTProtocolVersion.MQTTv5,
}


class _Connection:
    """One TCP connection and its paho client. Counts are guarded by the owner's condition."""

    def __init__(self, owner: MqttTransport, version: MQTTProtocolVersion) -> None:
        self.owner = owner
        self.options = owner.options
        self.ready = False
        self.inflight = 0
        self.window = self.options.max_inflight
        self.max_packet_bytes = self.options.max_packet_bytes
        self.unacked = 0
        self.unacked_bytes = 0
        self._changed = owner._changed
        self._reason = ""
        self._waker, self._wakened = socket.socketpair()
        self._waker.setblocking(False)
        self._wakened.setblocking(False)
        self._v5 = version is MQTTProtocolVersion.MQTTv5
        self._client = self._make_client(version)

    def _make_client(self, version: MQTTProtocolVersion) -> paho.Client:
        options = self.options
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=options.client_id,
            protocol=version,
            clean_session=None if self._v5 else False,
            manual_ack=True,
            reconnect_on_failure=False,
        )
        client.connect_timeout = options.connect_timeout_s
        client.max_inflight_messages_set(0)  # no window of paho's own: ours decides, and never queues
        if options.address.username is not None:
            client.username_pw_set(options.address.username, options.address.password)
        if options.address.tls is not None:
            client.tls_set_context(options.address.tls)
        if options.will is not None:
            client.will_set(options.will.topic, options.will.payload, qos=1, retain=options.will.retain)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_subscribe = self._on_subscribe
        client.on_socket_open = self._on_socket_open
        # Without this hook paho writes to the socket from whichever thread publishes.
        client.on_socket_register_write = lambda *_: self.wake()
        return client

    # Called from any thread.

    def publish(self, topic: str, payload: bytes, retain: bool) -> None:
        info = self._client.publish(topic, payload, qos=1, retain=retain)
        self.wake()
        if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            raise NotConnected(f"the connection to {self.options.address.url} was lost; nothing is queued")

    def subscribe(self, patterns: list[str]) -> None:
        if patterns:
            self._client.subscribe([(pattern, 1) for pattern in patterns])
            self.wake()

    def unsubscribe(self, pattern: str) -> None:
        self._client.unsubscribe(pattern)
        self.wake()

    def ack(self, token: _Token) -> None:
        with self._changed:
            self.unacked -= 1
            self.unacked_bytes -= token.size
        self._client.ack(token.packet_id, 1)
        self.wake()

    def wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it is awake already; closed: the connection is gone
            self._waker.send(b"\0")

    # Called from the network thread.

    def serve(self) -> str:
        """Connect and run until the connection ends; returns the reason in words."""
        options, client = self.options, self._client
        try:
            if self._v5:
                properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
                properties.SessionExpiryInterval = options.session_expiry_s
                properties.ReceiveMaximum = options.receive_maximum
                client.connect(
                    options.address.host,
                    options.address.port,
                    options.keepalive_s,
                    clean_start=False,
                    properties=properties,
                )
            else:
                client.connect(options.address.host, options.address.port, options.keepalive_s)
        except (OSError, ValueError) as error:
            return _in_words(error)
        patience_s = min(options.connect_timeout_s, _MUTE_S) if self._v5 else options.connect_timeout_s
        deadline = time.monotonic() + patience_s
        leaving = False
        while (sock := client.socket()) is not None:
            now = time.monotonic()
            if self.owner._closing.is_set() and not leaving:
                leaving, deadline = True, now + _FAREWELL_S
                client.disconnect()
            if (leaving or not self.ready) and now >= deadline:
                return _MUTE
            self._turn(sock, min(1.0, max(deadline - now, 0.0)) if leaving or not self.ready else 1.0)
        return self._reason or "the broker closed the connection"

    def _turn(self, sock: Any, timeout_s: float) -> None:
        client = self._client
        poll = select.poll()
        wanted = (0 if self._holds_too_much() else select.POLLIN) | (
            select.POLLOUT if client.want_write() else 0
        )
        poll.register(sock, wanted)
        poll.register(self._wakened, select.POLLIN)
        seen = dict(poll.poll(timeout_s * 1000.0))
        if self._wakened.fileno() in seen:
            self._wakened.recv(4096)
        flags = seen.get(sock.fileno(), 0)
        if flags & ~select.POLLOUT:
            client.loop_read()
            while client.socket() is sock and isinstance(sock, ssl.SSLSocket) and sock.pending():
                client.loop_read()  # decrypted already, so poll will not speak of it again
        if client.want_write() and client.socket() is sock:
            client.loop_write()
        client.loop_misc()  # keepalive

    def _holds_too_much(self) -> bool:
        options = self.options
        with self._changed:
            held = self.unacked > options.receive_maximum or self.unacked_bytes > options.max_unacked_bytes
        # Messages of connections long gone may still wait in the queue: they count, or flapping would add up.
        return self.ready and (held or self.owner._events.qsize() > 2 * options.receive_maximum)

    def discard(self) -> None:
        """Free the sockets, whatever state they are in."""
        sock = self._client.socket()
        if sock is not None:
            sock.close()
        self._waker.close()
        self._wakened.close()

    def _on_socket_open(self, _client: paho.Client, _userdata: object, sock: Any) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _on_connect(
        self,
        _client: paho.Client,
        _userdata: object,
        flags: Any,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        if reason.is_failure:
            self._reason = str(reason)
            return
        self.window = min(self.options.max_inflight, getattr(properties, "ReceiveMaximum", 65_535))
        limits = (self.options.max_packet_bytes, getattr(properties, "MaximumPacketSize", None))
        self.max_packet_bytes = min((limit for limit in limits if limit is not None), default=None)
        self.ready = True
        self.owner._connected(self, bool(flags.session_present))

    def _on_disconnect(
        self, _client: paho.Client, _userdata: object, flags: Any, reason: ReasonCode, _properties: object
    ) -> None:
        if flags.is_disconnect_packet_from_server:
            self._reason = f"the broker said goodbye: {reason}"
        elif not self._reason:
            self._reason = "the connection broke" if self.ready else _SILENT

    def _on_message(self, client: paho.Client, _userdata: object, message: paho.MQTTMessage) -> None:
        owner = self.owner
        try:
            topic = message.topic
        except UnicodeDecodeError:
            topic = ""
        size = publish_packet_bytes(topic, len(message.payload))
        full = message.qos == 0 and owner._events.qsize() >= self.options.receive_maximum
        with self._changed:
            owner.counters.bytes_down += size
            if not topic or full:
                owner.counters.dropped += 1
            elif message.qos:
                self.unacked += 1
                self.unacked_bytes += size
        if topic and not full:
            token = _Token(self, message.mid if message.qos else 0, size)
            owner._events.put(Received(topic, bytes(message.payload), bool(message.retain), token))
        elif message.qos:
            client.ack(message.mid, message.qos)

    def _on_publish(
        self, _client: paho.Client, _userdata: object, _mid: int, reason: ReasonCode, _properties: object
    ) -> None:
        with self._changed:
            self.inflight -= 1
            if reason.is_failure:
                self.owner.counters.refused += 1
            self._changed.notify_all()
        if reason.is_failure:
            log.error("%s refused a publish: %s; check its ACLs and quotas", self.options.address.url, reason)

    def _on_subscribe(
        self,
        _client: paho.Client,
        _userdata: object,
        _mid: int,
        reasons: list[ReasonCode],
        _properties: object,
    ) -> None:
        for reason in reasons:
            if reason.is_failure:
                log.error("%s refused a subscription: %s; check its ACLs", self.options.address.url, reason)


def _in_words(error: OSError | ValueError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the broker's certificate does not verify ({error.verify_message})"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed ({error.reason or 'unknown'}); does the port speak TLS, and does it want a certificate?"
    if isinstance(error, socket.gaierror):
        return "the host name is unknown"
    if isinstance(error, TimeoutError):
        return "timed out"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
