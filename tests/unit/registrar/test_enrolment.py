"""A device that enrols, over the broker in memory. The registrar's side is a script where it must misbehave."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aggregator.registrar import Registrar
from edge_runtime.enrolment import EnrolmentError, EnrolmentRefused
from edge_runtime.protocol import topics
from edge_runtime.protocol.certificates import check_device, issue_device
from edge_runtime.protocol.crypto.keys import SealingPublicKey, SigningKey
from edge_runtime.protocol.crypto.provider import CRYPTO
from edge_runtime.protocol.enrol_token import EnrolToken, TokenError
from edge_runtime.protocol.envelope import Header, pack, unpack
from edge_runtime.protocol.identities import DeviceCertificate, EnrolAnswer
from edge_runtime.protocol.ids import DeviceId, Digest, sha256
from edge_runtime.protocol.kinds import Kind
from edge_runtime.protocol.rejects import Reject
from edge_runtime.transport.base import Received
from edge_runtime.transport.memory import Faults, MemoryBroker, MemoryTransport
from tests.support.enrolling import DEVICE, EXPIRES, FEDERATION, URL, enrol_now, key, new_registrar, serving

ROOT = key("root")
TOKEN = EnrolToken(
    federation=FEDERATION,
    broker_url=URL,
    root=CRYPTO.verify_key(ROOT),
    registrar=CRYPTO.sealing_public_key(CRYPTO.generate_sealing_key(bytes([7] * 32))),
    token_id="t1",
    secret=bytes(range(32)),
)
Answers = Callable[[bytes], list[bytes]]


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Registrar]:
    office = new_registrar(tmp_path)
    yield office
    office.close()


def device_on(broker: MemoryBroker, name: str = "device") -> MemoryTransport:
    transport = MemoryTransport(broker, name)
    transport.open()
    return transport


@contextmanager
def script(broker: MemoryBroker, answers: Answers) -> Iterator[None]:
    """Instead of the registrar: says ``answers(request)`` to every request."""
    transport = device_on(broker, "script")
    transport.subscribe(topics.all_enrol(FEDERATION))
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            event = transport.next_event(0.05)
            if isinstance(event, Received):
                for raw in answers(event.payload):
                    transport.publish(topics.down(FEDERATION, DEVICE), raw)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def answer(
    request: bytes,
    *,
    signer: SigningKey = ROOT,
    reject: Reject | None = None,
    device: DeviceId = DEVICE,
    named: DeviceId = DEVICE,
    owner: SigningKey | None = None,
    request_digest: Digest | None = None,
) -> bytes:
    """What the registrar would say, with parts exchanged. ``named``: in the certificate, ``device``: the header."""
    asked = unpack(request, FEDERATION, Kind.ENROL).header.payload_digest
    certificate = DeviceCertificate(
        federation=FEDERATION, device=named, signing_key=CRYPTO.verify_key(owner or key(DEVICE)).raw
    )
    body = EnrolAnswer(
        reject=reject,
        certificate=b"" if reject else issue_device(CRYPTO, signer, certificate),
        request_digest=request_digest or asked,
    ).encode()
    header = Header(kind=Kind.ENROLLED, federation=FEDERATION, device=device, payload_digest=sha256(body))
    (raw,) = pack(header, body, lambda message: CRYPTO.sign(signer, message))
    return raw


def test_a_device_enrols(office: Registrar) -> None:
    broker = MemoryBroker()
    token = EnrolToken.parse(office.new_token(URL, EXPIRES).encode())
    with serving(office, MemoryTransport(broker, "registrar")):
        enrolled = enrol_now(device_on(broker), token)
    certificate = check_device(CRYPTO, office.root, enrolled.certificate, FEDERATION, DEVICE)
    assert certificate.signing_key == CRYPTO.verify_key(key(DEVICE)).raw
    assert (enrolled.federation, enrolled.root, enrolled.broker_url) == (FEDERATION, office.root, URL)


@pytest.mark.parametrize("seed", range(3))
def test_a_device_enrols_once_through_a_broker_that_loses_doubles_and_reorders(
    office: Registrar, seed: int
) -> None:
    broker = MemoryBroker(faults=Faults(drop=0.4, duplicate=0.3), random=Random(seed))
    token = office.new_token(URL, EXPIRES)
    with serving(office, MemoryTransport(broker, "registrar")):
        enrol_now(device_on(broker), token)
    assert [row.device for row in office.devices()] == [DEVICE]
    assert office.enrolled == 1


def test_every_request_of_one_enrolment_has_the_same_bytes() -> None:
    seen: list[bytes] = []

    def third_time(request: bytes) -> list[bytes]:
        seen.append(request)
        return [answer(request)] if len(seen) == 3 else []

    broker = MemoryBroker()
    with script(broker, third_time):
        enrol_now(device_on(broker), TOKEN)
    assert len(seen) >= 3
    assert len(set(seen)) == 1


def test_a_connection_that_breaks_meanwhile_is_survived(office: Registrar) -> None:
    broker = MemoryBroker()
    device = device_on(broker)
    broker.cut("device")
    token = office.new_token(URL, EXPIRES)
    threading.Timer(0.1, broker.reconnect, ["device"]).start()
    with serving(office, MemoryTransport(broker, "registrar")):
        assert enrol_now(device, token).certificate


@pytest.mark.parametrize(
    "reject", [Reject.BAD_TOKEN, Reject.TOKEN_USED, Reject.TOKEN_EXPIRED, Reject.NAME_TAKEN]
)
def test_a_refusal_of_the_root_is_told_with_its_remedy(reject: Reject) -> None:
    broker = MemoryBroker()
    with (
        script(broker, lambda request: [answer(request, reject=reject)]),
        pytest.raises(EnrolmentRefused) as caught,
    ):
        enrol_now(device_on(broker), TOKEN)
    assert caught.value.reject is reject
    assert reject.meaning in str(caught.value)
    assert reject.remedy in str(caught.value)


def flip_last_bit(raw: bytes) -> bytes:
    return raw[:-1] + bytes([raw[-1] ^ 1])


FORGED: dict[str, Answers] = {
    "signed by another key": lambda r: [answer(r, signer=key("thief"))],
    "a refusal signed by another key": lambda r: [answer(r, signer=key("thief"), reject=Reject.NAME_TAKEN)],
    "to another request": lambda r: [answer(r, request_digest=sha256(b"another"))],
    "a refusal of another request": lambda r: [
        answer(r, reject=Reject.TOKEN_USED, request_digest=sha256(b"another"))
    ],
    "to another device": lambda r: [answer(r, device=DeviceId("pi-2"))],
    "altered": lambda r: [flip_last_bit(answer(r))],
    "garbage": lambda r: [b"\xff" * 50],
    "empty": lambda r: [b""],
    "our own request": lambda r: [r],
}


@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED)
def test_an_answer_that_is_not_the_roots_to_this_request_is_ignored_and_counted(forged: Answers) -> None:
    broker = MemoryBroker()
    with script(broker, lambda request: [*forged(request), answer(request)]):
        enrolled = enrol_now(device_on(broker), TOKEN)
    assert enrolled.ignored == 1
    assert enrolled.certificate


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20, deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=5))
def test_garbage_before_the_answer_changes_nothing(garbage: list[bytes]) -> None:
    broker = MemoryBroker()
    with script(broker, lambda request: [*garbage, answer(request)]):
        assert enrol_now(device_on(broker), TOKEN).ignored == len(garbage)


@pytest.mark.parametrize(
    "wrong", [{"owner": key("another")}, {"named": DeviceId("pi-2")}], ids=["another key", "another name"]
)
def test_a_certificate_for_another_key_or_name_is_an_error_of_the_registrar(wrong: dict[str, object]) -> None:
    broker = MemoryBroker()
    with (
        script(broker, lambda request: [answer(request, **wrong)]),  # type: ignore[arg-type]
        pytest.raises(EnrolmentError, match="update it"),
    ):
        enrol_now(device_on(broker), TOKEN)


def test_silence_ends_with_what_to_look_at() -> None:
    with pytest.raises(EnrolmentError, match="aggregator registrar serve"):
        enrol_now(device_on(MemoryBroker()), TOKEN, timeout_s=0.05)


def test_a_token_for_another_name_is_not_even_shown() -> None:
    device = device_on(MemoryBroker())
    with pytest.raises(TokenError, match="pi-9"):
        enrol_now(device, replace(TOKEN, device=DeviceId("pi-9")))
    assert device.counters.bytes_up == 0


def test_a_token_with_an_unusable_registrar_key_is_refused() -> None:
    with pytest.raises(TokenError, match="unusable"):
        enrol_now(device_on(MemoryBroker()), replace(TOKEN, registrar=SealingPublicKey(bytes(32))))


def test_answers_of_another_root_never_enrol() -> None:
    broker = MemoryBroker()
    with (
        script(broker, lambda request: [answer(request, signer=key("another root"))]),
        pytest.raises(EnrolmentError, match="no registrar answered"),
    ):
        enrol_now(device_on(broker), TOKEN, timeout_s=0.3)
