"""Each table of the code is the table of docs/protocol.md."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path

import pytest

from edge_runtime.protocol import topics
from edge_runtime.protocol.errors import RemoteProtocolError
from edge_runtime.protocol.ids import DeviceId, FederationId, sha256
from edge_runtime.protocol.kinds import KIB, MIB, Direction, Kind
from edge_runtime.protocol.rejects import Reject
from edge_runtime.protocol.rounds import MOVES, FederationState, Outcome, Phase, Verdict
from edge_runtime.protocol.schedules import SHAPES

DOCUMENT = Path("docs/protocol.md").read_text()


def _table(*head: str) -> list[tuple[str, ...]]:
    """The rows under this head, code marks removed."""
    start = DOCUMENT.index("| " + " | ".join(head) + " |\n")
    lines = DOCUMENT[start:].split("\n\n", 1)[0].splitlines()[2:]
    return [tuple(cell.strip().replace("`", "") for cell in line.strip("|").split("|")) for line in lines]


def _size(count: int) -> str:
    return f"{count // MIB} MiB" if count >= MIB else f"{count // KIB} KiB"


def test_the_document_has_the_table_of_kinds() -> None:
    assert _table("number", "kind", "direction", "signer", "sealed", "most bytes", "purpose") == [
        (
            str(kind.number),
            kind.label,
            kind.direction.value,
            kind.signer.value,
            "yes" if kind.sealed else "no",
            _size(kind.max_payload_bytes),
            kind.value.purpose,
        )
        for kind in Kind
    ]


def test_the_document_says_what_every_kinds_header_carries() -> None:
    rows = _table("kind", "round", "manifest digest", "device", "sequence")
    assert {label for row in rows for label in row[0].split(", ")} == {kind.label for kind in Kind}


def test_the_document_has_the_table_of_refusals() -> None:
    assert _table("code", "name", "meaning", "what to do") == [
        (str(reject.code), reject.name, reject.meaning, reject.remedy) for reject in Reject
    ]


def test_the_document_has_the_shapes_of_a_schedule() -> None:
    shapes = [row[0].split(",")[0] for row in _table("shape", "m(v)", "its fields")]
    assert shapes == [f"{number} {shape}" for number, shape in enumerate(SHAPES)]


def test_the_document_has_the_phases_verdicts_outcomes_and_states() -> None:
    assert _table("phase", "successors") == [
        (phase.value, ", ".join(next_one.value for next_one in MOVES[phase]) or "none") for phase in Phase
    ]
    assert [row[:2] for row in _table("code", "verdict", "meaning")] == [
        (str(verdict.value), verdict.name.lower()) for verdict in Verdict
    ]
    assert [row[0] for row in _table("outcome", "meaning")] == [outcome.value for outcome in Outcome]
    for state in FederationState:
        assert re.search(rf"`{state.name.lower()}` \({state.value}[):]", DOCUMENT)


def test_the_document_has_every_topic() -> None:
    federation, device, blob = FederationId("f"), DeviceId("d"), sha256(b"blob")
    made = {
        topics.manifest(federation),
        topics.presence(federation, device),
        topics.up(federation, device),
        topics.enrol(federation, device),
        topics.down(federation, device),
        topics.blob_piece(federation, blob, 3),
    }
    patterns = [re.sub(r"<\w+>", "[^/]+", row[0]) for row in _table("topic", "who writes", "what")]
    assert len(patterns) == len(made)
    for pattern in patterns:
        assert len([topic for topic in made if re.fullmatch(pattern, topic)]) == 1
    assert all(topic.count("/") <= 7 for topic in made)


@pytest.mark.parametrize("table", [Kind, Reject])
def test_numbers_are_given_once(table: type[Enum]) -> None:
    numbers = [member.value[0] for member in table]
    assert len(set(numbers)) == len(numbers)
    assert numbers == sorted(numbers)
    assert min(numbers) >= 1


def test_reserved_kinds_are_not_given_again() -> None:
    assert not {kind.number for kind in Kind} & {3, 6, 7, 12, 13}
    with pytest.raises(RemoteProtocolError) as refusal:
        Kind.from_number(3)
    assert refusal.value.reject is Reject.UNEXPECTED_KIND
    assert all(Kind.from_number(kind.number) is kind for kind in Kind)


def test_a_refusal_of_a_newer_peer_reads_as_malformed() -> None:
    assert Reject.from_code(9999) is Reject.MALFORMED
    assert all(Reject.from_code(reject.code) is reject for reject in Reject)


def test_every_phase_ends_and_no_move_leads_back() -> None:
    assert set(MOVES) == set(Phase)

    def reachable(phase: Phase) -> set[Phase]:
        return set(MOVES[phase]).union(*(reachable(after) for after in MOVES[phase]))

    assert all(phase not in reachable(phase) for phase in Phase)
    assert reachable(Phase.COLLECTING) == set(Phase) - {Phase.COLLECTING}


def test_only_what_travels_up_has_an_up_topic() -> None:
    federation, device = FederationId("f"), DeviceId("d")
    for kind in Kind:
        if kind.direction is Direction.UP:
            where = topics.up_topic(kind, federation, device)
            assert topics.sender_of(where) == (federation, device)
        else:
            with pytest.raises(ValueError, match="does not travel up"):
                topics.up_topic(kind, federation, device)
