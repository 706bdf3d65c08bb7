from __future__ import annotations

from dataclasses import replace

import pytest

from aggregator.intake import (
    CheckInRequest,
    FetchRequest,
    Intake,
    KnownDevice,
    TelemetryReport,
    UpdatePiece,
    open_update,
)
from edge_runtime.protocol import certificates, topics
from edge_runtime.protocol.crypto.keys import SealingPrivateKey, SigningKey
from edge_runtime.protocol.crypto.provider import CRYPTO
from edge_runtime.protocol.envelope import Header, pack, seal_context
from edge_runtime.protocol.errors import RemoteProtocolError
from edge_runtime.protocol.identities import DeviceCertificate
from edge_runtime.protocol.ids import DeviceId, FederationId, RoundId, sha256
from edge_runtime.protocol.kinds import Kind
from edge_runtime.protocol.messages import CheckIn, Fetch, Telemetry
from edge_runtime.protocol.rejects import Reject
from tests.support.session_driver import an_update, sealing_key, signing_key

FEDERATION, DEVICE, OTHER = FederationId("digits"), DeviceId("pi-3"), DeviceId("pi-4")
ROOT, KEY, THIEF = signing_key(1), signing_key(2), signing_key(3)
SEALING, ROUND_KEY = sealing_key(4), sealing_key(5)
UP = topics.up(FEDERATION, DEVICE)


def _certificate(
    *,
    device: DeviceId = DEVICE,
    federation: FederationId = FEDERATION,
    key: SigningKey = KEY,
    root: SigningKey = ROOT,
    epoch: int = 1,
    role: int = 1,
) -> bytes:
    certificate = DeviceCertificate(
        federation=federation,
        device=device,
        signing_key=CRYPTO.verify_key(key).raw,
        epoch=epoch,
        role=role,
    )
    return certificates.issue_device(CRYPTO, root, certificate)


def _checkin(certificate: bytes | None = None) -> bytes:
    return CheckIn(
        certificate=_certificate() if certificate is None else certificate,
        ttl_s=600,
        samples=10,
        free_memory_bytes=1,
        codecs=("float32",),
        runtime="test",
    ).encode()


def _message(
    kind: Kind,
    plain: bytes,
    *,
    device: DeviceId = DEVICE,
    federation: FederationId = FEDERATION,
    key: SigningKey = KEY,
    sequence: int = 1,
    sealed_to: SealingPrivateKey | None = SEALING,
    sealed_as: Header | None = None,
    piece_bytes: int | None = None,
) -> list[bytes]:
    header = Header(
        kind=kind,
        federation=federation,
        round_id=RoundId(1, 0),
        device=device,
        sequence=sequence,
        payload_digest=sha256(),
    )
    if kind.sealed and sealed_to is not None:
        plain = CRYPTO.seal(
            CRYPTO.sealing_public_key(sealed_to), seal_context(sealed_as or header), b"", plain, bytes(32)
        )
    return list(pack(header, plain, lambda message: CRYPTO.sign(key, message), piece_bytes))


def _intake(**known: KnownDevice) -> Intake:
    return Intake(
        federation=FEDERATION,
        provider=CRYPTO,
        root=CRYPTO.verify_key(ROOT),
        sealing_key=SEALING,
        lookup=lambda device: known.get(device.replace("-", "_")),
    )


def _known(key: SigningKey = KEY, *, epoch: int = 1, last: int = 0) -> KnownDevice:
    return KnownDevice(signing_key=CRYPTO.verify_key(key).raw, epoch=epoch, last_sequence=last)


def _refused(intake: Intake, reject: Reject, payload: bytes, topic: str = UP) -> None:
    with pytest.raises(RemoteProtocolError) as refusal:
        intake.accept(topic, payload)
    assert refusal.value.reject is reject, refusal.value


FETCH = Fetch(digest=sha256(b"blob"), wave=True).encode()
TELEMETRY = Telemetry(steps=3).encode()
PLAIN = {Kind.CHECKIN: _checkin(), Kind.FETCH: FETCH, Kind.UPDATE: b"sealed", Kind.TELEMETRY: TELEMETRY}
KINDS = list(PLAIN)


# ---- what is accepted -------------------------------------------------------------------------------


def test_the_first_check_in_brings_the_certificate_along() -> None:
    (raw,) = _message(Kind.CHECKIN, _checkin())
    request = _intake().accept(UP, raw)
    assert isinstance(request, CheckInRequest)
    assert request.device == request.certificate.device == DEVICE
    assert request.checkin == CheckIn.decode(_checkin())


