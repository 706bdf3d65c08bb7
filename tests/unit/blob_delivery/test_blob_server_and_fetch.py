from __future__ import annotations

import pytest

from aggregator.blob_server import MAX_PULL, BlobServer
from edge_runtime.blob_fetch import PULL_AT_ONCE, BlobFetch
from edge_runtime.protocol import topics
from edge_runtime.protocol.envelope import unpack
from edge_runtime.protocol.errors import RemoteProtocolError
from edge_runtime.protocol.ids import DeviceId, FederationId, sha256
from edge_runtime.protocol.kinds import Kind
from edge_runtime.protocol.manifest import BlobRef
from edge_runtime.protocol.messages import Chunk, Fetch
from edge_runtime.protocol.rejects import Reject

FEDERATION = FederationId("digits")
A, B, C = DeviceId("pi-a"), DeviceId("pi-b"), DeviceId("pi-c")
K = 8192
CONTENT = bytes(i % 253 for i in range(5 * K + 100))  # 6 chunks
PIECES = [None, 0, 1, 2, 3, 4, 5]


def _server(**settings: float) -> BlobServer:
    return BlobServer(FEDERATION, K, **settings)  # type: ignore[arg-type]


def _read(message: tuple[str, bytes]) -> Chunk:
    return Chunk.decode(unpack(message[1], FEDERATION, Kind.CHUNK).body)


def _run(server: BlobServer, now: float) -> list[tuple[float, str, Chunk]]:
    """All that the server sends until it rests: (time, topic, piece)."""
    out = []
    while (wake := server.wake_at()) is not None:
        now = max(now, wake)
        out += [(now, message[0], _read(message)) for message in server.due(now)]
    return out


# ---- the wave ---------------------------------------------------------------------------------------


def test_one_wave_serves_all_who_asked_and_publishes_each_piece_once() -> None:
    server = _server(gather_s=0.03)
    ref = server.offer(CONTENT)
    for at, device in ((0.0, A), (0.01, B), (0.02, C)):
        server.request(at, device, Fetch(digest=ref.digest, wave=True))
    assert server.due(0.029) == []
    sent = _run(server, 0.03)
    assert [chunk.index for _, _, chunk in sent] == PIECES
    assert [topic for _, topic, _ in sent] == [
        topics.blob_piece(FEDERATION, ref.digest, index) for index in PIECES
    ]
    for _ in (A, B, C):
        fetch = BlobFetch(ref)
        assert all(fetch.take(chunk) for _, _, chunk in sent)
        assert fetch.content() == CONTENT


def test_who_joins_a_running_wave_gets_alone_what_it_missed() -> None:
    server = _server(gather_s=0.0, bytes_per_s=K)
    ref = server.offer(CONTENT)
    server.request(0.0, A, Fetch(digest=ref.digest, wave=True))
    early = [_read(message) for message in server.due(0.0)]
    assert 0 < len(early) < len(PIECES)
    server.request(0.0, B, Fetch(digest=ref.digest, wave=True))
    late = _run(server, 0.0)
    shared = [chunk for _, topic, chunk in late if topic != topics.down(FEDERATION, B)]
    alone = [chunk for _, topic, chunk in late if topic == topics.down(FEDERATION, B)]
    assert [chunk.index for chunk in early + shared] == PIECES
    assert [chunk.index for chunk in alone] == [chunk.index for chunk in early]


def test_a_wave_that_is_over_can_be_asked_for_again() -> None:
    server = _server(gather_s=0.0)
    ref = server.offer(CONTENT)
    for at in (0.0, 10.0):
        server.request(at, A, Fetch(digest=ref.digest, wave=True))
        assert [chunk.index for _, _, chunk in _run(server, at)] == PIECES


# ---- pull -------------------------------------------------------------------------------------------


def test_a_pull_gets_exactly_the_pieces_it_names() -> None:
    server = _server()
    ref = server.offer(CONTENT)
    server.request(0.0, A, Fetch(digest=ref.digest, wave=False, want_index=True, chunks=(4, 1, 1)))
    sent = _run(server, 0.0)
    assert [chunk.index for _, _, chunk in sent] == [None, 4, 1]
    assert {topic for _, topic, _ in sent} == {topics.down(FEDERATION, A)}


def test_what_the_running_wave_will_publish_is_not_sent_twice() -> None:
    server = _server(gather_s=0.0, bytes_per_s=K)
    ref = server.offer(CONTENT)
    server.request(0.0, A, Fetch(digest=ref.digest, wave=True))
    server.due(0.0)
    server.request(0.0, B, Fetch(digest=ref.digest, wave=False, chunks=(4, 5)))
    assert {topic for _, topic, _ in _run(server, 0.0) if "/d/" in topic} == set()


def test_a_pull_asked_twice_in_a_row_is_answered_once() -> None:
    server = _server()
    ref = server.offer(CONTENT)
    for _ in range(2):
        server.request(0.0, A, Fetch(digest=ref.digest, wave=False, chunks=(2,)))
    assert len(_run(server, 0.0)) == 1


