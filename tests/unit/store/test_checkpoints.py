"""The checkpoint of a training: of one round, whole or not at all, never in the way."""

from __future__ import annotations

import contextlib
import stat

import pytest

from edge_runtime.protocol.ids import sha256
from edge_runtime.store import DamagedFileError, DeviceStore, SavedCheckpoint
from tests.laws.test_store_survives_a_cut_at_any_operation import each_kind_of_cut, no_temporaries

ROUND, OTHER_ROUND = sha256(b"manifest 1"), sha256(b"manifest 2")
BINDING, OTHER_DATA = sha256(b"seed and data"), sha256(b"seed and other data")


def saved(step: int) -> SavedCheckpoint:
    return SavedCheckpoint(content=bytes([step]) * 1000, trained_s=step * 1.5)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "state"


def files(folder):
    return list((folder / "checkpoints").iterdir())


def test_a_checkpoint_is_there_after_a_restart_for_its_owner_alone(folder):
    with DeviceStore(folder) as store:
        store.checkpoints.put(ROUND, BINDING, saved(1))
        store.checkpoints.put(ROUND, BINDING, saved(2))
    (path,) = files(folder)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with DeviceStore(folder) as store:
        assert store.checkpoints.get(ROUND, BINDING) == saved(2)
        store.checkpoints.keep_only(ROUND)
        assert store.checkpoints.get(ROUND, BINDING) == saved(2)


def test_a_checkpoint_of_other_data_is_none_and_is_removed(folder):
    with DeviceStore(folder) as store:
        store.checkpoints.put(ROUND, BINDING, saved(1))
        assert store.checkpoints.get(ROUND, OTHER_DATA) is None
        assert files(folder) == []
        assert store.checkpoints.get(ROUND, BINDING) is None


def test_a_checkpoint_of_another_round_is_none_and_goes_when_its_round_is_over(folder):
    with DeviceStore(folder) as store:
        store.checkpoints.put(ROUND, BINDING, saved(1))
        assert store.checkpoints.get(OTHER_ROUND, BINDING) is None
    with DeviceStore(folder) as store:
        store.checkpoints.keep_only(OTHER_ROUND)
        assert files(folder) == []
        store.checkpoints.put(OTHER_ROUND, BINDING, saved(1))
        store.checkpoints.keep_only(None)
        assert files(folder) == []
        store.checkpoints.keep_only(None)


def test_a_damaged_checkpoint_is_told_once_and_is_gone(folder):
    with DeviceStore(folder) as store:
        store.checkpoints.put(ROUND, BINDING, saved(1))
    (path,) = files(folder)
    path.write_bytes(path.read_bytes()[:-1])
    with DeviceStore(folder) as store:
        with pytest.raises(DamagedFileError, match="checksum"):
            store.checkpoints.get(ROUND, BINDING)
        assert files(folder) == []
        assert store.checkpoints.get(ROUND, BINDING) is None


def test_a_checkpoint_under_the_name_of_another_round_is_not_used(folder):
    with DeviceStore(folder) as store:
        store.checkpoints.put(ROUND, BINDING, saved(1))
    (path,) = files(folder)
    path.rename(path.with_name(f"{OTHER_ROUND.hex()}.checkpoint"))
    with DeviceStore(folder) as store:
        assert store.checkpoints.get(OTHER_ROUND, BINDING) is None
        assert files(folder) == []


def test_a_cut_put_leaves_the_checkpoint_before_it_or_the_new_one(tmp_path):
    seen = set()
    for folder in each_kind_of_cut(
        tmp_path,
        lambda store: store.checkpoints.put(ROUND, BINDING, saved(2)),
        lambda store: store.checkpoints.put(ROUND, BINDING, saved(1)),
    ):
        with DeviceStore(folder) as store:
            found = store.checkpoints.get(ROUND, BINDING)
            assert found in (saved(1), saved(2))
            seen.add(found.trained_s)
            assert no_temporaries(folder)
    assert seen == {1.5, 3.0}


def test_files_that_are_not_ours_are_left_alone(folder):
    with DeviceStore(folder):
        pass
    (folder / "checkpoints" / "notes.checkpoint").write_text("mine")
    with DeviceStore(folder) as store, contextlib.suppress(DamagedFileError):
        store.checkpoints.keep_only(None)
        assert store.checkpoints.get(ROUND, BINDING) is None
    assert len(files(folder)) == 1
