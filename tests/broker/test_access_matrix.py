"""Who gets in and who may write and read what, on a real mosquitto with the generated files.

Every cell is asserted by what is delivered or refused; what is expected follows from ``aggregator.access.rules``.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from aggregator.access import OWN, Action, Role, rules
from aggregator.registrar import Registrar, tls
from edge_runtime.protocol import topics
from edge_runtime.protocol.ids import DeviceId, FederationId, sha256
from edge_runtime.transport.address import parse_broker_url
from edge_runtime.transport.base import BrokerUnreachable, Connected, Event, Received, matches
from edge_runtime.transport.mqtt import MqttTransport
from tests.support.brokers import PATIENCE_S, mosquitto_installed, receive, wait_for
from tests.support.enrolling import FEDERATION, new_registrar
from tests.support.secured_broker import Client, SecuredBroker

pytestmark = pytest.mark.skipif(not mosquitto_installed(), reason="needs mosquitto")

A, B = DeviceId("pi-a"), DeviceId("pi-b")
CLIENTS = {
    A: Role.DEVICE,
    B: Role.DEVICE,
    **{role.value: role for role in (Role.AGGREGATOR, Role.REGISTRAR, Role.OBSERVER)},
}
BLOB = sha256(b"a model")
ELSEWHERE = FederationId("another")
TOPICS = {
    "manifest": topics.manifest(FEDERATION),
    "a chunk": topics.blob_piece(FEDERATION, BLOB, 0),
    "an index": topics.blob_piece(FEDERATION, BLOB, None),
    **{
        f"{what} of {device}": topic(FEDERATION, device)
        for what, topic in (
            ("up", topics.up),
            ("enrolment", topics.enrol),
            ("down", topics.down),
            ("presence", topics.presence),
        )
        for device in (A, B)
    },
    "up of the observer": topics.up(FEDERATION, DeviceId(Role.OBSERVER.value)),
    "another federation's manifest": topics.manifest(ELSEWHERE),
    "another federation's up": topics.up(ELSEWHERE, A),
    "a topic of nobody": f"fl/1/{FEDERATION}/x",
    "the broker's own": "$SYS/broker/version",
}
EXACT = tuple(TOPICS.values())
SUBSCRIPTIONS = {
    "the topic": EXACT,
    "a level": tuple({topic.rsplit("/", 1)[0] + "/+" for topic in EXACT}),
    "the federation": (f"fl/1/{FEDERATION}/#",),
    "everything": ("#", "$SYS/#"),
}


def expected(name: str, action: Action, topic: str) -> bool:
    role = CLIENTS[name]
    found = [rule for rule in rules(FEDERATION) if matches(rule.pattern.replace(OWN, name), topic)]
    if role is Role.AGGREGATOR and action is Action.READ:
        # mosquitto's patterns are for every user; what it says to all cannot be denied it
        return any(rule.role is role for rule in found) and any(rule.action is action for rule in found)
    return any(rule.role is role and rule.action is action for rule in found)


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registrar]:
    office = new_registrar(tmp_path_factory.mktemp("registrar"))
    yield office
    office.close()


@pytest.fixture(scope="module")
def broker(office: Registrar, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredBroker]:
    broker = SecuredBroker(tmp_path_factory.mktemp("secured"), office)
    yield broker
    broker.stop()


class Seen(NamedTuple):
    """Pairs (client, topic): what the broker took, and, by subscription, what it delivered."""

    taken: set[tuple[str, str]]
    delivered: dict[str, set[tuple[str, str]]]


@pytest.fixture(scope="module")
def seen(broker: SecuredBroker) -> Seen:
    """Everybody writes everywhere and listens everywhere."""
    taken: set[tuple[str, str]] = set()
    delivered: dict[str, set[tuple[str, str]]] = {}
    with contextlib.ExitStack() as stack:
        transports: dict[str, MqttTransport] = {}
        for name in CLIENTS:
            transports[name] = broker.transport(broker.client(name), f"client-{name}")
            transports[name].open(PATIENCE_S)
            stack.callback(transports[name].close)
        for how, patterns in SUBSCRIPTIONS.items():
            for transport in transports.values():
                for pattern in patterns:
                    transport.subscribe(pattern)
            for (name, transport), topic in itertools.product(transports.items(), EXACT):
                refused = transport.counters.refused
                transport.publish(topic, name.encode())
                assert transport.flush(PATIENCE_S)
                if transport.counters.refused == refused:
                    taken.add((name, topic))
            _end(transports)
            delivered[how] = {
                (name, topic) for name, transport in transports.items() for topic in _until_the_end(transport)
            }
            for transport in transports.values():
                for pattern in patterns:
                    transport.unsubscribe(pattern)
    return Seen(taken, delivered)


def _end(transports: dict[str, MqttTransport]) -> None:
    """To each client its last message: all before it were taken by the broker, so it comes after them."""
    for device in (A, B):
        transports[Role.AGGREGATOR.value].publish(topics.down(FEDERATION, device), b"end")
    for topic in (topics.up(FEDERATION, A), topics.enrol(FEDERATION, A), topics.presence(FEDERATION, A)):
        transports[A].publish(topic, b"end")


def _until_the_end(transport: MqttTransport) -> Iterator[str]:
    while True:
        event = wait_for(transport, Received)
        transport.ack(event)
        if event.payload == b"end":
            return
        yield event.topic


@pytest.mark.parametrize("topic", TOPICS)
@pytest.mark.parametrize("name", CLIENTS)
def test_what_a_client_may_write_is_taken_and_all_else_refused(seen: Seen, name: str, topic: str) -> None:
    assert ((name, TOPICS[topic]) in seen.taken) is expected(name, Action.WRITE, TOPICS[topic])


@pytest.mark.parametrize("how", SUBSCRIPTIONS)
@pytest.mark.parametrize("topic", TOPICS)
@pytest.mark.parametrize("name", CLIENTS)
def test_what_a_client_may_read_is_delivered_and_nothing_else(
    seen: Seen, name: str, topic: str, how: str
) -> None:
    path = TOPICS[topic]
    said = any(expected(writer, Action.WRITE, path) for writer in CLIENTS)
    covered = any(matches(pattern, path) for pattern in SUBSCRIPTIONS[how])
    assert ((name, path) in seen.delivered[how]) is (said and covered and expected(name, Action.READ, path))


def test_the_matrix_has_cells_of_each_sort() -> None:
    assert expected(A, Action.WRITE, topics.up(FEDERATION, A))
    assert not expected(A, Action.WRITE, topics.up(FEDERATION, B))
    assert not expected(A, Action.READ, topics.up(FEDERATION, A))
    assert not expected(A, Action.READ, topics.down(FEDERATION, B))
    assert not expected(A, Action.WRITE, topics.manifest(FEDERATION))
    assert not expected(Role.REGISTRAR.value, Action.READ, topics.up(FEDERATION, A))
    assert not expected(Role.AGGREGATOR.value, Action.READ, topics.enrol(FEDERATION, A))
    assert not expected(Role.OBSERVER.value, Action.READ, topics.blob_piece(FEDERATION, BLOB, 0))


# ---- who does not get in ----------------------------------------------------------------------------


def no_certificate(broker: SecuredBroker, folder: Path) -> Client:
    return broker.client(A)._replace(certificate=None, key=None)


def expired(broker: SecuredBroker, folder: Path) -> Client:
    return broker.client(A, days=1, at=time.time() - 2 * 86_400)


def not_yet_valid(broker: SecuredBroker, folder: Path) -> Client:
    return broker.client(A, at=time.time() + 2 * 86_400)


def of_another_authority(broker: SecuredBroker, folder: Path) -> Client:
    stranger = new_registrar(folder, b"stranger")
    stranger.set_up_tls(time.time(), 30)
    issued = stranger.client_certificate(A, time.time(), 30)
    stranger.close()
    return _files(broker, folder, issued)


def revoked(broker: SecuredBroker, folder: Path) -> Client:
    client = broker.client("lost")
    broker.office.revoke("lost", time.time())
    broker.take_crl()
    return client


def revoked_role(broker: SecuredBroker, folder: Path) -> Client:
    client = broker.client(Role.OBSERVER.value)
    broker.office.revoke(Role.OBSERVER.value, time.time())
    broker.take_crl()
    return client


def the_brokers_own(broker: SecuredBroker, folder: Path) -> Client:
    return _files(broker, folder, broker.office.broker_certificate(["127.0.0.1"], time.time(), 30))


def _files(broker: SecuredBroker, folder: Path, issued: tls.Issued) -> Client:
    certificate, key = folder / "client.crt", folder / "client.key"
    certificate.write_bytes(issued.certificate)
    key.write_bytes(issued.key)
    return broker.client(A)._replace(certificate=certificate, key=key)


@pytest.mark.parametrize(
    "make",
    [no_certificate, expired, not_yet_valid, of_another_authority, revoked, revoked_role, the_brokers_own],
)
def test_who_has_no_good_certificate_does_not_get_in(
    broker: SecuredBroker, tmp_path: Path, make: Callable[[SecuredBroker, Path], Client]
) -> None:
    transport = broker.transport(make(broker, tmp_path), "outside")
    with pytest.raises(BrokerUnreachable):
        transport.open(timeout_s=0)


def test_a_client_does_not_speak_to_a_broker_of_another_authority_or_name(
    broker: SecuredBroker, tmp_path: Path
) -> None:
    good = broker.client(A)
    stranger = new_registrar(tmp_path, b"stranger")
    stranger.set_up_tls(time.time(), 30)
    other = tmp_path / "other.crt"
    other.write_bytes(stranger.authority_certificate())
    stranger.close()
    with pytest.raises(BrokerUnreachable, match="does not verify"):
        broker.transport(good._replace(ca=other), "a").open(timeout_s=0)


def test_a_revoked_client_stays_until_its_connection_ends_and_its_name_comes_back_with_new_files(
    broker: SecuredBroker,
) -> None:
    name = DeviceId("pi-c")
    old = broker.client(name)
    transport = broker.transport(old, "c")
    transport.open(PATIENCE_S)
    broker.office.revoke(name, time.time())
    broker.take_crl()
    transport.publish(topics.presence(FEDERATION, name), b"still here")
    assert transport.flush(PATIENCE_S)
    assert transport.counters.refused == 0
    transport.close()
    with pytest.raises(BrokerUnreachable):
        broker.transport(old, "c").open(timeout_s=0)
    again = broker.transport(broker.client(name), "c")
    again.open(PATIENCE_S)
    again.close()


# ---- what else the settings promise -----------------------------------------------------------------


def test_nobody_takes_the_place_of_another_by_its_client_id(broker: SecuredBroker) -> None:
    aggregator = broker.transport(broker.client(Role.AGGREGATOR.value), "the aggregator")
    aggregator.open(PATIENCE_S)
    aggregator.subscribe(topics.all_up(FEDERATION))
    thief = broker.transport(broker.client(B), "the aggregator")
    thief.open(PATIENCE_S)
    thief.publish(topics.up(FEDERATION, B), b"honest")
    events: list[Event | None] = []
    while not (events and isinstance(events[-1], Received)):
        event = aggregator.next_event(PATIENCE_S)
        assert event is not None
        events.append(event)
    assert [type(event) for event in events] == [Connected, Received]
    assert events[-1].payload == b"honest"
    thief.close()
    aggregator.close()


def test_a_last_will_is_bound_to_the_clients_own_presence(broker: SecuredBroker) -> None:
    observer = broker.transport(broker.client(Role.OBSERVER.value), "observer")
    observer.open(PATIENCE_S)
    observer.subscribe(topics.presence(FEDERATION, DeviceId("+")))
    observer.publish(topics.presence(FEDERATION, A), b"nothing")  # refused; and the subscription is in force
    assert observer.flush(PATIENCE_S)
    files = broker.client(A)
    for device in (B, A):
        _vanish_with_a_will(broker, files, topics.presence(FEDERATION, device))
    will = wait_for(observer, Received, lambda event: not event.retained)
    assert (will.topic, will.payload) == (topics.presence(FEDERATION, A), b"gone")
    observer.close()


def _vanish_with_a_will(broker: SecuredBroker, client: Client, topic: str) -> None:
    """CONNECT of MQTT 3.1.1 with a will of QoS 1, and the end without DISCONNECT once it is accepted."""
    parts = [b"\0" + bytes([len(text)]) + text for text in (b"id", topic.encode(), b"gone")]
    connect = b"\0\4MQTT\4\x0e\0\x3c" + b"".join(parts)
    tls = parse_broker_url(
        broker.url, ca_file=client.ca, cert_file=client.certificate, key_file=client.key
    ).tls
    assert tls is not None
    with (
        socket.create_connection((broker.HOST, broker.port), PATIENCE_S) as raw,
        tls.wrap_socket(raw, server_hostname=broker.HOST) as connection,
    ):
        connection.sendall(b"\x10" + bytes([len(connect)]) + connect)
        assert connection.recv(4) == b"\x20\2\0\0"


def test_what_is_retained_is_given_to_those_only_who_may_read_it(broker: SecuredBroker) -> None:
    aggregator = broker.transport(broker.client(Role.AGGREGATOR.value), "aggregator")
    aggregator.open(PATIENCE_S)
    aggregator.publish(topics.manifest(FEDERATION), b"the open round", retain=True)
    assert aggregator.flush(PATIENCE_S)
    device = broker.transport(broker.client(A), "a")
    device.open(PATIENCE_S)
    device.publish(topics.presence(FEDERATION, A), b"online", retain=True)
    assert device.flush(PATIENCE_S)
    device.subscribe(f"fl/1/{FEDERATION}/#")
    received = receive(device)
    assert (received.topic, received.payload) == (topics.manifest(FEDERATION), b"the open round")
    device.ack(received)
    aggregator.publish(topics.down(FEDERATION, A), b"end")
    assert receive(device).payload == b"end"  # and nothing before it, its own presence neither
    device.close()
    aggregator.close()


def test_what_waits_for_a_device_survives_a_restart_of_the_broker(office: Registrar, tmp_path: Path) -> None:
    broker = SecuredBroker(tmp_path, office)
    try:
        files = broker.client(A)
        device = broker.transport(files, "a")
        device.open(PATIENCE_S)
        device.subscribe(topics.down(FEDERATION, A))
        device.close()
        aggregator = broker.transport(broker.client(Role.AGGREGATOR.value), "aggregator")
        aggregator.open(PATIENCE_S)
        aggregator.publish(topics.down(FEDERATION, A), b"receipt")
        aggregator.close()
        broker.stop()
        broker.start()
        device = broker.transport(files, "a")
        device.open(PATIENCE_S)
        assert receive(device).payload == b"receipt"
        device.close()
    finally:
        broker.stop()
