"""A thousand real MQTT clients in one process: an asyncio loop drives paho's external-loop hooks.

paho's own ``loop_start`` takes a thread and three descriptors a client and stops at about 340 of them (``select``).
The CONNECT options are those of the shipped transport, read from its ``MqttOptions``: session, windows, keepalive.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Iterable
from random import Random
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import MQTTErrorCode

from edge_runtime.transport.base import full_jitter_s
from edge_runtime.transport.mqtt import MqttOptions
from edge_runtime.transport.mqtt_connection import dial, new_client

log = logging.getLogger(__name__)

CONNECT_AT_ONCE = 50  # a broker's listen queue is 100 deep
_MISC_S = 5.0  # how often keepalive is looked after


class FleetClient:
    """One MQTT client that connects, comes back after a loss, and acknowledges each message once it was handled.

    ``patterns`` are subscribed to at every connect. ``on_ready`` follows the SUBACK; ``on_message`` gets topic and
    payload. All calls and callbacks are of the loop's thread.
    """

    def __init__(
        self,
        options: MqttOptions,
        *,
        v5: bool,
        patterns: Iterable[str],
        on_ready: Callable[[], None],
        on_message: Callable[[str, bytes], None],
        random: Random,
    ) -> None:
        self.options = options
        self.reconnects = 0
        self._v5 = v5
        self._patterns = dict.fromkeys(patterns)
        self._on_ready = on_ready
        self._on_message = on_message
        self._random = random
        self._loop = asyncio.get_running_loop()
        self._client: paho.Client | None = None
        self._attempt = 0
        self._closing = False

    def connect(self) -> None:
        """Begin; tries again with full jitter until it succeeds."""
        client = self._client = self._make()
        options = self.options
        try:
            dial(client, options, v5=self._v5)
        except OSError as error:
            log.warning("%s: %s", options.client_id, error)
            self._again()

    def subscribe(self, pattern: str) -> None:
        """QoS 1; asked for again at every connect."""
        self._patterns[pattern] = None
        if self._client is not None:
            self._client.subscribe(pattern, 1)

    def unsubscribe(self, pattern: str) -> None:
        self._patterns.pop(pattern, None)
        if self._client is not None:
            self._client.unsubscribe(pattern)

    def publish(self, topic: str, payload: bytes) -> None:
        """QoS 1; what a lost connection takes with it is the caller's to repeat."""
        if self._client is not None:
            self._client.publish(topic, payload, 1)

    def keep_alive(self) -> None:
        if self._client is not None:
            self._client.loop_misc()

    def close(self) -> None:
        self._closing = True
        if self._client is not None:
            self._client.disconnect()

    def _make(self) -> paho.Client:
        client = new_client(self.options, v5=self._v5)
        client.on_socket_open = self._opened
        client.on_socket_close = self._closed
        client.on_socket_register_write = self._wants_write
        client.on_socket_unregister_write = self._wants_no_write
        client.on_connect = self._connected
        client.on_subscribe = self._subscribed
        client.on_disconnect = self._disconnected
        client.on_message = self._received
        return client

    def _opened(self, client: paho.Client, _userdata: object, sock: Any) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._loop.add_reader(sock, client.loop_read)

    def _closed(self, _client: paho.Client, _userdata: object, sock: Any) -> None:
        self._loop.remove_reader(sock)

    def _wants_write(self, client: paho.Client, _userdata: object, sock: Any) -> None:
        self._loop.add_writer(sock, client.loop_write)

    def _wants_no_write(self, _client: paho.Client, _userdata: object, sock: Any) -> None:
        self._loop.remove_writer(sock)

    def _connected(self, client: paho.Client, _u: object, _flags: Any, reason: Any, _p: object) -> None:
        if reason.is_failure:
            log.warning("%s was refused: %s", self.options.client_id, reason)
            return
        self._attempt = 0
        client.subscribe([(pattern, 1) for pattern in self._patterns])

    def _subscribed(self, client: paho.Client, _u: object, mid: int, _reasons: Any, _p: object) -> None:
        if mid == 1:  # the one of the connect
            self._on_ready()

    def _disconnected(self, client: paho.Client, _u: object, _flags: Any, reason: Any, _p: object) -> None:
        if not self._closing and client is self._client:
            log.warning("%s lost its connection: %s", self.options.client_id, reason)
            self.reconnects += 1
            self._again()

    def _again(self) -> None:
        self._client = None
        self._loop.call_later(full_jitter_s(self._attempt, self._random.random), self.connect)
        self._attempt += 1

    def _received(self, client: paho.Client, _userdata: object, message: paho.MQTTMessage) -> None:
        self._on_message(message.topic, bytes(message.payload))
        if client.ack(message.mid, message.qos) != MQTTErrorCode.MQTT_ERR_SUCCESS:
            log.warning("%s could not acknowledge", self.options.client_id)


async def connect_all(clients: list[FleetClient]) -> None:
    """Begin all connects, some at a time."""
    for at in range(0, len(clients), CONNECT_AT_ONCE):
        for client in clients[at : at + CONNECT_AT_ONCE]:
            client.connect()
        await asyncio.sleep(0.02)


async def keep_all_alive(clients: list[FleetClient]) -> None:
    """Run beside everything else: keepalive of all clients."""
    while True:
        await asyncio.sleep(_MISC_S)
        for client in clients:
            client.keep_alive()
