"""Every figure of a run in one value: what the table shows, the checks judge and ``--json`` writes."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fldemo.baselines import Baselines
from fldemo.federation import Run
from fldemo.memory import MemorySampler, Usage
from fldemo.scenario import AGGREGATOR, DEVICES


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Over the devices that reported."""

    least: float
    mean: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None for no values."""
        return cls(least=min(values), mean=statistics.mean(values), most=max(values)) if values else None


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes, while rounds ran. ``total_peak``: largest sum of PSS of all processes at one moment."""

    device_pss_mean: int
    device_rss_peak: int
    aggregator_pss: int
    broker_pss: int
    total_peak: int
    processes: int


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Scores in [0, 1] on held-out samples; seconds; bytes. ``refused``: messages, by reason.

    ``metric``: what a score is. ``error``: its standard error. ``recall``: by class, in [0, 1].
    """

    example: str
    metric: str
    seed: int
    broker: str
    samples: Mapping[str, int]
    held_out: int
    parameters: int
    score: float
    score_npz: float
    error: float
    recall: Mapping[str, float]
    baselines: Baselines
    rounds: int
    aborted: int
    version: int
    late: int
    refused: Mapping[str, int]
    killed: Mapping[str, int]
    returned: Mapping[str, int]
    updates: int
    round_median_s: float
    round_mean_s: float
    bytes_up: Spread | None
    bytes_down: Spread | None
    update_bytes_per_parameter: float | None
    memory: Memory | None
    start_up_s: float
    total_s: float
    files: tuple[str, ...]
    violations: tuple[str, ...]

    @property
    def error_points(self) -> float:
        """Standard error of ``score`` in hundredths: what a draw of so many held-out samples can tell."""
        return 100 * self.error

    @property
    def gap_points(self) -> float:
        """Hundredths below central training; rounded, so that 0.98 and 0.96 are 2 apart."""
        return round(100 * (self.baselines.central - self.score), 6)

    def as_json(self) -> dict[str, Any]:
        """Plain values; ``baselines`` with the mean of local-only training."""
        plain = dataclasses.asdict(self)
        plain["baselines"]["local_mean"] = self.baselines.local_mean
        return plain


def memory_figures(sampler: MemorySampler, broker: str) -> Memory | None:
    """None where the system has no /proc."""
    usage: Mapping[str, Usage] = sampler.usage()
    devices = [usage[name] for name in DEVICES if name in usage]
    if not devices or AGGREGATOR not in usage:
        return None
    return Memory(
        device_pss_mean=round(statistics.mean(one.pss_mean for one in devices)),
        device_rss_peak=max(one.rss_peak for one in devices),
        aggregator_pss=usage[AGGREGATOR].pss_peak,
        broker_pss=usage[broker].pss_peak if broker in usage else 0,
        total_peak=sampler.total_peak(),
        processes=len(usage),
    )


def round_seconds(run: Run) -> tuple[float, float]:
    """Median and mean of the time from one published version to the next, seconds.

    Included: selection, model download, training, encryption, upload, aggregation, publication, and rounds that
    were aborted in between. Not: start-up and enrolment, which end when the first round opens.
    """
    seconds = [round_.seconds for round_ in run.published if round_.seconds is not None]
    return (statistics.median(seconds), statistics.mean(seconds)) if seconds else (0.0, 0.0)


def model_files(folder: Path) -> tuple[str, ...]:
    """The exported files, sorted."""
    return tuple(str(path) for path in sorted(folder.iterdir()))
