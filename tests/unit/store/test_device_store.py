"""The state folder as its owner sees it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest

from edge_runtime.protocol.crypto.keys import SigningKey, VerifyKey
from edge_runtime.protocol.errors import LocalProtocolError
from edge_runtime.protocol.ids import RoundId, device_id, federation_id, sha256
from edge_runtime.store import DeviceStore, Enrolment, Message, OutboxEntry, StateError


def entry(number: int, payload: bytes = b"payload") -> OutboxEntry:
    return OutboxEntry(
        round_id=RoundId(1, number),
        manifest_digest=sha256(b"m"),
        update_digest=sha256(payload),
        messages=(Message("fl/1/f/up/3/d", payload),),
    )


def enrolment(**changes) -> Enrolment:
    values = {
        "federation": federation_id("wind"),
        "device": device_id("mill-1"),
        "broker_url": "mqtt://localhost",
        "root_key": VerifyKey(b"\1" * 32),
        "certificate": b"cert",
    }
    return Enrolment(**{**values, **changes})


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "state"


def test_keys_are_made_once_and_only_their_owner_can_read_them(folder):
    with DeviceStore(folder) as store:
        key = store.signing_key(lambda: SigningKey(b"k" * 32))
        seed = store.seed(lambda n: b"s" * n)
    with DeviceStore(folder) as store:
        assert store.signing_key(lambda: pytest.fail("made twice")) == key
        assert store.seed(lambda n: pytest.fail("made twice")) == seed == b"s" * 32
        store.outbox.put(entry(1))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for path in folder.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_second_process_is_told_which_one_holds_the_folder(folder):
    script = "import sys, pathlib, edge_runtime.store as s; s.DeviceStore(pathlib.Path(sys.argv[1]))"
    with DeviceStore(folder):
        run = subprocess.run(
            [sys.executable, "-c", script, folder], capture_output=True, text=True, check=False
        )
        assert f"in use by process {os.getpid()}" in run.stderr
    assert subprocess.run([sys.executable, "-c", script, folder], check=False).returncode == 0


def test_a_folder_of_something_else_is_refused_and_untouched(folder):
    folder.mkdir(mode=0o700)
    (folder / "photo.jpg").write_bytes(b"")
    with pytest.raises(StateError, match="holds other files"):
        DeviceStore(folder)
    assert [path.name for path in folder.iterdir()] == ["photo.jpg"]


def test_a_folder_that_others_can_read_is_refused(folder):
    DeviceStore(folder).close()
    folder.chmod(0o755)
    with pytest.raises(StateError, match="chmod 700"):
        DeviceStore(folder)


def test_a_file_in_place_of_the_folder_is_refused(folder):
    folder.write_text("")
    with pytest.raises(StateError, match="not a folder"):
        DeviceStore(folder)


def test_an_enrolment_is_kept_and_may_be_renewed(folder):
    with DeviceStore(folder) as store:
        assert store.enrolment is None
        store.enrol(enrolment())
        store.enrol(enrolment(certificate=b"renewed"))
    with DeviceStore(folder) as store:
        assert store.enrolment == enrolment(certificate=b"renewed")


@pytest.mark.parametrize(
    "other",
    [
        {"federation": federation_id("sun")},
        {"device": device_id("mill-2")},
        {"root_key": VerifyKey(b"\2" * 32)},
    ],
    ids=["federation", "device", "root key"],
)
def test_a_folder_of_another_federation_device_or_root_is_refused(folder, other):
    with DeviceStore(folder) as store:
        store.enrol(enrolment())
        with pytest.raises(StateError, match="belongs to device 'mill-1' of federation 'wind'"):
            store.enrol(enrolment(**other))
        assert store.enrolment == enrolment()


def test_the_highest_round_never_goes_back(folder):
    with DeviceStore(folder) as store:
        assert store.highest_round is None
        store.advance_round(RoundId(1, 9))
        store.advance_round(RoundId(1, 9))
        store.advance_round(RoundId(2, 1))
        with pytest.raises(LocalProtocolError):
            store.advance_round(RoundId(1, 10))
    with DeviceStore(folder) as store:
        assert store.highest_round == RoundId(2, 1)


def test_sequence_numbers_grow_by_one_and_skip_ahead_after_a_restart(folder):
    with DeviceStore(folder) as store:
        assert [store.next_sequence() for _ in range(3)] == [1, 2, 3]
    with DeviceStore(folder) as store:
        assert store.next_sequence() == 257


@pytest.mark.parametrize("name", ["identity", "enrolment", "round", "sequence", "seed"])
def test_a_damaged_file_stops_the_device_and_is_named(folder, name):
    with DeviceStore(folder) as store:
        store.signing_key(lambda: SigningKey(b"k" * 32))
        store.seed(lambda n: bytes(n))
        store.enrol(enrolment())
        store.advance_round(RoundId(1, 1))
        store.next_sequence()
    (folder / name).write_bytes((folder / name).read_bytes()[:-3])

    def open_and_read_keys():
        with DeviceStore(folder) as store:
            store.signing_key(lambda: pytest.fail("a new identity over a damaged one"))
            store.seed(lambda n: pytest.fail("a new seed over a damaged one"))

    with pytest.raises(StateError, match=f"{name}: .*enrol again"):
        open_and_read_keys()


# ---- outbox -----------------------------------------------------------------------------------------


def test_the_outbox_gives_back_the_exact_messages_oldest_round_first(folder):
    with DeviceStore(folder) as store:
        store.outbox.put(entry(12))
        store.outbox.put(entry(2, b""))
        store.outbox.put(entry(12))
    with DeviceStore(folder) as store:
        assert store.outbox.entries() == (entry(2, b""), entry(12))


def test_a_second_different_update_for_a_round_is_our_own_bug(folder):
    with DeviceStore(folder) as store:
        store.outbox.put(entry(1))
        with pytest.raises(LocalProtocolError, match="second, different"):
            store.outbox.put(entry(1, b"other"))
        assert store.outbox.entries() == (entry(1),)


def test_a_round_that_is_over_takes_no_update_again_also_after_a_restart(folder):
    with DeviceStore(folder) as store:
        store.outbox.put(entry(1))
        store.outbox.remove(RoundId(1, 1))
        store.outbox.remove(RoundId(1, 2))  # nothing came of that training
    with DeviceStore(folder) as store:
        assert store.outbox.entries() == ()
        assert store.outbox.settled == RoundId(1, 2)
        assert not store.outbox.answered(RoundId(1, 3))
        for number in (1, 2):
            with pytest.raises(LocalProtocolError, match="over"):
                store.outbox.put(entry(number))


def test_a_damaged_entry_is_set_aside_logged_and_its_round_stays_closed(folder, caplog):
    with DeviceStore(folder) as store:
        store.outbox.put(entry(1))
        store.outbox.put(entry(2))
    path = folder / "outbox" / "0000000001-0000000001.entry"
    damaged = path.read_bytes().replace(b"payload", b"pAyload")
    path.write_bytes(damaged)
    with DeviceStore(folder) as store:
        assert store.outbox.entries() == (entry(2),)
        (aside,) = store.outbox.set_aside
        assert aside.read_bytes() == damaged
        assert store.outbox.answered(RoundId(1, 1))
    assert "checksum" in caplog.text
    assert path.name in caplog.text


def test_an_entry_under_the_name_of_another_round_is_not_sent(folder):
    with DeviceStore(folder) as store:
        store.outbox.put(entry(1))
    path = folder / "outbox" / "0000000001-0000000001.entry"
    path.rename(path.with_name("0000000001-0000000007.entry"))
    with DeviceStore(folder) as store:
        assert store.outbox.entries() == ()
        assert len(store.outbox.set_aside) == 1


# ---- blobs ------------------------------------------------------------------------------------------


def test_a_blob_is_kept_over_a_restart_and_a_damaged_one_is_fetched_again(folder):
    digest = sha256(b"index")
    with DeviceStore(folder) as store:
        assert store.blobs.get(digest) is None
        store.blobs.put(digest, b"graphs")
    with DeviceStore(folder) as store:
        assert store.blobs.get(digest) == b"graphs"
        assert store.blobs.digests() == {digest}
        path = next((folder / "blobs").iterdir())
        path.write_bytes(path.read_bytes()[:-1])
        assert store.blobs.get(digest) is None
        assert store.blobs.digests() == frozenset()


def test_the_blob_cache_forgets_the_oldest_beyond_its_limit_but_never_the_newest(folder):
    digests = [sha256(bytes([i])) for i in range(3)]
    with DeviceStore(folder, max_blob_bytes=3000) as store:
        for age, digest in enumerate(digests[:2]):
            store.blobs.put(digest, bytes(1000))
            os.utime(folder / "blobs" / f"{digest.hex()}.blob", (age, age))
        assert store.blobs.put(digests[2], bytes(1500)) == {digests[0]}
        assert store.blobs.digests() == set(digests[1:])
        assert store.blobs.put(digests[0], bytes(5000)) == set(digests[1:])
        assert store.blobs.digests() == {digests[0]}
