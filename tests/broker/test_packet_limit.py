"""A broker that takes smaller packets than a chunk: said clearly by both sides, and nothing is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from aggregator import cli
from tests.support.brokers import mosquitto_installed
from tests.support.command_line import refusal
from tests.support.federation import aggregated_once, federation

LIMIT = 20_000
# The size is a whole chunk's, or of the update that the device was about to send.
ADVICE = (
    f" bytes is above the {LIMIT} bytes this broker takes: set [delivery] `chunk_bytes` of "
    f"aggregator.toml to at most {LIMIT - 512}, or raise the broker's limit (mosquitto: max_packet_size)"
)

pytestmark = pytest.mark.skipif(not mosquitto_installed(), reason="needs mosquitto")


def test_serve_names_the_limit_and_what_it_advises_works(monkeypatch, tmp_path: Path):
    monkeypatch.setattr("aggregator.broker.launcher.MAX_PACKET_BYTES", LIMIT)
    with federation(tmp_path, samples=(160,), round__rounds=1) as fed:
        config = tmp_path / "aggregator" / "aggregator.toml"
        assert f"a packet of {262_144 + 512}{ADVICE}" in refusal(cli.main, "serve", "--config", str(config))
        text = config.read_text()
        assert "chunk_bytes = 262144" in text
        config.write_text(text.replace("chunk_bytes = 262144", f"chunk_bytes = {LIMIT - 512}"))
        fed.start()
        fed.finish()
        aggregated_once(fed.status(), devices=1, versions=1)


def test_a_limit_lowered_in_mid_round_stops_both_sides_and_nothing_is_lost(monkeypatch, tmp_path: Path):
    with federation(tmp_path, samples=(160,), gated=["device-0"], round__rounds=1) as fed:
        fed.start()
        fed.wait_at_gate("device-0")
        fed.broker.stop()
        with monkeypatch.context() as lowered:
            lowered.setattr("aggregator.broker.launcher.MAX_PACKET_BYTES", LIMIT)
            fed.broker.start()
            fed.open_gate("device-0")
            device = fed.devices["device-0"]
            for program in (fed.aggregator, device):
                assert program.wait() == 1
                assert ADVICE in program.errors()
                assert "Traceback" not in program.errors()
        fed.broker.restart()
        fed.start()
        fed.finish()
        aggregated_once(fed.status(), devices=1, versions=1)
