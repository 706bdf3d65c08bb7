"""``edge-runtime doctor`` on real brokers: each thing that can stand in the way has its own name."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from aggregator.broker import find_mosquitto
from aggregator.registrar import Registrar
from edge_runtime import cli
from edge_runtime.doctor.contact import Contact, Obstacle, Step, contact
from edge_runtime.protocol import topics
from edge_runtime.protocol.rounds import FederationState
from edge_runtime.store import DeviceStore, Enrolment
from edge_runtime.transport.address import BrokerAddress, parse_broker_url
from edge_runtime.transport.base import Connected
from tests.support.brokers import BrokerUnderTest, mosquitto_installed, wait_for
from tests.support.command_line import Done, run
from tests.support.enrolling import new_registrar
from tests.support.secured_broker import SecuredBroker
from tests.support.session_driver import DEVICE, FEDERATION, Aggregator, device_identity

pytestmark = pytest.mark.skipif(not mosquitto_installed(), reason="needs mosquitto")


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registrar]:
    office = new_registrar(tmp_path_factory.mktemp("registrar"))
    yield office
    office.close()


@pytest.fixture(scope="module")
def secured(office: Registrar, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredBroker]:
    broker = SecuredBroker(tmp_path_factory.mktemp("secured"), office)
    yield broker
    broker.stop()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerUnderTest]:
    broker = BrokerUnderTest(tmp_path_factory.mktemp("plain"))
    yield broker
    broker.stop()


def met(url: str, ca=None, certificate=None, key=None) -> Contact:
    address = parse_broker_url(url, ca_file=ca, cert_file=certificate, key_file=key)
    return contact(address, "doctor-test", 2.0)


def test_a_broker_that_welcomes_us_tells_its_packet_limit_and_the_dates_of_its_certificate(secured, plain):
    found = met(secured.url, *secured.client("pi-1"))
    assert (found.step, found.obstacle, found.mqtt_version) == (Step.MQTT, None, "5.0")
    assert found.tls_version == "TLSv1.3"
    assert found.server is not None
    assert found.server.not_before < time.time() < found.server.not_after
    assert found.max_packet_bytes is not None
    assert met(plain.url).obstacle is None


@pytest.mark.parametrize(
    ("trouble", "step", "obstacle"),
    [
        ("wrong CA", Step.TLS, Obstacle.WRONG_CA),
        ("another name", Step.TLS, Obstacle.OTHER_NAME),
        ("no client certificate", Step.TLS, Obstacle.CERTIFICATE_REQUIRED),
        ("client certificate expired", Step.TLS, Obstacle.CLIENT_EXPIRED),
        ("client certificate revoked", Step.TLS, Obstacle.CLIENT_REVOKED),
        ("client certificate of another CA", Step.TLS, Obstacle.CLIENT_REFUSED),
        ("no TLS in the URL", Step.MQTT, Obstacle.WANTS_TLS),
        ("no TLS at the port", Step.TLS, Obstacle.NO_TLS),
    ],
)
def test_each_trouble_with_tls_is_told_apart(secured, plain, office, tmp_path, trouble, step, obstacle):
    good = secured.client("pi-1")
    url, ca, certificate, key = secured.url, *good
    if trouble in ("wrong CA", "client certificate of another CA"):
        other = new_registrar(tmp_path, b"other")
        try:
            other.set_up_tls(time.time(), 30)
            stranger = SecuredBroker.client(_at(tmp_path, other), "pi-1")
        finally:
            other.close()
        ca, certificate, key = (stranger.ca, *good[1:]) if trouble == "wrong CA" else (ca, *stranger[1:])
    elif trouble == "another name":
        url = url.replace("127.0.0.1", "localhost")
    elif trouble == "no client certificate":
        certificate = key = None
    elif trouble == "client certificate expired":
        certificate, key = secured.client("pi-1", days=1, at=time.time() - 3 * 86_400)[1:]
    elif trouble == "client certificate revoked":
        certificate, key = secured.client("pi-revoked")[1:]
        office.revoke("pi-revoked", time.time())
        secured.take_crl()
    elif trouble == "no TLS in the URL":
        url, ca, certificate, key = url.replace("mqtts", "mqtt"), None, None, None
    else:
        url = plain.url.replace("mqtt", "mqtts")
    found = met(url, ca, certificate, key)
    assert (found.step, found.obstacle) == (step, obstacle), found.detail


def _at(folder: Path, office: Registrar) -> SecuredBroker:
    """Only to make client files of another registrar: no broker is started."""
    broker = SecuredBroker.__new__(SecuredBroker)
    broker.folder, broker.office = folder, office
    return broker


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def answering(listener: socket.socket, answer: bytes, times: int = 3) -> BrokerAddress:
    """A server that says this to whoever speaks to it, and hangs up."""

    def serve() -> None:
        for _ in range(times):
            try:
                line, _ = listener.accept()
            except OSError:
                return
            with line:
                line.recv(1000)
                line.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    return BrokerAddress(host="127.0.0.1", port=listener.getsockname()[1])


@pytest.mark.parametrize(
    ("answer", "obstacle"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", Obstacle.NO_MQTT),
        (b"", Obstacle.CLOSED),
        (b"\x20\x03\x00\x86\x00", Obstacle.CREDENTIALS),
        (b"\x20\x03\x00\x87\x00", Obstacle.FORBIDDEN),
        (b"\x20\x03\x00\x89\x00", Obstacle.OVERLOADED),
        (b"\x20\xff\xff\xff\xff", Obstacle.NO_MQTT),
        (b"\x20\x01\x00", Obstacle.NO_MQTT),
        (b"\x20\x02\x00\x01", Obstacle.NO_MQTT),  # 3.1.1: wrong version, and so again
    ],
)
def test_what_answers_otherwise_is_told(listener, answer, obstacle):
    found = contact(answering(listener, answer), "doctor-test", 2.0)
    assert (found.step, found.obstacle) == (Step.MQTT, obstacle)


def test_a_broker_that_speaks_only_3_1_1_is_welcome(listener):
    def serve() -> None:
        for _ in range(2):
            line, _ = listener.accept()
            with line:
                version = line.recv(1000)[8]
                line.sendall(b"\x20\x02\x00\x00" if version == 4 else b"\x20\x02\x00\x01")
                line.recv(10)

    threading.Thread(target=serve, daemon=True).start()
    found = contact(BrokerAddress(host="127.0.0.1", port=listener.getsockname()[1]), "c", 2.0)
    assert (found.obstacle, found.mqtt_version, found.max_packet_bytes) == (None, "3.1.1", None)


def test_names_and_ports_that_lead_nowhere_are_told_apart(listener):
    port = listener.getsockname()[1]
    listener.close()
    assert met(f"mqtt://127.0.0.1:{port}").obstacle is Obstacle.REFUSED
    assert met("mqtt://no-such-host.invalid").obstacle is Obstacle.NAME_UNKNOWN
    assert met(f"mqtt://{'a' * 70}.example").obstacle is Obstacle.NAME_UNKNOWN
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen(1)
        address = BrokerAddress(host="127.0.0.1", port=mute.getsockname()[1])
        assert contact(address, "c", 0.1).obstacle is Obstacle.NO_MQTT


def test_a_wrong_password_is_told_by_a_real_broker(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    (tmp_path / "passwords").write_text("")
    config = tmp_path / "mosquitto.conf"
    config.write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous false\npassword_file {tmp_path / 'passwords'}\nlog_dest none\n"
        + ("user root\n" if os.geteuid() == 0 else "")
    )
    with subprocess.Popen([str(find_mosquitto()), "-c", str(config)]) as process:
        try:
            address = BrokerAddress(host="127.0.0.1", port=port, username="u", password="p")
            deadline = time.monotonic() + 20
            while (found := contact(address, "c", 2.0)).obstacle is Obstacle.REFUSED:
                assert time.monotonic() < deadline
            assert found.obstacle in (Obstacle.FORBIDDEN, Obstacle.CREDENTIALS)
        finally:
            process.terminate()


# ---- the whole command ------------------------------------------------------------------------------


@pytest.fixture
def enrolled(tmp_path: Path, plain: BrokerUnderTest) -> tuple[Path, Aggregator]:
    """A device.toml of an enrolled device with data, and the aggregator it belongs to."""
    aggregator = Aggregator()
    who = device_identity(aggregator)
    with DeviceStore(tmp_path / "state") as store:
        store.signing_key(lambda: who.signing_key)
        store.enrol(
            Enrolment(
                federation=FEDERATION,
                device=DEVICE,
                broker_url=plain.url,
                root_key=who.root,
                certificate=who.certificate,
            )
        )
    np.savez(tmp_path / "train.npz", x=np.zeros((4, 2)), y=np.zeros(4))
    config = tmp_path / "device.toml"
    config.write_text('state_folder = "state"\n[data]\nsource = "train.npz"\n[policy]\nenabled = false\n')
    return config, aggregator


def checks(done: Done) -> dict[str, dict[str, str]]:
    return {check["name"]: check for check in json.loads(done.out)["checks"]}


def announce(plain: BrokerUnderTest, payload: bytes) -> None:
    transport = plain.transport("aggregator")
    transport.open()
    wait_for(transport, Connected)
    transport.publish(topics.manifest(FEDERATION), payload, retain=True)
    transport.close()


def test_a_device_in_good_health_has_no_problem_and_hears_the_aggregator(enrolled, plain):
    config, aggregator = enrolled
    announce(plain, aggregator.manifest(1, state=FederationState.WAITING).payload)
    done = run(cli.main, "doctor", "--config", str(config), "--json")
    found = checks(done)
    assert (done.code, json.loads(done.out)["problems"]) == (0, 0), done.out
    assert found["aggregator"]["finding"] == "round 1, waiting, signed as it should be"
    assert found["enrolment"]["finding"] == f"{DEVICE} of {FEDERATION}, signed by the root, epoch 1"
    assert found["broker mqtt"]["outcome"] == found["data"]["outcome"] == "ok"

    announce(plain, aggregator.manifest(1).payload)  # collecting, with a deadline of 1970
    found = checks(run(cli.main, "doctor", "--config", str(config), "--json"))
    assert found["aggregator"]["outcome"] == "warning"
    assert "compare this device's clock" in found["aggregator"]["remedy"]

    announce(plain, Aggregator(generation=9).manifest(1, state=FederationState.WAITING).payload[:-1] + b"\0")
    found = checks(run(cli.main, "doctor", "--config", str(config), "--json"))
    assert "a manifest that a device refuses" in found["aggregator"]["finding"]


def test_problems_end_with_exit_code_1_and_say_what_helps(enrolled, plain):
    config, _ = enrolled
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    config.write_text(config.read_text() + f'[broker]\nurl = "mqtt://127.0.0.1:{port}"\n')
    (config.parent / "train.npz").unlink()
    done = run(cli.main, "doctor", "--config", str(config))
    assert (done.code, done.err) == (1, "")
    assert "problem  broker tcp" in done.out
    assert "-> start the broker there, or correct the port of the URL" in done.out
    assert "problem  data" in done.out
    assert "unknown  aggregator" in done.out


def test_a_doctor_disturbs_no_running_device(enrolled, plain):
    config, _ = enrolled
    with DeviceStore(config.parent / "state"):
        found = checks(run(cli.main, "doctor", "--config", str(config), "--json"))
    assert found["state folder"]["finding"] == f"whole; in use by process {os.getpid()}"
