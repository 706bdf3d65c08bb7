"""Memory, disk, temperature and load from /proc and /sys (man 5 proc, kernel docs sysfs-class-thermal).

None: unknown. No function here raises. ``root`` is another file tree in tests.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

_ROOT = Path("/")
_PLAUSIBLE_C = range(-60, 151)
LOAD_WINDOW_S = 30.0


def free_memory_bytes(root: Path = _ROOT) -> int | None:
    """Memory that new work could take without swapping, bytes: MemAvailable, or a tighter cgroup's rest."""
    free = (_kib_field(root / "proc/meminfo", "MemAvailable"), _cgroup_free(root))
    return min((number for number in free if number is not None), default=None)


def free_disk_bytes(folder: Path) -> int | None:
    """Space left for this user on the file system of ``folder``, bytes."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def peak_memory_bytes(root: Path = _ROOT) -> int | None:
    """The largest resident set of this process so far (VmHWM), bytes."""
    return _kib_field(root / "proc/self/status", "VmHWM")


def temperature_c(root: Path = _ROOT) -> float | None:
    """The hottest thermal zone, degrees Celsius."""
    zones = (read_number(zone) for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*/temp")))
    readings = [value / 1000 for value in zones if value is not None and int(value / 1000) in _PLAUSIBLE_C]
    return max(readings, default=None)


class _Times(NamedTuple):
    """Seconds since some moment, summed over all cores; ``own``: of this process."""

    busy: float
    total: float
    own: float


class LoadMeter:
    """The share of all cores that other programs keep busy, 0 to 1, over the last 30 s or since the first reading.

    own_s: processor seconds of this process so far, which are left out.
    """

    def __init__(self, root: Path = _ROOT, own_s: Callable[[], float] = time.process_time) -> None:
        self._root = root
        self._own_s = own_s
        self._past: deque[_Times] = deque()

    def read(self) -> float | None:
        """None at the first reading, and where /proc/stat is not readable."""
        lines = [line.split() for line in read_text(self._root / "proc/stat").splitlines()]
        cores = sum(1 for line in lines if line and line[0].startswith("cpu")) - 1
        # user nice system idle iowait irq softirq steal; guest time is part of user
        ticks = [int(word) for word in lines[0][1:9] if word.isdigit()] if cores > 0 else []
        if len(ticks) < 8:
            return None
        a_second = os.sysconf("SC_CLK_TCK")
        total = sum(ticks) / a_second
        now = _Times(total - (ticks[3] + ticks[4]) / a_second, total, self._own_s())
        while len(self._past) > 1 and now.total - self._past[1].total >= LOAD_WINDOW_S * cores:
            self._past.popleft()
        self._past.append(now)
        then = self._past[0]
        if now.total <= then.total:
            return None
        others = (now.busy - then.busy) - (now.own - then.own)
        return min(max(others / (now.total - then.total), 0.0), 1.0)


def _cgroup_free(root: Path) -> int | None:
    """What the tightest memory limit leaves of a container, a unit of systemd or a group around it; None without.

    The file cache that can be dropped counts as free. Limits of cgroup v2 and v1 (man 7 cgroups).
    """
    left = []
    for base, controller, limit_file, usage_file in (
        ("sys/fs/cgroup", "", "memory.max", "memory.current"),
        ("sys/fs/cgroup/memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        for folder in _groups_of_ours(root, root / base, controller):
            limit, usage = read_number(folder / limit_file), read_number(folder / usage_file)
            if limit is not None and usage is not None:
                left.append(max(0, limit - usage + _inactive_file(folder / "memory.stat")))
    return min(left, default=None)


def _groups_of_ours(root: Path, base: Path, controller: str) -> list[Path]:
    """The folder of this process's control group and those around it, ``base`` last."""
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        parts = [part for part in path.split("/") if part]
        # In a container the path may lead out of what can be seen here: then only the mounted root counts.
        if controller in controllers.split(",") and ".." not in parts:
            return [base.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    return [base]


def _inactive_file(stat: Path) -> int:
    for line in read_text(stat).splitlines():
        name, _, value = line.partition(" ")
        if name == "inactive_file" and value.isdigit():
            return int(value)
    return 0


def _kib_field(path: Path, field: str) -> int | None:
    for line in read_text(path).splitlines():
        name, _, value = line.partition(":")
        if name == field:
            number = value.split()[:1]
            return int(number[0]) * 1024 if number and number[0].isdigit() else None
    return None


def read_number(path: Path) -> int | None:
    """A whole number in a file; None without one."""
    try:
        return int(read_text(path))
    except ValueError:  # "max", or nothing
        return None


def read_text(path: Path) -> str:
    """A small file; empty if it cannot be read."""
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
