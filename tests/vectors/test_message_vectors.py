"""Every message as bytes, field by field.

After a change of the schema: ``python -m tests.vectors.test_message_vectors``. Read the difference before you
commit it: a changed line is a change of the protocol.
"""

from __future__ import annotations

import json
import re
import struct
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from edge_runtime.protocol import certificates
from edge_runtime.protocol import wire_pb2 as wire
from edge_runtime.protocol.chunks import PieceAssembler
from edge_runtime.protocol.crypto.provider import CRYPTO
from edge_runtime.protocol.envelope import seal_context, unpack
from edge_runtime.protocol.kinds import Kind
from tests.support import message_samples as samples
from tests.support.message_samples import BODIES, SAMPLES, Sample

FILE = Path(__file__).with_name("messages.json")
Part = tuple[str, str]


def _joined(parts: list[Part]) -> bytes:
    return bytes.fromhex("".join(hexed for hexed, _ in parts))


def _load() -> dict[str, Any]:
    return json.loads(FILE.read_text())  # type: ignore[no-any-return]


VECTORS = _load() if FILE.exists() else {"bodies": [], "envelopes": [], "seal_contexts": []}


# ---- the tests --------------------------------------------------------------------------------------


def test_every_message_of_the_schema_and_every_kind_has_a_vector() -> None:
    covered = {row["schema"] for row in VECTORS["bodies"]} | {"Envelope"}
    inside = {"Plan", "Schedule", "BlobRef", "Revocation"}  # only ever part of another or a list
    elsewhere = {"Bundle", "File"}  # the artifact's files, tested with it
    assert covered | inside | elsewhere == set(wire.DESCRIPTOR.message_types_by_name)
    assert {row["kind"] for row in VECTORS["envelopes"]} == {kind.label for kind in Kind}


@pytest.mark.parametrize("row", VECTORS["bodies"], ids=lambda row: row["name"])
def test_a_body_meets_its_vector_both_ways(row: dict[str, Any]) -> None:
    value, raw = BODIES[row["name"]], _joined(row["bytes"])
    assert row["value"] == _plain(value)
    assert value.encode() == raw
    assert type(value).decode(raw) == value


def test_certificates_of_the_vectors_verify_under_the_root_only() -> None:
    root = samples.verify_key("root")
    device = certificates.check_device(
        CRYPTO, root, samples.DEVICE_CERTIFICATE_SIGNED, samples.FEDERATION, samples.DEVICE
    )
    aggregator = certificates.check_aggregator(
        CRYPTO, root, samples.AGGREGATOR_CERTIFICATE_SIGNED, samples.FEDERATION, samples.ROUND
    )
    assert (device, aggregator) == (samples.DEVICE_CERTIFICATE, samples.AGGREGATOR_CERTIFICATE)
    revocations = certificates.check_revocations(CRYPTO, root, samples.REVOCATIONS_SIGNED, samples.FEDERATION)
    assert revocations == samples.REVOCATIONS


@pytest.mark.parametrize("row", VECTORS["envelopes"], ids=lambda row: row["name"])
def test_an_envelope_meets_its_vector_both_ways(row: dict[str, Any]) -> None:
    sample = next(one for one in SAMPLES if one.name == row["name"])
    messages = [_joined(parts) for parts in row["messages"]]
    assert sample.messages == tuple(messages)
    kind = sample.header.kind
    assembler: PieceAssembler | None = None
    for index, raw in enumerate(messages):
        envelope = unpack(raw, samples.FEDERATION, kind)
        header = envelope.header
        assert (header.chunk_index, header.chunk_count) == (index, len(messages))
        assert (header.kind, header.round_id, header.device) == (
            kind,
            sample.header.round_id,
            sample.header.device,
        )
        if sample.signer:
            CRYPTO.verify(samples.verify_key(sample.signer), envelope.signed_bytes(), envelope.signature)
        assembler = assembler or PieceAssembler(header.chunk_count, header.payload_digest, 1 << 20)
        assembler.add(header.chunk_index, header.chunk_count, header.payload_digest, envelope.body)
    assert assembler is not None
    payload = assembler.content()
    if sample.sealed_to:
        key = samples.sealing_key(sample.sealed_to)
        payload = CRYPTO.open(key, seal_context(sample.header), b"", payload)
    assert payload == bytes.fromhex(row["plain"]) == sample.plain


@pytest.mark.parametrize("row", VECTORS["seal_contexts"], ids=lambda row: row["name"])
def test_a_seal_context_meets_its_vector(row: dict[str, Any]) -> None:
    sample = next(one for one in SAMPLES if one.name == row["name"])
    assert seal_context(sample.header) == _joined(row["bytes"])


