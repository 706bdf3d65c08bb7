from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from edge_runtime.transport.base import Connected, Disconnected, NotConnected, Received, Will
from edge_runtime.transport.memory import Faults, MemoryBroker, MemoryTransport


def _pair(broker: MemoryBroker) -> tuple[MemoryTransport, MemoryTransport]:
    sender, receiver = MemoryTransport(broker, "s"), MemoryTransport(broker, "r")
    for transport in (sender, receiver):
        transport.open()
    receiver.subscribe("#")
    return sender, receiver


def _payloads(transport: MemoryTransport) -> list[int]:
    payloads = []
    while (event := transport.next_event(0)) is not None:
        if isinstance(event, Received):
            transport.ack(event)
            payloads.append(int(event.payload))
    return payloads


def _run(faults: Faults, seed: int) -> list[int]:
    broker = MemoryBroker(immediate=False, faults=faults, random=Random(seed))
    sender, receiver = _pair(broker)
    for i in range(200):
        sender.publish("x", str(i).encode())
    broker.deliver()
    return _payloads(receiver)


def test_the_same_seed_gives_the_same_faults_and_another_seed_others() -> None:
    faults = Faults(drop=0.1, duplicate=0.1, reorder=0.3)
    assert _run(faults, 1) == _run(faults, 1) != _run(faults, 2)


def test_each_fault_does_what_it_says_and_nothing_else() -> None:
    whole = list(range(200))
    assert _run(Faults(), 0) == whole
    dropped = _run(Faults(drop=0.2), 0)
    assert dropped == sorted(set(dropped))
    assert 0 < len(dropped) < 200
    assert set(Counter(_run(Faults(duplicate=0.2), 0)).values()) == {1, 2}
    reordered = _run(Faults(reorder=0.2), 0)
    assert reordered != whole
    assert sorted(reordered) == whole


def test_a_simulator_owns_every_delivery() -> None:
    broker = MemoryBroker(immediate=False)
    sender, receiver = _pair(broker)
    for i in range(3):
        sender.publish("x", str(i).encode())
    assert (_payloads(receiver), broker.waiting()) == ([], 3)
    assert broker.deliver(2) == 2
    assert (_payloads(receiver), broker.waiting()) == ([0, 1], 1)


def test_a_cut_client_hears_of_it_and_gets_all_unacknowledged_messages_in_order_when_it_is_back() -> None:
    broker = MemoryBroker()
    sender, receiver = _pair(broker)
    for i in range(3):
        sender.publish("x", str(i).encode())
    stale = [event for event in iter(lambda: receiver.next_event(0), None) if isinstance(event, Received)]
    receiver.ack(stale[0])
    broker.cut("r")
    receiver.ack(stale[1])  # too late: the acknowledgement has no connection to travel on
    sender.publish("x", b"3")
    with pytest.raises(NotConnected):
        receiver.publish("x", b"")
    assert isinstance(receiver.next_event(0), Disconnected)
    broker.reconnect("r")
    assert receiver.next_event(0) == Connected(session_present=True, max_packet_bytes=None)
    assert _payloads(receiver) == [1, 2, 3]


def test_a_broker_that_lost_its_state_says_so_and_the_subscription_is_asked_for_again() -> None:
    broker = MemoryBroker()
    sender, receiver = _pair(broker)
    sender.publish("kept", b"1", retain=True)
    assert _payloads(receiver) == [1]
    broker.stop(lose_state=True)
    broker.start()
    assert isinstance(receiver.next_event(0), Disconnected)
    assert receiver.next_event(0) == Connected(session_present=False, max_packet_bytes=None)
    sender.publish("x", b"2")
    assert _payloads(receiver) == [2]


def test_a_second_client_of_the_same_name_throws_the_first_one_out_and_its_will_is_said() -> None:
    broker = MemoryBroker()
    _, receiver = _pair(broker)
    first = MemoryTransport(broker, "twin", will=Will(topic="gone", payload=b"7"))
    first.open()
    MemoryTransport(broker, "twin").open()
    assert _payloads(receiver) == [7]
    with pytest.raises(NotConnected):
        first.publish("x", b"1")


def test_faults_without_a_random_source_are_refused() -> None:
    with pytest.raises(ValueError, match="random"):
        MemoryBroker(faults=Faults(drop=0.5))