def test_a_known_device_fetches_reports_and_updates() -> None:
    intake = _intake(pi_3=_known())
    (fetch,), (report,) = _message(Kind.FETCH, FETCH), _message(Kind.TELEMETRY, TELEMETRY)
    assert intake.accept(UP, fetch) == FetchRequest(DEVICE, Fetch.decode(FETCH))
    got = intake.accept(UP, report)
    assert isinstance(got, TelemetryReport)
    assert got.telemetry == Telemetry(steps=3)
    pieces = _message(Kind.UPDATE, an_update(bytes(500)).encode(), sealed_to=ROUND_KEY, piece_bytes=200)
    accepted = [intake.accept(UP, raw) for raw in pieces]
    assert len(pieces) == 3
    assert all(isinstance(piece, UpdatePiece) for piece in accepted)
    sealed = b"".join(piece.envelope.body for piece in accepted if isinstance(piece, UpdatePiece))
    header = accepted[-1].envelope.header  # type: ignore[union-attr]
    assert open_update(CRYPTO, ROUND_KEY, header, sealed) == an_update(bytes(500))


def test_a_key_of_a_later_epoch_takes_over_and_the_old_one_is_out() -> None:
    new = _certificate(key=THIEF, epoch=2)
    (raw,) = _message(Kind.CHECKIN, _checkin(new), key=THIEF, sequence=1)
    assert isinstance(_intake(pi_3=_known(last=50)).accept(UP, raw), CheckInRequest)
    (old,) = _message(Kind.CHECKIN, _checkin(), sequence=51)
    _refused(_intake(pi_3=_known(THIEF, epoch=2)), Reject.BAD_CERTIFICATE, old)


def test_a_certificate_of_the_committee_is_no_ticket_to_a_round() -> None:
    (raw,) = _message(Kind.CHECKIN, _checkin(_certificate(role=2)))
    _refused(_intake(), Reject.BAD_CERTIFICATE, raw)


# ---- topic and envelope -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "topic",
    [
        topics.up(FEDERATION, OTHER),
        topics.up(FederationId("other"), DEVICE),
        UP.replace("/up/", "/up/0"),
        UP.rsplit("/", 2)[0] + "/0/" + DEVICE,
        topics.enrol(FEDERATION, DEVICE),
        topics.down(FEDERATION, DEVICE),
        topics.manifest(FEDERATION),
        UP + "/",
        "",
    ],
)
def test_a_message_on_a_topic_that_is_not_its_senders_is_refused(kind: Kind, topic: str) -> None:
    raw = _message(kind, PLAIN[kind])[0]
    _refused(_intake(pi_3=_known(), pi_4=_known()), Reject.WRONG_TOPIC, raw, topic)


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_cannot_speak_for_another(kind: Kind) -> None:
    raw = _message(kind, PLAIN[kind], device=OTHER)[0]
    _refused(_intake(pi_3=_known(), pi_4=_known()), Reject.WRONG_TOPIC, raw)
    _refused(
        _intake(pi_3=_known(), pi_4=_known(THIEF)),
        Reject.BAD_CERTIFICATE if kind is Kind.CHECKIN else Reject.BAD_SIGNATURE,
        raw,
        topics.up(FEDERATION, OTHER),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_another_federation_is_refused(kind: Kind) -> None:
    other = FederationId("other")
    raw = _message(kind, PLAIN[kind], federation=other)[0]
    _refused(_intake(pi_3=_known()), Reject.WRONG_FEDERATION, raw, topics.up(other, DEVICE))


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind not in KINDS])
def test_a_kind_that_is_not_for_the_aggregator_is_refused(kind: Kind) -> None:
    header = Header(kind=kind, federation=FEDERATION, device=DEVICE, payload_digest=sha256())
    (raw,) = pack(header, b"", None if kind is Kind.CHUNK else lambda message: CRYPTO.sign(KEY, message))
    _refused(_intake(pi_3=_known()), Reject.UNEXPECTED_KIND, raw)


@pytest.mark.parametrize("kind", [Kind.CHECKIN, Kind.FETCH, Kind.TELEMETRY])
def test_only_an_update_may_come_in_pieces(kind: Kind) -> None:
    for raw in _message(kind, PLAIN[kind], piece_bytes=20):
        _refused(_intake(pi_3=_known()), Reject.MALFORMED, raw)


def test_a_payload_that_is_not_the_announced_one_is_refused() -> None:
    (raw,) = _message(Kind.FETCH, FETCH)
    _refused(_intake(pi_3=_known()), Reject.BAD_DIGEST, raw.replace(FETCH, FETCH[:-1] + b"\x00"))


