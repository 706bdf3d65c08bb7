from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from aggregator.files import FileLayer
from aggregator.inbox.inbox import Inbox
from aggregator.inbox.segments import (
    MAX_PAYLOAD_BYTES,
    DamagedInboxError,
    InboxError,
    Position,
    SegmentLog,
)
from edge_runtime.protocol.errors import LocalProtocolError
from edge_runtime.protocol.ids import RoundId

ONE, TWO = RoundId(1, 1), RoundId(1, 2)


class CountingFiles(FileLayer):
    def __init__(self) -> None:
        self.syncs = 0

    def sync(self, descriptor: int) -> None:
        self.syncs += 1
        super().sync(descriptor)


class FullDisk(FileLayer):
    full = False

    def append(self, descriptor: int, parts: Sequence[bytes]) -> None:
        if self.full:
            super().append(descriptor, [b"".join(parts)[:9]])
            raise OSError(28, "No space left on device")
        super().append(descriptor, parts)


# ---- one log ----------------------------------------------------------------------------------------


def test_many_records_are_made_durable_by_one_sync(tmp_path: Path) -> None:
    files = CountingFiles()
    log = SegmentLog(tmp_path / "log", durable=None, files=files)
    for i in range(16):
        log.append(bytes([i]) * 1000)
    log.sync()
    log.sync()
    assert files.syncs == 1


def test_a_record_has_the_format_that_other_readers_expect(tmp_path: Path) -> None:
    log = SegmentLog(tmp_path / "log", durable=None)
    assert log.append(b"update") == Position(0, 8, 6)
    assert log.append(b"") == Position(0, 22, 0)
    raw = (tmp_path / "log" / "00000000.seg").read_bytes()
    assert raw == (
        b"FGSEGM01"  # magic
        + bytes.fromhex("00000006")  # payload bytes
        + bytes.fromhex("a9bdc997")  # CRC-32 of the length and the payload
        + b"update"
        + bytes.fromhex("00000000 2144df1c")  # an empty payload; its CRC is not zero, so zeros are no record
    )


def test_a_full_segment_is_followed_by_the_next_and_a_big_record_has_its_own(tmp_path: Path) -> None:
    log = SegmentLog(tmp_path / "log", durable=None, max_segment_bytes=100)
    positions = [log.append(bytes(n)) for n in (50, 60, 500, 1)]
    assert [position.segment for position in positions] == [0, 1, 2, 3]
    assert [len(log.read(position)) for position in positions] == [50, 60, 500, 1]
    log.sync()
    log.close()
    again = SegmentLog(tmp_path / "log", durable=positions[-1], max_segment_bytes=100)
    assert again.append(b"next").segment == 3
    assert again.torn is None


def test_a_torn_tail_is_cut_off_and_reported(tmp_path: Path) -> None:
    log = SegmentLog(tmp_path / "log", durable=None)
    kept = log.append(b"kept")
    log.sync()
    log.append(b"torn off")
    log.close()
    path = tmp_path / "log" / "00000000.seg"
    path.write_bytes(path.read_bytes()[:-3])
    again = SegmentLog(tmp_path / "log", durable=kept)
    assert again.torn is not None
    assert (again.torn.path, again.torn.offset, again.torn.dropped_bytes) == (path, kept.end[1], 8 + 8 - 3)
    assert again.append(b"next").offset == kept.end[1]
    assert again.read(kept) == b"kept"


def test_promised_bytes_that_are_gone_are_refused(tmp_path: Path) -> None:
    log = SegmentLog(tmp_path / "log", durable=None, max_segment_bytes=20)
    positions = [log.append(b"0123456789") for _ in range(3)]
    log.sync()
    log.close()
    (tmp_path / "log" / "00000002.seg").unlink()
    with pytest.raises(DamagedInboxError, match="updates were acknowledged"):
        SegmentLog(tmp_path / "log", durable=positions[2])
    with pytest.raises(DamagedInboxError, match="is gone"):
        log.read(positions[2])


def test_a_position_that_is_no_record_reads_as_damage_not_as_bytes(tmp_path: Path) -> None:
    log = SegmentLog(tmp_path / "log", durable=None)
    log.append(b"one record of some length")
    for offset in range(60):
        for length in (0, 5, 25):
            if (offset, length) != (8, 25):
                with pytest.raises(DamagedInboxError):
                    log.read(Position(0, offset, length))


def test_after_a_full_disk_nothing_is_appended_until_the_log_is_opened_again(tmp_path: Path) -> None:
    files = FullDisk()
    log = SegmentLog(tmp_path / "log", durable=None, files=files)
    kept = log.append(b"kept")
    log.sync()
    files.full = True
    with pytest.raises(OSError, match="No space left"):
        log.append(b"too much")
    files.full = False
    with pytest.raises(InboxError, match="start again after mending the disk"):
        log.append(b"next")
    with pytest.raises(InboxError):
        log.sync()
    again = SegmentLog(tmp_path / "log", durable=kept)
    assert again.append(b"next").offset == kept.end[1]


def test_a_payload_above_what_mqtt_can_carry_is_our_own_bug(tmp_path: Path) -> None:
    class Huge(bytes):
        def __len__(self) -> int:
            return MAX_PAYLOAD_BYTES + 1

    log = SegmentLog(tmp_path / "log", durable=None)
    with pytest.raises(LocalProtocolError):
        log.append(Huge())


# ---- one log per round ------------------------------------------------------------------------------


def test_a_published_rounds_pieces_go_by_deleting_its_folder(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path / "inbox", durable={})
    first, second = inbox.append(ONE, b"first"), inbox.append(TWO, b"second")
    inbox.sync()
    inbox.delete_round(ONE)
    inbox.delete_round(ONE)
    assert inbox.rounds() == (TWO,)
    assert [path.name for path in (tmp_path / "inbox").iterdir()] == ["000001-00000002"]
    assert inbox.read(TWO, second) == b"second"
    with pytest.raises(DamagedInboxError, match="is gone"):
        inbox.read(ONE, first)


def test_opening_keeps_the_rounds_of_the_index_and_deletes_the_others(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path / "inbox", durable={})
    inbox.append(ONE, b"forgotten by the index just before a crash")
    kept = inbox.append(TWO, b"kept")
    inbox.sync()
    inbox.close()
    (tmp_path / "inbox" / "notes.txt").write_text("not ours")
    again = Inbox(tmp_path / "inbox", durable={TWO: kept})
    assert again.rounds() == (TWO,)
    assert again.read(TWO, kept) == b"kept"
    assert again.torn == ()
    assert sorted(path.name for path in (tmp_path / "inbox").iterdir()) == ["000001-00000002", "notes.txt"]


def test_a_missing_round_that_was_acknowledged_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        DamagedInboxError, match="000001-00000002 is gone, but updates in it were acknowledged"
    ):
        Inbox(tmp_path / "inbox", durable={TWO: Position(0, 8, 4)})
