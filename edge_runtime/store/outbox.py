"""Updates that wait for a receipt: the exact messages, durable before the first of them is sent."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from edge_runtime.protocol.errors import LocalProtocolError
from edge_runtime.protocol.ids import Digest, RoundId
from edge_runtime.store import records
from edge_runtime.store.files import FileLayer
from edge_runtime.store.records import DamagedFileError

_log = logging.getLogger(__name__)
_KIND = "outbox entry"
_SETTLED_KIND = "settled round"
_ENTRY_NAME = re.compile(r"(\d{10})-(\d{10})\.entry")
_SETTLED_FILE = "settled"
SET_ASIDE_SUFFIX = ".damaged"


class Message(NamedTuple):
    """One MQTT message as it goes to the broker."""

    topic: str
    payload: bytes


@dataclass(frozen=True, kw_only=True)
class OutboxEntry:
    """One update: ``messages`` in the order of sending, at least one; ``update_digest``: its payload digest.

    A receipt must name round, manifest and update.
    """

    round_id: RoundId
    manifest_digest: Digest
    update_digest: Digest
    messages: tuple[Message, ...]


class Outbox:
    """At most one update for a round, ever: also not after it was removed, nor after its file was damaged."""

    def __init__(self, folder: Path, files: FileLayer) -> None:
        """Opens the folder; damaged entries are set aside under their name with ``.damaged`` and logged."""
        self._folder = folder
        self._files = files
        self._settled = read_settled(folder)
        self._rounds: set[RoundId] = set()
        for path in entry_files(folder):
            round_id = round_of(path)
            try:
                self._read(round_id)
            except DamagedFileError as error:
                # First that this round is over, then the move: cut off between them, it is set aside again.
                self._settle(round_id)
                files.move(path, path.with_name(path.name + SET_ASIDE_SUFFIX))
                _log.error("an update that had no receipt yet is lost and set aside: %s", error)
            else:
                self._rounds.add(round_id)

    @property
    def settled(self) -> RoundId | None:
        """The highest round that is over for this device."""
        return self._settled

    @property
    def set_aside(self) -> tuple[Path, ...]:
        """Damaged entries, for the owner to look at; nothing reads them again."""
        return tuple(sorted(self._folder.glob(f"*{SET_ASIDE_SUFFIX}")))

    def answered(self, round_id: RoundId) -> bool:
        """Whether this round has its update, or is over: then no other may be made."""
        return round_id in self._rounds or (self._settled is not None and round_id <= self._settled)

    def put(self, entry: OutboxEntry) -> None:
        """Durable when this returns; cut off before, the entry is there whole or not at all.

        The same entry again is fine. Raises LocalProtocolError for other bytes in a round that was answered.
        """
        if not entry.messages:
            raise LocalProtocolError("an outbox entry without messages")
        if entry.round_id in self._rounds:
            if self._read(entry.round_id) != entry:
                raise LocalProtocolError(f"a second, different update for round {_spell(entry.round_id)}")
            return
        if self.answered(entry.round_id):
            raise LocalProtocolError(f"an update for round {_spell(entry.round_id)}, which is over here")
        header = {
            "generation": entry.round_id.generation,
            "round": entry.round_id.number,
            "manifest_digest": entry.manifest_digest.hex(),
            "update_digest": entry.update_digest.hex(),
            "messages": [{"topic": m.topic, "bytes": len(m.payload)} for m in entry.messages],
        }
        parts = records.encode(_KIND, header, [message.payload for message in entry.messages])
        self._files.replace(self._path(entry.round_id), parts)
        self._rounds.add(entry.round_id)

    def entries(self) -> tuple[OutboxEntry, ...]:
        """All that wait, oldest round first, read from disk. Raises DamagedFileError."""
        return tuple(self._read(round_id) for round_id in sorted(self._rounds))

    def get(self, round_id: RoundId) -> OutboxEntry | None:
        """The entry of one round. Raises DamagedFileError."""
        return self._read(round_id) if round_id in self._rounds else None

    def remove(self, round_id: RoundId) -> None:
        """The round is over: a receipt has arrived, or no update could be made. Never again an update for it."""
        self._settle(round_id)
        if round_id in self._rounds:
            self._files.discard(self._path(round_id))
            self._rounds.discard(round_id)

    def _settle(self, round_id: RoundId) -> None:
        if self._settled is None or round_id > self._settled:
            header = {"generation": round_id.generation, "round": round_id.number}
            self._files.replace(self._folder / _SETTLED_FILE, records.encode(_SETTLED_KIND, header))
            self._settled = round_id

    def _path(self, round_id: RoundId) -> Path:
        return self._folder / f"{round_id.generation:010}-{round_id.number:010}.entry"

    def _read(self, round_id: RoundId) -> OutboxEntry:
        path = self._path(round_id)
        entry = read_entry(path)
        if entry is None:
            raise DamagedFileError(f"{path}: it is gone")
        return entry


def _messages(table: object, content: memoryview) -> tuple[Message, ...]:
    messages = []
    offset = 0
    for row in table if isinstance(table, Sequence) else ():
        match row:
            case {"topic": str(topic), "bytes": int(size)} if size >= 0:
                messages.append(Message(topic, bytes(content[offset : offset + size])))
                offset += size
            case _:
                raise DamagedFileError("its list of messages does not read")
    if not messages or offset != len(content):
        raise DamagedFileError("its list of messages does not match its length")
    return tuple(messages)


def entry_files(folder: Path) -> list[Path]:
    """Of updates that wait, oldest round first."""
    return sorted(folder.glob("*.entry"))


def read_entry(path: Path) -> OutboxEntry | None:
    """The entry in one of ``entry_files``; None: it is gone. Raises DamagedFileError."""
    round_id = round_of(path)
    record = records.read(_KIND, path)
    if record is None:
        return None
    try:
        if (record.integer("generation"), record.integer("round")) != round_id:
            raise DamagedFileError("it is the entry of another round")
        return OutboxEntry(
            round_id=round_id,
            manifest_digest=Digest(record.digest("manifest_digest")),
            update_digest=Digest(record.digest("update_digest")),
            messages=_messages(record.header.get("messages"), record.content),
        )
    except DamagedFileError as error:
        raise DamagedFileError(f"{path}: {error}") from None


def read_settled(folder: Path) -> RoundId | None:
    """The highest round that is over, in the outbox's folder. Raises DamagedFileError."""
    record = records.read(_SETTLED_KIND, folder / _SETTLED_FILE)
    return RoundId(record.integer("generation"), record.integer("round")) if record else None


def round_of(path: Path) -> RoundId:
    """The round in the name of an entry's file. Raises DamagedFileError."""
    match = _ENTRY_NAME.fullmatch(path.name)
    if match is None:
        raise DamagedFileError(f"{path}: not the name of an outbox entry; move it out of the state folder")
    return RoundId(int(match[1]), int(match[2]))


def _spell(round_id: RoundId) -> str:
    return f"{round_id.generation}.{round_id.number}"
