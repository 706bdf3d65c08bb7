"""The TLS authority: what it signs, and what it refuses to sign."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from aggregator.registrar import RegistrarError, tls
from aggregator.registrar.folder import write_folder
from tests.support.enrolling import NOW

DAY = 86_400


@pytest.fixture(scope="module")
def made() -> tls.Issued:
    return tls.new_authority("digits", NOW)


@pytest.fixture(scope="module")
def authority(made: tls.Issued) -> tls.TlsAuthority:
    return tls.load_authority(made.certificate, made.key)


def test_a_client_certificate_names_its_client_and_is_good_for_nothing_else(
    authority: tls.TlsAuthority,
) -> None:
    issued = tls.issue_client(authority, "pi-1", NOW, 30)
    found = x509.load_pem_x509_certificate(issued.certificate)
    found.verify_directly_issued_by(authority.certificate)
    assert found.subject.rfc4514_string() == "CN=pi-1"
    usage = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert not found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert found.not_valid_after_utc.timestamp() == issued.not_after == int(NOW) + 30 * DAY
    assert found.serial_number == issued.serial


def test_a_broker_certificate_names_all_hosts(authority: tls.TlsAuthority) -> None:
    issued = tls.issue_server(authority, "digits", ["Broker.example", "10.0.0.7", "::1"], NOW, 30)
    found = x509.load_pem_x509_certificate(issued.certificate)
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["broker.example"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7", "::1"]


@pytest.mark.parametrize(
    "host", ["", "mqtts://broker", "broker:8883", "*.example", "a b", "-a", "a..b", "a" * 64, "x\n"]
)
def test_what_is_no_host_gets_no_certificate(authority: tls.TlsAuthority, host: str) -> None:
    with pytest.raises(RegistrarError, match="is no host"):
        tls.issue_server(authority, "digits", [host], NOW, 30)


@pytest.mark.parametrize("days", [0, -1, tls.AUTHORITY_DAYS + 1])
def test_no_certificate_ends_before_it_begins_or_after_its_authority(
    authority: tls.TlsAuthority, days: int
) -> None:
    with pytest.raises(RegistrarError, match="the TLS authority ends 2047-01-"):
        tls.issue_client(authority, "pi-1", NOW, days)


def test_an_authority_that_has_ended_signs_nothing(authority: tls.TlsAuthority) -> None:
    with pytest.raises(RegistrarError, match="the TLS authority ended 2047-01-"):
        tls.issue_client(authority, "pi-1", NOW + tls.AUTHORITY_DAYS * DAY, 1)


def test_damaged_or_foreign_files_are_refused(made: tls.Issued) -> None:
    other = tls.new_authority("digits", NOW)
    with pytest.raises(RegistrarError, match="do not belong together"):
        tls.load_authority(made.certificate, other.key)
    for certificate, key in ((b"", made.key), (made.certificate, b""), (made.key, made.certificate)):
        with pytest.raises(RegistrarError, match="damaged"):
            tls.load_authority(certificate, key)


def test_keys_do_not_print(made: tls.Issued, authority: tls.TlsAuthority) -> None:
    assert "PRIVATE" not in repr(made)
    assert "key" not in repr(authority)


def test_a_folder_is_written_whole_and_takes_nothing_beside_it_away(tmp_path: Path) -> None:
    beside, left = tmp_path / "kit.new", tmp_path / ".kit.partial"
    for folder in (beside, left):  # somebody's, and what a crash has left
        folder.mkdir()
        (folder / "client.key").write_text("old")
    write_folder(tmp_path / "kit", {"client.key": b"new", "ca.crt": b"public"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kit", "kit.new"]
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "kit").iterdir()}
    assert modes == {"client.key": 0o600, "ca.crt": 0o644}
    assert (tmp_path / "kit").stat().st_mode & 0o777 == 0o700
    with pytest.raises(RegistrarError, match="not empty"):
        write_folder(tmp_path / "kit", {})
