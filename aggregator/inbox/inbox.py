"""The inbox: one segment log per round, so that a published round's updates go by deleting a folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from aggregator.files import FileLayer, make_private_folder
from aggregator.inbox.segments import (
    DEFAULT_SEGMENT_BYTES,
    DamagedInboxError,
    Position,
    SegmentLog,
    TornTail,
    remove_segments,
)
from edge_runtime.protocol.ids import RoundId

_NAME = re.compile(r"(\d+)-(\d+)")


class Inbox:
    """Update pieces by round and position. One writer; not thread-safe.

    Order of work: ``append`` the pieces of a batch, ``sync`` once, commit their positions to the ledger, only
    then acknowledge. To delete: commit the ledger's forgetting, then ``delete_round``.
    """

    def __init__(
        self,
        folder: Path,
        *,
        durable: Mapping[RoundId, Position],
        max_segment_bytes: int = DEFAULT_SEGMENT_BYTES,
        files: FileLayer | None = None,
    ) -> None:
        """``durable``: the last position of each round that the ledger's index holds (``Ledger.durable_ends``).

        A round's folder without one holds nothing that anybody was promised, and is deleted.
        Raises DamagedInboxError if promised bytes are gone or altered, OSError from the disk.
        """
        self._folder = folder
        self._files = files or FileLayer()
        self._max_segment_bytes = max_segment_bytes
        self._logs: dict[RoundId, SegmentLog] = {}
        make_private_folder(folder)
        present = set(self._present())
        if missing := sorted(durable.keys() - present):
            raise DamagedInboxError(
                f"{self._path(missing[0])} is gone, but updates in it were acknowledged: restore it from a backup"
            )
        for round_id in present - durable.keys():
            remove_segments(self._path(round_id), self._files)
        for round_id in sorted(durable):
            self._open(round_id, durable[round_id])

    @property
    def torn(self) -> tuple[TornTail, ...]:
        """What opening cut off: bytes that were never acknowledged."""
        return tuple(log.torn for log in self._logs.values() if log.torn)

    def append(self, round_id: RoundId, payload: bytes) -> Position:
        """See ``SegmentLog.append``."""
        log = self._logs.get(round_id) or self._open(round_id, None)
        return log.append(payload)

    def sync(self) -> None:
        """Everything appended is durable when this returns. Raises OSError."""
        for log in self._logs.values():
            log.sync()

    def read(self, round_id: RoundId, position: Position) -> bytes:
        """Raises DamagedInboxError if the payload is not there unaltered."""
        log = self._logs.get(round_id)
        if log is None:
            raise DamagedInboxError(f"{self._path(round_id)} is gone")
        return log.read(position)

    def delete_round(self, round_id: RoundId) -> None:
        """All of a round's pieces are gone, durably, when this returns; a round without any is fine."""
        if (log := self._logs.pop(round_id, None)) is not None:
            log.remove_all()

    def rounds(self) -> tuple[RoundId, ...]:
        """The rounds that have pieces, in order."""
        return tuple(sorted(self._logs))

    def close(self) -> None:
        """Syncs nothing. Doing it twice is fine."""
        for log in self._logs.values():
            log.close()

    def _open(self, round_id: RoundId, durable: Position | None) -> SegmentLog:
        log = SegmentLog(
            self._path(round_id),
            durable=durable,
            max_segment_bytes=self._max_segment_bytes,
            files=self._files,
        )
        self._logs[round_id] = log
        return log

    def _path(self, round_id: RoundId) -> Path:
        return self._folder / f"{round_id.generation:06d}-{round_id.number:08d}"

    def _present(self) -> list[RoundId]:
        found = ((_NAME.fullmatch(path.name), path) for path in self._folder.iterdir())
        return [RoundId(int(match[1]), int(match[2])) for match, path in found if match and path.is_dir()]
