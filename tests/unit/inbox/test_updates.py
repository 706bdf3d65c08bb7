from __future__ import annotations

from pathlib import Path

import pytest

from aggregator.inbox.inbox import Inbox
from aggregator.inbox.updates import REFILLS, UpdateInbox
from edge_runtime.protocol.crypto.provider import CRYPTO
from edge_runtime.protocol.envelope import Header
from edge_runtime.protocol.errors import RemoteProtocolError
from edge_runtime.protocol.ids import DeviceId, FederationId, RoundId, sha256
from edge_runtime.protocol.kinds import Kind
from edge_runtime.protocol.rejects import Reject

ONE = RoundId(1, 1)
A, B = DeviceId("a"), DeviceId("b")
MAX = 100_000
PIECE = 40_000


def inbox_for_updates(folder: Path) -> UpdateInbox:
    return UpdateInbox(
        federation=FederationId("fed"), provider=CRYPTO, inbox=Inbox(folder, durable={}), max_bytes=MAX
    )


def header(payload: bytes, index: int, count: int) -> Header:
    return Header(
        kind=Kind.UPDATE,
        federation=FederationId("fed"),
        round_id=ONE,
        payload_digest=sha256(payload),
        chunk_index=index,
        chunk_count=count,
    )


def refused(updates: UpdateInbox, head: Header, body: bytes, device: DeviceId = A) -> Reject:
    with pytest.raises(RemoteProtocolError) as error:
        updates.add(device, head, body)
    return error.value.reject


def test_pieces_in_any_order_and_twice_make_the_update(tmp_path: Path) -> None:
    updates = inbox_for_updates(tmp_path)
    whole = bytes(PIECE) + b"end"
    assert updates.add(A, header(whole, 1, 2), b"end")[1] is None
    assert updates.add(A, header(whole, 1, 2), b"end") == (None, None)
    row, sealed = updates.add(A, header(whole, 0, 2), bytes(PIECE))
    assert row is not None
    assert sealed == whole


def test_a_device_begins_one_update_at_a_time_and_another_is_free_to_begin_its_own(tmp_path: Path) -> None:
    updates = inbox_for_updates(tmp_path)
    updates.add(A, header(b"first", 0, 2), b"x")
    assert refused(updates, header(b"second", 0, 2), b"x") is Reject.CONFLICTING
    updates.add(B, header(b"second", 0, 2), b"x")


def test_a_device_cannot_fill_the_disk_with_updates_that_turn_out_wrong(tmp_path: Path) -> None:
    updates = inbox_for_updates(tmp_path)
    rejects = []
    for attempt in range(50):
        wrong = header(b"wrong %d" % attempt, 0, 2)
        try:
            updates.add(A, wrong, bytes(PIECE))
            updates.add(A, header(b"wrong %d" % attempt, 1, 2), bytes(PIECE))
        except RemoteProtocolError as error:
            rejects.append(error.reject)
            updates.forget(ONE, A, wrong.payload_digest)
    assert rejects[0] is Reject.BAD_DIGEST
    assert rejects[-1] is Reject.TOO_LARGE
    written = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert written <= REFILLS * MAX + 1000


def test_what_was_spent_is_known_again_after_a_restart(tmp_path: Path) -> None:
    updates = inbox_for_updates(tmp_path)
    rows = []
    for attempt in range(REFILLS):
        for index in range(2):
            payload = b"wrong %d" % attempt
            try:
                rows.append(updates.add(A, header(payload, index, 2), bytes(MAX // 2))[0])
            except RemoteProtocolError:
                updates.forget(ONE, A, sha256(payload))
    again = inbox_for_updates(tmp_path / "again")
    again.restore(row for row in rows if row is not None)
    assert refused(again, header(b"more", 0, 1), bytes(MAX)) in (Reject.TOO_LARGE, Reject.CONFLICTING)
