"""Readings of the machine: real ones are plausible, missing files mean unknown, nothing raises."""

from __future__ import annotations

import sys

import pytest

from edge_runtime.device.readings import free_memory_bytes, peak_memory_bytes, temperature_c


def tree(root, **files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_this_machine_has_memory_and_this_process_uses_some_of_it():
    assert free_memory_bytes() > 1 << 20
    assert 1 << 20 < peak_memory_bytes() < 1 << 40


def test_what_cannot_be_read_is_unknown(tmp_path):
    assert (free_memory_bytes(tmp_path), peak_memory_bytes(tmp_path), temperature_c(tmp_path)) == (0, 0, None)
    tree(tmp_path, **{"proc/meminfo": "MemAvailable: lots\n", "sys/class/thermal/thermal_zone0/temp": "hot"})
    assert (free_memory_bytes(tmp_path), temperature_c(tmp_path)) == (0, None)


def test_free_memory_is_the_smaller_of_the_machine_and_the_container(tmp_path):
    tree(tmp_path, **{"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    4000 kB\n"})
    assert free_memory_bytes(tmp_path) == 4_096_000
    group = {"sys/fs/cgroup/memory.max": "1000000\n", "sys/fs/cgroup/memory.current": "300000\n"}
    tree(tmp_path, **group, **{"sys/fs/cgroup/memory.stat": "anon 5\ninactive_file 100000\n"})
    assert free_memory_bytes(tmp_path) == 800_000
    tree(tmp_path, **{"sys/fs/cgroup/memory.max": "max\n"})
    assert free_memory_bytes(tmp_path) == 4_096_000


def test_the_hottest_plausible_zone_is_the_temperature(tmp_path):
    for zone, text in enumerate(("41500\n", "55250\n", "-274000\n", "")):
        tree(tmp_path, **{f"sys/class/thermal/thermal_zone{zone}/temp": text})
    assert temperature_c(tmp_path) == 55.25
