"""What only the real transport does: versions, refusals, windows, threads."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from aggregator.broker import start_broker
from edge_runtime.transport.address import parse_broker_url
from edge_runtime.transport.base import BrokerUnreachable, Congested, Connected, Disconnected, Received
from edge_runtime.transport.mqtt import MqttOptions, MqttTransport
from tests.support.brokers import BrokerUnderTest, mosquitto_installed, receive, wait_for

pytestmark = pytest.mark.skipif(not mosquitto_installed(), reason="mosquitto is not installed")


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerUnderTest]:
    under_test = BrokerUnderTest(tmp_path_factory.mktemp("mosquitto"))
    yield under_test
    under_test.stop()


class FakeBroker:
    """Answers every CONNECT with fixed bytes and then nothing: what no well-behaved broker does."""

    def __init__(self, answers: list[bytes | None]) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"mqtt://127.0.0.1:{self._listener.getsockname()[1]}"
        self.levels: list[int] = []
        self._answers = answers
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        for answer in self._answers:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.levels.append(connection.recv(4096)[8])
            if answer is None:
                connection.close()
            else:
                connection.sendall(answer)
                self._open.append(connection)

    def close(self) -> None:
        for connection in (*self._open, self._listener):
            connection.close()


def _options(url: str, **options: float) -> MqttOptions:
    return MqttOptions(address=parse_broker_url(url), client_id="c", **options)  # type: ignore[arg-type]


def test_a_broker_of_311_is_spoken_to_in_311_whether_it_answers_or_just_closes() -> None:
    accepted = b"\x20\x02\x00\x00"
    for answer in (b"\x20\x02\x00\x01", None):
        broker = FakeBroker([answer, accepted])
        transport = MqttTransport(_options(broker.url))
        transport.open(timeout_s=0)
        assert wait_for(transport, Connected) == Connected(session_present=False, max_packet_bytes=None)
        assert broker.levels == [5, 4]
        broker.close()
        transport.close()


def test_a_peer_that_speaks_no_mqtt_is_named_with_host_and_port() -> None:
    broker = FakeBroker([b"HTTP/1.1 400 Bad Request\r\n\r\n"] * 3)
    with pytest.raises(BrokerUnreachable, match=r"127\.0\.0\.1:\d+: .*; "):
        MqttTransport(_options(broker.url, connect_timeout_s=0.2)).open(timeout_s=0)
    broker.close()


def test_an_unknown_host_is_named() -> None:
    with pytest.raises(BrokerUnreachable, match=r"no-such-host\.invalid:1883: .*"):
        MqttTransport(_options("mqtt://no-such-host.invalid")).open(timeout_s=0)


def test_a_wrong_password_is_reported_at_once_and_not_repeated_in_the_text(tmp_path: Path) -> None:
    file = tmp_path / "passwords"
    file.write_text("")
    with start_broker(tmp_path / "broker", password_file=file, kind="mosquitto") as broker:
        url = broker.url.replace("mqtt://", "mqtt://me:hunter2@")
        with pytest.raises(BrokerUnreachable, match=r"Not authorized; check the user name") as caught:
            MqttTransport(_options(url)).open(timeout_s=60)
        assert "hunter2" not in str(caught.value)


def test_a_broker_that_acknowledges_nothing_congests_and_nothing_piles_up() -> None:
    broker = FakeBroker([b"\x20\x03\x00\x00\x00"])
    transport = MqttTransport(_options(broker.url, max_inflight=3, publish_timeout_s=0.05))
    transport.open()
    for _ in range(3):
        transport.publish("x", b"")
    with pytest.raises(Congested, match="overloaded"):
        transport.publish("x", b"")
    broker.close()
    transport.close()


def test_a_caller_that_publishes_before_it_reads_is_not_locked_up(broker: BrokerUnderTest) -> None:
    transport = broker.transport("busy", receive_maximum=4, max_unacked_bytes=1000)
    transport.open()
    transport.subscribe("busy/#")
    for i in range(100):
        transport.publish("busy/x", str(i).encode().rjust(500))
    for i in range(100):
        received = receive(transport)
        assert int(received.payload) == i
        transport.ack(received)
    transport.close()


def test_nothing_beyond_the_window_is_read_until_it_is_acknowledged(broker: BrokerUnderTest) -> None:
    reader = broker.transport("slow", receive_maximum=4)
    sender = broker.transport("fast")
    for transport in (reader, sender):
        transport.open()
    reader.subscribe("slow/#")
    reader.publish("slow/ready", b"")
    reader.ack(receive(reader))
    reader.publish(
        "slow/first", b""
    )  # behind the acknowledgement, so the broker has seen that when this comes back
    held = [receive(reader)]
    for _ in range(50):
        sender.publish("slow/x", b"1")
    held += [receive(reader) for _ in range(3)]
    assert reader.next_event(0.1) is None
    for received in held:
        reader.ack(received)
    for _ in range(47):
        reader.ack(receive(reader))
    for transport in (reader, sender):
        transport.close()


def test_many_threads_publish_through_one_transport(broker: BrokerUnderTest) -> None:
    transport = broker.transport("threads")
    transport.open()
    transport.subscribe("threads/#")

    def publish(worker: int) -> None:
        for i in range(100):
            transport.publish("threads/x", bytes([worker, i]) * 2000)

    workers = [threading.Thread(target=publish, args=(worker,)) for worker in range(4)]
    for worker in workers:
        worker.start()
    seen = set()
    for _ in range(400):
        received = receive(transport)
        transport.ack(received)
        assert received.payload == received.payload[:2] * 2000
        seen.add(received.payload[:2])
    assert len(seen) == 400
    for worker in workers:
        worker.join()
    transport.close()


def test_a_killed_broker_is_an_event_and_the_transport_comes_back(broker: BrokerUnderTest) -> None:
    transport = broker.transport("stays")
    transport.open()
    transport.subscribe("stays/#")
    broker.kill()
    wait_for(transport, Disconnected)
    broker.start()
    wait_for(transport, Connected)
    transport.publish("stays/x", b"1")
    assert wait_for(transport, Received).payload == b"1"
    transport.close()


def test_flush_says_that_a_frozen_broker_has_not_taken_everything(broker: BrokerUnderTest) -> None:
    transport = broker.transport("flusher")
    transport.open()
    os.kill(broker.pid, signal.SIGSTOP)
    try:
        transport.publish("flush/x", b"1")
        assert not transport.flush(0.2)
    finally:
        os.kill(broker.pid, signal.SIGCONT)
    assert transport.flush(10.0)
    transport.close()
