"""What the processes of a run hold in memory, from /proc (man 5 proc); on other systems nothing is measured.

PSS counts a page shared by n processes as 1/n in each, so the sum over processes is what they take together.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

INTERVAL_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Bytes over the samples of one process: mean and largest PSS, largest resident set (VmHWM)."""

    pss_mean: int
    pss_peak: int
    rss_peak: int


class MemorySampler:
    """Samples the watched processes until stopped. A name may be watched again with a new pid."""

    def __init__(self) -> None:
        self._pids: dict[str, int] = {}
        self._pss: dict[str, list[int]] = {}
        self._rss_peak: dict[str, int] = {}
        self._total_peak = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def watch(self, name: str, pid: int) -> None:
        with self._lock:
            self._pids[name] = pid

    def forget(self, name: str) -> None:
        with self._lock:
            self._pids.pop(name, None)

    def usage(self) -> Mapping[str, Usage]:
        """By name; without those that were never seen alive."""
        with self._lock:
            return {
                name: Usage(
                    pss_mean=sum(samples) // len(samples),
                    pss_peak=max(samples),
                    rss_peak=self._rss_peak.get(name, 0),
                )
                for name, samples in self._pss.items()
            }

    def total_peak(self) -> int:
        """The largest sum of PSS over all watched processes at one moment, bytes; 0: not measured."""
        with self._lock:
            return self._total_peak

    def sample(self) -> None:
        """Once now; the thread does it every INTERVAL_S."""
        with self._lock:
            pids = dict(self._pids)
        total = 0
        for name, pid in pids.items():
            pss = _kib(pid, "smaps_rollup", "Pss")
            peak = _kib(pid, "status", "VmHWM")
            if pss:  # a process that has just ended has none
                total += pss
                with self._lock:
                    self._pss.setdefault(name, []).append(pss)
                    self._rss_peak[name] = max(peak, self._rss_peak.get(name, 0))
        with self._lock:
            self._total_peak = max(self._total_peak, total)

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self.sample()


def _kib(pid: int, file: str, field: str) -> int:
    """The field in bytes, 0 if the process or the file is not there."""
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text("ascii", "replace").splitlines()
    except OSError:
        return 0
    value = next((line.split()[1] for line in lines if line.startswith(f"{field}:")), "0")
    return int(value) * 1024
