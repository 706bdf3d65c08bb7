"""A log of payloads in segment files: appended, made durable by one sync for many, read back by position.

A segment is ``FGSEGM01``, then records: length (u32 BE), CRC-32 of the length bytes and the payload (u32 BE),
payload. The CRC finds accidents, not attacks: what is stored is signed and sealed by its sender.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from aggregator.files import FileLayer
from edge_runtime.protocol.errors import Fault, FleetgradError, LocalProtocolError

MAGIC = b"FGSEGM01"
MAX_PAYLOAD_BYTES = 1 << 28  # what one MQTT packet can hold
DEFAULT_SEGMENT_BYTES = 64 << 20

_HEAD = struct.Struct(">II")
_NAME = re.compile(r"(\d{8})\.seg")


class Position(NamedTuple):
    """Where a record begins (``offset``, bytes into segment number ``segment``) and its payload's bytes."""

    segment: int
    offset: int
    length: int

    @property
    def end(self) -> tuple[int, int]:
        """(segment, offset of the byte after the record): comparable along the log."""
        return self.segment, self.offset + _HEAD.size + self.length


class InboxError(FleetgradError, fault=Fault.SURROUNDINGS, remedy="check the disk and its free space"):
    """The inbox cannot be used as it is; the text says why and what the operator can do."""


class DamagedInboxError(
    InboxError, fault=Fault.SURROUNDINGS, remedy="check the disk; the named segment cannot be trusted"
):
    """Bytes that were promised to be durable are gone or altered."""


@dataclass(frozen=True)
class TornTail:
    """What opening cut off: bytes that no sync had promised."""

    path: Path
    offset: int
    dropped_bytes: int


