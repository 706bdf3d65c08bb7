from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.protocol.chunks import (
    MAX_CHUNK_BYTES,
    MIN_CHUNK_BYTES,
    Assembler,
    BlobIndex,
    PieceAssembler,
    index_bytes,
    split,
)
from edge_runtime.protocol.crypto.prg import Stream
from edge_runtime.protocol.errors import LocalProtocolError, RemoteProtocolError
from edge_runtime.protocol.ids import sha256
from edge_runtime.protocol.rejects import Reject

K = MIN_CHUNK_BYTES
BOUND = 1 << 20
CONTENT = Stream(bytes(32)).bytes(5 * K + 77)
sizes = st.one_of(
    st.integers(0, 6 * K), st.sampled_from([0, 1, K - 1, K, K + 1, 3 * K - 1, 3 * K, 3 * K + 1])
)


def _pieces(payload: bytes) -> list[bytes]:
    """As an envelope splits it: an empty payload is one empty piece."""
    return [payload[at : at + K] for at in range(0, len(payload), K)] or [b""]


def _refused(reject: Reject, call, *args) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RemoteProtocolError) as refusal:
        call(*args)
    assert refusal.value.reject is reject


@pytest.mark.parametrize("row", json.loads(Path("tests/vectors/chunks.json").read_text())["vectors"])
def test_the_index_meets_its_vector_field_by_field(row: dict) -> None:  # type: ignore[type-arg]
    content = bytes(i % 251 for i in range(row["size"]))
    index, _ = split(content, row["chunk_bytes"])
    assert [h.hex() for h in index.hashes] == row["hashes"]
    assert index.to_bytes().hex() == row["index"]
    assert index.digest.hex() == row["digest"]
    assert BlobIndex.parse(bytes.fromhex(row["index"]), BOUND) == index


@given(size=sizes, chunk_bytes=st.integers(K, 3 * K))
@settings(deadline=None)
def test_an_index_survives_its_bytes_and_covers_the_content(size: int, chunk_bytes: int) -> None:
    content = bytes(size)
    index, chunks = split(content, chunk_bytes)
    raw = index.to_bytes()
    assert BlobIndex.parse(raw, size) == index
    assert len(raw) == index_bytes(size, chunk_bytes)
    assert b"".join(chunks) == content
    assert all(len(chunk) == index.span(i).stop - index.span(i).start for i, chunk in enumerate(chunks))


@given(data=st.data(), size=sizes)
@settings(max_examples=60, deadline=None)
def test_a_blob_comes_together_under_loss_duplication_and_reordering(data: st.DataObject, size: int) -> None:
    content = CONTENT[:size]
    index, chunks = split(content, K)
    assembler = Assembler(index.digest, BOUND, waiting_bytes=data.draw(st.sampled_from([0, K, 1 << 20])))
    letters = st.one_of(st.just(-1), st.integers(0, max(0, len(chunks) - 1)))
    for i in data.draw(st.lists(letters, max_size=20)):  # what arrives, in which order; -1 is the index
        if i < 0:
            assembler.add_index(index.to_bytes())
        elif chunks:
            assembler.add_chunk(i, chunks[i])
    assembler.add_index(index.to_bytes())
    for i in reversed(assembler.missing()):
        assert assembler.add_chunk(i, bytes(chunks[i])) is True
        assert assembler.add_chunk(i, chunks[i]) is False
    assert assembler.complete()
    assert assembler.content() == content


@given(garbage=st.one_of(st.binary(max_size=200), st.binary(max_size=100).map(lambda b: b"FLB1" + b)))
def test_garbage_is_an_index_or_the_peers_fault(garbage: bytes) -> None:
    try:
        index = BlobIndex.parse(garbage, BOUND)
    except RemoteProtocolError:
        return
    assert index.to_bytes() == garbage


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_garbage_never_completes_a_blob_or_breaks_it(data: st.DataObject) -> None:
    index, chunks = split(CONTENT, K)
    assembler = Assembler(index.digest, BOUND)
    raw = st.one_of(st.binary(max_size=50), st.sampled_from([bytes(c) for c in chunks]))
    for i, chunk in data.draw(st.lists(st.tuples(st.integers(-2, 9), raw), max_size=8)):
        with contextlib.suppress(RemoteProtocolError):
            assembler.add_chunk(i, chunk)
        with contextlib.suppress(RemoteProtocolError):
            assembler.add_index(chunk)
    assembler.add_index(index.to_bytes())
    for i in assembler.missing():
        assembler.add_chunk(i, chunks[i])
    assert assembler.content() == CONTENT


def test_an_empty_blob_is_complete_with_its_index() -> None:
    index, chunks = split(b"")
    assert (index.count, chunks) == (0, ())
    assembler = Assembler(index.digest, BOUND)
    assert not assembler.complete()
    assembler.add_index(index.to_bytes())
    assert assembler.complete()
    assert assembler.content() == b""


@pytest.mark.parametrize(
    ("raw", "reject"),
    [
        (b"", Reject.MALFORMED),
        (b"FLB2" + split(b"x", K)[0].to_bytes()[4:], Reject.MALFORMED),
        (split(b"x", K)[0].to_bytes() + b"\0", Reject.MALFORMED),
        (split(b"x", K)[0].to_bytes()[:-1], Reject.MALFORMED),
        (BlobIndex(1, K - 1, split(b"x", K)[0].hashes).to_bytes(), Reject.MALFORMED),
        (BlobIndex(1, MAX_CHUNK_BYTES + 1, split(b"x", K)[0].hashes).to_bytes(), Reject.MALFORMED),
        (BlobIndex(2**64 - 1, K, ()).to_bytes(), Reject.TOO_LARGE),
        (split(bytes(BOUND + 1), K)[0].to_bytes(), Reject.TOO_LARGE),
    ],
)
def test_an_index_that_is_not_canonical_or_too_large_is_refused(raw: bytes, reject: Reject) -> None:
    _refused(reject, BlobIndex.parse, raw, BOUND)