def test_an_unknown_blob_is_refused() -> None:
    server = _server()
    with pytest.raises(RemoteProtocolError) as refusal:
        server.request(0.0, A, Fetch(digest=sha256(b"?"), wave=True))
    assert refusal.value.reject is Reject.UNKNOWN_BLOB


@pytest.mark.parametrize("chunks", [(6,), (0, 4_000_000_000), (0,) * (MAX_PULL + 1)])
def test_too_many_chunks_or_one_beyond_the_end_are_refused(chunks: tuple[int, ...]) -> None:
    server = _server()
    ref = server.offer(CONTENT)
    with pytest.raises(RemoteProtocolError) as refusal:
        server.request(0.0, A, Fetch(digest=ref.digest, wave=False, chunks=chunks))
    assert refusal.value.reject is Reject.MALFORMED
    assert server.wake_at() is None


# ---- offers and pace --------------------------------------------------------------------------------


def test_the_same_content_is_the_same_blob() -> None:
    server = _server()
    assert server.offer(CONTENT) == server.offer(bytes(CONTENT))
    assert server.offer(CONTENT).size == len(CONTENT)


def test_what_is_withdrawn_is_no_longer_sent() -> None:
    server = _server(gather_s=0.0, bytes_per_s=K)
    old, new = server.offer(CONTENT), server.offer(b"new")
    server.request(0.0, A, Fetch(digest=old.digest, wave=True))
    server.due(0.0)
    server.withdraw_all_but({new.digest})
    assert _run(server, 0.0) == []
    with pytest.raises(RemoteProtocolError):
        server.request(0.0, A, Fetch(digest=old.digest, wave=True))


def test_pieces_leave_at_the_pace_of_bytes_per_s() -> None:
    rate = 20_000
    server = _server(gather_s=0.0, bytes_per_s=rate)
    ref = server.offer(CONTENT)
    server.request(100.0, A, Fetch(digest=ref.digest, wave=True))
    sent = _run(server, 100.0)
    for position, (at, _, _) in enumerate(sent):
        before = sum(len(chunk.content) for _, _, chunk in sent[:position])
        assert at - 100.0 >= before / rate - 0.1  # an idle sender has saved up a tenth of a second
    seconds = sent[-1][0] - 100.0
    assert seconds == pytest.approx(5 * K / rate, rel=0.1)


def test_after_a_long_rest_the_sender_does_not_make_up_for_it() -> None:
    server = _server(gather_s=0.0, bytes_per_s=K)
    ref = server.offer(CONTENT)
    server.request(0.0, A, Fetch(digest=ref.digest, wave=True))
    _run(server, 0.0)
    server.request(1e6, A, Fetch(digest=ref.digest, wave=True))
    assert len(server.due(1e6)) <= 3


# ---- the fetch --------------------------------------------------------------------------------------


def test_a_fetch_asks_for_the_wave_then_the_index_then_exactly_what_is_missing() -> None:
    server = _server(gather_s=0.0)
    ref = server.offer(CONTENT)
    server.request(0.0, A, Fetch(digest=ref.digest, wave=True))
    wave = {chunk.index: chunk for _, _, chunk in _run(server, 0.0)}
    fetch = BlobFetch(ref)
    assert fetch.ask() == Fetch(digest=ref.digest, wave=True)
    for index in (0, 3):
        fetch.take(wave[index])
    assert fetch.ask() == Fetch(digest=ref.digest, wave=False, want_index=True)
    assert fetch.take(wave[None])
    assert not fetch.take(wave[None])
    assert fetch.ask() == Fetch(digest=ref.digest, wave=False, chunks=(1, 2, 4, 5))
    for index in (5, 4, 2):
        assert fetch.take(wave[index])
    assert fetch.ask().chunks == (1,)
    assert fetch.content() is None
    fetch.take(wave[1])
    assert fetch.content() == CONTENT


def test_a_fetch_never_asks_for_more_than_the_server_takes() -> None:
    assert PULL_AT_ONCE <= MAX_PULL
    content = bytes(100 * K)
    server = _server()
    ref = server.offer(content)
    fetch = BlobFetch(ref)
    for _ in range(5):
        ask = fetch.ask()
        server.request(0.0, A, ask)
        for _, _, chunk in _run(server, 0.0):
            if not ask.wave or chunk.index is None:
                fetch.take(chunk)
    assert fetch.content() == content


def test_a_forged_piece_is_refused_and_does_no_harm() -> None:
    server = _server(gather_s=0.0)
    ref = server.offer(CONTENT)
    server.request(0.0, A, Fetch(digest=ref.digest, wave=True))
    wave = [chunk for _, _, chunk in _run(server, 0.0)]
    fetch = BlobFetch(ref)
    for chunk in wave:
        forged = Chunk(digest=chunk.digest, index=chunk.index, content=chunk.content[:-1] + b"?")
        with pytest.raises(RemoteProtocolError, match="bad_digest"):
            fetch.take(forged)
        fetch.take(chunk)
    assert fetch.content() == CONTENT


def test_a_piece_of_another_blob_is_not_taken() -> None:
    fetch = BlobFetch(BlobRef(digest=sha256(b"this"), size=10))
    assert not fetch.take(Chunk(digest=sha256(b"that"), index=0, content=b"x"))
