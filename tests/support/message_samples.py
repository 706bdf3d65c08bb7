"""One value of every message and one envelope of every kind, made from fixed keys: for vectors and for mutation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from edge_runtime.protocol import certificates
from edge_runtime.protocol.crypto.keys import SealingPrivateKey, SigningKey, VerifyKey
from edge_runtime.protocol.crypto.provider import CRYPTO
from edge_runtime.protocol.envelope import Header, pack, seal_context
from edge_runtime.protocol.identities import (
    AggregatorCertificate,
    DeviceCertificate,
    EnrolAnswer,
    EnrolRequest,
    Revocation,
    RevocationList,
    SignedBytes,
)
from edge_runtime.protocol.ids import DeviceId, FederationId, RoundId, sha256
from edge_runtime.protocol.kinds import Kind, Signer
from edge_runtime.protocol.manifest import BlobRef, Cohort, Manifest
from edge_runtime.protocol.messages import CheckIn, Chunk, Fetch, Receipt, Telemetry, Update
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.rejects import Reject
from edge_runtime.protocol.rounds import FederationState, Verdict
from edge_runtime.protocol.schedules import Schedule

FEDERATION = FederationId("digits")
DEVICE = DeviceId("pi-3")
ROUND = RoundId(2, 7)
NO_ROUND = RoundId(0, 0)
EPHEMERAL = bytes(range(0xE0, 0x100))


def _secret(tag: int) -> bytes:
    return bytes(range(tag, tag + 32))


ROOT: SigningKey = CRYPTO.generate_signing_key(_secret(0x00))
DEVICE_KEY: SigningKey = CRYPTO.generate_signing_key(_secret(0x20))
AGGREGATOR_KEY: SigningKey = CRYPTO.generate_signing_key(_secret(0x40))
AGGREGATOR_SEALING: SealingPrivateKey = CRYPTO.generate_sealing_key(_secret(0x60))
ROUND_SEALING: SealingPrivateKey = CRYPTO.generate_sealing_key(_secret(0x80))
REGISTRAR_SEALING: SealingPrivateKey = CRYPTO.generate_sealing_key(_secret(0xA0))
TOKEN_SECRET = _secret(0xC0)

SECRETS: dict[str, SigningKey | SealingPrivateKey] = {
    "root": ROOT,
    "device": DEVICE_KEY,
    "aggregator": AGGREGATOR_KEY,
    "aggregator_sealing": AGGREGATOR_SEALING,
    "round_sealing": ROUND_SEALING,
    "registrar_sealing": REGISTRAR_SEALING,
}


def public(key: SigningKey | SealingPrivateKey) -> bytes:
    if isinstance(key, SigningKey):
        return CRYPTO.verify_key(key).raw
    return CRYPTO.sealing_public_key(key).raw


DEVICE_CERTIFICATE = DeviceCertificate(federation=FEDERATION, device=DEVICE, signing_key=public(DEVICE_KEY))
AGGREGATOR_CERTIFICATE = AggregatorCertificate(
    federation=FEDERATION,
    signing_key=public(AGGREGATOR_KEY),
    sealing_key=public(AGGREGATOR_SEALING),
    generation=2,
    first_round=0,
    last_round=1000,
)
DEVICE_CERTIFICATE_SIGNED = certificates.issue_device(CRYPTO, ROOT, DEVICE_CERTIFICATE)
AGGREGATOR_CERTIFICATE_SIGNED = certificates.issue_aggregator(CRYPTO, ROOT, AGGREGATOR_CERTIFICATE)
REVOCATIONS = RevocationList(
    federation=FEDERATION,
    number=5_000_000_000,
    entries=(Revocation(device=DeviceId("pi-1"), epoch=300), Revocation(device=DeviceId("pi-10"), epoch=1)),
)
REVOCATIONS_SIGNED = certificates.issue_revocations(CRYPTO, ROOT, REVOCATIONS)

UPDATE = Update(
    samples=179,
    steps=18,
    loss_first=2.25,
    loss_last=0.5,
    codec="float32",
    delta=bytes(range(96)),
    parameter_count=24,
)
MANIFEST = Manifest(
    federation=FEDERATION,
    round_id=ROUND,
    state=FederationState.COLLECTING,
    base_version=6,
    deadline_unix_ms=1_800_000_000_000,
    plan=Plan(
        epochs=3,
        steps=0,
        batch_size=32,
        optimizer="sgd",
        learning_rate=0.125,
        momentum=0.875,
        nesterov=True,
        weight_decay=0.0625,
        schedule=Schedule(shape="step", factor=0.5, every=20, after=10, warmup_rounds=3),
        max_grad_norm=5.0,
        beta=0.5,
        sample_cap=1000,
        max_abs_delta=8.0,
        scale_bits=30,
        codecs=("int8-block+zstd", "float32"),
    ),
    model=BlobRef(digest=sha256(b"model"), size=96),
    artifact=BlobRef(digest=sha256(b"artifact"), size=4000),
    cohort=BlobRef(digest=sha256(b"cohort"), size=12),
    sealing_key=public(ROUND_SEALING),
    chunk_bytes=262_144,
    certificate=AGGREGATOR_CERTIFICATE_SIGNED,
    parameter_count=24,
)
MANIFEST_DIGEST = sha256(MANIFEST.encode())
WAITING = replace(
    MANIFEST,
    state=FederationState.WAITING,
    plan=Plan(
        epochs=0,
        steps=50,
        optimizer="adamw",
        adam_beta1=0.75,
        adam_beta2=0.984375,
        adam_epsilon=0.0009765625,
        schedule=Schedule(shape="cosine", factor=0.25, rounds=60),
    ),
    cohort=None,
    sealing_key=b"",
)
ENROL_REQUEST = EnrolRequest(
    token_id="0123456789abcdef", token_secret=TOKEN_SECRET, signing_key=public(DEVICE_KEY)
)

BODIES: dict[str, Any] = {
    "EnrolRequest": ENROL_REQUEST,
    "CheckIn": CheckIn(
        certificate=DEVICE_CERTIFICATE_SIGNED,
        ttl_s=600,
        samples=179,
        free_memory_bytes=3_000_000_000,
        codecs=("float32", "int8-block+zstd"),
        runtime="onnxruntime 1.22.0",
    ),
    "Fetch, wave": Fetch(digest=sha256(b"model"), wave=True),
    "Fetch, pull": Fetch(digest=sha256(b"model"), wave=False, want_index=True, chunks=(0, 3, 300)),
    "Update": UPDATE,
    "Telemetry": Telemetry(
        train_s=1.5,
        steps=18,
        samples=179,
        peak_memory_bytes=90_000_000,
        bytes_up=100_000,
        bytes_down=400_000,
        temperature_c=48.25,
        resends=1,
    ),
    "EnrolAnswer, enrolled": EnrolAnswer(
        reject=None, certificate=DEVICE_CERTIFICATE_SIGNED, request_digest=sha256(b"request")
    ),
    "EnrolAnswer, refused": EnrolAnswer(
        reject=Reject.TOKEN_USED, certificate=b"", request_digest=sha256(b"request")
    ),
    "Receipt, stored": Receipt(
        verdict=Verdict.STORED, reject=None, update_digest=sha256(b"update"), capped=True
    ),
    "Receipt, late": Receipt(verdict=Verdict.LATE, reject=None, update_digest=sha256(b"update")),
    "Receipt, rejected": Receipt(
        verdict=Verdict.REJECTED, reject=Reject.NOT_FINITE, update_digest=sha256(b"update")
    ),
    "Chunk": Chunk(digest=sha256(b"blob"), index=3, content=b"content"),
    "Chunk, index": Chunk(digest=sha256(b"blob"), index=None, content=b"FLB1"),
    "Manifest, collecting": MANIFEST,
    "Manifest, waiting": WAITING,
    "Cohort": Cohort(devices=(DeviceId("pi-1"), DeviceId("pi-3"))),
    "DeviceCertificate": DEVICE_CERTIFICATE,
    "AggregatorCertificate": AGGREGATOR_CERTIFICATE,
    "RevocationList": REVOCATIONS,
    "SignedBytes": SignedBytes.decode(DEVICE_CERTIFICATE_SIGNED),
    "Header": Header(
        kind=Kind.UPDATE,
        federation=FEDERATION,
        round_id=ROUND,
        manifest_digest=MANIFEST_DIGEST,
        device=DEVICE,
        sequence=5_000_000_000,
        chunk_index=1,
        chunk_count=4,
        payload_digest=sha256(b"payload"),
    ),
}


@dataclass(frozen=True)
class Sample:
    """A packed message. ``plain``: the encoded body; ``payload``: what travels, sealed or the same.

    ``signer`` and ``sealed_to`` name keys of ``SECRETS``; empty: not signed, not sealed.
    """

    name: str
    header: Header
    plain: bytes
    payload: bytes
    messages: tuple[bytes, ...]
    signer: str
    sealed_to: str
    piece_bytes: int | None = None


_SIGNERS = {Signer.DEVICE: "device", Signer.AGGREGATOR: "aggregator", Signer.ROOT: "root", Signer.CONTENT: ""}
_SEALED_TO = {Kind.ENROL: "registrar_sealing", Kind.UPDATE: "round_sealing"}


def sample(
    name: str,
    kind: Kind,
    plain: bytes,
    *,
    round_id: RoundId = NO_ROUND,
    manifest: bool = False,
    device: bool = True,
    sequence: int = 0,
    piece_bytes: int | None = None,
) -> Sample:
    header = Header(
        kind=kind,
        federation=FEDERATION,
        round_id=round_id,
        manifest_digest=MANIFEST_DIGEST if manifest else None,
        device=DEVICE if device else None,
        sequence=sequence,
        payload_digest=sha256(),
    )
    signer = _SIGNERS[kind.signer]
    sealed_to = _SEALED_TO.get(kind, "aggregator_sealing") if kind.sealed else ""
    payload = plain
    if sealed_to:
        recipient = SECRETS[sealed_to]
        assert isinstance(recipient, SealingPrivateKey)
        payload = CRYPTO.seal(
            CRYPTO.sealing_public_key(recipient), seal_context(header), b"", plain, EPHEMERAL
        )
    key = SECRETS.get(signer)
    assert key is None or isinstance(key, SigningKey)
    sign = (lambda message: CRYPTO.sign(key, message)) if key else None
    messages = tuple(pack(header, payload, sign, piece_bytes))
    return Sample(name, header, plain, payload, messages, signer, sealed_to, piece_bytes)


_GENERATION_ONLY = RoundId(ROUND.generation, 0)
SAMPLES: tuple[Sample, ...] = (
    sample("enrol", Kind.ENROL, ENROL_REQUEST.encode()),
    sample("checkin", Kind.CHECKIN, BODIES["CheckIn"].encode(), round_id=_GENERATION_ONLY, sequence=1),
    sample("fetch", Kind.FETCH, BODIES["Fetch, pull"].encode(), round_id=_GENERATION_ONLY, sequence=2),
    sample("update", Kind.UPDATE, UPDATE.encode(), round_id=ROUND, manifest=True, sequence=3),
    sample(
        "update in pieces of 64 bytes",
        Kind.UPDATE,
        UPDATE.encode(),
        round_id=ROUND,
        manifest=True,
        sequence=3,
        piece_bytes=64,
    ),
    sample("telemetry", Kind.TELEMETRY, BODIES["Telemetry"].encode(), round_id=_GENERATION_ONLY, sequence=4),
    sample("receipt", Kind.RECEIPT, BODIES["Receipt, stored"].encode(), round_id=ROUND, manifest=True),
    sample("chunk of a wave", Kind.CHUNK, BODIES["Chunk"].encode(), device=False),
    sample("chunk of a pull", Kind.CHUNK, BODIES["Chunk, index"].encode()),
    sample("enrolled", Kind.ENROLLED, BODIES["EnrolAnswer, enrolled"].encode()),
    sample("manifest", Kind.MANIFEST, MANIFEST.encode(), round_id=ROUND, device=False),
)


def verify_key(name: str) -> VerifyKey:
    key = SECRETS[name]
    assert isinstance(key, SigningKey)
    return CRYPTO.verify_key(key)


def sealing_key(name: str) -> SealingPrivateKey:
    key = SECRETS[name]
    assert isinstance(key, SealingPrivateKey)
    return key
