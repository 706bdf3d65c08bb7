"""Every file in deploy/ is read by what will read it; every TOML block of the documents holds known, valid keys."""

from __future__ import annotations

import configparser
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from aggregator.broker.mosquitto import acl_text, config_text
from aggregator.config import load_aggregator_config
from edge_runtime.config import load_device_config
from edge_runtime.protocol.ids import FederationId
from edge_runtime.settings import ConfigError
from tests.support.brokers import ROOT

DEPLOY = ROOT / "deploy"
FEDERATION = FederationId("plant-7")


def device(path: Path) -> None:
    load_device_config(path)


def mosquitto_conf(path: Path) -> None:
    assert path.read_text("utf-8") == config_text(FEDERATION, Path("/etc/mosquitto/fleet"))


def mosquitto_acl(path: Path) -> None:
    assert path.read_text("utf-8") == acl_text(FEDERATION)


def prometheus(path: Path) -> None:
    document = yaml.safe_load(path.read_text("utf-8"))
    assert [DEPLOY / "prometheus" / name for name in document["rule_files"]] == [ALERTS]
    (job,) = document["scrape_configs"]
    assert job["static_configs"][0]["targets"] == ["127.0.0.1:9464"]  # what [monitoring] suggests


def alerts(path: Path) -> None:
    groups = yaml.safe_load(path.read_text("utf-8"))["groups"]
    assert all(
        {"alert", "expr", "labels", "annotations"} <= rule.keys() for g in groups for rule in g["rules"]
    )


def unit(path: Path) -> None:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(path.read_text("utf-8"))
    assert {"Unit", "Service"} <= set(parser.sections()) <= {"Unit", "Service", "Install"}


ALERTS = DEPLOY / "prometheus" / "alerts.yml"
READERS: dict[str, Callable[[Path], None]] = {
    "device.toml": device,
    "mosquitto.conf": mosquitto_conf,
    "mosquitto.acl": mosquitto_acl,
    "prometheus/prometheus.yml": prometheus,
    "prometheus/alerts.yml": alerts,
    "systemd/fleetgrad-aggregator.service": unit,
    "systemd/fleetgrad-registrar.service": unit,
}


def test_every_sample_has_its_reader() -> None:
    assert {str(path.relative_to(DEPLOY)) for path in DEPLOY.rglob("*") if path.is_file()} == READERS.keys()


@pytest.mark.parametrize("name", READERS)
def test_a_sample_reads(name: str) -> None:
    READERS[name](DEPLOY / name)


BLOCKS = [
    pytest.param(text, id=f"{document.stem}-{number}")
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    for number, text in enumerate(
        re.findall(r"^```toml\n(.*?)^```", document.read_text("utf-8"), re.M | re.S)
    )
]


@pytest.mark.parametrize("text", BLOCKS)
def test_a_toml_block_of_the_documents_is_part_of_a_settings_file(text: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(text)
    complaints = []
    for load in (load_device_config, load_aggregator_config):
        try:
            load(path)
            return
        except ConfigError as error:
            complaints.append([str(p) for p in error.problems if p.found not in ("missing", "not set")])
    assert [] in complaints, complaints
