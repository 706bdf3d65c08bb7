"""`aggregator registrar tls`, `kit`, `revoke`, `devices` and `aggregator broker-config`: files, words, refusals."""

from __future__ import annotations

import re
import ssl
import time
from pathlib import Path

import pytest

from aggregator import cli, registrar
from edge_runtime import cli as device_cli
from edge_runtime.config import load_device_config
from edge_runtime.protocol.enrol_token import EnrolToken
from tests.support.brokers import ROOT
from tests.support.command_line import Done, refusal, run
from tests.support.enrolling import key, request

URL = "mqtts://broker.example:8883"
ARTIFACT = ROOT / "examples" / "digits" / "artifact"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    registrar.create(tmp_path / "registrar", "plant-7").close()
    return tmp_path / "registrar"


def do(command: str, folder: Path, *words: str) -> Done:
    done = run(cli.main, "registrar", command, "--folder", str(folder), *words)
    assert (done.code, done.err) == (0, "")
    return done


def refused(command: str, folder: Path, *words: str) -> str:
    return refusal(cli.main, "registrar", command, "--folder", str(folder), *words)


def tls(folder: Path, *words: str) -> Done:
    return do("tls", folder, "--host", "broker.example", "--out", str(folder.parent / "tls"), *words)


def kit(folder: Path, out: str, device: str = "pi-1") -> Path:
    path = folder.parent / out
    do("kit", folder, "--device", device, "--broker", URL, "--out", str(path))
    return path


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_tls_writes_what_broker_and_aggregator_need_and_says_what_comes_next(folder: Path) -> None:
    done = tls(folder)
    made = folder.parent / "tls"
    assert {path.name for path in made.iterdir()} == {"broker", "aggregator"}
    assert {path.name: mode(path) for path in (made / "broker").iterdir()} == {
        "ca.crt": 0o644,
        "broker.crt": 0o644,
        "broker.key": 0o600,
        "revoked.crl": 0o644,
    }
    for certificate, secret in (
        ("broker/broker.crt", "broker/broker.key"),
        ("aggregator/client.crt", "aggregator/client.key"),
    ):
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(made / certificate, made / secret)
    assert mode(folder / "tls" / "ca.key") == 0o600
    for step in ("aggregator broker-config mosquitto", "[broker]", "aggregator registrar kit"):
        assert step in done.out


def test_certificates_are_renewed_by_force_only_and_under_the_same_authority(folder: Path) -> None:
    tls(folder, "--observer")
    made = folder.parent / "tls"
    before = {path: path.read_bytes() for path in made.rglob("*.*")}
    message = refused("tls", folder, "--host", "broker.example", "--out", str(made))
    assert "not empty" in message
    assert {path: path.read_bytes() for path in made.rglob("*.*")} == before
    tls(folder, "--observer", "--force")
    renewed = {path for path in before if path.read_bytes() != before[path]}
    assert {path.name for path in renewed} == {"broker.crt", "broker.key", "client.crt", "client.key"}


def test_a_kit_is_complete_and_its_files_are_valid(folder: Path) -> None:
    tls(folder)
    made = kit(folder, "kit")
    config = load_device_config(made / "device.toml")
    assert config.broker.url == URL
    address = config.broker.address()
    assert (address.host, address.port) == ("broker.example", 8883)
    assert config.broker.ca_file == made / "ca.crt"
    token = EnrolToken.parse((made / "token.txt").read_text())
    assert (token.device, token.broker_url) == ("pi-1", URL)
    assert {path.name for path in made.iterdir() if mode(path) == 0o600} == {"client.key", "token.txt"}
    assert mode(made) == 0o700


def test_the_commands_of_a_kits_readme_exist(folder: Path, tmp_path: Path) -> None:
    tls(folder)
    made = kit(folder, "kit")
    text = (made / "README.md").read_text()
    commands = re.findall(r"^    edge-runtime (\S+) (.*)$", text, re.MULTILINE)
    assert [name for name, _ in commands] == ["enroll", "run"]
    for name, words in commands:
        known = run(device_cli.main, name, "--help").out
        assert all(option in known for option in re.findall(r"--[a-z-]+", words))
    named = set(re.findall(r"`([a-z]+\.[a-z]+)`", text))
    assert named <= {path.name for path in made.iterdir()}


def enrol(folder: Path, made: Path) -> None:
    token = EnrolToken.parse((made / "token.txt").read_text())
    office = registrar.open(folder)
    assert office.answer(time.time(), *request(token, owner=key(str(made)))) is not None
    office.close()


def test_a_kit_for_an_enrolled_device_renews_its_tls_files_and_brings_no_token(folder: Path) -> None:
    tls(folder)
    enrol(folder, kit(folder, "kit"))
    assert {path.name for path in kit(folder, "renewal").iterdir()} == {
        "ca.crt",
        "client.crt",
        "client.key",
        "README.md",
    }


