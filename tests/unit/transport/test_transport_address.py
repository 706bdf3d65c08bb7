from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.transport.address import parse_broker_url, read_password
from edge_runtime.transport.base import TransportError


@pytest.mark.parametrize(
    ("url", "host", "port", "user"),
    [
        ("mqtt://broker", "broker", 1883, None),
        ("mqtt://broker:1884/", "broker", 1884, None),
        ("mqtt://me@10.0.0.1:1", "10.0.0.1", 1, "me"),
        ("mqtt://me%40site:pass%2Fword@[::1]:99", "::1", 99, "me@site"),
        ("mqtts://broker", "broker", 8883, None),
    ],
)
def test_a_url_is_read(url: str, host: str, port: int, user: str | None) -> None:
    address = parse_broker_url(url)
    assert (address.host, address.port, address.username) == (host, port, user)
    assert (address.tls is not None) is url.startswith("mqtts")


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("broker:1883", "begins with mqtt://"),
        ("http://broker", "begins with mqtt://"),
        ("mqtt://", "names no host"),
        ("mqtt://:1883", "names no host"),
        ("mqtt://broker:port", "bad host or port"),
        ("mqtt://broker:70000", "bad host or port"),
        ("mqtt://broker:0", "port 0"),
        ("mqtt://[::1", "bad host or port"),
        ("mqtt://broker/topic", "ends after the port"),
        ("mqtt://broker?x=1", "ends after the port"),
        ("mqtt://:hunter2@broker", "no user name"),
        ("mqtt://me:hunter2@broker/hunter2", "ends after the port"),
    ],
)
def test_a_bad_url_is_refused_and_the_text_repeats_no_password(url: str, complaint: str) -> None:
    with pytest.raises(TransportError, match=complaint) as caught:
        parse_broker_url(url)
    assert "hunter2" not in str(caught.value)


def test_a_password_neither_prints_nor_compares() -> None:
    address = parse_broker_url("mqtt://me:hunter2@broker")
    assert address.password == "hunter2"
    assert "hunter2" not in repr(address) + str(address) + address.url
    assert address == parse_broker_url("mqtt://me@broker", password="other")


def test_a_password_comes_from_the_file_before_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("from file\nsecond line\n")
    environ = {"FLEETGRAD_MQTT_PASSWORD": "from environment"}
    assert read_password(file, environ) == "from file"
    assert read_password(None, environ) == "from environment"
    assert read_password(None, {}) is None
    file.write_text("")
    with pytest.raises(TransportError, match="is empty"):
        read_password(file, environ)
    with pytest.raises(TransportError, match="No such file"):
        read_password(tmp_path / "absent", environ)


def test_a_password_without_a_user_and_tls_files_without_tls_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="names no user"):
        parse_broker_url("mqtt://broker", password="x")
    with pytest.raises(TransportError, match="write mqtts://"):
        parse_broker_url("mqtt://broker", ca_file=tmp_path / "ca.pem")


def test_tls_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    junk = tmp_path / "junk.pem"
    junk.write_text("no certificate")
    for files in (
        {"ca_file": junk},
        {"cert_file": junk},
        {"ca_file": tmp_path / "absent.pem"},
        {"key_file": junk},
    ):
        with pytest.raises(TransportError, match=next(iter(files.values())).name):
            parse_broker_url("mqtts://broker", **files)
