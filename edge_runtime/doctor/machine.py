"""Clock, disk, memory and heat of the machine, and whether its owner lets it train now."""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import edge_runtime
from edge_runtime.device.policy import Violation
from edge_runtime.device.readings import free_memory_bytes, read_text, temperature_c
from edge_runtime.doctor.check import Check, good, problem, unknown, warning

_MIB = 1 << 20
MIN_TOTAL_MEMORY = 400 * _MIB
MIN_FREE_MEMORY = 48 * _MIB
MIN_FREE_DISK = 32 * _MIB
LOW_FREE_DISK = 256 * _MIB
HOT_C = 80.0
_DAY_S = 86_400.0
# get_throttled of the Raspberry Pi's firmware: now in bits 0 to 3, since the start in bits 16 to 19.
_THROTTLED = {0: "the supply voltage is too low", 1: "the clock is held down", 2: "it is throttled", 3: "hot"}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """None: unknown. Times in Unix seconds, sizes in bytes.

    newest_file: the newest file of this program or of the state folder: the clock has passed that moment before.
    synchronised: whether a time service has set the clock. folder: the state folder; ``place``: it, or, while it is
    not there, the nearest folder above it. throttled: the firmware's bits.
    """

    now: float
    newest_file: float | None = None
    synchronised: bool | None = None
    folder: Path
    place: Path
    folder_mode: int | None = None
    place_is_folder: bool = True
    is_owner: bool = True
    is_writable: bool = True
    disk_free: int | None = None
    memory_total: int | None = None
    memory_free: int | None = None
    is_pi: bool = False
    memory_cgroup: bool | None = None
    temperature_c: float | None = None
    throttled: int | None = None


def look(folder: Path, root: Path = Path("/")) -> Machine:
    """This machine; ``folder``: the state folder, which need not exist. Never raises."""
    place = folder
    while not _is_there(place) and place != place.parent:
        place = place.parent
    try:
        found = folder.stat() if folder.is_dir() else None
    except OSError:
        found = None
    return Machine(
        now=time.time(),
        newest_file=_newest_file(folder),
        synchronised=_synchronised(root),
        folder=folder,
        place=place,
        folder_mode=stat.S_IMODE(found.st_mode) if found else None,
        place_is_folder=place.is_dir(),
        is_owner=found is None or found.st_uid == os.geteuid(),
        is_writable=os.access(place, os.W_OK | os.X_OK) and not _is_read_only(place),
        disk_free=_disk_free(place),
        memory_total=_memory_total(root),
        memory_free=free_memory_bytes(root),
        is_pi="Raspberry Pi" in read_text(root / "proc/device-tree/model"),
        memory_cgroup=_memory_cgroup(root),
        temperature_c=temperature_c(root),
        throttled=_throttled(root),
    )


def checks(found: Machine) -> list[Check]:
    """Pure."""
    return [_clock(found), _disk(found), _memory(found), _heat(found), _power(found)]


def eligibility(violations: Sequence[Violation]) -> Check:
    """What the owner's policy says now: never a problem, since it was asked for."""
    if not violations:
        return good("policy", "this device may train now")
    names = ", ".join(found.name for found in violations)
    return warning("policy", f"it may not train now: {names}", "; ".join(v.sentence for v in violations))


def _clock(found: Machine) -> Check:
    told = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(found.now))
    service = "timedatectl set-ntp true, or set it by hand"
    if found.newest_file is not None and found.now < found.newest_file - _DAY_S:
        newest = time.strftime("%Y-%m-%d", time.gmtime(found.newest_file))
        return problem(
            "clock", f"{told}, but files here are from {newest}: it is behind, and TLS will fail", service
        )
    if found.synchronised is False:
        return warning("clock", f"{told}, not synchronised yet", f"{service}; wait a minute after a start")
    if found.synchronised is None:
        return good("clock", f"{told}, plausible; whether a time service keeps it is unknown")
    return good("clock", f"{told}, synchronised")


