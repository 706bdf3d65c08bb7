"""Real brokers for tests: start, stop, kill and restart on the same port and folder."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from aggregator.access import Role
from aggregator.broker import RunningBroker, die_with_parent, find_mosquitto, start_broker, write_config
from aggregator.registrar import Registrar, kit
from aggregator.registrar.folder import write_folder
from edge_runtime.protocol.ids import DeviceId
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


class SecuredBroker:
    """mosquitto with the files of `aggregator registrar tls` and `broker-config mosquitto`, for one registrar."""

    HOST = "127.0.0.1"

    def __init__(self, folder: Path, office: Registrar, *, existing: bool = False) -> None:
        """``existing``: the folder is the one that `aggregator registrar tls` wrote."""
        self.folder = folder
        self.office = office
        if not existing:
            if office.tls_files() is None:
                office.set_up_tls(time.time(), 30)
            write_folder(folder / "broker", kit.broker_files(office, [self.HOST], time.time(), 30))
        with socket.create_server((self.HOST, 0)) as probe:
            self.port: int = probe.getsockname()[1]
        self.config, missing = write_config(
            folder / "broker", office.federation, port=self.port, bind=self.HOST
        )
        if missing:
            raise RuntimeError(f"the kit lacks {missing}")
        extra = "log_type information\n"  # it tells of a reload
        if os.geteuid() == 0:  # as root, mosquitto would become a user who may not enter the folder
            extra += "user root\n"
        self.config.write_text(self.config.read_text() + extra)
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"mqtts://{self.HOST}:{self.port}"

    def start(self) -> None:
        with (self.folder / "broker.log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(find_mosquitto()), "-c", str(self.config)],
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent(signal.SIGTERM),
            )
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection((self.HOST, self.port), 1.0):
                return
            time.sleep(0.01)
        raise RuntimeError(f"mosquitto does not listen: {(self.folder / 'broker.log').read_text()}")

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(PATIENCE_S)
            self._process = None

    def take_crl(self) -> None:
        """As after a revocation: the registrar's list in place of the old one, and a reload."""
        (self.config.parent / "revoked.crl").write_bytes(self.office.crl_file.read_bytes())
        if self._process is not None:
            log = self.folder / "broker.log"
            before = log.read_text().count("Reloading config")
            self._process.send_signal(signal.SIGHUP)
            deadline = time.monotonic() + PATIENCE_S
            while log.read_text().count("Reloading config") == before:
                if time.monotonic() > deadline:
                    raise RuntimeError("mosquitto does not reload")
                time.sleep(0.005)

    def client(self, name: str, *, days: int = 30, at: float | None = None) -> Client:
        """Files of a new client certificate, made at the time ``at``."""
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.folder))
        who = Role(name) if name.startswith("@") else DeviceId(name)
        write_folder(folder, kit.client_files(self.office, who, time.time() if at is None else at, days))
        return Client(folder / kit.CA, folder / kit.CLIENT_CERTIFICATE, folder / kit.CLIENT_KEY)

    def transport(self, client: Client, client_id: str, will: Will | None = None) -> MqttTransport:
        """Not opened; reconnects without delay."""
        address = parse_broker_url(
            self.url, ca_file=client.ca, cert_file=client.certificate, key_file=client.key
        )
        return MqttTransport(MqttOptions(address=address, client_id=client_id, will=will), random=lambda: 0.1)


class Client(NamedTuple):
    """PEM files of a TLS client; no certificate and key: it has none to show."""

    ca: Path
    certificate: Path | None
    key: Path | None
