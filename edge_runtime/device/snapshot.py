"""All readings of one moment, and who takes them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.device import network, power, readings

MEASURE_LOAD_S = 0.2
ASK_NETWORK_EVERY_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The machine at one moment; None: unknown.

    battery: charged fraction, 0 to 1; None also without a battery. load: share of all cores that other programs
    keep busy, 0 to 1. free_disk_bytes: of the state folder's file system.
    """

    charging: bool | None = None
    battery: float | None = None
    temperature_c: float | None = None
    load: float | None = None
    free_memory_bytes: int | None = None
    free_disk_bytes: int | None = None
    metered: bool | None = None


class Sensors:
    """Takes snapshots, one after the other: load is measured from one to the next. Never raises.

    metered: the owner's word, which overrides what the machine says; None: ask the machine.
    """

    def __init__(
        self,
        state_folder: Path,
        metered: bool | None = None,
        *,
        root: Path = Path("/"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = state_folder
        self._override = metered
        self._root = root
        self._clock = clock
        self._load = readings.LoadMeter(root)
        self._metered: bool | None = None
        self._ask_network_at = float("-inf")

    def read(self) -> Snapshot:
        supplies = power.supplies(self._root)
        return Snapshot(
            charging=power.charging(supplies),
            battery=power.battery(supplies),
            temperature_c=readings.temperature_c(self._root),
            load=self._load.read(),
            free_memory_bytes=readings.free_memory_bytes(self._root),
            free_disk_bytes=readings.free_disk_bytes(self._folder),
            metered=self._override if self._override is not None else self._network(),
        )

    def _network(self) -> bool | None:
        """Asked of another program, so not every second."""
        if self._clock() >= self._ask_network_at:
            self._ask_network_at = self._clock() + ASK_NETWORK_EVERY_S
            self._metered = network.metered(self._root)
        return self._metered


def take(
    state_folder: Path,
    metered: bool | None = None,
    *,
    root: Path = Path("/"),
    sleep: Callable[[float], None] = time.sleep,
) -> Snapshot:
    """One snapshot for whoever needs no second; takes 0.2 s, over which the load is measured.

    metered: ``policy.metered`` of the settings.
    """
    sensors = Sensors(state_folder, metered, root=root)
    sensors.read()
    sleep(MEASURE_LOAD_S)
    return sensors.read()
