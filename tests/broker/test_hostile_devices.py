"""A running aggregator among hostile messages: each refusal is counted under its name, told to its sender, and the
honest device's update is aggregated as if nothing else had been said."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.protocol import certificates, topics
from edge_runtime.protocol.certificates import check_aggregator
from edge_runtime.protocol.crypto.keys import SealingPublicKey, SigningKey, VerifyKey
from edge_runtime.protocol.crypto.provider import CRYPTO
from edge_runtime.protocol.envelope import Header, pack, seal_context, unpack
from edge_runtime.protocol.identities import DeviceCertificate
from edge_runtime.protocol.ids import DeviceId, FederationId, RoundId, sha256
from edge_runtime.protocol.kinds import Kind
from edge_runtime.protocol.manifest import Manifest
from edge_runtime.protocol.messages import CheckIn, Fetch, Receipt, Telemetry, Update
from edge_runtime.protocol.rejects import Reject
from edge_runtime.protocol.rounds import FederationState, Verdict
from edge_runtime.store import DeviceStore
from tests.support.brokers import mosquitto_installed, receive
from tests.support.federation import Federation, federation
from tests.support.programs import eventually
from tests.support.traffic import FEDERATION

HONEST, HOSTILE, STRANGER = DeviceId("device-0"), DeviceId("device-1"), DeviceId("stranger")
PARAMETERS = 38_282  # of the digits network; checked against the manifest below


class Attacker:
    """An enrolled device that says what it likes, correctly signed unless told otherwise."""

    def __init__(self, fed: Federation) -> None:
        with DeviceStore(fed.folder / HOSTILE) as store:
            enrolment = store.enrolment
            assert enrolment is not None
            self.certificate, self.root = enrolment.certificate, enrolment.root_key
            self.key = store.signing_key(lambda: pytest.fail("it has a key"))
        self.transport = fed.broker.transport("attacker")
        self.transport.open()
        self.transport.subscribe(topics.manifest(FEDERATION))
        self.sequence = 0
        self.sealing_key = bytes(32)
        self.manifest = self.take_manifest(FederationState.WAITING)

    def take_manifest(self, state: FederationState) -> Manifest:
        while True:
            event = receive(self.transport, topics.manifest(FEDERATION))
            self.transport.ack(event)
            envelope = unpack(event.payload, FEDERATION, Kind.MANIFEST)
            manifest = Manifest.decode(envelope.body)
            if manifest.state is state:
                self.manifest, self.digest = manifest, sha256(envelope.body)
                certificate = check_aggregator(
                    CRYPTO, self.root, manifest.certificate, FEDERATION, manifest.round_id
                )
                self.sealing_key = certificate.sealing_key
                return manifest

    def header(self, kind: Kind, **changed: object) -> Header:
        self.sequence += 1
        good = Header(
            kind=kind,
            federation=FEDERATION,
            round_id=self.manifest.round_id if kind is Kind.UPDATE else RoundId(1, 0),
            manifest_digest=self.digest if kind is Kind.UPDATE else None,
            device=HOSTILE,
            sequence=self.sequence,
            payload_digest=sha256(),
        )
        return replace(good, **changed)  # type: ignore[arg-type]

    def message(
        self, kind: Kind, plain: bytes, *, key: SigningKey | None = None, to: bytes | None = None, **changed: object
    ) -> bytes:  # fmt: skip
        header = self.header(kind, **changed)
        if kind.sealed:
            at = self.manifest.sealing_key if kind is Kind.UPDATE else self.sealing_key
            plain = CRYPTO.seal(
                SealingPublicKey(to or at), seal_context(header), b"", plain, self.sequence.to_bytes(32, "little")
            )  # fmt: skip
        (raw,) = pack(header, plain, lambda message: CRYPTO.sign(key or self.key, message))
        return raw

    def say(self, payload: bytes, *, on: str | None = None) -> None:
        self.transport.publish(on or topics.up(FEDERATION, HOSTILE), payload)

    def receipt(self, sent: bytes) -> Receipt:
        """The verified answer to an update."""
        digest = unpack(sent, FEDERATION, Kind.UPDATE).header.payload_digest
        while True:
            event = receive(self.transport, topics.down(FEDERATION, HOSTILE))
            self.transport.ack(event)
            envelope = unpack(event.payload, FEDERATION, Kind.RECEIPT)
            certificate = check_aggregator(
                CRYPTO, self.root, self.manifest.certificate, FEDERATION, self.manifest.round_id
            )
            CRYPTO.verify(VerifyKey(certificate.signing_key), envelope.signed_bytes(), envelope.signature)
            receipt = Receipt.decode(envelope.body)
            if receipt.update_digest == digest:
                return receipt


def check_in(certificate: bytes) -> bytes:
    return CheckIn(
        certificate=certificate, ttl_s=600, samples=9, free_memory_bytes=1, codecs=("float32",), runtime="x"
    ).encode()


def update(values: np.ndarray | None = None, *, codec: str = "float32", raw: bytes | None = None) -> bytes:
    delta = np.zeros(PARAMETERS, "<f4") if values is None else values.astype("<f4")
    content = delta.tobytes() if raw is None else raw
    count = PARAMETERS if values is None else values.size
    return Update(
        samples=9, steps=1, loss_first=1, loss_last=1, codec=codec, delta=content, parameter_count=count
    ).encode()


def with_value(value: float) -> np.ndarray:
    values = np.zeros(PARAMETERS)
    values[77] = value
    return values


@pytest.mark.skipif(not mosquitto_installed(), reason="needs mosquitto")
def test_every_hostile_message_is_counted_under_its_name_and_the_honest_update_is_aggregated(tmp_path: Path):
    with federation(
        tmp_path,
        samples=(160, 160),
        gated=[HONEST],
        round__rounds=1,
        round__goal=1,
        round__minimum=1,
        plan__codecs=["int8-block+zstd", "float32"],
    ) as fed:
        fed.aggregator.start()
        fed.aggregator.wait_for("connected")
        attacker = Attacker(fed)
        try:
            hostile_run(fed, attacker)
        finally:
            attacker.transport.close()


def hostile_run(fed: Federation, attacker: Attacker) -> None:
    expected: Counter[Reject] = Counter()

    def refused(reject: Reject, payload: bytes, *, on: str | None = None) -> None:
        attacker.say(payload, on=on)
        expected[reject] += 1

    own = attacker.certificate
    root = CRYPTO.generate_signing_key(hashlib.sha256(b"not the root").digest())
    key = CRYPTO.verify_key(attacker.key).raw
    self_made = DeviceCertificate(federation=FEDERATION, device=HOSTILE, signing_key=key)
    thief = CRYPTO.generate_signing_key(hashlib.sha256(b"thief").digest())

    # Before it is known at all, and with certificates that are not the root's word.
    refused(Reject.UNKNOWN_DEVICE, attacker.message(Kind.FETCH, Fetch(digest=sha256(), wave=True).encode()))
    for certificate in (certificates.issue_device(CRYPTO, root, self_made), own[:-1] + bytes([own[-1] ^ 1])):
        refused(Reject.BAD_CERTIFICATE, attacker.message(Kind.CHECKIN, check_in(certificate)))

    # It is one of the two who were checked in, so it is selected.
    ticket = attacker.message(Kind.CHECKIN, check_in(own))
    attacker.say(ticket)
    attacker.transport.subscribe(topics.down(FEDERATION, HOSTILE))
    fed.devices[HONEST].start()
    manifest = attacker.take_manifest(FederationState.COLLECTING)
    assert manifest.parameter_count == PARAMETERS
    fed.wait_at_gate(HONEST)

    # What is no message of this device to this federation.
    refused(Reject.MALFORMED, b"")
    refused(Reject.MALFORMED, b"\xff" * 300)
    refused(Reject.REPLAYED, ticket)
    refused(Reject.BAD_SEAL, attacker.message(Kind.CHECKIN, check_in(own), to=CRYPTO.sealing_public_key(
        CRYPTO.generate_sealing_key(bytes(range(32)))).raw))  # fmt: skip
    other = attacker.message(
        Kind.FETCH, Fetch(digest=sha256(), wave=True).encode(), federation=FederationId("else")
    )
    refused(Reject.WRONG_FEDERATION, other)
    refused(Reject.UNEXPECTED_KIND, attacker.message(Kind.MANIFEST, manifest.encode()))
    refused(Reject.UNKNOWN_BLOB, attacker.message(Kind.FETCH, Fetch(digest=sha256(), wave=True).encode()))
    good = update()
    refused(Reject.WRONG_TOPIC, attacker.message(Kind.UPDATE, good), on=topics.up(FEDERATION, HONEST))
    refused(Reject.WRONG_TOPIC, attacker.message(Kind.UPDATE, good), on=f"fl/1/{FEDERATION}/up/0/{HOSTILE}")
    refused(Reject.BAD_SIGNATURE, attacker.message(Kind.UPDATE, good, key=thief))
    stolen = attacker.message(Kind.UPDATE, good, device=HONEST)
    refused(Reject.BAD_SIGNATURE, stolen, on=topics.up(FEDERATION, HONEST))
    nobody = attacker.message(Kind.UPDATE, good, device=STRANGER)
    refused(Reject.UNKNOWN_DEVICE, nobody, on=topics.up(FEDERATION, STRANGER))
    changed = bytearray(attacker.message(Kind.UPDATE, good))
    changed[len(changed) // 2] ^= 1
    refused(Reject.BAD_DIGEST, bytes(changed))
    telemetry = Telemetry(**dict.fromkeys(Telemetry.__dataclass_fields__, 0)).encode()
    refused(Reject.REPLAYED, attacker.message(Kind.TELEMETRY, telemetry, sequence=1))

    # Updates: authentic, and wrong. The sender is told.
    now = manifest.round_id
    wrong: list[tuple[Reject, bytes]] = [
        (Reject.WRONG_ROUND, attacker.message(Kind.UPDATE, good, round_id=RoundId(1, now.number + 1))),
        (Reject.WRONG_ROUND, attacker.message(Kind.UPDATE, good, round_id=RoundId(2, now.number))),
        (Reject.WRONG_MANIFEST, attacker.message(Kind.UPDATE, good, manifest_digest=sha256(b"another"))),
        (Reject.BAD_SEAL, attacker.message(Kind.UPDATE, good, to=attacker.sealing_key)),
        (Reject.MALFORMED, attacker.message(Kind.UPDATE, b"\xff" * 80)),
        (Reject.WRONG_SIZE, attacker.message(Kind.UPDATE, update(np.zeros(PARAMETERS + 1)))),
        (Reject.WRONG_SIZE, attacker.message(Kind.UPDATE, update(np.zeros(PARAMETERS - 1)))),
        (Reject.BAD_ENCODING, attacker.message(Kind.UPDATE, update(codec="int8-block+zstd", raw=b"junk"))),
        (Reject.UNKNOWN_CODEC, attacker.message(Kind.UPDATE, update(codec="pickle"))),
        (Reject.NOT_FINITE, attacker.message(Kind.UPDATE, update(with_value(np.nan)))),
        (Reject.NOT_FINITE, attacker.message(Kind.UPDATE, update(with_value(-np.inf)))),
        (Reject.OUT_OF_RANGE, attacker.message(Kind.UPDATE, update(with_value(1e30)))),
    ]
    for reject, payload in wrong:
        refused(reject, payload)
        receipt = attacker.receipt(payload)
        assert (receipt.verdict, receipt.reject) == (Verdict.REJECTED, reject)

    total = sum(expected.values())
    eventually(lambda: len(fed.aggregator.seen("refused")) >= total, f"{total} refusals")
    assert fed.aggregator.running
    fed.open_gate(HONEST)
    models = fed.finish()
    status = fed.status()
    assert status["refused"] == {reject.name.lower(): count for reject, count in expected.items()}
    assert fed.aggregator.seen("round_frozen")[0].fields["accepted"] == [HONEST]
    assert status["outcomes"] == {"aggregated": 1}
    assert status["invariant_violations"] == []
    assert models == {row["version"]: row["model_sha256"] for row in status["versions"]}
    assert len(models) == 1
    assert "Traceback" not in fed.aggregator.errors()