def test_a_revoked_device_gets_a_full_kit_again_and_the_list_of_devices_tells_it_all(folder: Path) -> None:
    tls(folder)
    enrol(folder, kit(folder, "kit"))
    kit(folder, "other", "pi-2")
    done = do("revoke", folder, "--device", "pi-1")
    assert "its certificate (epoch 1), TLS certificates 1, unused tokens 0" in done.out
    assert str(folder / "revocations") in done.out
    assert str(folder / "tls" / "revoked.crl") in done.out
    lines = {line.split()[0]: line for line in do("devices", folder).out.splitlines()}
    assert set(lines) == {"pi-1", "pi-2", "@aggregator", "@registrar"}
    assert re.search(r"[0-9a-f]{64}  revoked \d{4}-\d\d-\d\d$", lines["pi-1"])
    assert re.search(r"not enrolled  TLS until \d{4}-\d\d-\d\d$", lines["pi-2"])
    assert (kit(folder, "again") / "token.txt").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "PI/1", "--broker", URL, "--out", "{new}"], "is no device name"),
        (["--device", "pi-1", "--broker", "mqtt://b", "--out", "{new}"], "a kit is for a broker with TLS"),
        (["--device", "pi-1", "--broker", "mqtts://b/x", "--out", "{new}"], "ends after the port"),
        (["--device", "pi-1", "--broker", URL, "--out", "{used}"], "is not empty"),
        (["--device", "pi-1", "--broker", URL, "--out", "{new}", "--days", "9999"], "from 1 to"),
        (["--device", "pi-1", "--broker", URL, "--out", "{new}", "--expires-h", "0"], "--expires-h"),
    ],
)
def test_a_kit_that_could_not_work_is_refused_and_nothing_is_issued(
    folder: Path, words: list[str], message: str
) -> None:
    tls(folder)
    used, new = folder.parent / "used", folder.parent / "new"
    used.mkdir()
    (used / "mine").touch()
    before = do("devices", folder).out
    assert message in refused("kit", folder, *[word.format(new=new, used=used) for word in words])
    assert not new.exists()
    assert do("devices", folder).out == before


def test_without_a_tls_authority_there_is_no_kit(folder: Path, tmp_path: Path) -> None:
    words = ["--device", "pi-1", "--broker", URL, "--out", str(tmp_path / "kit")]
    assert "aggregator registrar tls" in refused("kit", folder, *words)


def test_a_host_that_is_none_leaves_no_folder(folder: Path, tmp_path: Path) -> None:
    words = ["--host", "mqtts://broker", "--out", str(tmp_path / "tls")]
    assert "is no host" in refused("tls", folder, *words)
    assert not (tmp_path / "tls").exists()


# ---- broker-config ----------------------------------------------------------------------------------


def test_broker_config_joins_the_brokers_tls_files(folder: Path) -> None:
    tls(folder)
    out = folder.parent / "tls" / "broker"
    words = ["broker-config", "mosquitto", "--federation", "plant-7", "--out", str(out)]
    done = run(cli.main, *words)
    assert (done.code, done.out) == (0, f"next: mosquitto -c {out / 'mosquitto.conf'}\n")
    assert "--force" in refusal(cli.main, *words)
    elsewhere = run(cli.main, *words, "--force", "--path", "/etc/fleet", "--port", "9000")
    assert elsewhere.out == "next: mosquitto -c /etc/fleet/mosquitto.conf\n"
    text = (out / "mosquitto.conf").read_text()
    assert "listener 9000\n" in text
    assert "keyfile /etc/fleet/broker.key\n" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--federation, or the aggregator's settings"),
        (["--federation", "Plant 7"], "is no federation name"),
        (["--federation", "plant-7", "--port", "0"], "port 0"),
    ],
)
def test_broker_config_refuses_what_it_cannot_use(tmp_path: Path, words: list[str], message: str) -> None:
    out = tmp_path / "broker"
    assert message in refusal(cli.main, "broker-config", "mosquitto", "--out", str(out), *words)
    assert not out.exists()


def test_broker_config_reads_federation_and_chunk_size_of_the_aggregators_settings(tmp_path: Path) -> None:
    site, out = tmp_path / "site", tmp_path / "broker"
    words = ["--folder", str(site), "--federation", "plant-7", "--artifact", str(ARTIFACT), "--broker", URL]
    assert run(cli.main, "init", *words, "--set", "delivery.chunk_bytes=2000000").code == 0
    config = ["broker-config", "mosquitto", "--out", str(out), "--config", str(site / "aggregator.toml")]
    assert "leave one out" in refusal(cli.main, *config, "--federation", "plant-8")
    done = run(cli.main, *config)
    assert "still missing" in done.out
    assert "max_packet_size 2000512\n" in (out / "mosquitto.conf").read_text()
    assert "topic read fl/1/plant-7/up/+/+\n" in (out / "acl").read_text()
