"""One aggregator at a time: a ledger that moved to another folder is served only by who says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.federation.conftest import ROUNDS, Undisturbed
from tests.support.federation import aggregated_once, federation

pytestmark = pytest.mark.long


def test_a_moved_state_folder_is_refused_until_taken_over_and_then_the_round_goes_on(
    tmp_path: Path, undisturbed: Undisturbed
) -> None:
    with federation(tmp_path, plan__sample_cap=10_007) as fed:
        fed.start()
        fed.aggregator.wait_for("update_stored", round=1)
        fed.aggregator.kill()
        config = tmp_path / "aggregator" / "aggregator.toml"
        state = fed.config.folder
        state.rename(state.with_name("moved"))
        config.write_text(config.read_text().replace('folder = "state"', 'folder = "moved"'))
        refused = fed.command("aggregator.cli", "serve", "--config", str(config))
        assert refused.returncode == 1
        assert str(state.resolve()) in refused.stderr
        assert "--take-over" in refused.stderr

        fed.moved_to(state.with_name("moved"))
        fed.aggregator.start(command=[*fed.aggregator.command, "--take-over"])
        assert fed.finish() == undisturbed.models
        aggregated_once(fed.status(), devices=3, versions=ROUNDS)
