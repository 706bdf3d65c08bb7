"""Enrolment end to end: the registrar's own loop, real transports, a real mosquitto."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from aggregator.registrar import Registrar
from edge_runtime.enrolment import Enrolled, EnrolmentRefused
from edge_runtime.protocol import topics
from edge_runtime.protocol.certificates import check_device
from edge_runtime.protocol.crypto.provider import CRYPTO
from edge_runtime.protocol.enrol_token import EnrolToken
from edge_runtime.protocol.ids import DeviceId
from edge_runtime.protocol.rejects import Reject
from edge_runtime.transport.address import parse_broker_url
from edge_runtime.transport.base import Received
from edge_runtime.transport.mqtt import MqttOptions, MqttTransport
from tests.support.brokers import ROOT, BrokerUnderTest, mosquitto_installed
from tests.support.enrolling import DEVICE, EXPIRES, FEDERATION, enrol_now, key, new_registrar, serving

pytestmark = pytest.mark.skipif(not mosquitto_installed(), reason="needs mosquitto")


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerUnderTest]:
    broker = BrokerUnderTest(tmp_path_factory.mktemp("broker"))
    yield broker
    broker.stop()


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Registrar]:
    office = new_registrar(tmp_path)
    yield office
    office.close()


def enrol_over(
    broker: BrokerUnderTest, token: EnrolToken, device: DeviceId = DEVICE, owner: str = ""
) -> Enrolled:
    """As a device does: it knows only the token and its own key."""
    transport = MqttTransport(
        MqttOptions(address=parse_broker_url(token.broker_url), client_id=f"enrol-{device}-{owner}")
    )
    transport.open()
    try:
        return enrol_now(transport, token, device, key(owner or device))
    finally:
        transport.close()


def test_a_fleet_enrols_with_printed_tokens_and_no_secret_crosses_the_broker(
    broker: BrokerUnderTest, office: Registrar
) -> None:
    names = [DeviceId(f"pi-{i}") for i in range(4)]
    texts = [office.new_token(broker.url, EXPIRES, name).encode() for name in names]
    watcher = broker.transport("watcher")
    watcher.open()
    watcher.subscribe("#")
    results: dict[DeviceId, Enrolled] = {}

    def one(name: DeviceId, text: str) -> None:
        results[name] = enrol_over(broker, EnrolToken.parse(text), name)

    with serving(office, broker.transport("registrar")):
        devices = [threading.Thread(target=one, args=pair) for pair in zip(names, texts, strict=True)]
        for thread in devices:
            thread.start()
        for thread in devices:
            thread.join()
    for name in names:
        # All that the aggregator has: the root's public key and the certificate of the check-in.
        certificate = check_device(CRYPTO, office.root, results[name].certificate, FEDERATION, name)
        assert certificate.signing_key == CRYPTO.verify_key(key(name)).raw
    traffic = b""
    answered: set[str] = set()
    while answered != {topics.down(FEDERATION, name) for name in names}:
        event = watcher.next_event(10.0)
        assert event is not None
        if isinstance(event, Received):
            traffic += event.payload
            watcher.ack(event)
            if event.topic.startswith(f"fl/1/{FEDERATION}/d/"):
                answered.add(event.topic)
    watcher.close()
    for text in texts:
        token = EnrolToken.parse(text)
        assert token.secret not in traffic
        assert token.token_id.encode() not in traffic


def test_a_token_works_for_one_key_only(broker: BrokerUnderTest, office: Registrar) -> None:
    token = office.new_token(broker.url, EXPIRES)
    with serving(office, broker.transport("registrar")):
        first = enrol_over(broker, token)
        with pytest.raises(EnrolmentRefused) as caught:
            enrol_over(broker, token, owner="thief")
        assert caught.value.reject is Reject.TOKEN_USED
        assert enrol_over(broker, token).certificate == first.certificate


_SERVE = """
import sys
from pathlib import Path
from aggregator import registrar
from edge_runtime.transport.address import parse_broker_url
from edge_runtime.transport.mqtt import MqttOptions, MqttTransport

folder, url = sys.argv[1:]
transport = MqttTransport(MqttOptions(address=parse_broker_url(url), client_id="registrar-process"))
transport.open()
print("serving", flush=True)
registrar.open(Path(folder)).serve(transport, lambda: False, lambda: 0.0)
"""


def test_a_registrar_killed_after_enrolling_gives_the_same_certificate_when_it_is_back(
    broker: BrokerUnderTest, office: Registrar, tmp_path: Path
) -> None:
    token = office.new_token(broker.url, EXPIRES)
    command = [sys.executable, "-c", _SERVE, str(tmp_path / "registrar"), broker.url]
    certificates = []
    for _ in range(2):
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == b"serving\n"
                certificates.append(enrol_over(broker, token).certificate)
            finally:
                os.kill(process.pid, signal.SIGKILL)
    assert certificates[0] == certificates[1] == office.devices()[0].certificate


def test_a_device_that_asks_before_the_registrar_runs_is_enrolled_when_it_does(
    broker: BrokerUnderTest, office: Registrar
) -> None:
    token = office.new_token(broker.url, EXPIRES)
    watcher = broker.transport("early-watcher")
    watcher.open()
    watcher.subscribe(topics.all_enrol(FEDERATION))
    results: list[Enrolled] = []
    device = threading.Thread(target=lambda: results.append(enrol_over(broker, token)))
    device.start()
    while not isinstance(watcher.next_event(10.0), Received):
        pass
    watcher.close()
    with serving(office, broker.transport("late-registrar")):
        device.join()
    assert len(results) == 1


def test_a_registrar_survives_a_restart_of_the_broker(tmp_path: Path, office: Registrar) -> None:
    broker = BrokerUnderTest(tmp_path / "broker")
    token = office.new_token(broker.url, EXPIRES)
    try:
        with serving(office, broker.transport("registrar")):
            broker.restart()
            assert enrol_over(broker, token).certificate
    finally:
        broker.stop()
