"""May this device train now? Pure: a snapshot of the machine, the limits and the local time are arguments."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime, time
from typing import Any, NamedTuple

from edge_runtime.device.snapshot import Snapshot
from edge_runtime.settings import require

_MIB = 1 << 20
_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """When the owner lets this device train. What a limit ended begins again at ``resume_...``, so nothing flaps.

    Battery and load: fractions 0 to 1. Quiet hours: ``"22:00-06:30"``, local time, the end not included.
    """

    enabled: bool = True
    only_while_charging: bool = True
    min_battery: float = 0.3
    resume_battery: float = 0.4
    max_temperature_c: float = 80.0
    resume_temperature_c: float = 70.0
    max_load: float = 0.8
    resume_load: float = 0.5
    min_free_memory_mb: int = 48
    resume_free_memory_mb: int = 96
    min_free_disk_mb: int = 64
    resume_free_disk_mb: int = 128
    allow_metered: bool = False
    metered: bool | None = None
    quiet_hours: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_pair("min_battery", "resume_battery", 0, 1)
        self._check_pair("resume_temperature_c", "max_temperature_c", -60, 150)
        self._check_pair("resume_load", "max_load", 0, 1)
        self._check_pair("min_free_memory_mb", "resume_free_memory_mb", 0, 1 << 20)
        self._check_pair("min_free_disk_mb", "resume_free_disk_mb", 0, 1 << 30)
        for hours in self.quiet_hours:
            match = _HOURS.fullmatch(hours)
            good = match is not None and match[1] + match[2] != match[3] + match[4]
            require(good, "quiet_hours", hours, 'from-to in local time, such as "22:00-06:30"')

    def _check_pair(self, low: str, high: str, least: float, most: float) -> None:
        below, above = getattr(self, low), getattr(self, high)
        for key, value in ((low, below), (high, above)):
            require(least <= value <= most, key, value, f"{least} to {most}")
        require(below <= above, low, below, f"at most {high}, which is {above}")


class Violation(NamedTuple):
    """``name``: of the condition. ``sentence``: for the owner. ``keeps_back``: a finished update may not leave."""

    name: str
    sentence: str
    keeps_back: bool = False


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One row: what is read, when it forbids training, and what it means that the reading is unknown.

    value: None is unknown. broken: its last argument is True while the condition stands violated (hysteresis).
    if_unknown: the violation's sentence; None: unknown permits training. keeps_back: it concerns what is sent, too.
    reads, unknown: for docs/device.md.
    """

    name: str
    settings: tuple[str, ...]
    reads: str
    unknown: str
    value: Callable[[Snapshot, datetime], Any]
    broken: Callable[[Any, PolicyConfig, bool], bool]
    sentence: Callable[[Any, PolicyConfig], str]
    if_unknown: str | None = None
    keeps_back: bool = False


