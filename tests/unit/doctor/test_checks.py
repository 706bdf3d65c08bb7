"""``doctor``'s judgements: facts in, findings out."""

from __future__ import annotations

import dataclasses
import datetime
import struct
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from edge_runtime.config import DataConfig
from edge_runtime.data import NpzFile
from edge_runtime.device.policy import Violation
from edge_runtime.device_status import DeviceState, PendingUpdate
from edge_runtime.doctor import Outcome, broker, identity, installation, machine
from edge_runtime.doctor.contact import Contact, Obstacle, Step, _packet_limit, connect_packet
from edge_runtime.doctor.examination import data
from edge_runtime.doctor.installation import Installation, parse_version
from edge_runtime.doctor.machine import Machine
from edge_runtime.protocol.crypto.provider import CRYPTO
from edge_runtime.protocol.crypto.x509_validity import Validity, pem_validity
from edge_runtime.protocol.enrol_token import EnrolToken
from edge_runtime.protocol.identities import DeviceCertificate
from edge_runtime.protocol.ids import RoundId
from edge_runtime.store import Enrolment
from edge_runtime.transport.address import BrokerAddress
from tests.support.enrolling import DEVICE, FEDERATION, NOW, URL, key

OK, WARNING, PROBLEM, UNKNOWN = Outcome.OK, Outcome.WARNING, Outcome.PROBLEM, Outcome.UNKNOWN
GOOD = {
    "fleetgrad": "0.1.0",
    "onnxruntime": "1.22.0",
    "numpy": "1.26.4",
    "paho-mqtt": "2.1.0",
    "cryptography": "42.0.0",
    "protobuf": "4.25.1",
    "cattrs": "23.2.3",
    "typer": "0.16.0",
    "zstandard": "0.22.0",
}


def one(checks, name):
    (found,) = [check for check in checks if check.name == name]
    return found


def installed(packages=GOOD, **more):
    base = {
        "python": (3, 11, 2),
        "is_64_bit": True,
        "system": "Linux",
        "machine": "aarch64",
        "packages": packages,
        "cpu_features": frozenset({"asimd"}),
    }
    return installation.checks(Installation(**{**base, **more}))


# ---- installation -----------------------------------------------------------------------------------


def test_a_good_installation_has_nothing_to_mend():
    assert {check.outcome for check in installed()} == {OK}
    assert not any(check.remedy for check in installed())


@pytest.mark.parametrize("other", ["onnxruntime-training", "onnxruntime-training-cpu", "onnxruntime-gpu"])
def test_two_runtimes_in_one_environment_are_a_clash_and_the_fix_names_both(other):
    found = one(installed({**GOOD, other: "1.19.2"}), "runtime")
    assert found.outcome is PROBLEM
    assert "overwrite each other's files" in found.finding
    assert found.remedy == f"pip uninstall -y onnxruntime {other} && pip install 'fleetgrad[device]'"


def without(name):
    return {other: version for other, version in GOOD.items() if other != name}


@pytest.mark.parametrize(
    ("packages", "more", "name", "finding"),
    [
        (without("onnxruntime"), {}, "runtime", "not installed"),
        ({**GOOD, "onnxruntime": "1.21.1"}, {}, "runtime", "dies with SIGILL on a Raspberry Pi 4"),
        (
            {**without("onnxruntime"), "onnxruntime-training-cpu": "1.19.2"},
            {},
            "runtime",
            "instead of onnxruntime",
        ),
        (GOOD, {"import_error": "libfoo.so: cannot open"}, "runtime", "does not import: libfoo.so"),
        (without("cattrs"), {}, "libraries", "cattrs is not installed"),
        ({**GOOD, "paho-mqtt": "1.6.1"}, {}, "libraries", "paho-mqtt 1.6.1, 2.0 or newer is needed"),
        (GOOD, {"python": (3, 9, 18)}, "python", "Python 3.9.18"),
        (GOOD, {"is_64_bit": False, "machine": "armv7l"}, "platform", "32-bit"),
    ],
)
def test_what_cannot_work_is_a_problem_with_a_remedy(packages, more, name, finding):
    found = one(installed(packages, **more), name)
    assert found.outcome is PROBLEM
    assert finding in found.finding
    assert found.remedy


