"""The one format of every file in the state folder: self-describing, length-checked, hashed.

``FGSTATE1`` || header length (u32 big-endian) || header (JSON, ASCII) || content || SHA-256 of all before.
The header says what the file is (``kind``) and how long the content is (``content_bytes``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.protocol.errors import Fault, FleetgradError

MAGIC = b"FGSTATE1"
MAX_HEADER_BYTES = 1 << 24
_LENGTH_BYTES = 4
_HASH_BYTES = 32


class StateError(
    FleetgradError,
    fault=Fault.ENGINEER,
    remedy="check the state folder and its permissions; never copy it between devices",
):
    """The state folder cannot be used as it is; the text says why and what the owner can do."""


class DamagedFileError(
    StateError,
    fault=Fault.SURROUNDINGS,
    remedy="check the disk; restore the folder, or enrol this device anew",
):
    """A file of the state folder is cut off, altered, or of another kind."""


@dataclass(frozen=True)
class Record:
    """``header``: what the writer put there. ``content``: the rest, a view of the bytes read."""

    header: Mapping[str, object]
    content: memoryview

    def text(self, key: str) -> str:
        value = self.header.get(key)
        if not isinstance(value, str):
            raise DamagedFileError(f"{key} is no text")
        return value

    def integer(self, key: str) -> int:
        value = self.header.get(key)
        if type(value) is not int or value < 0:
            raise DamagedFileError(f"{key} is no whole number")
        return value

    def digest(self, key: str) -> bytes:
        """32 bytes out of hex."""
        try:
            raw = bytes.fromhex(self.text(key))
        except ValueError:
            raw = b""
        if len(raw) != _HASH_BYTES:
            raise DamagedFileError(f"{key} is no digest")
        return raw


def encode(kind: str, header: Mapping[str, object], content: Sequence[bytes] = ()) -> list[bytes]:
    """The parts of a file, in order; the content is not copied."""
    document = {"kind": kind, "content_bytes": sum(map(len, content)), **header}
    head = json.dumps(document, sort_keys=True).encode("ascii") + b"\n"
    parts = [MAGIC, len(head).to_bytes(_LENGTH_BYTES, "big"), head, *content]
    check = hashlib.sha256()
    for part in parts:
        check.update(part)
    return [*parts, check.digest()]


def decode(kind: str, raw: bytes) -> Record:
    """What ``encode`` wrote. Raises DamagedFileError for any other bytes."""
    view = memoryview(raw)
    start = len(MAGIC) + _LENGTH_BYTES
    if len(raw) < start + _HASH_BYTES or raw[: len(MAGIC)] != MAGIC:
        raise DamagedFileError("not a file of this store, or cut off")
    body, check = view[:-_HASH_BYTES], view[-_HASH_BYTES:]
    if hashlib.sha256(body).digest() != check:
        raise DamagedFileError("its checksum does not hold: cut off or altered")
    length = int.from_bytes(view[len(MAGIC) : start], "big")
    if length > MAX_HEADER_BYTES or start + length > len(body):
        raise DamagedFileError("its header does not fit")
    try:
        header = json.loads(bytes(body[start : start + length]))
    except (ValueError, RecursionError):
        raise DamagedFileError("its header is no JSON") from None
    content = body[start + length :]
    if (
        not isinstance(header, dict)
        or header.get("kind") != kind
        or header.get("content_bytes") != len(content)
    ):
        raise DamagedFileError(f"its header is not that of a {kind}")
    return Record(header, content)


def read(kind: str, path: Path) -> Record | None:
    """The record in a file; None without the file. Raises DamagedFileError naming it."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return decode(kind, raw)
    except DamagedFileError as error:
        raise DamagedFileError(f"{path}: {error}") from None