def _disk(found: Machine) -> Check:
    free = "unknown space" if found.disk_free is None else f"{found.disk_free // _MIB} MiB"
    finding = f"{free} free at {found.place}"
    if not found.place_is_folder:
        return problem("disk", f"{found.place} is a file", "name a folder as state_folder")
    if not found.is_owner:
        return problem(
            "disk",
            f"{found.folder} belongs to another user",
            "run as that user, or name another state_folder",
        )
    if found.folder_mode is not None and found.folder_mode & 0o077:
        return problem(
            "disk",
            f"{found.folder} is open to other users (mode {found.folder_mode:04o}) and holds keys",
            f"chmod 700 {found.folder}",
        )
    if not found.is_writable:
        return problem(
            "disk",
            f"{found.place} cannot be written to",
            "check its permissions, and whether the file system turned read-only (a dying SD card does)",
        )
    if found.disk_free is not None and found.disk_free < MIN_FREE_DISK:
        return problem("disk", finding, "make room: models and updates are kept there before they are sent")
    if found.disk_free is not None and found.disk_free < LOW_FREE_DISK:
        return warning("disk", finding, "make room, before logs and models fill it")
    return good("disk", finding)


def _memory(found: Machine) -> Check:
    if found.memory_total is None or found.memory_free is None:
        return unknown("memory", "/proc/meminfo cannot be read")
    finding = f"{found.memory_free // _MIB} MiB of {found.memory_total // _MIB} MiB free"
    if found.memory_free < MIN_FREE_MEMORY:
        return problem("memory", finding, "stop other programs; a small model alone needs about 60 MiB")
    if found.memory_total < MIN_TOTAL_MEMORY:
        return warning("memory", finding, "keep batches and models small; see `model-export inspect`")
    if found.is_pi and found.memory_cgroup is False:
        return warning(
            "memory",
            f"{finding}; memory limits of systemd (MemoryMax) have no effect, since Pi OS turns the cgroup off",
            "add cgroup_enable=memory to /boot/firmware/cmdline.txt and restart, or do without",
        )
    return good("memory", finding)


def _heat(found: Machine) -> Check:
    if found.temperature_c is None:
        return unknown("temperature", "no sensor")
    finding = f"{found.temperature_c:.0f} °C"
    if found.temperature_c > HOT_C:
        return warning(
            "temperature", finding, "give it air or a heat sink: it slows down, and the policy pauses"
        )
    return good("temperature", finding)


def _power(found: Machine) -> Check:
    if found.throttled is None:
        return unknown("power", "the firmware does not tell (only a Raspberry Pi's does)")
    now = [word for bit, word in _THROTTLED.items() if found.throttled >> bit & 1]
    since = [word for bit, word in _THROTTLED.items() if found.throttled >> (bit + 16) & 1]
    remedy = "use the supply made for this board and a short cable; give it air"
    if now:
        return warning("power", f"now: {', '.join(now)}", remedy)
    if since:
        return warning("power", f"since the last start: {', '.join(since)}", remedy)
    return good("power", "never throttled since the start")


# ---- reading ----------------------------------------------------------------------------------------


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # behind a folder that is closed to this user
        return False


def _newest_file(folder: Path) -> float | None:
    times = []
    for path in (Path(edge_runtime.__file__), folder / "enrolment", folder / "round", folder / "sequence"):
        try:
            times.append(path.stat().st_mtime)
        except OSError:
            continue
    return max(times, default=None)


def _synchronised(root: Path) -> bool | None:
    """systemd-timesyncd says so in a file; other services do not."""
    timesync = root / "run/systemd/timesync"
    return (timesync / "synchronized").exists() if timesync.is_dir() else None


def _is_read_only(place: Path) -> bool:
    try:
        return bool(os.statvfs(place).f_flag & os.ST_RDONLY)
    except OSError:
        return False


def _disk_free(place: Path) -> int | None:
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return None


def _memory_total(root: Path) -> int | None:
    for line in read_text(root / "proc/meminfo").splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "MemTotal:" and words[1].isdigit():
            return int(words[1]) * 1024
    return None


def _memory_cgroup(root: Path) -> bool | None:
    for line in read_text(root / "proc/cgroups").splitlines():
        words = line.split()
        if words[:1] == ["memory"] and len(words) >= 4:
            return words[3] == "1"
    return None


def _throttled(root: Path) -> int | None:
    path = root / "sys/devices/platform/soc/soc:firmware/get_throttled"
    try:
        return int(read_text(path), 16)
    except ValueError:
        return None
