"""A mosquitto that asks for certificates, with the files that our own commands write."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from aggregator.access import Role
from aggregator.broker import die_with_parent, find_mosquitto, write_config
from aggregator.registrar import Registrar, kit
from aggregator.registrar.folder import write_folder
from edge_runtime.protocol.ids import DeviceId
from edge_runtime.transport.address import parse_broker_url
from edge_runtime.transport.base import Will
from edge_runtime.transport.mqtt import MqttOptions, MqttTransport
from tests.support.brokers import PATIENCE_S


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
