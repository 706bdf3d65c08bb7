from __future__ import annotations

import logging
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from aggregator import registrar
from aggregator.registrar import Registrar, RegistrarError
from edge_runtime.protocol import topics
from edge_runtime.protocol.certificates import check_aggregator, check_device
from edge_runtime.protocol.crypto.provider import CRYPTO
from edge_runtime.protocol.enrol_token import EnrolToken
from edge_runtime.protocol.errors import FleetgradError
from edge_runtime.protocol.identities import EnrolAnswer
from edge_runtime.protocol.ids import DeviceId, RoundId
from edge_runtime.protocol.rejects import Reject
from edge_runtime.transport.base import TransportError
from tests.support.enrolling import DEVICE, EXPIRES, FEDERATION, NOW, URL, key, new_registrar, read, request

OTHER = DeviceId("pi-2")


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Registrar]:
    office = new_registrar(tmp_path)
    yield office
    office.close()


@pytest.fixture
def token(office: Registrar) -> EnrolToken:
    return office.new_token(URL, EXPIRES)


def ask(office: Registrar, token: EnrolToken, message: tuple[str, bytes], now: float = NOW) -> EnrolAnswer:
    answer = office.answer(now, *message)
    assert answer is not None
    return read(token, answer[1])


def refusal(office: Registrar, token: EnrolToken, message: tuple[str, bytes], now: float = NOW) -> Reject:
    answer = ask(office, token, message, now)
    assert answer.reject is not None
    assert answer.certificate == b""
    assert office.refusals[answer.reject] == 1
    return answer.reject


# ---- enrolment --------------------------------------------------------------------------------------


def test_a_device_with_a_good_token_gets_a_certificate_for_its_key(
    office: Registrar, token: EnrolToken
) -> None:
    message = request(token)
    answer = office.answer(NOW, *message)
    assert answer is not None
    assert answer[0] == topics.down(FEDERATION, DEVICE)
    enrolled = read(token, answer[1])
    certificate = check_device(CRYPTO, token.root, enrolled.certificate, FEDERATION, DEVICE)
    assert enrolled.reject is None
    assert certificate.signing_key == CRYPTO.verify_key(key(DEVICE)).raw
    (row,) = office.devices()
    assert (row.device, row.certificate, row.enrolled_at) == (DEVICE, enrolled.certificate, int(NOW))
    (used,) = office.tokens()
    assert (used.used_as, used.used_by) == (DEVICE, CRYPTO.verify_key(key(DEVICE)).raw)


def test_a_lost_answer_is_given_again_byte_for_byte_after_a_restart_and_after_the_expiry(
    office: Registrar, token: EnrolToken, tmp_path: Path
) -> None:
    first = office.answer(NOW, *request(token))
    office.close()
    again = registrar.open(tmp_path / "registrar")
    assert again.answer(EXPIRES + 1e6, *request(token)) == first
    assert again.enrolled == 0
    assert not again.refusals
    again.close()


def test_a_device_that_lost_its_request_too_gets_the_same_certificate(
    office: Registrar, token: EnrolToken
) -> None:
    first = ask(office, token, request(token))
    second = ask(office, token, request(token, ephemeral=bytes([1] * 32)))
    assert second.certificate == first.certificate
    assert second.request_digest != first.request_digest


def test_an_enrolled_device_may_show_a_second_token(office: Registrar, token: EnrolToken) -> None:
    first = ask(office, token, request(token))
    assert ask(office, token, request(office.new_token(URL, EXPIRES))).certificate == first.certificate
    assert len(office.devices()) == 1


def test_what_is_answered_is_committed(office: Registrar, token: EnrolToken, tmp_path: Path) -> None:
    office.answer(NOW, *request(token))
    with sqlite3.connect(tmp_path / "registrar" / "registrar.sqlite3") as other_process:
        assert other_process.execute("select device from devices").fetchall() == [(DEVICE,)]
        assert other_process.execute("pragma journal_mode").fetchone() == ("wal",)
    other_process.close()


def test_a_token_made_while_another_registrar_answers_is_known_to_it(
    office: Registrar, tmp_path: Path
) -> None:
    beside = registrar.open(tmp_path / "registrar")
    token = beside.new_token(URL, EXPIRES, "pi-1")
    assert ask(office, token, request(token)).reject is None
    beside.close()


# ---- refusals ---------------------------------------------------------------------------------------


def test_a_wrong_secret_is_refused(office: Registrar, token: EnrolToken) -> None:
    assert refusal(office, token, request(token, secret=bytes(32))) is Reject.BAD_TOKEN
    assert office.devices() == []


