"""Memory and temperature from /proc and /sys (man 5 proc, kernel docs sysfs-class-thermal); 0 or None: unknown.

Readings inform, nothing depends on them: no function here raises. ``root`` is another file tree in tests.
"""

from __future__ import annotations

from pathlib import Path

_ROOT = Path("/")
_PLAUSIBLE_C = range(-60, 151)


def free_memory_bytes(root: Path = _ROOT) -> int:
    """Memory that new work could take without swapping, bytes: MemAvailable, or a tighter cgroup's rest."""
    available = _kib_field(root / "proc/meminfo", "MemAvailable")
    left_of_group = _cgroup_free(root)
    return available if left_of_group is None else min(available, left_of_group)


def peak_memory_bytes(root: Path = _ROOT) -> int:
    """The largest resident set of this process so far (VmHWM), bytes."""
    return _kib_field(root / "proc/self/status", "VmHWM")


def temperature_c(root: Path = _ROOT) -> float | None:
    """The hottest thermal zone, degrees Celsius."""
    zones = (_number(zone) for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*/temp")))
    readings = [value / 1000 for value in zones if value is not None and int(value / 1000) in _PLAUSIBLE_C]
    return max(readings, default=None)


def _cgroup_free(root: Path) -> int | None:
    """What a container's memory limit leaves, the file cache that can be dropped included; None without a limit."""
    for folder, limit_file, usage_file in (
        ("sys/fs/cgroup", "memory.max", "memory.current"),
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        limit, usage = _number(root / folder / limit_file), _number(root / folder / usage_file)
        if limit is not None and usage is not None:
            return max(0, limit - usage + _inactive_file(root / folder / "memory.stat"))
    return None


def _inactive_file(stat: Path) -> int:
    for line in _text(stat).splitlines():
        name, _, value = line.partition(" ")
        if name == "inactive_file" and value.isdigit():
            return int(value)
    return 0


def _kib_field(path: Path, field: str) -> int:
    for line in _text(path).splitlines():
        name, _, value = line.partition(":")
        if name == field:
            number = value.split()[:1]
            return int(number[0]) * 1024 if number and number[0].isdigit() else 0
    return 0


def _number(path: Path) -> int | None:
    try:
        return int(_text(path))
    except ValueError:  # "max", or nothing
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
