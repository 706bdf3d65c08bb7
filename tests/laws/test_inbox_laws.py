"""A power cut may take any unsynced byte from the segment log, and not one that a sync promised."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.files import FileLayer
from aggregator.inbox.segments import DamagedInboxError, Position, SegmentLog
from tests.support.scratch import scratch_folder


@dataclass
class Disk(FileLayer):
    """Real files, and what of them is durable: bytes by descriptor sync, names by folder sync."""

    open_files: dict[int, Path] = field(default_factory=dict)
    durable_bytes: dict[Path, int] = field(default_factory=dict)
    durable_names: set[Path] = field(default_factory=set)

    def open_for_append(self, path: Path) -> int:
        descriptor = super().open_for_append(path)
        self.open_files[descriptor] = path
        return descriptor

    def sync(self, descriptor: int) -> None:
        super().sync(descriptor)
        path = self.open_files[descriptor]
        self.durable_bytes[path] = path.stat().st_size

    def truncate(self, path: Path, size: int) -> None:
        super().truncate(path, size)
        self.durable_bytes[path] = size

    def sync_folder(self, path: Path) -> None:
        super().sync_folder(path)
        present = set(path.iterdir())
        self.durable_names = {name for name in self.durable_names if name.parent != path} | present

    def power_cut(self, folder: Path, keep: float, garble: bool) -> None:
        """Unsynced names vanish; of unsynced bytes a part is kept, which may be zeros instead of the bytes."""
        for path in sorted(folder.iterdir()):
            durable = self.durable_bytes.get(path, 0)
            if path not in self.durable_names:
                path.unlink()
                continue
            size = durable + int(keep * (path.stat().st_size - durable))
            os.truncate(path, size)
            if garble and size > durable:
                with path.open("r+b") as file:
                    file.seek(durable)
                    file.write(bytes((size - durable + 1) // 2))


_payloads = st.lists(st.binary(max_size=40) | st.none(), max_size=25)  # None: sync


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(_payloads, st.none() | st.floats(0, 1), st.booleans()), min_size=1, max_size=4))
def test_power_cuts_lose_only_unsynced_records_and_never_give_garbage(
    lives: list[tuple[list[bytes | None], float | None, bool]],
) -> None:
    with scratch_folder() as name:
        folder, disk = name / "log", Disk()
        promised: dict[Position, bytes] = {}
        durable: Position | None = None
        for steps, keep, garble in lives:
            log = SegmentLog(folder, durable=durable, max_segment_bytes=100, files=disk)
            appended: dict[Position, bytes] = {}
            for payload in steps:
                if payload is None:
                    log.sync()
                    promised |= appended
                    durable = max(promised, default=None)
                else:
                    appended[log.append(payload)] = payload
            for position, payload in (promised | appended).items():
                assert log.read(position) == payload
            log.close()
            if keep is not None:  # else only the process is killed, and the page cache stays
                disk.power_cut(folder, keep, garble)
            for position, payload in appended.items():
                try:
                    assert log.read(position) == payload
                except DamagedInboxError:
                    assert position not in promised
        log = SegmentLog(folder, durable=durable, max_segment_bytes=100, files=disk)
        for position, payload in promised.items():
            assert log.read(position) == payload
        log.close()


def test_a_cut_at_any_byte_keeps_the_whole_records_before_it(tmp_path: Path) -> None:
    log = SegmentLog(tmp_path / "log", durable=None)
    positions = [log.append(bytes([i]) * i) for i in range(1, 6)]
    log.sync()
    log.close()
    (segment,) = (tmp_path / "log").iterdir()
    whole = segment.read_bytes()
    for cut in range(len(whole) + 1):
        segment.write_bytes(whole[:cut])
        again = SegmentLog(tmp_path / "log", durable=None)
        for i, position in enumerate(positions, 1):
            if position.end[1] <= cut:
                assert again.read(position) == bytes([i]) * i
            else:
                with pytest.raises(DamagedInboxError):
                    again.read(position)
        new = again.append(b"new")
        assert again.read(new) == b"new"
        again.close()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_flipped_bit_in_promised_bytes_is_refused_by_reading_and_by_opening(data: st.DataObject) -> None:
    with scratch_folder() as name:
        folder = name / "log"
        log = SegmentLog(folder, durable=None)
        positions = [log.append(bytes([i]) * 10) for i in range(4)]
        log.sync()
        log.close()
        (segment,) = folder.iterdir()
        raw = bytearray(segment.read_bytes())
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] ^= 1 << data.draw(st.integers(0, 7))
        segment.write_bytes(raw)
        for i, position in enumerate(positions):
            if position.offset <= at < position.end[1]:
                with pytest.raises(DamagedInboxError, match="cut off or altered"):
                    log.read(position)
            else:
                assert log.read(position) == bytes([i]) * 10
        with pytest.raises(DamagedInboxError, match="restore the disk"):
            SegmentLog(folder, durable=positions[-1])
        assert segment.read_bytes() == bytes(raw), "a refusal must not cut anything off"
