"""All that crosses a broker: recorded as any subscriber of ``#`` sees it, read by kind, searched for secrets."""

from __future__ import annotations

import base64
import queue
import struct
import threading
from collections.abc import Iterable, Iterator

from edge_runtime.protocol.chunks import PieceAssembler
from edge_runtime.protocol.envelope import Envelope, unpack
from edge_runtime.protocol.errors import RemoteProtocolError
from edge_runtime.protocol.ids import DeviceId, FederationId
from edge_runtime.protocol.kinds import Kind
from edge_runtime.protocol.messages import Receipt
from edge_runtime.transport.base import Received, Transport

FEDERATION = FederationId("digits")
_SMALL = 4096  # needles of four bytes are looked for in smaller payloads only: ciphertext has them by chance


class Recorder:
    """Everything that crosses the broker from now on, as any subscriber of ``#`` sees it."""

    def __init__(self, transport: Transport, *patterns: str) -> None:
        self._transport = transport
        self._stop = threading.Event()
        self._messages: queue.SimpleQueue[Received] = queue.SimpleQueue()
        self._kept: list[Received] = []
        for pattern in patterns or ("#",):
            transport.subscribe(pattern)
        transport.open()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def messages(self) -> list[Received]:
        while not self._messages.empty():
            self._kept.append(self._messages.get())
        return self._kept

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._transport.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            event = self._transport.next_event(0.1)
            if isinstance(event, Received):
                self._messages.put(event)
                self._transport.ack(event)

    def envelopes(self, *kinds: Kind) -> Iterator[tuple[bytes, Envelope]]:
        """(payload, envelope) of the messages of these kinds."""
        for message in self.messages():
            try:
                yield message.payload, unpack(message.payload, FEDERATION, *kinds)
            except RemoteProtocolError:
                continue

    def updates(self) -> dict[tuple[DeviceId, int], dict[int, set[bytes]]]:
        """By (device, round) and piece: the different payloads that were sent. One each, if all is well."""
        found: dict[tuple[DeviceId, int], dict[int, set[bytes]]] = {}
        for payload, envelope in self.envelopes(Kind.UPDATE):
            header = envelope.header
            if header.device is not None:
                pieces = found.setdefault((header.device, header.round_id.number), {})
                pieces.setdefault(header.chunk_index, set()).add(payload)
        return found

    def sendings(self, device: str, round_number: int) -> int:
        """How often the first piece of a device's update crossed the broker."""
        headers = [envelope.header for _, envelope in self.envelopes(Kind.UPDATE)]
        place = (device, round_number, 0)
        return sum((h.device, h.round_id.number, h.chunk_index) == place for h in headers)

    def sealed(self, device: str, round_number: int) -> bytes:
        """A device's sealed update, put together from its pieces."""
        assembler: PieceAssembler | None = None
        for _, envelope in self.envelopes(Kind.UPDATE):
            header = envelope.header
            if (header.device, header.round_id.number) == (device, round_number):
                digest = header.payload_digest
                assembler = assembler or PieceAssembler(header.chunk_count, digest, 1 << 24)
                assembler.add(header.chunk_index, header.chunk_count, digest, envelope.body)
        if assembler is None or not assembler.complete():
            raise AssertionError(f"no whole update of {device} for round {round_number} was recorded")
        return assembler.content()

    def receipts(self, device: str) -> list[tuple[int, Receipt]]:
        """(round, receipt) as they were sent to a device."""
        return [
            (envelope.header.round_id.number, Receipt.decode(envelope.body))
            for _, envelope in self.envelopes(Kind.RECEIPT)
            if envelope.header.device == device
        ]


# ---- searching --------------------------------------------------------------------------------------


def spellings(secret: bytes) -> tuple[bytes, ...]:
    """How 16 or more secret bytes may be written: raw, hex, base64 in both alphabets."""
    text = base64.b64encode(secret).rstrip(b"=")
    return (
        secret,
        secret.hex().encode(),
        secret.hex().upper().encode(),
        text[:-1],  # the last digit depends on what follows
        base64.urlsafe_b64encode(secret).rstrip(b"=")[:-1],
    )


def found_bytes(haystack: bytes, needles: Iterable[tuple[str, bytes]]) -> set[str]:
    """The names of the needles that occur, at any offset."""
    return {name for name, needle in needles if needle in haystack}


def found_numbers(payloads: Iterable[bytes], numbers: Iterable[int]) -> set[str]:
    """How the numbers occur: protobuf integers at any depth, 64 bits raw, in small payloads 32 bits and text too.

    A raw varint of two bytes is in every ciphertext by chance, so varints count only where the whole parses.
    """
    payloads, wanted = list(payloads), set(numbers)
    found = {f"{n} as a protobuf integer" for raw in payloads for n in wanted & protobuf_numbers(raw)}
    for n in wanted:
        long = {
            "uint64": struct.pack("<Q", n),
            "uint64 be": struct.pack(">Q", n),
            "double": struct.pack("<d", n),
        }
        short = {"uint32": struct.pack("<I", n), "float": struct.pack("<f", n), "text": str(n).encode()}
        for raw in payloads:
            spelt = {**long, **short} if len(raw) < _SMALL else long
            found |= {f"{n} as {how}" for how, needle in spelt.items() if needle in raw}
    return found


def protobuf_numbers(raw: bytes) -> set[int]:
    """Every integer of a protobuf message of unknown schema, at any depth; empty for bytes that are none."""
    found: set[int] = set()
    at = 0
    try:
        while at < len(raw):
            tag, at = _varint(raw, at)
            match tag & 7:
                case 0:
                    value, at = _varint(raw, at)
                    found.add(value)
                case 1:
                    found.add(struct.unpack_from("<Q", raw, at)[0])
                    at += 8
                case 2:
                    size, at = _varint(raw, at)
                    if at + size > len(raw):
                        return set()
                    found |= protobuf_numbers(raw[at : at + size])
                    at += size
                case 5:
                    found.add(struct.unpack_from("<I", raw, at)[0])
                    at += 4
                case _:
                    return set()
    except (IndexError, struct.error):
        return set()
    return found


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise IndexError("longer than 64 bits")
