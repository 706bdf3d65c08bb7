"""What every transport and broker must do; a new one is one more parameter."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from edge_runtime.protocol.errors import LocalProtocolError
from edge_runtime.transport.base import (
    BrokerUnreachable,
    Connected,
    Disconnected,
    NotConnected,
    PayloadTooLarge,
    Received,
    Transport,
    Will,
)
from edge_runtime.transport.memory import MemoryBroker, MemoryTransport
from tests.support.brokers import (
    BrokerUnderTest,
    kill_a_client_with_a_will,
    mosquitto_installed,
    receive,
    wait_for,
)

LIMIT = 1_048_576
_names = (f"t{i}" for i in itertools.count())


class MemoryRoom:
    """The broker in memory, with the operations that the suite needs."""

    lacks: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.broker = MemoryBroker(max_packet_bytes=LIMIT)

    def transport(self, client_id: str, *, will: Will | None = None) -> Transport:
        return MemoryTransport(self.broker, client_id, will=will)

    def kill_a_client_with_a_will(self, client_id: str, will: Will) -> None:
        transport = MemoryTransport(self.broker, client_id, will=will)
        transport.open()
        transport.kill()

    def stop(self) -> None:
        self.broker.stop()

    def start(self) -> None:
        self.broker.start()

    def close(self) -> None:
        pass


class RealRoom:
    """A broker process."""

    def __init__(self, folder: Path, kind: str) -> None:
        # amqtt forgets all at a restart, forgets what is not acknowledged, and speaks MQTT 3.1.1, which has no word
        # for a packet limit: the operator names it in the configuration instead.
        amqtt_lacks = {"redelivery", "persistence", "says its limit"}
        self.lacks = frozenset(amqtt_lacks if kind == "amqtt" else ())
        self.broker = BrokerUnderTest(folder, kind)
        self.stop, self.start, self.close = self.broker.stop, self.broker.start, self.broker.stop

    def transport(self, client_id: str, *, will: Will | None = None) -> Transport:
        cap = LIMIT if "says its limit" in self.lacks else None
        return self.broker.transport(client_id, will=will, max_packet_bytes=cap)

    def kill_a_client_with_a_will(self, client_id: str, will: Will) -> None:
        kill_a_client_with_a_will(self.broker.url, client_id, will)


Room = MemoryRoom | RealRoom


@pytest.fixture(scope="module", params=["memory", "mosquitto", "amqtt"])
def room(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    kind: str = request.param
    if kind == "mosquitto" and not mosquitto_installed():
        pytest.skip("mosquitto is not installed")
    if kind == "amqtt":
        pytest.importorskip("amqtt")
    made = MemoryRoom() if kind == "memory" else RealRoom(tmp_path_factory.mktemp(kind), kind)
    yield made
    made.close()


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def _open(room: Room, closing: ExitStack, client_id: str | None = None, **options: Will) -> Transport:
    transport = room.transport(client_id or next(_names), **options)
    transport.open()
    closing.callback(transport.close)
    return transport


def test_a_message_reaches_exactly_the_subscribers_of_its_topic(room: Room, closing: ExitStack) -> None:
    one, all_below, other = (_open(room, closing) for _ in range(3))
    for transport, pattern in ((one, "a/+/c"), (all_below, "a/#"), (other, "b/#")):
        transport.subscribe(pattern)
        transport.subscribe(f"ready/{id(transport)}")
        transport.publish(f"ready/{id(transport)}", b"")
        transport.ack(receive(transport, f"ready/{id(transport)}"))
    payload = bytes(range(256)) * 1000
    one.publish("a/b/c", payload)
    one.publish("b/end", b"end")
    for transport in (one, all_below):
        received = receive(transport)
        assert (received.topic, received.payload, received.retained) == ("a/b/c", payload, False)
        transport.ack(received)
    assert receive(other).topic == "b/end"


def test_flush_ends_when_the_broker_has_taken_everything(room: Room, closing: ExitStack) -> None:
    transport = _open(room, closing)
    for _ in range(50):
        transport.publish("flush/x", bytes(1000))
    assert transport.flush(10.0)


def test_an_unsubscribed_topic_is_silent(room: Room, closing: ExitStack) -> None:
    transport = _open(room, closing)
    transport.subscribe("quiet/#")
    transport.subscribe("loud/#")
    transport.unsubscribe("quiet/#")
    transport.publish("quiet/x", b"1")
    transport.publish("loud/x", b"2")
    assert receive(transport).payload == b"2"


def test_messages_of_one_publisher_arrive_in_order(room: Room, closing: ExitStack) -> None:
    transport = _open(room, closing)
    transport.subscribe("order/#")
    sent = [str(i).encode() for i in range(200)]
    got = []
    for payload in sent:
        transport.publish("order/x", payload)
    for _ in sent:
        received = receive(transport)
        transport.ack(received)
        got.append(received.payload)
    assert got == sent


def test_a_retained_message_meets_the_late_subscriber_and_an_empty_one_clears_it(
    room: Room, closing: ExitStack
) -> None:
    early = _open(room, closing)
    early.subscribe("kept/#")
    early.publish("kept/x", b"state", retain=True)
    assert receive(early).retained is False
    late = _open(room, closing)
    late.subscribe("kept/#")
    received = receive(late)
    assert (received.payload, received.retained) == (b"state", True)
    late.ack(received)
    early.publish("kept/x", b"", retain=True)
    early.publish("kept/end", b"")
    receive(early, "kept/end")
    last = _open(room, closing)
    last.subscribe("kept/#")
    last.publish("kept/y", b"only this")
    assert receive(last).topic == "kept/y"


def test_the_last_will_of_a_killed_client_is_published_and_stays(room: Room, closing: ExitStack) -> None:
    watcher = _open(room, closing)
    watcher.subscribe("presence/+")
    room.kill_a_client_with_a_will("victim", Will(topic="presence/victim", payload=b"gone"))
    received = receive(watcher, "presence/victim")
    assert received.payload == b"gone"
    late = _open(room, closing)
    late.subscribe("presence/+")
    assert receive(late).payload == b"gone"


def test_a_polite_goodbye_leaves_the_will_unsaid(room: Room, closing: ExitStack) -> None:
    watcher = _open(room, closing)
    watcher.subscribe("polite/#")
    leaver = _open(room, closing, will=Will(topic="polite/leaver", payload=b"gone", retain=False))
    leaver.publish("polite/bye", b"bye")
    leaver.close()
    receive(watcher, "polite/bye")
    watcher.publish("polite/end", b"")
    received = wait_for(watcher, Received, lambda event: event.topic.startswith("polite/"))
    assert received.topic == "polite/end"


def test_subscriptions_stand_again_after_the_broker_restarts(room: Room, closing: ExitStack) -> None:
    transport = _open(room, closing)
    transport.subscribe("again/#")
    assert wait_for(transport, Connected).session_present is False
    room.stop()
    assert wait_for(transport, Disconnected).reason
    with pytest.raises(NotConnected):
        transport.publish("again/x", b"lost")
    room.start()
    connected = wait_for(transport, Connected)
    assert connected.session_present or "persistence" in room.lacks
    transport.publish("again/x", b"back")
    assert receive(transport).payload == b"back"
    assert transport.counters.reconnects == 1


def test_an_unacknowledged_message_is_delivered_again_to_the_next_connection(
    room: Room, closing: ExitStack
) -> None:
    if "redelivery" in room.lacks:
        pytest.skip("this broker does not redeliver")
    first = _open(room, closing, "keeper")
    first.subscribe("work/#")
    first.publish("work/1", b"done")
    first.publish("work/2", b"unfinished")
    first.ack(receive(first, "work/1"))
    receive(first, "work/2")
    first.close()
    second = _open(room, closing, "keeper")
    assert wait_for(second, Connected).session_present is True
    received = receive(second)
    assert (received.topic, received.payload) == ("work/2", b"unfinished")
    second.ack(received)


def test_what_is_sent_while_a_client_is_away_waits_for_it(room: Room, closing: ExitStack) -> None:
    client = _open(room, closing, "sleeper")
    client.subscribe("mail/#")
    client.publish("mail/ready", b"")
    client.ack(receive(client))
    client.close()
    sender = _open(room, closing)
    sender.publish("mail/x", b"for you")
    sender.subscribe("mail/#")
    sender.publish("mail/y", b"sent")
    receive(sender, "mail/y")
    again = _open(room, closing, "sleeper")
    assert receive(again).payload == b"for you"


def test_an_oversize_payload_is_refused_before_sending_with_both_sizes_and_the_key(
    room: Room, closing: ExitStack
) -> None:
    transport = _open(room, closing)
    assert wait_for(transport, Connected).max_packet_bytes == LIMIT
    transport.subscribe("big/#")
    with pytest.raises(PayloadTooLarge, match=r"1048590 bytes.* 1048576 bytes .*`chunk_bytes`"):
        transport.publish("big/x", bytes(LIMIT))
    transport.publish("big/x", bytes(LIMIT - 64))
    assert len(receive(transport).payload) == LIMIT - 64
    assert transport.counters.reconnects == 0


def test_a_transport_that_is_not_open_or_closed_sends_nothing(room: Room, closing: ExitStack) -> None:
    transport = room.transport(next(_names))
    with pytest.raises(NotConnected):
        transport.publish("x", b"")
    transport.open()
    transport.close()
    with pytest.raises(NotConnected):
        transport.publish("x", b"")


@pytest.mark.parametrize("topic", ["", "a/#", "a/+", "a\0b"])
def test_a_bad_topic_is_our_own_bug(room: Room, closing: ExitStack, topic: str) -> None:
    with pytest.raises(LocalProtocolError):
        _open(room, closing).publish(topic, b"")


def test_bytes_are_counted_on_both_ways(room: Room, closing: ExitStack) -> None:
    transport = _open(room, closing)
    transport.subscribe("count/#")
    transport.publish("count/x", bytes(1000))
    receive(transport)
    assert transport.counters.bytes_up == transport.counters.bytes_down == 1000 + 3 + 2 + len("count/x") + 3


def test_open_on_an_absent_broker_says_where_and_what_to_do(room: Room) -> None:
    room.stop()
    try:
        with pytest.raises(BrokerUnreachable, match=r"refused.*; .*(running|start)"):
            room.transport(next(_names)).open(timeout_s=0)
    finally:
        room.start()