def test_a_token_that_was_never_made_is_refused(office: Registrar, token: EnrolToken, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "registrar" / "registrar.sqlite3") as database:
        database.execute("delete from tokens")
    database.close()
    assert refusal(office, token, request(token)) is Reject.BAD_TOKEN


def test_a_token_for_one_name_is_refused_under_another(office: Registrar) -> None:
    bound = office.new_token(URL, EXPIRES, "pi-1")
    assert refusal(office, bound, request(bound, OTHER)) is Reject.BAD_TOKEN
    assert ask(office, bound, request(bound)).reject is None


def test_an_expired_token_is_refused_from_its_last_second_on(office: Registrar, token: EnrolToken) -> None:
    assert refusal(office, token, request(token), now=EXPIRES) is Reject.TOKEN_EXPIRED
    assert ask(office, token, request(token), now=EXPIRES - 0.001).reject is None


def test_a_used_token_is_refused_to_another_key_and_logged(
    office: Registrar, token: EnrolToken, caplog: pytest.LogCaptureFixture
) -> None:
    ask(office, token, request(token))
    with caplog.at_level(logging.WARNING):
        assert refusal(office, token, request(token, owner=key("thief"))) is Reject.TOKEN_USED
    assert token.token_id in caplog.text
    assert token.secret.hex() not in caplog.text
    assert office.devices()[0].signing_key == CRYPTO.verify_key(key(DEVICE)).raw


def test_a_used_token_does_not_enrol_the_same_key_under_a_second_name(
    office: Registrar, token: EnrolToken
) -> None:
    ask(office, token, request(token))
    assert refusal(office, token, request(token, OTHER, key(DEVICE))) is Reject.TOKEN_USED


def test_a_taken_name_is_refused_to_another_key_and_leaves_its_token_unused(
    office: Registrar, token: EnrolToken
) -> None:
    ask(office, token, request(token))
    second = office.new_token(URL, EXPIRES)
    assert refusal(office, token, request(second, owner=key("other"))) is Reject.NAME_TAKEN
    assert ask(office, token, request(second, OTHER)).reject is None


# ---- what cannot be attributed gets no answer -------------------------------------------------------


def test_a_request_signed_by_another_key_than_the_one_inside_gets_no_answer(
    office: Registrar, token: EnrolToken
) -> None:
    assert office.answer(NOW, *request(token, signer=key("thief"))) is None
    assert office.refusals == {Reject.BAD_SIGNATURE: 1}


def test_a_request_on_the_topic_of_another_device_gets_no_answer(
    office: Registrar, token: EnrolToken
) -> None:
    for topic in (topics.enrol(FEDERATION, OTHER), topics.up(FEDERATION, DEVICE), "fl/1/x", "x"):
        assert office.answer(NOW, *request(token, topic=topic)) is None
    assert office.refusals == {Reject.WRONG_TOPIC: 4}


def test_a_request_sealed_to_another_registrar_gets_no_answer(
    office: Registrar, token: EnrolToken, tmp_path: Path
) -> None:
    elsewhere = new_registrar(tmp_path / "elsewhere", b"elsewhere")
    foreign = elsewhere.new_token(URL, EXPIRES)
    elsewhere.close()
    assert office.answer(NOW, *request(foreign)) is None
    assert office.refusals == {Reject.BAD_SEAL: 1}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(data=st.data())
def test_a_request_altered_in_one_byte_gets_no_answer(
    office: Registrar, token: EnrolToken, data: st.DataObject
) -> None:
    topic, raw = request(token)
    at = data.draw(st.integers(0, len(raw) - 1))
    altered = bytearray(raw)
    altered[at] ^= data.draw(st.integers(1, 255))
    assert office.answer(NOW, topic, bytes(altered)) is None
    assert office.devices() == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    topic=st.text(max_size=60) | st.just(topics.enrol(FEDERATION, DEVICE)), payload=st.binary(max_size=400)
)
@example(topic=topics.enrol(FEDERATION, DEVICE), payload=b"")
def test_garbage_is_counted_and_never_answered(office: Registrar, topic: str, payload: bytes) -> None:
    before = sum(office.refusals.values())
    assert office.answer(NOW, topic, payload) is None
    assert sum(office.refusals.values()) == before + 1


# ---- the aggregator's certificate -------------------------------------------------------------------