CONDITIONS: tuple[Condition, ...] = (
    Condition(
        name="charging",
        settings=("only_while_charging",),
        reads="on mains or charging; a machine without a battery is on mains",
        unknown="not charging: wait",
        value=lambda snapshot, _: snapshot.charging,
        broken=lambda charging, config, _: config.only_while_charging and not charging,
        sentence=lambda *_: "on battery: plug it in, or set policy.only_while_charging = false",
        if_unknown="whether the battery is charging cannot be read: set policy.only_while_charging = false",
    ),
    Condition(
        name="battery",
        settings=("min_battery", "resume_battery"),
        reads="charge of the battery, fraction; unknown without one",
        unknown="full enough",
        value=lambda snapshot, _: snapshot.battery,
        broken=lambda battery, config, standing: (
            battery < (config.resume_battery if standing else config.min_battery)
        ),
        sentence=lambda battery, config: (
            f"battery at {battery:.0%}: below {config.min_battery:.0%} training stops, "
            f"from {config.resume_battery:.0%} on it may begin again"
        ),
    ),
    Condition(
        name="heat",
        settings=("max_temperature_c", "resume_temperature_c"),
        reads="the hottest thermal zone, °C",
        unknown="cool enough",
        value=lambda snapshot, _: snapshot.temperature_c,
        broken=lambda celsius, config, standing: (
            celsius > (config.resume_temperature_c if standing else config.max_temperature_c)
        ),
        sentence=lambda celsius, config: (
            f"{celsius:.0f} °C: above {config.max_temperature_c:g} °C training stops, "
            f"at {config.resume_temperature_c:g} °C it may begin again"
        ),
    ),
    Condition(
        name="load",
        settings=("max_load", "resume_load"),
        reads="share of all cores that other programs kept busy in the last 30 s, fraction",
        unknown="idle enough",
        value=lambda snapshot, _: snapshot.load,
        broken=lambda load, config, standing: load > (config.resume_load if standing else config.max_load),
        sentence=lambda load, config: (
            f"other programs use {load:.0%} of the processor: above {config.max_load:.0%} training stops, "
            f"at {config.resume_load:.0%} it may begin again"
        ),
    ),
    Condition(
        name="memory",
        settings=("min_free_memory_mb", "resume_free_memory_mb"),
        reads="memory that can be had without swapping, MiB",
        unknown="enough",
        value=lambda snapshot, _: snapshot.free_memory_bytes,
        broken=lambda free, config, standing: (
            free < _MIB * (config.resume_free_memory_mb if standing else config.min_free_memory_mb)
        ),
        sentence=lambda free, config: (
            f"{free // _MIB} MiB of memory free: below {config.min_free_memory_mb} training stops, "
            f"from {config.resume_free_memory_mb} on it may begin again"
        ),
    ),
    Condition(
        name="disk",
        settings=("min_free_disk_mb", "resume_free_disk_mb"),
        reads="free space for the state folder, MiB",
        unknown="enough",
        value=lambda snapshot, _: snapshot.free_disk_bytes,
        broken=lambda free, config, standing: (
            free < _MIB * (config.resume_free_disk_mb if standing else config.min_free_disk_mb)
        ),
        sentence=lambda free, config: (
            f"{free // _MIB} MiB of disk free for the state folder: below {config.min_free_disk_mb} training "
            f"stops, from {config.resume_free_disk_mb} on it may begin again"
        ),
    ),
    Condition(
        name="metered",
        settings=("allow_metered", "metered"),
        reads="whether the network is paid by volume: `metered`, else a mobile modem, else NetworkManager",
        unknown="not metered",
        value=lambda snapshot, _: snapshot.metered,
        broken=lambda metered, config, _: metered and not config.allow_metered,
        sentence=lambda *_: "the network is metered: set policy.allow_metered = true to use it all the same",
        keeps_back=True,
    ),
    Condition(
        name="quiet hours",
        settings=("quiet_hours",),
        reads="local time",
        unknown="never unknown",
        value=lambda _, now_local: now_local.time(),
        broken=lambda now, config, _: _quiet(now, config) is not None,
        sentence=lambda now, config: f"quiet hours {_quiet(now, config)}",
    ),
)


def violations(
    snapshot: Snapshot, config: PolicyConfig, now_local: datetime, standing: Collection[str] = ()
) -> tuple[Violation, ...]:
    """Why this device may not train now, in the order of CONDITIONS; empty: it may.

    standing: names of the conditions that were violated the last time this was asked (hysteresis).
    """
    if not config.enabled:
        return ()
    found = []
    for condition in CONDITIONS:
        value, stands = condition.value(snapshot, now_local), condition.name in standing
        if value is None and condition.if_unknown is None:
            continue
        if condition.broken(value, config, stands):
            sentence = condition.if_unknown if value is None else None
            sentence = sentence or condition.sentence(value, config)
            found.append(Violation(condition.name, sentence, condition.keeps_back))
    return tuple(found)


def _quiet(now: time, config: PolicyConfig) -> str | None:
    """The quiet hours that ``now`` falls into; a span may reach over midnight."""
    minute = f"{now:%H:%M}"
    for hours in config.quiet_hours:
        begin, end = hours.split("-")
        if (begin <= minute < end) if begin < end else (minute >= begin or minute < end):
            return hours
    return None
