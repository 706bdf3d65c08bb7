"""docs/operations.md, the alerts and the units against the code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from aggregator import cli
from aggregator.monitoring.events import EVENTS
from aggregator.monitoring.metrics import METRICS, Kind
from tests.support.brokers import ROOT

DOCUMENT = (ROOT / "docs" / "operations.md").read_text("utf-8")
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yml"
NAME = re.compile(r"\b(?:fleetgrad|process)_[a-z_]+\b")


def table(name: str) -> list[tuple[str, ...]]:
    """The rows between the marks of this name."""
    part = DOCUMENT.partition(f"<!-- {name} -->\n")[2].partition(f"<!-- end of {name} -->")[0]
    lines = part.splitlines()[2:]
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]


def words(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def exposed() -> set[str]:
    """Every series a scrape can hold."""
    parts = [
        (name, ("_bucket", "_sum", "_count") if row.kind is Kind.HISTOGRAM else ("",))
        for name, row in METRICS.items()
    ]
    return {name + suffix for name, suffixes in parts for suffix in suffixes}


def test_the_document_has_the_table_of_metrics() -> None:
    assert table("metrics") == [
        (f"`{name}`", row.kind.value, words(row.labels), row.help) for name, row in METRICS.items()
    ]


def test_the_document_has_the_table_of_events() -> None:
    assert table("events") == [
        (f"`{name}`", row.level, words(row.fields), row.meaning) for name, row in EVENTS.items()
    ]


def test_every_metric_that_an_alert_or_the_text_names_is_exposed() -> None:
    rules = [rule for group in yaml.safe_load(ALERTS.read_text("utf-8"))["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules) > 10
    for rule in rules:
        named = set(NAME.findall(rule["expr"]))
        assert named <= exposed(), rule["alert"]
        assert named or "up{" in rule["expr"], rule["alert"]
    assert set(NAME.findall(DOCUMENT)) <= exposed() | set(METRICS)


def test_the_labels_that_an_alert_selects_by_are_those_of_the_metric() -> None:
    for name, selector in re.findall(
        r"((?:fleetgrad|process)_[a-z_]+)\{([^}]*)\}", ALERTS.read_text("utf-8")
    ):
        labels = set(re.findall(r"(\w+)\s*=", selector)) - {"job"}
        assert labels <= set(METRICS[name].labels), name


def test_every_alert_leads_to_a_runbook() -> None:
    anchors = {
        re.sub(r"[^a-z -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", DOCUMENT, re.M)
    }
    for group in yaml.safe_load(ALERTS.read_text("utf-8"))["groups"]:
        for rule in group["rules"]:
            file, _, anchor = rule["annotations"]["runbook"].partition("#")
            assert (file, anchor in anchors) == ("docs/operations.md", True), rule["alert"]
            assert rule["labels"]["severity"] in ("page", "warn")
    assert set(re.findall(r"\]\(#([a-z-]+)\)", DOCUMENT)) <= anchors


@pytest.mark.parametrize(
    "unit", sorted((ROOT / "deploy" / "systemd").glob("*.service")), ids=lambda path: path.stem
)
def test_the_command_of_a_unit_exists_with_its_options(unit: Path) -> None:
    (line,) = re.findall(r"^ExecStart=(.+)$", unit.read_text("utf-8"), re.M)
    program, *rest = shlex.split(line)
    assert Path(program).name == "aggregator"
    command = typer.main.get_command(cli.app)
    while rest and not rest[0].startswith("-"):
        command = command.commands[rest.pop(0)]  # type: ignore[attr-defined]
    options = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in rest if word.startswith("-")} <= options