class SegmentLog:
    """One series of segments in ``folder``. One writer; not thread-safe.

    durable: the last position ever promised to somebody (the ledger's index knows it); None: none was.
    Damage before its end is refused, what does not verify behind it is the torn tail of a crash and is cut off.
    The CRC alone cannot tell the two apart: a power cut may lose any of the unsynced pages.
    ``torn``: what was cut off at opening, if anything.
    """

    def __init__(
        self,
        folder: Path,
        *,
        durable: Position | None,
        max_segment_bytes: int = DEFAULT_SEGMENT_BYTES,
        files: FileLayer | None = None,
    ) -> None:
        """Raises DamagedInboxError if promised bytes are gone or altered."""
        self._folder = folder
        self._files = files or FileLayer()
        self._max_segment_bytes = max_segment_bytes
        self._descriptor: int | None = None
        self._new_name = False
        self._dirty = False
        self._failed = False
        self.torn: TornTail | None = None
        self._files.make_folder(folder)
        self._segment, self._size = self._recover(durable)

    # ---- writing ------------------------------------------------------------------------------------

    def append(self, payload: bytes) -> Position:
        """The payload is in the log when this returns, and durable when the next ``sync`` does.

        Raises LocalProtocolError above 2^28 bytes, OSError from the disk; after an OSError nothing can be
        appended until the log is opened again, since the kernel may have dropped what it could not write.
        """
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise LocalProtocolError(f"a record of {len(payload)} bytes is above {MAX_PAYLOAD_BYTES}")
        self._usable()
        record_bytes = _HEAD.size + len(payload)
        self._failed = True  # until all below has worked
        if self._size > len(MAGIC) and self._size + record_bytes > self._max_segment_bytes:
            self._finish_segment()
            self._segment, self._size = self._segment + 1, 0
        if self._descriptor is None:
            self._descriptor = self._files.open_for_append(self._path(self._segment))
            self._new_name = self._size == 0
        self._dirty = True
        if self._size == 0:
            self._files.append(self._descriptor, [MAGIC])
            self._size = len(MAGIC)
        position = Position(self._segment, self._size, len(payload))
        self._files.append(self._descriptor, [_head(payload), payload])
        self._size += record_bytes
        self._failed = False
        return position

    def sync(self) -> None:
        """Everything appended is durable when this returns. Raises OSError; see ``append``."""
        self._usable()
        if self._descriptor is None or not self._dirty:
            return
        self._failed = True
        self._files.sync(self._descriptor)
        if self._new_name:
            self._files.sync_folder(self._folder)
            self._new_name = False
        self._dirty = self._failed = False

    def close(self) -> None:
        """Syncs nothing. Doing it twice is fine."""
        if self._descriptor is not None:
            self._files.close(self._descriptor)
            self._descriptor = None
        self._failed = True

    def _finish_segment(self) -> None:
        # A segment is durable before the next one exists, so only the tail of the log can be torn.
        if self._descriptor is not None:
            if self._dirty:
                self._files.sync(self._descriptor)
                if self._new_name:
                    self._files.sync_folder(self._folder)
            self._files.close(self._descriptor)
            self._descriptor = None
            self._dirty = self._new_name = False

    def _usable(self) -> None:
        if self._failed:
            raise InboxError(f"{self._folder} failed or was closed: start again after mending the disk")

    # ---- reading ------------------------------------------------------------------------------------

    def read(self, position: Position) -> bytes:
        """The payload that ``append`` put there. Raises DamagedInboxError if it is not there unaltered."""
        path = self._path(position.segment)
        try:
            raw = self._files.read(path, position.offset, _HEAD.size + position.length)
        except FileNotFoundError:
            raise DamagedInboxError(f"{path} is gone") from None
        head, payload = raw[: _HEAD.size], raw[_HEAD.size :]
        if len(payload) != position.length or head != _head(payload):
            raise DamagedInboxError(f"{path}: the record at byte {position.offset} is cut off or altered")
        return payload

    # ---- recovery -----------------------------------------------------------------------------------

    def _recover(self, durable: Position | None) -> tuple[int, int]:
        """Cut off what no sync promised and does not verify; give (segment, size) to go on from."""
        numbers = self._numbers()
        first = durable.segment if durable else (numbers[0] if numbers else 0)
        promised = durable.end if durable else (first, 0)
        segment, size = first, 0
        for segment in range(first, max([first, *numbers]) + 1):
            size, whole = self._verified(segment)
            if (segment, size) < promised:
                raise DamagedInboxError(
                    f"{self._path(segment)} is damaged at byte {size}, before byte {promised[1]} up to which "
                    "updates were acknowledged: restore the disk, or the folder and the ledger from one backup"
                )
            if not whole or size == 0:
                self._cut(segment, size, [n for n in numbers if n > segment])
                break
        # A crash may have come between a segment's creation and the sync of its name.
        self._files.sync_folder(self._folder)
        return segment, size

    def _verified(self, segment: int) -> tuple[int, bool]:
        """(bytes from the start that are whole records, is that the whole file?)"""
        path = self._path(segment)
        try:
            total = path.stat().st_size
        except FileNotFoundError:
            return 0, True
        if self._files.read(path, 0, len(MAGIC)) != MAGIC:
            return 0, total == 0
        at = len(MAGIC)
        while at < total:
            head = self._files.read(path, at, _HEAD.size)
            length = _HEAD.unpack(head)[0] if len(head) == _HEAD.size else total
            if at + _HEAD.size + length > total:
                return at, False
            if head != _head(self._files.read(path, at + _HEAD.size, length)):
                return at, False
            at += _HEAD.size + length
        return at, True

    def _cut(self, segment: int, size: int, later: list[int]) -> None:
        for number in reversed(later):
            self._files.remove(self._path(number))
        path = self._path(segment)
        dropped = 0
        if path.exists():
            dropped = path.stat().st_size - size
            if size:
                self._files.truncate(path, size)
            else:
                self._files.remove(path)
        if dropped or later:
            self.torn = TornTail(path, size, dropped)

    def _numbers(self) -> list[int]:
        found = (_NAME.fullmatch(path.name) for path in self._folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def _path(self, segment: int) -> Path:
        return self._folder / f"{segment:08d}.seg"

    def remove_all(self) -> None:
        """Close the log and delete its segments and its folder; cut off by a crash, it can be begun again."""
        self.close()
        remove_segments(self._folder, self._files)


def remove_segments(folder: Path, files: FileLayer) -> None:
    """Delete a series of segments with its folder; newest first, and nothing else that lies there."""
    for path in sorted(_segments(folder), reverse=True):
        files.remove(path)
    files.remove_folder(folder)


def _segments(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def _head(payload: bytes) -> bytes:
    length = len(payload).to_bytes(4, "big")
    return length + zlib.crc32(payload, zlib.crc32(length)).to_bytes(4, "big")
