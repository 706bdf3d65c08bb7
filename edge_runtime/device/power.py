"""Charging and battery from /sys/class/power_supply (kernel docs ABI/testing/sysfs-class-power)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.device.readings import read_number, read_text

_PLUGGED = ("Charging", "Full", "Not charging")  # the last: plugged in, held at its charging limit


@dataclass(frozen=True)
class Supply:
    """One power supply. ``online``: of a charger. ``capacity``: percent, of a battery."""

    is_battery: bool
    status: str
    online: bool
    capacity: int | None


def supplies(root: Path) -> tuple[Supply, ...]:
    """All that feed this machine: not the batteries of a mouse or headset, nor an empty slot."""
    found = []
    for folder in sorted((root / "sys/class/power_supply").glob("*")):
        if read_text(folder / "scope").strip() == "Device" or read_number(folder / "present") == 0:
            continue
        found.append(
            Supply(
                is_battery=read_text(folder / "type").strip() in ("Battery", "UPS"),
                status=read_text(folder / "status").strip(),
                online=read_number(folder / "online") == 1,
                capacity=read_number(folder / "capacity"),
            )
        )
    return tuple(found)


def charging(found: Sequence[Supply]) -> bool | None:
    """Without a battery it is on mains, which counts as charging."""
    batteries = [supply for supply in found if supply.is_battery]
    if not batteries or any(supply.online for supply in found if not supply.is_battery):
        return True
    states = {battery.status for battery in batteries}
    if "Discharging" in states:
        return False
    return True if states.intersection(_PLUGGED) else None


def battery(found: Sequence[Supply]) -> float | None:
    """Charged fraction, 0 to 1; the mean of several batteries."""
    percents = [supply.capacity for supply in found if supply.is_battery and supply.capacity is not None]
    return min(max(sum(percents) / len(percents) / 100, 0.0), 1.0) if percents else None
