"""CPU and memory of processes while something runs, from /proc (man 5 proc; Linux only).

PSS counts a page shared by n processes as 1/n in each. The peak of the resident set is the kernel's own mark
(VmHWM), not a sample. Socket buffers belong to no process, so they are sampled for the whole machine.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

INTERVAL_S = 0.25
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Of one process from ``watch`` to the last sample. ``rss_peak``: bytes, since the process began."""

    cpu_s: float
    pss_mean: int
    pss_peak: int
    rss_peak: int


class Sampler:
    """Samples what is watched from ``start`` to ``stop`` in a thread of its own."""

    def __init__(self) -> None:
        self.socket_bytes_peak = 0
        self._pids: dict[str, int] = {}
        self._cpu_before: dict[str, float] = {}
        self._cpu: dict[str, float] = {}
        self._pss: dict[str, list[int]] = {}
        self._rss_peak: dict[str, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampling", daemon=True)

    def watch(self, name: str, pid: int) -> None:
        """Call it before ``start``."""
        self._pids[name] = pid
        self._cpu_before[name] = _cpu_s(pid)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> dict[str, Usage]:
        """One last sample, then what was seen, by name; without processes that were never seen alive."""
        self._stop.set()
        self._thread.join()
        self._sample()
        return {
            name: Usage(
                cpu_s=round(max(self._cpu[name] - self._cpu_before[name], 0.0), 2),
                pss_mean=sum(samples) // len(samples),
                pss_peak=max(samples),
                rss_peak=self._rss_peak[name],
            )
            for name, samples in self._pss.items()
        }

    def _run(self) -> None:
        while True:
            started = time.monotonic()
            self._sample()
            if self._stop.wait(max(INTERVAL_S - (time.monotonic() - started), 0.01)):
                return

    def _sample(self) -> None:
        self.socket_bytes_peak = max(self.socket_bytes_peak, socket_bytes())
        for name, pid in self._pids.items():
            pss = _kib(pid, "smaps_rollup", "Pss")
            if pss:  # a process that has just ended has none
                self._pss.setdefault(name, []).append(pss)
                self._rss_peak[name] = _kib(pid, "status", "VmHWM")
                self._cpu[name] = _cpu_s(pid)


def socket_bytes() -> int:
    """What TCP holds in buffers on this machine, bytes; 0 where the kernel does not say."""
    for line in _lines("/proc/net/sockstat"):
        words = line.split()
        if words[:1] == ["TCP:"] and "mem" in words:
            return int(words[words.index("mem") + 1]) * _PAGE_BYTES
    return 0


def _cpu_s(pid: int) -> float:
    """User and system time so far, seconds."""
    lines = _lines(f"/proc/{pid}/stat")
    if not lines:
        return 0.0
    after_name = lines[0].rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / _TICKS_PER_S


def _kib(pid: int, file: str, field: str) -> int:
    """The field in bytes, 0 if the process or the file is not there."""
    lines = _lines(f"/proc/{pid}/{file}")
    value = next((line.split()[1] for line in lines if line.startswith(f"{field}:")), "0")
    return int(value) * 1024


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text("ascii", "replace").splitlines()
    except OSError:
        return []
