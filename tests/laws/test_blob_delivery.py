"""However pieces are lost, doubled or reordered: all fetchers end with the same content."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.blob_server import BlobServer
from edge_runtime.blob_fetch import BlobFetch
from edge_runtime.protocol import topics
from edge_runtime.protocol.crypto.prg import Stream
from edge_runtime.protocol.envelope import unpack
from edge_runtime.protocol.ids import DeviceId, FederationId
from edge_runtime.protocol.kinds import Kind
from edge_runtime.protocol.messages import Chunk

FEDERATION = FederationId("digits")
K = 8192
CONTENT = Stream(bytes(32)).bytes(40 * K)


@given(
    seed=st.integers(0, 2**32),
    devices=st.integers(1, 5),
    size=st.one_of(st.integers(1, 12 * K), st.sampled_from([1, K, K + 1, 4 * K])),
    loss=st.sampled_from([0.0, 0.1, 0.5, 0.8]),
    doubling=st.sampled_from([0.0, 0.3]),
    bytes_per_s=st.sampled_from([1e4, 1e6, 1e9]),
    wave=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_every_fetcher_ends_with_the_content(
    seed: int, devices: int, size: int, loss: float, doubling: float, bytes_per_s: float, wave: bool
) -> None:
    chance = random.Random(seed)
    server = BlobServer(FEDERATION, K, bytes_per_s=bytes_per_s)
    ref = server.offer(CONTENT[:size])
    names = [DeviceId(f"pi-{i}") for i in range(devices)]
    fetches = {name: BlobFetch(ref, next_ask_at=chance.uniform(0, 3), wave=wave) for name in names}
    wave_topics = {topics.blob_piece(FEDERATION, ref.digest, i) for i in (None, *range(_chunks(size)))}
    air: list[tuple[float, DeviceId, Chunk]] = []  # (arrives at, for whom, piece)
    now = 0.0
    for _ in range(50_000):
        open_fetches = {name: fetch for name, fetch in fetches.items() if fetch.content() is None}
        if not open_fetches:
            break
        times = [fetch.next_ask_at for fetch in open_fetches.values()] + [at for at, _, _ in air]
        wake = server.wake_at()
        now = max(now, min(times if wake is None else [*times, wake]))
        for topic, payload in server.due(now):
            chunk = Chunk.decode(unpack(payload, FEDERATION, Kind.CHUNK).body)
            hearers = names if topic in wave_topics else [topic.rsplit("/", 1)[1]]
            for name in hearers:
                for _ in range(1 + (chance.random() < doubling)):
                    if chance.random() >= loss:
                        air.append((now + chance.uniform(0, 0.5), DeviceId(name), chunk))
        for at, name, chunk in [item for item in air if item[0] <= now]:
            air.remove((at, name, chunk))
            fetches[name].take(chunk, now, chance.random)
        for name, fetch in open_fetches.items():
            if fetch.content() is None and now >= fetch.next_ask_at:
                ask = fetch.ask(now, chance.random)
                if chance.random() >= loss:
                    server.request(now, name, ask)
    assert {fetch.content() for fetch in fetches.values()} == {CONTENT[:size]}


@given(
    piece_s=st.floats(0.01, 30.0),
    jitter=st.floats(0.0, 1.0),
    chunks=st.integers(1, 40),
    devices=st.integers(1, 3),
    wave=st.booleans(),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=60)
def test_a_slow_link_carries_little_that_it_has_carried_before(
    piece_s: float, jitter: float, chunks: int, devices: int, wave: bool, seed: int
) -> None:
    """Each device has a link that takes ``piece_s`` for a chunk, and a queue without end before it."""
    chance = random.Random(seed)
    server = BlobServer(FEDERATION, K)
    ref = server.offer(CONTENT[: chunks * K])
    names = [DeviceId(f"pi-{i}") for i in range(devices)]
    fetches = {name: BlobFetch(ref, wave=wave) for name in names}
    links: dict[DeviceId, list[tuple[float, Chunk]]] = {name: [] for name in names}  # (arrives at, piece)
    free_at = dict.fromkeys(names, 0.0)
    carried = dict.fromkeys(names, 0)
    now = 0.0
    while not all(fetch.complete() for fetch in fetches.values()):
        times = [fetch.next_ask_at for fetch in fetches.values() if not fetch.complete()]
        times += [at for link in links.values() for at, _ in link[:1]]
        now = max(now, min([*times, server.wake_at() or min(times)]))
        for name, fetch in fetches.items():
            while links[name] and links[name][0][0] <= now:
                fetch.take(links[name].pop(0)[1], now, chance.random)
            if not fetch.complete() and now >= fetch.next_ask_at:
                server.request(now, name, fetch.ask(now, chance.random))
        for topic, payload in server.due(now):
            chunk = Chunk.decode(unpack(payload, FEDERATION, Kind.CHUNK).body)
            for name in names if "/b/" in topic else [DeviceId(topic.rsplit("/", 1)[1])]:
                takes_s = piece_s * len(chunk.content) / K * (1 + jitter * (2 * chance.random() - 1))
                free_at[name] = max(free_at[name], now) + takes_s
                links[name].append((free_at[name], chunk))
                carried[name] += chunk.index is not None
    assert all(fetch.content() == CONTENT[: chunks * K] for fetch in fetches.values())
    assert all(count <= 2 * chunks + 8 for count in carried.values()), carried


def _chunks(size: int) -> int:
    return -(-size // K)
