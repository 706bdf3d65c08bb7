"""Real brokers for tests: start, stop, kill and restart on the same port and folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from aggregator.broker import RunningBroker, find_mosquitto, start_broker
from edge_runtime.transport.address import parse_broker_url
from edge_runtime.transport.base import Event, Received, Transport, Will
from edge_runtime.transport.mqtt import MqttOptions, MqttTransport

ROOT = Path(__file__).parents[2]
PATIENCE_S = 20.0  # how long a test waits for what must happen; it never asserts a time

E = TypeVar("E", bound=Event)


def mosquitto_installed() -> bool:
    return find_mosquitto() is not None


class BrokerUnderTest:
    """One broker that tests may stop, kill and start again; the URL stays the same."""

    def __init__(self, folder: Path, kind: str = "mosquitto") -> None:
        self.folder = folder
        self.kind = kind
        self._running: RunningBroker | None = None
        self._port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        if self._running is None:
            raise RuntimeError("the broker is stopped")
        return self._running.pid

    def start(self) -> None:
        self._running = start_broker(self.folder, port=self._port, kind=self.kind, warn=lambda _: None)
        self._port = self._running.port

    def stop(self) -> None:
        """SIGTERM: mosquitto saves its state."""
        if self._running is not None:
            self._running.stop()
            self._running = None

    def kill(self) -> None:
        """SIGKILL: mosquitto loses what came after its last autosave."""
        if self._running is not None:
            self._running.kill()
            self._running = None

    def restart(self) -> None:
        self.stop()
        self.start()

    def transport(self, client_id: str, *, will: Will | None = None, **options: object) -> MqttTransport:
        """A transport to this broker, not opened; reconnects without delay."""
        settings = {"address": parse_broker_url(self.url), "client_id": client_id, "will": will, **options}
        return MqttTransport(MqttOptions(**settings), random=lambda: 0.1)  # type: ignore[arg-type]


def wait_for(transport: Transport, kind: type[E], when: Callable[[E], bool] = lambda _: True) -> E:
    """The next event of this kind for which ``when`` holds; others are dropped, unacknowledged."""
    deadline = time.monotonic() + PATIENCE_S
    seen: list[Event] = []
    while (left := deadline - time.monotonic()) > 0:
        event = transport.next_event(left)
        if isinstance(event, kind) and when(event):
            return event
        if event is not None:
            seen.append(event)
    raise AssertionError(f"no {kind.__name__} in {PATIENCE_S:g} s; seen: {seen}")


def receive(transport: Transport, topic: str | None = None) -> Received:
    """The next message (on this topic), not acknowledged."""
    return wait_for(transport, Received, lambda event: topic is None or event.topic == topic)


_CLIENT = """
import sys
from edge_runtime.transport.address import parse_broker_url
from edge_runtime.transport.base import Will
from edge_runtime.transport.mqtt import MqttOptions, MqttTransport

url, client_id, topic, text = sys.argv[1:]
will = Will(topic=topic, payload=text.encode(), retain=True)
MqttTransport(MqttOptions(address=parse_broker_url(url), client_id=client_id, will=will)).open()
print("connected", flush=True)
sys.stdin.read()
"""


def kill_a_client_with_a_will(url: str, client_id: str, will: Will) -> None:
    """Connect from another process and end it with SIGKILL."""
    command = [sys.executable, "-c", _CLIENT, url, client_id, will.topic, will.payload.decode()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
        if process.stdout is None or process.stdout.readline() != b"connected\n":
            raise RuntimeError("the client did not connect")
        os.kill(process.pid, signal.SIGKILL)