def test_a_runtime_that_is_too_old_is_not_imported(monkeypatch):
    assert installation.look(lambda: None).import_error is None
    assert installation.look(lambda: 1 / 0).import_error == "division by zero"
    monkeypatch.setitem(installation.MINIMUM, "onnxruntime", ((999,), ""))
    found = installation.look(lambda: pytest.fail("imported"))
    assert "999 or newer is needed" in one(installation.checks(found), "runtime").finding


def test_versions_are_read_by_their_numbers():
    assert parse_version("1.22.0rc1") == (1, 22, 0)
    assert parse_version("garbage") == ()
    assert parse_version("42") >= (42,)


# ---- machine ----------------------------------------------------------------------------------------

MIB = 1 << 20


def judged(**more):
    base = {
        "now": NOW,
        "newest_file": NOW - 10,
        "synchronised": True,
        "folder": Path("/s"),
        "place": Path("/s"),
        "folder_mode": 0o700,
        "disk_free": 9000 * MIB,
        "memory_total": 4000 * MIB,
        "memory_free": 3000 * MIB,
        "temperature_c": 50.0,
        "throttled": 0,
    }
    return machine.checks(Machine(**{**base, **more}))


def test_a_machine_in_good_health_has_nothing_to_mend():
    assert {check.outcome for check in judged()} == {OK}


@pytest.mark.parametrize(
    ("more", "name", "outcome", "finding"),
    [
        ({"newest_file": NOW + 3 * 86_400}, "clock", PROBLEM, "it is behind"),
        ({"synchronised": False}, "clock", WARNING, "not synchronised"),
        ({"synchronised": None}, "clock", OK, "unknown"),
        ({"place_is_folder": False}, "disk", PROBLEM, "is a file"),
        ({"is_owner": False}, "disk", PROBLEM, "another user"),
        ({"folder_mode": 0o755}, "disk", PROBLEM, "open to other users (mode 0755)"),
        ({"is_writable": False}, "disk", PROBLEM, "cannot be written"),
        ({"disk_free": MIB}, "disk", PROBLEM, "1 MiB free"),
        ({"disk_free": 100 * MIB}, "disk", WARNING, "100 MiB free"),
        ({"disk_free": None}, "disk", OK, "unknown space"),
        ({"memory_free": MIB}, "memory", PROBLEM, "1 MiB of 4000 MiB"),
        ({"memory_total": 200 * MIB}, "memory", WARNING, "of 200 MiB"),
        ({"memory_total": None}, "memory", UNKNOWN, "cannot be read"),
        ({"is_pi": True, "memory_cgroup": False}, "memory", WARNING, "MemoryMax"),
        ({"is_pi": True, "memory_cgroup": True}, "memory", OK, ""),
        ({"temperature_c": 85.0}, "temperature", WARNING, "85 °C"),
        ({"temperature_c": None}, "temperature", UNKNOWN, "no sensor"),
        ({"throttled": 0x50005}, "power", WARNING, "now: the supply voltage is too low, it is throttled"),
        ({"throttled": 0x50000}, "power", WARNING, "since the last start: the supply voltage is too low"),
        ({"throttled": None}, "power", UNKNOWN, ""),
    ],
)
def test_each_trouble_of_the_machine_has_its_outcome(more, name, outcome, finding):
    found = one(judged(**more), name)
    assert found.outcome is outcome
    assert finding in found.finding
    assert outcome not in (WARNING, PROBLEM) or found.remedy


