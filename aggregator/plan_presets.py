"""Plans by name, for kinds of fleets: ``[plan] preset = "iot"``; any key beside it overrides the preset's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.schedules import Schedule
from edge_runtime.settings import require

DEFAULT = "default"


class Preset(NamedTuple):
    """``reason``: one sentence, for whom and why."""

    plan: Plan
    reason: str


# docs/operator.md, the help of `aggregator init` and the written file name these; tests compare.
PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        DEFAULT: Preset(Plan(), "One pass with SGD and momentum: where to begin if none of the others fits."),
        "medical": Preset(
            Plan(
                epochs=4,
                optimizer="adamw",
                learning_rate=0.001,
                weight_decay=0.01,
                schedule=Schedule(shape="step", factor=0.5, every=20, warmup_rounds=3),
                sample_cap=20_000,
            ),
            "Few sites with good links and scanners that differ: rounds are dear, so each makes 4 local epochs, "
            "with decay and a warm-up against drifting apart.",
        ),
        "finance": Preset(
            Plan(
                epochs=8,
                batch_size=256,
                optimizer="adam",
                learning_rate=0.001,
                schedule=Schedule(shape="step", factor=0.5, every=20),
                sample_cap=100_000,
            ),
            "A handful of institutions with large tables and rare cases: big batches, and 8 local epochs because a "
            "round takes longer to agree on than to compute.",
        ),
        "iot": Preset(
            Plan(
                epochs=1,
                batch_size=16,
                learning_rate=0.05,
                momentum=0.9,
                schedule=Schedule(shape="step", factor=0.9, every=5, after=10),
                sample_cap=1000,
            ),
            "Many small devices with little data: 1 epoch of SGD is short and takes the least memory; no device "
            "counts as more than 1,000 samples.",
        ),
    }
)


def with_preset(section: Mapping[str, Any]) -> dict[str, Any]:
    """A ``[plan]`` section in TOML's types: its own keys, and those of its preset where it says nothing.

    A schedule that names its shape takes nothing from the preset's. Raises BadSetting for an unknown name.
    """
    own = dict(section)
    name = own.pop("preset", DEFAULT)
    require(
        isinstance(name, str) and name in PRESETS, "plan.preset", name, f"choose from {', '.join(PRESETS)}"
    )
    preset = _document(PRESETS[name].plan)
    schedule = own.get("schedule", {})
    if isinstance(schedule, Mapping) and "shape" not in schedule:
        own["schedule"] = {**preset["schedule"], **schedule}
    return {**preset, **own}


def _document(plan: Plan) -> dict[str, Any]:
    values = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)}
    return {**values, "codecs": list(plan.codecs), "schedule": dataclasses.asdict(plan.schedule)}
