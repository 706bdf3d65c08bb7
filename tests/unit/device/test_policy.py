"""When a device may train: each condition at its limits, unknown readings, hysteresis, and the documents."""

from __future__ import annotations

import dataclasses
from datetime import datetime, timezone
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from edge_runtime.config import load_device_config
from edge_runtime.device.policy import CONDITIONS, PolicyConfig, violations
from edge_runtime.device.snapshot import Snapshot
from edge_runtime.device.watch import PolicyWatch
from edge_runtime.settings import ConfigError

NOON = datetime(2026, 3, 1, 12, 0, tzinfo=timezone.utc)
MIB = 1 << 20
PI = Snapshot(
    charging=True, temperature_c=48.7, load=0.02, free_memory_bytes=700 * MIB, free_disk_bytes=20_000 * MIB
)
DOCUMENT = Path(__file__).parents[3] / "docs" / "device.md"


def names(
    snapshot: Snapshot, config: PolicyConfig | None = None, now: datetime = NOON, standing=()
) -> list[str]:
    found = violations(snapshot, config or PolicyConfig(), now, standing)
    return [violation.name for violation in found]


def but(**changes) -> Snapshot:
    return dataclasses.replace(PI, **changes)


def test_a_plain_pi_on_mains_may_train_at_once():
    assert names(PI) == []


def test_a_machine_of_which_nothing_is_known_may_train_unless_it_has_a_battery_of_unknown_state():
    assert names(Snapshot()) == ["charging"]
    assert names(Snapshot(), PolicyConfig(only_while_charging=False)) == []
    assert [c.name for c in CONDITIONS if c.if_unknown is not None] == ["charging"]


@pytest.mark.parametrize(
    ("name", "good", "bad", "resumes", "not_yet"),
    [
        ("battery", {"battery": 0.3}, {"battery": 0.29}, {"battery": 0.4}, {"battery": 0.39}),
        ("heat", *({"temperature_c": celsius} for celsius in (80.0, 80.1, 70.0, 70.1))),
        ("load", {"load": 0.8}, {"load": 0.81}, {"load": 0.5}, {"load": 0.51}),
        *(
            (name, {field: low * MIB}, {field: low * MIB - 1}, {field: high * MIB}, {field: high * MIB - 1})
            for name, field, low, high in (
                ("memory", "free_memory_bytes", 48, 96),
                ("disk", "free_disk_bytes", 64, 128),
            )
        ),
    ],
)  # fmt: skip
def test_a_limit_that_was_passed_holds_until_the_second_one(name, good, bad, resumes, not_yet):
    assert names(but(**good)) == []
    assert names(but(**bad)) == [name]
    assert names(but(**not_yet)) == []
    assert names(but(**not_yet), standing=[name]) == [name]
    assert names(but(**resumes), standing=[name]) == []
    assert names(but(**dict.fromkeys(bad)), standing=[name]) == []  # unknown now


@pytest.mark.parametrize(
    ("change", "permits", "name"),
    [
        ({"charging": False}, {"only_while_charging": False}, "charging"),
        ({"metered": True}, {"allow_metered": True}, "metered"),
        ({"battery": 0.0}, {"min_battery": 0.0}, "battery"),
        ({"load": 1.0}, {"max_load": 1.0}, "load"),
    ],
)
def test_a_condition_can_be_switched_off(change, permits, name):
    assert names(but(**change)) == [name]
    assert names(but(**change), PolicyConfig(**permits)) == []
    assert names(but(**change), PolicyConfig(enabled=False)) == []


@pytest.mark.parametrize(
    ("hours", "quiet"),
    [
        (["12:00-12:01"], True),
        (["11:59-12:00"], False),
        (["22:00-06:30"], False),
        (["13:00-12:30"], True),
        (["11:00-13:00"], True),
        (["00:00-01:00", "11:30-12:30"], True),
        ([], False),
    ],
)
def test_quiet_hours_may_reach_over_midnight_and_their_end_is_not_in_them(hours, quiet):
    assert names(PI, PolicyConfig(quiet_hours=tuple(hours))) == ["quiet hours"] * quiet


