"""The files that `aggregator broker-config mosquitto` writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from aggregator.access import rules
from aggregator.broker.mosquitto import BrokerConfigError, acl_text, config_text, write_config
from edge_runtime.protocol.envelope import OVERHEAD_BYTES
from edge_runtime.protocol.ids import FederationId

FEDERATION = FederationId("plant-7")
INSTALLED = Path("/etc/mosquitto/fleet")


def test_every_rule_is_a_line_of_the_acl_and_every_line_a_rule() -> None:
    lines = [line for line in acl_text(FEDERATION).splitlines() if line.startswith(("pattern", "topic"))]
    assert [line.split()[1:] for line in lines if not line.startswith("topic deny")] == [
        [rule.action.value, rule.pattern] for rule in rules(FEDERATION)
    ]


def settings(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return dict(line.split(" ", 1) for line in lines if not line.startswith("log_type"))


def test_packets_are_as_large_as_the_chunks_need() -> None:
    small = settings(config_text(FEDERATION, INSTALLED, chunk_bytes=8192))
    large = settings(config_text(FEDERATION, INSTALLED, chunk_bytes=4 << 20))
    assert small["max_packet_size"] == str(1 << 20)
    assert large["max_packet_size"] == str((4 << 20) + OVERHEAD_BYTES)


@pytest.mark.parametrize(
    ("port", "bind", "folder", "message"),
    [
        (0, None, INSTALLED, "port 0"),
        (65_536, None, INSTALLED, "port 65536"),
        (8883, "broker.example", INSTALLED, "no IP address"),
        (8883, "127.0.0.1\nallow_anonymous true", INSTALLED, "no IP address"),
        (8883, None, Path("/etc/a\nallow_anonymous true"), "control character"),
    ],
)
def test_what_would_make_a_bad_line_is_refused(
    port: int, bind: str | None, folder: Path, message: str
) -> None:
    with pytest.raises(BrokerConfigError, match=message):
        config_text(FEDERATION, folder, port=port, bind=bind)


def test_files_that_are_there_are_replaced_by_force_only(tmp_path: Path) -> None:
    (tmp_path / "acl").write_text("mine")
    with pytest.raises(BrokerConfigError, match="acl exist"):
        write_config(tmp_path, FEDERATION)
    assert [path.name for path in tmp_path.iterdir()] == ["acl"]
    config, missing = write_config(tmp_path, FEDERATION, force=True)
    assert config.read_text() == config_text(FEDERATION, tmp_path)
    assert (tmp_path / "acl").read_text() == acl_text(FEDERATION)
    assert (tmp_path / "data").is_dir()
    assert missing == ["ca.crt", "broker.crt", "broker.key", "revoked.crl"]
