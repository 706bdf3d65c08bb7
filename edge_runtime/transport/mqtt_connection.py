"""One MQTT connection, from CONNECT to its end: paho-mqtt 2 in a loop of ours. Only this module imports paho."""

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
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edge_runtime.transport.address import BrokerAddress
from edge_runtime.transport.base import Counters, Event, NotConnected, Received, Will, publish_packet_bytes

log = logging.getLogger(__name__)

FAREWELL_S = 2.0
NAME_UNKNOWN = "the host name is unknown"
# Refusals that no retry mends (MQTT 5.0, 3.2.2.2; paho translates those of 3.1.1 to the same names).
FINAL = {"Bad user name or password", "Not authorized", "Client identifier not valid", "Banned"}
# How a broker that speaks only the other version answers CONNECT.
_SILENT = "the broker closed before answering CONNECT"
_MUTE = "no answer to CONNECT"
WRONG_VERSION = {"Unsupported protocol version", _SILENT, _MUTE}
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


class Token(NamedTuple):
    connection: Connection
    packet_id: int  # 0: QoS 0, nothing to acknowledge
    size: int


@dataclass(kw_only=True)
class Shared:
    """What a transport and its connections, one after the other, have in common."""

    on_ready: Callable[[Connection, bool], None]
    counters: Counters = field(default_factory=Counters)
    events: queue.SimpleQueue[Event] = field(default_factory=queue.SimpleQueue)
    changed: threading.Condition = field(default_factory=threading.Condition)
    closing: threading.Event = field(default_factory=threading.Event)


def new_client(options: MqttOptions, *, v5: bool) -> paho.Client:
    """A client for one connection: it acknowledges by hand, queues nothing and never reconnects by itself."""
    client = paho.Client(
        CallbackAPIVersion.VERSION2,
        client_id=options.client_id,
        protocol=MQTTProtocolVersion.MQTTv5 if v5 else MQTTProtocolVersion.MQTTv311,
        clean_session=None if v5 else False,
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
    return client


def dial(client: paho.Client, options: MqttOptions, *, v5: bool) -> None:
    """CONNECT to a session that outlives the connection. Raises OSError, ValueError."""
    address = options.address
    if not v5:
        client.connect(address.host, address.port, options.keepalive_s)
        return
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    properties.SessionExpiryInterval = options.session_expiry_s
    properties.ReceiveMaximum = options.receive_maximum
    client.connect(address.host, address.port, options.keepalive_s, clean_start=False, properties=properties)


class Connection:
    """One TCP connection and its paho client. Counts are guarded by ``shared.changed``."""

    def __init__(self, options: MqttOptions, shared: Shared, *, v5: bool) -> None:
        self.options = options
        self.shared = shared
        self.ready = False
        self.inflight = 0
        self.publishers = 0  # threads that wait for the window
        self.window = self.options.max_inflight
        self.max_packet_bytes = self.options.max_packet_bytes
        self.unacked = 0
        self.unacked_bytes = 0
        self._changed = shared.changed
        self._reason = ""
        self._waker, self._wakened = socket.socketpair()
        self._waker.setblocking(False)
        self._wakened.setblocking(False)
        self._v5 = v5
        self._client = self._make_client()

    def _make_client(self) -> paho.Client:
        client = new_client(self.options, v5=self._v5)
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

    def ack(self, token: Token) -> None:
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
            dial(client, options, v5=self._v5)
        except (OSError, ValueError) as error:
            return _in_words(error)
        patience_s = min(options.connect_timeout_s, _MUTE_S) if self._v5 else options.connect_timeout_s
        deadline = time.monotonic() + patience_s
        leaving = False
        while (sock := client.socket()) is not None:
            now = time.monotonic()
            if self.shared.closing.is_set() and not leaving:
                leaving, deadline = True, now + FAREWELL_S
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
            if self.publishers:
                return False  # they wait for what is behind those messages: holding on would be a deadlock
            held = self.unacked > options.receive_maximum or self.unacked_bytes > options.max_unacked_bytes
        # Messages of connections long gone may still wait in the queue: they count, or flapping would add up.
        return self.ready and (held or self.shared.events.qsize() > 2 * options.receive_maximum)

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
        self.shared.on_ready(self, bool(flags.session_present))

    def _on_disconnect(
        self, _client: paho.Client, _userdata: object, flags: Any, reason: ReasonCode, _properties: object
    ) -> None:
        if flags.is_disconnect_packet_from_server:
            self._reason = f"the broker said goodbye: {reason}"
        elif not self._reason:
            self._reason = "the connection broke" if self.ready else _SILENT

    def _on_message(self, client: paho.Client, _userdata: object, message: paho.MQTTMessage) -> None:
        shared = self.shared
        try:
            topic = message.topic
        except UnicodeDecodeError:
            topic = ""
        size = publish_packet_bytes(topic, len(message.payload))
        full = message.qos == 0 and shared.events.qsize() >= self.options.receive_maximum
        with self._changed:
            shared.counters.bytes_down += size
            if not topic or full:
                shared.counters.dropped += 1
            elif message.qos:
                self.unacked += 1
                self.unacked_bytes += size
        if topic and not full:
            token = Token(self, message.mid if message.qos else 0, size)
            shared.events.put(Received(topic, bytes(message.payload), bool(message.retain), token))
        elif message.qos:
            client.ack(message.mid, message.qos)

    def _on_publish(
        self, _client: paho.Client, _userdata: object, _mid: int, reason: ReasonCode, _properties: object
    ) -> None:
        with self._changed:
            self.inflight -= 1
            if reason.is_failure:
                self.shared.counters.refused += 1
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
        return NAME_UNKNOWN
    if isinstance(error, TimeoutError):
        return "timed out"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