@pytest.mark.parametrize(
    ("day", "hours", "minutes"),
    [
        ((2026, 3, 28), "22:00-06:30", 450),  # the clock goes from 02:00 to 03:00 in this night
        ((2026, 10, 24), "22:00-06:30", 570),  # from 03:00 back to 02:00
        ((2026, 3, 28), "02:00-03:00", 0),
        ((2026, 10, 24), "02:00-03:00", 120),
        ((2026, 6, 1), "22:00-06:30", 510),
    ],
)
def test_quiet_hours_follow_the_clock_on_the_wall_when_it_changes(day, hours, minutes):
    noon = datetime(*day, 12, tzinfo=ZoneInfo("Europe/Berlin")).timestamp()
    config = PolicyConfig(quiet_hours=(hours,))
    night = [
        datetime.fromtimestamp(noon + 60 * minute, ZoneInfo("Europe/Berlin")) for minute in range(24 * 60)
    ]
    assert sum(names(PI, config, moment) == ["quiet hours"] for moment in night) == minutes


def test_every_violation_tells_the_owner_what_was_read_and_what_to_do():
    bad = Snapshot(
        charging=False,
        battery=0.12,
        temperature_c=91.0,
        load=0.97,
        free_memory_bytes=10 * MIB,
        free_disk_bytes=3 * MIB,
        metered=True,
    )
    found = violations(bad, PolicyConfig(quiet_hours=("11:00-13:00",)), NOON)
    assert [violation.name for violation in found] == [condition.name for condition in CONDITIONS]
    sentences = [violation.sentence for violation in found]
    words = ["plug it in", "12%", "91 °C", "97%", "10 MiB", "3 MiB", "allow_metered", "11:00-13:00"]
    for word, sentence in zip(words, sentences, strict=True):
        assert word in sentence
    assert [violation.name for violation in found if violation.keeps_back] == ["metered"]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("resume_temperature_c = 85.0", "policy.resume_temperature_c: 85.0; at most max_temperature_c"),
        ("min_battery = 30", "policy.min_battery: 30.0; 0 to 1"),
        ("resume_battery = 0.1", "policy.min_battery: 0.3; at most resume_battery"),
        ("max_load = -0.1", "policy.max_load: -0.1; 0 to 1"),
        ('quiet_hours = ["22-6"]', 'policy.quiet_hours: "22-6"; from-to in local time'),
        ('quiet_hours = ["08:00-08:00"]', "policy.quiet_hours"),
        ('metered = "yes"', "policy.metered"),
    ],
)
def test_limits_that_make_no_sense_are_refused_by_name(tmp_path, line, complaint):
    path = tmp_path / "device.toml"
    path.write_text(f'state_folder = "s"\n[data]\nsource = "t.npz"\n[policy]\n{line}\n')
    with pytest.raises(ConfigError) as caught:
        load_device_config(path)
    assert complaint in str(caught.value)


def test_the_watch_looks_once_a_second_and_speaks_only_of_changes():
    readings = iter([PI, but(load=0.9), but(load=0.6), but(load=0.6, metered=True), PI])
    looks = []

    def read() -> Snapshot:
        looks.append(1)
        return next(readings)

    watch = PolicyWatch(PolicyConfig(), read, lambda: NOON)
    told = []
    for tenth in range(50):
        found = watch.look(100 + tenth / 10)
        if found is not None:
            told.append((tenth, [violation.name for violation in found]))
    assert len(looks) == 5
    assert told == [(10, ["load"]), (30, ["load", "metered"]), (40, [])]


# ---- documents --------------------------------------------------------------------------------------


def _rows() -> list[str]:
    """The table of docs/device.md, from CONDITIONS."""
    defaults = PolicyConfig()
    rows = []
    for condition in CONDITIONS:
        settings = []
        for key in condition.settings:
            value = getattr(defaults, key)
            shown = {True: "true", False: "false", None: "not set", (): "[]"}.get(value, value)
            settings.append(f"`{key}` ({shown})")
        rows.append(f"| {condition.name} | {condition.reads} | {', '.join(settings)} | {condition.unknown} |")
    return rows


def test_the_document_has_the_table_of_the_code():
    text = DOCUMENT.read_text()
    start = text.index("| condition | what is read |")
    table = text[start:].split("\n\n")[0].splitlines()
    assert table[2:] == _rows()


def test_every_setting_of_the_policy_belongs_to_a_condition():
    fields = {field.name for field in dataclasses.fields(PolicyConfig)}
    assert fields - {"enabled"} == {key for condition in CONDITIONS for key in condition.settings}
