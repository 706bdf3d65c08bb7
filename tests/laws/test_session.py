"""Whatever comes in whatever order: one update a round, nothing sent that was not journalled, no crash.

``tests.support.session_driver.Device`` checks the order of effects at every event.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.protocol.errors import LocalProtocolError
from edge_runtime.protocol.ids import RoundId, sha256
from edge_runtime.protocol.kinds import Kind
from edge_runtime.protocol.manifest import Cohort
from edge_runtime.protocol.rejects import Reject
from edge_runtime.protocol.rounds import FederationState, Verdict
from edge_runtime.session_values import Eligibility, Train, Trained, TrainingFailed, TrainingPaused, Work
from tests.support.session_driver import DEVICE, OTHER, Aggregator, Device, Published, an_update, signing_key

AGGREGATORS = {generation: Aggregator(generation=generation) for generation in (1, 2)}
FORGER = Aggregator(signing=signing_key(66))
_MANIFESTS: dict[tuple[int, int, FederationState, bool, int], Published] = {}


def _manifest(
    generation: int, number: int, state: FederationState, selected: bool, variant: int
) -> Published:
    key = (generation, number, state, selected, variant)
    if key not in _MANIFESTS:
        _MANIFESTS[key] = AGGREGATORS[generation].manifest(
            number,
            state,
            cohort=[DEVICE] if selected else [OTHER],
            model=bytes([variant]) * 10_000,
            artifact=b"artifact",
        )
    return _MANIFESTS[key]


def _device() -> Device:
    """A new device, and a blob server that has seen nobody yet."""
    blobs = Aggregator().blobs
    contents = [bytes([variant]) * 10_000 for variant in (0, 1)] + [b"artifact"]
    for content in (*contents, *(Cohort(devices=(name,)).encode() for name in (DEVICE, OTHER))):
        blobs.offer(content)
    AGGREGATORS[1].blobs = blobs
    return Device(AGGREGATORS[1])


Operation = Callable[[Device], object]
generations = st.sampled_from([1, 1, 1, 2])
rounds = st.integers(1, 4)


def _hear_manifest(published: Published) -> Operation:
    return lambda device: device.hear_manifest(published)


def _receipt(aggregator: Aggregator, verdict: Verdict, number: int | None, digest: bool) -> Operation:
    def run(device: Device) -> None:
        if not device.journal:
            return
        entry = device.journal[max(device.journal)]
        if number is not None:
            entry = replace(entry, round_id=RoundId(entry.round_id.generation, number))
        if not digest:
            entry = replace(entry, update_digest=sha256(b"other"))
        reject = Reject.NOT_FINITE if verdict is Verdict.REJECTED else None
        device.hear(aggregator.receipt(entry, verdict, reject))

    return run


def _fetch(seed: int) -> Operation:
    return lambda device: device.fetch_all(
        lambda topic, _: sha256(bytes([seed]), topic.encode())[0] < 4 * seed
    )


def _trained(number: int | None) -> Operation:
    """The shell speaks up only while it trains, or a little too late."""

    def run(device: Device) -> None:
        current = device.session.manifest
        if current is None:
            return
        round_id = current.round_id if number is None else RoundId(current.round_id.generation, number)
        device.handle(Trained(round_id, an_update(bytes([len(device.effects) % 256]))))

    return run


def _take_part(stages: int, next_round: bool) -> Operation:
    """The usual course of a round, cut off after some stage: manifest, blobs, training, resends, receipt."""

    def run(device: Device) -> None:
        at = device.highest
        number = min(at.number + next_round, 30)
        device.hear_manifest(_manifest(max(at.generation, 1), number, FederationState.COLLECTING, True, 0))
        course: list[Operation] = [
            lambda device: device.fetch_all(),
            _trained(None),
            lambda device: device.wait(20.0),
            _receipt(AGGREGATORS[max(at.generation, 1)], Verdict.STORED, None, True),
        ]
        for operation in course[:stages]:
            operation(device)

    return run


def _failed(device: Device) -> None:
    if device.session.work is Work.TRAINING and device.session.manifest is not None:
        device.handle(TrainingFailed(device.session.manifest.round_id, "no"))


def _eligibility(device: Device, may_train: bool, may_send: bool, hand_back: bool) -> None:
    """As the shell does it: what was in training is handed back, unless the process died in between."""
    was_training = device.session.work is Work.TRAINING
    device.handle(Eligibility(may_train, may_send))
    begun = [effect for effect in device.effects if isinstance(effect, Train)]
    if hand_back and was_training and not may_train:
        device.handle(TrainingPaused(begun[-1]))


operations: st.SearchStrategy[Operation] = st.one_of(
    st.builds(_take_part, st.integers(0, 4), st.sampled_from([True, True, False])),
    st.builds(_take_part, st.integers(2, 4), st.just(True)),
    st.builds(
        lambda *args: _hear_manifest(_manifest(*args)),
        generations,
        rounds,
        st.sampled_from([FederationState.COLLECTING] * 4 + list(FederationState)),
        st.sampled_from([True, True, False]),
        st.integers(0, 1),
    ),
    st.builds(
        lambda *words: lambda device: _eligibility(device, *words),
        st.booleans(),
        st.booleans(),
        st.booleans(),
    ),
    st.builds(_fetch, st.sampled_from([0, 0, 10, 30])),
    st.builds(_trained, st.one_of(st.none(), st.none(), rounds)),
    st.builds(
        _receipt,
        st.sampled_from([AGGREGATORS[1], AGGREGATORS[1], AGGREGATORS[2], FORGER]),
        st.sampled_from(Verdict),
        st.one_of(st.none(), st.none(), rounds),
        st.sampled_from([True, True, False]),
    ),
    st.sampled_from(
        [
            lambda device: setattr(device, "upload_s", 0.0),
            lambda device: setattr(device, "upload_s", 90.0),
            lambda device: device.connect(session_present=True),
            lambda device: device.connect(session_present=False),
            lambda device: device.disconnect(),
            lambda device: device.wait(1.0),
            lambda device: device.wait(700.0),
            lambda device: device.restart(),
            lambda device: device.hear(b"\x0a\x01\xff"),
            _failed,
        ]
    ),
)


@given(run=st.lists(operations, min_size=3, max_size=30))
@settings(deadline=None, max_examples=100)
def test_no_run_of_events_makes_two_updates_for_a_round(run: list[Operation]) -> None:
    device = _device()
    device.connect()
    for operation in run:
        before = device.session.highest_round
        operation(device)
        assert device.session.highest_round >= before
        assert device.session.highest_round == device.highest
        pending = device.session.pending
        assert pending is None or device.outbox[pending.round_id] == pending
        if device.session.work is Work.IDLE:
            assert not device.subscribed
    sent: dict[tuple[RoundId, int], set[bytes]] = {}
    for envelope in device.sent(Kind.UPDATE):
        key = (envelope.header.round_id, envelope.header.chunk_index)
        sent.setdefault(key, set()).add(envelope.header_bytes + envelope.body + envelope.signature)
    assert all(len(copies) == 1 for copies in sent.values())
    assert {round_id for round_id, _ in sent} <= set(device.journal)
    sequences = [
        envelope.header.sequence
        for kind in (Kind.CHECKIN, Kind.FETCH, Kind.TELEMETRY)
        for envelope in device.sent(kind)
    ]
    assert len(set(sequences)) == len(sequences)


def test_a_shell_that_loses_track_of_the_outbox_is_told() -> None:
    """``pending`` and training at once cannot come of events, only of a shell that meddles."""
    device = _device()
    device.connect()
    device.hear_manifest(_manifest(1, 1, FederationState.COLLECTING, True, 0))
    device.fetch_all()
    device.trained()
    device.session.work = Work.TRAINING
    with pytest.raises(LocalProtocolError, match="second update"):
        device.trained()
