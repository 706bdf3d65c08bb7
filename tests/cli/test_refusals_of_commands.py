"""What a person gets wrong: one line on stderr that says what, where and what to do, exit code 1, no secret."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from aggregator import cli as aggregator_cli
from aggregator import registrar
from aggregator.setup import initialise
from edge_runtime import cli as device_cli
from edge_runtime.store import DeviceStore
from edge_runtime.transport.mqtt import MqttTransport
from tests.support.brokers import ROOT, BrokerUnderTest, mosquitto_installed
from tests.support.command_line import refusal, run

ARTIFACT = ROOT / "examples" / "digits" / "artifact"
SCRIPTS = Path(sys.executable).parent


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits half a minute for a broker that is not there."""
    patient = MqttTransport.open
    monkeypatch.setattr(MqttTransport, "open", lambda self, _: patient(self, 0.1))


@pytest.fixture
def nowhere() -> Iterator[str]:
    """The URL of a port on which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"mqtt://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """A good device.toml, with its data; not enrolled."""
    np.savez(tmp_path / "train.npz", x=np.zeros((4, 1, 8, 8), np.float32), y=np.zeros(4, np.int64))
    return write(tmp_path, "")


@pytest.fixture
def aggregator(tmp_path: Path, nowhere: str) -> Path:
    """The settings of an aggregator whose broker is absent."""
    return initialise(tmp_path / "agg", "digits", ARTIFACT, nowhere, [])


def write(folder: Path, more: str) -> Path:
    path = folder / "device.toml"
    path.write_text(f'state_folder = "state"\n[data]\nsource = "train.npz"\n{more}')
    return path


# ---- settings files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["run", "enroll"])
@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[limits]\nthread = 2", "device.toml: limits.thread: unknown key; did you mean threads?"),
        ("[limits]\nthreads = '2'", 'device.toml: limits.threads: "2"; expected a whole number'),
        ("[limits]\nthreads = 0", "device.toml: limits.threads: 0; 1 to 256"),
        ("[broker]\npassword = 'hunter2'", "device.toml: broker.password: a secret in a settings file"),
        ("[limits", "device.toml: not TOML"),
        (None, "device.toml: cannot be read: No such file or directory"),
    ],
)
def test_a_bad_device_file_is_refused_before_anything_is_made(device, command, text, complaint):
    device.unlink() if text is None else write(device.parent, text)
    (device.parent / "token").write_text("x")
    more = ["--device", "pi-1", "--token-file", str(device.parent / "token")] if command == "enroll" else []
    found = refusal(device_cli.main, command, "--config", str(device), *more)
    assert found.startswith("edge-runtime: ")
    assert complaint in found
    assert "hunter2" not in found
    assert not (device.parent / "state").exists()


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('federatoin = "x"', "federatoin: unknown key; did you mean federation?"),
        ("generation = 'one'", 'generation: "one"; expected a whole number'),
    ],
)
@pytest.mark.parametrize("command", [["serve"], ["status"], ["export-model", "--out", "out"]])
def test_a_bad_aggregator_file_is_refused_by_every_command(aggregator, command, line, complaint):
    key = line.partition(" ")[0]
    lines = [old for old in aggregator.read_text().splitlines() if not old.startswith(f"{key} =")]
    aggregator.write_text("\n".join([line, *lines]))
    assert complaint in refusal(aggregator_cli.main, *command, "--config", str(aggregator))
    missing = refusal(aggregator_cli.main, *command, "--config", "no.toml")
    assert "no.toml: cannot be read" in missing


# ---- devices ----------------------------------------------------------------------------------------


def test_a_device_that_is_not_enrolled_is_told_how_to(device):
    found = refusal(device_cli.main, "run", "--config", str(device))
    assert "is not enrolled: get a token from the operator (`aggregator enroll-token`)" in found


@pytest.mark.parametrize(
    ("token", "complaint"),
    [
        (None, "cannot be read: No such file"),
        ("", "no enrolment token"),
        ("fleetgrad-enrol-1.AAAA", "token"),
        ("\xff\0", "no enrolment token"),
    ],
)
def test_a_missing_or_damaged_token_is_refused_and_not_repeated(device, token, complaint):
    file = device.parent / "token"
    if token is not None:
        file.write_text(token)
    words = ["enroll", "--config", str(device), "--device", "pi-1", "--token-file", str(file)]
    found = refusal(device_cli.main, *words)
    assert complaint in found
    assert "AAAA" not in found


def test_a_bad_device_name_is_refused_by_both_sides(device, aggregator):
    folder = aggregator.parent / "registrar"
    token = run(
        aggregator_cli.main, "enroll-token", "--folder", str(folder), "--broker", "mqtt://127.0.0.1"
    ).out
    words = ["enroll", "--config", str(device), "--device", "Pi 1", "--token-file", "-"]
    assert "'Pi 1' is no device name: 1-48 of" in refusal(device_cli.main, *words, stdin=token)
    words = ["enroll-token", "--folder", str(folder), "--broker", "mqtt://x", "--device", "Pi 1"]
    assert "'Pi 1' is no device name" in refusal(aggregator_cli.main, *words)


@pytest.mark.parametrize("hours", ["nan", "inf", "0", "-1", "1e300"])
def test_a_token_needs_a_time_to_live_that_makes_sense(aggregator, hours):
    folder = str(aggregator.parent / "registrar")
    words = ["enroll-token", "--folder", folder, "--broker", "mqtt://x", f"--expires-h={hours}"]
    assert "--expires-h" in refusal(aggregator_cli.main, *words)


def test_a_key_that_is_none_is_not_certified(aggregator, tmp_path):
    folder = str(aggregator.parent / "registrar")
    for key, complaint in (("zz", "64 hex digits"), ("ab" * 31, "31 bytes, not 32")):
        words = ["--folder", folder, "--signing-key", key, "--sealing-key", key, "--out", str(tmp_path / "c")]
        assert complaint in refusal(aggregator_cli.main, "registrar", "certify", *words)
    assert not (tmp_path / "c").exists()


# ---- enrolling over a real broker -------------------------------------------------------------------


@dataclass(frozen=True)
class Office:
    """A registrar that answers over a broker."""

    broker: BrokerUnderTest
    registrar: registrar.Registrar


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    if not mosquitto_installed():
        pytest.skip("needs mosquitto")
    folder = tmp_path_factory.mktemp("office")
    broker = BrokerUnderTest(folder / "broker")
    config = initialise(folder / "agg", "digits", ARTIFACT, broker.url, [])
    authority = registrar.open(config.parent / "registrar")
    transport, stop = broker.transport("registrar"), threading.Event()
    transport.open()
    thread = threading.Thread(target=authority.serve, args=(transport, stop.is_set))
    thread.start()
    try:
        yield Office(broker, authority)
    finally:
        stop.set()
        thread.join()
        transport.close()
        authority.close()
        broker.stop()


def enrol(device: Path, name: str, token: str) -> list[str]:
    (device.parent / "token").write_text(token)
    words = ["--config", str(device), "--device", name, "--token-file", str(device.parent / "token")]
    return ["enroll", *words]


def test_a_used_token_is_refused_to_a_second_device_and_the_first_stays_enrolled(office, device, tmp_path):
    token = office.registrar.new_token(office.broker.url, int(time.time()) + 600)
    text = token.encode()
    done = run(device_cli.main, *enrol(device, "pi-1", text))
    assert (done.code, done.err) == (0, "")
    assert "pi-1 is enrolled in digits; start it with: edge-runtime run" in done.out
    other = tmp_path / "other"
    other.mkdir()
    found = refusal(device_cli.main, *enrol(write(other, ""), "pi-2", text))
    assert "refused to enrol 'pi-2': the enrolment token was used by another key; ask the operator" in found
    with DeviceStore(other / "state") as store:
        assert store.enrolment is None
    with DeviceStore(device.parent / "state") as store:
        assert store.enrolment is not None
        key = store.signing_key(lambda: pytest.fail("it has one")).to_bytes()
    for secret in (text, token.secret.hex(), key.hex()):
        assert secret not in found + done.out
    # The same device again, say after a lost answer: fine.
    assert run(device_cli.main, *enrol(device, "pi-1", text)).code == 0


def test_an_expired_token_is_refused(office, device):
    token = office.registrar.new_token(office.broker.url, int(time.time()) - 1)
    found = refusal(device_cli.main, *enrol(device, "pi-9", token.encode()))
    assert "the enrolment token has expired; ask the operator for a new token" in found


def test_a_registrar_that_does_not_answer_is_named_and_the_token_stays_good(device, tmp_path, office):
    elsewhere = registrar.create(tmp_path / "elsewhere", "other")
    try:
        token = elsewhere.new_token(office.broker.url, int(time.time()) + 600)
    finally:
        elsewhere.close()
    found = refusal(device_cli.main, *enrol(device, "pi-1", token.encode()), "--timeout-s", "0.3")
    assert "no registrar answered within 0.3 s" in found
    assert "The token can be used again" in found


# ---- no broker --------------------------------------------------------------------------------------


def test_without_a_broker_every_program_names_it_and_what_starts_one(
    impatient, aggregator, device, nowhere, office
):
    folder = str(aggregator.parent / "registrar")
    token = run(aggregator_cli.main, "enroll-token", "--folder", folder, "--broker", nowhere).out
    enrolled = write(device.parent, f'[broker]\nurl = "{office.broker.url}"\n')
    good = office.registrar.new_token(office.broker.url, int(time.time()) + 600).encode()
    cases = [
        (aggregator_cli.main, ["serve", "--config", str(aggregator)]),
        (aggregator_cli.main, ["registrar", "serve", "--folder", folder, "--broker", nowhere]),
        (device_cli.main, enrol(device, "pi-3", token)),
    ]
    write(device.parent, "")
    for main, words in cases:
        found = refusal(main, *words)
        assert f"no MQTT connection to {nowhere.removeprefix('mqtt://')}: Connection refused" in found
        assert "`aggregator broker` starts one" in found
    # Enrolled while there was one, then it is gone.
    assert run(device_cli.main, *enrol(enrolled, "pi-3", good)).code == 0
    write(device.parent, f'[broker]\nurl = "{nowhere}"\n')
    assert "no MQTT connection" in refusal(device_cli.main, "run", "--config", str(device))
    with DeviceStore(device.parent / "state") as store:
        assert store.enrolment is not None


# ---- what lies on the aggregator's disk -------------------------------------------------------------


def test_what_is_asked_before_anything_was_served_is_refused_with_what_makes_it(aggregator, tmp_path):
    for command in (["status"], ["export-model", "--out", str(tmp_path / "out")]):
        found = refusal(aggregator_cli.main, *command, "--config", str(aggregator))
        assert "there is no ledger" in found
        assert "`aggregator serve` makes it" in found
    assert not (tmp_path / "out").exists()


def test_a_tampered_key_or_artifact_stops_serve_before_it_connects(aggregator, tmp_path):
    keys = aggregator.parent / "keys"
    secret = (keys / "signing.key").read_text().strip()
    (keys / "signing.key").write_text(secret[:-2])
    found = refusal(aggregator_cli.main, "serve", "--config", str(aggregator))
    assert "signing.key: 62 bytes; expected 64 hex digits" in found
    assert secret[:16] not in found
    (keys / "signing.key").write_text(secret)
    copy = tmp_path / "artifact"
    copy.mkdir()
    for file in ARTIFACT.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "params.bin").write_bytes(bytes((ARTIFACT / "params.bin").stat().st_size))
    aggregator.write_text(aggregator.read_text().replace(str(ARTIFACT), str(copy)))
    found = refusal(aggregator_cli.main, "serve", "--config", str(aggregator))
    assert "params.bin" in found
    assert "Build the artifact again" in found


@pytest.mark.parametrize("how", ["changed", "other keys", "no certificate"])
def test_a_tampered_certificate_stops_serve_with_how_to_make_a_new_one(office, tmp_path, how):
    config = initialise(tmp_path / "agg", "digits", ARTIFACT, office.broker.url, [])
    file = config.parent / "keys" / "certificate"
    text = file.read_text().strip()
    match how:
        case "changed":
            file.write_text(text[:-1] + ("0" if text[-1] != "0" else "1"))
        case "other keys":
            (config.parent / "keys" / "signing.key").write_text("11" * 32)
        case "no certificate":
            file.write_text("00" * 40)
    found = refusal(aggregator_cli.main, "serve", "--config", str(config))
    assert "the aggregator's certificate is" in found
    assert "aggregator registrar certify" in found


# ---- the scripts themselves -------------------------------------------------------------------------


def test_the_installed_scripts_end_in_words_and_never_in_a_traceback(device):
    for words, code, complaint in (
        (["edge-runtime", "run", "--config", str(device)], 1, "is not enrolled"),
        (["aggregator", "serve", "--config", "none.toml"], 1, "none.toml: cannot be read"),
        (["aggregator", "serve"], 2, "--config"),
    ):
        done = subprocess.run(
            [SCRIPTS / words[0], *words[1:]], capture_output=True, text=True, timeout=60, cwd=device.parent
        )
        assert (done.returncode, done.stdout) == (code, ""), done
        assert complaint in done.stderr
        assert "Traceback" not in done.stderr
