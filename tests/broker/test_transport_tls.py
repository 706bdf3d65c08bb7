from __future__ import annotations

import datetime
import ipaddress
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from aggregator.broker import find_mosquitto
from edge_runtime.transport.address import parse_broker_url
from edge_runtime.transport.base import BrokerUnreachable
from edge_runtime.transport.mqtt import MqttOptions, MqttTransport
from tests.support.brokers import PATIENCE_S, receive

MOSQUITTO = find_mosquitto()
pytestmark = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")


def _self_signed(folder: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "device-1")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    certificate_file, key_file = folder / "certificate.pem", folder / "key.pem"
    certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    form = serialization.PrivateFormat.PKCS8
    key_file.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, plain))
    return certificate_file, key_file


@pytest.fixture
def tls_broker(tmp_path: Path) -> Iterator[tuple[str, Path, Path]]:
    certificate, key = _self_signed(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    config = tmp_path / "mosquitto.conf"
    config.write_text(
        f"listener {port} 127.0.0.1\ncafile {certificate}\ncertfile {certificate}\nkeyfile {key}\n"
        "require_certificate true\nuse_identity_as_username true\nlog_dest none\n"
        + ("user root\n" if os.geteuid() == 0 else "")
    )
    with subprocess.Popen([str(MOSQUITTO), "-c", str(config)]) as process:
        yield f"mqtts://127.0.0.1:{port}", certificate, key
        process.terminate()


def test_mutual_tls_carries_big_messages_and_refuses_what_it_cannot_verify(
    tls_broker: tuple[str, Path, Path], tmp_path: Path
) -> None:
    url, certificate, key = tls_broker
    address = parse_broker_url(url, ca_file=certificate, cert_file=certificate, key_file=key)
    transport = MqttTransport(MqttOptions(address=address, client_id="c"))
    transport.open(PATIENCE_S)
    transport.subscribe("x")
    payload = os.urandom(700_000)
    for _ in range(5):
        transport.publish("x", payload)
    for _ in range(5):
        received = receive(transport)
        assert received.payload == payload
        transport.ack(received)
    transport.close()
    with pytest.raises(BrokerUnreachable, match="certificate does not verify"):
        MqttTransport(MqttOptions(address=parse_broker_url(url), client_id="d")).open(timeout_s=0)
    no_certificate = parse_broker_url(url, ca_file=certificate)
    with pytest.raises(BrokerUnreachable, match="; "):
        MqttTransport(MqttOptions(address=no_certificate, client_id="d")).open(timeout_s=0)