def test_a_wrong_chunk_or_index_is_refused_by_digest() -> None:
    index, chunks = split(CONTENT, K)
    assembler = Assembler(index.digest, BOUND)
    _refused(Reject.BAD_DIGEST, assembler.add_index, split(CONTENT[1:], K)[0].to_bytes())
    assembler.add_index(index.to_bytes())
    _refused(Reject.BAD_DIGEST, assembler.add_chunk, 0, chunks[1])
    _refused(Reject.BAD_DIGEST, assembler.add_chunk, 5, chunks[0])
    _refused(Reject.MALFORMED, assembler.add_chunk, 6, chunks[0])
    _refused(Reject.TOO_LARGE, assembler.add_chunk, 0, bytes(MAX_CHUNK_BYTES + 1))
    assert assembler.missing() == (0, 1, 2, 3, 4, 5)
    with pytest.raises(LocalProtocolError):
        assembler.content()


def test_a_forged_early_chunk_does_not_block_the_true_one() -> None:
    index, chunks = split(CONTENT, K)
    assembler = Assembler(index.digest, BOUND)
    assembler.add_chunk(0, bytes(K))
    assembler.add_chunk(0, chunks[0])
    assembler.add_chunk(1, bytes(K))
    assembler.add_index(index.to_bytes())
    assert assembler.missing() == (1, 2, 3, 4, 5)


def test_chunks_before_the_index_are_kept_up_to_the_bound() -> None:
    index, chunks = split(CONTENT, K)
    assembler = Assembler(index.digest, BOUND, waiting_bytes=2 * K)
    assert [assembler.add_chunk(i, chunks[i]) for i in (3, 1, 4)] == [True, True, False]
    assert assembler.missing() == ()
    assembler.add_index(index.to_bytes())
    assert assembler.missing() == (0, 2, 4, 5)


def test_chunk_sizes_outside_8_kib_to_16_mib_are_our_bug() -> None:
    for chunk_bytes in (0, K - 1, MAX_CHUNK_BYTES + 1):
        with pytest.raises(LocalProtocolError):
            split(b"", chunk_bytes)


@given(data=st.data(), size=sizes)
@settings(max_examples=60, deadline=None)
def test_a_payload_comes_together_under_duplication_and_reordering(data: st.DataObject, size: int) -> None:
    payload = CONTENT[:size]
    pieces = _pieces(payload)
    digest = sha256(payload)
    assembler = PieceAssembler(len(pieces), digest, BOUND)
    order = data.draw(st.permutations(range(len(pieces))))
    for i in order:
        assert i in assembler.missing()
        assert assembler.add(i, len(pieces), digest, pieces[i]) is True
        assert assembler.add(i, len(pieces), digest, pieces[i]) is False
    assert assembler.complete()
    assert assembler.content() == payload


def test_conflicting_malformed_and_oversize_pieces_are_refused() -> None:
    payload = CONTENT[: 2 * K + 1]
    first, second, third = _pieces(payload)
    digest = sha256(payload)
    assembler = PieceAssembler(3, digest, len(payload))
    assembler.add(0, 3, digest, first)
    _refused(Reject.CONFLICTING, assembler.add, 0, 3, digest, second)
    _refused(Reject.CONFLICTING, assembler.add, 1, 4, digest, second)
    _refused(Reject.CONFLICTING, assembler.add, 1, 3, sha256(b""), second)
    _refused(Reject.MALFORMED, assembler.add, 3, 3, digest, second)
    _refused(Reject.MALFORMED, assembler.add, -1, 3, digest, second)
    _refused(Reject.MALFORMED, assembler.add, 1, 3, digest, b"")
    _refused(Reject.TOO_LARGE, assembler.add, 1, 3, digest, bytes(K + 2))
    with pytest.raises(LocalProtocolError):
        assembler.content()
    assembler.add(1, 3, digest, second)
    _refused(Reject.BAD_DIGEST, assembler.add, 2, 3, digest, b"x")
    assert assembler.missing() == (0, 1, 2)  # nobody knows which piece was wrong
    for i, piece in enumerate((first, second, third)):
        assembler.add(i, 3, digest, piece)
    assert assembler.content() == payload


def test_the_count_of_pieces_is_bounded_by_the_size() -> None:
    _refused(Reject.MALFORMED, PieceAssembler, 0, sha256(b""), BOUND)
    _refused(Reject.TOO_LARGE, PieceAssembler, BOUND // K + 1, sha256(b""), BOUND)
    PieceAssembler(BOUND // K, sha256(b""), BOUND)


def test_an_index_over_chunks_of_other_lengths_never_completes() -> None:
    dishonest = BlobIndex(2 * K, K, (sha256(b"short"), sha256(CONTENT[:K])))
    assembler = Assembler(dishonest.digest, BOUND)
    assembler.add_chunk(0, b"short")
    assembler.add_index(dishonest.to_bytes())
    _refused(Reject.BAD_DIGEST, assembler.add_chunk, 0, b"short")
    assert assembler.add_chunk(1, CONTENT[:K])
    assert assembler.missing() == (0,)
