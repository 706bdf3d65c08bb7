from __future__ import annotations

import pytest

from aggregator.blob_server import MAX_GATHERS, MAX_PULL, BlobServer
from edge_runtime.blob_fetch import PULL_AT_ONCE, RETRY_CAP_S, RETRY_S, BlobFetch
from edge_runtime.protocol import topics
from edge_runtime.protocol.chunks import split
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


def _half() -> float:
    return 0.5


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
        assert all(fetch.take(chunk, 0.0, _half) for _, _, chunk in sent)
        assert fetch.content() == CONTENT


def test_a_wave_waits_while_others_still_ask_but_not_for_ever() -> None:
    server = _server(gather_s=0.03)
    ref = server.offer(CONTENT)
    at = 0.0
    while at < 0.59:
        server.request(at, DeviceId(f"pi-{at:.2f}"), Fetch(digest=ref.digest, wave=True))
        assert server.due(at) == []
        at += 0.02
    assert server.wake_at() == pytest.approx(MAX_GATHERS * 0.03)
    assert [chunk.index for _, _, chunk in _run(server, at)] == PIECES


def test_a_wave_of_many_seconds_waits_longer_for_those_who_still_ask() -> None:
    server = _server(gather_s=0.03, bytes_per_s=20_000)  # two seconds for each device
    ref = server.offer(CONTENT)
    for i in range(100):
        server.request(i * 0.02, DeviceId(f"pi-{i}"), Fetch(digest=ref.digest, wave=True))
    assert server.wake_at() == pytest.approx(99 * 0.02 + 0.03)


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


def test_who_asks_shortly_after_a_wave_gets_it_alone_but_not_everybody_at_once() -> None:
    server = _server(gather_s=0.0, bytes_per_s=2 * len(CONTENT))
    ref = server.offer(CONTENT)
    server.request(0.0, A, Fetch(digest=ref.digest, wave=True))
    over = _run(server, 0.0)[-1][0]
    for i in range(10):
        server.request(over, DeviceId(f"late-{i}"), Fetch(digest=ref.digest, wave=True))
    sent = _run(server, over)
    assert [chunk.index for _, _, chunk in sent] == PIECES * 3  # a second of the pace, and what was begun
    assert {topic for _, topic, _ in sent} == {
        topics.down(FEDERATION, DeviceId(f"late-{i}")) for i in range(3)
    }
    server.request(over, DeviceId("late-9"), Fetch(digest=ref.digest, wave=False, want_index=True))
    assert [chunk.index for _, _, chunk in _run(server, over + 2)] == [None]  # the others pull


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


def test_a_wave_is_paced_by_what_the_broker_sends_on() -> None:
    seconds = []
    for devices in (1, 10):
        server = _server(gather_s=0.0, bytes_per_s=20_000)
        ref = server.offer(CONTENT)
        for i in range(devices):
            for _ in range(2):  # who asks twice listens once
                server.request(0.0, DeviceId(f"pi-{i}"), Fetch(digest=ref.digest, wave=True))
        seconds.append(_run(server, 0.0)[-1][0])
        server.request(1e6, A, Fetch(digest=ref.digest, wave=True))  # nobody else listens to the next one
        seconds.append(_run(server, 1e6)[-1][0] - 1e6)
    assert seconds == pytest.approx([2.0, 2.0, 20.5, 2.0], rel=0.1)


def test_the_first_wave_is_paced_for_all_who_are_expected_though_few_requests_were_heard() -> None:
    server = _server(gather_s=0.0, bytes_per_s=20_000)
    ref = server.offer(CONTENT, expected=10)
    server.request(0.0, A, Fetch(digest=ref.digest, wave=True))
    assert _run(server, 0.0)[-1][0] == pytest.approx(20.5, rel=0.1)
    server.request(1e6, A, Fetch(digest=ref.digest, wave=True))
    assert _run(server, 1e6)[-1][0] - 1e6 == pytest.approx(2.0, rel=0.1)


def test_a_large_wave_waits_a_little_for_those_who_are_expected() -> None:
    server = _server(gather_s=0.03, bytes_per_s=20_000)
    ref = server.offer(CONTENT, expected=10)  # 2 s for each
    server.request(0.0, A, Fetch(digest=ref.digest, wave=True))
    assert server.wake_at() == pytest.approx(0.05 * 10 * len(CONTENT) / 20_000)
    for i in range(9):
        server.request(0.1, DeviceId(f"pi-{i}"), Fetch(digest=ref.digest, wave=True))
    assert server.wake_at() == 0.1


def test_a_wave_starts_at_once_when_all_who_are_expected_have_asked() -> None:
    server = _server(gather_s=0.03)
    ref = server.offer(CONTENT, expected=2)
    server.request(0.0, A, Fetch(digest=ref.digest, wave=True))
    assert server.wake_at() == 0.03
    server.request(0.01, B, Fetch(digest=ref.digest, wave=True))
    assert server.wake_at() == 0.01


def test_after_a_long_rest_the_sender_does_not_make_up_for_it() -> None:
    server = _server(gather_s=0.0, bytes_per_s=K)
    ref = server.offer(CONTENT)
    server.request(0.0, A, Fetch(digest=ref.digest, wave=True))
    _run(server, 0.0)
    server.request(1e6, A, Fetch(digest=ref.digest, wave=True))
    assert len(server.due(1e6)) <= 3