def test_the_aggregator_gets_a_certificate_for_its_rounds(office: Registrar) -> None:
    raw = office.certify_aggregator(bytes([1] * 32), bytes([2] * 32), 3, 10, 20)
    certificate = check_aggregator(CRYPTO, office.root, raw, FEDERATION, RoundId(3, 20))
    assert (certificate.signing_key, certificate.sealing_key) == (bytes([1] * 32), bytes([2] * 32))


@pytest.mark.parametrize(
    ("signing", "sealing", "rounds"),
    [
        (31, 32, (1, 1, 2)),
        (32, 33, (1, 1, 2)),
        (32, 32, (1, 2, 1)),
        (32, 32, (-1, 1, 2)),
        (32, 32, (1, 1, 2**32)),
    ],
)
def test_a_senseless_aggregator_certificate_is_not_issued(
    office: Registrar, signing: int, sealing: int, rounds: tuple[int, int, int]
) -> None:
    with pytest.raises(RegistrarError):
        office.certify_aggregator(bytes(signing), bytes(sealing), *rounds)


# ---- the folder -------------------------------------------------------------------------------------


def test_everything_in_the_folder_is_closed_to_other_users(office: Registrar, tmp_path: Path) -> None:
    folder = tmp_path / "registrar"
    office.new_token(URL, EXPIRES)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


def test_neither_the_secret_of_a_token_nor_a_key_is_in_the_database(
    office: Registrar, token: EnrolToken, tmp_path: Path
) -> None:
    ask(office, token, request(token))
    folder = tmp_path / "registrar"
    on_disk = b"".join(path.read_bytes() for path in folder.glob("registrar.sqlite3*"))
    secrets = [token.secret, *(bytes.fromhex(path.read_text()) for path in folder.glob("*.key"))]
    assert len(secrets) == 3
    assert not any(secret in on_disk for secret in secrets)


def test_a_folder_that_exists_is_never_overwritten(office: Registrar, tmp_path: Path) -> None:
    root = (tmp_path / "registrar" / "root.key").read_bytes()
    with pytest.raises(RegistrarError, match="exists already"):
        new_registrar(tmp_path, b"again")
    assert (tmp_path / "registrar" / "root.key").read_bytes() == root


def test_an_opened_registrar_is_the_one_that_was_created(office: Registrar, tmp_path: Path) -> None:
    again = registrar.open(tmp_path / "registrar")
    assert (again.federation, again.root, again.sealing_key) == (
        office.federation,
        office.root,
        office.sealing_key,
    )
    again.close()


def _remove(name: str) -> object:
    return lambda folder: (folder / name).unlink()


def _fill(name: str, content: bytes) -> object:
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove("root.key"), "cannot read the registrar's key"),
        (_fill("root.key", b"00"), "does not hold a key"),
        (_fill("root.key", b"00" * 32 + b"\n"), "do not belong together"),
        (lambda folder: (folder / "enrolment.key").chmod(0o644), "chmod 600"),
        (_remove("registrar.sqlite3"), "restore it from its backup"),
        (_fill("registrar.sqlite3", b"garbage" * 1000), "database .* failed"),
        (_fill("registrar.sqlite3", b""), "database .* failed"),
    ],
)
def test_a_damaged_folder_is_refused_with_what_to_do(
    office: Registrar, tmp_path: Path, damage: object, message: str
) -> None:
    office.close()
    damage(tmp_path / "registrar")  # type: ignore[operator]
    with pytest.raises(RegistrarError, match=message):
        registrar.open(tmp_path / "registrar")


def test_a_missing_folder_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(RegistrarError, match="aggregator init"):
        registrar.open(tmp_path / "nowhere")


def test_a_bad_federation_name_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RegistrarError, match="no federation name"):
        registrar.create(tmp_path / "r", "Digits/1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "expires", "device", "error"),
    [
        ("http://broker", EXPIRES, None, TransportError),
        (URL, EXPIRES, "A/B", RegistrarError),
        (URL, 0, None, RegistrarError),
        (URL, 2**63, None, RegistrarError),
    ],
)
def test_a_token_that_could_not_work_is_not_made(
    office: Registrar, url: str, expires: int, device: str | None, error: type[FleetgradError]
) -> None:
    with pytest.raises(error):
        office.new_token(url, expires, device)
    assert office.tokens() == []


def test_the_registrar_loads_nothing_else_of_the_aggregator() -> None:
    code = "import sys, aggregator.registrar; print(*(m for m in sys.modules if m.startswith('aggregator.')))"
    alone = ("aggregator.registrar", "aggregator.access", "aggregator.files")
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(name.startswith(alone) for name in loaded.split())
