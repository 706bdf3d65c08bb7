"""``edge-runtime status`` and ``doctor`` as commands; the ways to the broker are in tests/broker/test_doctor.py."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from edge_runtime import cli
from edge_runtime.backends.artifact_folder import folder_bundle
from edge_runtime.protocol.certificates import issue_device
from edge_runtime.protocol.crypto.provider import CRYPTO
from edge_runtime.protocol.enrol_token import EnrolToken
from edge_runtime.protocol.identities import DeviceCertificate
from edge_runtime.protocol.ids import RoundId, sha256
from edge_runtime.store import DeviceStore, Enrolment, Message, OutboxEntry, SavedCheckpoint
from tests.support.command_line import refusal, run
from tests.support.enrolling import DEVICE, FEDERATION, key
from tests.support.tiny_artifact import tiny_artifact

ROOT = key("root")
NOWHERE = "mqtt://127.0.0.1:1"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    np.savez(tmp_path / "train.npz", x=np.zeros((4, 2)), y=np.zeros(4))
    path = tmp_path / "device.toml"
    path.write_text('state_folder = "state"\n[data]\nsource = "train.npz"\n')
    return path


def enrol(store: DeviceStore) -> None:
    own = CRYPTO.verify_key(store.signing_key(lambda: key(DEVICE)))
    body = DeviceCertificate(federation=FEDERATION, device=DEVICE, signing_key=own.raw, epoch=2)
    store.enrol(
        Enrolment(
            federation=FEDERATION,
            device=DEVICE,
            broker_url=NOWHERE,
            root_key=CRYPTO.verify_key(ROOT),
            certificate=issue_device(CRYPTO, ROOT, body),
        )
    )


def entry(number: int) -> OutboxEntry:
    digest = sha256(bytes([number]))
    messages = (Message("t", b"x" * 300), Message("t", b"y" * 100))
    return OutboxEntry(
        round_id=RoundId(1, number), manifest_digest=digest, update_digest=digest, messages=messages
    )


def status(config: Path) -> dict[str, object]:
    done = run(cli.main, "status", "--config", str(config), "--json")
    assert (done.code, done.err) == (0, "")
    return dict(json.loads(done.out))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_status_of_a_device_that_is_not_enrolled_names_the_next_step_and_makes_nothing(config):
    done = run(cli.main, "status", "--config", str(config))
    assert (done.code, done.err) == (0, "")
    assert "not enrolled: `edge-runtime enroll`" in done.out
    assert status(config)["enrolled"] is False
    assert not (config.parent / "state").exists()


def test_the_status_is_told_while_the_program_runs_and_changes_nothing(config):
    with DeviceStore(config.parent / "state") as store:
        enrol(store)
        store.advance_round(RoundId(1, 5))
        store.outbox.remove(RoundId(1, 4))
        store.outbox.put(entry(5))
        store.checkpoints.put(
            sha256(b"manifest"), sha256(b"binding"), SavedCheckpoint(content=b"c", trained_s=31.5)
        )
        before = snapshot(config.parent)
        found = status(config)
        text = run(cli.main, "status", "--config", str(config)).out
        assert snapshot(config.parent) == before
    assert (found["running"], found["pid"]) == (True, os.getpid())
    assert (found["federation"], found["device"], found["certificate_epoch"]) == (FEDERATION, DEVICE, 2)
    assert found["root_sha256"] == sha256(CRYPTO.verify_key(ROOT).raw).hex()
    assert (found["last_round"], found["last_settled_round"], found["checkpoint_s"]) == ([1, 5], [1, 4], 31.5)
    (pending,) = found["pending_updates"]
    assert (pending["round"], pending["bytes"]) == ([1, 5], 400)
    for part in (
        f"{DEVICE} of {FEDERATION}, certificate epoch 2",
        f"runs as process {os.getpid()}",
        "last seen 5 (generation 1), last settled 4 (generation 1)",
        "of round 5 (generation 1), 400 bytes, waits for its receipt since",
        "32 s of training kept",
    ):
        assert part in text
    assert status(config)["running"] is False


def test_an_update_that_is_settled_but_not_yet_removed_is_not_pending(config):
    with DeviceStore(config.parent / "state") as store:
        store.outbox.put(entry(5))
        file = next((config.parent / "state" / "outbox").glob("*.entry"))
        content = file.read_bytes()
        store.outbox.remove(RoundId(1, 5))
    file.write_bytes(content)  # as a crash between the two leaves it
    found = status(config)
    assert (found["pending_updates"], found["last_settled_round"]) == ([], [1, 5])


def test_damaged_files_are_told_and_the_rest_of_the_status_too(config):
    with DeviceStore(config.parent / "state") as store:
        enrol(store)
        store.advance_round(RoundId(1, 5))
        store.outbox.put(entry(5))
    (config.parent / "state" / "round").write_bytes(b"cut off")
    entry_file = next((config.parent / "state" / "outbox").glob("*.entry"))
    entry_file.write_bytes(entry_file.read_bytes()[:-1])
    found = status(config)
    assert (found["device"], found["last_round"], found["pending_updates"]) == (DEVICE, None, [])
    assert [text.partition(": ")[0] for text in found["damaged"]] == [
        str(entry_file),
        str(config.parent / "state" / "round"),
    ]
    done = run(cli.main, "doctor", "--config", str(config), "--json")
    checks = {check["name"]: check for check in json.loads(done.out)["checks"]}
    assert done.code == 1
    assert checks["state folder"]["outcome"] == "problem"
    assert checks["enrolment"]["outcome"] == "ok"


def test_the_policy_is_told_by_both_commands(config):
    config.write_text(
        config.read_text() + '[policy]\nquiet_hours = ["00:00-12:00", "12:00-00:00"]\nmax_load = 1\n'
    )
    found = status(config)
    assert found["may_train"] is False
    assert "quiet hours" in [violation["name"] for violation in found["violations"]]
    assert "not now: quiet hours" in run(cli.main, "status", "--config", str(config)).out
    assert "quiet hours" in run(cli.main, "doctor", "--config", str(config)).out


# ---- doctor -----------------------------------------------------------------------------------------


def test_before_enrolling_the_token_tells_the_doctor_where_the_broker_is(config):
    token = EnrolToken(
        federation=FEDERATION,
        broker_url=NOWHERE,
        root=CRYPTO.verify_key(ROOT),
        registrar=CRYPTO.sealing_public_key(CRYPTO.generate_sealing_key(bytes(32))),
        token_id="t-1",
        secret=bytes(range(32)),
    ).encode()
    file = config.parent / "token"
    file.write_text(token)
    done = run(cli.main, "doctor", "--config", str(config), "--token-file", str(file))
    assert done.code == 1
    assert "of federation digits; only the registrar knows whether it expired" in done.out
    assert "mqtt://127.0.0.1:1: the host refuses the port" in done.out
    assert token not in done.out
    piped = run(cli.main, "doctor", "--config", str(config), "--token-file", "-", stdin="nonsense")
    assert piped.code == 1
    assert "this is no enrolment token" in piped.out
    assert "no address is known yet" in piped.out
    assert not (config.parent / "state").exists()


def test_once_a_model_was_fetched_the_doctor_reads_all_samples_against_it(config):
    bundle = folder_bundle(tiny_artifact())
    with DeviceStore(config.parent / "state") as store:
        store.blobs.put(sha256(bundle), bundle)

    def data() -> tuple[str, str]:
        done = run(cli.main, "doctor", "--config", str(config), "--json")
        (found,) = [check for check in json.loads(done.out)["checks"] if check["name"] == "data"]
        return found["outcome"], found["finding"]

    outcome, finding = data()
    assert outcome == "problem"
    assert "the model's 'x' needs (rows, 4)" in finding
    np.savez(config.parent / "train.npz", x=np.zeros((3, 4)), y=np.zeros((3, 1)))
    outcome, finding = data()
    assert outcome == "ok"
    assert "3 samples, which fit the model" in finding


def test_without_token_and_enrolment_nothing_is_a_problem_yet(config):
    done = run(cli.main, "doctor", "--config", str(config))
    assert done.code == 0, done.out
    assert "warning  enrolment           not enrolled yet" in done.out
    assert "unknown  broker" in done.out


def test_bad_settings_are_a_problem_that_names_every_key(config):
    config.write_text('state_folder = "state"\n[data]\nsource = "t.npz"\nsorce = 1\n[limits]\nthreads = 0\n')
    done = run(cli.main, "doctor", "--config", str(config), "--json")
    (found,) = [check for check in json.loads(done.out)["checks"] if check["outcome"] == "problem"]
    assert (done.code, found["name"]) == (1, "settings")
    assert "data.sorce: unknown key; did you mean source?" in found["finding"]
    assert "limits.threads: 0; 1 to 256" in found["finding"]


def test_a_missing_token_file_is_refused(config):
    words = ["doctor", "--config", str(config), "--token-file", str(config.parent / "no")]
    assert "no cannot be read" in refusal(cli.main, *words)
