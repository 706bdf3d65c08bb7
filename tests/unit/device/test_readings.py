"""Readings of the machine: real ones are plausible, missing files mean unknown, nothing raises."""

from __future__ import annotations

import os
import sys
import time

import pytest

from edge_runtime.device import power
from edge_runtime.device.readings import (
    LoadMeter,
    free_disk_bytes,
    free_memory_bytes,
    peak_memory_bytes,
    temperature_c,
)
from edge_runtime.device.snapshot import Sensors, Snapshot, take

TICKS = os.sysconf("SC_CLK_TCK")


def tree(root, **files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def supply(root, name, **files):
    return tree(root, **{f"sys/class/power_supply/{name}/{key}": f"{text}\n" for key, text in files.items()})


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_this_machine_has_memory_and_this_process_uses_some_of_it():
    assert free_memory_bytes() > 1 << 20
    assert 1 << 20 < peak_memory_bytes() < 1 << 40


def test_what_cannot_be_read_is_unknown(tmp_path):
    assert [r(tmp_path) for r in (free_memory_bytes, peak_memory_bytes, temperature_c)] == [None] * 3
    assert free_disk_bytes(tmp_path / "not there") is None
    assert Sensors(tmp_path / "not there", root=tmp_path).read() == Snapshot(charging=True)
    tree(tmp_path, **{"proc/meminfo": "MemAvailable: lots\n", "sys/class/thermal/thermal_zone0/temp": "hot"})
    tree(
        tmp_path,
        **{"proc/stat": "cpu 1 2\ncpu0 1 2\n", "proc/net/route": "Iface\neth0 00000000 x x x x x 00000000\n"},
    )
    supply(tmp_path, "BAT0", type="Battery", status="Unknown", capacity="much")
    assert Sensors(tmp_path / "not there", root=tmp_path).read() == Snapshot(charging=None)


def test_free_memory_is_the_smaller_of_the_machine_and_the_container(tmp_path):
    tree(tmp_path, **{"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    4000 kB\n"})
    assert free_memory_bytes(tmp_path) == 4_096_000
    group = {"sys/fs/cgroup/memory.max": "1000000\n", "sys/fs/cgroup/memory.current": "300000\n"}
    tree(tmp_path, **group, **{"sys/fs/cgroup/memory.stat": "anon 5\ninactive_file 100000\n"})
    assert free_memory_bytes(tmp_path) == 800_000
    tree(tmp_path, **{"sys/fs/cgroup/memory.max": "max\n"})
    assert free_memory_bytes(tmp_path) == 4_096_000


def test_the_tightest_limit_of_the_groups_around_this_process_counts(tmp_path):
    unit = "sys/fs/cgroup/system.slice/fleetgrad.service"
    tree(
        tmp_path,
        **{
            "proc/self/cgroup": "0::/system.slice/fleetgrad.service\n",
            "proc/meminfo": "MemAvailable: 4000000 kB\n",
            f"{unit}/memory.max": "512000000\n",
            f"{unit}/memory.current": "500000000\n",
            f"{unit}/memory.stat": "inactive_file 1000000\n",
            "sys/fs/cgroup/system.slice/memory.max": "max\n",
            "sys/fs/cgroup/system.slice/memory.current": "900000000\n",
        },
    )
    assert free_memory_bytes(tmp_path) == 13_000_000
    tree(tmp_path, **{"sys/fs/cgroup/system.slice/memory.max": "905000000\n"})
    assert free_memory_bytes(tmp_path) == 5_000_000


def test_a_group_outside_of_what_a_container_sees_leaves_the_mounted_root(tmp_path):
    tree(
        tmp_path,
        **{
            "proc/self/cgroup": "5:cpu:/\n4:memory:/../other\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "1000000\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "400000\n",
        },
    )
    assert free_memory_bytes(tmp_path) == 600_000


def test_the_hottest_plausible_zone_is_the_temperature(tmp_path):
    for zone, text in enumerate(("41500\n", "55250\n", "-274000\n", "")):
        tree(tmp_path, **{f"sys/class/thermal/thermal_zone{zone}/temp": text})
    assert temperature_c(tmp_path) == 55.25


# ---- power ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("supplies", "charging", "battery"),
    [
        ({}, True, None),
        ({"BAT0": ("Battery", "Charging", 50)}, True, 0.5),
        ({"BAT0": ("Battery", "Discharging", 50)}, False, 0.5),
        ({"BAT0": ("Battery", "Not charging", 80)}, True, 0.8),
        ({"BAT0": ("Battery", "Full", 100)}, True, 1.0),
        ({"BAT0": ("Battery", "Unknown", 9)}, None, 0.09),
        ({"BAT0": ("Battery", "Full", 100), "BAT1": ("Battery", "Discharging", 20)}, False, 0.6),
        ({"ups": ("UPS", "Discharging", 70)}, False, 0.7),
        ({"AC": ("Mains", "", None)}, True, None),
    ],
)
def test_charging_and_battery_are_read_from_the_power_supplies(tmp_path, supplies, charging, battery):
    for name, (kind, status, capacity) in supplies.items():
        files = {"capacity": capacity} if capacity is not None else {}
        supply(tmp_path, name, type=kind, status=status, **files)
    found = power.supplies(tmp_path)
    assert (power.charging(found), power.battery(found)) == (charging, battery)