# ---- identity, signature, seal ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Kind.FETCH, Kind.UPDATE, Kind.TELEMETRY])
def test_a_device_nobody_has_seen_must_check_in_first(kind: Kind) -> None:
    _refused(_intake(), Reject.UNKNOWN_DEVICE, _message(kind, PLAIN[kind])[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_signature_of_another_key_is_refused(kind: Kind) -> None:
    _refused(_intake(pi_3=_known()), Reject.BAD_SIGNATURE, _message(kind, PLAIN[kind], key=THIEF)[0])


@pytest.mark.parametrize(
    "certificate",
    [
        _certificate(root=THIEF),
        _certificate(device=OTHER),
        _certificate(federation=FederationId("other")),
        _certificate()[:-1] + b"?",
        b"",
    ],
)
def test_a_certificate_that_is_not_the_roots_word_on_this_device_is_refused(certificate: bytes) -> None:
    _refused(_intake(), Reject.BAD_CERTIFICATE, _message(Kind.CHECKIN, _checkin(certificate))[0])


def test_another_key_of_the_same_epoch_is_refused() -> None:
    raw = _message(Kind.CHECKIN, _checkin(_certificate(key=THIEF)), key=THIEF)[0]
    _refused(_intake(pi_3=_known()), Reject.BAD_CERTIFICATE, raw)


@pytest.mark.parametrize("kind", [Kind.CHECKIN, Kind.TELEMETRY])
def test_a_seal_for_another_key_or_another_header_does_not_open(kind: Kind) -> None:
    intake = _intake(pi_3=_known())
    _refused(intake, Reject.BAD_SEAL, _message(kind, PLAIN[kind], sealed_to=sealing_key(99))[0])
    _refused(intake, Reject.BAD_SEAL, _message(kind, PLAIN[kind], sealed_to=None)[0])
    header = Header(
        kind=kind, federation=FEDERATION, round_id=RoundId(1, 0), device=DEVICE, payload_digest=sha256()
    )
    for other in (
        replace(header, device=OTHER),
        replace(header, round_id=RoundId(2, 0)),
        replace(header, federation=FederationId("other")),
        replace(header, manifest_digest=sha256(b"m")),
        replace(header, kind=Kind.UPDATE),
    ):
        _refused(intake, Reject.BAD_SEAL, _message(kind, PLAIN[kind], sealed_as=other)[0])


@pytest.mark.parametrize("kind", [Kind.CHECKIN, Kind.TELEMETRY])
@pytest.mark.parametrize("sequence", [0, 6, 7])
def test_a_sequence_number_serves_once(kind: Kind, sequence: int) -> None:
    intake = _intake(pi_3=_known(last=7))
    _refused(intake, Reject.REPLAYED, _message(kind, PLAIN[kind], sequence=sequence)[0])
    intake.accept(UP, _message(kind, PLAIN[kind], sequence=8)[0])


def test_an_update_and_a_fetch_may_be_repeated() -> None:
    intake = _intake(pi_3=_known(last=7))
    for kind in (Kind.UPDATE, Kind.FETCH):
        for _ in range(2):
            intake.accept(UP, _message(kind, PLAIN[kind], sequence=1)[0])


@pytest.mark.parametrize("kind", [Kind.CHECKIN, Kind.FETCH, Kind.TELEMETRY])
def test_a_body_that_does_not_read_is_refused(kind: Kind) -> None:
    _refused(_intake(pi_3=_known()), Reject.MALFORMED, _message(kind, b"\xff\xff")[0])


def test_an_update_opens_only_for_the_manifest_it_was_made_for() -> None:
    header = Header(
        kind=Kind.UPDATE,
        federation=FEDERATION,
        round_id=RoundId(1, 3),
        manifest_digest=sha256(b"manifest"),
        device=DEVICE,
        sequence=9,
        payload_digest=sha256(),
    )
    public = CRYPTO.sealing_public_key(ROUND_KEY)
    sealed = CRYPTO.seal(public, seal_context(header), b"", an_update().encode(), bytes(32))
    assert open_update(CRYPTO, ROUND_KEY, replace(header, sequence=0), sealed) == an_update()
    for other in (replace(header, manifest_digest=sha256(b"other")), replace(header, device=OTHER)):
        with pytest.raises(RemoteProtocolError, match="bad_seal"):
            open_update(CRYPTO, ROUND_KEY, other, sealed)
    garbage = CRYPTO.seal(public, seal_context(header), b"", b"\xff", bytes(32))
    with pytest.raises(RemoteProtocolError, match="malformed"):
        open_update(CRYPTO, ROUND_KEY, header, garbage)