def test_a_raspberry_pi_is_read_from_its_files(tmp_path):
    for name, text in {
        "proc/meminfo": "MemTotal: 1000 kB\nMemAvailable: 500 kB\n",
        "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
        "proc/cgroups": "#subsys_name\thierarchy\tnum_cgroups\tenabled\nmemory\t0\t1\t0\n",
        "sys/devices/platform/soc/soc:firmware/get_throttled": "50005\n",
        "run/systemd/timesync/synchronized": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = machine.look(tmp_path / "not" / "there", tmp_path)
    assert (found.memory_total, found.is_pi, found.memory_cgroup) == (1_024_000, True, False)
    assert (found.throttled, found.synchronised, found.place) == (0x50005, True, tmp_path)
    nothing = machine.look(tmp_path, tmp_path / "empty")
    assert (nothing.memory_total, nothing.memory_cgroup, nothing.throttled) == (None, None, None)
    assert nothing.synchronised is None


def test_the_owners_policy_is_told_and_is_no_problem():
    assert machine.eligibility(()).outcome is OK
    found = machine.eligibility([Violation("heat", "90 °C: too hot")])
    assert (found.outcome, found.remedy) == (WARNING, "90 °C: too hot")


# ---- identity ---------------------------------------------------------------------------------------

OWN_KEY = CRYPTO.verify_key(key(DEVICE))
ENROLMENT = Enrolment(
    federation=FEDERATION,
    device=DEVICE,
    broker_url=URL,
    root_key=CRYPTO.verify_key(key("root")),
    certificate=b"",
)
ENROLLED = DeviceState(
    folder=Path("/s"),
    enrolment=ENROLMENT,
    certificate=DeviceCertificate(federation=FEDERATION, device=DEVICE, signing_key=OWN_KEY.raw, epoch=3),
)


def pending(age_s):
    return (PendingUpdate(RoundId(1, 4), 1234, NOW - age_s),)


@pytest.mark.parametrize(
    ("state", "own", "name", "outcome", "finding"),
    [
        (ENROLLED, OWN_KEY, "enrolment", OK, "pi-1 of digits, signed by the root, epoch 3"),
        (DeviceState(folder=Path("/s")), None, "enrolment", WARNING, "not enrolled yet"),
        (ENROLLED, None, "enrolment", PROBLEM, "the device's key is gone"),
        (ENROLLED, CRYPTO.verify_key(key("other")), "enrolment", PROBLEM, "mixed from two"),
        (dataclasses.replace(ENROLLED, certificate=None), OWN_KEY, "enrolment", PROBLEM, "does not verify"),
        (
            DeviceState(folder=Path("/s"), damaged=("/s/enrolment: cut off",)),
            OWN_KEY,
            "enrolment",
            PROBLEM,
            "cannot be read",
        ),
        (
            dataclasses.replace(ENROLLED, damaged=("/s/round: cut off",)),
            OWN_KEY,
            "state folder",
            PROBLEM,
            "cut off",
        ),
        (dataclasses.replace(ENROLLED, running="77"), OWN_KEY, "state folder", OK, "in use by process 77"),
        (dataclasses.replace(ENROLLED, pending=pending(60)), OWN_KEY, "outbox", OK, "round 4 (1234 bytes)"),
        (dataclasses.replace(ENROLLED, pending=pending(90_000)), OWN_KEY, "outbox", WARNING, "since"),
        (dataclasses.replace(ENROLLED, lost_updates=2), OWN_KEY, "outbox", WARNING, "2 damaged updates"),
    ],
)
def test_identity_and_state_folder_are_judged(state, own, name, outcome, finding):
    found = one(identity.checks(state, own, NOW), name)
    assert found.outcome is outcome
    assert finding in found.finding


def test_a_token_is_told_without_its_secret():
    token = EnrolToken(
        federation=FEDERATION,
        broker_url=URL,
        root=CRYPTO.verify_key(key("root")),
        registrar=CRYPTO.sealing_public_key(CRYPTO.generate_sealing_key(bytes(32))),
        token_id="t-1",
        secret=bytes(range(32)),
    )
    found = identity.token(token, ENROLLED)
    assert found.outcome is OK
    assert bytes(range(32)).hex() not in str(found)
    assert token.encode() not in str(found)
    other = identity.token(dataclasses.replace(token, federation="elsewhere"), ENROLLED)
    assert other.outcome is WARNING


# ---- data -------------------------------------------------------------------------------------------


def test_data_that_are_there_are_good_before_a_model_was_fetched(tmp_path):
    config = DataConfig(source=NpzFile(tmp_path / "t.npz"))
    assert data(config, tmp_path).outcome is PROBLEM
    np.savez(tmp_path / "t.npz", x=np.zeros((3, 2)), y=np.zeros(3))
    found = data(config, tmp_path)
    assert (found.outcome, "told after the first round" in found.finding) == (OK, True)


# ---- broker -----------------------------------------------------------------------------------------


def test_paths_that_the_system_refuses_are_findings_and_end_nothing(tmp_path):
    beyond = tmp_path / ("x" * 300)  # as a folder closed to this user: an error, not merely an absence
    found = data(DataConfig(source=NpzFile(beyond / "train.npz")), tmp_path / "state")
    assert found.outcome is PROBLEM
    assert "too long" in found.finding
    assert "permissions" in found.remedy
    assert machine.look(beyond).place == tmp_path


def test_every_step_up_to_the_obstacle_is_told_and_none_after_it():
    address = BrokerAddress(host="b", port=1883)
    found = Contact(
        step=Step.TCP, obstacle=Obstacle.REFUSED, detail="Connection refused", addresses=("10.0.0.1",)
    )
    checks = list(broker.checks(address, found, NOW))
    assert [(check.name, check.outcome) for check in checks] == [("broker name", OK), ("broker tcp", PROBLEM)]
    assert checks[-1].finding == "mqtt://b:1883: the host refuses the port (Connection refused)"
    assert all(obstacle.finding and obstacle.remedy for obstacle in Obstacle)


@pytest.mark.parametrize(("limit", "outcome"), [(None, OK), (1 << 20, OK), (100, PROBLEM)])
def test_a_packet_limit_below_the_smallest_chunk_is_a_problem(limit, outcome):
    found = Contact(step=Step.MQTT, addresses=("::1",), mqtt_version="5.0", max_packet_bytes=limit)
    checks = list(broker.checks(BrokerAddress(host="b", port=1), found, NOW))
    assert one(checks, "broker packet limit").outcome is outcome


def certificate(folder, start, end):
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([])
    utc = datetime.timezone.utc
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(7)
        .not_valid_before(datetime.datetime.fromtimestamp(start, utc))
        .not_valid_after(datetime.datetime.fromtimestamp(end, utc))
        .sign(private, hashes.SHA256())
    )
    file = folder / "client.pem"
    file.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    return file


