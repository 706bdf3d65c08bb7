"""Garbage is only ever the peer's fault: for all bytes a value or RemoteProtocolError, nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from aggregator.intake import Intake, KnownDevice, open_update
from edge_runtime.protocol import certificates, topics
from edge_runtime.protocol import wire_pb2 as wire
from edge_runtime.protocol.artifact import ArtifactManifest, TargetSpec, ValueSpec, from_bundle
from edge_runtime.protocol.chunks import PieceAssembler
from edge_runtime.protocol.crypto.provider import CRYPTO
from edge_runtime.protocol.enrol_token import EnrolToken, TokenError
from edge_runtime.protocol.envelope import OVERHEAD_BYTES, Envelope, Header, pack, unpack
from edge_runtime.protocol.errors import LocalProtocolError, RemoteProtocolError
from edge_runtime.protocol.ids import device_id, federation_id, shard_of
from edge_runtime.protocol.kinds import Kind
from edge_runtime.protocol.parsing import parse
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.tensors import layout
from tests.support import message_samples as samples
from tests.support.message_samples import BODIES, DEVICE, FEDERATION, ROUND, SAMPLES

ROOT = samples.verify_key("root")
INTAKE = Intake(
    federation=FEDERATION,
    provider=CRYPTO,
    root=ROOT,
    sealing_key=samples.AGGREGATOR_SEALING,
    lookup=lambda device: (
        KnownDevice(signing_key=samples.public(samples.DEVICE_KEY), epoch=1, last_sequence=0)
        if device == DEVICE
        else None
    ),
)
UP = topics.up(FEDERATION, DEVICE)
Parser = Callable[[bytes], Any]

PARSERS: dict[str, Parser] = {
    **{type(value).__name__: type(value).decode for value in BODIES.values()},
    "Plan.from_wire": lambda raw: Plan.from_wire(parse(wire.Plan, raw)),
    "unpack": lambda raw: unpack(raw, FEDERATION, *Kind),
    "check_device": lambda raw: certificates.check_device(CRYPTO, ROOT, raw, FEDERATION, DEVICE),
    "check_aggregator": lambda raw: certificates.check_aggregator(CRYPTO, ROOT, raw, FEDERATION, ROUND),
    "Intake.accept": lambda raw: INTAKE.accept(UP, raw),
    "check_revocations": lambda raw: certificates.check_revocations(CRYPTO, ROOT, raw, FEDERATION),
    "ArtifactManifest.from_bytes": ArtifactManifest.from_bytes,
    "from_bundle": from_bundle,
    "open_update": lambda raw: open_update(CRYPTO, samples.ROUND_SEALING, SAMPLES[3].header, raw),
}
ARTIFACT_MANIFEST = ArtifactManifest(
    name="m",
    opset=18,
    parameters=layout([("w", (2, 3))]),
    inputs=(ValueSpec("x", "float32", (2,)),),
    target=TargetSpec("y", "int64", (), 3),
    outputs=(ValueSpec("logits", "float32", (3,)),),
    loss="cross_entropy",
).to_bytes()
BUNDLE = wire.Bundle(files=[wire.File(name="manifest.json", content=ARTIFACT_MANIFEST)]).SerializeToString()
VALID: tuple[bytes, ...] = (
    *(value.encode() for value in BODIES.values()),
    *(message for sample in SAMPLES for message in sample.messages),
    samples.DEVICE_CERTIFICATE_SIGNED,
    samples.AGGREGATOR_CERTIFICATE_SIGNED,
    samples.REVOCATIONS_SIGNED,
    samples.MANIFEST.plan.to_wire().SerializeToString(),
    SAMPLES[3].payload,
    ARTIFACT_MANIFEST,
    BUNDLE,
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid message cut, spliced with another, or with some bits turned."""
    raw = bytearray(draw(st.sampled_from(VALID)))
    for how in draw(st.lists(st.sampled_from(["flip", "cut", "splice", "insert", "number"]), max_size=4)):
        at = draw(st.integers(0, len(raw)))
        match how:
            case "flip" if at < len(raw):
                raw[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del raw[at:]
            case "splice":
                other = draw(st.sampled_from(VALID))
                raw[at:] = other[draw(st.integers(0, len(other))) :]
            case "insert":
                raw[at:at] = draw(st.binary(max_size=8))
            case _:  # the largest varint in place of whatever stands here
                raw[at : at + 1] = b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"
    return bytes(raw)


@pytest.mark.parametrize("name", PARSERS)
@given(raw=st.one_of(mutated(), mutated(), st.binary(max_size=200)))
@settings(deadline=None, max_examples=60)
def test_any_bytes_are_a_value_or_the_peers_fault(name: str, raw: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        PARSERS[name](raw)


@pytest.mark.parametrize("name", [name for name in BODIES if name != "SignedBytes"])
@given(raw=mutated())
@settings(deadline=None, max_examples=30)
def test_what_decodes_survives_another_round_trip(name: str, raw: bytes) -> None:
    kind = type(BODIES[name])
    try:
        value = kind.decode(raw)
    except RemoteProtocolError:
        return
    assert kind.decode(value.encode()) == value


@pytest.mark.parametrize("name", BODIES)
def test_every_truncation_of_a_body_is_a_value_or_the_peers_fault(name: str) -> None:
    raw = BODIES[name].encode()
    for end in range(len(raw)):
        with contextlib.suppress(RemoteProtocolError):
            type(BODIES[name]).decode(raw[:end])


@pytest.mark.parametrize("name", [name for name in BODIES if name not in ("SignedBytes", "Chunk")])
def test_a_field_of_a_newer_peer_is_ignored(name: str) -> None:
    unknown = b"\xfa\x3f\x03new\xf8\x3f\x07"  # fields 1023, a string and a number
    assert type(BODIES[name]).decode(BODIES[name].encode() + unknown) == BODIES[name]


@given(
    topic=st.one_of(
        st.text(max_size=80),
        st.lists(
            st.sampled_from(
                ["fl", "1", FEDERATION, "up", "e", str(shard_of(DEVICE)), DEVICE, "", "#", "+", "\0"]
            ),
            max_size=8,
        ).map("/".join),
    )
)
@settings(deadline=None, max_examples=300)
def test_any_topic_is_a_senders_or_the_peers_fault(topic: str) -> None:
    with contextlib.suppress(RemoteProtocolError):
        sender = topics.sender_of(topic)
        assert topic in (topics.up(*sender), topics.enrol(*sender))
    with contextlib.suppress(RemoteProtocolError):
        INTAKE.accept(topic, SAMPLES[2].messages[0])


@given(text=st.one_of(st.text(max_size=60), st.from_regex(r"[a-z0-9_-]{1,50}\n?", fullmatch=True)))
def test_a_name_holds_nothing_that_means_something_in_a_topic_or_a_path(text: str) -> None:
    for name in (federation_id, device_id):
        with contextlib.suppress(RemoteProtocolError):
            accepted = name(text)
            assert 1 <= len(accepted) <= 48
            assert not set(accepted) - set("abcdefghijklmnopqrstuvwxyz0123456789_-")


@given(
    text=st.one_of(st.text(), st.text(alphabet="ABCabc019-_", max_size=200).map("fleetgrad-enrol-1.".__add__))
)
def test_any_text_is_a_token_or_a_token_error(text: str) -> None:
    with contextlib.suppress(TokenError):
        EnrolToken.parse(text)


# ---- envelopes --------------------------------------------------------------------------------------


@given(
    payload=st.binary(max_size=2000),
    piece_bytes=st.one_of(st.none(), st.integers(1, 3000)),
    round_id=st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
    sequence=st.integers(0, 2**64 - 1),
)
@settings(deadline=None, max_examples=60)
def test_a_payload_survives_packing_in_pieces_of_any_size(
    payload: bytes, piece_bytes: int | None, round_id: tuple[int, int], sequence: int
) -> None:
    header = Header(
        kind=Kind.UPDATE,
        federation=federation_id("f" * 48),
        round_id=type(ROUND)(*round_id),
        manifest_digest=samples.MANIFEST_DIGEST,
        device=device_id("d" * 48),
        sequence=sequence,
        payload_digest=samples.MANIFEST_DIGEST,
    )
    messages = list(pack(header, payload, lambda message: bytes(64), piece_bytes))
    assembler: PieceAssembler | None = None
    for index, raw in enumerate(messages):
        topic = topics.up(header.federation, header.device or DEVICE)
        assert len(raw) + len(topic) + 16 <= (piece_bytes or len(payload)) + OVERHEAD_BYTES
        envelope = unpack(raw, header.federation, Kind.UPDATE)
        got = envelope.header
        assert (got.round_id, got.sequence, got.device) == (round_id, sequence, header.device)
        assembler = assembler or PieceAssembler(got.chunk_count, got.payload_digest, 1 << 29)
        assert assembler.add(index, got.chunk_count, got.payload_digest, envelope.body)
    assert assembler is not None
    assert assembler.content() == payload


@pytest.mark.parametrize("sample", [one for one in SAMPLES if one.signer], ids=lambda one: one.name)
@given(data=st.data())
@settings(deadline=None, max_examples=25)
def test_no_field_of_a_signed_message_can_be_changed(sample: samples.Sample, data: st.DataObject) -> None:
    """One bit, anywhere: it is refused, or the signature fails, or the message is the very same."""
    raw = bytearray(data.draw(st.sampled_from(sample.messages)))
    honest = unpack(bytes(raw), FEDERATION, sample.header.kind)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        envelope: Envelope = unpack(bytes(raw), FEDERATION, sample.header.kind)
        CRYPTO.verify(samples.verify_key(sample.signer), envelope.signed_bytes(), envelope.signature)
    except RemoteProtocolError:
        return
    assert envelope == honest


@given(pair=st.tuples(st.sampled_from(SAMPLES), st.sampled_from(SAMPLES)))
def test_a_signature_serves_its_own_message_only(pair: tuple[samples.Sample, samples.Sample]) -> None:
    one, other = pair
    assume(one.signer and other.signer and one.header.kind is not other.header.kind)
    stolen = parse(wire.Envelope, other.messages[0]).signature
    envelope = unpack(one.messages[0], FEDERATION, one.header.kind)
    with pytest.raises(RemoteProtocolError, match="bad_signature"):
        CRYPTO.verify(samples.verify_key(other.signer), envelope.signed_bytes(), stolen)


def test_too_many_pieces_and_too_large_payloads_are_our_own_fault() -> None:
    header = SAMPLES[3].header
    with pytest.raises(LocalProtocolError, match="pieces"):
        next(pack(header, bytes(70_000), lambda message: bytes(64), 1))
    with pytest.raises(LocalProtocolError, match="above"):
        next(pack(SAMPLES[6].header, bytes(17_000), lambda message: bytes(64)))
    with pytest.raises(LocalProtocolError, match="signed by"):
        next(pack(header, b"", None))
