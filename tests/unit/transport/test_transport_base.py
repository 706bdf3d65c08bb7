from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.protocol.errors import LocalProtocolError
from edge_runtime.transport.base import check_pattern, full_jitter_s, matches, publish_packet_bytes

LEVEL = st.text("ab$", min_size=0, max_size=2)
TOPICS = st.lists(LEVEL, min_size=1, max_size=4).map("/".join).filter(bool)


@pytest.mark.parametrize(
    ("pattern", "topic", "covered"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a", False),
        ("a", "a/b", False),
        ("a/+", "a/", True),
        ("a/+", "a", False),
        ("+/+", "/a", True),
        ("+", "/a", False),
        ("a/#", "a", True),
        ("a/#", "a/b/c", True),
        ("a/#", "ab", False),
        ("#", "a/b", True),
        ("#", "$SYS/a", False),
        ("+/a", "$SYS/a", False),
        ("$SYS/#", "$SYS/a", True),
    ],
)
def test_wildcards_cover_what_the_standard_says(pattern: str, topic: str, covered: bool) -> None:
    assert matches(pattern, topic) is covered


@given(TOPICS)
def test_a_topic_covers_itself_and_paho_agrees(topic: str) -> None:
    from paho.mqtt.client import topic_matches_sub

    for pattern in (topic, topic + "/#", "+/" + topic, "#", "/".join("+" for _ in topic.split("/"))):
        assert matches(pattern, topic) is topic_matches_sub(pattern, topic), pattern


@pytest.mark.parametrize("pattern", ["", "a#", "a/#/b", "a/b+", "a\0"])
def test_a_bad_pattern_is_our_own_bug(pattern: str) -> None:
    with pytest.raises(LocalProtocolError):
        check_pattern(pattern)


@pytest.mark.parametrize(
    ("payload", "packet"), [(0, 9), (120, 129), (121, 131), (16_376, 16_386), (16_377, 16_388)]
)
def test_a_packet_grows_by_a_byte_where_its_length_field_does(payload: int, packet: int) -> None:
    # One level "ab": 1 type + 1..4 length + 2 + 2 topic + 2 packet id + 1 property length + payload
    assert publish_packet_bytes("ab", payload) == packet


@given(st.integers(0, 10_000), st.floats(0, 1, exclude_max=True))
def test_back_off_is_never_negative_nor_above_its_cap_nor_above_the_doubling(
    attempt: int, drawn: float
) -> None:
    delay = full_jitter_s(attempt, lambda: drawn)
    assert 0 <= delay <= min(30.0, 0.2 * 2.0 ** min(attempt, 20))