@pytest.mark.parametrize(
    ("start", "end", "outcome", "finding"),
    [
        (NOW - 1000, NOW + 400 * 86_400, OK, "valid until 2028-02"),
        (NOW - 1000, NOW + 86_400, WARNING, "it expires on"),
        (NOW - 1000, NOW - 100, PROBLEM, "it expired on"),
        (NOW + 1000, NOW + 9000, PROBLEM, "not valid yet"),
    ],
)
def test_a_client_certificate_is_judged_by_its_dates(tmp_path, start, end, outcome, finding):
    file = certificate(tmp_path, start, end)
    assert pem_validity(file.read_bytes()) == Validity(start, end)
    found = broker.client_certificate(file, NOW)
    assert found.outcome is outcome
    assert finding in found.finding
    file.write_text("no certificate")
    assert broker.client_certificate(file, NOW).outcome is PROBLEM
    assert broker.client_certificate(tmp_path / "no", NOW).outcome is PROBLEM


@pytest.mark.parametrize(
    ("properties", "limit"),
    [
        (b"", None),
        (b"\x27" + struct.pack(">I", 5000), 5000),
        (b"\x21\x00\x14\x12\x00\x02id\x26\x00\x01a\x00\x01b\x25\x01\x27" + struct.pack(">I", 70_000), 70_000),
        (b"\x27\x00", None),
        (b"\xff", None),
        (b"\x12\xff\xff", None),
    ],
)
def test_the_packet_limit_is_found_among_the_properties_of_a_connack(properties, limit):
    assert _packet_limit(bytes([len(properties)]) + properties) == limit


def test_a_connect_packet_is_that_of_the_specification():
    address = BrokerAddress(host="b", port=1, username="u", password="p")
    assert connect_packet(address, "id", v5=True) == (
        b"\x10\x15\x00\x04MQTT\x05\xc2\x00\x1e\x00\x00\x02id\x00\x01u\x00\x01p"
    )
    assert connect_packet(BrokerAddress(host="b", port=1), "id", v5=False) == (
        b"\x10\x0e\x00\x04MQTT\x04\x02\x00\x1e\x00\x02id"
    )
