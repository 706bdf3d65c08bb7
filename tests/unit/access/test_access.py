"""The rules of access against the grammar of topics and the table of kinds: all of it, and nothing more."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.access import OWN, Action, Role, kept_from, rules
from edge_runtime.protocol import topics
from edge_runtime.protocol.errors import RemoteProtocolError
from edge_runtime.protocol.ids import DeviceId, FederationId, device_id
from edge_runtime.protocol.kinds import Direction, Kind
from edge_runtime.transport.base import matches

FEDERATION = FederationId("digits")
RULES = rules(FEDERATION)
GRAMMAR = re.findall(r"^fl/1/<federation>/\S+", topics.__doc__ or "", re.MULTILINE)


def example(line: str, device: str) -> str:
    return (
        line.replace("<federation>", FEDERATION)
        .replace("<device>", device)
        .replace("<shard>", "7")
        .replace("<digest>", "00" * 32)
        .replace("<piece>", "3")
    )


def allowed(role: Role, action: Action, topic: str, own: str) -> bool:
    return any(
        rule.role is role and rule.action is action and matches(rule.pattern.replace(OWN, own), topic)
        for rule in RULES
    )


def test_the_grammar_is_read_from_its_document() -> None:
    assert len(GRAMMAR) == 6


@pytest.mark.parametrize("line", GRAMMAR)
def test_every_topic_of_the_grammar_has_a_writer_and_a_reader(line: str) -> None:
    topic = example(line, "pi-1")
    for action in Action:
        assert any(allowed(role, action, topic, "pi-1") for role in Role)


def test_no_rule_reaches_beyond_the_grammar() -> None:
    shapes = {
        re.sub(r"<(?!federation)[^>]*>", "+", line).replace("<federation>", FEDERATION) for line in GRAMMAR
    }
    assert {rule.pattern.replace(OWN, "+") for rule in RULES} == shapes
    assert not any("#" in rule.pattern for rule in RULES)


@pytest.mark.parametrize("line", [line for line in GRAMMAR if "<device>" in line])
@pytest.mark.parametrize("action", Action)
def test_a_device_has_nothing_to_do_with_the_topics_of_another(line: str, action: Action) -> None:
    assert not allowed(Role.DEVICE, action, example(line, "pi-2"), "pi-1")


@pytest.mark.parametrize("kind", Kind)
def test_every_kind_has_one_writing_role_where_it_travels_and_is_named_there(kind: Kind) -> None:
    writers = {
        rule.role for rule in RULES if rule.action is Action.WRITE and kind.label in rule.why.split(", ")
    }
    readers = {
        rule.role for rule in RULES if rule.action is Action.READ and kind.label in rule.why.split(", ")
    }
    assert len(writers) == 1
    assert readers
    assert not writers & readers
    assert (Role.DEVICE in writers) is (kind.direction is Direction.UP)
    if kind.direction is Direction.UP:
        device = DeviceId("pi-1")
        topic = topics.up_topic(kind, FEDERATION, device)
        assert allowed(Role.DEVICE, Action.WRITE, topic, device)
        assert [role for role in Role if allowed(role, Action.READ, topic, device)] == list(readers)


@pytest.mark.parametrize("role", [role for role in Role if role is not Role.DEVICE])
def test_what_a_role_is_kept_from_takes_nothing_of_its_own_away(role: Role) -> None:
    kept = kept_from(role, FEDERATION)
    assert not any(
        matches(denied, rule.pattern) or matches(rule.pattern, denied)
        for denied in kept
        for rule in RULES
        if rule.role is role and "@" not in denied  # no device has such a name
    )
    assert topics.down(FEDERATION, DeviceId(role.value)) in kept


@given(st.sampled_from([role for role in Role if role is not Role.DEVICE]))
def test_no_device_can_have_the_name_of_a_role(role: Role) -> None:
    with pytest.raises(RemoteProtocolError):
        device_id(role.value)
