"""What every path of a blob promises, over every courier: the whole content, verified. A new path is one parameter.

In memory the clock is simulated and faults are drawn from a seed; over mosquitto both are real.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from aggregator.blob_server import BlobServer
from edge_runtime.blob_fetch import BlobFetch
from edge_runtime.protocol import topics
from edge_runtime.protocol.crypto.prg import Stream
from edge_runtime.protocol.envelope import Header, pack, unpack
from edge_runtime.protocol.errors import RemoteProtocolError
from edge_runtime.protocol.ids import DeviceId, FederationId, sha256
from edge_runtime.protocol.kinds import Kind
from edge_runtime.protocol.manifest import BlobRef
from edge_runtime.protocol.messages import Chunk, Fetch
from edge_runtime.protocol.rejects import Reject
from edge_runtime.transport.base import Connected, NotConnected, Received, Transport
from edge_runtime.transport.memory import Faults, MemoryBroker, MemoryTransport
from tests.support.brokers import BrokerUnderTest, mosquitto_installed

FEDERATION = FederationId("digits")
K = 8192
CONTENT = Stream(bytes(32)).bytes(40 * K)
SIX = CONTENT[: 5 * K + 100]  # an index and six chunks
PATIENCE_S = 20.0

PATHS: dict[str, Callable[[BlobRef], BlobFetch]] = {
    "wave": lambda ref: BlobFetch(ref, wave=True),
    "pull": lambda ref: BlobFetch(ref, wave=False),
}


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Callable[[BlobRef], BlobFetch]:
    return PATHS[request.param]


class Memory:
    """Everything happens when ``deliver`` says so."""

    simulated = True

    def __init__(self, faults: Faults | None = None, seed: int = 0) -> None:
        self.broker = MemoryBroker(immediate=False, faults=faults or Faults(), random=random.Random(seed))

    def transport(self, name: str) -> Transport:
        return MemoryTransport(self.broker, name)

    def deliver(self) -> int:
        return self.broker.deliver()


class Mosquitto:
    simulated = False

    def __init__(self, under_test: BrokerUnderTest) -> None:
        self._under_test = under_test

    def transport(self, name: str) -> Transport:
        return self._under_test.transport(f"{name}-{time.monotonic_ns()}")

    def deliver(self) -> int:
        time.sleep(0.002)
        return 0


@pytest.fixture(scope="module")
def mosquitto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerUnderTest]:
    if not mosquitto_installed():
        pytest.skip("mosquitto is not installed")
    under_test = BrokerUnderTest(tmp_path_factory.mktemp("mosquitto"))
    yield under_test
    under_test.stop()


@pytest.fixture(params=["memory", "mosquitto"])
def courier(request: pytest.FixtureRequest) -> Memory | Mosquitto:
    if request.param == "memory":
        return Memory()
    return Mosquitto(request.getfixturevalue("mosquitto"))


@dataclass
class Device:
    """What ``edge_runtime.session`` is while it fetches."""

    name: DeviceId
    transport: Transport
    fetch: BlobFetch
    random: Callable[[], float]
    taken: int = 0
    refused: list[Reject] = field(default_factory=list)

    def turn(self, now: float) -> None:
        while (event := self.transport.next_event(0)) is not None:
            if isinstance(event, Connected):
                self.fetch.next_ask_at = now
            elif isinstance(event, Received):
                try:
                    chunk = Chunk.decode(unpack(event.payload, FEDERATION, Kind.CHUNK).body)
                    self.taken += self.fetch.take(chunk, now, self.random)
                except RemoteProtocolError as error:
                    self.refused.append(error.reject)
                self.transport.ack(event)
        if not self.fetch.complete() and now >= self.fetch.next_ask_at:
            body = self.fetch.ask(now, self.random).encode()
            header = Header(kind=Kind.FETCH, federation=FEDERATION, device=self.name, payload_digest=sha256())
            (raw,) = pack(header, body, lambda _: bytes(64))  # who may ask is the intake's matter
            with contextlib.suppress(NotConnected):
                self.transport.publish(topics.up_topic(Kind.FETCH, FEDERATION, self.name), raw)


class Scene:
    """A server and its devices on one courier."""

    def __init__(self, courier: Memory | Mosquitto, **settings: float) -> None:
        self.courier = courier
        self.server = BlobServer(FEDERATION, K, **settings)  # type: ignore[arg-type]
        self.transport = courier.transport("aggregator")
        self.transport.subscribe(topics.all_up(FEDERATION))
        self.transport.open()
        self.devices: list[Device] = []
        self.refusals: list[Reject] = []
        self.sent: list[str] = []
        self._outgoing: deque[tuple[str, bytes]] = deque()
        self._chance = random.Random(7)
        self._now = 0.0

    @property
    def now(self) -> float:
        return self._now if self.courier.simulated else time.monotonic()

    def join(self, ref: BlobRef, path: Callable[[BlobRef], BlobFetch], name: str = "pi-a") -> Device:
        device = Device(DeviceId(name), self.courier.transport(name), path(ref), self._chance.random)
        device.transport.subscribe(topics.down(FEDERATION, device.name))
        if device.fetch.wave:
            device.transport.subscribe(topics.all_pieces(FEDERATION, ref.digest))
        device.transport.open()
        device.fetch.next_ask_at = self.now
        self.devices.append(device)
        return device

    def run(self, until: Callable[[], bool] | None = None) -> None:
        """Until all devices have all, or ``until``; fails if that does not come."""
        until = until or (lambda: all(device.fetch.complete() for device in self.devices))
        began = time.monotonic()
        while not until():
            assert time.monotonic() < began + PATIENCE_S
            self.step()

    def step(self) -> None:
        moved = self.courier.deliver()
        for device in self.devices:
            device.turn(self.now)
        moved += self.courier.deliver()
        while (event := self.transport.next_event(0)) is not None:
            if isinstance(event, Received):
                self._take(event)
                self.transport.ack(event)
        for topic, payload in self.server.due(self.now):
            self.transport.publish(topic, payload)
            self.sent.append(topic)
            moved += 1
        if not moved:
            times = [device.fetch.next_ask_at for device in self.devices if not device.fetch.complete()]
            wake_at = self.server.wake_at()
            self._now = max(self._now, min(times if wake_at is None else [*times, wake_at], default=0.0))

    def close(self) -> None:
        for transport in (self.transport, *(device.transport for device in self.devices)):
            transport.close()

    def _take(self, event: Received) -> None:
        try:
            fetch = Fetch.decode(unpack(event.payload, FEDERATION, Kind.FETCH).body)
            self.server.request(self.now, topics.sender_of(event.topic).device, fetch)
        except RemoteProtocolError as error:
            self.refusals.append(error.reject)


# ---- over every courier -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, K, K + 1, 5 * K + 100])
def test_the_whole_blob_arrives_and_nothing_is_sent_in_vain(
    courier: Memory | Mosquitto, path: Callable[[BlobRef], BlobFetch], size: int
) -> None:
    scene = Scene(courier)
    ref = scene.server.offer(CONTENT[:size])
    device = scene.join(ref, path)
    scene.run()
    assert device.fetch.content() == CONTENT[:size]
    assert device.refused == scene.refusals == []
    assert len(scene.sent) == device.taken == 1 + -(-size // K)
    scene.close()


def test_many_devices_end_with_the_same_content(
    courier: Memory | Mosquitto, path: Callable[[BlobRef], BlobFetch]
) -> None:
    scene = Scene(courier)
    ref = scene.server.offer(CONTENT)
    devices = [scene.join(ref, path, f"pi-{i}") for i in range(5)]
    scene.run()
    assert {device.fetch.content() for device in devices} == {CONTENT}
    scene.close()


def test_a_device_that_joins_half_way_gets_all(
    courier: Memory | Mosquitto, path: Callable[[BlobRef], BlobFetch]
) -> None:
    scene = Scene(courier, gather_s=0.0, bytes_per_s=K / 0.05)
    ref = scene.server.offer(SIX)
    first = scene.join(ref, path)
    scene.run(lambda: len(scene.sent) >= 4)
    second = scene.join(ref, path, "pi-b")
    scene.run()
    assert first.fetch.content() == second.fetch.content() == SIX
    assert first.taken == second.taken == 7
    scene.close()


def test_forged_pieces_are_refused_and_only_the_true_content_counts(
    courier: Memory | Mosquitto, path: Callable[[BlobRef], BlobFetch]
) -> None:
    scene = Scene(courier, gather_s=0.0, bytes_per_s=K / 0.05)
    ref = scene.server.offer(SIX)
    device = scene.join(ref, path)
    scene.run(lambda: device.taken >= 2)
    forger = courier.transport("forger")
    forger.open()
    for index in (None, 3, 4, 5):
        body = Chunk(digest=ref.digest, index=index, content=bytes(K)).encode()
        header = Header(kind=Kind.CHUNK, federation=FEDERATION, payload_digest=sha256())
        (raw,) = pack(header, body, None)
        forger.publish(topics.down(FEDERATION, device.name), raw)
    scene.run()
    scene.run(lambda: len(device.refused) >= 3)
    assert device.fetch.content() == SIX
    assert set(device.refused) == {Reject.BAD_DIGEST}
    forger.close()
    scene.close()


# ---- silence and faults, in memory -------------------------------------------------------------------------

FAULTS = {
    "lost": Faults(drop=0.3),
    "mostly lost": Faults(drop=0.8),
    "duplicated": Faults(duplicate=0.5),
    "reordered": Faults(reorder=0.9),
    "all at once": Faults(drop=0.3, duplicate=0.3, reorder=0.5),
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("seed", range(3))
def test_lost_duplicated_and_reordered_messages_do_no_harm(
    path: Callable[[BlobRef], BlobFetch], faults: Faults, seed: int
) -> None:
    scene = Scene(Memory(faults, seed))
    ref = scene.server.offer(CONTENT)
    devices = [scene.join(ref, path, f"pi-{i}") for i in range(3)]
    scene.run()
    assert {device.fetch.content() for device in devices} == {CONTENT}
    assert [device.taken for device in devices] == [41] * 3
    assert [device.refused for device in devices] == [[]] * 3


@pytest.mark.parametrize("at", [1, 4, 6])
def test_a_connection_that_breaks_in_the_middle_costs_no_piece_twice(
    path: Callable[[BlobRef], BlobFetch], at: int
) -> None:
    courier = Memory()
    scene = Scene(courier, gather_s=0.0, bytes_per_s=K / 0.05)
    ref = scene.server.offer(SIX)
    device = scene.join(ref, path)
    scene.run(lambda: device.taken >= at)
    courier.broker.cut("pi-a")
    for _ in range(20):
        scene.step()
    courier.broker.reconnect("pi-a")
    scene.run()
    assert device.fetch.content() == SIX
    assert device.taken == 7


def test_an_unknown_blob_is_refused_and_fetched_once_it_is_offered(
    path: Callable[[BlobRef], BlobFetch],
) -> None:
    scene = Scene(Memory())
    ref = BlobServer(FEDERATION, K).offer(SIX)
    device = scene.join(ref, path)
    scene.run(lambda: bool(scene.refusals))
    assert scene.refusals[0] is Reject.UNKNOWN_BLOB
    assert (scene.sent, device.fetch.content()) == ([], None)
    assert scene.server.offer(SIX) == ref
    scene.run()
    assert device.fetch.content() == SIX


def test_an_aggregator_that_starts_again_in_the_middle_goes_on(path: Callable[[BlobRef], BlobFetch]) -> None:
    scene = Scene(Memory(), gather_s=0.0, bytes_per_s=K / 0.05)
    ref = scene.server.offer(SIX)
    device = scene.join(ref, path)
    scene.run(lambda: device.taken >= 3)
    scene.server = BlobServer(FEDERATION, K)
    assert scene.server.offer(SIX) == ref
    scene.run()
    assert device.fetch.content() == SIX
    assert device.taken == 7


# ---- order ------------------------------------------------------------------------------------------


def _pieces(path: Callable[[BlobRef], BlobFetch], ref: BlobRef, server: BlobServer) -> list[Chunk]:
    """All pieces in the order in which this path sends them to a device that loses nothing."""
    fetch, pieces = path(ref), []
    now = 0.0
    while not fetch.complete():
        server.request(now, DeviceId("pi-a"), fetch.ask(now, lambda: 0.0))
        while (wake_at := server.wake_at()) is not None:
            now = max(now, wake_at)
            for _, payload in server.due(now):
                pieces.append(Chunk.decode(unpack(payload, FEDERATION, Kind.CHUNK).body))
                fetch.take(pieces[-1], now, lambda: 0.0)
    return pieces


@pytest.mark.parametrize("order", ["index first", "index last", "backwards"])
def test_pieces_may_come_in_any_order(path: Callable[[BlobRef], BlobFetch], order: str) -> None:
    server = BlobServer(FEDERATION, K)
    ref = server.offer(SIX)
    pieces = _pieces(path, ref, server)
    assert [piece.index for piece in pieces] == [None, 0, 1, 2, 3, 4, 5]
    if order == "index last":
        pieces = pieces[1:] + pieces[:1]
    elif order == "backwards":
        pieces.reverse()
    fetch = path(ref)
    assert all(fetch.take(piece, 0.0, lambda: 0.0) for piece in pieces)
    assert fetch.content() == SIX


def test_a_forgery_that_overtakes_the_index_is_found_out_by_it(path: Callable[[BlobRef], BlobFetch]) -> None:
    server = BlobServer(FEDERATION, K)
    ref = server.offer(SIX)
    index, *chunks = _pieces(path, ref, server)
    fetch = path(ref)
    fetch.take(Chunk(digest=ref.digest, index=2, content=bytes(K)), 0.0, lambda: 0.0)
    for chunk in (*chunks[:2], *chunks[3:], index):
        fetch.take(chunk, 0.0, lambda: 0.0)
    assert fetch.content() is None
    assert fetch.take(chunks[2], 0.0, lambda: 0.0)
    assert fetch.content() == SIX