def test_a_plugged_in_charger_decides_and_the_batteries_of_other_things_do_not_count(tmp_path):
    supply(tmp_path, "BAT0", type="Battery", status="Unknown", capacity="40")
    supply(tmp_path, "usb", type="USB", online="1")
    supply(tmp_path, "hid-mouse", type="Battery", status="Discharging", capacity="3", scope="Device")
    supply(tmp_path, "BAT1", type="Battery", status="Discharging", capacity="3", present="0")
    found = power.supplies(tmp_path)
    assert (power.charging(found), power.battery(found)) == (True, 0.4)


# ---- load -------------------------------------------------------------------------------------------


class Stat:
    """/proc/stat of two cores, in seconds of processor time."""

    def __init__(self, root):
        self.root, self.own, self.busy, self.idle = root, 0.0, 0.0, 0.0
        self.meter = LoadMeter(root, lambda: self.own)

    def after(self, seconds, *, others, own=0.0):
        """Both cores together were busy with these shares."""
        self.own += own * 2 * seconds
        self.busy += (own + others) * 2 * seconds
        self.idle += (1 - own - others) * 2 * seconds
        busy, idle = int(self.busy * TICKS), int(self.idle * TICKS)
        tree(self.root, **{"proc/stat": f"cpu  {busy} 0 0 {idle} 0 0 0 0 7 7\ncpu0 1\ncpu1 1\nintr 5\n"})
        return self.meter.read()


def test_load_is_what_others_use_and_our_own_training_is_left_out(tmp_path):
    stat = Stat(tmp_path)
    assert stat.after(1, others=0.5) is None  # nothing to compare with
    assert stat.after(1, others=0.5) == pytest.approx(0.5)
    assert stat.after(2, others=0.5, own=0.5) == pytest.approx(0.5)
    assert stat.after(300, others=0.0, own=1.0) < 0.01


def test_load_is_that_of_the_last_thirty_seconds(tmp_path):
    stat = Stat(tmp_path)
    for _ in range(100):
        stat.after(1, others=1.0)
    assert [round(stat.after(1, others=0.0), 2) for _ in range(30)][::10] == [0.97, 0.63, 0.3]
    assert stat.after(1, others=0.0) == 0.0


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_snapshot_of_this_machine_knows_what_every_linux_tells(tmp_path):
    snapshot = take(tmp_path, metered=True, sleep=lambda _: sum(range(3_000_000)) and time.sleep(0.05))
    assert 0.0 <= snapshot.load <= 1.0
    assert snapshot.free_memory_bytes > 1 << 20
    assert snapshot.free_disk_bytes > 1 << 20
    assert snapshot.metered is True