def test_the_vectors_are_what_the_script_would_write() -> None:
    assert json.loads(FILE.read_text()) == json.loads(json.dumps(make()))


# ---- the script -------------------------------------------------------------------------------------


def make() -> dict[str, Any]:
    return {
        "source": "made by this project: python -m tests.vectors.test_message_vectors",
        "reading": "each row of `bytes` is hex and what it says; the joined hex is the message",
        "secret_keys": {name: key.to_bytes().hex() for name, key in samples.SECRETS.items()},
        "ephemeral": samples.EPHEMERAL.hex(),
        "bodies": [_body(name, value) for name, value in BODIES.items()],
        "envelopes": [_envelope(sample) for sample in SAMPLES],
        "seal_contexts": [_context(sample) for sample in SAMPLES if sample.sealed_to],
    }


_SCHEMAS = {"SignedBytes": "Signed"}


def _body(name: str, value: Any) -> dict[str, Any]:
    schema = _SCHEMAS.get(type(value).__name__, type(value).__name__)
    descriptor = wire.DESCRIPTOR.message_types_by_name[schema]
    return {
        "name": name,
        "schema": schema,
        "value": _plain(value),
        "bytes": list(_fields(value.encode(), descriptor)),
    }


def _envelope(sample: Sample) -> dict[str, Any]:
    return {
        "name": sample.name,
        "kind": sample.header.kind.label,
        "signed_by": sample.signer,
        "sealed_to": sample.sealed_to,
        "piece_bytes": sample.piece_bytes,
        "plain": sample.plain.hex(),
        "messages": [list(_fields(raw, wire.Envelope.DESCRIPTOR)) for raw in sample.messages],
    }


def _context(sample: Sample) -> dict[str, Any]:
    raw = seal_context(sample.header)
    prefix = b"fleetgrad/1/seal\0"
    parts: list[Part] = [(prefix.hex(), "'fleetgrad/1/seal' and a zero byte")]
    rest = raw[len(prefix) :]
    for what in (
        "kind",
        "federation",
        "generation and round, u32 LE each",
        "manifest digest, may be empty",
        "device, may be empty",
    ):
        (length,) = struct.unpack_from("<H", rest)
        parts.append((rest[: 2 + length].hex(), f"u16 LE length {length}, then: {what}"))
        rest = rest[2 + length :]
    return {"name": sample.name, "bytes": parts}


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        at, value, shift = at + 1, value | (byte & 0x7F) << shift, shift + 7
        if byte < 0x80:
            return value, at


_NESTED = {("Envelope", "header"): wire.Header.DESCRIPTOR}


def _fields(raw: bytes, descriptor: Descriptor, path: str = "") -> Iterator[Part]:
    """Each field of the message as (hex, comment); nested messages are gone into."""
    at = 0
    while at < len(raw):
        start = at
        tag, at = _varint(raw, at)
        field = descriptor.fields_by_number[tag >> 3]
        name = f"{path}{field.name}"
        match tag & 7:
            case 0:
                value, at = _varint(raw, at)
                yield raw[start:at].hex(), f"{name} (field {field.number}, varint): {value}"
            case 1:
                (number,) = struct.unpack_from("<d", raw, at)
                at += 8
                yield raw[start:at].hex(), f"{name} (field {field.number}, double): {number}"
            case 2:
                length, at = _varint(raw, at)
                content = raw[at : at + length]
                nested = field.message_type or _NESTED.get((descriptor.name, field.name))
                head = f"{name} (field {field.number}, {length} bytes)"
                if nested is not None:
                    yield raw[start:at].hex(), f"{head}: a {nested.name}"
                    yield from _fields(content, nested, f"{name}.")
                elif field.type == FieldDescriptor.TYPE_STRING:
                    yield raw[start : at + length].hex(), f"{head}: {content.decode()!r}"
                elif field.type == FieldDescriptor.TYPE_BYTES:
                    yield raw[start:at].hex(), head
                    yield content.hex(), f"{name}, content"
                else:
                    yield raw[start : at + length].hex(), f"{head}: packed varints"
                at += length
            case other:
                raise ValueError(f"wire type {other} is not used by this protocol")


def _plain(value: Any) -> Any:
    """A value as JSON holds it: bytes as hex, enumerations by name."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    return value


if __name__ == "__main__":
    _text = json.dumps(make(), indent=1)
    FILE.write_text(re.sub(r'\[\s+("[^"]*"),\s+("[^"]*")\s+\]', r"[\1, \2]", _text) + "\n")
    sys.stdout.write(f"{FILE}: {FILE.stat().st_size} bytes\n")