def test_a_clock_that_is_set_back_holds_nothing_up() -> None:
    server = _server(gather_s=0.03, bytes_per_s=K)
    ref = server.offer(CONTENT)
    server.request(7200.0, A, Fetch(digest=ref.digest, wave=True))
    sent = len(server.due(7200.5))
    assert 0 < sent < len(PIECES)
    assert server.due(3600.0) == []
    wake_at = server.wake_at()
    assert wake_at is not None
    assert 3600.0 < wake_at < 3610.0
    assert sent + len(_run(server, 3600.0)) == len(PIECES)


# ---- the fetch --------------------------------------------------------------------------------------


def test_a_fetch_asks_for_the_wave_then_the_index_then_exactly_what_is_missing() -> None:
    server = _server(gather_s=0.0)
    ref = server.offer(CONTENT)
    server.request(0.0, A, Fetch(digest=ref.digest, wave=True))
    wave = {chunk.index: chunk for _, _, chunk in _run(server, 0.0)}
    fetch = BlobFetch(ref)
    assert fetch.ask(0.0, _half) == Fetch(digest=ref.digest, wave=True)
    for index in (0, 3):
        fetch.take(wave[index], 0.0, _half)
    assert fetch.ask(0.0, _half) == Fetch(digest=ref.digest, wave=False, want_index=True)
    assert fetch.take(wave[None], 0.0, _half)
    assert not fetch.take(wave[None], 0.0, _half)
    assert fetch.ask(0.0, _half) == Fetch(digest=ref.digest, wave=False, chunks=(1, 2, 4, 5))
    for index in (5, 4, 2):
        assert fetch.take(wave[index], 0.0, _half)
    assert fetch.ask(0.0, _half).chunks == (1,)
    assert fetch.content() is None
    fetch.take(wave[1], 0.0, _half)
    assert fetch.content() == CONTENT


def test_a_fetch_never_asks_for_more_than_the_server_takes() -> None:
    assert PULL_AT_ONCE <= MAX_PULL
    content = bytes(100 * K)
    server = _server()
    ref = server.offer(content)
    fetch = BlobFetch(ref)
    for _ in range(5):
        ask = fetch.ask(0.0, _half)
        server.request(0.0, A, ask)
        for _, _, chunk in _run(server, 0.0):
            if not ask.wave or chunk.index is None:
                fetch.take(chunk, 0.0, _half)
    assert fetch.content() == content


def test_it_asks_later_each_time_until_something_is_heard() -> None:
    server = _server(gather_s=0.0)
    ref = server.offer(CONTENT)
    fetch = BlobFetch(ref, wave=False)
    now, pauses = 0.0, []
    for _ in range(8):
        fetch.ask(now, lambda: 0.0)
        pauses.append(fetch.next_ask_at - now)
        now = fetch.next_ask_at
    assert pauses == [2.0, 4.0, 8.0, 16.0, 32.0, RETRY_CAP_S, RETRY_CAP_S, RETRY_CAP_S]
    index = Chunk(digest=ref.digest, index=None, content=split(CONTENT, K)[0].to_bytes())
    assert fetch.take(index, now, lambda: 0.0)
    assert fetch.next_ask_at == now  # an answer: the next request follows at once
    fetch.ask(now, lambda: 0.5)
    assert fetch.next_ask_at == now + 1.5 * RETRY_S


def test_after_silence_it_asks_for_the_last_chunk_and_then_for_what_that_has_overtaken() -> None:
    server = _server(gather_s=0.0)
    ref = server.offer(CONTENT)
    server.request(0.0, A, Fetch(digest=ref.digest, wave=True))
    index, *chunks = [chunk for _, _, chunk in _run(server, 0.0)]
    fetch = BlobFetch(ref)
    assert fetch.ask(0.0, _half).wave
    fetch.take(index, 0.1, _half)
    assert fetch.next_ask_at > 0.1  # the wave brings them, perhaps slowly
    assert fetch.ask(5.0, _half).chunks == (5,)
    assert fetch.ask(10.0, _half).chunks == (5,)
    fetch.take(chunks[0], 12.0, _half)
    assert fetch.next_ask_at > 12.0 + 3 * 10  # it has learned how slow this link is
    fetch.take(chunks[5], 13.0, _half)
    assert fetch.next_ask_at == 13.0
    assert fetch.ask(13.0, _half).chunks == (1, 2, 3, 4)
    fetch.take(chunks[1], 14.0, _half)
    assert fetch.ask(60.0, _half).chunks == (4,)


def test_a_forged_piece_is_refused_and_does_no_harm() -> None:
    server = _server(gather_s=0.0)
    ref = server.offer(CONTENT)
    server.request(0.0, A, Fetch(digest=ref.digest, wave=True))
    wave = [chunk for _, _, chunk in _run(server, 0.0)]
    fetch = BlobFetch(ref)
    for chunk in wave:
        forged = Chunk(digest=chunk.digest, index=chunk.index, content=chunk.content[:-1] + b"?")
        with pytest.raises(RemoteProtocolError, match="bad_digest"):
            fetch.take(forged, 0.0, _half)
        fetch.take(chunk, 0.0, _half)
    assert fetch.content() == CONTENT


def test_a_piece_of_another_blob_is_not_taken() -> None:
    fetch = BlobFetch(BlobRef(digest=sha256(b"this"), size=10))
    assert not fetch.take(Chunk(digest=sha256(b"that"), index=0, content=b"x"), 0.0, _half)
