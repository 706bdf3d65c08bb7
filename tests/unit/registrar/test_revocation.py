"""What a revocation voids, how a name comes back, and the list that tells of it."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from aggregator import registrar
from aggregator.registrar import Registrar, RegistrarError
from aggregator.registrar.revocation import Revoked
from edge_runtime.protocol.certificates import check_device, check_revocations, issue_revocations
from edge_runtime.protocol.crypto.keys import SigningKey
from edge_runtime.protocol.crypto.provider import CRYPTO
from edge_runtime.protocol.errors import RemoteProtocolError
from edge_runtime.protocol.identities import EnrolAnswer, Revocation, RevocationList
from edge_runtime.protocol.ids import DeviceId, FederationId
from edge_runtime.protocol.rejects import Reject
from tests.support.enrolling import DEVICE, EXPIRES, FEDERATION, NOW, URL, key, new_registrar, read, request

OTHER = DeviceId("pi-2")


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Registrar]:
    office = new_registrar(tmp_path)
    yield office
    office.close()


def enrol(office: Registrar, device: DeviceId = DEVICE, owner: SigningKey | None = None) -> EnrolAnswer:
    token = office.new_token(URL, EXPIRES)
    answer = office.answer(NOW, *request(token, device, owner))
    assert answer is not None
    return read(token, answer[1])


def published(office: Registrar) -> RevocationList:
    raw = bytes.fromhex(office.revocations_file.read_text())
    return check_revocations(CRYPTO, office.root, raw, FEDERATION)


def crl(office: Registrar) -> set[int]:
    found = x509.load_pem_x509_crl(office.crl_file.read_bytes())
    return {entry.serial_number for entry in found}


# ---- the list ---------------------------------------------------------------------------------------


def test_a_new_registrar_publishes_an_empty_list(office: Registrar) -> None:
    assert published(office) == RevocationList(federation=FEDERATION, number=1, entries=())


def test_a_revoked_device_is_on_the_next_list_with_its_epoch(office: Registrar) -> None:
    enrol(office)
    assert office.revoke(DEVICE, NOW) == Revoked(epoch=1, tls_certificates=0, tokens=0)
    listed = published(office)
    assert (listed.number, listed.entries) == (2, (Revocation(device=DEVICE, epoch=1),))
    assert office.devices()[0].revoked_at == int(NOW)


def test_revoking_twice_makes_no_new_list_and_mends_the_file(office: Registrar) -> None:
    enrol(office)
    office.revoke(DEVICE, NOW)
    office.revocations_file.write_text("damaged")
    assert office.revoke(DEVICE, NOW + 1).nothing
    assert published(office).number == 2


def test_a_list_lost_between_the_commit_and_the_file_is_there_when_the_registrar_opens_again(
    office: Registrar, tmp_path: Path
) -> None:
    enrol(office)
    before = office.revocations_file.read_bytes()
    office.revoke(DEVICE, NOW)
    office.revocations_file.write_bytes(before)
    office.close()
    again = registrar.open(tmp_path / "registrar")
    assert published(again).number == 2
    again.close()


def test_who_was_never_given_anything_cannot_be_revoked(office: Registrar) -> None:
    for name in ("pi-9", "@aggregator"):
        with pytest.raises(RegistrarError, match="nothing was issued"):
            office.revoke(name, NOW)
    with pytest.raises(RegistrarError, match="no device name"):
        office.revoke("A/B", NOW)
    assert published(office).number == 1


# ---- coming back ------------------------------------------------------------------------------------


def test_a_revoked_name_comes_back_with_a_new_key_in_the_next_epoch(office: Registrar) -> None:
    enrol(office)
    for epoch in (2, 3):
        office.revoke(DEVICE, NOW)
        answer = enrol(office, owner=key(f"spare {epoch}"))
        certificate = check_device(CRYPTO, office.root, answer.certificate, FEDERATION, DEVICE)
        assert (certificate.epoch, certificate.signing_key) == (
            epoch,
            CRYPTO.verify_key(key(f"spare {epoch}")).raw,
        )
        assert published(office).voids(DEVICE, epoch - 1)
        assert not published(office).voids(DEVICE, epoch)
    assert [row.revoked_at for row in office.devices()] == [None]


def test_a_revoked_key_is_never_certified_again_under_no_name(office: Registrar) -> None:
    enrol(office)
    office.revoke(DEVICE, NOW)
    assert enrol(office).reject is Reject.REVOKED
    assert enrol(office, OTHER, key(DEVICE)).reject is Reject.REVOKED


def test_a_key_that_was_certified_under_two_names_is_revoked_under_both(office: Registrar) -> None:
    enrol(office)
    assert enrol(office, OTHER, key(DEVICE)).reject is None
    assert office.revoke(OTHER, NOW).epoch == 1
    assert published(office).entries == (
        Revocation(device=DEVICE, epoch=1),
        Revocation(device=OTHER, epoch=1),
    )
    assert [row.revoked_at for row in office.devices()] == [int(NOW), int(NOW)]
    assert office.revoke(DEVICE, NOW).nothing


def test_an_old_token_confirms_no_revoked_certificate(office: Registrar) -> None:
    token = office.new_token(URL, EXPIRES)
    assert office.answer(NOW, *request(token)) is not None
    office.revoke(DEVICE, NOW)
    answer = office.answer(NOW, *request(token))
    assert answer is not None
    assert read(token, answer[1]).reject is Reject.REVOKED


def test_a_kit_that_was_lost_before_it_was_used_enrols_nobody(office: Registrar) -> None:
    token = office.new_token(URL, EXPIRES, DEVICE)
    assert office.revoke(DEVICE, NOW) == Revoked(epoch=None, tls_certificates=0, tokens=1)
    answer = office.answer(NOW, *request(token))
    assert answer is not None
    assert read(token, answer[1]).reject is Reject.TOKEN_EXPIRED
    assert published(office).entries == ()


def test_the_name_of_a_device_in_force_stays_taken(office: Registrar) -> None:
    enrol(office)
    enrol(office, OTHER)
    office.revoke(OTHER, NOW)
    assert enrol(office, owner=key("other")).reject is Reject.NAME_TAKEN


# ---- TLS --------------------------------------------------------------------------------------------


def test_a_revocation_voids_every_tls_certificate_of_the_name_and_no_other(office: Registrar) -> None:
    office.set_up_tls(NOW, 30)
    assert crl(office) == set()
    mine = {office.client_certificate(DEVICE, NOW, 30).serial for _ in range(2)}
    office.client_certificate(OTHER, NOW, 30)
    assert office.revoke(DEVICE, NOW).tls_certificates == 2
    assert crl(office) == mine
    later = office.client_certificate(DEVICE, NOW, 30)
    office.revoke(OTHER, NOW)
    assert mine < crl(office)
    assert later.serial not in crl(office)


def test_a_role_loses_its_tls_certificates_and_nothing_else(office: Registrar) -> None:
    office.set_up_tls(NOW, 30)
    lost = office.client_certificate("@aggregator", NOW, 30)
    assert office.revoke("@aggregator", NOW).tls_certificates == 1
    assert crl(office) == {lost.serial}
    assert published(office).entries == ()


def test_the_crl_holds_as_long_as_the_authority(office: Registrar) -> None:
    office.set_up_tls(NOW, 30)
    found = x509.load_pem_x509_crl(office.crl_file.read_bytes())
    authority = x509.load_pem_x509_certificate(office.authority_certificate())
    assert found.next_update_utc == authority.not_valid_after_utc
    assert found.is_signature_valid(authority.public_key())  # type: ignore[arg-type]


def test_a_new_authority_gets_a_crl_of_its_own_and_the_old_one_is_forgotten(office: Registrar) -> None:
    office.set_up_tls(NOW, 30)
    lost = office.client_certificate(DEVICE, NOW, 30)
    office.revoke(DEVICE, NOW)
    office.tls_folder.rename(office.tls_folder.with_name("ended"))
    office.set_up_tls(NOW, 30)
    authority = x509.load_pem_x509_certificate(office.authority_certificate())
    found = x509.load_pem_x509_crl(office.crl_file.read_bytes())
    assert found.is_signature_valid(authority.public_key())  # type: ignore[arg-type]
    assert crl(office) == {lost.serial}


# ---- the check on the other side --------------------------------------------------------------------

NAMES = st.from_regex(r"[a-c]{1,3}", fullmatch=True).map(DeviceId)


@given(epochs=st.dictionaries(NAMES, st.integers(1, 3)), device=NAMES, epoch=st.integers(0, 4))
def test_a_list_voids_the_epochs_up_to_the_listed_one_of_the_listed_devices(
    epochs: dict[DeviceId, int], device: DeviceId, epoch: int
) -> None:
    entries = tuple(Revocation(device=name, epoch=epochs[name]) for name in sorted(epochs))
    listed = RevocationList(federation=FEDERATION, number=1, entries=entries)
    assert RevocationList.decode(listed.encode()) == listed
    assert listed.voids(device, epoch) is (epoch <= epochs.get(device, -1))


@pytest.mark.parametrize(
    "entries",
    [
        (Revocation(device=OTHER, epoch=1), Revocation(device=DEVICE, epoch=1)),
        (Revocation(device=DEVICE, epoch=1), Revocation(device=DEVICE, epoch=2)),
        (Revocation(device=DEVICE, epoch=0),),
        (Revocation(device=DeviceId("A/B"), epoch=1),),
    ],
)
def test_a_list_out_of_order_or_with_bad_entries_is_refused(entries: tuple[Revocation, ...]) -> None:
    with pytest.raises(RemoteProtocolError, match="malformed"):
        RevocationList.decode(RevocationList(federation=FEDERATION, number=1, entries=entries).encode())


def test_a_list_of_another_root_or_federation_or_without_a_number_is_refused() -> None:
    root = CRYPTO.verify_key(key("root"))
    good = RevocationList(federation=FEDERATION, number=1, entries=())
    raw = issue_revocations(CRYPTO, key("root"), good)
    assert check_revocations(CRYPTO, root, raw, FEDERATION) == good
    with pytest.raises(RemoteProtocolError, match="not of other"):
        check_revocations(CRYPTO, root, raw, FederationId("other"))
    forged = issue_revocations(CRYPTO, key("stranger"), good)
    with pytest.raises(RemoteProtocolError, match="not signed by the root"):
        check_revocations(CRYPTO, root, forged, FEDERATION)
    with pytest.raises(RemoteProtocolError, match="number from 1"):
        RevocationList.decode(RevocationList(federation=FEDERATION, number=0, entries=()).encode())


# ---- a folder of the version before -----------------------------------------------------------------


def test_a_folder_of_schema_1_is_taken_over(office: Registrar, tmp_path: Path) -> None:
    answer = enrol(office)
    office.close()
    with sqlite3.connect(tmp_path / "registrar" / "registrar.sqlite3") as database:
        for table in ("revocations", "revocation_lists", "tls_certificates"):
            database.execute(f"drop table {table}")
        database.execute("update federation set schema_version = 1")
    database.close()
    (tmp_path / "registrar" / "revocations").unlink()
    again = registrar.open(tmp_path / "registrar")
    assert published(again).number == 1
    assert again.devices()[0].certificate == answer.certificate
    assert again.revoke(DEVICE, time.time()).epoch == 1
    again.close()
