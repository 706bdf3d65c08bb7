"""The state folder is cut off before every single operation, and what was not synced is lost or kept."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.protocol.crypto.keys import VerifyKey
from edge_runtime.protocol.ids import RoundId, device_id, federation_id, sha256
from edge_runtime.store import DeviceStore, Enrolment, FileLayer, Message, OutboxEntry, StateError, records

FIRST, SECOND = RoundId(1, 1), RoundId(1, 2)


class PowerCut(BaseException):
    """Not an Exception: no handler of the store may mistake it for one."""


class CutFileLayer(FileLayer):
    """Stops before operation ``cut``; ``power`` then undoes what was never synced, as a power cut may.

    Undone: the content of unsynced files (half of it stays), then renames and removals of unsynced folders.
    """

    def __init__(self, cut: int, *, power: bool) -> None:
        self.cut = cut
        self.power = power
        self.operations = 0
        self._unsynced: dict[Path, bytes] = {}
        self._undo: list[tuple[Path, Callable[[], object]]] = []

    def _count(self) -> None:
        if self.operations == self.cut:
            if self.power:
                for path, content in self._unsynced.items():
                    path.write_bytes(content[: len(content) // 2])
                for _, undo in reversed(self._undo):
                    undo()
            raise PowerCut
        self.operations += 1

    def write(self, path: Path, parts: Sequence[bytes]) -> None:
        self._count()
        super().write(path, parts)
        self._unsynced[path] = path.read_bytes()

    def sync(self, path: Path) -> None:
        self._count()
        super().sync(path)
        self._unsynced.pop(path, None)
        self._undo = [(folder, undo) for folder, undo in self._undo if folder != path]

    def rename(self, source: Path, target: Path) -> None:
        self._count()
        content, old = source.read_bytes(), target.read_bytes() if target.exists() else None
        super().rename(source, target)
        if source in self._unsynced:
            self._unsynced[target] = self._unsynced.pop(source)

        def undo() -> None:
            source.write_bytes(content)
            target.unlink() if old is None else target.write_bytes(old)

        self._undo.append((target.parent, undo))

    def remove(self, path: Path) -> None:
        self._count()
        if path.exists():
            content = path.read_bytes()
            self._undo.append((path.parent, lambda: path.write_bytes(content)))
        super().remove(path)


def entry(round_id: RoundId, fill: bytes = b"u") -> OutboxEntry:
    return OutboxEntry(
        round_id=round_id,
        manifest_digest=sha256(b"manifest"),
        update_digest=sha256(fill),
        messages=(
            Message("fl/1/f/up/7/d", fill * 100),
            Message("fl/1/f/up/7/d", b""),
            Message("t", b"\0\n" * 50),
        ),
    )


def no_temporaries(folder: Path) -> bool:
    return not list(folder.rglob("*.tmp"))


def each_kind_of_cut(
    tmp_path: Path, action: Callable[[DeviceStore], object], prepare: Callable[[DeviceStore], object]
) -> Iterator[Path]:
    """Every folder that a cut during ``action`` can leave behind; ``prepare`` ran to its end before."""
    for power in (False, True):
        for cut in itertools.count():
            folder = tmp_path / f"{cut}-{power}"
            with DeviceStore(folder) as store:
                prepare(store)
            layer = CutFileLayer(10**9, power=power)
            finished = False
            with DeviceStore(folder, files=layer) as store:
                layer.cut = layer.operations + cut
                with contextlib.suppress(PowerCut):
                    action(store)
                    finished = True
            if finished:
                assert cut >= 4, "an atomic write has at least four operations"
                break
            yield folder


def test_a_cut_put_leaves_the_entry_whole_or_not_at_all_and_it_can_be_put_again(tmp_path):
    seen = set()
    for folder in each_kind_of_cut(
        tmp_path, lambda s: s.outbox.put(entry(SECOND)), lambda s: s.outbox.put(entry(FIRST, b"v"))
    ):
        with DeviceStore(folder) as store:
            rounds = [e.round_id for e in store.outbox.entries()]
            seen.add(len(rounds))
            assert store.outbox.get(FIRST) == entry(FIRST, b"v")
            assert store.outbox.get(SECOND) in (None, entry(SECOND))
            assert store.outbox.set_aside == ()
            assert no_temporaries(folder)
            store.outbox.put(entry(SECOND))
            assert store.outbox.get(SECOND) == entry(SECOND)
    assert seen == {1, 2}, "cuts on both sides of the commit were seen"


def test_a_put_that_returned_survives_the_loss_of_everything_unsynced(tmp_path):
    layer = CutFileLayer(10**9, power=True)
    with DeviceStore(tmp_path / "s", files=layer) as store:
        store.outbox.put(entry(FIRST))
        layer.cut = layer.operations
        with pytest.raises(PowerCut):
            store.next_sequence()
    with DeviceStore(tmp_path / "s") as store:
        assert store.outbox.entries() == (entry(FIRST),)


def test_a_cut_remove_leaves_the_same_entry_or_a_round_that_is_over(tmp_path):
    for folder in each_kind_of_cut(
        tmp_path, lambda s: s.outbox.remove(FIRST), lambda s: s.outbox.put(entry(FIRST))
    ):
        with DeviceStore(folder) as store:
            assert store.outbox.get(FIRST) in (None, entry(FIRST))
            assert store.outbox.answered(FIRST)
            store.outbox.remove(FIRST)
            assert store.outbox.entries() == ()


def test_a_cut_never_repeats_a_sequence_number(tmp_path):
    given_out: list[int] = []

    def begin(store):
        given_out[:] = [store.next_sequence()]

    def spend(store):
        for _ in range(600):
            given_out.append(store.next_sequence())

    for folder in each_kind_of_cut(tmp_path, spend, begin):
        with DeviceStore(folder) as store:
            assert store.next_sequence() > max(given_out)


def test_a_cut_never_takes_the_highest_round_back(tmp_path):
    for folder in each_kind_of_cut(
        tmp_path, lambda s: s.advance_round(SECOND), lambda s: s.advance_round(FIRST)
    ):
        with DeviceStore(folder) as store:
            assert store.highest_round in (FIRST, SECOND)


def test_a_cut_enrolment_is_there_whole_or_not_at_all(tmp_path):
    enrolment = Enrolment(
        federation=federation_id("f"),
        device=device_id("d"),
        broker_url="mqtt://b",
        root_key=VerifyKey(bytes(32)),
        certificate=b"certificate",
    )
    for folder in each_kind_of_cut(tmp_path, lambda s: s.enrol(enrolment), lambda s: None):
        with DeviceStore(folder) as store:
            assert store.enrolment in (None, enrolment)


def test_a_cut_while_a_damaged_entry_is_set_aside_never_opens_its_round_again(tmp_path):
    for power in (False, True):
        for cut in itertools.count():
            folder = tmp_path / f"{cut}-{power}"
            with DeviceStore(folder) as store:
                store.outbox.put(entry(FIRST))
            (path,) = (folder / "outbox").glob("*.entry")
            path.write_bytes(path.read_bytes()[:-1])
            layer = CutFileLayer(cut, power=power)
            try:
                DeviceStore(folder, files=layer).close()
            except PowerCut:
                pass
            else:
                break
            with DeviceStore(folder) as store:
                assert store.outbox.answered(FIRST)
                assert len(store.outbox.set_aside) == 1
        assert cut >= 4


_VALID = b"".join(records.encode("law", {"n": 1}, [b"con", b"tent"]))


@given(st.integers(0, len(_VALID) - 1), st.integers(1, 255))
def test_a_record_with_any_byte_changed_is_refused(position, flip):
    raw = bytearray(_VALID)
    raw[position] ^= flip
    with pytest.raises(StateError):
        records.decode("law", bytes(raw))


@given(st.one_of(st.binary(max_size=200), st.integers(0, len(_VALID) - 1).map(lambda n: _VALID[:n])))
def test_garbage_and_cut_off_records_are_refused(raw):
    with pytest.raises(StateError):
        records.decode("law", raw)


@given(
    st.dictionaries(st.text(max_size=8), st.integers() | st.text(max_size=8)),
    st.lists(st.binary(max_size=50)),
)
def test_records_round_trip(header, content):
    header.pop("kind", None), header.pop("content_bytes", None)
    record = records.decode("law", b"".join(records.encode("law", header, content)))
    assert header.items() <= record.header.items()
    assert record.content == b"".join(content)
